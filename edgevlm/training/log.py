"""How fast a training goes, and what it writes down of every step."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Speed:
    """Pictures a second, over the last steps."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._value = 0.0

    def add(self, n: int) -> float:
        now = time.monotonic()
        current = n / max(now - self._last, 1e-9)
        self._last = now
        self._value = current if not self._value else 0.9 * self._value + 0.1 * current
        return self._value


class Log:
    """One JSON line a step, written when a checkpoint is."""

    def __init__(self, file: Path, *, n_done: int, is_main: bool) -> None:
        self._file = file
        self._rows: list[str] = []
        self._is_main = is_main
        if is_main:
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
            file.write_text("".join(lines[:n_done]), encoding="utf-8")

    def add(self, row: Mapping[str, Any]) -> None:
        self._rows.append(json.dumps(row) + "\n")

    def flush(self) -> None:
        if self._is_main:
            with self._file.open("a", encoding="utf-8") as opened:
                opened.writelines(self._rows)
        self._rows.clear()
