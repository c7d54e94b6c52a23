"""Running a graph on any number of rows, whatever batch it was built for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from edgevlm.errors import BundleError
from edgevlm.runtime.backends import Session
from edgevlm.runtime.spec import Array


class LazySessions(Mapping[str, Session]):
    """Sessions by component name, each opened when it is first asked for."""

    def __init__(self, openers: Mapping[str, Callable[[], Session]]) -> None:
        self._openers = dict(openers)
        self._opened: dict[str, Session] = {}

    def __getitem__(self, name: str) -> Session:
        if name not in self._opened:
            self._opened[name] = self._openers[name]()
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._openers)

    def __len__(self) -> int:
        return len(self._openers)


def run_rows(session: Session, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs for all rows of ``feeds``.

    A graph with a free batch takes them at once. One with a fixed batch takes them in turns; the last row fills up the
    last turn, and what it gave there is dropped.

    Shapes: feeds [n, ...] each, n above 0; outputs [n, ...] each.
    """
    batch = fixed_batch(session)
    n_rows = len(next(iter(feeds.values())))
    if batch is None or batch == n_rows:
        return session.run(feeds)
    turns = []
    for start in range(0, n_rows, batch):
        rows = {name: value[start : start + batch] for name, value in feeds.items()}
        n_missing = batch - min(batch, n_rows - start)
        turns.append(session.run({name: _fill(value, n_missing) for name, value in rows.items()}))
    return {name: np.concatenate([turn[name] for turn in turns])[:n_rows] for name in turns[0]}


def fixed_batch(session: Session) -> int | None:
    """How many rows the graph takes at once; None where that is free."""
    first = session.inputs[0].shape[:1]
    return first[0] if first and isinstance(first[0], int) else None


def _fill(rows: Array, n_missing: int) -> Array:
    return np.concatenate([rows, np.repeat(rows[-1:], n_missing, axis=0)]) if n_missing else rows


def output_of(outputs: Mapping[str, Array], *names: str) -> Array:
    """The first of ``names`` among the outputs, or the only output there is.

    Raises: BundleError: none of them.
    """
    for name in names:
        if name in outputs:
            return outputs[name]
    if len(outputs) == 1:
        return next(iter(outputs.values()))
    raise BundleError(
        f"The graph gives {', '.join(outputs)}, but the task needs {' or '.join(names)}.",
        hint="Name the graph's output so before it is compiled.",
    )
