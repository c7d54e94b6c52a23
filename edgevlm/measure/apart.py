"""One function in a process of its own: ``python -m edgevlm.measure.apart``, one JSON value in, one out.

For measurements that take no turns: nothing of the caller's threads or memory is measured, and a crash of a native
library is a sentence. The process dies with its parent, as a worker does.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from edgevlm.measure.process import WorkerError, module_command
from edgevlm.measure.worker import Failed, die_with_parent, failure_of, take_stdout
from edgevlm.runtime.spec import Spec

T = TypeVar("T")


class _Call(Spec, frozen=True, kw_only=True):
    """``function`` is ``package.module:attribute``; it takes one value and gives one."""

    function: str
    value: msgspec.Raw


class _Done(Spec, tag="done", frozen=True, kw_only=True):
    value: msgspec.Raw


def call_apart(function: Callable[[Any], T], value: Spec, *, returns: type[T], timeout_s: float) -> T:
    """``function(value)``, run in a process of its own.

    Args:
        function: of a module's top level, with its one argument annotated.
    Raises: WorkerError: it failed, crashed or took too long; one sentence.
    """
    call = _Call(
        function=f"{function.__module__}:{function.__qualname__}", value=msgspec.Raw(msgspec.json.encode(value))
    )
    try:
        ended = subprocess.run(
            [*module_command(__name__), f"{type(value).__module__}:{type(value).__qualname__}"],
            input=msgspec.json.encode(call),
            capture_output=True,
            timeout=timeout_s,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
    except subprocess.TimeoutExpired:
        raise WorkerError(f"It gave no answer for {timeout_s:g} s and was stopped.") from None
    if not ended.stdout:
        raise WorkerError(_cause_of_death(ended.returncode, ended.stderr))
    reply = msgspec.json.decode(ended.stdout, type=_Done | Failed)
    if isinstance(reply, Failed):
        raise WorkerError(reply.reason)
    return msgspec.json.decode(reply.value, type=returns)


def _cause_of_death(code: int, stderr: bytes) -> str:
    if code == -getattr(signal, "SIGKILL", 9):
        return "Its process was killed (SIGKILL): most likely the machine ran out of memory."
    lines = stderr[-4096:].decode(errors="replace").strip().splitlines()
    said = f" It said: {lines[-1]}" if lines else ""
    if code < 0:
        return f"Its process crashed ({signal.Signals(-code).name}).{said}"
    return f"Its process ended with status {code}.{said}"


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _serve(value_type: str) -> None:
    replies = take_stdout()
    gc.disable()  # one call: what it drops goes with the process, and reading a profile was three times as long
    reply: _Done | Failed
    try:
        call = msgspec.json.decode(sys.stdin.buffer.read(), type=_Call)
        result = _load(call.function)(msgspec.json.decode(call.value, type=_load(value_type)))
        reply = _Done(value=msgspec.Raw(msgspec.json.encode(result)))
    except Exception as error:  # whatever a backend raises belongs to what is measured
        reply = failure_of(error)
    replies.write(msgspec.json.encode(reply))
    replies.flush()


if __name__ == "__main__":
    die_with_parent()
    _serve(sys.argv[1])
