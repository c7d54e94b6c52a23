"""Building a bundle's engines on the device that will run them.

The base install does this with TensorRT's Python module, or where that is not there with ``trtexec`` alone.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

import edgevlm.runtime.backends.trtexec as trtexec
from edgevlm.bundle.write import check_destination, write_bundle
from edgevlm.errors import EdgeVLMError, MissingToolError, UsageError
from edgevlm.measure.bundles import golden_inputs
from edgevlm.progress import Progress, StepFinished, StepProgress, StepStarted, silent
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.backends.tensorrt import TITLES, TensorRt, TensorRtSession
from edgevlm.runtime.backends.tensorrt_build import serialize_engine
from edgevlm.runtime.backends.trtexec import TrtExec, TrtExecSession
from edgevlm.runtime.bundle import Bundle, named_files, open_bundle, release
from edgevlm.runtime.engine import BuildSettings, card_file
from edgevlm.runtime.engine_layers import EngineLayers, layers_file
from edgevlm.runtime.spec import BundleForm, Component, Spec, to_json
from edgevlm.runtime.verify import verify_form

READY: Literal["ready"] = "ready"
NEEDS_BUILD = "needs device build"


class BuiltForm(Spec, frozen=True, kw_only=True):
    """What came of one form.

    Args:
        failure: why it has no engine; a sentence.
        max_error: of its golden vectors, the largest |difference| over the largest |expected|; null where nothing can
            be run here, and then ``unchecked`` says why.
        built_by: ``TensorRT``, ``TensorRT for RTX`` or ``trtexec``, with the version; empty where it has no engine.
        layers: where each graph's time goes, by graph.
        unprofiled: why that is not known; a sentence.
    """

    name: str
    failure: str = ""
    max_error: float | None = None
    unchecked: str = ""
    built_by: str = ""
    layers: dict[str, EngineLayers] = {}
    unprofiled: str = ""


class Built(Spec, frozen=True, kw_only=True):
    """What ``edgevlm build`` made, and where it is; falsy where no form got an engine that ships."""

    bundle: str
    forms: tuple[BuiltForm, ...]

    def __bool__(self) -> bool:
        return any(not form.failure for form in self.forms)


def build(
    bundle: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    timing_cache: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Built:
    """Build the engine of every form that needs one, replay its golden vectors, and write the bundle with the engines.

    A form whose engine cannot be built stays as it is; one that answers otherwise than it should is left out.

    Args:
        output: a new folder, or a file ending in ``.evlm``.
        timing_cache: where TensorRT keeps what it found out about kernels, for the next build; it is made where it is
            not there. Where left out, the forms of this build alone share one.
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
        shared = Path(folder) / "timing.cache" if timing_cache is None else Path(timing_cache).absolute()
        made: dict[str, _Made] = {}
        failures: dict[str, EdgeVLMError] = {}
        for form in waiting:
            started = time.monotonic()
            progress(StepStarted(form.name, "an engine for this machine's GPU"))
            try:
                made[form.name] = _built(opened, form, Path(folder) / form.name, shared, progress)
            except EdgeVLMError as error:
                failures[form.name] = error
            progress(StepFinished(form.name, time.monotonic() - started))
        if not made:
            raise next(iter(failures.values()))
        whole = open_bundle(_written(opened, made, Path(folder) / "whole"))
        found = tuple(
            BuiltForm(name=form.name, failure=failures[form.name].message)
            if form.name in failures
            else _examined(whole, made[form.name], progress)
            for form in waiting
        )
        wrong = {each.name for each in found if each.failure and each.name in made}
        kept, profiles = _with_layers(tuple(form for form in whole.manifest.forms if form.name not in wrong), found)
        manifest = msgspec.structs.replace(whole.manifest, forms=kept, files=())
        lost = {path for name in wrong for path in named_files(whole.in_form(made[name].form).manifest)}
        lost -= set(named_files(manifest))
        files: dict[str, Path | bytes] = {path: whole.file(path) for path in whole.entries if path not in lost}
        write_bundle(Path(output), manifest, files | profiles, overwrite=overwrite)
    return Built(bundle=os.fspath(output), forms=found)


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A form with engines for graphs, and where their files lie by their paths in the bundle.

    Args: tool: what built them; null is the Python module.
    """

    form: BundleForm
    files: dict[str, Path]
    tool: TrtExec | None
    built_by: str


def _built(bundle: Bundle, form: BundleForm, folder: Path, timing_cache: Path, progress: Progress) -> _Made:
    settings = msgspec.convert(form.build, BuildSettings)
    tool = _tool(settings, form)
    folder.mkdir()
    files: dict[str, Path] = {}
    parts: list[Component] = []
    for part in form.components:
        for path in part.files:
            bundle.file(path)
        progress(StepProgress(form.name, None, f"building {part.name}"))
        engine = folder / f"{part.name}.engine"
        if tool is None:
            cache = timing_cache if settings.backend == "tensorrt" else None  # TensorRT for RTX keeps none
            serialize_engine(bundle.root / part.file, engine, settings=settings, timing_cache=cache)
        else:
            graph = (bundle.root / part.file).absolute()
            tool.build(graph, engine, settings=settings, timing_cache=timing_cache)
        place = part.file.rpartition("/")[0]
        paths = {f"{place}/{each.name}": each for each in (engine, card_file(engine))}
        files |= paths
        parts.append(msgspec.structs.replace(part, file=next(iter(paths)), files=tuple(paths)))
    ready = msgspec.structs.replace(form, components=tuple(parts), status=READY, why_not_built="")
    version = load_backend(settings.backend).version() if tool is None else tool.version
    return _Made(
        form=ready,
        files=files,
        tool=tool,
        built_by=f"{'trtexec of TensorRT' if tool else TITLES[settings.backend]} {version}",
    )


def _tool(settings: BuildSettings, form: BundleForm) -> TrtExec | None:
    """What builds an engine here: the Python module, which is null, where it can, else ``trtexec``.

    Raises: MissingToolError: neither can, or what does is older than the form needs.
    """
    backend = load_backend(settings.backend)
    assert isinstance(backend, TensorRt), "engines are built for TensorRT alone"
    missing = backend.why_unavailable()
    if settings.backend != "tensorrt" or (missing is None and backend.missing_device() is None):
        if missing is None:
            _check_version(form, settings, "its Python module", backend.version() or "")
        return None  # and the module says what it lacks
    found = trtexec.find_trtexec()
    if found is None and missing is None:
        return None  # and the module says what else is missing
    if found is None:
        raise MissingToolError(
            f"{missing} And there is no trtexec, which would do alone, on the PATH or at {trtexec.PLACES[0]}.",
            hint="Run: pip install 'edgevlm[tensorrt]' (on a Jetson: sudo apt install python3-libnvinfer), or for "
            "trtexec: sudo apt install libnvinfer-bin",
        )
    _check_version(form, settings, f"'{found.program}'", found.version)
    return found


def _check_version(form: BundleForm, settings: BuildSettings, tool: str, version: str) -> None:
    title, least = TITLES[settings.backend], form.requires.backends.get(settings.backend, "")
    if release(version) < release(least):
        raise MissingToolError(
            f"The form '{form.name}' needs {title} {least} or newer, and {tool} is of {version}.",
            hint=f"Install {title} {least} or newer.",
        )


def _written(bundle: Bundle, made: Mapping[str, _Made], place: Path) -> Path:
    """The bundle with the engines in the graphs' place: what builds them anew is the bundle that it was made from."""
    manifest = bundle.manifest
    forms = tuple(made[form.name].form if form.name in made else form for form in manifest.forms)
    gone = {path for form in manifest.forms if form.name in made for part in form.components for path in part.files}
    files: dict[str, Path | bytes] = {path: bundle.file(path) for path in bundle.entries if path not in gone}
    files |= {path: file for each in made.values() for path, file in each.files.items()}
    write_bundle(place, msgspec.structs.replace(manifest, forms=forms, files=()), files)
    return place


