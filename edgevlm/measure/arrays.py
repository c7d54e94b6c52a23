"""Inputs in a file, for a worker to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgevlm.runtime.spec import Array


def save_arrays(file: str | Path | IO[bytes], arrays: Mapping[str, Array]) -> None:
    """As an ``.npz``. Not with ``allow_pickle``: before numpy 2.2 that is the name of one more array."""
    named: dict[str, Any] = dict(arrays)
    np.savez(file, **named)
