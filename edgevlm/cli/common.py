"""Options that every verb has, and how a verb prints."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from edgevlm.runtime.spec import to_json

if TYPE_CHECKING:
    from edgevlm.progress import Progress

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Output:
    """How the user wants to be told."""

    is_quiet: bool
    is_verbose: bool
    is_json: bool
    has_color: bool | None

    def progress(self) -> AbstractContextManager[Progress]:
        """Who listens to long work while the block runs."""
        from edgevlm.cli.progress import shown_progress

        return shown_progress(quiet=self.is_quiet, verbose=self.is_verbose, color=self.has_color is not False)

    def value(self, value: object, text: str | Callable[[], str]) -> None:
        """Print a result: the value as JSON, or its text."""
        if self.is_json:
            click.echo(to_json(value).decode(), nl=False)
        else:
            click.echo(text if isinstance(text, str) else text(), color=self.has_color)


_QUIET = click.option("-q", "--quiet", is_flag=True, help="Print the result alone, no progress.")
_VERBOSE = click.option("-v", "--verbose", is_flag=True, help="Print more details.")


def output_options(command: F) -> F:
    """For verbs that take a while: -q, -v, --json, --no-color and --debug; the verb gets them as one ``output``."""
    return cast(F, _QUIET(_VERBOSE(_common_options(command))))


def short_output_options(command: F) -> F:
    """For verbs that answer at once and have one answer: --json, --no-color and --debug."""
    return cast(F, _common_options(command))


def detailed_output_options(command: F) -> F:
    """For verbs that answer at once, briefly or, with -v, in full."""
    return cast(F, _VERBOSE(_common_options(command)))


def _common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    @click.option("--json", "is_json", is_flag=True, help="Print the result as JSON.")
    @click.option("--no-color", is_flag=True, help="No colours (so does NO_COLOR=1).")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        is_json: bool,
        no_color: bool,
        debug: bool,
        quiet: bool = False,
        verbose: bool = False,
        **kwargs: Any,
    ) -> Any:
        has_color = False if no_color or os.environ.get("NO_COLOR") else None
        output = Output(is_quiet=quiet, is_verbose=verbose, is_json=is_json, has_color=has_color)
        return command(*args, output=output, **kwargs)

    return wrapped


def device_option(command: F) -> F:
    """``--device``: the verb gets an address, or None for this machine."""
    return click.option(
        "--device", metavar="ADDRESS", help="Do it there, such as on ssh://user@host; here where left out."
    )(command)


def beside(bundle: Path, suffix: str) -> Path:
    """Where what is made of a bundle lies if nobody says: ``a`` or ``a.evlm`` gives ``a-SUFFIX``."""
    name = bundle.name if bundle.name not in ("", "..") else Path(os.path.normpath(bundle.absolute())).name
    return Path(os.path.normpath(bundle / "..")) / f"{name.removesuffix('.evlm')}-{suffix}"


def labels_option(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """``--labels``: a file with one label a line, or labels with commas between them."""
    from edgevlm.ingest import read_labels

    return read_labels(value) if value is not None else ()
