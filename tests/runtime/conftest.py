from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.tiny import make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A classifier's bundle that a test may spoil."""
    return make_bundle(tmp_path / "bundle")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def shared_assets() -> Path:
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip(f"the test models and pictures are not at {folder}")
    return folder
