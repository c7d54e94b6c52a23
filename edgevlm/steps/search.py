"""The search: make the variants, time them in turns, judge what is fast, order what may ship."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from edgevlm.errors import EdgeVLMError
from edgevlm.evaluation.evaluation import Drop
from edgevlm.job import Work
from edgevlm.measure.environment import describe_environment, fingerprint
from edgevlm.measure.interleave import compare
from edgevlm.measure.protocol import extended
from edgevlm.measure.spec import Comparison, Measurement, Ratio, Subject
from edgevlm.plan import TEXT_ENCODER
from edgevlm.progress import Note, StepProgress
from edgevlm.report.spec import CandidateRow
from edgevlm.search.choose import FLOAT, Choice, Trial, choose
from edgevlm.search.spec import Candidate, SearchResult, Variant
from edgevlm.steps.inputs import at_batch, graph_inputs, save_inputs
from edgevlm.steps.judging import Judge
from edgevlm.steps.variants import file_digest, make_variants
from edgevlm.store import code_digest, read_spec, write_spec

N = TypeVar("N", int, float)

# Combinations of several graphs' variants that are judged at most, fastest first: two towers with six variants each
# give 36, and what is not among the fastest dozen will not ship.
_MAX_COMBINATIONS = 12


def run(work: Work) -> None:
    """``search.json`` and the variants' graphs."""
    variants = make_variants(work)
    graphs: tuple[str, ...] = tuple(work.step.params["graphs"])
    comparisons = {graph: _measure(work, graph, [v for v in variants if v.graph == graph]) for graph in graphs}
    candidates = _candidates(graphs, variants, comparisons)
    with Judge(work, work.job.splits.select, _members(candidates[0], variants), work.out) as judge:
        drops, failures = _judge(judge, candidates, variants, comparisons)
    trials = tuple(_trial(work, c, variants, comparisons, drops.get(c.name), failures.get(c.name)) for c in candidates)
    choice = choose(trials, work.job.request.budgets)
    reasons = tuple(dict.fromkeys(reason for each in comparisons.values() for reason in each.reasons))
    write_spec(
        work.out / "search.json",
        SearchResult(
            variants=variants,
            candidates=candidates,
            rows=_rows(work, candidates, variants, comparisons, drops, trials, choice),
            contenders=choice.contenders,
            comparisons=tuple(comparisons.values()),
            metric=next(iter(drops.values())).metric,
            is_valid=all(each.is_valid for each in comparisons.values()),
            reasons=reasons,
        ),
    )


def is_kept(folder: Path) -> bool:
    """A search is stored only where its measurements are valid: the next compile measures again."""
    return read_spec(folder / "search.json", SearchResult).is_valid


# --- measuring --------------------------------------------------------------------------------------------


def _measure(work: Work, graph: str, variants: Iterable[Variant]) -> Comparison:
    """The graph's variants against each other, on a real input; once more and longer if that was not valid."""
    protocol = work.job.request.protocol
    environment = describe_environment()
    data = work.job.splits.select
    batch = 1 if graph == TEXT_ENCODER else work.step.params["batch"] or 1
    runnable = [variant for variant in variants if variant.failure is None]

    def say(text: str, done: int, n: int) -> None:
        work.progress(StepProgress(name=work.step.name, fraction=done / n if n else None, detail=f"{graph}: {text}"))

    def make(out: Path) -> None:
        inputs = save_inputs(out / "inputs.npz", at_batch(graph_inputs(work.job, graph, data, batch), batch))
        subjects = [
            Subject(name=v.name, backend=v.backend, file=str(work.out / v.file), inputs=str(inputs), session=v.session)
            for v in runnable
        ]
        comparison = compare(subjects, baseline=FLOAT, protocol=protocol, progress=say)
        if not comparison.is_valid:
            work.progress(Note(f"{graph}: measuring again, and longer: {'; '.join(comparison.reasons)}"))
            again = compare(subjects, baseline=FLOAT, protocol=extended(protocol), progress=say)
            comparison = msgspec.structs.replace(again, was_extended=True)
        write_spec(out / "comparison.json", comparison)
        inputs.unlink()

    parts = {
        "subjects": {
            v.name: {"file": file_digest(work.out / v.file), "session": msgspec.to_builtins(v.session)}
            for v in runnable
        },
        "input": data.samples[0].digest if data.samples else "",
        "batch": batch,
        "processing": msgspec.to_builtins(work.job.model.processing),
        "protocol": msgspec.to_builtins(protocol),
        "machine": fingerprint(environment),
        "code": code_digest(),
    }
    kept = work.store.fetch("measure", parts, make, keep=lambda out: _comparison(out).is_valid)
    return _comparison(kept.path)


def _comparison(folder: Path) -> Comparison:
    return read_spec(folder / "comparison.json", Comparison)


# --- candidates -------------------------------------------------------------------------------------------


