"""One model for several targets: read and exported once, compiled for each, and told of in one table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgevlm.compiler import compile_job, prepare
from edgevlm.errors import EdgeVLMError, UsageError
from edgevlm.progress import Note, Progress, silent
from edgevlm.report.overview import Outcome, Overview, overview_of, write_overview
from edgevlm.runtime.bundle import ARCHIVE_SUFFIX
from edgevlm.runtime.spec import Spec


class CompiledEach(Spec, frozen=True, kw_only=True):
    """What came of it, in the targets' order, and where it lies."""

    folder: Path
    outcomes: tuple[Outcome, ...]
    overview: Overview


def compile_each(
    model: str,
    targets: Sequence[str],
    *,
    output: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
    **asked: Any,
) -> CompiledEach:
    """A bundle for each target in the folder ``output``, and ``targets.html``, ``.md`` and ``.json`` beside them.

    A target that fails leaves the others as they are. What they have in common, such as the export and the calibration,
    is done once and looked up.

    Args:
        output: ``MODEL-targets`` where left out; a bundle is called as its target.
        asked: as ``edgevlm.prepare`` takes it.
    Raises: UsageError: a target is named twice, or one of them does not exist; nothing is done then.
    """
    names = [Path(target).stem if target.endswith(".toml") else target for target in targets]
    if len(set(names)) < len(names):
        raise UsageError(f"The target '{max(names, key=names.count)}' was named twice.", hint="Name each target once.")
    first = prepare(model, target=targets[0], check_output=False, **asked)
    folder = Path(output) if output is not None else Path(f"{first.model.name}-targets")
    if folder.suffix == ARCHIVE_SUFFIX or folder.is_file():  # other dots are of a version, as in mobilenet_v2_1.0
        raise UsageError(
            f"Several targets need a folder, and '{folder}' is called like a file.", hint="Pass a folder with -o."
        )
    jobs = [
        prepare(model, target=target, output=folder / name, **asked)
        for target, name in zip(targets, names, strict=True)
    ]
    outcomes = []
    for name, job in zip(names, jobs, strict=True):
        progress(Note(f"{name}:"))
        try:
            compiled = compile_job(job, progress=progress)
        except EdgeVLMError as error:
            progress(Note(f"{name}: {error.message}"))
            outcomes.append(Outcome(target=name, failure=error.message, exit_code=error.exit_code))
            continue
        outcomes.append(Outcome(target=name, bundle=name, report=compiled.report))
    folder.mkdir(parents=True, exist_ok=True)
    overview = overview_of(first.model.name, outcomes)
    write_overview(overview, folder)
    return CompiledEach(folder=folder, outcomes=tuple(outcomes), overview=overview)
