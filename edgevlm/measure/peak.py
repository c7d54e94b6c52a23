"""The best rates that a backend reaches on this machine, measured: what a graph's own rate is compared with.

Not the processor's theoretical peak, which no kernel reaches, but **the best that this runtime reached** on large
products and convolutions that suit it. The rest of a graph can get that near at most (Williams, Waterman and
Patterson, "Roofline", CACM 2009).
"""

from __future__ import annotations

import functools
import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edgevlm.errors import ModelError
from edgevlm.measure.apart import call_apart
from edgevlm.measure.environment import describe_environment, fingerprint
from edgevlm.measure.load import read_cpu_times, share_of_others
from edgevlm.measure.process import WorkerError
from edgevlm.measure.worker import Waiting, wait_due_to_others
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.machine import describe_machine
from edgevlm.runtime.spec import Array, SessionOptions, Spec
from edgevlm.store import Store, code_digest, read_spec, write_spec

PeakPrecision = Literal["float32", "bf16", "int8"]

_TIMEOUT_S = 120.0
# Each probe runs for so long in each pass; passes are repeated until the best two agree.
_PROBE_MS = 40.0
_MIN_PASSES, _MAX_PASSES = 2, 6
# Quiet passes differed by 0.5 to 6 %, disturbed ones by 50 % and more.
_MAX_DISAGREEMENT = 0.1
# With several threads waits cannot be taken off: among 14 busy processes on two cores, all passes with two threads
# agreed on the rate of one.
_MAX_OTHER_LOAD = 0.25
# Four times the last-level cache of the largest edge CPUs, but never much of a small board's memory.
_TRIAD_BYTES = 64 * 2**20


class Probe(Spec, frozen=True, kw_only=True):
    """A graph of one product: a matrix [m, k] times [k, n], or a convolution of k × k over [channels, size, size]."""

    op: Literal["MatMul", "Conv"]
    shape: tuple[int, int, int]

    @property
    def macs(self) -> int:
        if self.op == "MatMul":
            return math.prod(self.shape)
        channels, size, kernel = self.shape
        return size * size * channels * channels * kernel * kernel

    @property
    def name(self) -> str:
        if self.op == "MatMul":
            return "MatMul {}×{}×{}".format(*self.shape)
        channels, size, kernel = self.shape
        return f"Conv {kernel}×{kernel}, {channels} channels, {size}×{size}"


# 0.05 to 0.1 GMAC for each thread, 1 to 2 ms in float on one core: so short that on a busy machine some run slips
# between two interruptions. Of probes five times as long, with six busy processes on two cores, some came out at a
# quarter of their rate.
PROBES = (
    Probe(op="MatMul", shape=(256, 512, 512)),
    Probe(op="MatMul", shape=(192, 768, 768)),
    Probe(op="Conv", shape=(128, 28, 3)),
    Probe(op="Conv", shape=(256, 28, 1)),
)


def probes_for(n_threads: int) -> tuple[Probe, ...]:
    """Every thread gets as many rows of the matrix; convolutions stay what they are."""
    return tuple(
        msgspec.structs.replace(probe, shape=(probe.shape[0] * n_threads, *probe.shape[1:]))
        if probe.op == "MatMul"
        else probe
        for probe in PROBES
    )


class Rate(Spec, frozen=True, kw_only=True):
    """The best rate in one precision, and on which probe; ``by_probe`` has them all."""

    precision: PeakPrecision
    gmac_per_s: float
    probe: str
    by_probe: dict[str, float]


class Peak(Spec, frozen=True, kw_only=True):
    """The best rates that a backend reached here with so many threads.

    Args:
        rates: what the backend has, each precision once.
        bandwidth_gb_per_s: memory, read and written together, over arrays that no cache holds (triad: a = b + s · c).
        disagreement: by how much the best pass lies above the second at most, as a fraction.
        is_valid: whether they agreed, and with several threads, whether others left the machine alone; where not, the
            figures are too low rather than too high.
        other_load: the share of the machine's CPU time that others took meanwhile; null where the system does not tell.
    """

    backend: str
    version: str
    n_threads: int
    rates: tuple[Rate, ...]
    bandwidth_gb_per_s: float
    disagreement: float
    is_valid: bool
    machine: str
    other_load: float | None = None

    def rate(self, precision: str) -> Rate | None:
        return next((rate for rate in self.rates if rate.precision == precision), None)


