"""How a test compiles that does not ask about the search.

One backend, few rounds, few pictures to calibrate on, nothing tuned.
"""

from __future__ import annotations

from typing import Any

from edgevlm.measure.protocol import QUICK

FAST: dict[str, Any] = {"protocol": QUICK, "search_minutes": 0, "backends": ("onnxruntime",), "calibration": "quick"}
FAST_OPTIONS = ("--search-minutes", "0", "--backends", "onnxruntime", "--calibration", "quick")
