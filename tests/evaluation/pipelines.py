"""Pipelines over graphs made of numpy: the runtime's own code around a model whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgevlm.data.data_set import DataSet
from edgevlm.data.readers import read_data_set
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import Array, ImageProcessing, Processing, Rescale, Resize, Scoring, TensorSpec
from tests.data.pictures import COLORS, write_folders

SIZE = 8
NAMES = tuple(COLORS)
PROCESSING = Processing(
    image=ImageProcessing(height=SIZE, width=SIZE, steps=(Resize(height=SIZE, width=SIZE), Rescale(factor=1 / 255)))
)


@dataclass(frozen=True)
class NumpySession:
    """A graph: a function of its pixels."""

    output: str
    function: Callable[[Array], Array]
    calls: list[int]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, SIZE, SIZE)),)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name=self.output, dtype="float32", shape=("batch", "features")),)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.calls.append(len(feeds["pixel_values"]))
        return {self.output: self.function(feeds["pixel_values"]).astype(np.float32)}


def mean_color(pixels: Array) -> Array:
    """The logits of a model that tells red, green and blue apart."""
    color: Array = 10 * pixels.mean(axis=(2, 3))
    return color


def classifier(function: Callable[[Array], Array] = mean_color, labels: Sequence[str] = NAMES) -> Pipeline:
    session = NumpySession("logits", function, [])
    return Pipeline.from_parts(
        task="image-classification", processing=PROCESSING, sessions={"model": session}, labels=labels
    )


def extractor(function: Callable[[Array], Array] = mean_color) -> Pipeline:
    session = NumpySession("pooler_output", function, [])
    return Pipeline.from_parts(task="image-feature-extraction", processing=PROCESSING, sessions={"model": session})


def two_towers(folder: Path, labels: Sequence[str] = NAMES) -> Pipeline:
    """Its label embeddings are the three colours."""
    np.save(folder / "labels.npy", np.eye(3, dtype=np.float32)[[NAMES.index(label) for label in labels]])
    return Pipeline.from_parts(
        task="zero-shot-image-classification",
        processing=PROCESSING,
        sessions={"image_encoder": NumpySession("image_embeds", mean_color, [])},
        labels=labels,
        scoring=Scoring(scale=10.0, label_embeddings="labels.npy"),
        folder=folder,
    )


def calls(pipeline: Pipeline) -> list[int]:
    """How many pictures each run of the image graph had."""
    (session,) = pipeline.sessions.values()
    assert isinstance(session, NumpySession)
    return session.calls


def colors(root: Path, n: int = 10, *, task: str = "image-classification", labels: Sequence[str] = NAMES) -> DataSet:
    """``n`` pictures of each colour, in folders."""
    if not root.exists():
        write_folders(root, dict.fromkeys(NAMES, n))
    return read_data_set(root, labels=labels, task=task)
