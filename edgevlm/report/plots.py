"""The report's plots as inline SVG: the same report always gives the same text.

Matplotlib draws; colours leave as CSS variables, so that the page's light and dark themes apply, and text stays text.
Every plot exists twice, wide for a desk and narrow for a phone: a wide one scaled down could not be read.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevlm.measure.spec import Comparison, Measurement
from edgevlm.report import facts, notation
from edgevlm.report.spec import CandidateRow, Report, Status

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import BboxBase

WIDE, NARROW = 960, 380
FONT_PX = 12
ROW_PX = 40

# Stand-ins that matplotlib can draw with; each leaves as the page's variable of that name.
COLOURS = {
    "ink": "#010203",
    "muted": "#010204",
    "line": "#010205",
    "accent": "#010206",
    "float": "#010207",
    "good": "#010208",
    "warn": "#010209",
    "bad": "#01020a",
    "card": "#01020b",
}

# Shape and colour by verdict; the shapes are those of ``facts.SIGNS``.
MARKERS: dict[Status, tuple[str, str, float]] = {
    "winner": ("*", "good", 18),
    "float": ("D", "float", 9),
    "inside budgets": ("o", "accent", 9),
    "slower than float": ("^", "warn", 9),
    "over a budget": ("s", "bad", 8.5),
    "dropped early": ("v", "muted", 9),
    "not measured validly": ("o", "muted", 8),
    "failed": ("X", "bad", 9),
}

# Where a name may stand, in points from its mark, the best first.
PLACES = ((11, 0), (-11, 0), (0, 11), (0, -11), (9, 9), (-9, 9), (9, -9), (-9, -9))

# Dots of one subject in the plot of runs: beyond this they cover one another and only make the page heavy.
MAX_DOTS = 240


def trade_off_svg(report: Report, width: int) -> str:
    """Latency against accuracy, the Pareto front, budgets; empty where fewer than two candidates have both."""
    if len(facts.plotted(report)) < 2:
        return ""
    with _style("trade-off"):
        return _svg(_trade_off(report, width), "trade-off", width)


def _trade_off(report: Report, width: int) -> Figure:
    rows = facts.plotted(report)
    figure, axes = _figure(width, 420 if width == WIDE else 400, left=58, top=40 if width == WIDE else 90)
    x = [row.p50_ms or 0.0 for row in rows]
    y = [100 * (row.accuracy or 0.0) for row in rows]
    _scale_x(axes, x, pad=0.12 if width == WIDE else 0.2)
    span = max(max(y) - min(y), 1.0)
    axes.set_ylim(min(y) - 0.15 * span, max(y) + 0.15 * span)
    axes.set_xlabel("median latency, ms  (left is faster)")
    axes.set_ylabel(f"{report.metric}, %")
    axes.grid(True, color=COLOURS["line"], linewidth=1)
    front = facts.pareto(report)
    drawn = _draw_budgets(axes, report) + _draw_front(axes, front)
    for status in dict.fromkeys(row.status for row in rows):
        marker, colour, size = MARKERS[status]
        is_hollow = facts.SIGNS[status] == "○"
        these = [i for i, row in enumerate(rows) if row.status == status]
        axes.plot(
            [x[i] for i in these], [y[i] for i in these],
            linestyle="none", marker=marker, color=COLOURS[colour], markersize=size,
            fillstyle="none" if is_hollow else "full", markeredgewidth=1.6 if is_hollow else 1,
            markeredgecolor=COLOURS[colour if is_hollow else "card"],
            label=status, zorder=4 if status == "winner" else 3,
        )  # fmt: skip
    # The winner and float come first in ``rows``, so they have the choice of places.
    named = [row for row in rows if row in front or row.name in (report.winner, facts.float_name(report))]
    _label(figure, axes, named if len(rows) > 8 else rows, rows, drawn)
    figure.legend(
        loc="upper left", bbox_to_anchor=(0, 1), ncols=8 if width == WIDE else 2, frameon=False,
        handletextpad=0.3, columnspacing=1.2, borderaxespad=0.2, labelcolor=COLOURS["ink"],
    )  # fmt: skip
    return figure


def runs_svg(report: Report, comparison: Comparison, width: int, name: str) -> str:
    """Every run of every subject, one row each: along the row is latency, down the row is time.

    ``name`` makes the drawing's ids its own. Empty where nothing ran.
    """
    if not has_runs(comparison):
        return ""
    with _style(name):
        return _svg(_runs(report, comparison, width), name, width)


def _runs(report: Report, comparison: Comparison, width: int) -> Figure:
    measured = _in_order(report, comparison)
    figure, axes = _figure(width, ROW_PX * len(measured) + 70, left=12, top=4)
    # The axis is for those that stayed and for 99 of 100 runs: a spike or a hopeless rival would flatten the rest.
    stayed = [m for m in measured if m.dropped_after_round is None] or measured
    _scale_x(axes, [m.percentile_ms(q) for m in stayed for q in (0, 99)], pad=0.04)
    axes.set_ylim(len(measured) - 0.25, -0.62)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("latency of one run, ms")
    axes.grid(True, axis="x", color=COLOURS["line"], linewidth=1)
    names = notation.shortened([m.subject for m in measured], 44 if width == WIDE else 24)
    for i, (measurement, short) in enumerate(zip(measured, names, strict=True)):
        row = facts.row_of(report, measurement.subject)
        _draw_runs(axes, measurement, row, i)
        _write_row(axes, measurement, f"{facts.SIGNS[row.status]} {short}" if row else short, i, width)
    return figure


def has_runs(comparison: Comparison) -> bool:
    return any(m.turns_ms for m in comparison.measurements)


# --- parts ------------------------------------------------------------------------------------------------


def _draw_front(axes: Axes, front: Sequence[CandidateRow]) -> list[Artist]:
    """A step between neighbours: at a latency between theirs, the slower one's accuracy is not to be had."""
    drawn: list[Artist] = []
    for a, b in pairwise(front):
        x, y = (a.p50_ms or 0.0, b.p50_ms or 0.0), (100 * (a.accuracy or 0.0), 100 * (b.accuracy or 0.0))
        for xs, ys in (((x[0], x[1]), (y[0], y[0])), ((x[1], x[1]), (y[0], y[1]))):
            drawn += axes.plot(xs, ys, color=COLOURS["muted"], linewidth=1.2, zorder=2)
    return drawn


