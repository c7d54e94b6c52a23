"""A picture in, an answer out: what a device runs, and what the compile side evaluates candidates with."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edgevlm.errors import UsageError
from edgevlm.runtime.backends import Session, load_backend
from edgevlm.runtime.bundle import Bundle, open_bundle
from edgevlm.runtime.image import ImageSource, Size, check_image_processing, decode_image, preprocess, size_of
from edgevlm.runtime.prompts import Box, Point, prompts_of
from edgevlm.runtime.session import LazySessions
from edgevlm.runtime.spec import Array, Component, Manifest, Processing, Prompt, Scoring
from edgevlm.runtime.tasks import Parts, Prompted, Result, load_task

OpenGraph = Callable[[Component, Path], Session]


class Pipeline:
    """Preprocessing, graphs and postprocessing of one model.

    Example:
        >>> pipeline = Pipeline.load("mobilenet.evlm")  # doctest: +SKIP
        >>> print(pipeline("cat.jpg").to_text())  # doctest: +SKIP
    """

    def __init__(self, task: str, parts: Parts, manifest: Manifest | None) -> None:
        """Take parts that were checked; ``load`` and ``from_parts`` check them."""
        self.task = task
        self.manifest = manifest
        self.processing = parts.processing
        self.labels = parts.labels
        self.scoring = parts.scoring
        self.sessions = parts.sessions
        self._task = load_task(task)(parts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, n_threads: int | None = None) -> Pipeline:
        """The pipeline of a bundle: a folder or an ``.evlm`` archive.

        Args:    n_threads: instead of what the bundle says; 0 is all cores that this process may use.
        Raises:  BundleError: the bundle breaks a rule. MissingToolError: this machine cannot run it.
        """
        bundle = open_bundle(path)
        bundle.check_requires()
        return cls.from_bundle(bundle, n_threads=n_threads)

    @classmethod
    def from_bundle(
        cls, bundle: Bundle, *, n_threads: int | None = None, open_graph: OpenGraph | None = None
    ) -> Pipeline:
        """The pipeline of an open bundle; its image graph is opened now, others when they are needed.

        Args: open_graph: what opens the graphs in their backend's place.
        """
        if n_threads is not None and n_threads < 0:
            raise UsageError(f"There cannot be {n_threads} threads.", hint="Give a number above 0, or 0 for all cores.")
        manifest = bundle.manifest
        openers = {
            component.name: functools.partial(_open_session, bundle, component, n_threads, open_graph)
            for component in manifest.components
        }
        sessions = LazySessions(openers)
        _ = sessions[load_task(manifest.task).needs[0].component]
        parts = Parts(
            sessions=sessions,
            processing=manifest.processing,
            labels=manifest.labels,
            scoring=manifest.scoring,
            file=bundle.file,
        )
        return cls(manifest.task, parts, manifest)

    @classmethod
    def from_parts(
        cls,
        *,
        task: str,
        processing: Processing,
        sessions: Mapping[str, Session],
        labels: Sequence[str] = (),
        scoring: Scoring | None = None,
        folder: Path | None = None,
    ) -> Pipeline:
        """A pipeline without a bundle.

        Args:    folder: what the paths in ``processing`` and ``scoring`` are relative to.
        Raises:  UsageError: there is no such task. BundleError: the parts do not make one.
        """
        check_image_processing(processing.image)
        load_task(task).check(frozenset(sessions), processing, scoring)
        parts = Parts(
            sessions=sessions,
            processing=processing,
            labels=tuple(labels),
            scoring=scoring,
            file=(folder or Path()).joinpath,
        )
        return cls(task, parts, None)

    def __call__(
        self,
        image: ImageSource,
        *,
        labels: Sequence[str] | None = None,
        top_k: int | None = None,
        points: Sequence[Point] = (),
        boxes: Sequence[Box] = (),
    ) -> Result:
        """The answer for one picture.

        Args:
            labels: what to choose from, where the bundle holds a text encoder.
            top_k: how many classes or boxes the answer names at most; 5 classes or every box where left out.
            points: (x, y) on the thing to cut out, (x, y, 0) beside it; all of them show one thing.
            boxes: (left, top, right, bottom), each around one thing to cut out.
        Units:  points and boxes are in pixels of the upright picture.
        Raises: DataError: the picture cannot be read. UsageError: what was asked cannot be used.
        """
        return self.encode(image).answer(labels=labels, top_k=top_k, points=points, boxes=boxes)

    def encode(self, image: ImageSource) -> EncodedPicture:
        """What the image graph makes of a picture, to ask about it more than once.

        Raises: DataError: the picture cannot be read.
        """
        picture = decode_image(image)
        outputs = self.outputs(preprocess(picture, self.processing.image)[None])
        return EncodedPicture(pipeline=self, outputs=outputs, size=size_of(picture))

    def preprocess(self, image: ImageSource) -> Array:
        """A picture as the graph takes it.

        Shapes: float32 [3, height, width].
        """
        return preprocess(decode_image(image), self.processing.image)

    def outputs(self, pixel_values: Array) -> dict[str, Array]:
        """What the image graph gives, by output name.

        Shapes: pixel_values float32 [n, 3, height, width] for any n, whatever batch the graph was built for.
        """
        expected = (3, self.processing.image.height, self.processing.image.width)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected or len(pixel_values) == 0:
            raise UsageError(
                f"The pixel values have the shape {pixel_values.shape}, not (n, {', '.join(map(str, expected))}).",
                hint="Make them with Pipeline.preprocess and numpy.stack.",
            )
        return self._task.outputs(pixel_values.astype(np.float32, copy=False))

    def predict(
        self,
        pixel_values: Array,
        *,
        labels: Sequence[str] | None = None,
        top_k: int | None = None,
        sizes: Sequence[Size] | None = None,
        prompts: Sequence[Sequence[Prompt]] | None = None,
    ) -> tuple[Result, ...]:
        """One answer per row of ``pixel_values``, in order.

        Args: sizes, prompts: as for ``results``.
        """
        return self.results(self.outputs(pixel_values), labels=labels, top_k=top_k, sizes=sizes, prompts=prompts)

    def results(
        self,
        outputs: Mapping[str, Array],
        *,
        labels: Sequence[str] | None = None,
        top_k: int | None = None,
        sizes: Sequence[Size] | None = None,
        prompts: Sequence[Sequence[Prompt]] | None = None,
    ) -> tuple[Result, ...]:
        """The answers that follow from what ``outputs`` gave.

        Args:
            sizes: (height, width) of each picture as it came, for boxes and masks in its own pixels; where left out
                they are in those of the graph's input.
            prompts: what each picture is asked about, where the task is asked about places.
        """
        if top_k is not None and top_k < 1:
            raise UsageError(f"An answer cannot name {top_k} classes.", hint="Ask for at least 1.")
        if isinstance(labels, str):
            raise UsageError("The labels came as one text.", hint="Pass a list: ['cat', 'dog'].")
        n_rows = len(next(iter(outputs.values())))
        if sizes is not None and len(sizes) != n_rows:
            raise UsageError(
                f"There are {len(sizes)} sizes for {n_rows} pictures.", hint="Give each picture's (height, width)."
            )
        if prompts is not None:
            return self._prompted(outputs, prompts, n_rows=n_rows, sizes=sizes, is_plain=labels is None is top_k)
        names = None if labels is None else tuple(labels)
        return self._task.results(outputs, labels=names, top_k=top_k, sizes=sizes)

    def _prompted(
        self,
        outputs: Mapping[str, Array],
        prompts: Sequence[Sequence[Prompt]],
        *,
        n_rows: int,
        sizes: Sequence[Size] | None,
        is_plain: bool,
    ) -> tuple[Result, ...]:
        if not isinstance(self._task, Prompted):
            raise UsageError(f"A model for {self.task} takes no points or boxes.", hint="Leave them out.")
        if not is_plain:
            raise UsageError(f"A model for {self.task} takes no labels and ranks nothing.", hint="Leave both out.")
        if len(prompts) != n_rows:
            raise UsageError(f"There are prompts for {len(prompts)} of {n_rows} pictures.", hint="Give each its own.")
        return self._task.prompted_results(outputs, prompts=prompts, sizes=sizes)


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedPicture:
    """A picture that the image graph has seen.

    Args: size: (height, width) of the picture as it came.
    """

    pipeline: Pipeline
    outputs: Mapping[str, Array]
    size: Size

    def answer(
        self,
        *,
        labels: Sequence[str] | None = None,
        top_k: int | None = None,
        points: Sequence[Point] = (),
        boxes: Sequence[Box] = (),
    ) -> Result:
        """The answer to one question about the picture.

        Args: as for ``Pipeline.__call__``.
        """
        prompts = prompts_of(points, boxes)
        asked = [prompts] if prompts else None
        return self.pipeline.results(self.outputs, labels=labels, top_k=top_k, sizes=[self.size], prompts=asked)[0]


def _open_session(bundle: Bundle, component: Component, n_threads: int | None, open_graph: OpenGraph | None) -> Session:
    for file in component.files:
        bundle.file(file)
    options = component.session
    if n_threads is not None:
        options = msgspec.structs.replace(options, n_threads=n_threads)
    if open_graph is not None:
        return open_graph(component, bundle.root / component.file)
    return load_backend(component.backend).open(bundle.root / component.file, options)
