"""The operators of a bundle's graphs, or of any graph on disk: what ``edgevlm inspect --operators`` tells."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from edgevlm.errors import EdgeVLMError, UsageError
from edgevlm.measure.bundles import golden_inputs
from edgevlm.measure.explanation import Explained, time_by_kind
from edgevlm.measure.findings import find_causes
from edgevlm.measure.operators import profile_graph
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.backends.tensorrt import MODULES, TensorRt
from edgevlm.runtime.bundle import Bundle, open_bundle
from edgevlm.runtime.engine_layers import EngineLayers, layers_file, read_layers
from edgevlm.runtime.spec import Array, BundleForm, Component, SessionOptions, Spec

# What runs a graph on disk, by the end of its name.
BACKEND_OF_SUFFIX = {".onnx": "onnxruntime", ".ort": "onnxruntime", ".xml": "openvino"}


class EngineInside(Spec, frozen=True, kw_only=True):
    """One TensorRT engine of a bundle.

    Args:
        form: of a bundle that holds several.
        layers: as ``edgevlm build`` found them on the device, or as they are here; null with the reason in ``failure``.
    """

    graph: str
    form: str
    precision: str
    backend: str
    layers: EngineLayers | None = None
    failure: str = ""


def inspect_operators(
    path: str | os.PathLike[str], *, n_threads: int | None = None
) -> tuple[Explained | EngineInside, ...]:
    """Profile a graph, or each graph of a bundle, here: one after another, each in a process of its own.

    A bundle's graphs get its first golden picture; a graph on its own gets inputs made up from its shapes. Engines of
    any form tell the layers that were timed when they were built, and are timed here where they were not.

    Args:
        n_threads: 0 means all cores; as the bundle was compiled where left out (all cores for a graph on its own).
    Raises: UsageError: there is no such file. ModelError: a graph does not run. BundleError: a bundle breaks a rule.
    """
    if n_threads is not None and n_threads < 0:
        raise UsageError(f"There cannot be {n_threads} threads.", hint="Give a number above 0, or 0 for all cores.")
    file = Path(path)
    if file.suffix in BACKEND_OF_SUFFIX:
        if not file.is_file():
            raise UsageError(f"There is no file '{path}'.", hint="Name a bundle, or an ONNX or OpenVINO graph.")
        session = SessionOptions(n_threads=n_threads or 0)
        backend = BACKEND_OF_SUFFIX[file.suffix]
        return (_explained(file, graph=file.stem, name="", backend=backend, session=session, inputs=None),)
    bundle = open_bundle(path)
    graphs = [part for part in bundle.manifest.components if part.backend not in MODULES]
    if graphs:  # an engine's layers can be told where it does not run
        bundle.check_requires()
    explained: list[Explained | EngineInside] = []
    for part in graphs:
        for each in part.files:
            bundle.file(each)
        session = part.session if n_threads is None else msgspec.structs.replace(part.session, n_threads=n_threads)
        explained.append(
            _explained(
                bundle.root / part.file,
                graph=part.name,
                name=part.precision,
                backend=part.backend,
                session=session,
                inputs=golden_inputs(bundle, part),
            )
        )
    return (*explained, *_engines(bundle))


def _engines(bundle: Bundle) -> tuple[EngineInside, ...]:
    """Of the bundle itself, or of all its forms."""
    forms: tuple[BundleForm | None, ...] = bundle.manifest.forms or (None,)
    return tuple(
        _engine_inside(within, part, form)
        for form in forms
        for within in [bundle if form is None else bundle.in_form(form)]
        for part in within.manifest.components
        if part.backend in MODULES
    )


def _engine_inside(bundle: Bundle, part: Component, form: BundleForm | None) -> EngineInside:
    name = "" if form is None else form.name
    found = EngineInside(graph=part.name, form=name, precision=part.precision, backend=part.backend)
    if form is not None and form.status != "ready":
        why = form.why_not_built or "`edgevlm build` has not built its engine yet."
        return msgspec.structs.replace(found, failure=f"It is no engine yet: {why}")
    for each in part.files:
        bundle.file(each)
    engine = bundle.root / part.file
    try:
        layers = read_layers(engine) if layers_file(Path(part.file)).as_posix() in part.files else None
        return msgspec.structs.replace(found, layers=layers or _timed_here(bundle, part, engine))
    except EdgeVLMError as error:
        return msgspec.structs.replace(found, failure=error.message)


def _timed_here(bundle: Bundle, part: Component, engine: Path) -> EngineLayers:
    backend = load_backend(part.backend)
    assert isinstance(backend, TensorRt), "engines are of TensorRT alone"
    return backend.open(engine, part.session).profile(golden_inputs(bundle, part))


def _explained(
    file: Path, *, graph: str, name: str, backend: str, session: SessionOptions, inputs: dict[str, Array] | None
) -> Explained:
    profile = profile_graph(file, backend=backend, inputs=inputs, session=session)
    return Explained(
        graph=graph,
        name=name,
        backend=backend,
        profile=profile,
        by_kind_ms=time_by_kind(profile),
        findings=find_causes(profile),
    )
