"""What every test shares: no telemetry, no network, few threads, and the test assets beside the checkout."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Before any library reads them. Two threads are what the smallest machine has that runs these tests.
os.environ.update(
    {
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
)
os.environ.setdefault("OMP_NUM_THREADS", "2")

# A shell that starts tests in the background has them ignore Ctrl-C, and so would every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run: a failure can be repeated, and a pass is not luck.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and pictures; never part of the repository.

    Skips where there is none, unless EDGEVLM_EXPECT_ASSETS says that there must be.
    """
    if not ASSETS.is_dir():
        reason = f"the test models and pictures are not at ../{ASSETS.relative_to(ASSETS.parents[1])}"
        if os.environ.get("EDGEVLM_EXPECT_ASSETS"):
            pytest.fail(reason)
        pytest.skip(reason)
    return ASSETS


@pytest.fixture(scope="session")
def mobilenet_and_pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As ``tests.mobilenet`` finds or makes them."""
    from tests import mobilenet

    return mobilenet.mobilenet_and_pictures(tmp_path_factory.mktemp("mobilenet"))
