"""What stops in the middle leaves nothing half done, and the next run goes on; beside tests/test_bad_input.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import edgevlm
from tests import colours
from tests.fast import FAST_OPTIONS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colours.write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    # Of some hundred kilobytes, so that a limit on files can stop it.
    return colours.write_classifier(tmp_path / "colours.onnx", n_filters=4096)


@pytest.fixture
def command(model: Path, pictures: Path, tmp_path: Path) -> list[str]:
    asked = [
        "compile",
        model,
        "--eval-data",
        pictures,
        "--precision",
        "fp32",
        *FAST_OPTIONS,
        "-v",
        "-o",
        tmp_path / "out",
    ]
    return [sys.executable, "-m", "edgevlm", *map(str, asked)]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"EDGEVLM_CACHE": str(tmp_path / "cache")}


def is_clean(folder: Path) -> bool:
    """Neither a bundle, nor part of one, nor a draft in the store."""
    names = {path.name for path in folder.iterdir()}
    return names <= {"colours.onnx", "colours.card.toml", "cache"} and not list((folder / "cache").rglob("tmp-*"))


@pytest.mark.parametrize("step", ["export:model", "search"])
def test_ctrl_c_leaves_what_was_finished_and_no_more(command, environment, tmp_path, step):
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stderr is not None and process.stdout is not None
    reached = next((line for line in process.stderr if line.startswith(step)), "")
    os.killpg(process.pid, signal.SIGINT)
    told = reached + process.stderr.read()
    answer = process.stdout.read()
    assert process.wait(timeout=60) == 130, told
    assert "Stopped" in told
    assert "Traceback" not in told
    assert answer == ""
    assert is_clean(tmp_path)
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert step == "export:model" or "export:model: cached" in again.stderr
    assert edgevlm.verify(tmp_path / "out")


def test_ctrl_c_gets_through_where_a_library_swallows_it() -> None:
    from edgevlm.cli.progress import shown_progress
    from edgevlm.progress import Note, StepProgress

    def swallowed() -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), shown_progress(quiet=True) as progress:
            progress(StepProgress("search", 0.1, "a round"))
            swallowed()
            progress(Note("what was finished is kept"))
            progress(StepProgress("search", 0.2, "another round"))
            pytest.fail("it went on")
        with shown_progress(quiet=True):
            swallowed()  # after the last that was to be told: what was asked for is done
        with shown_progress(quiet=True) as progress:
            progress(StepProgress("search", 0.1, "nobody asked now"))
    finally:
        signal.signal(signal.SIGINT, before)


def with_file_limit(n_bytes: int) -> None:
    """No file may grow beyond this: what a full disk does, without one."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def test_a_disk_that_takes_no_more_in_the_middle_of_a_step(command, environment, tmp_path):
    full = subprocess.run(
        command, capture_output=True, text=True, env=environment, preexec_fn=lambda: with_file_limit(50_000)
    )
    assert full.returncode == 1, full.stderr
    errors = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, full.stderr
    assert "cannot be written: File too large" in errors[0]
    assert "Traceback" not in full.stderr
    assert is_clean(tmp_path)
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert edgevlm.verify(tmp_path / "out")


def test_a_bundle_that_is_there_survives_a_compile_that_fails(command, environment, tmp_path, pictures):
    first = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stderr
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    failed = subprocess.run(
        [*command, "--overwrite", "--max-size-mb", "0.0001"], capture_output=True, text=True, env=environment
    )
    assert failed.returncode == 4, failed.stderr
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before
