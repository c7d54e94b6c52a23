"""Cut data into three disjoint parts: calibrate on one, select on another, report on a third.

A picture's part follows from its contents and the seed, never from its name or place. Equal pictures stay together.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgevlm.data.data_set import DataSet, Sample
from edgevlm.errors import DataError

MIN_PICTURES = 20
"""Fewer cannot be cut: of 20, 4 calibrate and 8 report, where one picture is already 12 points."""

_CALIBRATION_SHARE = 5
"""At most a fifth calibrates: ranges settle after some tens of pictures, while every interval wants more."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Three data sets that share no picture.

    Args:
        warnings: sentences about what had to be left out.
    """

    calibrate: DataSet
    select: DataSet
    report: DataSet
    warnings: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """What people call the data: one name, or two where calibration has its own."""
        names = dict.fromkeys((self.report.name, self.calibrate.name))
        return " and ".join(names)


def split(data_set: DataSet, *, n_calibrate: int, seed: int = 0, n_evaluate: int | None = None) -> Splits:
    """Cut one data set in three, each with the classes in the same proportion.

    Adding or removing a picture moves few others.

    Args:
        n_calibrate: how many pictures calibrate, at most a fifth; select and report halve the rest.
        n_evaluate: at most this many for select, and as many for report.
    Raises:  DataError: fewer than ``MIN_PICTURES`` different pictures.
    """
    units = _units(data_set, seed=seed)
    _need_enough(len(units), data_set.name)
    n_first = max(1, min(n_calibrate, len(units) // _CALIBRATION_SHARE))
    calibrate, select, report = _cut(units, n_first, *_halves(len(units) - n_first, n_evaluate))
    return Splits(
        calibrate=data_set.only(calibrate),
        select=data_set.only(select),
        report=data_set.only(report),
        warnings=_contradictions(data_set),
    )


def hold_out(data_set: DataSet, *, share: float, seed: int = 0) -> tuple[DataSet, DataSet]:
    """Cut one data set in two, each with the classes in the same proportion: what is trained on, and what is not.

    Raises: DataError: fewer than ``MIN_PICTURES`` different pictures would be held out.
    """
    units = _units(data_set, seed=seed)
    n_held = round(share * len(units))
    if n_held < MIN_PICTURES:
        raise DataError(
            f"'{data_set.name}' has {len(units)} different pictures, of which {n_held} would be held out, expected at "
            f"least {MIN_PICTURES}.",
            hint="Pass more pictures, or others to judge on with --eval-data.",
        )
    held, train = _cut(units, n_held, len(units) - n_held)
    return data_set.only(train), data_set.only(held)


def split_apart(
    calibration: DataSet, evaluation: DataSet, *, n_calibrate: int, seed: int = 0, n_evaluate: int | None = None
) -> Splits:
    """Calibrate on one data set, select and report on halves of another.

    Pictures that are in both are left out of the evaluation, with a warning.

    Raises: DataError: too few pictures are left.
    """
    known = {sample.digest for sample in calibration.samples}
    fresh = evaluation.only([sample for sample in evaluation.samples if sample.digest not in known])
    n_shared = len(evaluation) - len(fresh)
    units = _units(fresh, seed=seed)
    _need_enough(len(units), evaluation.name, n_shared=n_shared)
    (calibrate,) = _cut(_units(calibration, seed=seed), n_calibrate)
    select, report = _cut(units, *_halves(len(units), n_evaluate))
    shared = (
        f"{n_shared} of {len(evaluation)} pictures of '{evaluation.name}' are in the calibration data "
        f"'{calibration.name}' too, and were left out of the evaluation.",
    )
    return Splits(
        calibrate=calibration.only(calibrate),
        select=fresh.only(select),
        report=fresh.only(report),
        warnings=(shared if n_shared else ()) + _contradictions(fresh),
    )


def _units(data_set: DataSet, *, seed: int) -> tuple[tuple[Sample, ...], ...]:
    """Groups of equal pictures, in an order of which every stretch holds each class in proportion.

    Systematic sampling: a class's pictures stand at equal distances on [0, 1), from a start of the class's own, in
    the order of their hashes. So a class of one lands anywhere, and a new picture shifts its own class a little.
    """
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(data_set.samples, key=lambda sample: sample.name):
        groups[sample.digest].append(sample)
    by_class: dict[int | None, list[str]] = defaultdict(list)
    for digest, group in groups.items():
        by_class[group[0].label].append(digest)
    place: dict[str, tuple[float, str]] = {}
    for label, digests in by_class.items():
        start = _fraction(f"{seed} class {label}")
        for rank, (key, digest) in enumerate(sorted((_key(f"{seed} {digest}"), digest) for digest in digests)):
            place[digest] = ((rank + start) / len(digests), key)
    return tuple(tuple(groups[digest]) for digest in sorted(groups, key=lambda digest: place[digest]))


def _cut(units: Sequence[Sequence[Sample]], *sizes: int) -> tuple[list[Sample], ...]:
    """Stretches of so many units, one after the other."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        [sample for unit in units[start : start + n] for sample in unit] for start, n in zip(starts, sizes, strict=True)
    )


def _halves(n: int, most: int | None) -> tuple[int, int]:
    # The odd picture goes to the report, which is what is claimed.
    select = n // 2 if most is None else min(n // 2, most)
    return select, n - n // 2 if most is None else min(n - n // 2, most)


def _need_enough(n: int, name: str, *, n_shared: int = 0) -> None:
    if n >= MIN_PICTURES:
        return
    besides = f" ({n_shared} more are in the calibration data too)" if n_shared else ""
    raise DataError(
        f"'{name}' has {n} different pictures{besides}, expected at least {MIN_PICTURES} to choose by and report on.",
        hint="Pass more pictures; a few hundred give an interval of about two points.",
    )


def _contradictions(data_set: DataSet) -> tuple[str, ...]:
    """The warning that equal pictures have different labels."""
    labels: Mapping[str, set[str]] = defaultdict(set)
    first: dict[str, str] = {}
    for sample in data_set.samples:
        labels[sample.digest].add(sample.truth)
        first.setdefault(sample.digest, sample.name)
    found = [first[digest] for digest, several in labels.items() if len(several) > 1]
    if not found:
        return ()
    return (
        f"{len(found)} pictures of '{data_set.name}' stand there twice with different labels; "
        f"the first is '{found[0]}'.",
    )


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fraction(text: str) -> float:
    return int(_key(text)[:13], 16) / 16**13