class PeakRequest(Spec, frozen=True, kw_only=True):
    backend: str
    n_threads: int
    probe_ms: float = _PROBE_MS


# What each backend is asked for by its own settings.
_ENTRIES: dict[str, dict[PeakPrecision, dict[str, str]]] = {
    "onnxruntime": {"float32": {}, "int8": {}},
    "openvino": {
        "float32": {"INFERENCE_PRECISION_HINT": "f32"},
        "bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
        "int8": {"INFERENCE_PRECISION_HINT": "f32"},
    },
}


def measure_peak(
    *, backend: str = "onnxruntime", n_threads: int = 0, store: Store | None = None, probe_ms: float = _PROBE_MS
) -> Peak:
    """Measure in a process of its own, or look up what this machine reached before; some seconds.

    Args:
        n_threads: 0 means all cores.
        store: where results are kept; one that is not valid is not. The default store where left out.
    Raises: ModelError: the backend runs none of the probes.
    """
    request = PeakRequest(
        backend=backend, n_threads=n_threads or describe_machine().n_physical_cores, probe_ms=probe_ms
    )
    parts = {
        "request": msgspec.to_builtins(request),
        "machine": fingerprint(describe_environment()),
        "code": code_digest(),
    }

    def make(out: Path) -> None:
        try:
            peak = call_apart(measure_here, request, returns=Peak, timeout_s=_TIMEOUT_S)
        except WorkerError as error:
            raise ModelError(f"The peak of {backend} could not be measured: {error}") from error
        write_spec(out / "peak.json", peak)

    store = store or Store()
    entry = store.fetch("peak", parts, make, keep=lambda out: read_spec(out / "peak.json", Peak).is_valid)
    return read_spec(entry.path / "peak.json", Peak)


def measure_here(request: PeakRequest) -> Peak:
    """In this process: what ``measure_peak`` runs apart."""
    rates, disagreements = [], []
    before, used_s = read_cpu_times(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="edgevlm-") as folder:
        for precision, entries in _ENTRIES.get(request.backend, {}).items():
            if precision == "bf16" and not {"avx512_bf16", "amx_bf16", "bf16"} & set(describe_machine().isa):
                continue
            passes: list[dict[str, float]] = []
            while len(passes) < _MIN_PASSES or (
                len(passes) < _MAX_PASSES and _disagreement(passes) > _MAX_DISAGREEMENT
            ):
                passes.append(_rates(request, precision, entries, Path(folder)))
            best = {name: max(one[name] for one in passes) for name in passes[0]}
            fastest = max(best, key=lambda name: best[name])
            rates.append(Rate(precision=precision, gmac_per_s=best[fastest], probe=fastest, by_probe=best))
            disagreements.append(_disagreement(passes))
    if not rates:
        raise ModelError(f"There is no probe for '{request.backend}'.")
    worst = max(disagreements)
    after, ours_s = read_cpu_times(), time.process_time() - used_s
    other_load = share_of_others(before, after, ours_s=ours_s) if before and after else None
    is_alone = request.n_threads == 1 or other_load is None or other_load <= _MAX_OTHER_LOAD
    return Peak(
        backend=request.backend,
        version=load_backend(request.backend).version() or "",
        n_threads=request.n_threads,
        rates=tuple(rates),
        bandwidth_gb_per_s=triad_gb_per_s(request.n_threads, duration_ms=4 * request.probe_ms),
        disagreement=worst,
        is_valid=worst <= _MAX_DISAGREEMENT and is_alone,
        machine=describe_machine().name,
        other_load=other_load,
    )


def _disagreement(passes: Sequence[Mapping[str, float]]) -> float:
    first, second = sorted((max(one.values()) for one in passes), reverse=True)[:2]
    return 1 - second / first


