from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edgevlm.errors import BundleError, ModelError, UsageError
from edgevlm.runtime.image import check_image_processing, place_picture, preprocess
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import (
    Array,
    CenterCrop,
    FlipChannels,
    GridDecoding,
    ImageProcessing,
    Letterbox,
    Normalize,
    Processing,
    QueryDecoding,
    Rescale,
    Resize,
    TensorSpec,
    from_json,
    to_json,
)
from edgevlm.runtime.tasks.object_detection import Detection, Detections, box_iou, suppress

SIZE = 16
LABELS = ("cat", "dog")
BOXED = ImageProcessing(
    height=SIZE, width=SIZE, steps=(Letterbox(height=SIZE, width=SIZE), Rescale(factor=1.0), FlipChannels())
)


class Fixed:
    """A graph that gives the same for every picture."""

    def __init__(self, **outputs: Array) -> None:
        self._given = {name: value.astype(np.float32) for name, value in outputs.items()}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, SIZE, SIZE)),)

    outputs: tuple[TensorSpec, ...] = ()

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        n = len(feeds["pixel_values"])
        return {name: np.repeat(value[None], n, axis=0) for name, value in self._given.items()}


def detector(decoding: GridDecoding | QueryDecoding, image: ImageProcessing = BOXED, **outputs: Array) -> Pipeline:
    return Pipeline.from_parts(
        task="object-detection",
        processing=Processing(image=image, detection=decoding),
        sessions={"model": Fixed(**outputs)},
        labels=LABELS,
    )


def grid(*rows: tuple[int, list[float]]) -> Array:
    """Four cells of stride 8: a row of numbers for some of them, and nothing in the others."""
    cells = np.zeros((4, 7))
    for i, values in rows:
        cells[i] = values
    return cells


GRID = GridDecoding(strides=(8,), score_threshold=0.25, nms_iou=0.5)
# In the cell of column 1, row 0: centre (1.25 · 8, 0.5 · 8), 8 wide and 4 high, a dog with 0.9 · 0.8.
DOG = (1, [0.25, 0.5, 0.0, np.log(0.5), 0.9, 0.1, 0.8])


def test_a_grid_is_decoded_in_the_pictures_own_pixels():
    answer = detector(GRID, detections=grid(DOG))(Image.new("RGB", (64, 32)))
    (found,) = answer.objects
    assert (found.label, found.index, found.score) == ("dog", 1, pytest.approx(0.72))
    # 64 × 32 fits 16 × 16 at a quarter, at the top.
    assert found.box == pytest.approx((4 * 6, 4 * 2, 4 * 14, 4 * 6))
    assert (answer.height, answer.width) == (32, 64)
    assert answer.to_text() == " 72.00 %  dog  x 24 to 56, y 8 to 24"
    assert from_json(to_json(answer), Detections) == answer


def test_without_sizes_boxes_are_in_pixels_of_the_input():
    pipeline = detector(GRID, detections=grid(DOG))
    (answer,) = pipeline.predict(np.zeros((1, 3, SIZE, SIZE), np.float32))
    assert answer.objects[0].box == pytest.approx((6, 2, 14, 6))
    with pytest.raises(UsageError, match="2 sizes for 1"):
        pipeline.predict(np.zeros((1, 3, SIZE, SIZE), np.float32), sizes=[(1, 1), (2, 2)])


def test_several_strides_stand_in_their_order():
    rows = np.zeros((5, 7))
    rows[4] = [0, 0, 0, 0, 1, 1, 0]
    answer = detector(GridDecoding(strides=(8, 16)), detections=rows)(Image.new("RGB", (16, 16)))
    assert answer.objects[0].box == pytest.approx((0, 0, 8, 8)), "the last row is the one cell of 16 pixels, cut off"


def test_suppression_is_by_class():
    twice = [(1, [0.25, 0.5, 0.0, 0.0, 1, 0, 0.8]), (0, [1.25, 0.5, 0.0, 0.0, 1, 0.6, 0.7])]
    found = detector(GRID, detections=grid(*twice))(Image.new("RGB", (16, 16))).objects
    assert [(each.label, round(each.score, 2)) for each in found] == [("dog", 0.8), ("cat", 0.6)]
    assert len(detector(GRID, detections=grid(*twice))(Image.new("RGB", (16, 16)), top_k=1).objects) == 1


def test_suppress_agrees_with_all_pairs():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 50, (200, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 30, (200, 2))], axis=1)
    classes = rng.integers(0, 3, 200)
    expected: list[int] = []
    for i in range(200):
        same = [k for k in expected if classes[k] == classes[i]]
        if all(box_iou(boxes[i], boxes[k]) <= 0.4 for k in same):
            expected.append(i)
    assert suppress(boxes, classes, iou=0.4, most=1000).tolist() == expected
    assert suppress(boxes, classes, iou=0.4, most=7).tolist() == expected[:7]


