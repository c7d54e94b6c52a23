"""Matching a data set's classes with the model's, by name.

The order of classes is a convention that nobody writes down: folders sort by name, checkpoints by whatever the
training script did. So names decide wherever both sides have them, a number is taken only where there are no names
to decide, and a number that contradicts a name is refused.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from edgevlm.errors import DataError

_PLACEHOLDER = re.compile(r"LABEL_\d+")
_SAME_THING = 0.75
"""Spellings this near (difflib's ratio) name one thing: airplane and aeroplane have 0.82, carrot and cat 0.67."""
_WNID = re.compile(r"(n\d{8})(?![0-9])")


@dataclass(frozen=True, kw_only=True)
class FoundLabel:
    """A label as a data set states it.

    Args:
        index_is_own: the index numbers the data set's own list of names (Hugging Face ``ClassLabel``), so it says
            nothing about the model's order where names can be compared.
    """

    name: str | None = None
    index: int | None = None
    index_is_own: bool = False

    def __str__(self) -> str:
        return f"'{self.name}'" if self.name is not None else str(self.index)


def are_named(labels: Sequence[str]) -> bool:
    """Whether a model's labels are names, not placeholders such as ``LABEL_0``."""
    return bool(labels) and not all(_PLACEHOLDER.fullmatch(label) for label in labels)


def own_classes(found: Sequence[FoundLabel]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Number a data set's classes by themselves, in the order of their names: ``(class_names, indices)``."""
    names = [label.name if label.name is not None else str(label.index) for label in found]
    classes = sorted(set(names), key=lambda name: (int(name) if name.isdecimal() else -1, name))
    position = {name: i for i, name in enumerate(classes)}
    return tuple(classes), tuple(position[name] for name in names)


def match_labels(found: Sequence[FoundLabel], labels: Sequence[str], *, source: str) -> tuple[int, ...]:
    """The model's class index for each label that a data set states.

    Names match exactly, else without regard to case, underscores and hyphens, else by any synonym of a comma list
    (``tench, Tinca tinca``); WordNet ids such as ``n01440764`` match through their ImageNet names.

    Args:
        labels: the model's class names by index.
        source: what people call the data set.
    Raises:  DataError: a name matches no class or several, an index contradicts its name or is out of range, or
             the model's classes have no names to match with.
    """
    distinct = tuple(dict.fromkeys(found))
    names = [label.name for label in distinct if label.name is not None]
    if 0 < len(names) < len(distinct):
        raise DataError(
            f"Some pictures of {source} have a class name and some do not.",
            hint="Give every picture a name in the label column.",
        )
    classes = _Classes(labels)
    are_model_names = bool(names) and all(classes.exactly(name) for name in names)
    if are_model_names or (are_named(labels) and not all(name.isdecimal() for name in names)):
        index_of = _by_name(distinct, classes, source=source)
    else:
        index_of = _by_index(distinct, labels, source=source)
    return tuple(index_of[label] for label in found)


def match_categories(
    names: Sequence[str], labels: Sequence[str], *, source: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The model's class for each category of an annotated data set, and the categories that it has no class for.

    Those are nothing that the model could find, so they are left out; but not where the spelling is near that of a
    class without a category, which is then the same thing under another name.

    Raises: DataError: a name means several classes, or is near one; no category matches; the classes have no names.
    """
    if not are_named(labels):
        raise DataError(
            f"The model's classes have no names, so the categories of {source} cannot be matched with them.",
            hint="Give the class names in the model's order with --labels FILE, or in the card.",
        )
    classes = _Classes(labels)
    found = {name: classes.called(name) for name in names}
    strangers = tuple(name for name, candidates in found.items() if not candidates)
    matched = {
        name: _one(FoundLabel(name=name), candidates, classes, source=source)
        for name, candidates in found.items()
        if candidates
    }
    free = _Classes([label for i, label in enumerate(labels) if i not in matched.values()])
    near = {name: label for name in strangers if (label := free.near(name, cutoff=_SAME_THING))}
    if near or not matched:
        examples = [f"'{name}' is nearest to '{label}'" for name, label in near.items()]
        raise DataError(
            f"{len(near) or len(strangers)} of {len(found)} categories of {source} match no class of the model: "
            + (", ".join(examples[:3]) + "." if near else f"{_few(strangers)}; the model has {_few(classes.labels)}."),
            hint="Rename them, or give the class in the card the other name too: labels = ['motorbike, motorcycle'].",
        )
    return matched, strangers


class _Classes:
    """The model's classes, looked up from the most to the least literal spelling."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self._exact: dict[str, set[int]] = defaultdict(set)
        self._plain: dict[str, set[int]] = defaultdict(set)
        self._synonym: dict[str, set[int]] = defaultdict(set)
        self._wnid: dict[str, set[int]] = defaultdict(set)
        for i, label in enumerate(labels):
            self._exact[label].add(i)
            self._plain[_plain(label)].add(i)
            for synonym in label.split(","):
                self._synonym[_plain(synonym)].add(i)
            for wnid in _WNID.findall(label):
                self._wnid[wnid].add(i)

    def exactly(self, name: str) -> set[int]:
        return self._exact.get(name, set())

    def called(self, name: str) -> set[int]:
        """Every class that ``name`` may mean."""
        wnid = _WNID.match(name)
        if wnid:
            return self._wnid.get(wnid[1]) or self._of_wnid(wnid[1])
        synonyms: set[int] = set()
        for synonym in name.split(","):
            synonyms |= self._synonym.get(_plain(synonym), set())
        return self.exactly(name) or self._plain.get(_plain(name)) or synonyms

    def near(self, name: str, *, cutoff: float = 0.6) -> str | None:
        """The label whose spelling is closest."""
        wnid = _WNID.match(name)
        name = _imagenet().get(wnid[1], name) if wnid else name
        spellings = [*self._synonym, *self._plain]
        close = difflib.get_close_matches(_plain(name.partition(",")[0]), spellings, n=1, cutoff=cutoff)
        if not close:
            return None
        return self.labels[min(self._plain.get(close[0]) or self._synonym[close[0]])]

    def _of_wnid(self, wnid: str) -> set[int]:
        """Two ImageNet classes are both called crane: there the usual order (sorted ids) decides, if names agree."""
        names = _imagenet().get(wnid)
        if names is None:
            return set()
        found = self.called(names)
        # 1001 classes: the TensorFlow checkpoints, with background first.
        usual = tuple(_imagenet()).index(wnid) + (len(self.labels) == len(_imagenet()) + 1)
        return {usual} if len(found) > 1 and usual in found else found


def _by_name(distinct: Iterable[FoundLabel], classes: _Classes, *, source: str) -> dict[FoundLabel, int]:
    found = {label: classes.called(str(label.name)) for label in distinct}
    strangers = [str(label.name) for label, candidates in found.items() if not candidates]
    if strangers:
        near = {name: classes.near(name) for name in strangers[:20]}
        examples = [f"'{name}' is nearest to '{label}'" for name, label in near.items() if label]
        raise DataError(
            f"{len(strangers)} of {len(found)} class names of {source} match no class of the model: {_few(strangers)}"
            + (f" ({examples[0]})." if examples else f"; the model has {_few(classes.labels)}."),
            hint="Rename them as the model calls its classes, or pass pictures of the model's classes.",
        )
    return {label: _one(label, candidates, classes, source=source) for label, candidates in found.items()}


def _one(label: FoundLabel, candidates: set[int], classes: _Classes, *, source: str) -> int:
    """The class that a name means; the data set's index decides between several, and must not contradict."""
    claimed = None if label.index_is_own else label.index
    if claimed is not None and claimed not in candidates:
        index = min(candidates)
        of_model = f", which is '{classes.labels[claimed]}'" if 0 <= claimed < len(classes.labels) else ""
        raise DataError(
            f"{source} gives {label} the index {claimed}{of_model}; in the model it is {index}"
            + ("." if classes.labels[index] == label.name else f" ('{classes.labels[index]}')."),
            hint="Correct the column that is wrong, or remove the index column if it only numbers this data set.",
        )
    if claimed is not None:
        return claimed
    if len(candidates) > 1:
        several = " or ".join(f"{i} ('{classes.labels[i]}')" for i in sorted(candidates)[:3])
        raise DataError(
            f"The class name {label} of {source} may be the model's class {several}.",
            hint="Write the full label, or add a column class_index with the model's index.",
        )
    return min(candidates)


def _by_index(distinct: Iterable[FoundLabel], labels: Sequence[str], *, source: str) -> dict[FoundLabel, int]:
    """Numbers as they stand: the column of indices, or names that are numbers themselves."""
    index_of: dict[FoundLabel, int] = {}
    for label in distinct:
        if label.name is not None and label.name.isdecimal():
            index_of[label] = int(label.name)
        elif label.index is not None:
            index_of[label] = label.index
        else:
            raise DataError(
                f"The model's classes have no names, so the class {label} of {source} cannot be matched with one.",
                hint="Give the class names in the model's order with --labels FILE.",
            )
        if not label.index_is_own and label.index not in (None, index_of[label]):
            raise DataError(
                f"{source} gives the class {label} the index {label.index}.",
                hint="Correct the column that is wrong, or remove it.",
            )
    low, high = min(index_of.values()), max(index_of.values())
    if low < 0 or (labels and high >= len(labels)):
        counts_from_one = low == 1 and high == len(labels)
        raise DataError(
            f"{source} has class indices from {low} to {high}, but the model's {len(labels)} classes are 0 to "
            f"{len(labels) - 1}.",
            hint="Count classes from 0." if counts_from_one else "Give class names, so that they can be matched.",
        )
    return index_of


def _plain(name: str) -> str:
    """A spelling without case, underscores, hyphens, and the id that tells two equal names apart."""
    name = re.sub(r"\(n\d{8}\)", " ", name)
    return " ".join(re.sub(r"[_\-\s]+", " ", name).casefold().split())


def _few(names: Iterable[str], n: int = 3) -> str:
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:n])
    return shown + (f" and {len(names) - n} more" if len(names) > n else "")


@functools.cache
def _imagenet() -> Mapping[str, str]:
    """WordNet id -> names of the 1,000 ILSVRC 2012 classes, in their usual order, which is that of the ids.

    Source: Russakovsky et al., arXiv:1409.0575; names from WordNet 3.0 (Princeton), as timm 1.0.31 lists them.
    """
    text = resources.files("edgevlm.data").joinpath("imagenet.txt").read_text(encoding="utf-8")
    return dict(line.split("\t", 1) for line in text.splitlines())
