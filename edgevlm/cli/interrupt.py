"""Ctrl-C that gets through: where a library swallows it, as a bare ``except`` around an import does, it comes again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from edgevlm.progress import Event, Note, Progress


@contextmanager
def heeding_interrupts(progress: Progress) -> Iterator[Progress]:
    """``progress``, which raises KeyboardInterrupt where the user asked to stop and the work goes on all the same.

    Notes pass, since what stops says by one where it stopped. Handlers that somebody else has set are left alone, and
    so is everything in a thread that gets no signals.
    """
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield progress
        return
    was_asked = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal was_asked
        was_asked = True
        signal.default_int_handler(number, frame)

    def heeding(event: Event) -> None:
        if was_asked and not isinstance(event, Note):
            raise KeyboardInterrupt
        progress(event)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield heeding
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
