"""`edgevlm build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevlm.cli.common import Output, beside, output_options

if TYPE_CHECKING:
    from edgevlm.building import Built
    from edgevlm.runtime.engine_layers import EngineLayer, EngineLayers

_N_SLOWEST = 5


@click.command("build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", "destination", type=click.Path(path_type=Path),
              help="A folder, or a file ending in .evlm; BUNDLE-built if left out.")  # fmt: skip
@click.option("--timing-cache", type=click.Path(path_type=Path, dir_okay=False),
              help="A file in which TensorRT keeps its timings of kernels, for the next build.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there already.")
@output_options
def build_command(
    bundle: Path, destination: Path | None, timing_cache: Path | None, overwrite: bool, output: Output
) -> int:
    """Build the TensorRT engines that BUNDLE needs, on the device that will run them.

    TensorRT's Python module does it, or `trtexec` alone. Each engine's answers are compared with the golden vectors,
    and its layers are timed; `edgevlm tune` then chooses among the forms.

    \b
    Example:
      edgevlm build mobilenet-jetson-orin-nano/
    """
    from edgevlm.building import build

    place = destination or beside(bundle, "built")
    with output.progress() as progress:
        found = build(bundle, output=place, timing_cache=timing_cache, overwrite=overwrite, progress=progress)
    output.value(found, lambda: built_text(found))
    return 0 if found else 1


def built_text(found: Built) -> str:
    """What came of each form with its slowest layers, and where the bundle lies."""
    from edgevlm.report.notation import error

    lines = []
    for form in found.forms:
        if form.failure:
            lines.append(f"{form.name}: no engine: {form.failure}")
        elif form.max_error is None:
            lines.append(f"{form.name}: built by {form.built_by}, and not run here: {form.unchecked}")
        else:
            worst = error(form.max_error)
            lines.append(f"{form.name}: built by {form.built_by}, largest error of its golden vectors {worst}")
        lines += [line for graph, layers in form.layers.items() for line in _slowest(graph, layers)]
        if form.unprofiled and form.unprofiled != form.unchecked:
            lines.append(f"  not profiled: {form.unprofiled}")
    return "\n".join([*lines, "", f"Bundle  {found.bundle}"])


def _slowest(graph: str, layers: EngineLayers) -> list[str]:
    from edgevlm.report import notation

    rows = [
        f"    {notation.ms(layer.time_ms or 0.0)} ms  {notation.percent(layer.share or 0.0)}  "
        f"{layer.precision or layer.kind}  {name}"
        for layer, name in _named(layers, _N_SLOWEST)
    ]
    n_layers = notation.count(len(layers.layers), "layer")
    return [f"  {graph}: {n_layers}, {notation.ms(layers.total_ms)} ms in all; the slowest:", *rows]


def _named(layers: EngineLayers, n: int) -> list[tuple[EngineLayer, str]]:
    """The slowest, with names that fit a line; fused layers carry those of all their nodes."""
    from edgevlm.report import notation

    slowest = layers.slowest(n)
    return list(zip(slowest, notation.shortened([layer.name for layer in slowest], 60), strict=True))
