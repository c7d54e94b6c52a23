from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgevlm.errors import BundleError, DataError, UsageError
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import Array, ImageProcessing, Letterbox, Processing, Rescale, Resize, from_json, to_json
from edgevlm.runtime.tasks.semantic_segmentation import Segmentation
from tests.runtime.test_object_detection import SIZE, Fixed

LABELS = ("background", "cat", "dog")
STRETCHED = ImageProcessing(height=SIZE, width=SIZE, steps=(Resize(height=SIZE, width=SIZE), Rescale(factor=1.0)))


def segmenter(classes: Array, image: ImageProcessing = STRETCHED) -> Pipeline:
    """Of a graph that gives these classes, [height, width], for every picture."""
    logits = (np.arange(3)[:, None, None] == classes).astype(np.float32)
    return Pipeline.from_parts(
        task="semantic-segmentation",
        processing=Processing(image=image),
        sessions={"model": Fixed(logits=logits)},
        labels=LABELS,
    )


HALVES = np.repeat([[0, 2]], 2, axis=0)  # at an eighth of the input's resolution


def test_every_pixel_gets_the_nearest_place():
    answer = segmenter(HALVES)(Image.new("RGB", (6, 3)))
    assert answer.to_array().tolist() == [[0, 0, 0, 2, 2, 2]] * 3
    assert (answer.height, answer.width) == (3, 6)
    assert answer.runs == "0*3 2*3 0*3 2*3 0*3 2*3"
    assert answer.to_text() == " 50.00 %  background\n 50.00 %  dog"
    assert from_json(to_json(answer), Segmentation) == answer


def test_a_letterboxed_picture_is_cut_out_again():
    image = ImageProcessing(height=SIZE, width=SIZE, steps=(Letterbox(height=SIZE, width=SIZE, place="center"),))
    classes = np.zeros((SIZE, SIZE), int)
    classes[4:12, 8:] = 1  # a wide picture fills the middle half
    answer = segmenter(classes, image)(Image.new("RGB", (32, 16)))
    expected = np.zeros((16, 32), int)
    expected[:, 16:] = 1
    assert np.array_equal(answer.to_array(), expected)


def test_the_same_resampling_as_pillow():
    classes = np.random.default_rng(0).integers(0, 3, (SIZE, SIZE))
    for size in ((64, 8), (4, 128), (16, 16)):  # no pixel's middle on a line between two places, where rounding decides
        expected = Image.fromarray(classes.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        given = segmenter(classes)(Image.new("RGB", size)).to_array()
        assert np.array_equal(given, np.asarray(expected)), size


def test_the_largest_classes_first_and_as_many_as_asked():
    classes = np.zeros((4, 4), int)
    classes[0, 0], classes[1:3] = 1, 2
    pipeline = segmenter(classes)
    assert [each.label for each in pipeline(Image.new("RGB", (16, 16))).classes] == ["dog", "background", "cat"]
    assert [each.label for each in pipeline(Image.new("RGB", (16, 16)), top_k=1).classes] == ["dog"]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_runs_hold_every_map(height: int, width: int, seed: int):
    classes = np.random.default_rng(seed).integers(0, 3, (height, width))
    answer = segmenter(classes)(Image.new("RGB", (width, height)))
    expected = Image.fromarray(classes.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    assert np.array_equal(answer.to_array(), np.asarray(expected))
    assert sum(each.share for each in answer.classes) == pytest.approx(1)


@pytest.mark.parametrize("runs", ["", "0*3", "0*x", "0", "0*-16 0*32", "0*16 1"])
def test_broken_runs_are_refused(runs: str):
    with pytest.raises(DataError, match="do not make 4 × 4"):
        Segmentation(height=4, width=4, classes=(), runs=runs).to_array()


def test_the_same_answer_up_to_a_share_of_pixels():
    classes = np.zeros((10, 10), int)
    mine = segmenter(classes)(Image.new("RGB", (10, 10)))
    classes[0, :2] = 1
    other = segmenter(classes)(Image.new("RGB", (10, 10)))
    assert mine.agreement(other) == pytest.approx(0.98)
    assert mine.is_same_answer(other, tolerance=0.03)
    assert not mine.is_same_answer(other, tolerance=0.01)
    assert not mine.is_same_answer(segmenter(classes)(Image.new("RGB", (10, 9))), tolerance=0.5)


def test_what_cannot_be_segmented_is_refused():
    with pytest.raises(UsageError, match="its own labels"):
        segmenter(HALVES)(Image.new("RGB", (8, 8)), labels=["cat"])
    flat = Pipeline.from_parts(
        task="semantic-segmentation",
        processing=Processing(image=STRETCHED),
        sessions={"model": Fixed(logits=np.zeros(3))},
    )
    with pytest.raises(BundleError, match="not \\[n, classes, height, width\\]"):
        flat(Image.new("RGB", (8, 8)))
    many = Pipeline.from_parts(
        task="semantic-segmentation",
        processing=Processing(image=STRETCHED),
        sessions={"model": Fixed(logits=np.zeros((4, 2, 2)))},
        labels=LABELS,
    )
    with pytest.raises(BundleError, match="4 classes apart"):
        many(Image.new("RGB", (8, 8)))
