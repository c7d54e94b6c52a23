"""One file per tool: each function runs in the tool's environment, takes a ``MakeRequest`` and returns a ``Made``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgevlm.runtime.spec import Array


def calibration_rows(file: str) -> Iterator[dict[str, Array]]:
    """Inputs by name, one picture (or text) at a time.

    Shapes: each [1, ...].
    """
    with np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for i in range(len(next(iter(arrays.values())))):
        yield {name: value[i : i + 1] for name, value in arrays.items()}


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
