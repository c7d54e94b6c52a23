"""The values of a data set: pictures with what they hold, their labels, and where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from edgevlm.runtime.spec import Array

Count = Callable[[int, int], None]
"""Hears how far work is: (pictures done, pictures in all)."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture of a data set.

    Args:
        name: what people call it: a path inside the data set, or a row.
        label: index into the data set's ``class_names``; None where the data set has no labels.
        digest: sha256 of the picture's contents, never of its name.
        read: gives the encoded picture, or RGB pixels, uint8 ``[height, width, 3]``.
    """

    name: str
    label: int | None
    digest: str
    read: Callable[[], bytes | Array] = field(compare=False, repr=False)


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
        return bool(self.samples) and all(sample.label is not None for sample in self.samples)

    @property
    def digest(self) -> str:
        """sha256 over the pictures' contents and labels, whatever their names and order."""
        rows = sorted(f"{sample.digest} {'' if sample.label is None else sample.label}\n" for sample in self.samples)
        return hashlib.sha256("".join(rows).encode()).hexdigest()

    def only(self, samples: Sequence[Sample]) -> DataSet:
        """The same data set with these of its samples."""
        return replace(self, samples=tuple(samples))
