"""Plain text for the terminal: aligned tables, and the summary at the end of a compile."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from edgevlm.report import facts, notation
from edgevlm.report.spec import CandidateRow, Report

# Beyond this many lines the terminal's first page no longer shows the verdict.
MAX_ROWS = 12

# A name cut shorter than this tells little; then the intervals of the ratios go instead.
MIN_NAME = 16


def summary_text(report: Report, *, bundle: Path | None = None, width: int = 96) -> str:
    """What a compile found, for a terminal ``width`` columns wide: verdict, candidates, and where things lie."""
    parts = [facts.headline(report), _wrapped(report.verdict, width)]
    if report.candidates:
        parts.append(_candidates(report, width))
    cautions = [_wrapped(f"warning: {caution}", width, hang=9) for caution in facts.cautions(report)]
    if cautions:
        parts.append("\n".join(cautions))
    parts.append("\n".join(_claims(report, bundle, width)))
    return "\n\n".join(parts) + "\n"


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Columns two spaces apart, as wide as their longest cell; those at the indices ``right`` end flush.

    Example:
        >>> print(table_text(("name", "ms"), (("fp32", "7.74"), ("int8", "10.1")), right=(1,)))
        name    ms
        fp32  7.74
        int8  10.1
    """
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = []
    for line in (header, *rows):
        cells = [
            cell.rjust(size) if i in right else cell.ljust(size)
            for i, (cell, size) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def block_text(title: str, pairs: Sequence[tuple[str, str]], width: int = 96) -> str:
    """A title, and below it terms with what is to be said of them, wrapped beside the terms."""
    left = max(len(term) for term, _ in pairs) + 4
    lines = [_wrapped(f"  {term:<{left - 2}}{words}", width, hang=left) for term, words in pairs]
    return "\n".join([title, *lines])


def _candidates(report: Report, width: int) -> str:
    rows = facts.in_order(report)
    shown = rows[:MAX_ROWS]
    lines = _lines(report, shown, has_intervals=True)
    room = _room(lines, width)
    if room < MIN_NAME:
        lines = _lines(report, shown, has_intervals=False)
        room = max(_room(lines, width), 8)
    names = notation.shortened([line[0] for line in lines[1:]], room)
    body = [[name, *line[1:]] for name, line in zip(names, lines[1:], strict=True)]
    table = table_text(lines[0], body, right=range(2, len(lines[0])))
    notes = [f"and {len(rows) - MAX_ROWS} more in the report"] if len(rows) > MAX_ROWS else []
    if facts.is_judged(report):
        note = f"{report.metric} and drop (in points) here are on the select split: they choose, they claim nothing."
        notes.append(_wrapped(note, width))
    if report.pareto:
        notes.append(_wrapped(facts.front_text(report), width))
    return "\n".join((table, *notes))


def _lines(report: Report, rows: Sequence[CandidateRow], *, has_intervals: bool) -> list[list[str]]:
    """The header and a line for each row."""
    columns: list[tuple[str, Callable[[CandidateRow], str]]] = [
        ("candidate", lambda row: row.name),
        ("verdict", lambda row: f"{facts.SIGNS[row.status]} {row.status}"),
    ]
    if facts.is_timed(report):
        columns.append(("p50 ms", lambda row: notation.ms(row.p50_ms)))
        columns.append(("÷ float", facts.ratio_text if has_intervals else lambda row: notation.times(row.ratio)))
    if facts.is_judged(report):
        columns.append((report.metric, lambda row: notation.percent(row.accuracy)))
        columns.append(("drop", lambda row: notation.points(row.drop)))
    columns.append(("size", lambda row: notation.size(row.size_bytes)))
    return [[title for title, _ in columns], *([cell(row) for _, cell in columns] for row in rows)]


def _room(lines: Sequence[Sequence[str]], width: int) -> int:
    """What is left for a candidate's name."""
    return width - sum(2 + max(len(line[i]) for line in lines) for i in range(1, len(lines[0])))


def _claims(report: Report, bundle: Path | None, width: int) -> list[str]:
    figures = [figure for figure in facts.key_figures(report) if figure.value != notation.MISSING]
    values = [figure.text() for figure in figures]
    terms = [figure.label for figure in figures] + (["Bundle", "Report"] if bundle else [])
    left = max(map(len, terms)) + 2
    middle = max(map(len, values)) + 2
    lines = [
        _wrapped(f"{figure.label:<{left}}{value:<{middle}}{'; '.join(figure.notes)}", width, hang=left + middle)
        for figure, value in zip(figures, values, strict=True)
    ]
    if bundle:
        # Paths are never wrapped: people copy them.
        lines += [f"{'Bundle':<{left}}{bundle}", f"{'Report':<{left}}{bundle / 'report' / 'report.html'}"]
    return lines


def _wrapped(text: str, width: int, *, hang: int = 0) -> str:
    return textwrap.fill(text, width, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False)
