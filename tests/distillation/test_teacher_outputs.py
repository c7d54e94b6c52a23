"""Stored teacher outputs: what is read is what the teacher said, and what is not that is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch", reason="the teacher is a PyTorch module")

from edgevlm.distillation.teacher_outputs import (
    INDEX,
    OutputsOf,
    StoredOutputs,
    compute_outputs,
    describe_outputs,
    read_index,
    sparse_logits,
)
from edgevlm.distillation.teachers import Teacher, teacher_of
from edgevlm.errors import ModelError, StoreError, UsageError
from edgevlm.ingest import read_model
from tests.distillation.small import FACTORY, NEEDS, RECIPE, make_pictures
from tests.quantization.tiny_qat import write_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    recipe = msgspec.structs.replace(RECIPE, n_variants=2)
    return make_pictures(write_pictures(tmp_path_factory.mktemp("pictures") / "colours", 21), recipe)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return teacher_of(read_model(FACTORY))


class Counting:
    """A teacher that counts the pictures that it saw, and can give up."""

    def __init__(self, teacher: Teacher, *, stops_after: int | None = None) -> None:
        self._teacher = teacher
        self._stops_after = stops_after
        self.n_seen = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def outputs(self, pixel_values: Any, names: frozenset[str]) -> Any:
        if self._stops_after is not None and self.n_seen >= self._stops_after:
            raise KeyboardInterrupt
        self.n_seen += len(pixel_values)
        return self._teacher.outputs(pixel_values, names)


def store(teacher: Any, pictures: Any, folder: Path, *, top_k: int = 0, **options: Any) -> OutputsOf:
    of = describe_outputs(teacher, pictures, NEEDS, top_k=top_k)
    compute_outputs(teacher, pictures, of, folder, rows_in_shard=8, **options)
    return of


@pytest.fixture(scope="module")
def stored(teacher: Teacher, pictures: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OutputsOf]:
    folder = tmp_path_factory.mktemp("outputs")
    return folder, store(teacher, pictures, folder)


def test_rows_are_what_the_teacher_says(stored: Any, teacher: Teacher, pictures: Any) -> None:
    rows = [40, 3, 3, 17]
    got = StoredOutputs(*stored).rows(rows)
    expected = teacher.outputs(pictures.pixels(rows, teacher.processing.image), NEEDS)["logits"]
    assert got.keys() == {"logits"} and got["logits"].dtype == np.float32
    np.testing.assert_allclose(got["logits"], expected, rtol=2e-3, atol=1e-3)


def test_only_the_rows_asked_for_are_read(stored: Any) -> None:
    opened = StoredOutputs(*stored)
    opened.rows([1, 2, 41])
    assert np.flatnonzero(opened.was_read).tolist() == [1, 2, 41]


def test_the_index_says_what_the_outputs_are_of(stored: Any, teacher: Teacher, pictures: Any) -> None:
    folder, of = stored
    index = read_index(folder)
    assert index.of == of and of.teacher == teacher.digest and of.data == pictures.digest
    assert index.n_rows == 42 and [shard.n_rows for shard in index.shards] == [8, 8, 8, 8, 8, 2]
    assert sorted(path.name for path in folder.iterdir()) == [INDEX, *(shard.file for shard in index.shards)]


def test_stored_outputs_are_not_computed_again(stored: Any, teacher: Teacher, pictures: Any) -> None:
    again = Counting(teacher)
    store(again, pictures, stored[0])
    assert again.n_seen == 0


def test_a_run_that_was_stopped_goes_on_with_the_next_shard(
    stored: Any, teacher: Teacher, pictures: Any, tmp_path: Path
) -> None:
    first = Counting(teacher, stops_after=24)
    with pytest.raises(KeyboardInterrupt):
        store(first, pictures, tmp_path / "parts")
    assert not (tmp_path / "parts" / INDEX).exists()
    second = Counting(teacher)
    store(second, pictures, tmp_path / "parts")
    assert (first.n_seen, second.n_seen) == (24, 18)
    for shard in read_index(stored[0]).shards:
        assert (tmp_path / "parts" / shard.file).read_bytes() == (stored[0] / shard.file).read_bytes()


def test_a_shard_torn_before_the_index_was_written_is_made_anew(
    teacher: Teacher, pictures: Any, stored: Any, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        store(Counting(teacher, stops_after=24), pictures, tmp_path)
    torn = tmp_path / "shard-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-5])
    again = Counting(teacher)
    store(again, pictures, tmp_path)
    assert again.n_seen == 18 + 8
    StoredOutputs(tmp_path, stored[1])


def test_processes_share_the_shards(teacher: Teacher, pictures: Any, stored: Any, tmp_path: Path) -> None:
    of = stored[1]
    counts = []
    for process in (1, 0):  # the first writes the index, so it has to come last where nobody waits
        each = Counting(teacher)
        if process == 1:
            (tmp_path / "draft.json").write_text(json.dumps({"of": of.key, "rows_in_shard": 8}))
        compute_outputs(each, pictures, of, tmp_path, process=process, n_processes=2, rows_in_shard=8)  # type: ignore[arg-type]
        counts.append(each.n_seen)
    assert counts == [18, 24]
    assert StoredOutputs(tmp_path, of).index.shards == StoredOutputs(*stored).index.shards


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (flip, "its sha256 is another"),
        (truncate, "bytes, where"),
        (Path.unlink, "cannot be read: no such file"),
    ],
)
def test_a_damaged_shard_is_refused(stored: Any, tmp_path: Path, harm: Callable[[Path], Any], words: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(stored[0], folder)
    harm(folder / "shard-00002.safetensors")
    with pytest.raises(StoreError, match=words):
        StoredOutputs(folder, stored[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": "0" * 64}, "another teacher"),
        ({"data": "0" * 64}, "other pictures"),
        ({"augmentation": "flip"}, "another augmentation"),
        ({"seed": 1}, "another seed"),
        ({"n_variants": 3}, "another number of variants"),
        ({"top_k": 2}, "another number of logits"),
        ({"names": ("image_embeds",)}, "other outputs"),
        ({"texts": "0" * 64}, "other texts"),
    ],
)
def test_outputs_of_something_else_are_refused(stored: Any, change: dict[str, Any], words: str) -> None:
    other = msgspec.structs.replace(stored[1], **change)
    assert other.key != stored[1].key
    with pytest.raises(StoreError, match=words):
        StoredOutputs(stored[0], other)


def test_a_foreign_folder_is_left_alone(teacher: Teacher, pictures: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="something else than teacher outputs"):
        store(teacher, pictures, tmp_path)


def test_an_index_that_is_none_is_refused(stored: Any, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"shards": []}')
    with pytest.raises(StoreError, match="is not the index"):
        StoredOutputs(tmp_path, stored[1])


def test_sparse_logits_keep_the_likeliest_and_the_weight_of_the_rest() -> None:
    logits = np.random.default_rng(0).normal(scale=3, size=(5, 9)).astype(np.float32)
    sparse = sparse_logits(logits, 3)
    np.testing.assert_array_equal(sparse["logits.values"], -np.sort(-logits, axis=1)[:, :3])
    for i in range(5):
        np.testing.assert_array_equal(logits[i, sparse["logits.indices"][i]], sparse["logits.values"][i])
    whole = np.log(np.exp(logits.astype(np.float64)).sum(1))
    parts = np.concatenate([sparse["logits.values"], sparse["logits.rest"][:, None]], axis=1).astype(np.float64)
    np.testing.assert_allclose(np.log(np.exp(parts).sum(1)), whole, rtol=1e-5)


def test_sparse_logits_are_stored_with_whole_indices(teacher: Teacher, pictures: Any, tmp_path: Path) -> None:
    of = store(teacher, pictures, tmp_path, top_k=2)
    got = StoredOutputs(tmp_path, of).rows([5])
    assert {name: (value.shape, value.dtype) for name, value in got.items()} == {
        "logits.values": ((1, 2), np.float32),
        "logits.indices": ((1, 2), np.int64),
        "logits.rest": ((1,), np.float32),
    }


class Odd(Counting):
    """A teacher whose outputs cannot be stored."""

    def __init__(self, teacher: Teacher, value: float) -> None:
        super().__init__(teacher)
        self.value = value

    def outputs(self, pixel_values: Any, names: frozenset[str]) -> Any:
        return {"logits": np.full((len(pixel_values), 3), self.value, np.float32)}


@pytest.mark.parametrize(("value", "words"), [(np.nan, "NaN or infinite"), (1e6, "half precision")])
def test_outputs_that_are_no_numbers_are_refused(
    teacher: Teacher, pictures: Any, tmp_path: Path, value: float, words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        store(Odd(teacher, value), pictures, tmp_path)


def test_what_the_teacher_does_not_give_is_named(teacher: Teacher, pictures: Any) -> None:
    with pytest.raises(UsageError, match="'image_embeds' of the teacher"):
        describe_outputs(teacher, pictures, frozenset({"image_embeds"}))
