"""`edgevlm benchmark`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevlm.cli.common import Output, device_option, output_options
from edgevlm.errors import UsageError

if TYPE_CHECKING:
    from edgevlm.evaluation.evaluation import BundleEvaluation
    from edgevlm.measure.bundles import BundleBenchmark
    from edgevlm.measure.conditions import Conditions
    from edgevlm.measure.spec import Comparison, Measurement
    from edgevlm.progress import Progress
    from edgevlm.report.side_by_side import SideBySide


@click.command("benchmark")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads for all; as compiled where left out.")
@click.option("--rounds", type=click.IntRange(min=6), help="Turns that each takes at most; 40 where left out.")
@click.option("--data", metavar="DATA", help="Judge the bundles on these pictures too, as `edgevlm evaluate` does.")
@click.option("--report", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Write the bundles side by side to FOLDER: side-by-side.html, .md and .json.")  # fmt: skip
@device_option
@output_options
def benchmark_command(
    bundles: tuple[Path, ...],
    threads: int | None,
    rounds: int | None,
    data: str | None,
    report: Path | None,
    device: str | None,
    output: Output,
) -> None:
    """Time bundles here or on a device, in turns, each in a process of its own; ratios are to the first.

    \b
    Examples:
      edgevlm benchmark mobilenet-cpu/
      edgevlm benchmark float/ int8/ --threads 1 --json
      edgevlm benchmark teacher/ student/ --data ./pictures --report side-by-side
      edgevlm benchmark float/ int8/ --device ssh://user@host
    """
    if device is not None:
        if data is not None or report is not None:
            raise UsageError(
                "Bundles are judged and shown side by side on this machine, not on a device.",
                hint="Leave --device out, or --data and --report.",
            )
        from edgevlm.devices import open_device
        from edgevlm.devices.verbs import benchmark_on

        with output.progress() as progress, open_device(device, progress=progress) as opened:
            there = benchmark_on(opened, bundles, n_threads=threads, n_rounds=rounds)
            where = opened.name
        output.value(there, lambda: f"{benchmark_text(there)}, reached as {where}")
        return
    from edgevlm.measure.bundles import benchmark_bundles
    from edgevlm.measure.protocol import ALL_STAY, with_rounds

    if report is not None:
        from edgevlm.extras import require_compile
        from edgevlm.store import storing

        require_compile("benchmark --report")
        with storing(report):
            report.mkdir(parents=True, exist_ok=True)
    protocol = with_rounds(ALL_STAY, rounds) if rounds else ALL_STAY
    with output.progress() as progress:
        # What can be wrong with the data is known before minutes of timing.
        evaluations = _judged(bundles, data, threads, progress) if data is not None else ()
        found = benchmark_bundles(*bundles, n_threads=threads, protocol=protocol, progress=progress)
    if data is None and report is None:
        output.value(found, lambda: benchmark_text(found))
        return
    from edgevlm.report.side_by_side import side_by_side, write_side_by_side

    beside = side_by_side(found, evaluations)
    pages = write_side_by_side(beside, report) if report is not None else ()
    output.value(beside, lambda: "\n\n".join((benchmark_text(found), *_beside(beside, pages))))


def _judged(
    bundles: Sequence[Path], data: str, n_threads: int | None, progress: Progress
) -> tuple[BundleEvaluation, ...]:
    from edgevlm.evaluation.evaluation import evaluate_bundles
    from edgevlm.progress import counting
    from edgevlm.store import cache_root

    with counting("evaluate", f"{len(bundles)} bundles on {data}", progress) as count:
        return evaluate_bundles(bundles, data, n_threads=n_threads, cache=cache_root() / "digests", count=count)


def _beside(found: SideBySide, pages: Sequence[Path]) -> list[str]:
    from edgevlm.cli.tables import block_text

    blocks = [block_text(row[0], list(zip(found.header[1:], row[1:], strict=True))) for row in found.rows]
    return [*blocks, *([f"Side by side  {pages[0]}"] if pages else [])]


def benchmark_text(found: BundleBenchmark) -> str:
    """A table for each graph and for the whole way, each with its verdict, and where all of it was measured."""
    width, height = found.picture_size
    where = f"on {found.environment.machine}, with a picture of {width} × {height}"
    return "\n\n".join((*(_table(found, what) for what in found.comparisons), where))


def _table(found: BundleBenchmark, what: str) -> str:
    from edgevlm.cli.tables import table_text
    from edgevlm.report.notation import MISSING, ms, size

    comparison, batch = found.comparisons[what], found.batches.get(what, 1)
    title = what if batch == 1 else f"{what}, {batch} in a run"
    has_energy = any(each.energy_j() is not None for each in comparison.measurements)
    rows = []
    for each in comparison.measurements:
        ratio = comparison.ratio(each.subject)
        percentiles = [ms(each.percentile_ms(q)) if each.turns_ms else MISSING for q in (50, 90, 99)]
        versus = MISSING if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        energy = [_mj(each.energy_j())] if has_energy else []
        rows.append((each.subject, *percentiles, ms(each.load_ms), size(each.memory_bytes), *energy, versus))
    energy = ["mJ a run"] if has_energy else []
    header = (title, "p50 ms", "p90 ms", "p99 ms", "load ms", "memory", *energy, "÷ first [95 %]")
    failures = [f"failed: {each.subject}: {each.failure}" for each in comparison.measurements if each.failure]
    return "\n".join(
        (
            table_text(header, rows, right=range(1, len(header))),
            *failures,
            *_verdict(comparison),
            *_conditions(comparison.conditions),
        )
    )


def _mj(energy_j: float | None) -> str:
    from edgevlm.report.notation import MISSING

    return MISSING if energy_j is None else f"{energy_j * 1e3:.3g}"


def _verdict(comparison: Comparison) -> list[str]:
    """Whether the figures are to be trusted, and under what they were taken."""
    if not comparison.is_valid:
        again = " (measured twice)" if comparison.was_extended else ""
        return [f"not valid{again}: {reason}" for reason in comparison.reasons]
    n_rounds = max(len(each.turns_ms) for each in comparison.measurements)
    load = "" if comparison.other_load is None else f"; others took {comparison.other_load:.0%} of the CPU"
    return [f"valid: {n_rounds} rounds, {_threads(comparison.measurements)}{load}"]


def _conditions(found: Conditions | None) -> list[str]:
    """What the machine said of itself, a line."""
    if found is None:
        return []
    texts = found.to_texts()
    told = ", ".join(f"{name} {text}" for name, text in texts.items() if text is not None)
    untold = ", ".join(name for name, text in texts.items() if text is None)
    return ["; ".join(part for part in (told, f"not available: {untold}" if untold else "") if part)]


def _threads(measurements: Sequence[Measurement]) -> str:
    from edgevlm.report.notation import count

    numbers = {each.n_threads for each in measurements}
    if len(numbers) == 1:
        return count(numbers.pop(), "thread")
    return "threads: " + ", ".join(f"{each.subject} {each.n_threads}" for each in measurements)
