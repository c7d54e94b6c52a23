"""The values of a data set: pictures with what they hold, their labels, and where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgevlm.runtime.spec import Array

Count = Callable[[int, int], None]
"""Hears how far work is: (pictures done, pictures in all)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Objects:
    """The things in a picture.

    Shapes: boxes float64 [n, 4], classes int64 [n], is_crowd bool [n].
    Units:  a box is (left, top, right, bottom) in pixels of the upright picture; a crowd is many things in one box,
            which a detector need not find.
    """

    boxes: Array
    classes: Array
    is_crowd: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Things:
    """The outlines of the things in a picture, whatever they are.

    Shapes: boxes float64 [n, 4], masks bool [n, height, width].
    Units:  a box is the tightest around its mask, (left, top, right, bottom) in pixels of the upright picture.
    """

    boxes: Array
    masks: Array


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What is true of a picture beyond one class.

    Args:
        digest: sha256 of what ``read`` gives.
        read: gives ``Objects``, ``Things``, or the class of every pixel: uint8 [height, width], where ``UNKNOWN`` is
            left out.
    """

    digest: str
    read: Callable[[], Any] = field(compare=False, repr=False)


UNKNOWN = 255
"""The value of a pixel that no class is claimed of, as in Pascal VOC's masks."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture of a data set.

    Args:
        name: what people call it: a path inside the data set, or a row.
        label: index into the data set's ``class_names``; None where the data set has no labels.
        digest: sha256 of the picture's contents, never of its name.
        read: gives the encoded picture, or RGB pixels, uint8 ``[height, width, 3]``.
        annotation: boxes or a mask; None where the data set has none.
        caption: what the picture shows, in words; empty where the data set does not say.
    """

    name: str
    label: int | None
    digest: str
    read: Callable[[], bytes | Array] = field(compare=False, repr=False)
    annotation: Annotation | None = None
    caption: str = ""

    @property
    def truth(self) -> str:
        """What is known of the picture, as a text that differs where it does."""
        label = "" if self.label is None else str(self.label)
        return f"{label} {self.annotation.digest}" if self.annotation else label


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Pictures in a fixed order.

    Args:
        name: what people call it; says which split of a larger set it is.
        class_names: what ``Sample.label`` indexes: the model's labels, or the data set's own where the task has none.
        notes: sentences about what was chosen while reading it.
        is_synthetic: the pictures are generated; accuracy on them says little about photographs.
    """

    name: str
    samples: tuple[Sample, ...]
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    is_synthetic: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def has_labels(self) -> bool:
        return bool(self.samples) and all(sample.truth for sample in self.samples)

    @property
    def digest(self) -> str:
        """sha256 over the pictures' contents, labels and annotations, whatever their names and order."""
        rows = sorted(f"{sample.digest} {sample.truth}\n" for sample in self.samples)
        return hashlib.sha256("".join(rows).encode()).hexdigest()

    def only(self, samples: Sequence[Sample]) -> DataSet:
        """The same data set with these of its samples."""
        return replace(self, samples=tuple(samples))
