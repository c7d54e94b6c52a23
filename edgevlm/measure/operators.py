"""Which operators a graph's time goes to, as a backend really ran them: after fusion, in the precision it chose."""

from __future__ import annotations

import importlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgevlm.errors import ModelError, UsageError, did_you_mean
from edgevlm.measure.apart import call_apart
from edgevlm.measure.arrays import save_arrays
from edgevlm.measure.process import WorkerError
from edgevlm.measure.worker import Waiting, wait_due_to_others
from edgevlm.runtime.spec import Array, SessionOptions, Spec, TensorSpec

# What profiles a backend's graphs: ProfileRequest -> Profile, run in a process of its own.
PROFILERS: dict[str, str] = {
    "onnxruntime": "edgevlm.measure.operators_onnxruntime:profile",
    "openvino": "edgevlm.measure.operators_openvino:profile",
}

_TIMEOUT_S = 300.0
_SEED = 0

N_WARMUP = 2
"""Runs of each session before its runs count."""


class OperatorRow(Spec, frozen=True, kw_only=True):
    """One operator of the graph as run.

    Args:
        op_type: the backend's name for what ran, such as ``QLinearConv``.
        n_calls: how often it ran in one inference; above 1 inside loops.
        time_ms: all its calls in one inference together (``typical_ms``), less what the profiler costs.
        share: of the time of all operators, as a fraction.
        precision: in which it computed (``int8``, ``float32``, ``bf16``, ...); ``conversion`` where it only changes
            the type.
        input_types: dtypes; ``input_shapes`` are null where the backend has packed the operand away.
        macs: multiply-accumulates in one inference; null where shapes do not tell.
        n_bytes: what it read and wrote; null where the backend does not tell.
        producers: for each input what made it: an operator type as run, ``constant`` or ``input``. Empty where the
            graph as run could not be read.
        consumers: operator types as run that read its results, ``output`` among them for the graph's own.
        detail: the backend's name of the kernel, where it has one.
    """

    name: str
    op_type: str
    n_calls: int
    time_ms: float
    share: float
    precision: str
    provider: str
    input_types: tuple[str, ...] = ()
    input_shapes: tuple[tuple[int, ...] | None, ...] = ()
    output_shape: tuple[int, ...] | None = None
    macs: int | None = None
    n_bytes: int | None = None
    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    detail: str = ""


class Profile(Spec, frozen=True, kw_only=True):
    """Where one inference of a graph spends its time.

    Args:
        latency_ms: median of whole runs *without* the profiler, in the same process, less what other processes took.
        operators_ms: all operators together, less what the profiler costs.
        profiler_ms: what was taken off each call of an operator as the profiler's own cost.
        dispatch_ms: what calling the backend and dispatching the operators takes beside their own work, by what that
            costs for one run and one operator where it was measured.
        n_runs: profiled runs after warm-up.
        has_real_inputs: False where the inputs were made up from the graph's shapes.
        rows: slowest first.
    """

    backend: str
    version: str
    n_threads: int
    n_runs: int
    latency_ms: float
    operators_ms: float
    profiler_ms: float
    dispatch_ms: float
    has_real_inputs: bool
    rows: tuple[OperatorRow, ...]


class ProfileRequest(Spec, frozen=True, kw_only=True):
    """What a profiler is asked.

    Args:
        inputs: an ``.npz`` with one array per input; empty for inputs made up from the graph's shapes.
        block_ms: how long to run, without the profiler and again with it.
    """

    backend: str
    file: str
    inputs: str = ""
    session: SessionOptions = SessionOptions()
    block_ms: float = 1000.0
    min_runs: int = 5
    max_runs: int = 50


Profiler = Callable[[ProfileRequest], Profile]


