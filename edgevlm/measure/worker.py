"""The process that one subject runs in: ``python -m edgevlm.measure.worker``, one JSON line in, one out.

It has the backend and numpy, nothing else, so that no other library's threads or memory are measured. It dies with
its parent: on Linux the kernel sees to that, elsewhere the end of its standard input does.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
import numpy as np

from edgevlm.errors import EdgeVLMError
from edgevlm.runtime.backends import Backend, Session, load_backend
from edgevlm.runtime.spec import Array, SessionOptions, Spec

# The median of several runs so long says no more than one, and several would leave too few turns in the time there is.
LONG_RUN_S = 1.0


class Open(Spec, tag="open", frozen=True, kw_only=True):
    """Load the graph and its inputs."""

    backend: str
    file: str
    inputs: str
    session: SessionOptions


class Turn(Spec, tag="turn", frozen=True, kw_only=True):
    """Run for about ``block_ms``, at least ``min_runs`` and at most ``max_runs`` times, after ``n_settle`` more.

    Settling runs bring caches and threads back from the rival that had the machine; they are not reported. Where they
    take ``LONG_RUN_S`` each, one run is a turn.
    """

    n_settle: int
    block_ms: float
    min_runs: int
    max_runs: int


Request = Open | Turn


class Opened(Spec, tag="opened", frozen=True, kw_only=True):
    """Units: ``cpu_s`` is what this process has used since it started, all threads.

    Args: tools: versions of Python, numpy and the backend in this process.
    """

    load_ms: float
    cpu_s: float
    tools: dict[str, str] = {}


class Ran(Spec, tag="ran", frozen=True, kw_only=True):
    """What a turn took.

    Args:
        samples_ms: wall-clock latency of every run.
        waits_ms: how much of it the run was ready to go on but other processes had the CPU.
        peak_bytes: peak resident memory of the process since just before the graph was opened.
        memory_bytes: the same less what the process held then.
    """

    samples_ms: tuple[float, ...]
    waits_ms: tuple[float, ...]
    peak_bytes: int | None
    memory_bytes: int | None
    cpu_s: float


class Failed(Spec, tag="failed", frozen=True, kw_only=True):
    reason: str


Reply = Opened | Ran | Failed


def backend_named(name: str) -> Backend:
    """A backend of the table, or ``package.module:attribute`` called without arguments."""
    if ":" not in name:
        return load_backend(name)
    module, _, attribute = name.partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend


def options_for_turns(backend: str, options: SessionOptions) -> SessionOptions:
    """Let a pool that spins stop at the end of a run: one that goes on spinning takes the cores from the next rival.

    Source: onnxruntime_session_options_config_keys.h, ``session.force_spinning_stop``; measured in docs/measuring.md.
    """
    if backend != "onnxruntime":
        return options
    if {"session.force_spinning_stop", "session.intra_op.allow_spinning"} & options.entries.keys():
        return options
    return msgspec.structs.replace(options, entries={**options.entries, "session.force_spinning_stop": "1"})


class OpenSubject:
    """An open graph with its inputs."""

    def __init__(self, request: Open) -> None:
        self.waiting = Waiting()
        backend = backend_named(request.backend)
        backend.version()  # imports the library: `load_ms` is the graph's alone
        with np.load(request.inputs, allow_pickle=False) as archive:
            self.feeds: dict[str, Array] = {name: archive[name] for name in archive.files}
        reset_peak_memory()
        self.held_bytes = resident_bytes()
        start_ns = time.perf_counter_ns()
        self.session: Session = backend.open(Path(request.file), options_for_turns(request.backend, request.session))
        self.load_ms = (time.perf_counter_ns() - start_ns) / 1e6
        version = backend.version()
        own = {backend.name: version} if version is not None else {}
        self.tools = {"python": platform.python_version(), "numpy": np.__version__, **own}

    def opened(self) -> Opened:
        return Opened(load_ms=self.load_ms, cpu_s=time.process_time(), tools=self.tools)

    def take_turn(self, turn: Turn) -> Ran:
        start_ns = time.perf_counter_ns()
        for _ in range(turn.n_settle):
            self.session.run(self.feeds)
        settling_ns = time.perf_counter_ns() - start_ns
        is_long = turn.n_settle > 0 and settling_ns > turn.n_settle * LONG_RUN_S * 1e9
        min_runs = 1 if is_long else turn.min_runs
        samples_ns: list[int] = []
        waits_ns: list[int] = []
        end_ns = time.perf_counter_ns() + round(turn.block_ms * 1e6)
        while len(samples_ns) < turn.max_runs:
            before = self.waiting.read()
            start_ns = time.perf_counter_ns()
            self.session.run(self.feeds)
            stop_ns = time.perf_counter_ns()
            samples_ns.append(stop_ns - start_ns)
            waits_ns.append(wait_due_to_others(before, self.waiting.read(), wall_ns=stop_ns - start_ns))
            if stop_ns >= end_ns and len(samples_ns) >= min_runs:
                break
        peak = peak_memory_bytes()
        memory = None if peak is None or self.held_bytes is None else max(0, peak - self.held_bytes)
        return Ran(
            samples_ms=tuple(ns / 1e6 for ns in samples_ns),
            waits_ms=tuple(ns / 1e6 for ns in waits_ns),
            peak_bytes=peak,
            memory_bytes=memory,
            cpu_s=time.process_time(),
        )


class Times(NamedTuple):
    """A reading of the clocks: wall, this thread ready but without a CPU, this thread on a CPU, the whole process."""

    wall_ns: int
    waited_ns: int
    thread_cpu_ns: int
    process_cpu_ns: int


class Waiting:
    """How long this thread has been ready to run without a CPU to run on, since it started; 0 where nobody tells.

    Source: the second number of /proc/<pid>/schedstat (Linux, Documentation/scheduler/sched-stats.rst).
    """

    def __init__(self) -> None:
        try:
            self._file: int | None = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:
            self._file = None

    def read(self) -> Times:
        waited_ns = 0 if self._file is None else int(os.pread(self._file, 64, 0).split()[1])
        return Times(time.perf_counter_ns(), waited_ns, time.thread_time_ns(), time.process_time_ns())


def wait_due_to_others(before: Times, after: Times, *, wall_ns: int) -> int:
    """The part of a run's ``wall_ns`` that other processes caused by having the CPU.

    With helper threads at work it is unknown: the run may have waited for a CPU that its own threads had, and what
    other processes did to the helpers is not in this thread's figure. Then nothing is subtracted.

    Args: before, after: read around the run; a wait may also have fallen between a reading and the run.
    """
    wall_around, waited_ns, thread_ns, process_ns = (late - early for early, late in zip(before, after, strict=True))
    if process_ns - thread_ns > 0.01 * wall_ns:
        return 0
    return max(0, min(waited_ns - (wall_around - wall_ns), wall_ns - thread_ns))


def resident_bytes() -> int | None:
    return _status_bytes("VmRSS")


def peak_memory_bytes() -> int | None:
    return _status_bytes("VmHWM")


def reset_peak_memory() -> None:
    """Forget the peak that importing the backend made (Linux; proc(5), ``clear_refs``)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status_bytes(field: str) -> int | None:
    """A field of ``/proc/self/status``; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def die_with_parent() -> None:
    """Ask Linux for SIGKILL when the parent ends, even while a run lasts; ignore Ctrl-C, which is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def take_stdout() -> BinaryIO:
    """The real standard output for replies; what native libraries print there goes to standard error from now on."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def failure_of(error: Exception) -> Failed:
    if isinstance(error, EdgeVLMError):
        return Failed(reason=error.message)
    return Failed(reason=f"{type(error).__name__}: {error}".strip().splitlines()[0])


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until the end of the input."""
    subject: OpenSubject | None = None
    for line in requests:
        request: Request = msgspec.json.decode(line, type=Request)
        reply: Reply
        try:
            if isinstance(request, Open):
                subject = OpenSubject(request)
                reply = subject.opened()
            elif subject is None:
                reply = Failed(reason="A turn was asked for before a graph was opened.")
            else:
                reply = subject.take_turn(request)
        except Exception as error:  # whatever a backend raises belongs to this subject, not to the measurement
            reply = failure_of(error)
        replies.write(msgspec.json.encode(reply) + b"\n")
        replies.flush()


if __name__ == "__main__":
    die_with_parent()
    serve(sys.stdin.buffer, take_stdout())
