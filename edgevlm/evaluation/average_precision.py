"""Average precision of boxes, by pycocotools; and anew for any choice of the pictures, to draw resamples from.

Source: COCO's detection metric, https://cocodataset.org/#detection-eval.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgevlm.data.data_set import Objects
from edgevlm.errors import DataError
from edgevlm.extras import require_library
from edgevlm.runtime.spec import Array
from edgevlm.runtime.tasks.object_detection import Detections

_RECALLS = np.linspace(0, 1, 101)
_ALL_SIZES = ((0.0, 1e10),)
_MOST = 100
_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassMatches:
    """The boxes of a class in all pictures, likeliest first, as far as they count.

    Shapes: picture int64 [boxes], is_hit bool [boxes], n_truths [pictures].
    """

    picture: Array
    is_hit: Array
    n_truths: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class AveragePrecision:
    """mAP50 of a data set, and of any choice of its pictures."""

    value: float
    classes: tuple[ClassMatches, ...]

    def values(self, weights: Array) -> Array:
        """As ``Pooled.values``; a class that none of the chosen pictures holds does not count."""
        by_class = np.stack([_average_precision(matches, weights) for matches in self.classes])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a choice without any object is NaN, as it should be
            means: Array = np.nanmean(by_class, axis=0)
        return means


def average_precision(truths: Sequence[Objects], found: Iterable[Detections]) -> tuple[AveragePrecision, float]:
    """mAP50, and the mean over overlaps of 0.50 to 0.95; both over the classes that the truth has.

    Raises: DataError: there is no object in any picture. MissingToolError: pycocotools is not installed.
    """
    evaluation = _evaluated(truths, found)
    # [overlaps, recalls, classes, sizes, most], -1 where a class has no object
    precision = evaluation.eval["precision"]
    has_objects = precision[0, 0, :, 0, 0] > -1
    if not has_objects.any():
        raise DataError("The data set holds no object to find.", hint="Pass pictures with boxes of known classes.")
    per_overlap = precision[:, :, has_objects, 0, 0].mean(axis=(1, 2))
    classes = tuple(_matches(evaluation, int(k), len(truths)) for k in np.flatnonzero(has_objects))
    return AveragePrecision(value=float(per_overlap[0]), classes=classes), float(per_overlap.mean())


def _evaluated(truths: Sequence[Objects], found: Iterable[Detections]) -> Any:
    """pycocotools' evaluation of every picture and class, accumulated."""
    require_library("pycocotools", "Average precision")
    from pycocotools.cocoeval import COCOeval

    things = [
        _thing(i, kind, box, iscrowd=int(is_crowd))
        for i, each in enumerate(truths)
        for box, kind, is_crowd in zip(each.boxes.tolist(), each.classes, each.is_crowd, strict=True)
    ]
    boxes = [_thing(i, each.index, each.box, score=each.score) for i, one in enumerate(found) for each in one.objects]
    n = len(truths)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluation = COCOeval(_coco(things, n), _coco(boxes, n), "bbox")
        evaluation.params.imgIds = list(range(n))
        evaluation.params.catIds = sorted({thing["category_id"] for thing in things})
        evaluation.params.areaRng = [list(sizes) for sizes in _ALL_SIZES]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.params.maxDets = [_MOST]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _thing(picture: int, kind: int, box: Sequence[float], **more: float) -> dict[str, Any]:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    thing = {"image_id": picture, "category_id": int(kind), "bbox": [left, top, width, height]}
    return {**thing, "area": width * height, "iscrowd": 0, **more}


def _coco(things: list[dict[str, Any]], n: int) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(n)],
        # From 1: it takes a match with the object 0 for none.
        "annotations": [{"id": i, **thing} for i, thing in enumerate(things, 1)],
        "categories": [{"id": kind} for kind in {thing["category_id"] for thing in things}],
    }
    coco.createIndex()
    return coco


def _matches(evaluation: Any, k: int, n: int) -> ClassMatches:
    """What pycocotools matched of the ``k``-th class at an overlap of 0.5."""
    scores, pictures, hits = [], [], []
    n_truths = np.zeros(n)
    for i, each in enumerate(evaluation.evalImgs[k * n : (k + 1) * n]):
        if each is None:
            continue
        counts = ~each["dtIgnore"][0].astype(bool)
        scores.append(np.array(each["dtScores"])[counts])
        hits.append(each["dtMatches"][0][counts] > 0)
        pictures.append(np.full(int(counts.sum()), i))
        n_truths[i] = (np.array(each["gtIgnore"]) == 0).sum()
    order = np.argsort(-np.concatenate(scores), kind="mergesort")  # as pycocotools orders equal scores
    return ClassMatches(
        picture=np.concatenate(pictures)[order].astype(np.int64), is_hit=np.concatenate(hits)[order], n_truths=n_truths
    )


def _average_precision(matches: ClassMatches, weights: Array) -> Array:
    """Of one class, for each row of ``weights``: the mean of the best precision at or beyond each of 101 recalls.

    A box that counts twice is as good as two of one score: precision only matters where recall has just risen. (Boxes
    of one score in one picture would be ordered otherwise; scores of a graph are hardly ever equal.)
    """
    step = max(1, _AT_ONCE // max(1, len(matches.picture)))
    parts = [_at_once(matches, weights[start : start + step]) for start in range(0, len(weights), step)]
    return np.concatenate(parts)


def _at_once(matches: ClassMatches, weights: Array) -> Array:
    n_truths = weights @ matches.n_truths
    drawn = weights[:, matches.picture].astype(np.float64)
    hits = np.cumsum(drawn * matches.is_hit, axis=1)
    misses = np.cumsum(drawn * ~matches.is_hit, axis=1)
    precision = hits / (hits + misses + np.spacing(1))
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    values = np.full(len(weights), np.nan)
    for row in np.flatnonzero(n_truths > 0):
        places = np.searchsorted(hits[row] / n_truths[row], _RECALLS, side="left")
        reached = places[places < len(matches.picture)]
        values[row] = best[row, reached].sum() / len(_RECALLS)
    return values
