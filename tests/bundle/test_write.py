from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edgevlm.bundle import write
from edgevlm.bundle.write import check_destination, write_bundle
from edgevlm.errors import BundleError, StoreError, UsageError
from edgevlm.runtime.bundle import open_bundle
from tests.runtime import tiny

SUFFIXES = ["", ".evlm"]


def write_tiny(destination: Path, *, name: str = "tiny", overwrite: bool = False, **files: bytes):
    manifest, contents = tiny.parts("image-classification")
    manifest = msgspec.structs.replace(manifest, name=name)
    return write_bundle(destination, manifest, {**contents, **files}, overwrite=overwrite)


def contents_of(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_opens_and_nothing_else_is_left(folder: Path, suffix: str):
    written = write_tiny(folder / f"b{suffix}")
    assert open_bundle(folder / f"b{suffix}").manifest == written
    assert [path.name for path in folder.iterdir()] == [f"b{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_contents_give_the_same_bytes(folder: Path, suffix: str):
    write_tiny(folder / f"a{suffix}")
    write_tiny(folder / f"b{suffix}")
    first, second = contents_of(folder / f"a{suffix}"), contents_of(folder / f"b{suffix}")
    assert list(first.values()) == list(second.values())


def test_files_may_lie_anywhere(folder: Path, tmp_path: Path):
    manifest, contents = tiny.parts("image-classification")
    (tmp_path / "elsewhere").write_bytes(contents["components/model.onnx"])
    from_path = write_bundle(folder / "a", manifest, {**contents, "components/model.onnx": tmp_path / "elsewhere"})
    assert from_path == write_tiny(folder / "b")


def test_folders_that_are_missing_are_made(folder: Path):
    write_tiny(folder / "x/y/b")
    assert open_bundle(folder / "x/y/b")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_bundle_is_replaced_only_when_asked(folder: Path, suffix: str):
    destination = folder / f"b{suffix}"
    write_tiny(destination, name="old")
    with pytest.raises(UsageError, match="exists already") as raised:
        write_tiny(destination, name="new")
    assert "--overwrite" in raised.value.hint
    assert open_bundle(destination).manifest.name == "old"
    write_tiny(destination, name="new", overwrite=True)
    assert open_bundle(destination).manifest.name == "new"
    assert [path.name for path in folder.iterdir()] == [destination.name]


def test_an_empty_folder_is_taken(folder: Path):
    write_tiny(folder)
    assert open_bundle(folder)


def test_a_folder_may_become_an_archive_of_the_same_name_and_back(folder: Path):
    write_tiny(folder / "b")
    (folder / "b").rename(folder / "b.evlm")
    write_tiny(folder / "b.evlm", overwrite=True)
    assert (folder / "b.evlm").is_file()


def test_a_link_stays_and_what_it_points_to_is_replaced(folder: Path):
    write_tiny(folder / "real", name="old")
    (folder / "link").symlink_to(folder / "real")
    write_tiny(folder / "link", name="new", overwrite=True)
    assert (folder / "link").is_symlink()
    assert open_bundle(folder / "real").manifest.name == "new"


STRANGERS = {
    "photos": lambda p: (p.mkdir(), (p / "cat.jpg").write_text("x")),
    "somebody else's manifest": lambda p: (p.mkdir(), (p / "manifest.json").write_text('{"name": "web app"}')),
    "a file": lambda p: p.write_text("thesis"),
    "a bundle with a note in it": lambda p: (write_tiny(p), (p / "note.txt").write_text("mine")),
    "a bundle with a folder in it": lambda p: (write_tiny(p), (p / "data").mkdir(), (p / "data/x").write_text("mine")),
    "a bundle with a link in it": lambda p: (write_tiny(p), (p / "link").symlink_to("/")),
}


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [(kind, suffix) for kind in STRANGERS for suffix in SUFFIXES if not (suffix and kind.startswith("a bundle"))],
)
def test_what_is_no_bundle_is_never_replaced(folder: Path, kind: str, suffix: str):
    destination = folder / f"b{suffix}"
    STRANGERS[kind](destination)
    before = contents_of(folder)
    with pytest.raises(UsageError, match="is not replaced") as raised:
        write_tiny(destination, overwrite=True)
    assert raised.value.hint
    assert contents_of(folder) == before


def test_clutter_does_not_keep_a_bundle_from_being_replaced(folder: Path):
    write_tiny(folder / "b")
    (folder / "b/.DS_Store").write_text("x")
    write_tiny(folder / "b", overwrite=True)


def test_the_destination_can_be_checked_before_any_work(folder: Path):
    check_destination(folder / "b", overwrite=False)
    check_destination(folder, overwrite=False)
    write_tiny(folder / "b")
    with pytest.raises(UsageError):
        check_destination(folder / "b", overwrite=False)
    check_destination(folder / "b", overwrite=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("had_one", [False, True])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("place", ["copying", "flushing", "swapping"])
def test_a_failure_leaves_what_was_there_and_nothing_else(
    folder: Path, suffix: str, had_one: bool, failure: BaseException, place: str, monkeypatch: pytest.MonkeyPatch
):
    destination = folder / f"b{suffix}"
    if had_one:
        write_tiny(destination, name="old")
    before = contents_of(folder)

    def fail(*args: object, **options: object) -> None:
        raise failure

    if place == "copying":
        monkeypatch.setattr(write, "_copy", fail)
    elif place == "flushing":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        rename = Path.rename
        monkeypatch.setattr(Path, "replace", fail)
        monkeypatch.setattr(Path, "rename", lambda a, b: fail() if a.name == "new" else rename(a, b))
    expected = StoreError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected) as raised:
        write_tiny(destination, name="new", overwrite=True)
    if isinstance(raised.value, StoreError):
        assert "no space left" in raised.value.message
        assert "space" in raised.value.hint
    monkeypatch.undo()
    assert contents_of(folder) == before
    assert [path.name for path in folder.iterdir()] == ([destination.name] if had_one else [])


def test_an_old_bundle_that_cannot_be_put_back_is_not_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch):
    write_tiny(folder / "b", name="old")
    rename = Path.rename

    def fail(source: Path, target: Path) -> Path:
        if target.name == "b":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(StoreError):
        write_tiny(folder / "b", name="new", overwrite=True)
    (kept,) = folder.glob(".b.*.partial/old")
    assert open_bundle(kept).manifest.name == "old"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.ENAMETOOLONG, errno.EIO])
