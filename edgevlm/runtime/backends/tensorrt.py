"""TensorRT 10.x and 11.x, and TensorRT for RTX, on an NVIDIA GPU: what opens is an engine that was built for it.

Their Python APIs agree in all that is used here. Memory on the GPU and the stream come from NVIDIA's own
``cuda-bindings`` (8 MB, a part of cuda-python): lighter than CuPy or PyTorch, and what TensorRT's samples use.

Sources: docs.nvidia.com/deeplearning/tensorrt and .../tensorrt-rtx, Python API (Runtime, ICudaEngine,
IExecutionContext); NVIDIA/TensorRT, samples/python/common_runtime.py.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edgevlm.errors import BundleError, ForeignEngineError, MissingToolError, ModelError, RefusedGraphError
from edgevlm.runtime.engine import EngineBackend, EngineCard, check_feeds, listed, read_card
from edgevlm.runtime.engine_layers import EngineLayers, layers_from_inspector, with_times
from edgevlm.runtime.spec import Array, SessionOptions, TensorSpec

MODULES: dict[EngineBackend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
TITLES: dict[EngineBackend, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}

# TensorRT names element types as FLOAT and HALF; numpy and the manifest as float32 and float16.
_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
    "UINT8": "uint8",
}  # fmt: skip

# Runs until clocks and caches have settled, and as many as trtexec times by default, twice.
_N_WARM_UP, _N_PROFILED = 3, 20


class TensorRt:
    name: ClassVar[EngineBackend] = "tensorrt"

    def version(self) -> str | None:
        """The version of the library; whether there is a GPU to run on is ``missing_device``."""
        try:
            return str(import_tensorrt(self.name).__version__)
        except MissingToolError:
            return None

    def why_unavailable(self) -> str | None:
        """Why the library cannot be used, in a sentence; null where it can."""
        try:
            import_tensorrt(self.name)
        except MissingToolError as error:
            return error.message
        return None

    def missing_device(self) -> str | None:
        """Why nothing can be run here, in a sentence; null where there is a GPU."""
        try:
            Cuda().compute_capability()
        except MissingToolError as error:
            return error.message
        return None

    def open(self, file: Path, options: SessionOptions) -> TensorRtSession:
        if options.entries:
            raise BundleError(f"TensorRT's sessions cannot be told {', '.join(sorted(options.entries))}.")
        trt = import_tensorrt(self.name)
        card = read_card(file)
        # Before anything is asked of the GPU: TensorRT itself says of another version's engine little that helps.
        _check(file, card.refusal(self.name, str(trt.__version__)))
        cuda = Cuda()
        _check(file, card.refusal(self.name, str(trt.__version__), cuda.compute_capability()))
        log = new_log(trt)
        runtime = trt.Runtime(log)
        engine = runtime.deserialize_cuda_engine(file.read_bytes())
        context = engine and engine.create_execution_context()
        if not context:
            raise RefusedGraphError(
                f"{TITLES[self.name]} {trt.__version__} refuses '{file.name}': {log.words()}.",
                hint="Build the engine anew on this machine.",
            )
        return TensorRtSession(trt, cuda, log, runtime, engine, context, card)


class TensorRtRtx(TensorRt):
    name: ClassVar[EngineBackend] = "tensorrt-rtx"


class TensorRtSession:
    """One execution context and one stream; memory on the GPU is kept from run to run, and grows where it must."""

    def __init__(
        self, trt: Any, cuda: Cuda, log: Any, runtime: Any, engine: Any, context: Any, card: EngineCard
    ) -> None:
        self._trt, self._cuda, self._log, self._card = trt, cuda, log, card
        self._engine, self._context = engine, context
        self._runtime = runtime  # an engine does not keep alive what it came from
        self.inputs, self.outputs = _tensors(trt, engine, card)
        self._on_host = {
            spec.name
            for spec in (*self.inputs, *self.outputs)
            if engine.get_tensor_location(spec.name) == trt.TensorLocation.HOST
        }
        self._stream = cuda.stream()
        self._memory = {spec.name: DeviceMemory(cuda) for spec in (*self.inputs, *self.outputs)}
        self._is_busy = threading.Lock()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        check_feeds(feeds, self._card)
        with self._is_busy:
            return self._run(feeds)

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        # Kept until the stream is done: copies read the caller's memory, or this one, while the call goes on.
        fed = {spec.name: np.asarray(feeds[spec.name], order="C") for spec in self.inputs}
        for name, value in fed.items():
            if not self._context.set_input_shape(name, value.shape):
                raise ModelError(f"TensorRT could not run the graph: {self._log.words()}.")
            self._set_address(name, value, to_device=True)
        self._infer_shapes()
        answers = {spec.name: np.empty(self._shape_of(spec), spec.dtype) for spec in self.outputs}
        for name, value in answers.items():
            self._set_address(name, value, to_device=False)
        if not self._context.execute_async_v3(self._stream):
            raise ModelError(f"TensorRT could not run the graph: {self._log.words()}.")
        for name, value in answers.items():
            if name not in self._on_host:
                self._cuda.copy_to_host(value, self._memory[name].address, self._stream)
        self._cuda.synchronize(self._stream)
        return answers

    def profile(self, feeds: Mapping[str, Array]) -> EngineLayers:
        """What each layer takes on these inputs. The session is slower from then on: its layers wait for each other.

        Raises: ModelError: the engine does not run, or TensorRT tells nothing of its layers.
        """
        profiler = _new_profiler(self._trt)
        self._context.profiler = profiler
        samples: dict[str, list[float]] = {}
        for index in range(_N_WARM_UP + _N_PROFILED):
            profiler.times_ms = {}
            self.run(feeds)
            for name, time_ms in profiler.times_ms.items() if index >= _N_WARM_UP else ():
                samples.setdefault(name, []).append(time_ms)
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context  # else nothing is told of what depends on the inputs' sizes
        try:
            found = layers_from_inspector(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        except ValueError as error:
            raise ModelError(f"TensorRT does not tell the engine's layers: {error}.") from error
        title, version = TITLES[self._card.settings.backend], self._trt.__version__
        if not samples:
            raise ModelError(f"{title} {version} timed none of the engine's layers.")
        return EngineLayers(
            measured_by=f"{title} {version}",
            device=f"GPU of compute capability {self._cuda.compute_capability()}",
            n_runs=_N_PROFILED,
            layers=with_times(found, {name: statistics.median(each) for name, each in samples.items()}),
        )

    def _infer_shapes(self) -> None:
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise ModelError(f"TensorRT could not run the graph: {' '.join(str(error).split())}.") from error
        if missing:
            raise ModelError(f"TensorRT could not run the graph: it does not know the sizes of {', '.join(missing)}.")

    def _set_address(self, name: str, value: Array, *, to_device: bool) -> None:
        address = int(value.ctypes.data)
        if name not in self._on_host:
            address = self._memory[name].at_least(value.nbytes)
            if to_device:
                self._cuda.copy_to_device(address, value, self._stream)
        if not self._context.set_tensor_address(name, address):
            raise ModelError(f"TensorRT could not run the graph: {self._log.words()}.")

    def _shape_of(self, output: TensorSpec) -> tuple[int, ...]:
        shape = tuple(self._context.get_tensor_shape(output.name))
        if any(size < 0 for size in shape):
            raise ModelError(
                f"TensorRT could not run the graph: the size of '{output.name}' depends on the input's values.",
                hint="Export the graph with outputs of a fixed size.",
            )
        return shape


class Cuda:
    """The few calls of the CUDA runtime that a session needs; each raises where CUDA reports an error.

    Raises: MissingToolError: cuda-bindings is not installed.
    """

    def __init__(self) -> None:
        self._runtime = _import_cuda()

    def compute_capability(self) -> str:
        """Of the GPU that this thread uses: ``8.9``.

        Raises: MissingToolError: there is none, or no driver.
        """
        attribute = self._runtime.cudaDeviceAttr
        try:
            device = self._call("cudaGetDevice")
            major = self._call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, device)
            minor = self._call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, device)
        except ModelError as error:
            raise MissingToolError(
                f"There is no NVIDIA GPU here that can be used: {error.message}",
                hint="Run this on the machine with the GPU, with its driver installed.",
            ) from error
        return f"{major}.{minor}"

    def stream(self) -> int:
        """A stream, destroyed with this object."""
        stream = self._call("cudaStreamCreate")
        weakref.finalize(self, self._runtime.cudaStreamDestroy, stream)
        return int(stream)

    def allocate(self, n_bytes: int) -> int:
        return int(self._call("cudaMalloc", n_bytes))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def copy_to_device(self, address: int, value: Array, stream: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, value.ctypes.data, value.nbytes, kind, stream)

    def copy_to_host(self, value: Array, address: int, stream: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", value.ctypes.data, address, value.nbytes, kind, stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Each returns a tuple: the error first, then what was asked for."""
        error, *values = getattr(self._runtime, name)(*arguments)
        if int(error) != 0:
            words = self._runtime.cudaGetErrorString(error)[1]
            raise ModelError(f"{name}: {words.decode() if isinstance(words, bytes) else words}.")
        return values[0] if values else None


