"""One model for several targets: a row for each, with what was verified where, and what was not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgevlm.report import facts, notation
from edgevlm.report.markdown import table as markdown_table
from edgevlm.report.markdown import text as escaped
from edgevlm.report.pages import Page, PageRow, write_page
from edgevlm.report.spec import Report, ShippedForm
from edgevlm.runtime.spec import Spec, to_json

HEADER = ("target", "status", "ships", "size", "accuracy on the report split", "verified", "not proven")


class Outcome(Spec, frozen=True, kw_only=True):
    """What came of a compile for one target.

    Args:
        bundle: relative to the overview; empty where there is none.
        failure: why not, in a sentence.
    """

    target: str
    bundle: str = ""
    report: Report | None = None
    failure: str = ""
    exit_code: int = 0


class Overview(Spec, frozen=True, kw_only=True):
    """``targets.json``: the rows of the table, and each bundle's place; all else stands in the bundles' own reports."""

    model: str
    targets: tuple[TargetRow, ...]


class TargetRow(Spec, frozen=True, kw_only=True):
    """One target in words, under ``HEADER``."""

    target: str
    bundle: str
    status: str
    ships: str
    size: str
    accuracy: str
    verified: str
    unproven: str

    def cells(self) -> tuple[str, ...]:
        return (self.target, self.status, self.ships, self.size, self.accuracy, self.verified, self.unproven)


def overview_of(model: str, outcomes: Sequence[Outcome]) -> Overview:
    return Overview(model=model, targets=tuple(_row(outcome) for outcome in outcomes))


def write_overview(overview: Overview, directory: Path) -> tuple[Path, ...]:
    """``targets.html``, ``targets.md`` and ``targets.json``.

    Raises: StoreError: the directory cannot be written.
    """
    page = Page(
        title=f"{overview.model}, target by target",
        over=notation.count(len(overview.targets), "target"),
        verdict="Speed is claimed only where it was measured; each bundle's own report says more.",
        caption="Targets with status, what ships, size, accuracy, what was verified and what was not",
        header=HEADER,
        rows=tuple(
            PageRow(link=f"{row.bundle}/report/report.html" if row.bundle else "", cells=row.cells())
            for row in overview.targets
        ),
    )
    return write_page(page, markdown_of(overview), to_json(overview).decode(), directory, "targets")


def markdown_of(overview: Overview) -> str:
    rows = [[escaped(cell) for cell in row.cells()] for row in overview.targets]
    table = markdown_table([escaped(title) for title in HEADER], ["---"] * len(HEADER), rows)
    return f"# {escaped(overview.model)}, target by target\n\n{table}\n"


def _row(outcome: Outcome) -> TargetRow:
    report = outcome.report
    if report is None:
        blank = notation.MISSING
        return TargetRow(
            target=outcome.target, bundle="", status="failed", ships=blank, size=blank, accuracy=blank,
            verified=outcome.failure, unproven="everything",
        )  # fmt: skip
    if report.forms:
        return _offered_row(outcome, report)
    winner = facts.row_of(report, report.winner)
    speed = facts.key_figures(report)[0]
    where = f"Timed and judged on this machine ({report.environment.machine})."
    unproven = "; ".join(reason for comparison in report.comparisons for reason in comparison.reasons)
    return TargetRow(
        target=outcome.target,
        bundle=outcome.bundle,
        status=report.selection,
        ships=f"{report.winner} ({winner.precision if winner else ''}), {speed.text()} the speed of float",
        size=notation.size(report.size_bytes),
        accuracy=_accuracy(report),
        verified=where,
        unproven=unproven or "nothing",
    )


def _offered_row(outcome: Outcome, report: Report) -> TargetRow:
    """Several forms, none of them timed: what all of them have in common is said once."""
    statuses = dict.fromkeys(form.status for form in report.forms)
    counted = [f"{status}: {sum(form.status == status for form in report.forms)}" for status in statuses]
    sizes = sorted(form.size_bytes for form in report.forms)
    return TargetRow(
        target=outcome.target,
        bundle=outcome.bundle,
        status=f"unmeasured ({', '.join(counted)})",
        ships=", ".join(f"{form.name} ({form.precision})" for form in report.forms),
        size=f"{notation.size(sizes[0])} to {notation.size(sizes[-1])} a form",
        accuracy=_range(report.forms),
        verified=" ".join(dict.fromkeys(sentence for form in report.forms for sentence in form.verified)),
        unproven=" ".join(dict.fromkeys(sentence for form in report.forms for sentence in form.unproven)),
    )


def _range(forms: Sequence[ShippedForm]) -> str:
    """Float's, and that of the form that loses most."""
    first, worst = forms[0], max(forms, key=lambda form: form.accuracy.drop)
    told = f"{first.accuracy.metric} {notation.percent(first.accuracy.value)} in float"
    if worst.accuracy.drop <= 0:
        return f"{told}, no form less"
    return f"{told}, {notation.percent(worst.accuracy.value)} at worst ({worst.name})"


def _accuracy(report: Report) -> str:
    accuracy = report.accuracy
    if accuracy is None:
        return "not judged"
    return f"{accuracy.metric} {notation.percent(accuracy.value)}, {facts.drop_text(report)}"
