"""Backends that do what a real one does on a bad day. A worker opens them by ``module:attribute``.

The file that is "opened" holds the backend's settings as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.errors import ModelError
from edgevlm.runtime.spec import SessionOptions, TensorSpec

Array = np.ndarray[Any, Any]


class Faulty:
    """Sleeps ``run_ms`` a run; at run ``at`` (counted from 1) it does ``what``: crash, killed, exit, raise, hang."""

    name = "json"

    def version(self) -> str | None:
        return None

    def open(self, file: Path, options: SessionOptions) -> FaultySession:
        settings = json.loads(file.read_text())
        if settings.get("what") == "refuse":
            raise ModelError("The graph has no nodes.", hint="Give it some.")
        if "pid_file" in settings:
            Path(settings["pid_file"]).write_text(str(os.getpid()))
        held = np.ones(settings.get("megabytes", 0) << 20, dtype=np.uint8)
        return FaultySession(settings, held)


class FaultySession:
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, settings: dict[str, Any], held: Array) -> None:
        self.settings = settings
        self.held = held
        self.n_runs = 0

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.n_runs += 1
        time.sleep(self.settings.get("run_ms", 1.0) / 1e3)
        if self.n_runs == self.settings.get("at"):
            self._fail(self.settings["what"])
        if self.settings.get("talks"):
            os.write(1, b"a native library says hello\n")
            print("and so does Python", flush=True)  # noqa: T201
        return {}

    def _fail(self, what: str) -> None:
        if what == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "exit":
            os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
            os._exit(7)
        if what == "raise":
            raise ValueError("input zero point must be a scalar\nsecond line")
        if what == "hang":
            time.sleep(600)
