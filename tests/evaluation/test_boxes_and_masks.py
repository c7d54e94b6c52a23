"""mAP and mIoU: what the libraries say, what is drawn anew for the intervals, and how drops are told."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgevlm.data.data_set import UNKNOWN, Annotation, DataSet, Objects, Sample
from edgevlm.errors import DataError
from edgevlm.evaluation.evaluation import compare_evaluations, evaluate
from edgevlm.evaluation.intervals import bootstrap_pooled
from edgevlm.evaluation.metrics import (
    BOX_AGREEMENT,
    MAP,
    MAP_50,
    MIOU,
    PIXEL_ACCURACY,
    PIXEL_AGREEMENT,
    Boxes,
    Masks,
)
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import (
    Array,
    GridDecoding,
    ImageProcessing,
    Letterbox,
    Processing,
    Rescale,
    Resize,
    from_json,
    to_json,
)
from edgevlm.runtime.tasks.object_detection import Detection, Detections
from edgevlm.runtime.tasks.semantic_segmentation import ClassShare, Segmentation
from tests.data.pictures import png
from tests.evaluation.pipelines import SIZE, NumpySession

coco = pytest.importorskip("pycocotools", reason="pycocotools is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")


# --- average precision ------------------------------------------------------------------------------------


def scene(rng: np.random.Generator, n_classes: int) -> tuple[Objects, Detections]:
    """Some things, most of them found a little beside where they are, some twice, and some that are not there."""
    n = int(rng.integers(0, 8))
    corners = rng.uniform(0, 80, (n, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 40, (n, 2))], axis=1)
    classes = rng.integers(0, n_classes, n)
    truth = Objects(boxes=boxes, classes=classes, is_crowd=rng.random(n) < 0.1)
    rows = [(k, box + rng.normal(0, 3, 4)) for k, box in zip(classes, boxes, strict=True) if rng.random() < 0.8]
    rows += [(k, box + rng.normal(0, 2, 4)) for k, box in zip(classes, boxes, strict=True) if rng.random() < 0.3]
    rows += [(rng.integers(0, n_classes), np.array([1.0, 1, 9, 9])) for _ in range(int(rng.integers(0, 3)))]
    # Few different scores, so that equal ones of several pictures have to be ordered.
    scores = rng.permutation(30)[: len(rows)] / 30
    found = [
        Detection(label=str(k), index=int(k), score=float(score), box=tuple(box.tolist()))
        for score, (k, box) in zip(scores, rows, strict=True)
    ]
    found.sort(key=lambda each: -each.score)
    return truth, Detections(objects=tuple(found), score_threshold=0.001, height=100, width=100)


@pytest.mark.parametrize("seed", range(4))
def test_precision_drawn_anew_is_what_pycocotools_says_of_those_pictures(seed: int) -> None:
    from edgevlm.evaluation.average_precision import average_precision

    rng = np.random.default_rng(seed)
    scenes = [scene(rng, 3) for _ in range(12)]
    pooled, _ = average_precision([truth for truth, _ in scenes], [found for _, found in scenes])
    weights = rng.multinomial(12, np.full(12, 1 / 12), size=5)
    weights = np.concatenate([np.ones((1, 12), int), weights])
    for row, value in zip(weights, pooled.values(weights), strict=True):
        drawn = [scenes[i] for i in np.repeat(np.arange(12), row)]
        expected, _ = average_precision([truth for truth, _ in drawn], [found for _, found in drawn])
        assert value == pytest.approx(expected.value, abs=1e-9)
    assert pooled.values(weights[:1])[0] == pytest.approx(pooled.value, abs=1e-12)


def test_average_precision_of_what_is_known() -> None:
    from edgevlm.evaluation.average_precision import average_precision

    box = (10.0, 10.0, 50.0, 50.0)
    truth = Objects(boxes=np.array([box, box]), classes=np.array([0, 1]), is_crowd=np.zeros(2, bool))
    right = Detection(label="0", index=0, score=0.9, box=box)
    shifted = Detection(label="1", index=1, score=0.8, box=(10.0, 10.0, 50.0, 38.0))  # overlaps by 0.7
    found = Detections(objects=(right, shifted), score_threshold=0.001, height=60, width=60)
    pooled, over_overlaps = average_precision([truth], [found])
    assert pooled.value == pytest.approx(1)
    assert over_overlaps == pytest.approx((1 + 0.5) / 2, abs=0.051), "the second counts at five of ten overlaps"
    nothing = Detections(objects=(), score_threshold=0.001, height=60, width=60)
    assert average_precision([truth], [nothing])[0].value == 0
    empty = Objects(boxes=np.zeros((0, 4)), classes=np.zeros(0, int), is_crowd=np.zeros(0, bool))
    with pytest.raises(DataError, match="no object"):
        average_precision([empty], [found])


def test_a_crowd_need_not_be_found() -> None:
    from edgevlm.evaluation.average_precision import average_precision

    boxes = np.array([[0.0, 0, 20, 20], [40.0, 40, 99, 99]])
    truth = Objects(boxes=boxes, classes=np.array([0, 0]), is_crowd=np.array([False, True]))
    found = [
        Detection(label="0", index=0, score=score, box=tuple(box))
        for score, box in ((0.9, (45.0, 45, 60, 60)), (0.8, (0.0, 0, 20, 20)))
    ]
    answer = Detections(objects=tuple(found), score_threshold=0.001, height=100, width=100)
    assert average_precision([truth], [answer])[0].value == pytest.approx(1)


# --- mean IoU ---------------------------------------------------------------------------------------------


def segmentation(classes: Array) -> Segmentation:
    flat = classes.ravel()
    runs = " ".join(f"{k}*1" for k in flat)
    shares = tuple(ClassShare(label=str(k), index=int(k), share=float((flat == k).mean())) for k in np.unique(flat))
    return Segmentation(height=classes.shape[0], width=classes.shape[1], classes=shares, runs=runs)


def annotation(value: object) -> Annotation:
    return Annotation(digest=hashlib.sha256(repr(value).encode()).hexdigest(), read=lambda: value)


def test_mean_iou_by_definition() -> None:
    from edgevlm.evaluation.mean_iou import mean_iou

    truths = [np.array([[0, 0, 1], [1, UNKNOWN, 1]]), np.array([[2, 2, 0]])]
    found = [np.array([[0, 1, 1], [1, 2, 0]]), np.array([[2, 0, 0]])]
    pooled, accuracy = mean_iou(map(annotation, truths), map(segmentation, found))
    # Class 0: 2 right of 3 true and 4 found; 1: 2 of 3 and 3; 2: 1 of 2 and 1. What is unknown counts nowhere.
    assert pooled.value == pytest.approx((2 / 5 + 2 / 4 + 1 / 2) / 3)
    assert accuracy == pytest.approx(5 / 8)
    once, twice = pooled.values(np.array([[1, 0], [0, 2]]))
    assert once == pytest.approx((1 / 3 + 2 / 4) / 2), "class 2 is not there"
    assert twice == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_mean_iou_of_scikit_learn() -> None:
    from sklearn.metrics import jaccard_score

    from edgevlm.evaluation.mean_iou import mean_iou

    rng = np.random.default_rng(0)
    truths, found = rng.integers(0, 4, (2, 6, 7, 9))
    pooled, _ = mean_iou(map(annotation, truths), map(segmentation, found))
    assert pooled.value == pytest.approx(jaccard_score(truths.ravel(), found.ravel(), average="macro"))


def test_masks_without_any_class_judge_nothing() -> None:
    from edgevlm.evaluation.mean_iou import mean_iou

    blank = np.full((2, 2), UNKNOWN)
    with pytest.raises(DataError, match="No pixel"):
        mean_iou([annotation(blank)], [segmentation(np.zeros((2, 2), int))])
    with pytest.raises(DataError, match="shape"):
        mean_iou([annotation(blank)], [segmentation(np.zeros((2, 3), int))])


# --- agreement --------------------------------------------------------------------------------------------


def detections(*boxes: tuple[int, float, tuple[float, float, float, float]]) -> Detections:
    found = tuple(Detection(label=str(k), index=k, score=score, box=box) for k, score, box in boxes)
    return Detections(objects=found, score_threshold=0.001, height=100, width=100)


def test_agreement_is_over_what_users_are_shown() -> None:
    one, other = (0.0, 0.0, 50.0, 50.0), (60.0, 60.0, 90.0, 90.0)
    metric = Boxes(score_threshold=0.25)
    mine = metric.collect([detections((0, 0.9, one), (1, 0.3, other), (0, 0.1, other)), detections()])
    theirs = metric.collect([detections((0, 0.8, one), (0, 0.1, one)), detections((0, 0.2, one))])
    judged = metric.judge(mine, labels=None, reference=theirs)
    assert (judged.metric, judged.is_relative) == (BOX_AGREEMENT, True)
    assert judged.scores.tolist() == [pytest.approx(2 / 3), 1]
    assert metric.judge(mine, labels=None, reference=None).scores.tolist() == [1, 1]


def test_pixels_that_agree() -> None:
    metric = Masks()
    mine = metric.collect([segmentation(np.array([[0, 1, 1, 1]]))])
    theirs = metric.collect([segmentation(np.array([[0, 1, 1, 0]]))])
    judged = metric.judge(mine, labels=None, reference=theirs)
    assert (judged.metric, judged.scores.tolist()) == (PIXEL_AGREEMENT, [0.75])


# --- intervals --------------------------------------------------------------------------------------------


def test_the_bootstrap_of_a_mean_is_that_of_its_pictures() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.2, 100)
    low, high = bootstrap_pooled(lambda weights: weights @ values / weights.sum(axis=1), 100)
    half = 1.96 * values.std() / 10
    assert low == pytest.approx(values.mean() - half, abs=0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.01)


# --- whole evaluations ------------------------------------------------------------------------------------

COLORS = np.eye(3) * 200


def thirds(is_wrong: bool = False) -> Pipeline:
    """A segmenter that tells red, green and blue apart; or calls blue green."""

    def function(pixels: Array) -> Array:
        logits: Array = pixels.copy()
        if is_wrong:
            logits[:, 1] += logits[:, 2]
        return logits

    image = ImageProcessing(height=SIZE, width=SIZE, steps=(Resize(height=SIZE, width=SIZE), Rescale(factor=1 / 255)))
    return Pipeline.from_parts(
        task="semantic-segmentation",
        processing=Processing(image=image),
        sessions={"model": NumpySession("logits", function, [])},
        labels=("red", "green", "blue"),
    )


def flags(n: int = 12) -> DataSet:
    """Pictures of two or three stripes, with their masks."""
    samples = []
    for i in range(n):
        classes = np.zeros((SIZE, 2 * SIZE), np.uint8)
        classes[:, SIZE:] = 1
        classes[: i % 3] = 2
        pixels = COLORS[classes].astype(np.uint8)
        pixels[0, 0] += i
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        samples.append(
            Sample(name=str(i), label=None, digest=digest, read=lambda p=pixels: p, annotation=annotation(classes))
        )
    return DataSet(name="flags", samples=tuple(samples), class_names=("red", "green", "blue"))


def test_the_drop_of_a_segmenter(tmp_path: Path) -> None:
    data = flags()
    reference = evaluate(thirds(), data, folder=tmp_path)
    assert reference.metric == MIOU
    assert reference.value == 1
    candidate = evaluate(thirds(is_wrong=True), data, reference=reference, folder=tmp_path, batch=5)
    assert set(candidate.others) == {PIXEL_ACCURACY, PIXEL_AGREEMENT}
    drop = compare_evaluations(candidate, reference)
    assert drop.value == pytest.approx(reference.value - candidate.value)
    assert drop.value > 0.3, "one class of three is never found"
    assert 0 < drop.low < drop.value < drop.high
    assert (drop.interval, drop.n, drop.n_worse, drop.n_better) == ("paired bootstrap", 12, 8, 0)
    assert from_json(to_json(drop), type(drop)) == drop
    low, high = reference.interval()
    assert low <= reference.value <= high
    again = compare_evaluations(evaluate(thirds(), data, reference=reference), reference)
    assert (again.value, again.low, again.high) == (0, 0, 0)


def test_without_masks_the_float_model_is_the_judge() -> None:
    data = flags()
    bare = data.only([replace(sample, annotation=None) for sample in data.samples])
    reference = evaluate(thirds(), bare)
    assert (reference.metric, reference.value) == (PIXEL_AGREEMENT, 1)
    drop = compare_evaluations(evaluate(thirds(is_wrong=True), bare, reference=reference), reference)
    assert 0 < drop.low <= drop.value <= drop.high


def finder(score: float = 0.9) -> Pipeline:
    """A detector of one box as large as the picture, of the class that its colour says."""

    def function(pixels: Array) -> Array:
        rows = np.zeros((len(pixels), 1, 8), np.float32)
        rows[:, 0, :2], rows[:, 0, 4] = 0.5, score
        rows[:, 0, 5:] = pixels.mean(axis=(2, 3)) > 0.5
        return rows

    image = ImageProcessing(
        height=SIZE, width=SIZE, steps=(Letterbox(height=SIZE, width=SIZE, fill=0), Rescale(factor=1 / 255))
    )
    return Pipeline.from_parts(
        task="object-detection",
        processing=Processing(image=image, detection=GridDecoding(strides=(SIZE,))),
        sessions={"model": NumpySession("detections", function, [])},
        labels=("red", "green", "blue"),
    )


def squares() -> DataSet:
    samples = []
    for i in range(9):
        color = [(230, 20, 20), (20, 230, 20), (20, 20, 230)][i % 3]
        data = png(color, seed=i, size=24)
        truth = Objects(boxes=np.array([[0.0, 0, 24, 24]]), classes=np.array([i % 3]), is_crowd=np.array([False]))
        digest = hashlib.sha256(data).hexdigest()
        samples.append(
            Sample(name=str(i), label=None, digest=digest, read=lambda d=data: d, annotation=annotation(truth))
        )
    return DataSet(name="squares", samples=tuple(samples), class_names=("red", "green", "blue"))


def test_boxes_that_no_user_is_shown_are_judged(tmp_path: Path) -> None:
    faint = finder(score=0.1)
    data = squares()
    picture = data.samples[0].read()
    assert isinstance(picture, bytes)
    assert faint(picture).to_text() == "nothing above 25 %"
    found = evaluate(faint, data, folder=tmp_path)
    assert (found.metric, found.value, found.others) == (MAP_50, pytest.approx(1), {MAP: pytest.approx(1)})
    assert faint(picture).to_text() == "nothing above 25 %", "the pipeline itself stays as it was"
    again = evaluate(finder(), data, reference=found, folder=tmp_path)
    assert again.others == {MAP: pytest.approx(1), BOX_AGREEMENT: 0}
    assert compare_evaluations(again, found).value == 0


def test_the_sizes_of_turned_pictures(tmp_path: Path) -> None:
    import io

    from edgevlm.evaluation.pixels import picture_sizes

    file = io.BytesIO()
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, "JPEG", exif=exif)
    sample = Sample(name="a", label=None, digest="a", read=file.getvalue)
    data = DataSet(name="turned", samples=(sample,))
    assert picture_sizes(data, folder=tmp_path) == [(20, 10)]
    changed = data.only([replace(sample, read=lambda: b"")])
    assert picture_sizes(changed, folder=tmp_path) == [(20, 10)], "looked up"
