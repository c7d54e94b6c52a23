"""How a task's answers are judged: one number a picture, so that two pipelines can be compared picture by picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec
import numpy as np

from edgevlm.data.data_set import Things
from edgevlm.errors import UsageError
from edgevlm.runtime.spec import Array
from edgevlm.runtime.tasks.mask_generation import Masks as FoundMasks
from edgevlm.runtime.tasks.mask_generation import mask_iou
from edgevlm.runtime.tasks.object_detection import Detections

TOP_1: Final = "top-1"
TOP_5: Final = "top-5"
AGREEMENT: Final = "top-1 agreement"
COSINE: Final = "centred cosine"
NEAREST: Final = "nearest-neighbour top-1"

MAP_50: Final = "mAP50"
MAP: Final = "mAP50-95"
BOX_AGREEMENT: Final = "box agreement"
MIOU: Final = "mIoU"
PIXEL_ACCURACY: Final = "pixel accuracy"
PIXEL_AGREEMENT: Final = "pixel agreement"
MIOU_OF_BOXES: Final = "mIoU by box"
MIOU_OF_POINTS: Final = "mIoU by point"
MASK_AGREEMENT: Final = "mask agreement"

TOP_K: Final = 5

MIN_CLASSMATES: Final = 20
"""Below so many pictures with another of their class, nearest neighbours are not a metric, only an anecdote."""

_ROWS: Final = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """A metric's value for each picture, its mean being the metric; and the means of others beside it.

    Args:
        is_binary: each score is 0 or 1.
        is_relative: the scores compare with the reference itself, which by definition has 1 everywhere.
        pooled: of a metric that is no mean over pictures; the scores are then each picture's own, or NaN.
    Shapes: ``scores`` [number of pictures judged].
    """

    metric: str
    scores: Array
    others: Mapping[str, float]
    is_binary: bool
    is_relative: bool
    pooled: Pooled | None = None


class Pooled(Protocol):
    """A metric of a whole data set, kept so that it can be computed anew for any choice of its pictures."""

    @property
    def value(self) -> float: ...

    def values(self, weights: Array) -> Array:
        """The metric where each picture counts as often as ``weights`` say; NaN where that leaves nothing to judge.

        Shapes: [n choices, n pictures] -> [n choices].
        """
        ...


class Metric(Protocol):
    """What a task's predictions are, and how they are judged."""

    def collect(self, results: Sequence[Any]) -> Array:
        """One row per answer."""
        ...

    def judge(self, predictions: Array, *, labels: Array | None, reference: Array | None) -> Judgement:
        """Judge by the labels where there are any, else against the reference's predictions.

        Args:
            labels: class indices; for boxes and masks each picture's ``Annotation``.
            reference: None where the predictions are the reference's own.
        """
        ...


class Classes:
    """Predictions are class indices, likeliest first: int64 [n, at most 5]."""

    def collect(self, results: Sequence[Any]) -> Array:
        return np.array([[each.index for each in result.classes] for result in results], dtype=np.int64)

    def judge(self, predictions: Array, *, labels: Array | None, reference: Array | None) -> Judgement:
        theirs = predictions if reference is None else reference
        agrees = (predictions[:, 0] == theirs[:, 0]).astype(np.float64)
        if labels is None:
            return Judgement(metric=AGREEMENT, scores=agrees, others={}, is_binary=True, is_relative=True)
        is_hit = predictions == labels[:, None]
        others = {} if reference is None else {AGREEMENT: float(agrees.mean())}
        if predictions.shape[1] >= TOP_K:  # fewer classes: the label is always among them
            others[TOP_5] = float(is_hit.any(axis=1).mean())
        return Judgement(
            metric=TOP_1, scores=is_hit[:, 0].astype(np.float64), others=others, is_binary=True, is_relative=False
        )


