"""What a layout lists: pictures with the labels as the data set states them, before they are matched and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from edgevlm.data.content import file_digests
from edgevlm.data.data_set import Count
from edgevlm.data.labels import FoundLabel
from edgevlm.runtime.spec import Array

K = TypeVar("K")

# Held-out pictures before those that the model has learnt.
SPLITS = ("val", "validation", "valid", "dev", "test", "testing", "train", "training")


class Pictures(Protocol):
    """A layout's pictures: what they hold, and how each is read."""

    def digests(self, *, cache: Path | None, count: Count | None) -> tuple[str, ...]: ...

    def reader(self, i: int) -> Callable[[], bytes | Array]: ...


@dataclass(frozen=True, kw_only=True)
class Files:
    """Pictures that are files."""

    files: tuple[Path, ...]

    def digests(self, *, cache: Path | None, count: Count | None) -> tuple[str, ...]:
        return file_digests(self.files, cache=cache, count=count)

    def reader(self, i: int) -> Callable[[], bytes | Array]:
        return self.files[i].read_bytes


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Args:
    captions: of each picture, empty where it has none; none at all where the layout has none.
    captions_alone: what has captions and no labels, such as ``The table 'a.csv'``; empty otherwise.
    """

    name: str
    names: tuple[str, ...]
    labels: tuple[FoundLabel | None, ...]
    pictures: Pictures
    notes: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    captions_alone: str = ""

    def without(self, names: frozenset[str]) -> Listing | None:
        """The listing without these files; None where the pictures are no files of their own."""
        if not isinstance(self.pictures, Files):
            return None
        kept = [i for i, file in enumerate(self.pictures.files) if str(file) not in names]
        return replace(
            self,
            names=tuple(self.names[i] for i in kept),
            labels=tuple(self.labels[i] for i in kept),
            captions=tuple(self.captions[i] for i in kept) if self.captions else (),
            pictures=Files(files=tuple(self.pictures.files[i] for i in kept)),
        )


def pick_split(splits: Mapping[K, str]) -> tuple[str, tuple[K, ...]]:
    """The split that a model has most likely not learnt, and its members, from each member's split."""
    names = set(splits.values())
    chosen = next((split for split in SPLITS if split in names), min(names))
    return chosen, tuple(member for member, split in splits.items() if split == chosen)


def note_of_split(name: str, chosen: str, others: list[str]) -> tuple[str, ...]:
    """The sentence that says which of several splits is used; none where there is one."""
    if not others:
        return ()
    return (f"'{name}' has several splits: '{chosen}' is used, {', '.join(sorted(others))} not.",)
