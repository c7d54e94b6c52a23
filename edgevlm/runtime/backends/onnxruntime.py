"""ONNX Runtime, CPU execution provider."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.errors import MissingToolError, ModelError, RefusedGraphError
from edgevlm.runtime.machine import describe_machine
from edgevlm.runtime.spec import Array, SessionOptions, TensorSpec

# What a session may be told. A bundle is data: it must not have files written (statistics, an optimized graph, ...).
_ENTRIES = frozenset({
    "optimization.disable_specified_optimizers", "session.disable_quant_qdq", "session.force_spinning_stop",
    "session.intra_op.allow_spinning",
})  # fmt: skip

# ONNX Runtime names types as tensor(float); numpy and the manifest as float32.
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class OnnxRuntime:
    name = "onnxruntime"

    def version(self) -> str | None:
        try:
            import onnxruntime as ort
        except ImportError:
            return None
        return str(ort.__version__)

    def open(self, file: Path, options: SessionOptions) -> OnnxRuntimeSession:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MissingToolError("ONNX Runtime is not installed.", hint="Run: pip install onnxruntime") from error
        try:
            settings = session_settings(options)
            session = ort.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own classes, all derived from Exception alone
            raise RefusedGraphError(
                f"ONNX Runtime {ort.__version__} refuses '{file.name}': {_words(error)}.",
                hint="Check that this ONNX Runtime is at least the version the bundle names (edgevlm inspect).",
            ) from error
        return OnnxRuntimeSession(session)


def session_settings(options: SessionOptions) -> Any:
    """ONNX Runtime's own settings for ``options``."""
    import onnxruntime as ort

    if unknown := sorted(options.entries.keys() - _ENTRIES):
        raise ValueError(f"a session cannot be told {', '.join(unknown)}")
    ort.disable_telemetry_events()
    levels = ort.GraphOptimizationLevel
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    # Left to itself ONNX Runtime starts a thread for each core of the machine, even where this process may not use it
    # (a container, taskset), and ties it to that core.
    settings.intra_op_num_threads = options.n_threads or describe_machine().n_physical_cores
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = {
        "none": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "all": levels.ORT_ENABLE_ALL,
    }[options.graph_level]
    for key, value in options.entries.items():
        settings.add_session_config_entry(key, value)
    return settings


class OnnxRuntimeSession:
    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = tuple(_tensor_spec(value) for value in session.get_inputs())
        self.outputs = tuple(_tensor_spec(value) for value in session.get_outputs())
        self._output_names = [output.name for output in self.outputs]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            values = self._session.run(self._output_names, dict(feeds))
        except Exception as error:
            raise ModelError(f"ONNX Runtime could not run the graph: {_words(error)}.") from error
        return dict(zip(self._output_names, values, strict=True))


def _tensor_spec(value: Any) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else str(d or "?") for d in value.shape)
    return TensorSpec(name=value.name, dtype=_DTYPES.get(value.type, value.type), shape=shape)


def _words(error: BaseException) -> str:
    """ONNX Runtime's own words on one line, without ``[ONNXRuntimeError] : 7 : INVALID_PROTOBUF :`` in front."""
    words = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    return words[:400].rstrip(".") or type(error).__name__
