"""The store: a look-up only where nothing that matters has changed, and never half a result."""

import errno
import multiprocessing
import os
import signal
import time

import pytest

from edgevlm.errors import StoreError
from edgevlm.store import Store, code_digest, differing, key_of


def make_result(folder):
    (folder / "result.txt").write_text("made")


def test_the_same_parts_are_looked_up_and_any_other_is_made(tmp_path):
    store = Store(tmp_path)
    parts = {"weights": "aa", "params": {"opset": 20}, "tools": {"torch": "1"}}
    first = store.fetch("export", parts, make_result)
    again = store.fetch("export", dict(reversed(parts.items())), pytest.fail)
    assert (first.hit, again.hit) == (False, True)
    assert again.path == first.path
    for changed in ({**parts, "weights": "ab"}, {**parts, "params": {"opset": 21}}, {**parts, "tools": {"torch": "2"}}):
        entry = store.fetch("export", changed, make_result)
        assert not entry.hit


def test_why_names_the_part_that_changed(tmp_path):
    store = Store(tmp_path)
    assert store.fetch("export", {"weights": "aa", "tools": {"torch": "1"}}, make_result).why == "never made before"
    why = store.fetch("export", {"weights": "aa", "tools": {"torch": "2"}}, make_result).why
    assert why.endswith(": tools.torch")


def test_a_failed_step_leaves_nothing(tmp_path):
    store = Store(tmp_path)

    def fail(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.fetch("export", {"a": 1}, fail)
    assert list(store.entries()) == []
    assert not list(tmp_path.rglob("half"))
    assert not store.fetch("export", {"a": 1}, make_result).hit


def _hang_in_a_step(root):
    def hang(folder):
        (folder / "half").write_text("half")
        time.sleep(60)

    Store(root).fetch("export", {"a": 1}, hang)


def test_a_killed_process_leaves_nothing_that_is_found_and_its_draft_is_swept(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_hang_in_a_step, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 20
    while not list(tmp_path.rglob("half")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(tmp_path.rglob("half"))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not Store(tmp_path).fetch("export", {"a": 1}, make_result).hit
    assert not list(tmp_path.rglob("half"))


def test_a_result_that_is_not_to_be_kept_serves_once(tmp_path):
    store = Store(tmp_path)
    entry = store.fetch("measure", {"a": 1}, make_result, keep=lambda folder: False)
    assert (entry.path / "result.txt").is_file()
    store.forget_unkept()
    assert not entry.path.exists()
    assert not store.fetch("measure", {"a": 1}, make_result).hit


def test_a_full_disk_is_one_sentence(tmp_path):
    def fill(folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "x"))

    with pytest.raises(StoreError, match="No space left") as caught:
        Store(tmp_path).fetch("export", {"a": 1}, fill)
    assert "EDGEVLM_CACHE" in caught.value.hint


def test_clear_says_what_it_freed(tmp_path):
    store = Store(tmp_path)
    store.fetch("export", {"a": 1}, make_result)
    (tmp_path / "pixels").mkdir()
    (tmp_path / "pixels" / "a.npy").write_bytes(bytes(1000))
    assert store.clear() > 1004
    assert list(store.entries()) == []
    assert not (tmp_path / "pixels").exists()


def test_differing_names_nested_parts():
    assert differing({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 9}, "e": 3}) == ["a.c", "d", "e"]


def test_the_code_is_part_of_every_key():
    assert len(code_digest()) == 64
    assert key_of("export", {"code": "a"}) != key_of("export", {"code": "b"})
