"""That an exported int8 graph answers as the program that was trained, on pictures that training never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgevlm.data.data_set import DataSet
from edgevlm.evaluation.evaluation import Evaluation, evaluate
from edgevlm.export import open_source, scoring_of
from edgevlm.model import Model
from edgevlm.plan import TEXT_ENCODER
from edgevlm.progress import Progress, StepProgress, silent
from edgevlm.runtime.backends import Session, load_backend
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import Array, Processing, Scoring, SessionOptions, Spec
from edgevlm.runtime.tasks.zero_shot_image_classification import unit_rows
from edgevlm.runtime.text import load_tokenizer, tokenize
from edgevlm.store import cache_root

# The exported graph must answer as the trained program on so many pictures, and be as right to within so much. What
# keeps two correct ones apart: ONNX Runtime's fused kernels round in integers where the program rounds in floats,
# which flips a value in a thousand after four layers of MobileNetV2 - as many as between ONNX Runtime with and without
# its own fusions.
MIN_AGREEMENT = 0.99
MAX_DIFFERENCE = 0.005

_TEXTS_IN_A_CALL = 32
_VECTORS = "image-feature-extraction"


class Equality(Spec, frozen=True, kw_only=True):
    """The exported graph against the trained program, on pictures that training never saw.

    Args:
        agreement: share of the pictures with the same answer; for vectors the mean cosine.
        trained, exported: the metric of either.
        max_relative_error: of the first output, over all pictures.
    """

    n: int
    agreement: float
    min_agreement: float
    metric: str
    trained: float
    exported: float
    max_difference: float
    max_relative_error: float

    @property
    def holds(self) -> bool:
        return self.agreement >= self.min_agreement and abs(self.trained - self.exported) <= self.max_difference


class Judge:
    """Runs sessions of the image graph through the runtime's own code, over the pictures that training never saw.

    Args:
        work: takes the labels' embeddings.
    """

    def __init__(self, model: Model, labels: tuple[str, ...], data: DataSet, work: Path, graph: str) -> None:
        self.data = data
        self.graph = graph
        self.embeddings: Array | None = None
        self.scoring: Scoring | None = None
        self._model = model
        self._labels = labels
        self._work = work
        if len(model.graphs) > 1 and labels:
            self.embeddings = _label_embeddings(model, labels)
            with (work / "label_embeddings.npy").open("wb") as opened:
                np.save(opened, self.embeddings, allow_pickle=False)
            scoring = scoring_of(model)
            assert scoring is not None, "a model of two towers"
            self.scoring = msgspec.structs.replace(scoring, label_embeddings="label_embeddings.npy")

    def evaluate(
        self, session: Session, reference: Evaluation | None, progress: Progress, what: str, *, batch: int = 64
    ) -> Evaluation:
        def count(done: int, n: int) -> None:
            progress(StepProgress("prove", done / n, f"judging {what}: {done}/{n} pictures"))

        pipeline = self._pipeline(session)
        kept = cache_root() / "pixels"
        return evaluate(pipeline, self.data, reference=reference, batch=batch, folder=kept, count=count)

    def _pipeline(self, session: Session) -> Pipeline:
        is_vector = len(self._model.graphs) > 1 and self.scoring is None
        return Pipeline.from_parts(
            task=_VECTORS if is_vector else self._model.task,
            processing=Processing(image=self._model.processing.image),
            sessions={"model" if is_vector else self.graph: session},
            labels=self._labels,
            scoring=self.scoring,
            folder=self._work,
        )


def _label_embeddings(model: Model, labels: Sequence[str]) -> Array:
    text = model.processing.text
    assert text is not None, "a text tower comes with its processing"
    session = open_source(model, TEXT_ENCODER)
    tokenizer = load_tokenizer(Path(model.tokenizer_file), text)
    prompts = [text.prompt_template.replace("{}", label) for label in labels]
    rows = [
        session.run(tokenize(prompts[i : i + _TEXTS_IN_A_CALL], tokenizer, text))["text_embeds"]
        for i in range(0, len(prompts), _TEXTS_IN_A_CALL)
    ]
    return unit_rows(np.concatenate(rows)).astype(np.float32)


class _Recorded:
    """A session that remembers what it answered first."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.inputs = session.inputs
        self.outputs = session.outputs
        self.answers: list[Array] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        answer = self._session.run(feeds)
        self.answers.append(next(iter(answer.values())))
        return answer


def prove_exported(
    judge: Judge, trained: Session, exported: Session, reference: Evaluation, progress: Progress = silent
) -> tuple[Equality, Evaluation]:
    """Whether the exported graph answers as the trained program; and how well it answers.

    Args:
        reference: the float model's evaluation.
    """
    ours, theirs = _Recorded(trained), _Recorded(exported)
    expected = judge.evaluate(ours, reference, progress, "the trained program")
    got = judge.evaluate(theirs, reference, progress, "the exported graph")
    wanted, found = np.concatenate(ours.answers), np.concatenate(theirs.answers)
    largest = float(np.abs(wanted).max()) or 1.0
    return (
        Equality(
            n=len(judge.data),
            agreement=_agreement(expected.predictions, got.predictions),
            min_agreement=MIN_AGREEMENT,
            metric=got.metric,
            trained=expected.value,
            exported=got.value,
            max_difference=MAX_DIFFERENCE,
            max_relative_error=float(np.abs(wanted - found).max()) / largest,
        ),
        got,
    )


def _agreement(trained: Array, exported: Array) -> float:
    if np.issubdtype(trained.dtype, np.integer):
        return float((trained[:, 0] == exported[:, 0]).mean())
    norms = np.linalg.norm(trained, axis=1) * np.linalg.norm(exported, axis=1)
    return float(((trained * exported).sum(axis=1) / np.maximum(norms, 1e-30)).mean())


def open_graph(file: Path) -> Session:
    return load_backend("onnxruntime").open(file, SessionOptions())