def _draw_budgets(axes: Axes, report: Report) -> list[Artist]:
    style: dict[str, Any] = {"color": COLOURS["bad"], "linewidth": 1.2, "linestyle": (0, (4, 3)), "zorder": 1}
    words: dict[str, Any] = {"color": COLOURS["bad"], "fontsize": FONT_PX - 1, "textcoords": "offset points"}
    drawn: list[Artist] = []
    base = facts.row_of(report, facts.float_name(report))
    if "max_drop" in report.budgets and base is not None and base.accuracy is not None:
        lowest = 100 * (base.accuracy - report.budgets["max_drop"])
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(bottom, lowest - 0.08 * (top - lowest)), top)
        drawn.append(axes.axhline(lowest, **style))
        drawn.append(axes.annotate("accuracy budget", (1, lowest), xycoords=("axes fraction", "data"),
                                   xytext=(-4, 4), ha="right", **words))  # fmt: skip
    if "max_latency_ms" in report.budgets:
        longest = report.budgets["max_latency_ms"]
        left, right = axes.get_xlim()
        # A budget far to the right would squeeze all points into a corner; the table states it anyway.
        if longest < 2 * right:
            axes.set_xlim(min(left, longest * 0.95), max(right, longest * 1.05))
            drawn.append(axes.axvline(longest, **style))
            drawn.append(axes.annotate("latency budget", (longest, 0), xycoords=("data", "axes fraction"),
                                       xytext=(-3, 6), ha="right", va="bottom", rotation=90, **words))  # fmt: skip
    return drawn


def _draw_runs(axes: Axes, measurement: Measurement, row: CandidateRow | None, i: int) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    samples = np.asarray(measurement.samples_ms())
    shown, depth = _thinned(samples)
    inside = shown <= axes.get_xlim()[1]
    points = np.stack([shown[inside], i + 0.46 * (depth[inside] - 0.5)], axis=1)
    # One path of dots (lines of no length with round ends) is a tenth of the text that one marker per run would be.
    dots = Path(np.repeat(points, 2, axis=0), np.tile([Path.MOVETO, Path.LINETO], len(points)))
    colour = COLOURS[MARKERS[row.status][1] if row else "accent"]
    axes.add_patch(PathPatch(dots, fill=False, edgecolor=colour, linewidth=3.2, capstyle="round", alpha=0.45))
    low, middle, high = np.percentile(samples, [25, 50, 75])
    for xs, ys in (((low, high), (i, i)), ((middle, middle), (i - 0.24, i + 0.24))):
        axes.plot(xs, ys, color=COLOURS["ink"], linewidth=2, solid_capstyle="butt", zorder=4)