def test_what_the_system_refuses_is_one_sentence(folder: Path, code: int, monkeypatch: pytest.MonkeyPatch):
    def fail(**options: object) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("tempfile.mkdtemp", fail)
    with pytest.raises(StoreError) as raised:
        write_tiny(folder / "b")
    assert os.strerror(code).lower() in raised.value.message
    assert raised.value.hint.endswith("-o.")
    assert raised.value.exit_code == 1


def test_a_place_below_a_file_is_refused(folder: Path):
    (folder / "file").write_text("x")
    with pytest.raises(StoreError):
        write_tiny(folder / "file/b")


@pytest.mark.parametrize("path", ["../x.txt", "/x.txt", "run.py", "manifest.json", "a\\b.txt"])
def test_a_path_that_a_reader_refuses_is_never_written(folder: Path, path: str):
    with pytest.raises(BundleError):
        write_tiny(folder / "b", **{path: b"x"})
    assert not list(folder.iterdir())


def test_a_manifest_that_a_reader_refuses_is_never_written(folder: Path):
    manifest, contents = tiny.parts("image-classification")
    del contents["components/model.onnx"]
    with pytest.raises(BundleError, match="used but not listed"):
        write_bundle(folder / "b", manifest, contents)
    assert not list(folder.iterdir())


def test_what_a_killed_process_left_is_swept(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale, running = (tmp_path / f".out.{pid}.x.partial" for pid in (ended.pid, os.getpid()))
    for folder in (stale, running):
        (folder / "new").mkdir(parents=True)
    write_bundle(tmp_path / "out", *tiny.parts("image-classification"))
    assert not stale.exists()
    assert running.exists()
