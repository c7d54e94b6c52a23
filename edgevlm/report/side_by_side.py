"""Bundles of one task side by side: what each is, how large, how right and how fast.

Made for a student beside its teacher; any bundles that can be compared will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgevlm.evaluation.evaluation import BundleEvaluation
from edgevlm.measure.bundles import WHOLE, BundleBenchmark
from edgevlm.measure.spec import Comparison
from edgevlm.report import notation
from edgevlm.report.markdown import table as markdown_table
from edgevlm.report.markdown import text as escaped
from edgevlm.report.pages import Page, PageRow, write_page
from edgevlm.runtime.bundle import open_bundle
from edgevlm.runtime.spec import Manifest, Spec, to_json

STEM = "side-by-side"


class SideBySide(Spec, frozen=True, kw_only=True):
    """``side-by-side.json``: what was measured, and the rows of the table.

    Args: evaluations: in the bundles' order; none where no data was named.
    """

    benchmark: BundleBenchmark
    evaluations: tuple[BundleEvaluation, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def side_by_side(benchmark: BundleBenchmark, evaluations: Sequence[BundleEvaluation] = ()) -> SideBySide:
    """The table: a row for each bundle, in their order.

    Raises: BundleError: a bundle is not there any more.
    """
    judged: Sequence[BundleEvaluation | None] = evaluations or [None] * len(benchmark.bundles)
    times = [what for what in benchmark.comparisons if what != WHOLE]
    header = [
        "bundle",
        "ships",
        "size",
        *(f"{what.replace('_', ' ')}, ms" for what in (*times, WHOLE)),
        "× the first, end to end",
    ]
    if evaluations:
        header[3:3] = [f"{evaluations[0].metric} [95 %]", "drop from the first, points [95 %]"]
    rows = []
    for name, found in zip(benchmark.bundles, judged, strict=True):
        manifest = open_bundle(name).manifest
        n_bytes = sum(file.n_bytes for file in manifest.files)
        row = [f"{name} ({manifest.name})", _ships(manifest), notation.size(n_bytes)]
        if found is not None:
            row += [_value(found), _drop(found)]
        row += [_p50(benchmark.comparisons[what], name) for what in (*times, WHOLE)]
        row.append(_faster(benchmark.comparisons[WHOLE], name))
        rows.append(tuple(row))
    return SideBySide(benchmark=benchmark, evaluations=tuple(evaluations), header=tuple(header), rows=tuple(rows))


def write_side_by_side(found: SideBySide, folder: Path) -> tuple[Path, ...]:
    """``side-by-side.html``, ``.md`` and ``.json`` in ``folder``, which is made where it is not there.

    Raises: StoreError: it cannot be written.
    """
    title = f"{len(found.rows)} bundles for {found.benchmark.task}"
    page = Page(
        title=title,
        over=found.benchmark.environment.machine,
        verdict=conditions(found),
        caption="Bundles with what ships, size, accuracy and times",
        header=found.header,
        rows=tuple(PageRow(link="", cells=row) for row in found.rows),
    )
    return write_page(page, markdown_of(found, title), to_json(found).decode(), folder, STEM)


def markdown_of(found: SideBySide, title: str) -> str:
    rows = [[escaped(cell) for cell in row] for row in found.rows]
    table = markdown_table([escaped(cell) for cell in found.header], ["---"] * len(found.header), rows)
    return f"# {escaped(title)}\n\n{table}\n\n{escaped(conditions(found))}\n"


def conditions(found: SideBySide) -> str:
    """Where and on what, in a sentence or two, with what is not to be trusted."""
    width, height = found.benchmark.picture_size
    told = (
        f"Medians in turns on {found.benchmark.environment.machine}, end to end with a picture of {width} × {height}."
    )
    if found.evaluations:
        first = found.evaluations[0]
        told += f" Judged on {notation.count(first.n, 'picture')} of {first.data}."
    doubts = [
        f"{what}: {reason}"
        for what, comparison in found.benchmark.comparisons.items()
        if not comparison.is_valid
        for reason in comparison.reasons
    ]
    return " ".join((told, *doubts))


def _ships(manifest: Manifest) -> str:
    parts = [f"{part.precision} ({part.backend})" for part in manifest.components]
    if len(set(parts)) == 1:
        return parts[0]
    return ", ".join(f"{part.name} {told}" for part, told in zip(manifest.components, parts, strict=True))


def _value(found: BundleEvaluation) -> str:
    return f"{notation.percent(found.value)} [{notation.percent(found.low)}, {notation.percent(found.high)}]"


def _drop(found: BundleEvaluation) -> str:
    if found.drop is None:
        return notation.MISSING
    drop = found.drop
    return f"{notation.points(drop.value)} [{notation.points(drop.low)}, {notation.points(drop.high)}]"


def _p50(comparison: Comparison, name: str) -> str:
    measured = next((each for each in comparison.measurements if each.subject == name), None)
    return notation.MISSING if measured is None or not measured.turns_ms else notation.ms(measured.percentile_ms(50))


def _faster(comparison: Comparison, name: str) -> str:
    """How many times as fast as the first, with the interval turned round."""
    ratio = comparison.ratio(name)
    if ratio is None:
        return notation.MISSING
    return f"{1 / ratio.value:.2f} [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]"