class DeviceMemory:
    """Memory on the GPU for one tensor, freed with this object."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._n_bytes = 0
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self.address = 0

    def at_least(self, n_bytes: int) -> int:
        """The address of ``n_bytes``; what was there before may be gone."""
        if n_bytes > self._n_bytes or self._finalizer is None:
            if self._finalizer:
                self._finalizer()
            self._n_bytes = max(n_bytes, 1)  # an empty tensor needs an address too
            self.address = self._cuda.allocate(self._n_bytes)
            self._finalizer = weakref.finalize(self, self._cuda.free, self.address)
        return self.address


def import_tensorrt(backend: EngineBackend) -> Any:
    """The library.

    Raises: MissingToolError: it is not installed or does not load.
    """
    try:
        return importlib.import_module(MODULES[backend])
    except (ImportError, OSError, RuntimeError) as error:  # a library of it that is missing, or of another CUDA
        raise MissingToolError(
            f"{TITLES[backend]} is not installed, or does not load: {' '.join(str(error).split())}.",
            hint=f"Run: pip install 'edgevlm[{backend}]' (on a Jetson: sudo apt install python3-libnvinfer)"
            if backend == "tensorrt"
            else "Run: pip install 'edgevlm[tensorrt-rtx]'",
        ) from error


def new_log(trt: Any) -> Any:
    """A logger that keeps what TensorRT says went wrong, where TensorRT itself would print it.

    TensorRT keeps one logger for a process, the first: so there is but one of each library.
    """
    if trt not in _LOGS:
        severity = trt.ILogger.Severity

        class Log(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: list[str] = []

            def log(self, level: Any, message: str) -> None:
                if level in (severity.INTERNAL_ERROR, severity.ERROR):
                    self.errors.append(" ".join(message.split()))

            def words(self) -> str:
                """What went wrong, first things first, and forget it."""
                errors = "; ".join(self.errors)
                self.errors.clear()
                return errors[:400].rstrip(".:; ") or "it does not say why"

        _LOGS[trt] = Log()
    log = _LOGS[trt]
    log.errors.clear()
    return log


_LOGS: dict[Any, Any] = {}


def _new_profiler(trt: Any) -> Any:
    """What TensorRT reports to: milliseconds of a run by layer; one that is told twice in a run ran twice."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times_ms: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times_ms[layer_name] = self.times_ms.get(layer_name, 0.0) + ms

    return Profiler()


