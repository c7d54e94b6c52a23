"""What is told of the results: a row per model and thread count, and for each model every rival."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import geometric_mean

from benchmarks.suite.judging import MAX_DROP, MIN_COSINE
from benchmarks.suite.rivals import EAGER, FLOAT
from benchmarks.suite.running import OURS
from benchmarks.suite.spec import CaseResult, Contender, Judged, ThreadsResult
from edgevlm.measure.spec import Measurement, Ratio
from edgevlm.report.notation import count

MARGIN = 1.03
"""Processes of one graph differ by a percent or two (docs/measuring.md); more than this is no accident of that."""


def summary(results: Sequence[CaseResult]) -> str:
    """The table of one processor that the README shows."""
    lines = [
        f"**{results[0].threads[0].final.environment.machine}**",
        "",
        "| model | threads | ships (backend) | p50 ms | drop | best rival within the budget | × best rival "
        f"| behind by > {MARGIN} | × ONNX Runtime float | × PyTorch eager |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(case, found) for case in results for found in case.threads),
        "",
        *_means(results),
        "",
        _conditions(results),
    ]
    return "\n".join(lines) + "\n"


def details(results: Sequence[CaseResult]) -> str:
    """The summary, then everybody on every model, with what could not be run and why."""
    parts = [summary(results)]
    machine = results[0].threads[0].final.environment.machine
    for case in results:
        columns = [f"p50 ms, {count(found.n_threads, 'thread')}" for found in case.threads]
        parts.append(f"\n### {case.name}, {machine}\n")
        parts.append(f"| | {' | '.join(columns)} | {_metric(case)} | within | MB | runs |")
        parts.append(f"|---|{'---|' * (len(columns) + 4)}")
        for found in case.threads:
            parts.append(_our_line(case, found))
        parts += [_rival_line(case, rival) for rival in case.rivals]
    return "\n".join(parts) + "\n"


def speedup(found: ThreadsResult, rival: str | None) -> Ratio | None:
    """Time of the rival ÷ edgevlm's, from the long comparison."""
    return found.final.ratio(rival) if rival is not None else None


def is_behind(ratio: Ratio | None) -> bool:
    """edgevlm is surely slower than the rival by more than the margin."""
    return ratio is not None and ratio.is_valid and ratio.high < 1 / MARGIN


def _row(case: CaseResult, found: ThreadsResult) -> str:
    best = speedup(found, found.best)
    ours = found.final.measurement(OURS)
    judged = found.ours.judged
    return (
        f"| {case.name} | {found.n_threads} | {found.winner} ({found.backend}) | {_p50(ours)} | {_drop(judged)} "
        f"| {found.best or 'none'} | {_speed(best)} | {'yes' if is_behind(best) else 'no'} "
        f"| {_speed(speedup(found, FLOAT))} | {_speed(speedup(found, EAGER))} |"
    )


def _means(results: Sequence[CaseResult]) -> Iterable[str]:
    for n_threads in sorted({found.n_threads for case in results for found in case.threads}):
        rows = [found for case in results for found in case.threads if found.n_threads == n_threads]
        bests = [ratio for found in rows if (ratio := speedup(found, found.best)) is not None]
        floats = [ratio for found in rows if (ratio := speedup(found, FLOAT)) is not None]
        eagers = [ratio for found in rows if (ratio := speedup(found, EAGER)) is not None]
        if bests:
            yield (
                f"- {count(n_threads, 'thread')}, {count(len(bests), 'model')}, geometric means: {_mean(bests)} × the "
                f"best rival, "
                f"{_mean(floats)} × ONNX Runtime float, {_mean(eagers)} × PyTorch eager; "
                f"surely behind the best rival by more than {MARGIN} on {sum(map(is_behind, bests))}."
            )


def _mean(ratios: Sequence[Ratio]) -> str:
    return f"{geometric_mean(ratio.value for ratio in ratios):.2f}" if ratios else "–"


def _conditions(results: Sequence[CaseResult]) -> str:
    environment = results[0].threads[0].final.environment
    days = sorted({case.made_at for case in results})
    tools = {name: version for name, version in environment.tools.items() if name in ("edgevlm", "numpy")}
    for case in results:
        for found in case.threads:
            for each in found.screening.measurements:
                tools.update(each.tools)
    told = ", ".join(f"{name} {version}" for name, version in sorted(tools.items()))
    random = sum(case.is_random for case in results)
    return (
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}, batch 1, {told}. Above 1 edgevlm is "
        "faster; brackets are 95 % intervals of ratios measured in turns. Within the budget: the task's metric "
        f"falls by at most {100 * MAX_DROP:g} point or, for the {count(random, 'model')} with random weights, the "
        f"centred cosine to float is at least {MIN_COSINE:g} on every picture. Made by `python -m benchmarks.suite`; "
        "raw samples in `benchmarks/results/suite/`."
    )


def _metric(case: CaseResult) -> str:
    return next((each.judged.metric for each in case.rivals if each.judged is not None), "metric")


def _our_line(case: CaseResult, found: ThreadsResult) -> str:
    times = [_p50(each.final.measurement(OURS)) if each is found else "" for each in case.threads]
    return f"| **edgevlm**: {found.winner} ({found.backend}) | {' | '.join(times)} | {_facts(found.ours)} |"


def _rival_line(case: CaseResult, rival: Contender) -> str:
    if rival.failure is not None:
        return f"| {rival.name} | {' | '.join('' for _ in case.threads)} | not run: {_cell(rival.failure)} | | | |"
    return f"| {rival.name} | {' | '.join(_time(found, rival.name) for found in case.threads)} | {_facts(rival)} |"


def _time(found: ThreadsResult, name: str) -> str:
    """From the long comparison where it took part in that, else from the short one."""
    for comparison in (found.final, found.screening):
        if any(each.subject == name for each in comparison.measurements):
            return _p50(comparison.measurement(name))
    return "–"


def _facts(contender: Contender) -> str:
    judged = contender.judged
    size = "–" if contender.n_bytes is None else f"{contender.n_bytes / 1e6:.1f}"
    if judged is None:
        return f"– | – | {size} | –"
    lowest = "" if judged.lowest is None else f", lowest {judged.lowest:.4f}"
    lowest += "".join(f", {name} {value:.4f}" for name, value in judged.others.items())
    says = "; ".join(f"{key} {value}" for key, value in {**contender.says, **judged.says}.items())
    return f"{judged.value:.4f}{lowest} | {'yes' if judged.is_within else 'no'} | {size} | {_cell(says) or '–'}"


def _p50(measurement: Measurement) -> str:
    if measurement.failure is not None:
        return f"failed: {_cell(measurement.failure)}"
    return f"{measurement.percentile_ms(50):.2f}"


def _drop(judged: Judged | None) -> str:
    if judged is None:
        return "–"
    if judged.lowest is None:
        told = f"{_points(judged.drop)} points [{_points(judged.low)}, {_points(judged.high)}]"
    else:
        told = f"cosine {judged.value:.4f}"
    return told if judged.is_within else f"{told}, outside the budget"


def _points(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


def _speed(ratio: Ratio | None) -> str:
    if ratio is None:
        return "–"
    doubt = "" if ratio.is_valid else " (not valid)"
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]{doubt}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
