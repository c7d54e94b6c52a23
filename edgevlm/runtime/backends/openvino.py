"""OpenVINO on the CPU."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgevlm.errors import MissingToolError, ModelError, RefusedGraphError
from edgevlm.runtime.machine import describe_machine
from edgevlm.runtime.spec import Array, SessionOptions, TensorSpec

DIMENSIONS = ("edgevlm", "dimensions")
"""Where a graph says what its free dimensions are called, as JSON by input and output: the format has no place."""

# What a session may be told. A bundle is data: it must not have folders written (CACHE_DIR) or libraries loaded.
_ENTRIES = frozenset({
    "DYNAMIC_QUANTIZATION_GROUP_SIZE", "ENABLE_CPU_PINNING", "ENABLE_HYPER_THREADING", "EXECUTION_MODE_HINT",
    "INFERENCE_PRECISION_HINT", "NUM_STREAMS", "PERFORMANCE_HINT", "SCHEDULING_CORE_TYPE",
})  # fmt: skip

# OpenVINO names element types as f32 and i64; numpy and the manifest as float32 and int64.
_DTYPES = {
    "f16": "float16", "f32": "float32", "f64": "float64", "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64",
    "u8": "uint8", "u16": "uint16", "u32": "uint32", "u64": "uint64", "boolean": "bool",
}  # fmt: skip


class OpenVino:
    name = "openvino"

    def version(self) -> str | None:
        try:
            ov = import_openvino()
        except MissingToolError:
            return None
        return str(ov.__version__).split("-")[0]  # 2026.4.1-22982-e213a147257-releases/2026/4

    def open(self, file: Path, options: SessionOptions) -> OpenVinoSession:
        ov = import_openvino()
        try:
            core = openvino_core()
            settings = session_settings(options)
            return OpenVinoSession(
                ov, core.read_model(str(file)), lambda model: core.compile_model(model, "CPU", settings)
            )
        except Exception as error:  # openvino raises RuntimeError, TypeError and classes of its own
            raise RefusedGraphError(
                f"OpenVINO {self.version()} refuses '{file.name}': {words_of(error)}.",
                hint="Check that this OpenVINO is at least the version the bundle names (edgevlm inspect).",
            ) from error


class OpenVinoSession:
    """A graph, compiled for one row where its batch is free, and for any number once another is asked for.

    Where shapes are known OpenVINO plans memory and kernels ahead: CLIP ViT-B/32's text tower in int8 took 13 % longer
    for a text of 8 tokens with its batch left free.
    """

    def __init__(self, ov: Any, model: Any, compile_model: Callable[[Any], Any]) -> None:
        names = _dimension_names(model)
        self.inputs = tuple(_tensor_spec(port, names) for port in model.inputs)
        self.outputs = tuple(_tensor_spec(port, names) for port in model.outputs)
        self._taken = {spec.name: _dtype(spec.dtype) for spec in self.inputs}
        self._tensor = ov.Tensor
        self._model = model
        self._compile = compile_model
        self._single = for_one_row(model)
        self._plans: dict[bool, _Plan] = {}
        self._plan(is_single=self._single is not None)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self._check(feeds)
        # The request reads the caller's memory and does not keep it alive.
        values = [_as_memory(feeds[spec.name]) for spec in self.inputs]
        is_single = self._single is not None and all(value.shape[:1] == (1,) for value in values)
        try:
            return self._plan(is_single=is_single).run([self._tensor(value, shared_memory=True) for value in values])
        except Exception as error:  # openvino raises RuntimeError and classes of its own
            raise ModelError(f"OpenVINO could not run the graph: {words_of(error)}.") from error

    def _plan(self, *, is_single: bool) -> _Plan:
        if is_single not in self._plans:
            compiled = self._compile(self._single if is_single else self._model)
            shapes = [[1, *spec.shape[1:]] if is_single else spec.shape for spec in self.outputs]
            specs = [
                msgspec.structs.replace(spec, shape=shape) for spec, shape in zip(self.outputs, shapes, strict=True)
            ]
            self._plans[is_single] = _Plan(compiled, specs, self._tensor)
        return self._plans[is_single]

    def _check(self, feeds: Mapping[str, Array]) -> None:
        """OpenVINO runs on what an input held before where it is not fed, and casts what has another type."""
        if len(feeds) == len(self._taken) and all(
            name in feeds and feeds[name].dtype == dtype for name, dtype in self._taken.items()
        ):
            return
        taken = {spec.name: spec.dtype for spec in self.inputs}  # in words: a tenth of a small graph's run
        given = {name: str(value.dtype) for name, value in feeds.items()}
        if given != taken:
            raise ModelError(
                f"OpenVINO could not run the graph: it takes {_listed(taken)}, but was given {_listed(given)}."
            )


def _as_memory(value: Array) -> Array:
    """The array itself where a request can read it as it lies; ``np.require`` takes longer to find that out."""
    flags = value.flags
    return value if flags.c_contiguous and flags.writeable else np.require(value, requirements=("C", "W"))


def _dtype(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name)
    except TypeError:  # bfloat16 and the like, which no array has
        return np.dtype(object)


class _Plan:
    """A compiled graph with one request, which is used again: to make one takes longer than to run a small graph."""

    def __init__(self, compiled: Any, outputs: Sequence[TensorSpec], tensor: Any) -> None:
        self._outputs = outputs
        self._tensor = tensor
        self._request = compiled.create_infer_request()
        self._fed: list[Any] = []
        self._answers = [_Answer(spec) for spec in outputs]
        self._is_busy = threading.Lock()

    def run(self, tensors: list[Any]) -> dict[str, Array]:
        with self._is_busy:
            self._fed = tensors
            for index, tensor in enumerate(tensors):
                self._request.set_input_tensor(index, tensor)
            for index, answer in enumerate(self._answers):
                answer.make_room(self._request, index, self._tensor)
            self._request.infer(share_outputs=True)
            return {
                spec.name: answer.take(self._request, i)
                for i, (spec, answer) in enumerate(zip(self._outputs, self._answers, strict=True))
            }


def for_one_row(model: Any) -> Any:
    """A copy of a model that takes one row; None where its batch is not all that is free, or nothing is."""
    shapes = [list(port.partial_shape) for port in (*model.inputs, *model.outputs)]
    is_free = all(shape and shape[0].is_dynamic for shape in shapes)
    if not is_free or any(size.is_dynamic for shape in shapes for size in shape[1:]):
        return None
    single = model.clone()
    try:
        single.reshape({i: [1, *list(port.partial_shape)[1:]] for i, port in enumerate(model.inputs)})
    except Exception:  # an operator in it that only a free batch suits
        return None
    return single


class _Answer:
    """Where an output is written: memory that nobody holds any more, else new memory, so that no answer is copied.

    A segmenter's 12 MB of logits took 3 % of the run to copy. Of an output whose shape is free there is a copy.
    """

    def __init__(self, spec: TensorSpec) -> None:
        fixed = tuple(size for size in spec.shape if isinstance(size, int))
        self._shape = fixed if len(fixed) == len(spec.shape) else None
        self._dtype = spec.dtype
        self._array: Array | None = None
        self._n_own = 0

    def make_room(self, request: Any, index: int, tensor: Any) -> None:
        if self._shape is None or (self._array is not None and sys.getrefcount(self._array) <= self._n_own):
            return
        self._array = np.empty(self._shape, self._dtype)
        request.set_output_tensor(index, tensor(self._array, shared_memory=True))
        # What this object and the request hold of it; a caller's reference, or a view's, comes on top.
        self._n_own = sys.getrefcount(self._array)

    def take(self, request: Any, index: int) -> Array:
        if self._array is not None:
            return self._array
        copied: Array = np.array(request.get_output_tensor(index).data)
        return copied


def import_openvino() -> Any:
    """The library, kept from reporting home: it does so, without asking, as soon as it is imported.

    Raises: MissingToolError: it is not installed or does not load.
    """
    try:
        with no_telemetry():
            return importlib.import_module("openvino")
    except (ImportError, OSError, RuntimeError) as error:  # a library of it that is missing, or of another system
        raise MissingToolError(
            f"OpenVINO is not installed, or does not load: {words_of(error)}.",
            hint="Run: pip install 'edgevlm[openvino]'",
        ) from error


@functools.cache
def openvino_core() -> Any:
    """The process's one ``openvino.Core``.

    Each has the processor's plugin give this thread a signal stack of its own, for registers that the usual one does
    not hold, and puts back the one before it when it goes. Of two that go in the order in which they came, the second
    puts back memory that the first has freed: the next signal, a Ctrl-C, ends the process with a segmentation fault.

    Source: openvino, src/plugins/intel_cpu/src/plugin.cpp, ``CPUSpecialSetup``.

    Raises: MissingToolError: see ``import_openvino``.
    """
    return import_openvino().Core()


@contextlib.contextmanager
def no_telemetry() -> Iterator[None]:
    """Hide ``openvino_telemetry`` from what is imported meanwhile; openvino and nncf then do without it.

    Source: openvino/tools/ovc/__init__.py sends "general_import"; ``telemetry_stub`` is what it falls back to.
    """
    name = "openvino_telemetry"
    if name in sys.modules:  # somebody else's doing
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def words_of(error: BaseException) -> str:
    """OpenVINO's own words on one line, without the places in its source where they came from."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not re.match(r"(Exception from |Check '.*' failed at )", line)]
    return " ".join(" ".join(kept).split())[:400].rstrip(".: ") or type(error).__name__


