"""Showing progress on standard error: a live view on a terminal, one line per finished step elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from edgevlm.cli.interrupt import heeding_interrupts
from edgevlm.progress import Event, Note, Progress, StepFinished, StepProgress, StepStarted, silent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Task
    from rich.text import Text


@contextmanager
def shown_progress(
    *, quiet: bool = False, verbose: bool = False, color: bool = True, stream: TextIO | None = None
) -> Iterator[Progress]:
    """Who listens while the block runs; whatever ends the block, the terminal is left clean.

    Args:
        quiet: show nothing.
        verbose: also show what is being done, step by step.
        color: False turns colours off; so does the environment variable ``NO_COLOR``.
        stream: standard error unless told.
    """
    with (
        _listener(stream or sys.stderr, quiet=quiet, verbose=verbose, color=color) as told,
        heeding_interrupts(told) as heard,
    ):
        yield heard


@contextmanager
def _listener(stream: TextIO, *, quiet: bool, verbose: bool, color: bool) -> Iterator[Progress]:
    if quiet:
        yield silent
        return
    console = _terminal(stream, color=color)
    if console is None:
        with _Plain(stream, verbose=verbose) as plain:
            yield plain
        return
    with _Live(console, verbose=verbose) as live:
        yield live


def _terminal(stream: TextIO, *, color: bool) -> Console | None:
    """A console that can move its cursor; None for a pipe, a dumb terminal, or where rich is not installed."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    # None lets rich look at NO_COLOR itself.
    return Console(file=stream, no_color=None if color else True, highlight=False, markup=False, emoji=False)


def duration(seconds: float) -> str:
    """
    Example:
        >>> duration(0.04), duration(12.34), duration(75), duration(3725)
        ('0.0 s', '12.3 s', '1:15', '1:02:05')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Plain:
    """One line per finished step, no carriage returns, no escapes: for pipes and logs."""

    def __init__(self, stream: TextIO, *, verbose: bool) -> None:
        self.stream = stream
        self.verbose = verbose
        self.running: dict[str, float] = {}
        self.details: dict[str, str] = {}

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        for name, started in reversed(self.running.items()):
            self._write(f"{name}: stopped after {duration(time.monotonic() - started)}")

    def __call__(self, event: Event) -> None:
        match event:
            case StepStarted(name, detail):
                self.running[name] = time.monotonic()
                self._tell(name, detail or "started")
            case StepProgress(name, _, detail):
                self._tell(name, detail)
            case StepFinished(name, wall_s, hit):
                self.running.pop(name, None)
                self.details.pop(name, None)
                self._write(f"{name}: {'cached' if hit else duration(wall_s)}")
            case Note(text):
                self._write(f"note: {text}")

    def _tell(self, name: str, detail: str) -> None:
        if self.verbose and detail and self.details.get(name) != detail:
            self.details[name] = detail
            self._write(f"{name}: {detail}")

    def _write(self, line: str) -> None:
        print(_one_line(line), file=self.stream, flush=True)


class _Live:
    """Running steps at the bottom with bar or spinner, elapsed and remaining time; finished ones above."""

    def __init__(self, console: Console, *, verbose: bool) -> None:
        from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
        from rich.table import Column

        class Clock(ProgressColumn):
            max_refresh = 0.25

            def render(self, task: Task) -> Text:
                return _clock(task)

        self.console = console
        self.verbose = verbose
        self.tasks: dict[str, int] = {}
        self.details: dict[str, str] = {}
        self.progress = Progress(
            SpinnerColumn("dots", style="cyan"),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=20, complete_style="cyan", pulse_style="cyan"),
            Clock(),
            TextColumn(
                "{task.fields[detail]}", markup=False, style="dim",
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=console, transient=True, expand=True,
            # Drawing must not take the cores from what is being measured, nor standard output from the result.
            refresh_per_second=4, redirect_stdout=False, redirect_stderr=console.file is sys.stderr,
        )  # fmt: skip

    def __enter__(self) -> _Live:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = [(task.description, task.elapsed or 0.0) for task in self.progress.tasks]
        self.progress.stop()
        if kind is not None:
            for name, elapsed in reversed(stopped):
                self._print("✕", "red", name, f"stopped after {duration(elapsed)}")

    def __call__(self, event: Event) -> None:
        match event:
            case StepStarted(name, detail):
                self._drop(name)
                self.tasks[name] = self.progress.add_task(_one_line(name), total=None, detail=_one_line(detail))
                self.details[name] = detail
            case StepProgress(name, fraction, detail) if name in self.tasks:
                self._advance(name, fraction, detail)
            case StepProgress():
                pass
            case StepFinished(name, wall_s, hit):
                detail = self.details.get(name, "") if self.verbose else ""
                self._drop(name)
                self._print("✓", "green", name, "cached" if hit else duration(wall_s), detail)
            case Note(text):
                self._print("!", "yellow", text, "")

    def _advance(self, name: str, fraction: float | None, detail: str) -> None:
        from rich.progress import TaskID

        task = TaskID(self.tasks[name])
        if fraction is None:
            self.progress.update(task)
        else:
            self.progress.update(task, total=1.0, completed=min(max(fraction, 0.0), 1.0))
        if detail:
            self.details[name] = detail
            self.progress.update(task, detail=_one_line(detail))

    def _drop(self, name: str) -> None:
        from rich.progress import TaskID

        if name in self.tasks:
            self.progress.remove_task(TaskID(self.tasks.pop(name)))
        self.details.pop(name, None)

    def _print(self, sign: str, style: str, name: str, outcome: str, detail: str = "") -> None:
        from rich.text import Text

        line = Text.assemble((sign, style), " ", _one_line(name))
        if outcome:
            line.append(f"  {outcome}", style="dim")
        if detail:
            line.append(f"  {_one_line(detail)}", style="dim")
        self.console.print(line)


def _clock(task: Task) -> Text:
    from rich.text import Text

    elapsed = task.elapsed or 0.0
    remaining = task.time_remaining
    if remaining is None or task.finished:
        return Text(duration(elapsed))
    return Text(f"{duration(elapsed)}, about {duration(remaining)} left")


def _one_line(text: str) -> str:
    """Without line breaks and control characters: a model's name must not drive the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
