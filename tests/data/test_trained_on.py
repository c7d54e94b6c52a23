"""A model is not judged by what it was trained on."""

from __future__ import annotations

import pytest

from edgevlm.data.trained_on import part_by_training, trained_on, write_trained_on
from edgevlm.errors import DataError
from tests.data.test_splits import data_set


def test_a_folder_that_says_nothing_leaves_the_data_whole(tmp_path):
    data = data_set([30])
    seen, fresh = part_by_training(data, tmp_path)
    assert len(seen) == 0
    assert fresh is data
    assert part_by_training(data, tmp_path / "model.onnx")[1] is data


def test_what_was_seen_is_parted_from_what_was_not(tmp_path):
    data = data_set([30, 30])
    taught = data.samples[:35]
    write_trained_on(tmp_path, [sample.digest for sample in taught])
    seen, fresh = part_by_training(data, tmp_path)
    assert seen.samples == taught
    assert fresh.samples == data.samples[35:]
    assert fresh.notes[-1].startswith("35 of 60 pictures of 'data' taught this model")
    assert len(trained_on(tmp_path)) == 35
    # What it knows goes on from student to student.
    write_trained_on(tmp_path, trained_on(tmp_path) | {data.samples[40].digest})
    assert len(part_by_training(data, tmp_path)[0]) == 36


def test_too_few_that_are_left_are_an_error(tmp_path):
    data = data_set([30])
    write_trained_on(tmp_path, [sample.digest for sample in data.samples[:15]])
    with pytest.raises(DataError, match=r"trained on 15 of the 30 pictures of 'data', and the other 15 are too few"):
        part_by_training(data, tmp_path)
