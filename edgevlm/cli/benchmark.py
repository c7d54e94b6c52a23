"""`edgevlm benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevlm.cli.common import Output, output_options

if TYPE_CHECKING:
    from edgevlm.measure.bundles import BundleBenchmark
    from edgevlm.measure.spec import Comparison


@click.command("benchmark")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads for all; as compiled where left out.")
@click.option("--rounds", type=click.IntRange(min=6), help="Turns that each takes at most; 40 where left out.")
@output_options
def benchmark_command(bundles: tuple[Path, ...], threads: int | None, rounds: int | None, output: Output) -> None:
    """Time bundles here, in turns, each in a process of its own; ratios are to the first.

    \b
    Examples:
      edgevlm benchmark mobilenet-cpu/
      edgevlm benchmark float/ int8/ --threads 1 --json
    """
    from edgevlm.measure.bundles import benchmark_bundles
    from edgevlm.measure.spec import Protocol

    protocol = Protocol(n_rounds=rounds, min_rounds=min(rounds, Protocol().min_rounds)) if rounds else Protocol()
    with output.progress() as progress:
        found = benchmark_bundles(*bundles, n_threads=threads, protocol=protocol, progress=progress)
    output.value(found, lambda: benchmark_text(found))


def benchmark_text(found: BundleBenchmark) -> str:
    """A table for each graph and for the whole way, with what casts doubt on it."""
    return "\n\n".join(_table(what, comparison) for what, comparison in found.comparisons.items())


def _table(what: str, comparison: Comparison) -> str:
    from edgevlm.cli.tables import table_text
    from edgevlm.report.notation import ms, size

    rows: list[tuple[str, ...]] = []
    for each in comparison.measurements:
        if each.failure is not None:
            rows.append((each.subject, "failed", "", "", "", "", each.failure))
            continue
        ratio = comparison.ratio(each.subject)
        versus = "–" if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        percentiles = [ms(each.percentile_ms(q)) for q in (50, 90, 99)]
        rows.append((each.subject, *percentiles, ms(each.load_ms), size(each.memory_bytes), versus))
    header = (what, "p50 ms", "p90 ms", "p99 ms", "load ms", "memory", "÷ first [95 %]")
    text = table_text(header, rows, right=range(1, 7))
    doubts = "".join(f"\nnot valid: {reason}" for reason in comparison.reasons)
    return text + doubts
