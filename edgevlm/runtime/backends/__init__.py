"""What can run a graph. One file per backend, one line here; each imports only its own library, and only when asked.

A backend serves both sides: the compile side lowers to it, the runtime opens sessions with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from edgevlm.errors import UsageError, did_you_mean
from edgevlm.runtime.spec import Array, SessionOptions, TensorSpec

BACKENDS: dict[str, str] = {
    "onnxruntime": "edgevlm.runtime.backends.onnxruntime:OnnxRuntime",
    "openvino": "edgevlm.runtime.backends.openvino:OpenVino",
    "tensorrt": "edgevlm.runtime.backends.tensorrt:TensorRt",
    "tensorrt-rtx": "edgevlm.runtime.backends.tensorrt:TensorRtRtx",
}


class Session(Protocol):
    """A graph ready to run."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name.

        Raises: EdgeVLMError where the backend refuses, in its own words.
        """
        ...


class Backend(Protocol):
    """A library that runs graphs."""

    name: str

    def version(self) -> str | None:
        """The version that would run, or None where the library is not installed or does not load."""
        ...

    def open(self, file: Path, options: SessionOptions) -> Session:
        """Load a graph.

        Raises: MissingToolError: the backend is not installed. RefusedGraphError: it does not open the graph.
        """
        ...


def load_backend(name: str) -> Backend:
    """The backend called ``name``.

    Raises: UsageError: nothing is called so.
    """
    if name not in BACKENDS:
        raise UsageError(f"There is no backend '{name}'.", hint=did_you_mean(name, BACKENDS))
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend


def install_command(name: str) -> str:
    """What installs a backend; all but the first are extras of edgevlm."""
    return "pip install onnxruntime" if name == "onnxruntime" else f"pip install 'edgevlm[{name}]'"
