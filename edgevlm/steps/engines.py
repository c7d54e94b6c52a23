"""TensorRT's forms in a bundle: a finished engine where one can be built here, else what builds it on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgevlm.errors import MissingToolError
from edgevlm.export import Exported
from edgevlm.job import Work
from edgevlm.lowering.tensorrt_engine import (
    BuildSettings,
    ShapeRange,
    build_engine,
    build_script,
    buildable_compute_capabilities,
    trtexec_line,
)
from edgevlm.lowering.tensorrt_lint import check_graph
from edgevlm.plan import TEXT_ENCODER
from edgevlm.progress import StepProgress
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.engine import AskedRange
from edgevlm.runtime.spec import TensorSpec, to_json
from edgevlm.runtime.tasks.mask_generation import MASK_DECODER, MOST_PROMPTS
from edgevlm.runtime.text import MOST_TEXTS
from edgevlm.search.spec import Variant
from edgevlm.steps.variants import file_digest
from edgevlm.store import code_digest, read_spec

Status = Literal["ready", "needs device build"]

_MOST_ROWS = 8
_MOST_ROWS_OF = {TEXT_ENCODER: MOST_TEXTS, MASK_DECODER: 1}
"""Of a batch that is free, where nobody asks for others; texts and prompts come as the pipeline puts them together."""
_MOST_POINTS = 8
"""Of a prompt, the corners of its box among them, where nobody asks for more."""


@dataclass(frozen=True, kw_only=True)
class EngineFiles:
    """What a form's folder holds.

    Args:
        files: contents, or where they lie, by name; what the backend opens stands first.
        why_not_built: a sentence; empty where the engine is there.
    """

    files: Mapping[str, Path | bytes]
    settings: BuildSettings
    why_not_built: str = ""
    status: Status = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", "needs device build" if self.why_not_built else "ready")


def engine_files(work: Work, variant: Variant, *, fed: Sequence[Mapping[str, int]]) -> EngineFiles:
    """The engine of a graph, built once and then looked up, or the graph with what builds it.

    Args:   fed: sizes that the engine must take, by the name of the free dimension.
    Raises: ModelError: TensorRT rejects the graph, or would compute something else, or the engine is not for ``fed``.
    """
    graph = work.inputs["search"] / variant.file
    settings = settings_of(work, variant)
    check_graph(graph, shapes=settings.shapes, fed=[_sizes(_exported(work, variant).inputs, each) for each in fed])
    why = _why_not_here(settings)
    if why:
        sources: dict[str, Path | bytes] = {Path(file).name: work.inputs["search"] / file for file in variant.files}
        return EngineFiles(
            files={**sources, **_how_to_build(graph.name, settings)}, settings=settings, why_not_built=why
        )
    name = f"{variant.graph}.engine"

    def make(out: Path) -> None:
        work.progress(StepProgress(name=work.step.name, detail=f"building the engine of {variant.name}"))
        build_engine(graph, out / name, settings=settings)

    parts = {
        "graph": file_digest(graph),
        "settings": msgspec.to_builtins(settings),
        "version": load_backend(settings.backend).version(),
        "code": code_digest(),
    }
    folder = work.store.fetch("engine", parts, make).path
    return EngineFiles(files={name: folder / name, f"{name}.json": folder / f"{name}.json"}, settings=settings)


def settings_of(work: Work, variant: Variant) -> BuildSettings:
    """For the target's GPU, with a range of sizes for each free dimension."""
    text, capability = work.job.model.processing.text, work.job.target.compute_capability
    return BuildSettings(
        backend="tensorrt-rtx" if variant.backend == "tensorrt-rtx" else "tensorrt",
        shapes=shape_ranges(
            variant.graph,
            _exported(work, variant).inputs,
            asked=work.job.request.shapes,
            text_length=text.max_length if text else 1,
        ),
        # The full TensorRT builds for the GPU at hand alone.
        compute_capabilities=(capability,) if variant.backend == "tensorrt-rtx" else (),
    )


def shape_ranges(
    graph: str, inputs: Sequence[TensorSpec], *, asked: Mapping[str, AskedRange], text_length: int
) -> dict[str, ShapeRange]:
    """What each input of a graph may be where it is free: as asked for, else what the pipeline feeds.

    Args: text_length: of the longest text.
    """
    sizes = {"sequence": (1, text_length, text_length), "prompts": (1, 1, MOST_PROMPTS), "points": (1, 2, _MOST_POINTS)}
    rows = (1, 1, _MOST_ROWS_OF.get(graph, _MOST_ROWS))
    ranges = {}
    for spec in inputs:
        known = [(size,) * 3 if isinstance(size, int) else sizes.get(size, rows) for size in spec.shape]
        low, best, high = zip(*known, strict=True)
        usual = ShapeRange(min=low, opt=best, max=high)
        span = asked[spec.name].completed(spec.shape, usual=usual) if spec.name in asked else usual
        # trtexec refuses the sizes of a graph that leaves none free, even the right ones; of wrong ones the lint tells.
        if span != usual or any(isinstance(size, str) for size in spec.shape):
            ranges[spec.name] = span
    return ranges


def _sizes(inputs: Sequence[TensorSpec], fed: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    return {spec.name: tuple(n if isinstance(n, int) else fed.get(n, 1) for n in spec.shape) for spec in inputs}


def _exported(work: Work, variant: Variant) -> Exported:
    return read_spec(work.inputs[f"export:{variant.graph}"] / "exported.json", Exported)


def _why_not_here(settings: BuildSettings) -> str:
    if settings.backend == "tensorrt":
        return "TensorRT builds an engine on the GPU that will run it."
    try:
        known = buildable_compute_capabilities(settings.backend)
    except MissingToolError as error:
        return error.message
    strange = sorted(set(settings.compute_capabilities) - set(known))
    return f"TensorRT for RTX does not build for compute capability {', '.join(strange)}." if strange else ""


def _how_to_build(graph: str, settings: BuildSettings) -> dict[str, bytes]:
    """The settings as data and, for TensorRT's own command line, a script as text: nothing in a bundle is run."""
    engine = graph.replace(".onnx", ".engine")
    files = {"build.json": to_json(settings)}
    if settings.backend == "tensorrt":
        lines = [f"# TensorRT {major}.x: {trtexec_line(graph, engine, settings, major=major)}" for major in (10, 11)]
        shebang, _, rest = build_script(graph, engine, settings).partition("\n")
        files["build.sh.txt"] = "\n".join([shebang, *lines, rest]).encode()
    return files


def as_data(settings: BuildSettings) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(settings)
    return found