def dtype_name(kind: Any) -> str:
    """numpy's name of one of TensorRT's element types.

    Raises: BundleError: numpy has none (bfloat16, 8-bit floats).
    """
    if kind.name not in _DTYPES:
        raise BundleError(
            f"The engine takes or gives {kind.name.lower()} numbers, which numpy does not have.",
            hint="Build it from a graph whose inputs and outputs are float32.",
        )
    return _DTYPES[kind.name]


def _import_cuda() -> Any:
    for name in ("cuda.bindings.runtime", "cuda.cudart"):  # the second in cuda-python before 12.8
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise MissingToolError(
        "cuda-bindings, which lends memory on the GPU, is not installed.",
        hint="Run: pip install cuda-bindings, in the major version of the CUDA that nvidia-smi names.",
    )


def _check(file: Path, refusal: str | None) -> None:
    if refusal:
        raise ForeignEngineError(
            f"The engine '{file.name}' was {refusal}.", hint="Build the engine anew on this machine, from its graph."
        )


def _tensors(trt: Any, engine: Any, card: EngineCard) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs as the card has them, in its order, which is the graph's.

    Raises: BundleError: the engine has others.
    """
    real = dict(_real_tensors(trt, engine))
    known = {spec.name: ("INPUT", spec.dtype) for spec in card.inputs}
    known |= {spec.name: ("OUTPUT", spec.dtype) for spec in card.outputs}
    if real != known:
        raise BundleError(
            f"The engine has {listed({n: ' '.join(v).lower() for n, v in real.items()})}, and its card says "
            f"{listed({n: ' '.join(v).lower() for n, v in known.items()})}.",
            hint="Build the engine anew from its graph.",
        )
    return card.inputs, card.outputs


def _real_tensors(trt: Any, engine: Any) -> Iterator[tuple[str, tuple[str, str]]]:
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        mode = "INPUT" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "OUTPUT"
        yield name, (mode, dtype_name(engine.get_tensor_dtype(name)))
