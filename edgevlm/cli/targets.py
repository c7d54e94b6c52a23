"""`edgevlm targets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

    found = targets.show(target)
    output.value(found, lambda: _text(found))


@targets_group.command("detect")
@click.option("-o", "--output", "file", type=click.Path(path_type=Path), help="Write it to this new .toml file.")
@click.option("--no-peaks", is_flag=True, help="Leave out what is measured: the best rates and the bandwidth.")
@short_output_options
def detect_command(file: Path | None, no_peaks: bool, output: Output) -> None:
    """This machine as a target file, with the best rates that its backends reach (some seconds each)."""
    from edgevlm import targets

    found = targets.detect(file, is_measured=not no_peaks)
    text = _text(found)
    output.value(found, f"{text}\n\nwritten to {file}; use it with --target {file}" if file else text)


@targets_group.command("validate")
@click.argument("file")
@short_output_options
def validate_command(file: str, output: Output) -> None:
    """Say whether a target file is right, or what is wrong with it."""
    from edgevlm import targets

    found = targets.validate(file)
    output.value(found, lambda: "\n".join((f"{file}: ok ({found.description})", *_unavailable(found))))


def _text(target: Any) -> str:
    """A target file, with a comment for each backend that cannot be used here."""
    from edgevlm.target import target_text

    return "\n".join((target_text(target).rstrip(), *(f"# {line}" for line in _unavailable(target))))


def _unavailable(target: Any) -> list[str]:
    """A line for each backend that cannot be used here."""
    from edgevlm.target import missing_backends

    return [f"{name}: unavailable: {_why(name)}; {how}" for name, how in missing_backends(target).items()]


def _why(name: str) -> str:
    """A backend's own words for why it cannot be used, where it has some."""
    from edgevlm.runtime.backends import load_backend
    from edgevlm.runtime.backends.tensorrt import TensorRt

    backend = load_backend(name)
    why = backend.why_unavailable() if isinstance(backend, TensorRt) else None
    return (why or "not installed here, or does not load").rstrip(".")
