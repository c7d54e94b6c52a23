"""A class for every pixel of the picture.

Component ``model``: pixel_values -> logits [n, classes, height, width], at any resolution. The likeliest class of each
place goes to the picture's pixels by nearest neighbour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from edgevlm.errors import BundleError, DataError
from edgevlm.runtime.classes import need_finite
from edgevlm.runtime.image import Size, place_picture
from edgevlm.runtime.session import output_of, run_rows
from edgevlm.runtime.spec import Array, ImageProcessing, Processing, Scoring, Spec
from edgevlm.runtime.tasks import (
    Need,
    Parts,
    Result,
    check_needs,
    check_whole_picture,
    class_labels,
    refuse_labels,
)


class ClassShare(Spec, frozen=True, kw_only=True):
    """How much of the picture is of a class, 0 to 1."""

    label: str
    index: int
    share: float


class Segmentation(Spec, frozen=True, kw_only=True):
    """The class of every pixel of a picture of ``height`` × ``width``.

    Args:
        classes: what there is of each class, largest first.
        runs: the classes row by row, as runs of equal ones: ``0*640 15*12 0*628`` is ``class*pixels``.
    """

    height: int
    width: int
    classes: tuple[ClassShare, ...]
    runs: str

    def to_array(self) -> Array:
        """The class indices, int64 [height, width].

        Raises: DataError: the runs are no picture of this size.
        """
        try:
            pairs = np.array([run.split("*") for run in self.runs.split(" ")], dtype=np.int64)
            return np.repeat(pairs[:, 0], pairs[:, 1]).reshape(self.height, self.width)
        except (ValueError, IndexError) as error:
            raise DataError(
                f"The runs of a segmentation do not make {self.height} × {self.width} pixels.",
                hint="Segment the picture again.",
            ) from error

    def to_text(self) -> str:
        return "\n".join(f"{100 * each.share:6.2f} %  {each.label}" for each in self.classes)

    def is_same_answer(self, other: Any, *, tolerance: float) -> bool:
        """The same class at all pixels but a share of ``tolerance``."""
        return self.agreement(other) >= 1 - tolerance

    def agreement(self, other: Segmentation) -> float:
        """The share of pixels that both call the same; 0 where the pictures' sizes differ."""
        if (self.height, self.width) != (other.height, other.width):
            return 0.0
        return float((self.to_array() == other.to_array()).mean())


class SemanticSegmentation:
    needs: ClassVar[tuple[Need, ...]] = (Need(component="model", inputs=("pixel_values",), outputs=("logits",)),)
    result_type: ClassVar[type[Result]] = Segmentation

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    @classmethod
    def check(cls, components: frozenset[str], processing: Processing, scoring: Scoring | None) -> None:
        check_needs(cls.needs, components)
        check_whole_picture(processing.image)

    def outputs(self, pixel_values: Array) -> dict[str, Array]:
        return run_rows(self._parts.sessions["model"], {self._parts.processing.image.input_name: pixel_values})

    def results(
        self,
        outputs: Mapping[str, Array],
        *,
        labels: tuple[str, ...] | None,
        top_k: int | None,
        sizes: Sequence[Size] | None,
    ) -> tuple[Segmentation, ...]:
        refuse_labels(labels)
        logits = need_finite(output_of(outputs, "logits"), "logits")
        if logits.ndim != 4:
            raise BundleError(
                f"The graph's logits have the shape {logits.shape}, not [n, classes, height, width].",
                hint="Name the tensor of that shape in the card's [outputs].",
            )
        names = class_labels(self._parts.labels, logits.shape[1])
        image = self._parts.processing.image
        sizes = sizes or ((image.height, image.width),) * len(logits)
        return tuple(
            _answer(led_back(places, size, image), names, top_k)
            for places, size in zip(logits.argmax(axis=1), sizes, strict=True)
        )


def led_back(places: Array, size: Size, image: ImageProcessing) -> Array:
    """The nearest of the graph's places for every pixel of the picture.

    Shapes: places [height, width] of the logits -> [*size].
    """
    placed = place_picture(size, image)
    rows = _nearest(size[0], placed.scale_y, placed.offset_y, places.shape[0] / image.height, places.shape[0])
    columns = _nearest(size[1], placed.scale_x, placed.offset_x, places.shape[1] / image.width, places.shape[1])
    return places[rows[:, None], columns]


def _nearest(n: int, scale: float, offset: float, share: float, n_places: int) -> Array:
    """Which place holds the middle of each of ``n`` pixels."""
    middles = ((np.arange(n) + 0.5) * scale + offset) * share
    # A middle on the line between two places belongs to the second, whichever way its last bit was rounded.
    places: Array = np.clip(np.floor(middles + 1e-9).astype(np.int64), 0, n_places - 1)
    return places


def _answer(classes: Array, names: Sequence[str], top_k: int | None) -> Segmentation:
    flat = classes.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    lengths = np.diff(np.append(starts, len(flat)))
    counts = np.bincount(flat, minlength=len(names))
    order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    return Segmentation(
        height=classes.shape[0],
        width=classes.shape[1],
        classes=tuple(ClassShare(label=names[k], index=k, share=float(counts[k] / len(flat))) for k in order[:top_k]),
        runs=" ".join(f"{k}*{n}" for k, n in zip(flat[starts].tolist(), lengths.tolist(), strict=True)),
    )
