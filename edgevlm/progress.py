"""What long work says while it runs: four small events and whoever listens to them.

A step is started, says how far it is as often as it likes, and is finished; steps may lie inside one another.
Work takes ``progress: Progress = silent`` and never prints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class StepStarted:
    """``name`` is the step's, as in the plan; ``detail`` says what is being done, in a few words."""

    name: str
    detail: str = ""


@dataclass(frozen=True)
class StepProgress:
    """``fraction`` is how much is done, 0 to 1; None where nobody knows."""

    name: str
    fraction: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class StepFinished:
    """``hit`` says that the result was looked up, not made."""

    name: str
    wall_s: float
    hit: bool = False


@dataclass(frozen=True)
class Note:
    """A sentence that the user should see once, such as a warning."""

    text: str


Event = StepStarted | StepProgress | StepFinished | Note
Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listen to nothing."""


@contextmanager
def doing(name: str, detail: str, progress: Progress) -> Iterator[None]:
    """Say that a step started, and that it finished where the block does."""
    progress(StepStarted(name, detail))
    started = time.monotonic()
    yield
    progress(StepFinished(name, time.monotonic() - started))


@contextmanager
def counting(name: str, detail: str, progress: Progress) -> Iterator[Callable[[int, int], None]]:
    """``doing`` with what tells of each picture: how many are done, and of how many."""
    with doing(name, detail, progress):
        yield lambda done, n: progress(StepProgress(name, done / n, f"{done}/{n} pictures"))


def renamed(progress: Progress, name: str) -> Progress:
    """How far a part is, told as the step that it belongs to; notes pass, where the part begins and ends does not."""

    def say(event: Event) -> None:
        if isinstance(event, StepProgress):
            progress(StepProgress(name, event.fraction, event.detail))
        elif isinstance(event, Note):
            progress(event)

    return say
