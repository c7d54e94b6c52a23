"""Which pictures a model learned from, so that nothing is claimed of it on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from edgevlm.data.data_set import DataSet
from edgevlm.data.splits import MIN_PICTURES
from edgevlm.errors import DataError

TRAINED_ON_FILE = "trained_on.txt"
# Hexadecimal digits of a picture's sha256: enough that of a million pictures no two are likely to share them.
_N_DIGITS = 16


def write_trained_on(folder: Path, digests: Iterable[str]) -> None:
    """A line a picture, beside the weights that learned from it."""
    lines = sorted({digest[:_N_DIGITS] for digest in digests})
    (folder / TRAINED_ON_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="ascii")


def trained_on(folder: Path) -> frozenset[str]:
    """The first digits of the digests of what a model was trained on; empty where its folder does not say."""
    try:
        return frozenset((folder / TRAINED_ON_FILE).read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return frozenset()


def part_by_training(data: DataSet, folder: Path) -> tuple[DataSet, DataSet]:
    """The pictures that a model was trained on, and those that it never saw, which have a note where they are not all.

    Raises: DataError: too few are left to judge by.
    """
    known = trained_on(folder)
    seen = [sample for sample in data.samples if sample.digest[:_N_DIGITS] in known]
    if not seen:
        return data.only(()), data
    fresh = [sample for sample in data.samples if sample.digest[:_N_DIGITS] not in known]
    n_fresh = len({sample.digest for sample in fresh})
    if n_fresh < MIN_PICTURES:
        raise DataError(
            f"The model in '{folder}' was trained on {len(seen)} of the {len(data)} pictures of '{data.name}', and the "
            f"other {n_fresh} are too few to judge it by, expected at least {MIN_PICTURES}.",
            hint="Pass --eval-data with pictures that the training did not see.",
        )
    note = (
        f"{len(seen)} of {len(data)} pictures of '{data.name}' taught this model; it is judged on the others, which "
        "its training never saw."
    )
    return data.only(seen), replace(data.only(fresh), notes=(*data.notes, note))