def profile_graph(
    file: Path,
    *,
    backend: str = "onnxruntime",
    inputs: Mapping[str, Array] | None = None,
    session: SessionOptions | None = None,
    block_ms: float = 1000.0,
) -> Profile:
    """Profile a graph in a process of its own.

    Args:
        inputs: real ones; made up from the graph's shapes where left out.
        block_ms: how long to run, without the profiler and again with it.
    Raises: UsageError: the backend has no profiler. ModelError: the graph does not load or run; in the backend's words.
    """
    if backend not in PROFILERS:
        raise UsageError(f"Nothing profiles graphs on '{backend}'.", hint=did_you_mean(backend, PROFILERS))
    with tempfile.TemporaryDirectory(prefix="edgevlm-") as folder:
        archive = ""
        if inputs is not None:
            archive = os.fspath(Path(folder) / "inputs.npz")
            save_arrays(archive, {name: np.ascontiguousarray(v) for name, v in inputs.items()})
        request = ProfileRequest(
            backend=backend,
            file=os.fspath(file),
            inputs=archive,
            session=session or SessionOptions(),
            block_ms=block_ms,
        )
        try:
            return call_apart(profile_here, request, returns=Profile, timeout_s=_TIMEOUT_S)
        except WorkerError as error:
            raise ModelError(
                f"'{file.name}' could not be profiled on {backend}: {error}", hint="Check that it runs at all."
            ) from error


def profile_here(request: ProfileRequest) -> Profile:
    """In this process, with whatever else it has loaded: what ``profile_graph`` runs apart."""
    module, _, attribute = PROFILERS[request.backend].partition(":")
    profiler: Profiler = getattr(importlib.import_module(module), attribute)
    return profiler(request)


# --- what profilers share ---------------------------------------------------------------------------------


def feeds_for(request: ProfileRequest, inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    """The request's inputs, or made-up ones: seeded noise for floats, ones for numbers; free dimensions are 1."""
    if request.inputs:
        with np.load(request.inputs, allow_pickle=False) as archive:
            return {spec.name: archive[spec.name] for spec in inputs}
    rng = np.random.default_rng(_SEED)
    feeds: dict[str, Array] = {}
    for spec in inputs:
        shape = tuple(size if isinstance(size, int) and size > 0 else 1 for size in spec.shape)
        kind = np.dtype(spec.dtype)
        if kind.kind == "f":
            feeds[spec.name] = rng.normal(size=shape).astype(kind)
        elif spec.dtype == "uint8":
            feeds[spec.name] = rng.integers(0, 256, shape).astype(kind)
        else:
            feeds[spec.name] = np.ones(shape, kind)  # an index that a table has, a mask that lets through
    return feeds


def run_for(run: Callable[[], object], request: ProfileRequest) -> list[float]:
    """Milliseconds of each run after two that warm up: as many as ``block_ms`` holds, within the request's limits.

    What a run waited for other processes is taken off, as where candidates are timed.
    """
    waiting = Waiting()
    for _ in range(N_WARMUP):
        run()
    samples: list[float] = []
    end_ns = time.perf_counter_ns() + round(request.block_ms * 1e6)
    while len(samples) < request.max_runs:
        before = waiting.read()
        start_ns = time.perf_counter_ns()
        run()
        stop_ns = time.perf_counter_ns()
        wait_ns = wait_due_to_others(before, waiting.read(), wall_ns=stop_ns - start_ns)
        samples.append((stop_ns - start_ns - wait_ns) / 1e6)
        if stop_ns >= end_ns and len(samples) >= request.min_runs:
            break
    return samples


def typical_ms(samples: Sequence[float]) -> float:
    """The lower quartile: on a busy machine a long operator is interrupted in most runs, and its median is not its own.

    Measured with six busy processes on two cores: the operators of YOLOX-nano came to 1.5 times the whole run's time by
    medians.
    """
    return float(np.percentile(samples, 25))


def with_shares(rows: Sequence[OperatorRow]) -> tuple[OperatorRow, ...]:
    """Slowest first, each with its share of the sum."""
    total = math.fsum(row.time_ms for row in rows)
    shared = [msgspec.structs.replace(row, share=row.time_ms / total if total else 0.0) for row in rows]
    return tuple(sorted(shared, key=lambda row: -row.time_ms))
