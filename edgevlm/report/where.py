"""Where the time goes: what every rendering says of the explanation, once."""

from __future__ import annotations

from edgevlm.measure.explanation import Explained, Explanation
from edgevlm.measure.findings import Finding
from edgevlm.measure.operators import OperatorRow
from edgevlm.report.notation import count, ms, percent
from edgevlm.report.spec import Report
from edgevlm.runtime.spec import Spec

MAX_OPERATORS = 8


class Form(Spec, frozen=True, kw_only=True):
    """A form of a graph that is told of: what ships, or float beside it."""

    name: str
    is_reference: bool


class Bar(Spec, frozen=True, kw_only=True):
    """A kind of operator. ``times_ms`` (null: none of it) and ``widths`` (0 to 100, one scale) are by form."""

    kind: str
    times_ms: tuple[float | None, ...]
    widths: tuple[float, ...]


class Roof(Spec, frozen=True, kw_only=True):
    """A form's rate beside the best. ``width`` is 0 to 100."""

    name: str
    is_reference: bool
    gmac_per_s: float
    best_gmac_per_s: float
    precision: str
    fraction_text: str
    width: float


class WhereTimeGoes(Spec, frozen=True, kw_only=True):
    """One graph of what ships."""

    title: str
    lead: str
    forms: tuple[Form, ...]
    bars: tuple[Bar, ...]
    roofs: tuple[Roof, ...]
    about_roofs: str
    findings: tuple[Finding, ...]
    operators: tuple[OperatorRow, ...]
    about_operators: str
    notes: tuple[str, ...]


def where_time_goes(report: Report) -> tuple[WhereTimeGoes, ...]:
    """A section for each graph of what ships; none where nothing was profiled."""
    explanation = report.explanation
    if explanation is None:
        return ()
    references = {each.graph: each for each in explanation.reference}
    return tuple(
        _section(explanation, winner, references.get(winner.graph), is_alone=len(explanation.winner) == 1)
        for winner in explanation.winner
    )


def _section(
    explanation: Explanation, winner: Explained, reference: Explained | None, *, is_alone: bool
) -> WhereTimeGoes:
    told = [each for each in (winner, reference) if each is not None and each.profile is not None]
    notes = [each.failure for each in (winner, reference) if each is not None and each.failure]
    return WhereTimeGoes(
        title="Where the time goes" if is_alone else f"Where the time goes: {winner.graph}",
        lead=_lead(explanation, winner, told),
        forms=tuple(Form(name=each.name, is_reference=each is reference) for each in told),
        bars=_bars(told),
        roofs=tuple(_roof(explanation, each, is_reference=each is reference) for each in told if each.roofline),
        about_roofs=_about_roofs(explanation),
        findings=winner.findings,
        operators=winner.profile.rows[:MAX_OPERATORS] if winner.profile else (),
        about_operators=_about_operators(winner),
        notes=(*notes, *explanation.notes),
    )


def _lead(explanation: Explanation, winner: Explained, told: list[Explained]) -> str:
    if not told:
        return "Nothing could be profiled."
    work = explanation.work.get(winner.graph)
    macs = f"One inference is {ms(work.macs / 1e6)} million multiply-accumulates. " if work and work.macs else ""
    return (
        f"{macs}The operators as {' and '.join(dict.fromkeys(each.backend for each in told))} ran them on a picture of "
        "the select split, after fusion, by the kind of their work; the profiler's own cost is taken off."
    )


def _bars(told: list[Explained]) -> tuple[Bar, ...]:
    kinds = {kind: max(each.by_kind_ms.get(kind, 0.0) for each in told) for each in told for kind in each.by_kind_ms}
    longest = max(kinds.values(), default=0.0) or 1.0
    bars = []
    for kind in sorted(kinds, key=lambda kind: -kinds[kind]):
        times = tuple(each.by_kind_ms.get(kind) for each in told)
        bars.append(Bar(kind=kind, times_ms=times, widths=tuple(round(100 * (t or 0.0) / longest, 1) for t in times)))
    return tuple(bars)


def _roof(explanation: Explanation, each: Explained, *, is_reference: bool) -> Roof:
    roof, profile = each.roofline, each.profile
    assert roof is not None and profile is not None
    peak = next((p for p in explanation.peaks if (p.backend, p.n_threads) == (each.backend, profile.n_threads)), None)
    at_most = "" if peak is None or peak.is_valid else "at most "
    return Roof(
        name=each.name,
        is_reference=is_reference,
        gmac_per_s=roof.gmac_per_s,
        best_gmac_per_s=roof.peak_gmac_per_s,
        precision=roof.precision,
        fraction_text=f"{at_most}{percent(roof.fraction)}",
        width=round(min(100.0, 100 * roof.fraction), 1),
    )


def _about_roofs(explanation: Explanation) -> str:
    told = (
        "The best here is the highest rate that the same runtime reached on this machine, with as many threads, on "
        "large products and convolutions: measured, not a data sheet's. The rate of a graph is its "
        "multiply-accumulates over its median latency."
    )
    if any(not peak.is_valid for peak in explanation.peaks):
        told += " Other programs kept the machine busy, so that the true best is higher than what was measured."
    return told


def _about_operators(winner: Explained) -> str:
    if winner.profile is None:
        return ""
    n_others = len(winner.profile.rows) - MAX_OPERATORS
    others = f"{count(n_others, 'more', 'more')} in report.json." if n_others > 0 else ""
    return f"Of {winner.name}, as run. {others}".strip()
