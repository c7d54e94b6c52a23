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
from edgevlm.measure.arrays import save_arrays
from edgevlm.measure.environment import describe_environment
from edgevlm.measure.interleave import compare
from edgevlm.measure.protocol import ALL_STAY, extended
from edgevlm.measure.spec import Comparison, Environment, Protocol, Subject
from edgevlm.measure.worker import options_for_turns
from edgevlm.progress import Note, Progress, StepFinished, StepProgress, StepStarted, silent
from edgevlm.runtime.bundle import Bundle, check_same_task, open_bundle
from edgevlm.runtime.image import decode_image, preprocess, size_of
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import Array, Component, Prompt, SessionOptions, Spec, TensorSpec, from_json, to_json
from edgevlm.runtime.tasks import Result
from edgevlm.runtime.tasks.mask_generation import MASK_DECODER, decoder_prompts
from edgevlm.runtime.text import load_tokenizer, tokenize

BundlePath = str | os.PathLike[str]

WHOLE = "end to end"
_PICTURE, _PROMPTS = "picture", "prompts"


class BundleBenchmark(Spec, frozen=True, kw_only=True):
    """What ``edgevlm benchmark`` finds.

    Args:
        comparisons: by graph, and ``end to end``: decode, preprocess, graph and answer for one picture. The baseline
            is the first bundle, or the first that has the graph.
        batches: graph -> rows in each of its runs. End to end is always one picture.
        picture_size: width and height of the encoded picture, which decoding takes its time for.
    """

    bundles: tuple[str, ...]
    task: str
    comparisons: dict[str, Comparison]
    batches: dict[str, int]
    picture_size: tuple[int, int]
    environment: Environment


def benchmark_bundles(
    *paths: BundlePath | Sequence[BundlePath],
    n_threads: int | None = None,
    protocol: Protocol | None = None,
    progress: Progress = silent,
) -> BundleBenchmark:
    """Time bundles in turns, each in a process of its own, on the first one's golden picture.

    What cannot be trusted is measured once more, longer.

    Args:
        paths: folders or ``.evlm`` archives, one by one or as a list.
        n_threads: for all; what each bundle was compiled for where left out, all cores where 0.
    Raises: UsageError: no bundle, one twice, or bundles that cannot be compared. BundleError, MissingToolError: as
        ``run``.

    Example:
        >>> found = benchmark_bundles("float/", "int8/", n_threads=1)  # doctest: +SKIP
        >>> found.comparisons["end to end"].ratio("int8").value  # doctest: +SKIP
        0.61
    """
    if n_threads is not None and n_threads < 0:
        raise UsageError(f"There cannot be {n_threads} threads.", hint="Give a number above 0, or 0 for all cores.")
    bundles = _open([path for each in paths for path in ([each] if isinstance(each, str | os.PathLike) else each)])
    protocol = protocol or ALL_STAY
    picture, prompts = _first_case(bundles)
    graphs = dict.fromkeys(part.name for bundle in bundles.values() for part in bundle.manifest.components)
    batches = {graph: _batch_of(graph, bundles) for graph in graphs}
    comparisons = {}
    with tempfile.TemporaryDirectory(prefix="edgevlm-") as folder:
        for graph, batch in batches.items():
            subjects = _graph_subjects(bundles, graph, picture, prompts, batch, n_threads, Path(folder))
            comparisons[graph] = timed(graph, subjects, protocol, progress)
        subjects = _whole_subjects(bundles, picture, prompts, n_threads, Path(folder))
        comparisons[WHOLE] = timed(WHOLE, subjects, protocol, progress)
    return BundleBenchmark(
        bundles=tuple(bundles),
        task=next(iter(bundles.values())).manifest.task,
        comparisons=comparisons,
        batches=batches,
        picture_size=decode_image(picture).size,
        environment=describe_environment(),
    )


def _open(paths: Sequence[BundlePath]) -> dict[str, Bundle]:
    if not paths:
        raise UsageError("No bundle was named.", hint="Name one or more that compile wrote.")
    names = [str(Path(path)) for path in paths]
    seen: dict[Path, str] = {}
    for name in names:
        if (twin := seen.setdefault(Path(name).resolve(), name)) is not name:
            also = "" if twin == name else f", also as '{twin}'"
            raise UsageError(
                f"The bundle '{name}' was named twice{also}.", hint="Name each once; a bundle's ratio to itself is 1."
            )
    bundles = {name: open_bundle(name) for name in names}
    for bundle in bundles.values():
        bundle.check_requires()
    check_same_task({name: bundle.manifest.task for name, bundle in bundles.items()})
    return bundles


def _batch_of(graph: str, bundles: Mapping[str, Bundle]) -> int:
    """Rows in a run: what the graphs were built for, 1 where that is free."""
    fixed: dict[int, str] = {}
    for name, bundle in bundles.items():
        for part in bundle.manifest.components:
            rows = part.inputs[0].shape[0]
            if part.name == graph and isinstance(rows, int):
                fixed.setdefault(rows, name)
    if len(fixed) > 1:
        (n_one, one), (n_other, other) = list(fixed.items())[:2]
        raise UsageError(
            f"The graph '{graph}' takes {n_one} in a run in '{one}', but {n_other} in '{other}'.",
            hint="Compile both with the same --batch.",
        )
    return next(iter(fixed), 1)


