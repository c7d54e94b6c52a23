"""Building a bundle's engines on the device that will run them; the base install and TensorRT do this."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from edgevlm.bundle.write import check_destination, write_bundle
from edgevlm.errors import EdgeVLMError, MissingToolError, UsageError
from edgevlm.progress import Progress, StepFinished, StepProgress, StepStarted, silent
from edgevlm.runtime.backends.tensorrt_build import serialize_engine
from edgevlm.runtime.bundle import Bundle, named_files, open_bundle
from edgevlm.runtime.engine import BuildSettings, card_file
from edgevlm.runtime.spec import BundleForm, Component, Spec
from edgevlm.runtime.verify import verify_form

READY: Literal["ready"] = "ready"
NEEDS_BUILD = "needs device build"


class BuiltForm(Spec, frozen=True, kw_only=True):
    """What came of one form.

    Args:
        failure: why it has no engine; a sentence.
        max_error: of its golden vectors, the largest |difference| over the largest |expected|; null where nothing can
            be run here, and then ``unchecked`` says why.
    """

    name: str
    failure: str = ""
    max_error: float | None = None
    unchecked: str = ""


class Built(Spec, frozen=True, kw_only=True):
    """What ``edgevlm build`` made, and where it is."""

    bundle: str
    forms: tuple[BuiltForm, ...]


def build(
    bundle: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    overwrite: bool = False,
    progress: Progress = silent,
) -> Built:
    """Build the engine of every form that needs one, replay its golden vectors, and write the bundle with the engines.

    A form whose engine cannot be built stays as it is; one that answers otherwise than it should is left out.

    Args:    output: a new folder, or a file ending in ``.evlm``.
    Raises:  UsageError: no form needs an engine. MissingToolError: TensorRT or its GPU is not here, so that nothing was
        built.
    """
    opened = open_bundle(bundle)
    waiting = [form for form in opened.manifest.forms if form.status == NEEDS_BUILD]
    if not waiting:
        raise UsageError(
            f"No form of '{opened.origin}' needs an engine.",
            hint="`edgevlm inspect` says what is in it; `edgevlm tune` chooses among forms that are ready.",
        )
    check_destination(Path(output), overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix="edgevlm-") as folder:
        made: dict[str, _Made] = {}
        failures: dict[str, EdgeVLMError] = {}
        for form in waiting:
            started = time.monotonic()
            progress(StepStarted(form.name, "an engine for this machine's GPU"))
            try:
                made[form.name] = _built(opened, form, Path(folder) / form.name, progress)
            except EdgeVLMError as error:
                failures[form.name] = error
            progress(StepFinished(form.name, time.monotonic() - started))
        if not made:
            raise next(iter(failures.values()))
        whole = open_bundle(_written(opened, made, Path(folder) / "whole"))
        checked = tuple(
            BuiltForm(name=form.name, failure=failures[form.name].message)
            if form.name in failures
            else _checked(whole, made[form.name].form)
            for form in waiting
        )
        wrong = {each.name for each in checked if each.failure and each.name in made}
        kept = tuple(form for form in whole.manifest.forms if form.name not in wrong)
        manifest = msgspec.structs.replace(whole.manifest, forms=kept, files=())
        lost = {path for name in wrong for path in named_files(whole.in_form(made[name].form).manifest)}
        lost -= set(named_files(manifest))
        files: dict[str, Path | bytes] = {path: whole.file(path) for path in whole.entries if path not in lost}
        write_bundle(Path(output), manifest, files, overwrite=overwrite)
    return Built(bundle=os.fspath(output), forms=checked)


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A form with engines for graphs, and where their files lie by their paths in the bundle."""

    form: BundleForm
    files: dict[str, Path]


def _built(bundle: Bundle, form: BundleForm, folder: Path, progress: Progress) -> _Made:
    settings = msgspec.convert(form.build, BuildSettings)
    folder.mkdir()
    files: dict[str, Path] = {}
    parts: list[Component] = []
    for part in form.components:
        for path in part.files:
            bundle.file(path)
        progress(StepProgress(form.name, None, f"building {part.name}"))
        engine = folder / f"{part.name}.engine"
        serialize_engine(bundle.root / part.file, engine, settings=settings)
        place = part.file.rpartition("/")[0]
        paths = {f"{place}/{each.name}": each for each in (engine, card_file(engine))}
        files |= paths
        parts.append(msgspec.structs.replace(part, file=next(iter(paths)), files=tuple(paths)))
    return _Made(form=msgspec.structs.replace(form, components=tuple(parts), status=READY), files=files)


def _written(bundle: Bundle, made: Mapping[str, _Made], place: Path) -> Path:
    """The bundle with the engines in the graphs' place: what builds them anew is the bundle that it was made from."""
    manifest = bundle.manifest
    forms = tuple(made[form.name].form if form.name in made else form for form in manifest.forms)
    gone = {path for form in manifest.forms if form.name in made for part in form.components for path in part.files}
    files: dict[str, Path | bytes] = {path: bundle.file(path) for path in bundle.entries if path not in gone}
    files |= {path: file for each in made.values() for path, file in each.files.items()}
    write_bundle(place, msgspec.structs.replace(manifest, forms=forms, files=()), files)
    return place


def _checked(bundle: Bundle, form: BundleForm) -> BuiltForm:
    try:
        check = verify_form(bundle.in_form(form), name=form.name)
    except MissingToolError as error:
        return BuiltForm(name=form.name, unchecked=error.message)
    worst = max((case.max_error for case in check.cases), default=None)
    return BuiltForm(name=form.name, max_error=worst, failure=" ".join(check.reasons[:2]))
