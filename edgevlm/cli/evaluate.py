"""`edgevlm evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevlm.cli.common import Output, output_options

if TYPE_CHECKING:
    from edgevlm.evaluation.evaluation import BundleEvaluation


@click.command("evaluate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="Folders by class, a CSV, COCO JSON, masks, a datasets folder, 'shapes'.")
@click.option("--reference", type=click.Path(path_type=Path), help="Another bundle to state the difference from.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; as compiled where left out.")
@output_options
def evaluate_command(bundle: Path, data: str, reference: Path | None, threads: int | None, output: Output) -> None:
    """Judge a bundle on a data set by its task's metric, with the interval.

    \b
    Examples:
      edgevlm evaluate mobilenet-cpu/ --data ./pictures
      edgevlm evaluate int8/ --data ./pictures --reference float/
    """
    from edgevlm.evaluation.evaluation import evaluate_bundle
    from edgevlm.progress import counting
    from edgevlm.store import cache_root

    with output.progress() as progress, counting("evaluate", f"{bundle} on {data}", progress) as count:
        found = evaluate_bundle(
            bundle, data, reference=reference, n_threads=threads, cache=cache_root() / "digests", count=count
        )
    output.value(found, lambda: evaluation_text(found))


def evaluation_text(found: BundleEvaluation) -> str:
    """For people: the metric with its interval, further metrics, the drop, and what the bundle says of itself."""
    lines = [
        f"{found.metric} {found.value:.2%} (95 % interval {found.low:.2%} to {found.high:.2%}) "
        f"on {found.n} pictures of {found.data}"
    ]
    lines += [f"{name} {value:.2%}" for name, value in found.others.items()]
    if found.drop is not None:
        drop = found.drop
        lines.append(
            f"drop from the reference {drop.value:.2%} (95 % interval {drop.low:.2%} to {drop.high:.2%}): "
            f"{drop.n_worse} pictures worse, {drop.n_better} better"
        )
    if found.recorded is not None:
        recorded = found.recorded
        lines.append(
            f"when it was compiled: {recorded.metric} {recorded.value:.2%} on {recorded.n} pictures of {recorded.data}"
        )
    return "\n".join((*lines, *(f"note: {note}" for note in found.notes)))
