"""``report.html``: one self-contained page that loads nothing and needs no script."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgevlm.report import facts, notation, plots, where
from edgevlm.report.spec import CandidateRow, Report
from edgevlm.runtime.spec import Spec

if TYPE_CHECKING:
    from jinja2 import Environment


def html_from_report(report: Report) -> str:
    from markupsafe import Markup

    return (
        templates()
        .get_template("report.html.j2")
        .render(
            report=report,
            facts=facts,
            rows=facts.in_order(report),
            whiskers=whiskers(report),
            where=where.where_time_goes(report),
            trade_off=tuple(Markup(plots.trade_off_svg(report, width)) for width in (plots.WIDE, plots.NARROW)),
            trade_off_alt=trade_off_alt(report),
            runs=tuple(
                tuple(Markup(plots.runs_svg(report, c, width, f"runs-{i}")) for width in (plots.WIDE, plots.NARROW))
                for i, c in enumerate(report.comparisons)
                if plots.has_runs(c)
            ),
            runs_alt=runs_alt(report),
            max_dots=plots.MAX_DOTS,
        )
    )


def templates() -> Environment:
    """The pages' templates, with the notations as filters."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("edgevlm.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        ms=notation.ms, percent=notation.percent, points=notation.points, times=notation.times, size=notation.size,
        seconds=notation.seconds, error=notation.error, ratio_text=facts.ratio_text, row_drop_text=facts.row_drop_text,
    )  # fmt: skip
    return environment


class Whisker(Spec, frozen=True, kw_only=True):
    """Where a ratio, its interval and float's 1 stand in a drawing, 0 to 100."""

    low: float
    value: float
    high: float
    one: float


def whiskers(report: Report) -> dict[str, Whisker]:
    """A candidate's ratio on one logarithmic scale for all rows, so that twice and half are equally far from 1."""
    rows = [row for row in report.candidates if row.ratio is not None and row.ratio > 0]
    if not rows:
        return {}
    ends = [1.0, *(end for row in rows for end in _interval(row))]
    low, high = math.log(min(ends)), math.log(max(ends))
    span = max(high - low, 0.05)

    def place(ratio: float) -> float:
        return round(4 + 92 * (math.log(ratio) - low) / span, 1)

    placed = {}
    for row in rows:
        left, middle, right = (place(end) for end in _interval(row))
        placed[row.name] = Whisker(low=left, value=middle, high=right, one=place(1.0))
    return placed


def _interval(row: CandidateRow) -> tuple[float, float, float]:
    value = row.ratio or 1.0
    return (row.ratio_low or value, value, row.ratio_high or value)


def trade_off_alt(report: Report) -> str:
    rows = facts.plotted(report)
    told = [
        f"{row.status} {row.name}: {notation.ms(row.p50_ms)} ms, {notation.percent(row.accuracy)}"
        for row in rows
        if row.name in (report.winner, facts.float_name(report))
    ]
    front = ", ".join(row.name for row in facts.pareto(report))
    return (
        f"Median latency against {report.metric} on the select split for {notation.count(len(rows), 'candidate')}. "
        f"{'; '.join(told)}. Not beaten in both: {front}. The table above has all numbers."
    )


def runs_alt(report: Report) -> str:
    return "Latency of every run of every candidate; the table above has the percentiles."
