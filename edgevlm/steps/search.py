"""The search: the forms of every graph, combined where there are several, judged, and put in the order to ship."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from edgevlm.errors import EdgeVLMError, ModelError
from edgevlm.evaluation.evaluation import Drop
from edgevlm.job import Work
from edgevlm.measure.spec import Measurement, Ratio
from edgevlm.report.spec import CandidateRow
from edgevlm.search.choose import FLOAT, Choice, Trial, choose, pareto
from edgevlm.search.spec import Candidate, SearchResult, Variant
from edgevlm.steps.graph_search import Clock, GraphSearch
from edgevlm.steps.judging import Judge
from edgevlm.steps.variants import GraphForms, check_keep_float
from edgevlm.store import read_spec, write_spec

N = TypeVar("N", int, float)
Searches = Mapping[str, GraphSearch]

# Combinations of several graphs' variants that are judged at most, fastest first: two towers with six variants each
# give 36, and what is not among the fastest dozen will not ship.
_MAX_COMBINATIONS = 12


def run(work: Work) -> None:
    """``search.json`` and the variants' graphs."""
    forms = [GraphForms(work, graph) for graph in work.step.params["graphs"]]
    baselines = tuple(_made_baseline(each) for each in forms)
    with Judge(work, work.job.splits.select, baselines, work.out) as judge:
        searches = _search_graphs(work, forms, baselines, judge)
        candidates = _candidates(searches)
        drops, failures = _judge(judge, candidates, searches)
    trials = tuple(_trial(work, c, searches, drops.get(c.name), failures.get(c.name)) for c in candidates)
    choice = choose(trials, work.job.request.budgets)
    final = [search.timings[-1].comparison for search in searches.values()]
    write_spec(
        work.out / "search.json",
        SearchResult(
            variants=_all_variants(searches),
            candidates=candidates,
            rows=_rows(candidates, searches, drops, trials, choice),
            contenders=choice.contenders,
            timings=tuple(timing for search in searches.values() for timing in search.timings),
            sensitivities=tuple(each for search in searches.values() for each in search.sensitivities),
            pareto=pareto(trials),
            was_cut=any(search.clock.was_over for search in searches.values()),
            metric=next(iter(drops.values())).metric,
            is_valid=all(comparison.is_valid for comparison in final),
            reasons=tuple(dict.fromkeys(reason for comparison in final for reason in comparison.reasons)),
        ),
    )


def is_kept(folder: Path) -> bool:
    """A search is stored only where its last measurements are valid: the next compile measures again."""
    return read_spec(folder / "search.json", SearchResult).is_valid


def _made_baseline(forms: GraphForms) -> Variant:
    variant = forms.make(forms.baseline)
    if variant.failure is not None:
        raise ModelError(variant.failure, hint="Check that the first of --backends runs the float graph.")
    return variant


def _search_graphs(
    work: Work, forms: list[GraphForms], baselines: tuple[Variant, ...], judge: Judge
) -> dict[str, GraphSearch]:
    """Each graph in turn; what one leaves of its time, the next ones have."""
    check_keep_float(work, forms)
    end_s = time.monotonic() + 60 * work.step.params["search_minutes"]
    searches = {}
    for i, (each, baseline) in enumerate(zip(forms, baselines, strict=True)):
        share = (end_s - time.monotonic()) / (len(forms) - i)
        clock = Clock(end_s=time.monotonic() + share)
        search = GraphSearch(
            work=work, forms=each, baseline=baseline, judge=judge, others=baselines, clock=clock
        )
        search.run()
        searches[each.graph] = search
    return searches


def _all_variants(searches: Searches) -> tuple[Variant, ...]:
    return tuple(variant for search in searches.values() for variant in search.variants.values())


# --- candidates -------------------------------------------------------------------------------------------


def _candidates(searches: Searches) -> tuple[Candidate, ...]:
    """Float first. One graph: every variant. Several: combinations of those that beat float, fastest first."""
    if len(searches) == 1:
        ((graph, search),) = searches.items()
        return tuple(Candidate(name=name, variants={graph: name}) for name in search.variants)
    hopeful = [
        [v for v in search.variants.values() if v.name == FLOAT or _is_faster(search, v.name)]
        for search in searches.values()
    ]
    combined = [
        Candidate(name=_combined_name(members), variants={v.graph: v.name for v in members})
        for members in itertools.product(*hopeful)
    ]

    def ratio_of(candidate: Candidate) -> float:
        ratio = combined_ratio(candidate, searches)
        return ratio.value if ratio else 1.0

    return (combined[0], *sorted(combined[1:], key=ratio_of)[:_MAX_COMBINATIONS])


def _combined_name(members: tuple[Variant, ...]) -> str:
    names = {variant.name for variant in members}
    return names.pop() if len(names) == 1 else "+".join(f"{v.graph.split('_')[0]}:{v.name}" for v in members)


def _is_faster(search: GraphSearch, name: str) -> bool:
    ratio, trial = search.ratio(name), search.trial(name)
    return not trial.failure and not trial.was_dropped and ratio is not None and ratio.is_valid and ratio.high < 1


def _members(candidate: Candidate, searches: Searches) -> tuple[Variant, ...]:
    return tuple(search.variants[candidate.variants[graph]] for graph, search in searches.items())


def _measured(candidate: Candidate, searches: Searches) -> list[Measurement | None]:
    return [search.measurement(candidate.variants[graph]) for graph, search in searches.items()]


# --- judging ----------------------------------------------------------------------------------------------


