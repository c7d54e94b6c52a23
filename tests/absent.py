"""What a test needs and a machine may lack. There it skips, but no machine that should have it passes by skipping."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def absent(what: str, reason: str) -> NoReturn:
    """Skip the test, or fail it where the variable EDGEVLM_EXPECT, such as ``rtx,ssh``, names what is absent.

    Args: what: assets, emulator, rtx or ssh.
    """
    if what in os.environ.get("EDGEVLM_EXPECT", "").split(","):
        pytest.fail(reason)
    pytest.skip(reason)
