"""`edgevlm cache`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from edgevlm.cli.common import Output, short_output_options


@click.group("cache")
def cache_group() -> None:
    """List, explain and clear the stored results of steps.

    \b
    Examples:
      edgevlm cache list
      edgevlm cache why
      edgevlm cache clear
    """


@cache_group.command("list")
@short_output_options
def list_command(output: Output) -> None:
    """Every stored result, newest first."""
    from edgevlm import cache
    from edgevlm.cli.tables import table_text
    from edgevlm.store import cache_root

    entries = cache.list()

    def text() -> str:
        rows = [
            (
                entry.action,
                entry.key[:12],
                f"{entry.n_bytes / 1e6:.1f} MB",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.made_at)),
            )
            for entry in entries
        ]
        total = f"{len(entries)} results, {sum(e.n_bytes for e in entries) / 1e6:.1f} MB in {cache_root()}"
        return f"{table_text(('STEP', 'KEY', 'SIZE', 'MADE'), rows, right=(2,))}\n{total}" if rows else total

    output.value(entries, text)


@cache_group.command("why")
@click.argument("bundle", required=False, type=click.Path(path_type=Path, exists=True, file_okay=False))
@short_output_options
def why_command(bundle: Path | None, output: Output) -> None:
    """Why each step of the last compile (or of BUNDLE's) was looked up or made anew."""
    from edgevlm import cache
    from edgevlm.cli.tables import table_text

    run = cache.why(bundle)

    def text() -> str:
        rows = [(row.name, "hit" if row.hit else "made", f"{row.wall_s:.1f} s", row.why) for row in run.steps]
        return f"{run.source} for {run.target}\n{table_text(('STEP', 'RESULT', 'TIME', 'WHY'), rows, right=(2,))}"

    output.value(run, text)


@cache_group.command("clear")
@short_output_options
def clear_command(output: Output) -> None:
    """Remove every stored result; what teachers said of pictures stays."""
    from edgevlm import cache

    freed = cache.clear()
    output.value({"freed_bytes": freed}, f"freed {freed / 1e6:.1f} MB")
