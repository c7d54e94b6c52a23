"""The parent's side of a worker: start it, ask, wait with a limit, end it."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol as Interface

import msgspec

import edgevlm
from edgevlm.measure import worker as worker_module
from edgevlm.measure.spec import SETTLING_RUNS, Protocol, Subject
from edgevlm.measure.worker import Failed, Open, Opened, Ran, Reply, Request, Turn


class WorkerError(Exception):
    """A subject cannot be timed (any further): one sentence. It becomes the ``failure`` of its measurement."""


class Worker(Interface):
    """A subject that takes turns. Every method raises WorkerError where it cannot go on."""

    def open(self) -> Opened: ...

    def warm_up(self) -> Ran: ...

    def take_turn(self) -> Ran: ...

    def close(self) -> None: ...


StartWorker = Callable[[Subject, Protocol], Worker]


class ProcessWorker:
    """A worker in a process of its own."""

    def __init__(self, subject: Subject, protocol: Protocol) -> None:
        self._subject = subject
        self._protocol = protocol
        # A file, not a pipe: nobody reads it while the worker lives, and a full pipe would stop the worker.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process; `close` ends both
        self._process = subprocess.Popen(
            module_command(worker_module.__name__, python=subject.python),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_module_folders(subject))},
        )
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def open(self) -> Opened:
        subject = self._subject
        reply = self._ask(
            Open(backend=subject.backend, file=subject.file, inputs=subject.inputs, session=subject.session)
        )
        assert isinstance(reply, Opened)
        return reply

    def warm_up(self) -> Ran:
        return self._turn(Turn(n_settle=0, block_ms=self._protocol.warmup_ms, min_runs=2, max_runs=sys.maxsize))

    def take_turn(self) -> Ran:
        p = self._protocol
        return self._turn(
            Turn(
                n_settle=SETTLING_RUNS, block_ms=p.block_ms, min_runs=p.min_runs_per_turn, max_runs=p.max_runs_per_turn
            )
        )

    def close(self) -> None:
        """End the process at once; nothing of it is needed."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(OSError):  # what could not be written to a dead worker
                    stream.close()

    def _turn(self, turn: Turn) -> Ran:
        reply = self._ask(turn)
        assert isinstance(reply, Ran)
        return reply

    def _ask(self, request: Request) -> Opened | Ran:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(msgspec.json.encode(request) + b"\n")
            stdin.flush()
            line = self._lines.get(timeout=self._protocol.timeout_s)
        except OSError:
            line = None
        except queue.Empty:
            raise WorkerError(f"It gave no answer for {self._protocol.timeout_s:g} s and was stopped.") from None
        if line is None:
            raise WorkerError(self._cause_of_death())
        reply: Reply = msgspec.json.decode(line, type=Reply)
        if isinstance(reply, Failed):
            raise WorkerError(reply.reason)
        return reply

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        if code == -getattr(signal, "SIGKILL", 9):
            return "Its process was killed (SIGKILL): most likely the machine ran out of memory."
        if code < 0:
            return f"Its process crashed ({signal.Signals(-code).name}).{self._last_words()}"
        return f"Its process ended with status {code}.{self._last_words()}"

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read()[-4096:].decode(errors="replace").strip().splitlines()
        return f" It said: {lines[-1]}" if lines else ""


def module_command(module: str, *, python: str = "") -> list[str]:
    """What runs a module without the current folder in its path: a numpy.py there must not be taken for numpy."""
    if python or sys.version_info >= (3, 11):
        return [python or sys.executable, "-P", "-m", module]
    run = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", f"import sys; del sys.path[0]; {run}"]


def _module_folders(subject: Subject) -> list[str]:
    """Where the worker finds modules: where this process does; another interpreter has its own, and takes only ours."""
    if subject.python:
        return [str(Path(edgevlm.__file__).parents[1])]
    return [path for path in sys.path if path]