def _rates(request: PeakRequest, precision: PeakPrecision, entries: dict[str, str], folder: Path) -> dict[str, float]:
    """GMAC/s by probe: the fastest of the runs that fit into the time."""
    found = {}
    for i, probe in enumerate(probes_for(request.n_threads)):
        file = folder / f"{precision}-{i}.onnx"
        if not file.exists():
            save_probe(probe, precision, file)
        options = SessionOptions(n_threads=request.n_threads, entries=entries)
        session = load_backend(request.backend).open(file, options)
        kind = np.uint8 if precision == "int8" else np.float32
        shape = tuple(int(size) for size in session.inputs[0].shape)
        feeds: dict[str, Array] = {"x": np.ones(shape, kind)}
        seconds = best_s(functools.partial(session.run, feeds), duration_ms=request.probe_ms)
        found[probe.name] = probe.macs / seconds / 1e9
    return found


def best_s(run: Callable[[], object], *, duration_ms: float) -> float:
    """The fastest of the runs that fit into the time, at least five, less what it waited for other processes."""
    waiting = Waiting()
    run()
    best_ns = sys.maxsize
    end_ns = time.perf_counter_ns() + round(duration_ms * 1e6)
    n = 0
    while n < 5 or time.perf_counter_ns() < end_ns:
        before = waiting.read()
        start_ns = time.perf_counter_ns()
        run()
        wall_ns = time.perf_counter_ns() - start_ns
        best_ns = min(best_ns, wall_ns - wait_due_to_others(before, waiting.read(), wall_ns=wall_ns))
        n += 1
    return best_ns / 1e9


def save_probe(probe: Probe, precision: PeakPrecision, file: Path) -> None:
    """Write the probe as ONNX: float, or u8 × s8 between a dequantize and a quantize, which backends fuse."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    if probe.op == "MatMul":
        m, k, n = probe.shape
        x_shape, w_shape, y_shape = (m, k), (k, n), (m, n)
        attributes: dict[str, Any] = {}
    else:
        channels, size, kernel = probe.shape
        x_shape = y_shape = (1, channels, size, size)  # type: ignore[assignment]
        w_shape = (channels, channels, kernel, kernel)  # type: ignore[assignment]
        attributes = {"pads": [kernel // 2] * 4, "kernel_shape": [kernel, kernel]}
    if precision == "int8":
        constants = {
            "scale": np.float32(0.02), "w_scale": np.float32(0.01), "y_scale": np.float32(0.5),
            "zero": np.uint8(128), "w_zero": np.int8(0),
            "w": rng.integers(-127, 128, w_shape).astype(np.int8),
        }  # fmt: skip
        nodes = [
            helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["x_float"], name="x_float"),
            helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_float"], name="w_float"),
            helper.make_node(probe.op, ["x_float", "w_float"], ["y_float"], name="product", **attributes),
            helper.make_node("QuantizeLinear", ["y_float", "y_scale", "zero"], ["y"], name="y"),
        ]
        kind = TensorProto.UINT8
    else:
        constants = {"w": rng.normal(size=w_shape).astype(np.float32)}
        nodes = [helper.make_node(probe.op, ["x", "w"], ["y"], name="product", **attributes)]
        kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", kind, x_shape)],
        [helper.make_tensor_value_info("y", kind, y_shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)


def triad_gb_per_s(n_threads: int, *, duration_ms: float) -> float:
    """Memory bandwidth by STREAM's triad in numpy, a slice for each thread: the best of the runs that fit in the time.

    Source: McCalpin, "Memory Bandwidth and Machine Balance" (1995). numpy makes two passes of it (a = s · c, then
    a = a + b), which read and write five arrays.
    """
    n = min(_TRIAD_BYTES, describe_machine().memory_bytes // 64 or _TRIAD_BYTES) // 8
    a, b, c = (np.full(n, value) for value in (0.0, 1.0, 2.0))
    slices = [slice(n * i // n_threads, n * (i + 1) // n_threads) for i in range(n_threads)]

    def triad(part: slice) -> None:
        np.multiply(c[part], 3.0, out=a[part])
        np.add(a[part], b[part], out=a[part])

    def run() -> None:
        _each_in_a_thread(triad, slices)

    return 5 * 8 * n / best_s(run, duration_ms=duration_ms) / 1e9


def _each_in_a_thread(function: Callable[[slice], None], parts: Sequence[slice]) -> None:
    if len(parts) == 1:
        return function(parts[0])
    threads = [threading.Thread(target=function, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return None
