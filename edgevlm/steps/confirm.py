"""Judge the best contender on the report split, which nothing was chosen by: the only accuracy that is claimed."""

from __future__ import annotations

from collections.abc import Mapping

from edgevlm.errors import GateError
from edgevlm.evaluation.evaluation import Drop
from edgevlm.job import Work
from edgevlm.runtime.spec import Accuracy, Spec
from edgevlm.search.choose import FLOAT
from edgevlm.search.spec import SearchResult
from edgevlm.steps.judging import Judge
from edgevlm.store import read_spec, write_spec

# Every look at the report split makes its figure a little too good; three keep that small, and are told.
MAX_TRIES = 3


class Rejected(Spec, frozen=True, kw_only=True):
    """A contender that lost too much on the report split after all."""

    name: str
    drop: float


class Confirmation(Spec, frozen=True, kw_only=True):
    """Which candidate ships, with its accuracy on the report split and those of the others that were tried there.

    Args:
        offered: where nothing was timed, every form that ships, float first.
    """

    winner: str
    accuracy: Accuracy
    drop: Drop
    rejected: tuple[Rejected, ...]
    offered: dict[str, Accuracy] = {}


def run(work: Work) -> None:
    """``confirmation.json``.

    Raises: GateError: a precision was insisted on, and none of its candidates keeps to the budget here.
    """
    folder = work.inputs["search"]
    found = read_spec(folder / "search.json", SearchResult)
    with Judge(work, work.job.splits.report, found.variants_of(FLOAT), folder) as judge:
        confirm = _first_within if work.step.params["is_measured"] else _all_within
        write_spec(work.out / "confirmation.json", confirm(work, found, judge))


def _all_within(work: Work, found: SearchResult, judge: Judge) -> Confirmation:
    """Every form keeps to the budget here too; what each of them loses is claimed, and nothing is chosen by it."""
    drops = {name: judge.drop(found.variants_of(name)) for name in found.contenders}
    max_drop = work.step.params["max_drop"]
    within = {name: drop for name, drop in drops.items() if name == FLOAT or drop.value <= max_drop}
    if len(drops) > 1 and len(within) == 1 and work.job.request.precision not in ("auto", FLOAT):
        raise _none_within({name: drop.value for name, drop in drops.items() if name != FLOAT}, max_drop)
    return Confirmation(
        winner=FLOAT,
        accuracy=drops[FLOAT].to_accuracy(),
        drop=drops[FLOAT],
        rejected=tuple(Rejected(name=name, drop=drop.value) for name, drop in drops.items() if name not in within),
        offered={name: drop.to_accuracy() for name, drop in within.items()},
    )


def _first_within(work: Work, found: SearchResult, judge: Judge) -> Confirmation:
    max_drop = work.step.params["max_drop"]
    rejected: list[Rejected] = []
    for name in _to_try(found):
        drop = judge.drop(found.variants_of(name))
        if name == FLOAT or drop.value <= max_drop:
            return Confirmation(winner=name, accuracy=drop.to_accuracy(), drop=drop, rejected=tuple(rejected))
        rejected.append(Rejected(name=name, drop=drop.value))
    raise _none_within({each.name: each.drop for each in rejected}, max_drop)


def _none_within(drops: Mapping[str, float], max_drop: float) -> GateError:
    misses = ", ".join(f"{name} drops {drop:.2%}" for name, drop in drops.items())
    return GateError(
        f"On the report split every candidate loses more than the {max_drop:.2%} that is allowed: {misses}.",
        hint="Allow more with --max-drop, give more --calibration-data, or leave --precision at auto.",
    )


def _to_try(found: SearchResult) -> tuple[str, ...]:
    """The first few, and float at the end where it may ship. Of graphs that are only opened otherwise, the first."""
    by_graphs: dict[tuple[str, ...], str] = {}
    for name in found.contenders:
        by_graphs.setdefault(tuple(variant.file for variant in found.variants_of(name)), name)
    others = tuple(name for name in by_graphs.values() if name != FLOAT)[:MAX_TRIES]
    return others + ((FLOAT,) if FLOAT in found.contenders else ())
