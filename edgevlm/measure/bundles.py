"""Bundles against each other, on what they carry: each graph on its own, and the whole way from file to answer."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgevlm.errors import UsageError
from edgevlm.measure.interleave import compare
from edgevlm.measure.protocol import extended
from edgevlm.measure.spec import Comparison, Protocol, Subject
from edgevlm.measure.worker import options_for_turns
from edgevlm.progress import Progress, StepFinished, StepProgress, StepStarted, silent
from edgevlm.runtime.bundle import Bundle, open_bundle
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.session import fixed_batch
from edgevlm.runtime.spec import Array, Component, SessionOptions, Spec, TensorSpec
from edgevlm.runtime.tasks import Result
from edgevlm.runtime.text import load_tokenizer, tokenize

WHOLE = "end to end"
_PICTURE = "picture"


class BundleBenchmark(Spec, frozen=True, kw_only=True):
    """What ``edgevlm benchmark`` finds.

    Args:
        comparisons: by graph, and ``end to end``: decode, preprocess, graph and answer for one picture. The first
            bundle is the baseline of each.
    """

    bundles: tuple[str, ...]
    comparisons: dict[str, Comparison]


def benchmark_bundles(
    *paths: str | os.PathLike[str],
    n_threads: int | None = None,
    protocol: Protocol | None = None,
    progress: Progress = silent,
) -> BundleBenchmark:
    """Time bundles in turns, each in a process of its own, on the first one's first golden picture.

    What cannot be trusted is measured once more, longer.

    Args:
        n_threads: for all; what each bundle was compiled for where left out.
    Raises: UsageError: no bundle, one twice, or bundles of unlike tasks. BundleError, MissingToolError: as ``run``.
    """
    bundles = _open(paths)
    first = next(iter(bundles.values()))
    protocol = protocol or Protocol()
    with tempfile.TemporaryDirectory(prefix="edgevlm-") as folder:
        comparisons = {}
        for graph in [component.name for component in first.manifest.components]:
            subjects = _graph_subjects(bundles, graph, n_threads, Path(folder))
            comparisons[graph] = _timed(graph, subjects, protocol, progress)
        subjects = _whole_subjects(bundles, n_threads, Path(folder))
        comparisons[WHOLE] = _timed(WHOLE, subjects, protocol, progress)
    return BundleBenchmark(bundles=tuple(bundles), comparisons=comparisons)


def _open(paths: Sequence[str | os.PathLike[str]]) -> dict[str, Bundle]:
    if not paths:
        raise UsageError("No bundle was named.", hint="Name one or more that compile wrote.")
    names = [os.fspath(path).rstrip("/") for path in paths]
    if len({Path(name).resolve() for name in names}) < len(names):
        raise UsageError("A bundle was named twice.", hint="Name each once; a bundle's ratio to itself is 1.")
    bundles = {name: open_bundle(path) for name, path in zip(names, paths, strict=True)}
    for bundle in bundles.values():
        bundle.check_requires()
    tasks = {bundle.manifest.task for bundle in bundles.values()}
    if len(tasks) > 1:
        raise UsageError(
            f"The bundles are of unlike tasks: {', '.join(sorted(tasks))}.", hint="Compare like with like."
        )
    return bundles


def _timed(what: str, subjects: Sequence[Subject], protocol: Protocol, progress: Progress) -> Comparison:
    started = time.monotonic()
    progress(StepStarted(what, f"{len(subjects)} in turn"))

    def say(text: str, done: int, n: int) -> None:
        progress(StepProgress(what, done / n if n else None, text))

    comparison = compare(subjects, baseline=subjects[0].name, protocol=protocol, progress=say)
    if not comparison.is_valid:
        again = compare(subjects, baseline=subjects[0].name, protocol=extended(protocol), progress=say)
        comparison = msgspec.structs.replace(again, was_extended=True)
    progress(StepFinished(what, time.monotonic() - started))
    return comparison


def _graph_subjects(bundles: Mapping[str, Bundle], graph: str, n_threads: int | None, folder: Path) -> list[Subject]:
    subjects = []
    for i, (name, bundle) in enumerate(bundles.items()):
        component = next((each for each in bundle.manifest.components if each.name == graph), None)
        if component is None:
            continue
        for file in component.files:
            bundle.file(file)
        inputs = folder / f"{graph}-{i}.npz"
        np.savez(inputs, allow_pickle=False, **_graph_inputs(bundle, component, picture=_first_picture(bundles)))
        subjects.append(
            Subject(
                name=name,
                backend=component.backend,
                file=str(bundle.root / component.file),
                inputs=str(inputs),
                session=_with_threads(component.session, n_threads),
            )
        )
    return subjects


def _graph_inputs(bundle: Bundle, component: Component, *, picture: Path) -> dict[str, Array]:
    pipeline = Pipeline.from_bundle(bundle)
    image, text = pipeline.processing.image, pipeline.processing.text
    if any(spec.name == image.input_name for spec in component.inputs):
        rows = {image.input_name: pipeline.preprocess(picture)[None]}
    else:
        assert text is not None, "a graph that takes no picture takes text"
        labels = bundle.manifest.golden.cases[0].labels or ("",)
        prompt = text.prompt_template.replace("{}", labels[0])
        rows = tokenize([prompt], load_tokenizer(bundle.file(text.tokenizer), text), text)
    batch = fixed_batch(pipeline.sessions[component.name]) or 1
    return {name: np.repeat(value, batch, axis=0) for name, value in rows.items()}


def _whole_subjects(bundles: Mapping[str, Bundle], n_threads: int | None, folder: Path) -> list[Subject]:
    inputs = folder / "picture.npz"
    np.savez(inputs, allow_pickle=False, picture=np.frombuffer(_first_picture(bundles).read_bytes(), dtype=np.uint8))
    return [
        Subject(
            name=name,
            backend=f"{WholePipeline.__module__}:{WholePipeline.__name__}",
            file=str(bundle.origin.resolve()),
            inputs=str(inputs),
            session=_with_threads(bundle.manifest.components[0].session, n_threads),
        )
        for name, bundle in bundles.items()
    ]


def _first_picture(bundles: Mapping[str, Bundle]) -> Path:
    bundle = next(iter(bundles.values()))
    if not bundle.manifest.golden.cases:
        raise UsageError(f"'{bundle.origin}' holds no golden picture to time with.", hint="Compile the model again.")
    return bundle.file(bundle.manifest.golden.cases[0].picture)


def _with_threads(session: SessionOptions, n_threads: int | None) -> SessionOptions:
    return session if n_threads is None else msgspec.structs.replace(session, n_threads=n_threads)


class WholePipeline:
    """A bundle as a worker's backend: from an encoded picture to the answer."""

    name = "onnxruntime"

    def version(self) -> str | None:
        return None

    def open(self, file: Path, options: SessionOptions) -> WholeSession:
        bundle = open_bundle(file)
        components = tuple(
            msgspec.structs.replace(part, session=options_for_turns(part.backend, part.session))
            for part in bundle.manifest.components
        )
        manifest = msgspec.structs.replace(bundle.manifest, components=components)
        pipeline = Pipeline.from_bundle(
            dataclasses.replace(bundle, manifest=manifest), n_threads=options.n_threads or None
        )
        return WholeSession(pipeline, labels=manifest.golden.cases[0].labels or None)


class WholeSession:
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, pipeline: Pipeline, *, labels: Sequence[str] | None) -> None:
        self._pipeline = pipeline
        self._labels = labels

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        answer: Result = self._pipeline(feeds[_PICTURE].tobytes(), labels=self._labels)
        assert answer is not None
        return {}
