"""How a test compiles that does not ask about the search: one backend, few rounds, nothing tuned."""

from __future__ import annotations

from typing import Any

from edgevlm.measure.protocol import QUICK

FAST: dict[str, Any] = {"protocol": QUICK, "search_minutes": 0, "backends": ("onnxruntime",)}
FAST_OPTIONS = ("--search-minutes", "0", "--backends", "onnxruntime")
