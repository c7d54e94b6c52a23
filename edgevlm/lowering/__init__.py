"""How a float ONNX graph becomes a backend's own forms of it. One file per backend, one line here.

The runtime's backend of the same name opens what is made here; this side may import whatever it needs to make it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

from edgevlm.quantization.calibration import CalibrationRecipe
from edgevlm.quantization.schemes import Calibration
from edgevlm.runtime.spec import Array, SessionOptions, Spec
from edgevlm.target import Target

LOWERINGS: dict[str, str] = {
    "onnxruntime": "edgevlm.lowering.onnxruntime:OnnxRuntimeLowering",
    "openvino": "edgevlm.lowering.openvino:OpenVinoLowering",
    "tensorrt": "edgevlm.lowering.tensorrt:TensorRtLowering",
    "tensorrt-rtx": "edgevlm.lowering.tensorrt:TensorRtRtxLowering",
}


class Recipe(Spec, frozen=True, kw_only=True):
    """How one form of a graph is made; a backend's own subclass adds what it must know. Part of the store's key.

    Args:
        name: of the form, unique among all backends' forms of a graph; ``fp32`` alone is ONNX Runtime's float.
        precision: a short name such as ``fp32``, ``bf16``, ``int8-static``, ``int4-weights``.
        is_calibrated: pictures are needed to make it.
        keep_float: nodes of the prepared graph, by name, that stay in float though the recipe would lower them.
        is_for_size: made for its size, and tried where there is a size budget or its precision was asked for by name.
        session: what the backend must be told when it opens the form; the number of threads is filled in later.
    """

    name: str
    precision: str
    is_calibrated: bool = False
    keep_float: tuple[str, ...] = ()
    is_for_size: bool = False
    session: SessionOptions = SessionOptions()

    def describe(self) -> dict[str, str]:
        """The recipe in words, for a report."""
        return {"kept in float": " ".join(self.keep_float)} if self.keep_float else {}


class Lowered(Spec, frozen=True, kw_only=True):
    """A form of a graph on disk.

    Args:
        files: names in the folder that it was written to, the graph itself first, then what it needs beside it.
        runs: what the backend really runs, by a name and in words, such as ``{"runs": "52 int8, 1 float"}``.
    """

    files: tuple[str, ...]
    runs: dict[str, str] = {}


class CalibrationData(Protocol):
    """Pictures (or texts) of the calibration split, as a graph takes them, and statistics gathered over them."""

    @property
    def recipe(self) -> CalibrationRecipe: ...

    def feeds(self) -> Iterator[dict[str, Array]]:
        """Inputs by name, one call at a time at the graph's batch."""
        ...

    def ranges(self, prepared: Path, method: Calibration) -> Path:
        """Activation ranges of an ONNX graph as ``collect_ranges`` writes them: gathered once, then looked up."""
        ...


class Lowering(Protocol):
    """Makes a backend's forms of a graph."""

    tools: ClassVar[tuple[str, ...]]
    """Distributions whose versions decide what comes out."""
    judged_by: ClassVar[str]
    """The backend that answers here as a form does: its own, or one that reads what cannot be run here."""
    judged_with: ClassVar[SessionOptions]
    """What that backend is told besides, so that it computes what is written."""

    def prepare(self, graph: Path, out: Path) -> Path:
        """Write into the folder ``out`` what every recipe starts from; the result is the main file there.

        Raises: ModelError: the backend cannot read the graph.
        """
        ...

    def recipes(self, prepared: Path, *, target: Target, calibration: CalibrationRecipe) -> tuple[Any, ...]:
        """The forms worth trying on a target, each a ``Recipe``: plain float first, then the most promising first."""
        ...

    def lowered_nodes(self, prepared: Path, recipe: Any) -> tuple[str, ...]:
        """The nodes that do the work and that ``recipe`` lowers, by name, in the order in which they run."""
        ...

    def sessions(self, recipe: Any, *, n_threads: int, may_use_fewer: bool) -> dict[str, SessionOptions]:
        """Other ways to open a form that may be faster, by a short name; what it answers must stay the same.

        Args:    may_use_fewer: nobody asked for exactly ``n_threads``.
        """
        ...

    def lower(self, graph: Path, prepared: Path, recipe: Any, data: CalibrationData, out: Path) -> Lowered:
        """Write one form into the folder ``out``. The same inputs give the same bytes, where the backend allows it.

        Args:    graph: the exported graph; ``prepared``: what ``prepare`` made of it.
        Raises:  ModelError: the backend refuses. DataError: the calibration data cannot be used.
        """
        ...


def load_lowering(backend: str) -> Lowering:
    """The lowering to ``backend``, one of ``LOWERINGS``."""
    module, _, attribute = LOWERINGS[backend].partition(":")
    lowering: Lowering = getattr(importlib.import_module(module), attribute)()
    return lowering