def _judge(
    judge: Judge, candidates: tuple[Candidate, ...], searches: Searches
) -> tuple[dict[str, Drop], dict[str, str]]:
    """The drop of every candidate that ran to the end, and why the others did not."""
    drops: dict[str, Drop] = {}
    failures: dict[str, str] = {}
    for candidate in candidates:
        trials = [search.trial(candidate.variants[graph]) for graph, search in searches.items()]
        if broken := [trial.failure for trial in trials if trial.failure]:
            failures[candidate.name] = broken[0]
        elif not any(trial.was_dropped for trial in trials):
            try:
                drops[candidate.name] = judge.drop(_members(candidate, searches))
            except EdgeVLMError as error:
                if candidate.name == FLOAT:
                    raise
                failures[candidate.name] = error.message
    return drops, failures


# --- what is told -----------------------------------------------------------------------------------------


def _trial(
    work: Work, candidate: Candidate, searches: Searches, drop: Drop | None, failure: str | None
) -> Trial:
    is_requested = _is_requested(candidate, searches, work.step.params["precision"])
    measured = _measured(candidate, searches)
    if failure is not None or any(m is None for m in measured):
        return Trial(name=candidate.name, failure=failure or "it was not timed", is_requested=is_requested)
    ratio = combined_ratio(candidate, searches)
    return Trial(
        name=candidate.name,
        is_requested=is_requested,
        size_bytes=sum(v.n_bytes for v in _members(candidate, searches)),
        p50_ms=sum(m.percentile_ms(50) for m in measured if m),
        ratio=ratio.value if ratio else None,
        ratio_low=ratio.low if ratio else None,
        ratio_high=ratio.high if ratio else None,
        drop=drop.value if drop else None,
        invalid_because=ratio.reasons if ratio and not ratio.is_valid else (),
        is_rough=not all(s.timings[-1].comparison.has(candidate.variants[g]) for g, s in searches.items()),
        was_dropped=any(m.dropped_after_round is not None for m in measured if m),
    )


def _is_requested(candidate: Candidate, searches: Searches, precision: str) -> bool:
    """Float is made whatever was asked for, since all are compared with it; it ships only where it was meant."""
    is_all_float = all(variant.precision == FLOAT for variant in _members(candidate, searches))
    return precision == "auto" or (precision == FLOAT) == is_all_float


def combined_ratio(candidate: Candidate, searches: Searches) -> Ratio | None:
    """Time of the candidate ÷ time of float over all graphs together, each weighed by its float time.

    The bounds add up too, which makes the interval wider than need be, never narrower.
    """
    if candidate.name == FLOAT:
        return None
    weights = {}
    for graph, search in searches.items():
        measured = search.measurement(FLOAT)
        assert measured is not None, "float is timed first"
        weights[graph] = measured.percentile_ms(50)
    total = sum(weights.values())
    parts = []
    for graph, search in searches.items():
        name = candidate.variants[graph]
        ratio = search.ratio(name)
        if name == FLOAT:
            ratio = Ratio(subject=FLOAT, baseline=FLOAT, value=1, low=1, high=1, n_pairs=0, is_valid=True)
        if ratio is None:
            return None
        parts.append((weights[graph] / total, ratio))
    return Ratio(
        subject=candidate.name,
        baseline=FLOAT,
        value=sum(weight * ratio.value for weight, ratio in parts),
        low=sum(weight * ratio.low for weight, ratio in parts),
        high=sum(weight * ratio.high for weight, ratio in parts),
        n_pairs=min((ratio.n_pairs for _, ratio in parts if ratio.n_pairs), default=0),
        is_valid=all(ratio.is_valid for _, ratio in parts),
        reasons=tuple(reason for _, ratio in parts for reason in ratio.reasons),
    )


def _rows(
    candidates: tuple[Candidate, ...],
    searches: Searches,
    drops: Mapping[str, Drop],
    trials: tuple[Trial, ...],
    choice: Choice,
) -> tuple[CandidateRow, ...]:
    rows = []
    for candidate, trial in zip(candidates, trials, strict=True):
        verdict, drop = choice.verdict(candidate.name), drops.get(candidate.name)
        members = _members(candidate, searches)
        row = CandidateRow(
            name=candidate.name,
            precision="+".join(dict.fromkeys(v.precision for v in members)),
            backend="+".join(dict.fromkeys(v.backend for v in members)),
            recipe=members[-1].recipe if len(members) == 1 else {v.graph: v.name for v in members},
            status=verdict.status,
            reason=verdict.reason,
        )
        measured = [m for m in _measured(candidate, searches) if m is not None]
        if not trial.failure:
            row = msgspec.structs.replace(
                row,
                p50_ms=trial.p50_ms,
                p90_ms=sum(m.percentile_ms(90) for m in measured),
                p99_ms=sum(m.percentile_ms(99) for m in measured),
                ratio=trial.ratio,
                ratio_low=trial.ratio_low,
                ratio_high=trial.ratio_high,
                size_bytes=trial.size_bytes,
                memory_bytes=_sum(m.memory_bytes for m in measured),
                load_ms=_sum(m.load_ms for m in measured),
            )
        if drop is not None:
            row = msgspec.structs.replace(
                row, accuracy=drop.candidate, drop=drop.value, drop_low=drop.low, drop_high=drop.high
            )
        rows.append(row)
    return tuple(rows)


def _sum(values: Iterable[N | None]) -> N | None:
    """The sum; None where one of them is not known."""
    known = list(values)
    return None if any(value is None for value in known) else sum(known)  # type: ignore[arg-type]
