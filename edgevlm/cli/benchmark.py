"""`edgevlm benchmark`."""

from __future__ import annotations

from pathlib import Path

import click

from edgevlm.cli.common import Output, output_options


@click.command("benchmark")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads for all; as compiled where left out.")
@click.option("--rounds", type=click.IntRange(min=3), help="Turns that each gets; more where left out.")
@click.option(
    "--pictures", "data", help="A picture to time with; the bundle's golden ones where left out.", hidden=True
)
@output_options
def benchmark_command(
    bundles: tuple[Path, ...], threads: int | None, rounds: int | None, data: None, output: Output
) -> int:
    """Time bundles here, in turns, each in a process of its own; ratios are to the first.

    \b
    Examples:
      edgevlm benchmark mobilenet-cpu/
      edgevlm benchmark int8/ float/
    """
