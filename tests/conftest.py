"""What every test shares: no telemetry, no network, few threads, and the test assets beside the checkout."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.absent import absent

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

    Skips where there is none, unless EDGEVLM_EXPECT says that there must be.
    """
    if not ASSETS.is_dir():
        absent("assets", f"the test models and pictures are not at ../{ASSETS.relative_to(ASSETS.parents[1])}")
    return ASSETS


@pytest.fixture(scope="session")
def rtx() -> Any:
    """TensorRT for RTX, which reads graphs and builds engines without a GPU."""
    from edgevlm.errors import MissingToolError
    from edgevlm.runtime.backends.tensorrt import import_tensorrt

    try:
        return import_tensorrt("tensorrt-rtx")
    except MissingToolError as error:
        absent("rtx", error.message)


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the demo model is exported, to be copied by tests that need not see that happen."""
    import edgevlm
    from tests.fast import FAST

    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(folder / "cache"))
        edgevlm.compile("demo", precision="fp32", **FAST, output=folder / "demo")
    return folder / "cache"


@pytest.fixture(scope="session")
def mobilenet_and_pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As ``tests.mobilenet`` finds or makes them."""
    from tests import mobilenet

    return mobilenet.mobilenet_and_pictures(tmp_path_factory.mktemp("mobilenet"))
