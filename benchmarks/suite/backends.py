"""What opens a rival's artifact where edgevlm's runtime has no backend for it, behind the runtime's interface.

Runs in the rival's environment, which has numpy, msgspec and the rival's runtime.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.runtime.spec import Array, SessionOptions, TensorSpec

MODULE = "module.json"
"""Says what a folder holds that PyTorch runs: ``Module`` below, as JSON."""


class OpenVino:
    """OpenVINO as its documentation has it: ``Core().compile_model``, called with arrays.

    Its defaults choose the precision by the processor: bfloat16 where that is fast. ``entries`` are its properties.
    """

    name = "openvino"

    def version(self) -> str | None:
        import openvino

        return str(openvino.__version__).partition("-")[0]

    def open(self, file: Path, options: SessionOptions) -> OpenVinoSession:
        import openvino

        settings = dict(options.entries)
        if options.n_threads:
            settings["INFERENCE_NUM_THREADS"] = str(options.n_threads)
        return OpenVinoSession(openvino.Core().compile_model(file, "CPU", settings))


class OpenVinoSession:
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._names = [output.get_any_name() for output in compiled.outputs]

    @property
    def says(self) -> dict[str, str]:
        """The precision that floats are computed in."""
        hint = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        return {"floats run as": getattr(hint, "get_type_name", lambda: str(hint))()}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        # Without copies, as ONNX Runtime takes its inputs; what comes out is valid until the next run.
        result = self._compiled(dict(feeds), share_inputs=True, share_outputs=True)
        return {name: result[i] for i, name in enumerate(self._names)}


class TorchEager:
    """PyTorch as it comes: float32, inference mode. ``file`` is a folder with ``module.json``."""

    name = "torch"

    def version(self) -> str | None:
        import torch

        return str(torch.__version__)

    def open(self, file: Path, options: SessionOptions) -> TorchSession:
        import torch

        torch.set_num_threads(options.n_threads or torch.get_num_threads())
        description = json.loads((file / MODULE).read_text(encoding="utf-8"))
        return TorchSession(self.prepared(_load(file, description)), description["outputs"])

    def prepared(self, module: Any) -> Any:
        return module


class TorchCompile(TorchEager):
    """The same through ``torch.compile`` with its defaults; the first run compiles."""

    def prepared(self, module: Any) -> Any:
        import torch

        return torch.compile(module)


class TorchSession:
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, module: Any, outputs: list[str]) -> None:
        self._module = module
        self._outputs = outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        with torch.inference_mode():
            got = self._module(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        if isinstance(got, torch.Tensor):
            got = (got,)
        if isinstance(got, tuple | list):
            got = dict(zip(self._outputs, got, strict=False))
        return {name: got[name].numpy() for name in self._outputs}


def _load(folder: Path, description: Mapping[str, Any]) -> Any:
    """A Transformers checkpoint by its class, or an ONNX graph's operators as torch calls, or a factory's module."""
    if "architecture" in description:
        import transformers

        source = (folder / description["checkpoint"]).resolve()
        return getattr(transformers, description["architecture"]).from_pretrained(source).eval()
    if "graph" in description:
        from benchmarks.suite.onnx_in_torch import module_from_onnx

        return module_from_onnx(folder / description["graph"])
    module, _, factory = description["factory"].partition(":")
    return getattr(importlib.import_module(module), factory)(folder).eval()