def test_iou_of_boxes():
    square = np.array([0.0, 0, 2, 2])
    others = np.array([[0.0, 0, 2, 2], [1, 0, 3, 2], [2, 2, 4, 4], [1, 1, 1, 1]])
    assert box_iou(square, others).tolist() == [1, pytest.approx(1 / 3), 0, 0]
    assert box_iou(others[3], others[3]) == 0


def test_queries_of_detr_name_their_likeliest_class():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.05, 0.05, 0.9]]))
    boxes = np.array([[0.5, 0.5, 1.0, 0.5], [0.25, 0.25, 0.5, 0.5], [0, 0, 1, 1]])
    image = ImageProcessing(height=SIZE, width=SIZE, steps=(Resize(height=SIZE, width=SIZE), Rescale(factor=1.0)))
    decoding = QueryDecoding(score_threshold=0.25)
    found = detector(decoding, image, logits=logits, pred_boxes=boxes)(Image.new("RGB", (40, 20))).objects
    assert [(each.label, each.box) for each in found] == [
        ("cat", pytest.approx((0, 5, 40, 15))),
        ("dog", pytest.approx((0, 0, 20, 10))),
    ]
    assert [each.score for each in found] == pytest.approx([0.7, 0.3])


def test_queries_by_sigmoid_have_no_class_for_nothing():
    logits, boxes = np.array([[3.0, 1.0]]), np.array([[0.5, 0.5, 1.0, 1.0]])
    found = detector(QueryDecoding(activation="sigmoid"), logits=logits, pred_boxes=boxes)(Image.new("RGB", (8, 8)))
    assert [(each.label, round(each.score, 3)) for each in found.objects] == [("cat", 0.953), ("dog", 0.731)]


def test_nothing_is_found_in_the_filling_of_a_letterbox():
    below = (2, [0.5, 0.5, 0.0, 0.0, 1, 1, 0])
    assert detector(GRID, detections=grid(below))(Image.new("RGB", (16, 16))).objects
    assert not detector(GRID, detections=grid(below))(Image.new("RGB", (32, 16))).objects


def test_nothing_found_is_an_answer():
    answer = detector(GRID, detections=grid())(Image.new("RGB", (16, 16)))
    assert answer.objects == ()
    assert answer.to_text() == "nothing above 25 %"
    assert answer.is_same_answer(answer, tolerance=0)


def answer(*objects: tuple[int, float, tuple[float, float, float, float]]) -> Detections:
    found = tuple(Detection(label=LABELS[k], index=k, score=score, box=box) for k, score, box in objects)
    return Detections(objects=found, score_threshold=0.25, height=100, width=100)


WHOLE = (0.0, 0.0, 100.0, 100.0)


@pytest.mark.parametrize(
    ("other", "tolerance", "is_same"),
    [
        (answer((0, 0.8, WHOLE)), 0.0, True),
        (answer((0, 0.8, (0, 0, 100, 95))), 0.0, True),
        (answer((0, 0.8, (0, 0, 100, 85))), 0.0, False),
        (answer((1, 0.9, WHOLE)), 0.01, False),
        (answer(), 0.03, False),
        (answer((0, 0.9, WHOLE), (1, 0.27, (0, 0, 9, 9))), 0.03, True),
        (answer((0, 0.9, WHOLE), (1, 0.27, (0, 0, 9, 9))), 0.01, False),
    ],
)
def test_the_same_answer(other: Detections, tolerance: float, is_same: bool):
    mine = answer((0, 0.9, WHOLE))
    assert mine.is_same_answer(other, tolerance=tolerance) is is_same
    assert other.is_same_answer(mine, tolerance=tolerance) is is_same


@pytest.mark.parametrize(
    ("decoding", "outputs", "kind", "words"),
    [
        (None, {}, BundleError, "needs its decoding"),
        (GridDecoding(strides=(7,)), {}, BundleError, "do not divide 16"),
        (GridDecoding(strides=()), {}, BundleError, "do not divide"),
        (GridDecoding(strides=(8,), nms_iou=0), {}, BundleError, "nms_iou is 0"),
        (GridDecoding(strides=(8,), score_threshold=1), {}, BundleError, "score_threshold is 1"),
        (QueryDecoding(max_detections=0), {}, BundleError, "max_detections is 0"),
        (GRID, {"detections": np.zeros((5, 7))}, BundleError, "give \\[n, 4, 5 \\+ classes\\]"),
        (GRID, {"detections": np.zeros((4, 8))}, BundleError, "3 classes apart, but there are 2 labels"),
        (GRID, {"detections": np.full((4, 7), np.nan)}, ModelError, "NaN"),
        (QueryDecoding(), {"logits": np.zeros((4, 3))}, BundleError, "no pred_boxes"),
        (QueryDecoding(), {"logits": np.zeros((4, 3)), "pred_boxes": np.zeros((5, 4))}, BundleError, "queries"),
    ],
)
def test_what_cannot_be_decoded_is_refused(decoding, outputs, kind, words):
    with pytest.raises(kind, match=words) as caught:
        detector(decoding, **outputs)(Image.new("RGB", (16, 16)))
    assert caught.value.hint


