"""Where edgevlm keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """``$EDGEVLM_CACHE``, else ``edgevlm`` in the user's cache folder."""
    if asked := os.environ.get("EDGEVLM_CACHE"):
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "edgevlm"