def timed(what: str, subjects: Sequence[Subject], protocol: Protocol, progress: Progress) -> Comparison:
    started = time.monotonic()
    progress(StepStarted(what, f"{len(subjects)} in turn"))

    def say(text: str, done: int, n: int) -> None:
        progress(StepProgress(what, done / n if n else None, text))

    baseline = subjects[0].name
    comparison = compare(subjects, baseline=baseline, protocol=protocol, progress=say)
    if not comparison.is_valid and comparison.measurement(baseline).failure is None:
        progress(Note(f"{what}: measuring again, and longer: {' '.join(comparison.reasons)}"))
        again = compare(subjects, baseline=baseline, protocol=extended(protocol), progress=say)
        comparison = msgspec.structs.replace(again, was_extended=True)
    progress(StepFinished(what, time.monotonic() - started))
    return comparison


def _graph_subjects(
    bundles: Mapping[str, Bundle],
    graph: str,
    picture: Path,
    prompts: Sequence[Prompt],
    batch: int,
    n_threads: int | None,
    folder: Path,
) -> list[Subject]:
    subjects = []
    for i, (name, bundle) in enumerate(bundles.items()):
        component = next((each for each in bundle.manifest.components if each.name == graph), None)
        if component is None:
            continue
        for file in component.files:
            bundle.file(file)
        row = graph_input(bundle, component, picture, prompts)
        inputs = folder / f"{graph}-{i}.npz"
        save_arrays(inputs, {name: np.repeat(value, batch, axis=0) for name, value in row.items()})
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


def graph_input(
    bundle: Bundle, component: Component, picture: Path, prompts: Sequence[Prompt] = ()
) -> dict[str, Array]:
    """One row of what the graph takes, made as the pipeline makes it.

    Args: prompts: places in the picture; the bundle's golden ones where left out.
    """
    image, text = bundle.manifest.processing.image, bundle.manifest.processing.text
    if any(spec.name == image.input_name for spec in component.inputs):
        return {image.input_name: preprocess(decode_image(picture), image)[None]}
    if component.name == MASK_DECODER:
        return _decoder_input(bundle, picture, prompts or golden_prompts(bundle))
    assert text is not None, "a graph that takes no picture takes text"
    labels = golden_labels(bundle) or bundle.manifest.labels or ("",)
    prompt = text.prompt_template.replace("{}", labels[0])
    return tokenize([prompt], load_tokenizer(bundle.file(text.tokenizer), text), text)


def _decoder_input(bundle: Bundle, picture: Path, prompts: Sequence[Prompt]) -> dict[str, Array]:
    """The picture as the bundle's own encoder sees it, with the first prompt."""
    image, prompt = decode_image(picture), prompts[0]
    embeds = Pipeline.from_bundle(bundle).encode(image).outputs["image_embeds"]
    return {"image_embeds": embeds, **decoder_prompts([[prompt]], [size_of(image)], bundle.manifest.processing.image)}


def _whole_subjects(
    bundles: Mapping[str, Bundle], picture: Path, prompts: Sequence[Prompt], n_threads: int | None, folder: Path
) -> list[Subject]:
    inputs = folder / "picture.npz"
    asked = {_PICTURE: picture.read_bytes(), _PROMPTS: to_json(tuple(prompts))}
    save_arrays(inputs, {name: np.frombuffer(data, dtype=np.uint8) for name, data in asked.items()})
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


def _first_case(bundles: Mapping[str, Bundle]) -> tuple[Path, tuple[Prompt, ...]]:
    """A golden picture with its prompts: those of other bundles may lie outside of it."""
    for bundle in bundles.values():
        for case in bundle.manifest.golden.cases:
            return bundle.file(case.picture), case.prompts
    raise UsageError(f"'{next(iter(bundles))}' holds no golden picture to time with.", hint="Compile the model again.")


def golden_labels(bundle: Bundle) -> tuple[str, ...]:
    """The labels that its golden pictures were asked about, where it has none of its own."""
    return next((case.labels for case in bundle.manifest.golden.cases), ())


def golden_prompts(bundle: Bundle) -> tuple[Prompt, ...]:
    """What its first golden picture was asked about, where it takes points and boxes."""
    return next((case.prompts for case in bundle.manifest.golden.cases), ())


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
        pipeline = Pipeline.from_bundle(dataclasses.replace(bundle, manifest=manifest), n_threads=options.n_threads)
        return WholeSession(pipeline, labels=golden_labels(bundle) or None)


class WholeSession:
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, pipeline: Pipeline, *, labels: Sequence[str] | None) -> None:
        self._pipeline = pipeline
        self._labels = labels

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        prompts = from_json(feeds[_PROMPTS].tobytes(), tuple[Prompt, ...])
        seen = self._pipeline.encode(feeds[_PICTURE].tobytes())
        answers: tuple[Result, ...] = self._pipeline.results(
            seen.outputs, labels=self._labels, sizes=[seen.size], prompts=[prompts] if prompts else None
        )
        (answer,) = answers
        assert answer is not None
        return {}


def golden_inputs(bundle: Bundle, component: Component) -> dict[str, Array]:
    """What a graph takes for the bundle's first golden picture, at the batch that it was built for (1 where free).

    Raises: UsageError: the bundle holds no golden picture.
    """
    picture, prompts = _first_case({str(bundle.origin): bundle})
    rows = component.inputs[0].shape[0]
    batch = rows if isinstance(rows, int) else 1
    row = graph_input(bundle, component, picture, prompts)
    return {name: np.repeat(value, batch, axis=0) for name, value in row.items()}
