"""A compile that is about to run: everything that was read and decided, before any heavy work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgevlm.data.splits import Splits
from edgevlm.model import Model
from edgevlm.plan import DataDigests, Request, Step
from edgevlm.progress import Progress
from edgevlm.quantization.calibration import CalibrationRecipe
from edgevlm.store import Store
from edgevlm.target import Target


@dataclass(frozen=True, kw_only=True)
class Job:
    """A compile that is about to run.

    Args:
        command: the command line that does the same, for the report.
        ready_made: graphs that compete as they are, by the name of the model's graph.
        notes: sentences about what was chosen or left out while reading.
    """

    model: Model
    target: Target
    request: Request
    recipe: CalibrationRecipe
    splits: Splits
    data: DataDigests
    steps: tuple[Step, ...]
    output: Path
    overwrite: bool
    command: str
    notes: tuple[str, ...]
    ready_made: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an action gets.

    Args:
        inputs: the folders of the steps that it needs, by name.
        out: its own folder, which is empty.
        store: for the trials of a search, each a result of its own.
    """

    job: Job
    step: Step
    inputs: Mapping[str, Path]
    out: Path
    store: Store
    progress: Progress


Action = Callable[[Work], None]


def place(source: Path, target: Path) -> Path:
    """Put a file of the store at another place without a second copy, where the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
