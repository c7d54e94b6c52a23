"""``report.md``: the same facts as GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from edgevlm.report import facts, notation, where
from edgevlm.report.spec import CandidateRow, Report

NUMERIC = "---:"
TEXT = "---"


def markdown_from_report(report: Report) -> str:
    sections = (
        _top(report),
        _cautions(report),
        _forms(report),
        _candidates(report),
        _sensitivity(report),
        _instructions(report),
        *(_where(item) for item in where.where_time_goes(report)),
        _section("How accuracy was judged", _pairs(facts.how_judged(report))),
        _section("Budgets", _pairs(facts.budgets(report))),
        _proofs(report),
        *(_measurement(item) for item in facts.validity(report)),
        _section("Environment", _pairs(facts.environment_facts(report.environment))),
        _steps(report),
        _section("Reproduce", _code(report.reproduce)),
        _section("Provenance and tools", _pairs(facts.provenance_facts(report))),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _top(report: Report) -> str:
    rows = [
        (text(figure.label), f"**{figure.text()}**", text("; ".join(figure.notes)))
        for figure in facts.key_figures(report)
    ]
    drawn = table(("", "", ""), (TEXT, NUMERIC, TEXT), rows)
    subtitle = f"{report.title} · {report.task} · target {report.target}"
    return f"# {text(facts.headline(report))}\n\n{text(subtitle)}\n\n{text(report.verdict)}\n\n{drawn}"


def _cautions(report: Report) -> str:
    return "\n>\n".join(f"> **Warning.** {text(caution)}" for caution in facts.cautions(report))


def _forms(report: Report) -> str:
    if not report.forms:
        return ""
    rows = [[text(cell) for cell in row] for row in facts.form_rows(report)]
    return _section("Forms to tune", table(facts.FORMS_HEADER, (TEXT, TEXT, NUMERIC, TEXT, TEXT, TEXT), rows))


def _candidates(report: Report) -> str:
    if not report.candidates:
        return _section("Candidates", "No candidate was made.")
    columns = [column for column in COLUMNS if column.is_shown(report)]
    header = [column.title.format(metric=report.metric) for column in columns]
    rows = [[column.cell(row) for column in columns] for row in facts.in_order(report)]
    drawn = table(map(text, header), [column.alignment for column in columns], rows)
    return _section("Candidates", f"{drawn}\n\n{text(facts.about_candidates(report))}")


def _sensitivity(report: Report) -> str:
    if not report.sensitivities:
        return ""
    rows = [[text(cell) for cell in row] for row in facts.sensitivity_rows(report)]
    drawn = table(facts.SENSITIVITY_HEADER, (TEXT, TEXT) + (NUMERIC,) * 4, rows)
    return _section("What each group costs and saves", f"{text(facts.about_sensitivity(report))}\n\n{drawn}")


def _instructions(report: Report) -> str:
    counted = report.instructions
    if counted is None:
        return ""
    header = [text(cell) for cell in facts.instructions_header(counted)]
    rows = [[text(cell) for cell in row] for row in facts.instruction_rows(counted)]
    drawn = table(header, (TEXT,) + (NUMERIC,) * len(counted.graphs), rows)
    return _section("Instructions", "\n\n".join([drawn, *map(text, facts.about_instructions(counted))]))


@dataclass(frozen=True)
class Column:
    title: str
    cell: Callable[[CandidateRow], str]
    is_shown: Callable[[Report], bool] = lambda report: True
    alignment: str = NUMERIC


COLUMNS = (
    Column(
        "candidate", lambda row: f"**{text(row.name)}**<br>{text(row.precision)}, {text(row.backend)}", alignment=TEXT
    ),
    Column("verdict", lambda row: f"{facts.SIGNS[row.status]} {row.status}<br>{text(row.reason)}", alignment=TEXT),
    Column("p50 ms", lambda row: notation.ms(row.p50_ms), facts.is_timed),
    Column("p90 ms", lambda row: notation.ms(row.p90_ms), facts.is_timed),
    Column("p99 ms", lambda row: notation.ms(row.p99_ms), facts.is_timed),
    Column("time ÷ float", facts.ratio_text, facts.is_timed),
    Column("{metric}, select split", lambda row: notation.percent(row.accuracy), facts.is_judged),
    Column("drop, points", facts.row_drop_text, facts.is_judged),
    Column("size", lambda row: notation.size(row.size_bytes)),
    Column("memory", lambda row: notation.size(row.memory_bytes), facts.is_timed),
    Column("load ms", lambda row: notation.ms(row.load_ms), facts.is_timed),
)


def _where(item: where.WhereTimeGoes) -> str:
    parts = [text(item.lead)]
    if item.bars:
        rows = [(text(bar.kind), *(notation.ms(value) for value in bar.times_ms)) for bar in item.bars]
        header = ("operators", *(f"{text(form.name)}, ms" for form in item.forms))
        parts.append(table(header, (TEXT,) + (NUMERIC,) * len(item.forms), rows))
    if item.roofs:
        header = ("graph", "GMAC/s", "computes in", "best rate here, GMAC/s", "share of it")
        roofs = [
            (
                text(r.name),
                notation.ms(r.gmac_per_s),
                text(r.precision),
                notation.ms(r.best_gmac_per_s),
                r.fraction_text,
            )
            for r in item.roofs
        ]
        parts += [table(header, (TEXT, NUMERIC, TEXT, NUMERIC, NUMERIC), roofs), text(item.about_roofs)]
    parts += [f"- **{text(f.kind)}.** {text(f.what)} {text(f.remedy)}" for f in item.findings]
    if item.operators:
        header = ("operator", "type as run", "computes in", "ms", "share")
        slowest = [
            (text(o.name), text(o.op_type), text(o.precision), notation.ms(o.time_ms), notation.percent(o.share))
            for o in item.operators
        ]
        parts += [text(item.about_operators), table(header, (TEXT, TEXT, TEXT, NUMERIC, NUMERIC), slowest)]
    return _section(item.title, "\n\n".join([*parts, *(text(note) for note in item.notes)]))


def _proofs(report: Report) -> str:
    header = ("graph", "exported by", "nodes", "inputs", "batches", "largest relative error", "tolerance")
    rows = [
        (
            text(proof.component),
            text(proof.route),
            f"{proof.n_nodes:,}",
            str(proof.n_inputs),
            ", ".join(map(str, proof.batches)),
            notation.error(proof.max_relative_error),
            notation.error(proof.tolerance),
        )
        for proof in report.proofs
    ]
    body = table(header, (TEXT, TEXT) + (NUMERIC,) * 5, rows) if rows else "Nothing was exported, so nothing to prove."
    return _section("Proof of export", "\n\n".join((body, *map(text, facts.about_lengths(report)))))


def _measurement(item: facts.Validity) -> str:
    state = "✓ valid" if item.is_valid else "✕ not valid"
    reasons = "".join(f"\n- {text(reason)}" for reason in item.reasons)
    parts = [f"**{state}**{chr(10) + reasons if reasons else ''}", _pairs(item.facts)]
    if item.subjects:
        parts.append(_pairs(item.subjects))
    return _section(item.title, "\n\n".join(parts))


def _steps(report: Report) -> str:
    rows = [
        (text(step.name), "looked up" if step.hit else "made", notation.seconds(step.wall_s), text(step.why))
        for step in report.steps
    ]
    body = table(("step", "result", "took", "why"), (TEXT, TEXT, NUMERIC, TEXT), rows)
    return _section("Steps", f"{facts.steps_summary(report)}\n\n{body}") if rows else ""


def _section(title: str, body: str) -> str:
    return f"## {text(title)}\n\n{body}" if body else ""


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    return table(("", ""), (TEXT, TEXT), [(text(term), text(value)) for term, value in rows]) if rows else ""


def table(header: Iterable[str], alignments: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, alignments, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(command: str) -> str:
    """A fence longer than any run of backticks in the command."""
    longest = max((len(run) for run in re.findall(r"`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{command}\n{fence}"


def text(words: str) -> str:
    """Words that Markdown and HTML leave alone, on one line, safe in a table's cell.

    Example:
        >>> print(text("a|b_c _d_ <i>"))
        a\\|b_c \\_d\\_ &lt;i&gt;
    """
    one_line = " ".join(words.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line)
