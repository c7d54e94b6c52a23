"""A stand-in for TensorRT and CUDA, for machines without a GPU: memory of the host, and a graph run by ONNX Runtime.

It is as strict as their documentation is: shapes before addresses, addresses before a run, copies only within what was
allocated, nothing read before the stream is waited for. What TensorRT itself does it does not show.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

VERSION = "10.3.0"
_DTYPES = {"tensor(float)": ("FLOAT", "float32"), "tensor(int64)": ("INT64", "int64")}


class FakeCuda:
    """``cuda.bindings.runtime``: every call returns a tuple, its error first."""

    class cudaMemcpyKind(IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    class cudaDeviceAttr(IntEnum):
        cudaDevAttrComputeCapabilityMajor = 75
        cudaDevAttrComputeCapabilityMinor = 76

    def __init__(self, compute_capability: str | None = "8.7", *, memory_bytes: int = 1 << 30) -> None:
        self.compute_capability = compute_capability
        self.memory_bytes = memory_bytes
        self.blocks: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.waiting: list[Callable[[], None]] = []
        self.n_allocations = 0

    def cudaGetDevice(self) -> tuple[int, int | None]:
        return (0, 0) if self.compute_capability else (35, None)

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        assert self.compute_capability and device == 0
        return 0, int(self.compute_capability.split(".")[attribute - 75])

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, {2: b"out of memory", 35: b"CUDA driver version is insufficient for CUDA runtime version"}[error]

    def cudaMalloc(self, n_bytes: int) -> tuple[int, int | None]:
        if n_bytes > self.memory_bytes:
            return 2, None
        block = (ctypes.c_char * n_bytes)()
        self.blocks[ctypes.addressof(block)] = block
        self.n_allocations += 1
        return 0, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[int]:
        del self.blocks[address]
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:
        self.streams.add(7)
        return 0, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.streams.remove(stream)
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, n_bytes: int, kind: int, stream: int) -> tuple[int]:
        assert stream in self.streams
        on_device = to if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice else source
        assert n_bytes <= len(self.blocks[on_device]), "a copy beyond what was allocated"
        self.waiting.append(lambda: ctypes.memmove(to, source, n_bytes) and None)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        assert stream in self.streams
        while self.waiting:
            self.waiting.pop(0)()
        return (0,)


class FakeTensorRt:
    """The module ``tensorrt``; an "engine" is an ONNX graph."""

    __version__ = VERSION

    class TensorIOMode(Enum):
        INPUT = 1
        OUTPUT = 2

    class TensorLocation(Enum):
        DEVICE = 0
        HOST = 1

    class ILogger:
        class Severity(IntEnum):
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2

        def __init__(self) -> None: ...

    class IProfiler:
        def __init__(self) -> None: ...

    class LayerInformationFormat(Enum):
        ONELINE = 0
        JSON = 1

    def __init__(self, cuda: FakeCuda, *, on_host: tuple[str, ...] = (), fails: str = "") -> None:
        self.cuda, self.on_host, self.fails = cuda, on_host, fails

    def Runtime(self, log: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self._engine(log, data))

    def _engine(self, log: Any, data: bytes) -> FakeEngine | None:
        if not data.startswith(b"engine:"):
            log.log(self.ILogger.Severity.WARNING, "this is but a warning")
            log.log(self.ILogger.Severity.ERROR, "readHeader: Assertion bufferSize >=\n minBufferSize failed.")
            return None
        return FakeEngine(self, log, data.removeprefix(b"engine:"))


class FakeEngine:
    def __init__(self, trt: FakeTensorRt, log: Any, graph: bytes) -> None:
        self.trt, self.log = trt, log
        settings = ort.SessionOptions()
        settings.add_session_config_entry("session.disable_quant_qdq", "1")  # else fp16 beside int8 overflows
        self.session = ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
        self.tensors = {
            **{value.name: (trt.TensorIOMode.INPUT, value) for value in self.session.get_inputs()},
            **{value.name: (trt.TensorIOMode.OUTPUT, value) for value in self.session.get_outputs()},
        }
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_DTYPES[self.tensors[name][1].type][0])

    def get_tensor_location(self, name: str) -> Any:
        return self.trt.TensorLocation.HOST if name in self.trt.on_host else self.trt.TensorLocation.DEVICE

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)

    def create_engine_inspector(self) -> FakeInspector:
        return FakeInspector(self)


class FakeInspector:
    """Of dynamic shapes it tells layouts only once it has a context whose shapes are set."""

    def __init__(self, engine: FakeEngine) -> None:
        self.trt = engine.trt
        self.execution_context: FakeContext | None = None

    def get_engine_information(self, format: Any) -> str:
        assert format == self.trt.LayerInformationFormat.JSON
        if self.trt.fails == "get_engine_information":
            return "none"
        is_known = self.execution_context is not None and bool(self.execution_context.shapes)
        layout = "Row major linear FP16 format" if is_known else "N/A due to dynamic shapes"
        tensors = [{"Name": "x", "Format/Datatype": layout}]
        layer = {"Name": "Conv_0 + Relu_1", "LayerType": "CaskConvolution", "Inputs": tensors, "Outputs": tensors}
        return json.dumps({"Layers": [layer, "Reshape_4"], "Bindings": ["x"]})


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.trt = engine, engine.trt
        self.profiler: Any = None
        self.n_runs = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.trt.fails == "set_input_shape":
            self.engine.log.log(self.trt.ILogger.Severity.ERROR, "Static dimension mismatch")
            return False
        self.shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        if self.trt.fails == "infer_shapes":
            raise RuntimeError("shapes do not\n add up")
        inputs = [name for name, (mode, _) in self.engine.tensors.items() if mode == self.trt.TensorIOMode.INPUT]
        return [name for name in inputs if name not in self.shapes or name not in self.addresses]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert not self.infer_shapes()
        batch = next(iter(self.shapes.values()))[0]
        if self.trt.fails == "get_tensor_shape":
            return (-1, 10)
        return tuple(d if isinstance(d, int) else batch for d in self.engine.tensors[name][1].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert (address in self.trt.cuda.blocks) is (name not in self.trt.on_host)
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self.addresses.keys() == self.engine.tensors.keys()
        if self.trt.fails == "execute_async_v3":
            self.engine.log.log(self.trt.ILogger.Severity.ERROR, "Cuda Runtime (an illegal memory access)")
            return False
        self.trt.cuda.waiting.append(self._run)
        self.n_runs += 1
        if self.profiler is not None and self.trt.fails != "report_layer_time":
            # The first runs are slow; a layer may run twice.
            ms = 9.0 if self.n_runs <= 3 else 0.25
            for name, time_ms in (("Conv_0 + Relu_1", ms), ("Reshape_4", ms), ("Conv_0 + Relu_1", 2 * ms)):
                self.profiler.report_layer_time(name, time_ms)
        return True

    def _run(self) -> None:
        feeds, outputs = {}, {}
        for name, (mode, value) in self.engine.tensors.items():
            dtype = np.dtype(_DTYPES[value.type][1])
            is_input = mode == self.trt.TensorIOMode.INPUT
            shape = self.shapes[name] if is_input else self.get_tensor_shape(name)
            n_bytes = int(np.prod(shape)) * dtype.itemsize
            memory = (ctypes.c_char * n_bytes).from_address(self.addresses[name])
            (feeds if is_input else outputs)[name] = np.frombuffer(memory, dtype).reshape(shape)
        for name, value in zip(outputs, self.engine.session.run(list(outputs), feeds), strict=True):
            outputs[name][...] = value
