"""Setting up: made once, whole or not at all, by one process at a time; without network."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgevlm.devices import emulator
from edgevlm.errors import MissingToolError, StoreError
from edgevlm.progress import Note, StepFinished, StepStarted, silent

PARTS = {"suite": "trixie", "onnxruntime": "1.32.0"}


@pytest.fixture(autouse=True)
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/emulators"


def fill(folder: Path) -> None:
    (folder / "whole").write_text("yes")


def refuse(folder: Path) -> None:
    raise AssertionError(f"{folder} was made again")


def test_it_is_made_once_for_its_versions():
    made = emulator.prepared("arm64", PARTS, fill, needs="", progress=silent)
    assert (made / "whole").read_text() == "yes"
    assert emulator.prepared("arm64", PARTS, refuse, needs="", progress=silent) == made


@pytest.mark.parametrize("changed", [{"suite": "forky"}, {"onnxruntime": "1.33.0"}, {"numpy": "2.4.6"}])
def test_other_versions_are_another_one(changed):
    first = emulator.prepared("arm64", PARTS, fill, needs="", progress=silent)
    assert emulator.prepared("arm64", {**PARTS, **changed}, fill, needs="", progress=silent) != first


def test_the_user_is_told_what_it_takes_before_it_is_made():
    told = []
    emulator.prepared("arm64", PARTS, fill, needs="140 MB", progress=told.append)
    assert [type(event) for event in told] == [StepStarted, Note, StepFinished]
    assert "140 MB" in told[1].text
    emulator.prepared("arm64", PARTS, refuse, needs="140 MB", progress=told.append)
    assert len(told) == 3


def test_what_fails_leaves_nothing_behind(shelf):
    def fail(folder: Path) -> None:
        fill(folder)
        raise MissingToolError("no", hint="")

    with pytest.raises(MissingToolError):
        emulator.prepared("arm64", PARTS, fail, needs="", progress=silent)
    assert [path.name for path in shelf.iterdir()] == [".lock"]
    assert emulator.prepared("arm64", PARTS, fill, needs="", progress=silent).is_dir()


def test_a_killed_set_up_is_made_again_and_its_remains_go(shelf):
    script = (
        "import sys, time; from edgevlm.devices.emulator import prepared; from edgevlm.progress import silent\n"
        "def make(folder): (folder / 'half').touch(); print('at it', flush=True); time.sleep(600)\n"
        f"prepared('arm64', {PARTS!r}, make, needs='', progress=silent)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "at it\n"
        assert list(shelf.glob(".partial-*/half"))
        process.send_signal(signal.SIGKILL)
    made = emulator.prepared("arm64", PARTS, fill, needs="", progress=silent)
    assert sorted(path.name for path in made.iterdir()) == ["whole"]
    assert not list(shelf.glob(".partial-*"))


def test_two_at_once_make_one():
    made, told = [], []
    begun, go_on = threading.Event(), threading.Event()

    def make_slowly(folder: Path) -> None:
        begun.set()
        assert go_on.wait(60)
        fill(folder)

    def second() -> None:
        made.append(emulator.prepared("arm64", PARTS, refuse, needs="", progress=told.append))

    first = threading.Thread(target=emulator.prepared, args=("arm64", PARTS, make_slowly), kwargs=quiet())
    first.start()
    assert begun.wait(60)
    other = threading.Thread(target=second)
    other.start()
    end = time.monotonic() + 60
    while not told and time.monotonic() < end:
        time.sleep(0.01)
    go_on.set()
    first.join(60)
    other.join(60)
    assert [event.text for event in told] == ["Another process is setting up the emulator; waiting for it."]
    assert len(made) == 1 and (made[0] / "whole").is_file()


def quiet():
    return {"needs": "", "progress": silent}


def test_a_cache_that_cannot_be_written_is_said_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="cannot be written"):
        emulator.prepared("arm64", PARTS, fill, needs="", progress=silent)


def test_elsewhere_than_on_linux_it_is_unavailable(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(MissingToolError, match="unavailable: QEMU's user mode is for Linux"):
        emulator.prepared("arm64", PARTS, refuse, needs="", progress=silent)


def test_versions_are_those_installed_here():
    import numpy
    import onnxruntime

    found = emulator.wanted_versions()
    assert found["onnxruntime"] == onnxruntime.__version__.partition("+")[0]
    assert found["numpy"] == numpy.__version__
    assert set(found) <= set(emulator.DISTRIBUTIONS)


def test_a_wheel_that_no_index_has_is_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        MissingToolError, match=r"unavailable: pip install for arm64 failed \(ERROR: .*onnxruntime"
    ) as caught:
        emulator._install_wheels(tmp_path / "site", ["onnxruntime"], {"onnxruntime": "1.32.0"})
    assert "pip" in caught.value.hint


def test_openvino_that_is_not_installed_here_is_not_fetched_either(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(MissingToolError, match="unavailable: OpenVINO is not installed here"):
        emulator.prepare_openvino(silent)


def test_nothing_of_this_machines_libraries_reaches_the_emulated_process(tmp_path, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/x86/lib")
    monkeypatch.setenv("PYTHONPATH", "/x86/site")
    monkeypatch.setenv("LD_PRELOAD", "/x86/one.so")
    found = emulator.Emulator(root=tmp_path).environment("cortex-a53", tmp_path / "source")
    assert not [name for name, value in found.items() if "x86" in value]
    assert found["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / "source"), str(tmp_path / "site")]
    assert (found["QEMU_CPU"], found["QEMU_LD_PREFIX"]) == ("cortex-a53", str(tmp_path / "sysroot"))


def test_another_qemu_than_expected_is_refused(tmp_path):
    fake = tmp_path / "qemu"
    fake.write_text("#!/bin/sh\necho qemu-aarch64 version 7.2.9\n")
    fake.chmod(0o755)
    emulator._check_qemu([str(fake)], "bookworm", "7.2")
    with pytest.raises(MissingToolError, match=r"trixie should have QEMU 10.0, but has 'qemu-aarch64 version 7.2.9'"):
        emulator._check_qemu([str(fake)], "trixie", "10.0")
