"""The search: the forms of every graph, combined where there are several, judged, and put in the order to ship."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from edgevlm.errors import EdgeVLMError
from edgevlm.evaluation.evaluation import Drop
from edgevlm.job import Work
from edgevlm.lowering.ready_made import READY_MADE
from edgevlm.report.spec import CandidateRow
from edgevlm.search.choose import FLOAT, Choice, Trial, choose, pareto
from edgevlm.search.spec import Candidate, SearchResult, Variant
from edgevlm.search.trials import Known, candidates_of, combined_ratio, measurements_of, members_of
from edgevlm.steps.graph_search import Clock, GraphSearch
from edgevlm.steps.judging import Judge
from edgevlm.steps.variants import GraphForms, check_keep_float, made_baseline
from edgevlm.store import read_spec, write_spec

N = TypeVar("N", int, float)


def run(work: Work) -> None:
    """``search.json`` and the variants' graphs."""
    forms = [GraphForms(work, graph) for graph in work.step.params["graphs"]]
    baselines = tuple(made_baseline(each) for each in forms)
    with Judge(work, work.job.splits.select, baselines, work.out) as judge:
        searches = _search_graphs(work, forms, baselines, judge)
        known = {search.graph: search.known for search in searches}
        is_speed_asked = work.step.params["precision"] == "auto" and work.job.request.budgets.max_size_mb is None
        candidates = candidates_of(known, must_be_faster=is_speed_asked)
        drops, failures = _judge(judge, candidates, known)
    precision = work.step.params["precision"]
    trials = tuple(_trial(c, known, drops.get(c.name), failures.get(c.name), precision) for c in candidates)
    choice = choose(trials, work.job.request.budgets)
    final = [each.timings[-1].comparison for each in known.values()]
    write_spec(
        work.out / "search.json",
        SearchResult(
            variants=tuple(variant for each in known.values() for variant in each.variants.values()),
            candidates=candidates,
            rows=_rows(candidates, known, drops, trials, choice),
            contenders=choice.contenders,
            timings=tuple(timing for each in known.values() for timing in each.timings),
            sensitivities=tuple(each for search in searches for each in search.sensitivities),
            pareto=pareto(trials),
            was_cut=any(search.clock.was_over for search in searches),
            metric=next(iter(drops.values())).metric,
            is_valid=all(comparison.is_valid for comparison in final),
            reasons=tuple(dict.fromkeys(reason for comparison in final for reason in comparison.reasons)),
        ),
    )


def is_kept(folder: Path) -> bool:
    """A search is stored only where its last measurements are valid: the next compile measures again."""
    return read_spec(folder / "search.json", SearchResult).is_valid


def _search_graphs(
    work: Work, forms: list[GraphForms], baselines: tuple[Variant, ...], judge: Judge
) -> list[GraphSearch]:
    """Each graph in turn; what one leaves of its time, the next ones have."""
    check_keep_float(work, forms)
    left_s = 60 * work.step.params["search_minutes"]
    searches: list[GraphSearch] = []
    for i, (each, baseline) in enumerate(zip(forms, baselines, strict=True)):
        clock = Clock(allowed_s=left_s / (len(forms) - i))
        search = GraphSearch(work=work, forms=each, baseline=baseline, judge=judge, others=baselines, clock=clock)
        search.run()
        left_s -= clock.allowed_s - max(clock.left_s(), 0.0)
        searches.append(search)
    return searches


# --- judging ----------------------------------------------------------------------------------------------


def _judge(judge: Judge, candidates: tuple[Candidate, ...], known: Known) -> tuple[dict[str, Drop], dict[str, str]]:
    """The drop of every candidate that ran to the end, and why the others did not."""
    drops: dict[str, Drop] = {}
    failures: dict[str, str] = {}
    # A model of one graph was judged while that was searched.
    judged = next(iter(known.values())).drops if len(known) == 1 else {}
    for candidate in candidates:
        trials = [each.trial(candidate.variants[graph]) for graph, each in known.items()]
        if broken := [trial.failure for trial in trials if trial.failure]:
            failures[candidate.name] = broken[0]
        elif candidate.name in judged:
            drops[candidate.name] = judged[candidate.name]
        elif not any(trial.was_dropped for trial in trials):
            try:
                drops[candidate.name] = judge.drop(members_of(candidate, known))
            except EdgeVLMError as error:
                if candidate.name == FLOAT:
                    raise
                failures[candidate.name] = error.message
    return drops, failures


# --- what is told -----------------------------------------------------------------------------------------


def _trial(candidate: Candidate, known: Known, drop: Drop | None, failure: str | None, precision: str) -> Trial:
    is_requested = _is_requested(candidate, known, precision)
    measured = measurements_of(candidate, known)
    if failure is not None or any(m is None for m in measured):
        return Trial(name=candidate.name, failure=failure or "it was not timed", is_requested=is_requested)
    ratio = combined_ratio(candidate, known)
    return Trial(
        name=candidate.name,
        is_requested=is_requested,
        size_bytes=sum(v.n_bytes for v in members_of(candidate, known)),
        p50_ms=sum(m.percentile_ms(50) for m in measured if m),
        ratio=ratio.value if ratio else None,
        ratio_low=ratio.low if ratio else None,
        ratio_high=ratio.high if ratio else None,
        drop=drop.value if drop else None,
        invalid_because=ratio.reasons if ratio and not ratio.is_valid else (),
        is_rough=any(each.is_rough(candidate.variants[graph]) for graph, each in known.items()),
        was_dropped=any(m.dropped_after_round is not None for m in measured if m),
    )


def _is_requested(candidate: Candidate, known: Known, precision: str) -> bool:
    """Float is made whatever was asked for, since all are compared with it; it ships only where it was meant."""
    members = members_of(candidate, known)
    if any(variant.precision == READY_MADE for variant in members):
        return True
    is_all_float = all(variant.precision == FLOAT for variant in members)
    return precision == "auto" or (precision == FLOAT) == is_all_float


def _rows(
    candidates: tuple[Candidate, ...],
    known: Known,
    drops: Mapping[str, Drop],
    trials: tuple[Trial, ...],
    choice: Choice,
) -> tuple[CandidateRow, ...]:
    rows = []
    for candidate, trial in zip(candidates, trials, strict=True):
        verdict, drop = choice.verdict(candidate.name), drops.get(candidate.name)
        members = members_of(candidate, known)
        row = CandidateRow(
            name=candidate.name,
            precision="+".join(dict.fromkeys(v.precision for v in members)),
            backend="+".join(dict.fromkeys(v.backend for v in members)),
            recipe=members[-1].recipe if len(members) == 1 else {v.graph: v.name for v in members},
            status=verdict.status,
            reason=verdict.reason,
        )
        measured = [m for m in measurements_of(candidate, known) if m is not None]
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
            row = msgspec.structs.replace(row, accuracy=drop.candidate)
            if candidate.name != FLOAT:  # what the others' drops are measured from
                row = msgspec.structs.replace(row, drop=drop.value, drop_low=drop.low, drop_high=drop.high)
        rows.append(row)
    return tuple(rows)


def _sum(values: Iterable[N | None]) -> N | None:
    """The sum; None where one of them is not known."""
    known = list(values)
    return None if any(value is None for value in known) else sum(known)  # type: ignore[arg-type]