class Boxes:
    """Predictions are ``Detections``, down to scores that no user is shown: the metric weighs them by their rank.

    With labels: mAP50, the average precision at an overlap of 0.5, averaged over the classes that there are; beside it
    the mean over overlaps of 0.50 to 0.95. Both are COCO's, over all sizes and at most 100 boxes a picture.

    Without, and beside it: how far the boxes that a user is shown are the reference's, 2 · matched ÷ (both together),
    where a match has the class and an overlap of 0.9; a picture where neither finds anything agrees.
    """

    def __init__(self, *, score_threshold: float = 0.0) -> None:
        self._threshold = score_threshold

    def collect(self, results: Sequence[Any]) -> Array:
        return _objects(results)

    def judge(self, predictions: Array, *, labels: Array | None, reference: Array | None) -> Judgement:
        theirs = predictions if reference is None else reference
        agreement = np.array([self._agreement(a, b) for a, b in zip(predictions, theirs, strict=True)])
        if labels is None:
            return Judgement(metric=BOX_AGREEMENT, scores=agreement, others={}, is_binary=False, is_relative=True)
        from edgevlm.evaluation.average_precision import average_precision

        pooled, over_overlaps = average_precision([each.read() for each in labels], list(predictions))
        others = {MAP: over_overlaps} | ({} if reference is None else {BOX_AGREEMENT: float(agreement.mean())})
        return _pooled(MAP_50, pooled, len(predictions), others)

    def _agreement(self, mine: Detections, theirs: Detections) -> float:
        shown = [self._shown(mine), self._shown(theirs)]
        n = sum(len(each.objects) for each in shown)
        return 2 * shown[0].n_matched(shown[1]) / n if n else 1.0

    def _shown(self, found: Detections) -> Detections:
        objects = tuple(each for each in found.objects if each.score > self._threshold)
        return msgspec.structs.replace(found, objects=objects)


class Masks:
    """Predictions are ``Segmentation``s.

    With labels: mIoU, intersection over union of each class over all pixels together, averaged over the classes that
    the truth has, background included; beside it the share of pixels that are right.

    Without, and beside it: the share of pixels that are as the reference's.
    """

    def collect(self, results: Sequence[Any]) -> Array:
        return _objects(results)

    def judge(self, predictions: Array, *, labels: Array | None, reference: Array | None) -> Judgement:
        if labels is None or reference is not None:
            theirs = predictions if reference is None else reference
            agreement = np.array([a.agreement(b) for a, b in zip(predictions, theirs, strict=True)])
            if labels is None:
                return Judgement(metric=PIXEL_AGREEMENT, scores=agreement, others={}, is_binary=False, is_relative=True)
        from edgevlm.evaluation.mean_iou import mean_iou

        pooled, pixel_accuracy = mean_iou(list(labels), list(predictions))
        others = {PIXEL_ACCURACY: pixel_accuracy}
        if reference is not None:
            others[PIXEL_AGREEMENT] = float(agreement.mean())
        return _pooled(MIOU, pooled, len(predictions), others)


class PromptedMasks:
    """Predictions are ``Masks``, of the prompts that ``edgevlm.data.prompts`` makes of each picture.

    With labels: mIoU, the overlap (intersection over union) of what each prompt gave with the thing that it was made
    of, averaged over all prompts of all pictures: a box and a point for each thing. Beside it those of boxes and of
    points alone.

    Without, and beside it: the overlap with the reference's mask of the same prompt, averaged alike.
    """

    def collect(self, results: Sequence[Any]) -> Array:
        return _objects(results)

    def judge(self, predictions: Array, *, labels: Array | None, reference: Array | None) -> Judgement:
        theirs = predictions if reference is None else reference
        if labels is None or reference is not None:
            agreement = np.array([mine.overlaps(other).mean() for mine, other in zip(predictions, theirs, strict=True)])
            if labels is None:
                return Judgement(metric=MASK_AGREEMENT, scores=agreement, others={}, is_binary=False, is_relative=True)
        overlaps = [_overlaps(found, truth.read()) for found, truth in zip(predictions, labels, strict=True)]
        pooled = MeanOverThings.of(overlaps)
        by_kind = {
            MIOU_OF_BOXES: MeanOverThings.of([each[0::2] for each in overlaps]).value,
            MIOU_OF_POINTS: MeanOverThings.of([each[1::2] for each in overlaps]).value,
        }
        others = by_kind | ({} if reference is None else {MASK_AGREEMENT: float(agreement.mean())})
        return _pooled(MIOU, pooled, len(predictions), others)


def _overlaps(found: FoundMasks, truth: Things) -> Array:
    """Of each prompt, two for each thing."""
    if not len(truth.masks):  # it was asked about places, to which nothing is true
        return np.empty(0)
    return mask_iou(found.to_arrays(), np.repeat(truth.masks, 2, axis=0))


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanOverThings:
    """The mean over what is in all pictures together.

    Shapes: sums and counts [pictures], of each picture's values.
    """

    sums: Array
    counts: Array

    @classmethod
    def of(cls, values: Sequence[Array]) -> MeanOverThings:
        return cls(
            sums=np.array([each.sum() for each in values]), counts=np.array([len(each) for each in values], dtype=float)
        )

    @property
    def value(self) -> float:
        return float(self.values(np.ones((1, len(self.sums))))[0])

    def values(self, weights: Array) -> Array:
        """As ``Pooled.values``."""
        n = weights @ self.counts
        means: Array = np.divide(weights @ self.sums, n, out=np.full(len(n), np.nan), where=n > 0)
        return means