def session_settings(options: SessionOptions) -> dict[str, str]:
    """What to compile a graph with; ``graph_level`` means nothing here, OpenVINO always does all it can."""
    if unknown := sorted(options.entries.keys() - _ENTRIES):
        raise ValueError(f"a session cannot be told {', '.join(unknown)}")
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(options.n_threads or describe_machine().n_physical_cores),
        # Left to itself it computes in bfloat16 where the processor can, and quantizes what layers with compressed
        # weights read, as it comes.
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        # Threads tied to cores collide with every other process that ties its own to the same ones.
        "ENABLE_CPU_PINNING": "NO",
        **options.entries,
    }


def _dimension_names(model: Any) -> dict[str, list[int | str]]:
    if not model.has_rt_info(list(DIMENSIONS)):
        return {}
    names: dict[str, list[int | str]] = json.loads(str(model.get_rt_info(list(DIMENSIONS)).value))
    return names


def _tensor_spec(port: Any, dimension_names: Mapping[str, list[int | str]]) -> TensorSpec:
    name = port_name(port)
    dims = list(port.partial_shape)
    known = dimension_names.get(name, [])
    names = known if len(known) == len(dims) else ["?"] * len(dims)
    shape = tuple(d.get_length() if d.is_static else str(n) for d, n in zip(dims, names, strict=True))
    kind = port.element_type.get_type_name()
    return TensorSpec(name=name, dtype=_DTYPES.get(kind, kind), shape=shape)


def port_name(port: Any) -> str:
    """An input's or output's name; of several, the one that the ONNX graph gave it."""
    names = port.get_names()
    own = port.get_node().get_friendly_name().partition("/sink_port_")[0]
    return str(own if own in names or not names else min(names))


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in sorted(kinds.items())) or "nothing"
