"""`edgevlm build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevlm.cli.common import Output, output_options

if TYPE_CHECKING:
    from edgevlm.building import Built


@click.command("build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", "destination", type=click.Path(path_type=Path),
              help="A folder, or a file ending in .evlm; BUNDLE-built if left out.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there already.")
@output_options
def build_command(bundle: Path, destination: Path | None, overwrite: bool, output: Output) -> None:
    """Build the TensorRT engines that BUNDLE needs, on the device that will run them.

    Each engine's answers are compared with the golden vectors; `edgevlm tune` then chooses among the forms.

    \b
    Example:
      edgevlm build mobilenet-jetson-orin-nano/
    """
    from edgevlm.building import build

    place = destination or bundle.with_name(f"{bundle.name.removesuffix('.evlm')}-built")
    with output.progress() as progress:
        found = build(bundle, output=place, overwrite=overwrite, progress=progress)
    output.value(found, lambda: built_text(found))


def built_text(found: Built) -> str:
    """A line for each form, and where the bundle lies."""
    from edgevlm.report.notation import error

    lines = []
    for form in found.forms:
        if form.failure:
            lines.append(f"{form.name}: no engine: {form.failure}")
        elif form.max_error is None:
            lines.append(f"{form.name}: built, and not run here: {form.unchecked}")
        else:
            lines.append(f"{form.name}: built, largest error of its golden vectors {error(form.max_error)}")
    return "\n".join([*lines, "", f"Bundle  {found.bundle}"])
