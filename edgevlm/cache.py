"""The verbs of `edgevlm cache`: list, why, clear."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from edgevlm.errors import UsageError
from edgevlm.report.spec import StepRow
from edgevlm.runtime.spec import Spec, from_json
from edgevlm.store import Store, Stored

__all__ = ["clear", "list", "why"]

LAST_RUN = "last_run.json"

S = TypeVar("S", bound=Spec)


class Run(Spec, frozen=True, kw_only=True):
    """What a compile looked up and what it made."""

    source: str
    target: str
    steps: tuple[StepRow, ...]


def list() -> tuple[Stored, ...]:
    """Every stored result, newest first."""
    return tuple(Store().entries())


def why(bundle: Path | None = None) -> Run:
    """For each step of the last compile, or of the one that made ``bundle``: hit or miss, and what had changed.

    Raises: UsageError: nothing was compiled yet, or that is no bundle with a report.
    """
    if bundle is None:
        file = Store().root / LAST_RUN
        if not file.is_file():
            raise UsageError("Nothing has been compiled with this cache yet.", hint="Run `edgevlm compile` first.")
        return _read(file, Run)
    from edgevlm.report.spec import Report

    file = Path(bundle) / "report" / "report.json"
    if not file.is_file():
        raise UsageError(f"'{bundle}' holds no report/report.json.", hint="Give the directory that `compile` wrote.")
    report = _read(file, Report)
    return Run(source=report.source, target=report.target, steps=report.steps)


def _read(file: Path, kind: type[S]) -> S:
    try:
        return from_json(file.read_bytes(), kind)
    except msgspec.MsgspecError as error:
        raise UsageError(
            f"'{file}' is damaged, or was written by another version: {error}.", hint="Compile the model again."
        ) from error


def clear() -> int:
    """Remove every stored result; returns the bytes freed."""
    return Store().clear()
