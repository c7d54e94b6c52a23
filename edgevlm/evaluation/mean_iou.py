"""Mean intersection over union of masks by scikit-learn's confusion matrix, and anew for any choice of pictures."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edgevlm.data.data_set import UNKNOWN, Annotation
from edgevlm.errors import DataError
from edgevlm.extras import require_library
from edgevlm.runtime.spec import Array
from edgevlm.runtime.tasks.semantic_segmentation import Segmentation


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanIoU:
    """mIoU of a data set, and of any choice of its pictures.

    Shapes: pixels [pictures, 3, classes]: of each class those that are right, that are true, that were found.
    """

    value: float
    pixels: Array

    def values(self, weights: Array) -> Array:
        """As ``Pooled.values``; a class that none of the chosen pictures holds does not count."""
        n, _, n_classes = self.pixels.shape
        right, true, found = np.moveaxis((weights @ self.pixels.reshape(n, -1)).reshape(-1, 3, n_classes), 1, 0)
        overlap = np.divide(right, true + found - right, out=np.full(right.shape, np.nan), where=true > 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a choice without a known pixel is NaN, as it should be
            means: Array = np.nanmean(overlap, axis=1)
        return means


def mean_iou(truths: Iterable[Annotation], found: Iterable[Segmentation]) -> tuple[MeanIoU, float]:
    """mIoU over the classes that the truth has, and the share of its pixels that are right.

    Raises: DataError: no pixel has a known class. MissingToolError: scikit-learn is not installed.
    """
    pixels = np.stack([_pixels(truth.read(), each.to_array()) for truth, each in zip(truths, found, strict=True)])
    right, true, _ = pixels.sum(axis=(0, 2))
    if true == 0:
        raise DataError("No pixel of the data set has a class.", hint="Pass masks with the model's classes.")
    (value,) = MeanIoU(value=0.0, pixels=pixels).values(np.ones((1, len(pixels))))
    return MeanIoU(value=float(value), pixels=pixels), float(right / true)


def _pixels(truth: Array, found: Array) -> Array:
    """Of each of the 255 classes that a mask can have: pixels that are right, true, found; where the truth is known."""
    require_library("sklearn", "The mIoU")
    from sklearn.metrics import confusion_matrix

    if truth.shape != found.shape:
        raise DataError(
            f"A mask has the shape {truth.shape}, but its picture {found.shape}.",
            hint="Use the masks that belong to the pictures.",
        )
    is_known = truth != UNKNOWN
    counts = np.zeros((3, UNKNOWN))
    if is_known.any():
        matrix = confusion_matrix(truth[is_known], found[is_known], labels=np.arange(UNKNOWN))
        counts[:] = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    return counts