class Embeddings:
    """Predictions are vectors: float32 [n, d].

    Without labels: the cosine between a picture's vector and the reference's, after the *reference's* mean over the
    pictures is taken from both. Vectors of one model share a large part, which makes every plain cosine near 1.

    With labels: whether the nearest other picture (plain cosine, as a search by similarity would use the vectors) is
    of the same class, over the pictures that have another of their class.
    """

    def collect(self, results: Sequence[Any]) -> Array:
        return np.array([result.embedding for result in results], dtype=np.float32)

    def judge(self, predictions: Array, *, labels: Array | None, reference: Array | None) -> Judgement:
        theirs = predictions if reference is None else reference
        is_comparable = predictions.shape == theirs.shape  # a smaller model's vectors may be shorter
        cosine = centred_cosine(predictions, theirs) if is_comparable else None
        has_mate = _has_classmate(labels) if labels is not None else np.zeros(len(predictions), dtype=bool)
        if labels is None or has_mate.sum() < MIN_CLASSMATES:
            if cosine is None:
                raise UsageError(
                    f"Answers of {list(predictions.shape[1:])} and {list(theirs.shape[1:])} values cannot be compared, "
                    "and the pictures have no classes to judge either by.",
                    hint="Pass pictures in folders by class.",
                )
            return Judgement(metric=COSINE, scores=cosine, others={}, is_binary=False, is_relative=True)
        is_hit = labels[nearest_other(predictions)] == labels
        return Judgement(
            metric=NEAREST,
            scores=is_hit[has_mate].astype(np.float64),
            others={} if reference is None or cosine is None else {COSINE: float(cosine.mean())},
            is_binary=True,
            is_relative=False,
        )


METRICS: dict[str, type[Metric]] = {
    "image-classification": Classes,
    "image-feature-extraction": Embeddings,
    "mask-generation": PromptedMasks,
    "object-detection": Boxes,
    "semantic-segmentation": Masks,
    "zero-shot-image-classification": Classes,
}


def _objects(results: Sequence[Any]) -> Array:
    """Answers as they are: ``np.array`` would look into them."""
    rows = np.empty(len(results), dtype=object)
    rows[:] = results
    return rows


def _pooled(metric: str, pooled: Pooled, n: int, others: Mapping[str, float]) -> Judgement:
    # A picture's own value: the metric where it is the only one.
    alone = [pooled.values(np.eye(min(_ROWS, n - start), n, k=start)) for start in range(0, n, _ROWS)]
    return Judgement(
        metric=metric, scores=np.concatenate(alone), others=others, is_binary=False, is_relative=False, pooled=pooled
    )


def centred_cosine(vectors: Array, reference: Array) -> Array:
    """Cosine by row, with the mean of ``reference`` taken from both.

    Shapes: both [n, d] -> [n].
    """
    mean = reference.astype(np.float64).mean(axis=0)
    mine, theirs = vectors - mean, reference - mean
    norms = np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1)
    # A vector at the mean itself has no direction: the same vector agrees, another does not.
    same = (vectors == reference).all(axis=1).astype(np.float64)
    cosine = np.divide((mine * theirs).sum(axis=1), norms, out=same, where=norms > 0)
    clipped: Array = np.clip(cosine, -1.0, 1.0)
    return clipped


def nearest_other(vectors: Array) -> Array:
    """The index of each row's nearest other row by cosine; of equally near ones the first.

    Shapes: [n, d] -> int64 [n].
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(norms, np.finfo(np.float32).tiny)
    nearest = []
    for start in range(0, len(unit), _ROWS):  # all at once would take n * n numbers
        cosine = unit[start : start + _ROWS] @ unit.T
        rows = np.arange(len(cosine))
        cosine[rows, start + rows] = -np.inf
        nearest.append(cosine.argmax(axis=1))
    return np.concatenate(nearest)


def _has_classmate(labels: Array) -> Array:
    _, inverse, n_of_class = np.unique(labels, return_inverse=True, return_counts=True)
    has_mate: Array = n_of_class[inverse] > 1
    return has_mate