def _examined(bundle: Bundle, made: _Made, progress: Progress) -> BuiltForm:
    """Whether the form's engines answer as they should, and what their layers take."""
    form = made.form
    started = time.monotonic()
    progress(StepStarted(f"{form.name}: check", "the golden vectors, and each layer's time"))
    found = _checked(bundle, made)
    if not found.failure:
        found = _profiled(bundle.in_form(form), made, found)
    progress(StepFinished(f"{form.name}: check", time.monotonic() - started))
    return found


def _checked(bundle: Bundle, made: _Made) -> BuiltForm:
    form, tool = made.form, made.tool
    try:
        if tool is None:
            check = verify_form(bundle.in_form(form), name=form.name)
        else:
            # The module that the bundle requires is not here, or sees no GPU; trtexec stands in for it.
            others = {name: least for name, least in form.requires.backends.items() if name != "tensorrt"}
            requires = msgspec.structs.replace(form.requires, backends=others)
            without = bundle.in_form(msgspec.structs.replace(form, requires=requires))
            check = verify_form(without, name=form.name, open_graph=lambda part, file: tool.open(file))
    except MissingToolError as error:
        return BuiltForm(name=form.name, built_by=made.built_by, unchecked=error.message)
    except EdgeVLMError as error:
        return BuiltForm(name=form.name, failure=error.message)
    worst = max((case.max_error for case in check.cases), default=None)
    failure = " ".join(check.reasons[:2])
    return BuiltForm(name=form.name, built_by="" if failure else made.built_by, max_error=worst, failure=failure)


def _profiled(bundle: Bundle, made: _Made, found: BuiltForm) -> BuiltForm:
    """A form whose layers cannot be timed is none the worse for it."""
    if found.unchecked:
        return msgspec.structs.replace(found, unprofiled=found.unchecked)
    layers = {}
    try:
        for part in bundle.manifest.components:
            session = _session(bundle, part, made)
            layers[part.name] = session.profile(golden_inputs(bundle, part))
    except EdgeVLMError as error:
        return msgspec.structs.replace(found, layers=layers, unprofiled=error.message)
    return msgspec.structs.replace(found, layers=layers)


def _session(bundle: Bundle, part: Component, made: _Made) -> TensorRtSession | TrtExecSession:
    file = bundle.root / part.file
    if made.tool is not None:
        return made.tool.open(file)
    backend = load_backend(part.backend)
    assert isinstance(backend, TensorRt), "engines are of TensorRT alone"
    return backend.open(file, part.session)


def _with_layers(
    forms: tuple[BundleForm, ...], found: tuple[BuiltForm, ...]
) -> tuple[tuple[BundleForm, ...], dict[str, bytes]]:
    """The forms with their engines' layers among their files, and those files' contents."""
    known = {each.name: each.layers for each in found}
    whole, files = [], {}
    for form in forms:
        parts = []
        for part in form.components:
            if layers := known.get(form.name, {}).get(part.name):
                path = layers_file(Path(part.file)).as_posix()
                files[path] = to_json(layers)
                parts.append(msgspec.structs.replace(part, files=(*part.files, path)))
            else:
                parts.append(part)
        whole.append(msgspec.structs.replace(form, components=tuple(parts)))
    return tuple(whole), files