def test_labels_and_crops_are_refused():
    with pytest.raises(UsageError, match="its own labels"):
        detector(GRID, detections=grid())(Image.new("RGB", (16, 16)), labels=["cat"])
    cropped = ImageProcessing(height=16, width=16, steps=(Resize(shortest_edge=16), CenterCrop(height=16, width=16)))
    with pytest.raises(BundleError, match="cropped"):
        detector(GRID, cropped, detections=grid())


# --- letterbox --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "place", "inside"),
    [
        ((40, 20), "top_left", (0, 0, 8, 16)),
        ((40, 20), "center", (4, 0, 12, 16)),
        ((20, 40), "top_left", (0, 0, 16, 8)),
        ((21, 40), "center", (0, 4, 16, 12)),
        ((8, 8), "center", (0, 0, 16, 16)),
    ],
)
def test_a_letterbox_keeps_the_aspect_and_fills_the_rest(size, place, inside):
    step = Letterbox(height=16, width=16, place=place, fill=114)
    spec = ImageProcessing(height=16, width=16, steps=(step, Rescale(factor=1.0), FlipChannels()))
    check_image_processing(spec)
    pixels = preprocess(Image.new("RGB", size, (10, 20, 30)), spec)
    top, left, bottom, right = inside
    expected = np.full((3, 16, 16), 114, np.float32)
    expected[:, top:bottom, left:right] = np.array([30, 20, 10])[:, None, None]
    assert np.array_equal(pixels, expected)


def test_a_letterbox_of_416_rounds_as_yolox_does():
    spec = ImageProcessing(height=416, width=416, steps=(Letterbox(height=416, width=416, fill=0),))
    for width, height in ((640, 480), (427, 640), (333, 500), (1000, 3), (416, 416)):
        ratio = min(416 / width, 416 / height)
        filled = preprocess(Image.new("RGB", (width, height), "white"), spec)[0] > 0
        assert abs(int(filled.any(axis=0).sum()) - int(width * ratio)) <= 1
        assert max(filled.any(axis=0).sum(), filled.any(axis=1).sum()) == 416


@pytest.mark.parametrize(
    "steps",
    [
        (Letterbox(height=16, width=16, place="center"),),
        (Letterbox(height=16, width=16),),
        (Resize(height=16, width=16),),
        (Resize(shortest_edge=20), CenterCrop(height=16, width=16)),
    ],
)
def test_where_a_picture_is_placed(steps):
    """A white square in a black picture is where the placement says."""
    picture = Image.new("RGB", (64, 48))
    picture.paste("white", (24, 12, 40, 36))
    spec = ImageProcessing(height=16, width=16, steps=steps)
    placed = place_picture((48, 64), spec)
    pixels = preprocess(picture, spec)[0] / 255
    columns, rows = pixels.sum(axis=0), pixels.sum(axis=1)
    centre = np.array([columns @ (np.arange(16) + 0.5), rows @ (np.arange(16) + 0.5)]) / pixels.sum()
    fill = [step.fill for step in steps if isinstance(step, Letterbox)]
    if not fill:
        expected = (32 * placed.scale_x + placed.offset_x, 24 * placed.scale_y + placed.offset_y)
        assert centre == pytest.approx(expected, abs=0.1)
    x = int(32 * placed.scale_x + placed.offset_x)
    y = int(24 * placed.scale_y + placed.offset_y)
    assert pixels[y, x] == 1
    left = 12 * placed.scale_x + placed.offset_x
    assert pixels[y, int(left)] < 0.5


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((Rescale(factor=1.0), Letterbox(height=16, width=16)), "after a step that changes values"),
        ((Letterbox(height=0, width=16),), "no size above 0"),
        ((Letterbox(height=16, width=16, fill=300),), "no pixel has"),
        ((Letterbox(height=8, width=16),), "end at 8 × 16"),
    ],
)
def test_a_wrong_letterbox_is_refused(steps, words):
    with pytest.raises(BundleError, match=words):
        check_image_processing(ImageProcessing(height=16, width=16, steps=steps))


def test_normalize_after_a_letterbox_scales_the_fill_too():
    steps = (Letterbox(height=4, width=4, fill=100), Rescale(factor=1.0), Normalize(mean=(100,) * 3, std=(2,) * 3))
    pixels = preprocess(Image.new("RGB", (4, 2), (104, 104, 104)), ImageProcessing(height=4, width=4, steps=steps))
    assert pixels[0, :, 0].tolist() == [2, 2, 0, 0]