def _write_row(axes: Axes, measurement: Measurement, name: str, i: int, width: int) -> None:
    samples = np.asarray(measurement.samples_ms())
    low, middle, high = np.percentile(samples, [25, 50, 75])
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "bottom"}
    spread = 100 * (high - low) / middle
    axes.annotate(
        f"{name} · {notation.ms(middle)} ms · spread {spread:.1f}%", (0, i - 0.3), xytext=(2, 0), ha="left",
        color=COLOURS["ink"], **place,
    )  # fmt: skip
    beyond = samples[samples > axes.get_xlim()[1]]
    if len(beyond):
        told = f"{notation.count(len(beyond), 'run')} beyond, to {notation.ms(float(beyond.max()))} ms →"
        axes.annotate(
            told if width == WIDE else f"{len(beyond)} →", (1, i - 0.3), xytext=(-2, 0), ha="right",
            color=COLOURS["muted"], fontsize=FONT_PX - 1, **place,
        )  # fmt: skip


def _thinned(samples: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """At most ``MAX_DOTS`` samples, evenly in time, and where in the whole each stands (0 to 1)."""
    n = len(samples)
    chosen = np.unique(np.linspace(0, n - 1, min(n, MAX_DOTS)).round().astype(int))
    return samples[chosen], (chosen + 0.5) / n


def _in_order(report: Report, comparison: Comparison) -> list[Measurement]:
    order = {row.name: i for i, row in enumerate(facts.in_order(report))}
    measured = [m for m in comparison.measurements if m.turns_ms]
    return sorted(measured, key=lambda m: (order.get(m.subject, len(order)), m.subject))


def _label(
    figure: Figure, axes: Axes, named: Sequence[CandidateRow], rows: Sequence[CandidateRow], lines: Sequence[Artist]
) -> None:
    """Write names beside their points where they cover nothing; the winner's may cover a line."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    under = [line.get_window_extent().padded(1.0) for line in lines]
    taken = []
    for row in rows:
        x, y = axes.transData.transform((row.p50_ms or 0.0, 100 * (row.accuracy or 0.0)))
        taken.append(Bbox.from_extents(x - 6, y - 6, x + 6, y + 6))
    for row, name in zip(named, notation.shortened([row.name for row in named], 40), strict=True):
        tries = [(taken + under, place) for place in PLACES]
        if row.status == "winner":
            tries += [(taken, place) for place in PLACES]
        for avoided, place in tries:
            label = _write_name(axes, row, name, place)
            box = label.get_window_extent()
            if _contains(axes.get_window_extent(), box) and not any(box.overlaps(other) for other in avoided):
                taken.append(box)
                break
            label.remove()


def _write_name(axes: Axes, row: CandidateRow, name: str, place: tuple[int, int]) -> Artist:
    dx, dy = place
    return axes.annotate(
        name, (row.p50_ms or 0.0, 100 * (row.accuracy or 0.0)), xytext=place, textcoords="offset points",
        ha="left" if dx > 0 else "right" if dx < 0 else "center",
        va="bottom" if dy > 0 else "top" if dy < 0 else "center",
        fontweight="bold" if row.status == "winner" else "normal", color=COLOURS["ink"], zorder=5,
    )  # fmt: skip


def _contains(frame: BboxBase, box: BboxBase) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def _scale_x(axes: Axes, values: Sequence[float], *, pad: float) -> None:
    """Linear, or logarithmic where the largest is more than eight times the smallest, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    if low > 0 and high / low > 8:
        axes.set_xscale("log")
        margin = (high / low) ** pad
        axes.set_xlim(low / margin, high * margin)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        margin = pad * max(high - low, 0.1 * high, 1e-6)
        axes.set_xlim(low - margin, high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@contextmanager
def _style(name: str) -> Iterator[None]:
    """Matplotlib's defaults and ours, whatever the user's own settings are."""
    from matplotlib import style

    settings = {
        "font.size": FONT_PX,
        "path.simplify": False,  # it would drop lines of no length, which are the dots of ``_draw_runs``
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
    }
    with style.context(["default", settings]):
        yield


def _figure(width: int, height: int, *, left: int, top: int) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(COLOURS["muted"])
    axes.tick_params(colors=COLOURS["muted"], labelcolor=COLOURS["ink"], labelsize=FONT_PX - 1, length=3)
    axes.xaxis.label.set(color=COLOURS["ink"], fontsize=FONT_PX)
    axes.yaxis.label.set(color=COLOURS["ink"], fontsize=FONT_PX)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    bottom, right = 44, 12
    axes.set_position((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
    return figure, axes


def _svg(figure: Figure, name: str, width: int) -> str:
    target = io.StringIO()
    figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(target.getvalue(), f"{name}-{width}")


def _inline(svg: str, name: str) -> str:
    """Only the drawing: no prologue, no style that would reach the page's other elements, ids of its own."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    viewbox = re.search(r'viewBox="[^"]*"', body)
    assert viewbox is not None
    body = f'<svg {viewbox.group()} aria-hidden="true">{body[body.index(">") + 1 :]}'
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    for variable, stand_in in COLOURS.items():
        body = body.replace(stand_in, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", body).strip()