def _candidates(
    graphs: tuple[str, ...], variants: tuple[Variant, ...], comparisons: Mapping[str, Comparison]
) -> tuple[Candidate, ...]:
    """Float first. One graph: every variant. Several: combinations of those that beat float, fastest first."""
    by_graph = {graph: [v for v in variants if v.graph == graph] for graph in graphs}
    if len(graphs) == 1:
        (graph,) = graphs
        return tuple(Candidate(name=v.name, variants={graph: v.name}) for v in by_graph[graph])
    hopeful = [[v for v in by_graph[g] if v.name == FLOAT or _is_faster(comparisons[g], v.name)] for g in graphs]
    combined = [
        Candidate(name=_combined_name(members), variants={v.graph: v.name for v in members})
        for members in itertools.product(*hopeful)
    ]
    ranked = sorted(combined[1:], key=lambda c: sum(_of(c, g, comparisons).percentile_ms(50) for g in graphs))
    return (combined[0], *ranked[:_MAX_COMBINATIONS])


def _combined_name(members: tuple[Variant, ...]) -> str:
    names = {variant.name for variant in members}
    return names.pop() if len(names) == 1 else "+".join(f"{v.graph.split('_')[0]}:{v.name}" for v in members)


def _is_faster(comparison: Comparison, name: str) -> bool:
    ratio = comparison.ratio(name)
    return ratio is not None and ratio.is_valid and ratio.high < 1


def _members(candidate: Candidate, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
    return tuple(v for v in variants if candidate.variants.get(v.graph) == v.name)


def _of(candidate: Candidate, graph: str, comparisons: Mapping[str, Comparison]) -> Measurement:
    return comparisons[graph].measurement(candidate.variants[graph])


# --- judging ----------------------------------------------------------------------------------------------


def _judge(
    judge: Judge,
    candidates: tuple[Candidate, ...],
    variants: tuple[Variant, ...],
    comparisons: Mapping[str, Comparison],
) -> tuple[dict[str, Drop], dict[str, str]]:
    """The drop of every candidate that ran to the end, and why the others did not."""
    drops: dict[str, Drop] = {}
    failures: dict[str, str] = {}
    for candidate in candidates:
        members = _members(candidate, variants)
        measured = [_of(candidate, graph, comparisons) for graph in comparisons if _ran(candidate, variants, graph)]
        broken = [v.failure for v in members if v.failure] + [m.failure for m in measured if m.failure]
        if broken:
            failures[candidate.name] = broken[0]
        elif not any(m.dropped_after_round is not None for m in measured):
            try:
                drops[candidate.name] = judge.drop(members)
            except EdgeVLMError as error:
                if candidate.name == FLOAT:
                    raise
                failures[candidate.name] = error.message
    return drops, failures


def _ran(candidate: Candidate, variants: tuple[Variant, ...], graph: str) -> bool:
    return all(v.failure is None for v in _members(candidate, variants) if v.graph == graph)


# --- what is told -----------------------------------------------------------------------------------------


def _trial(
    work: Work,
    candidate: Candidate,
    variants: tuple[Variant, ...],
    comparisons: Mapping[str, Comparison],
    drop: Drop | None,
    failure: str | None,
) -> Trial:
    is_requested = candidate.name == FLOAT or work.step.params["precision"] != FLOAT
    if work.step.params["precision"] not in ("auto", FLOAT):
        is_requested = candidate.name != FLOAT
    if failure is not None:
        return Trial(name=candidate.name, failure=failure, is_requested=is_requested)
    measured = [_of(candidate, graph, comparisons) for graph in comparisons]
    ratio = combined_ratio(candidate, comparisons)
    return Trial(
        name=candidate.name,
        is_requested=is_requested,
        size_bytes=sum(v.n_bytes for v in _members(candidate, variants)),
        p50_ms=sum(m.percentile_ms(50) for m in measured),
        ratio=ratio.value if ratio else None,
        ratio_low=ratio.low if ratio else None,
        ratio_high=ratio.high if ratio else None,
        drop=drop.value if drop else None,
        invalid_because=ratio.reasons if ratio and not ratio.is_valid else (),
        was_dropped=any(m.dropped_after_round is not None for m in measured),
    )


def combined_ratio(candidate: Candidate, comparisons: Mapping[str, Comparison]) -> Ratio | None:
    """Time of the candidate ÷ time of float over all graphs together, each weighed by its float time.

    The bounds add up too, which makes the interval wider than need be, never narrower.
    """
    if candidate.name == FLOAT:
        return None
    weights = {graph: each.measurement(FLOAT).percentile_ms(50) for graph, each in comparisons.items()}
    total = sum(weights.values())
    parts = []
    for graph, comparison in comparisons.items():
        name = candidate.variants[graph]
        ratio = comparison.ratio(name)
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
    work: Work,
    candidates: tuple[Candidate, ...],
    variants: tuple[Variant, ...],
    comparisons: Mapping[str, Comparison],
    drops: Mapping[str, Drop],
    trials: tuple[Trial, ...],
    choice: Choice,
) -> tuple[CandidateRow, ...]:
    rows = []
    for candidate, trial in zip(candidates, trials, strict=True):
        verdict, drop = choice.verdict(candidate.name), drops.get(candidate.name)
        members = _members(candidate, variants)
        row = CandidateRow(
            name=candidate.name,
            precision="+".join(dict.fromkeys(v.precision for v in members)),
            backend="+".join(dict.fromkeys(v.backend for v in members)),
            recipe=members[-1].recipe if len(members) == 1 else {v.graph: v.name for v in members},
            status=verdict.status,
            reason=verdict.reason,
        )
        if not trial.failure:
            measured = [_of(candidate, graph, comparisons) for graph in comparisons]
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
