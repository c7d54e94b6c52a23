"""`edgevlm targets`."""

from __future__ import annotations

from pathlib import Path

import click

from edgevlm.cli.common import Output, short_output_options


@click.group("targets")
def targets_group() -> None:
    """List, show, detect and validate targets.

    \b
    Examples:
      edgevlm targets list
      edgevlm targets show cpu
      edgevlm targets detect -o board.toml
      edgevlm targets validate board.toml
    """


@targets_group.command("list")
@short_output_options
def list_command(output: Output) -> None:
    """The built-in targets."""
    from edgevlm import targets
    from edgevlm.cli.tables import table_text

    found = targets.list()
    output.value(found, table_text(("NAME", "ARCH", "WHAT"), [(t.name, t.arch, t.description) for t in found]))


@targets_group.command("show")
@click.argument("target")
@short_output_options
def show_command(target: str, output: Output) -> None:
    """One target, with the facts of this machine filled in where it says `host`."""
    from edgevlm import targets
    from edgevlm.target import target_text

    found = targets.show(target)
    output.value(found, lambda: target_text(found).rstrip())


@targets_group.command("detect")
@click.option("-o", "--output", "file", type=click.Path(path_type=Path), help="Write it to this new .toml file.")
@short_output_options
def detect_command(file: Path | None, output: Output) -> None:
    """This machine as a target file."""
    from edgevlm import targets
    from edgevlm.target import target_text

    found = targets.detect(file)
    text = target_text(found).rstrip()
    output.value(found, f"{text}\n\nwritten to {file}; use it with --target {file}" if file else text)


@targets_group.command("validate")
@click.argument("file")
@short_output_options
def validate_command(file: str, output: Output) -> None:
    """Say whether a target file is right, or what is wrong with it."""
    from edgevlm import targets

    found = targets.validate(file)
    output.value(found, f"{file}: ok ({found.description})")
