"""How a task's answers are judged: one number a picture, so that two pipelines can be compared picture by picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from edgevlm.runtime.spec import Array

TOP_1: Final = "top-1"
TOP_5: Final = "top-5"
AGREEMENT: Final = "top-1 agreement"
COSINE: Final = "centred cosine"
NEAREST: Final = "nearest-neighbour top-1"

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
    Shapes: ``scores`` [number of pictures judged].
    """

    metric: str
    scores: Array
    others: Mapping[str, float]
    is_binary: bool
    is_relative: bool


class Metric(Protocol):
    """What a task's predictions are, and how they are judged."""

    def collect(self, results: Sequence[Any]) -> Array:
        """One row per answer."""
        ...

    def judge(self, predictions: Array, *, labels: Array | None, reference: Array | None) -> Judgement:
        """Judge by the labels where there are any, else against the reference's predictions.

        Args:
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
        cosine = centred_cosine(predictions, predictions if reference is None else reference)
        has_mate = _has_classmate(labels) if labels is not None else np.zeros(len(predictions), dtype=bool)
        if labels is None or has_mate.sum() < MIN_CLASSMATES:
            return Judgement(metric=COSINE, scores=cosine, others={}, is_binary=False, is_relative=True)
        is_hit = labels[nearest_other(predictions)] == labels
        return Judgement(
            metric=NEAREST,
            scores=is_hit[has_mate].astype(np.float64),
            others={} if reference is None else {COSINE: float(cosine.mean())},
            is_binary=True,
            is_relative=False,
        )


METRICS: dict[str, type[Metric]] = {
    "image-classification": Classes,
    "image-feature-extraction": Embeddings,
    "zero-shot-image-classification": Classes,
}


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
