"""How far everybody's answers fall behind the float graph's: one rule, and edgevlm's own code, for all.

Trained weights: the task's metric on the report split may fall by ``MAX_DROP``. Random weights know no right answer:
the cosine between a picture's vector and the float graph's, after the float graph's mean over the pictures is taken
from both, is at least ``MIN_COSINE`` on every picture. Only 15 to 27 % of the length of such vectors differs between
pictures at all, so that 0.90 after centring is about 0.995 before it.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.suite.preparing import Prepared, padded, report_texts
from benchmarks.suite.remote import RemoteSession
from benchmarks.suite.spec import Judged
from edgevlm.evaluation.evaluation import Evaluation, compare_evaluations, evaluate
from edgevlm.evaluation.intervals import bootstrap_mean
from edgevlm.evaluation.metrics import COSINE, centred_cosine
from edgevlm.measure.spec import Subject
from edgevlm.runtime.backends import Session
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import Array, TensorSpec, from_json, to_json

MAX_DROP = 0.01
MIN_COSINE = 0.90


class Judge:
    """Judges subjects of one case; the float graph answers once."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._reference: Evaluation | None = None
        self._reference_vectors: Array | None = None

    def judge(self, subject: Subject, kept: Path, *, inputs: tuple[TensorSpec, ...] | None = None) -> Judged:
        """Compare with the float graph.

        Args:
            kept: a folder that keeps the verdict, found again while the artifact and the pictures are the same.
            inputs: of the subject's graph, where texts may have to be padded for it.
        Raises: EdgeVLMError: it does not run, or its answers are no numbers.
        """
        record = kept / f"judged-{self._key(subject)}.json"
        if record.is_file():
            return from_json(record.read_bytes(), Judged)
        with ExitStack() as stack:
            reference = self._prepared.float_session
            # One thread: pools of several that wait by spinning take the cores from each other on a busy machine.
            alone = msgspec.structs.replace(subject, session=msgspec.structs.replace(subject.session, n_threads=1))
            session = stack.enter_context(RemoteSession(alone, inputs=reference.inputs, outputs=reference.outputs))
            judged = self._judge(session, session.says, inputs or reference.inputs)
        kept.mkdir(parents=True, exist_ok=True)
        record.write_bytes(to_json(judged))
        return judged

    def _judge(self, session: Session, says: dict[str, str], inputs: tuple[TensorSpec, ...]) -> Judged:
        if self._prepared.case.n_tokens is not None:
            return self._judge_texts(session, says, inputs)
        if self._reference is None:
            self._reference = self._evaluate(self._prepared.float_session, None)
        evaluation = self._evaluate(session, self._reference)
        drop = compare_evaluations(evaluation, self._reference)
        lowest = float(evaluation.scores.min()) if drop.metric == COSINE else None
        return Judged(
            metric=drop.metric,
            value=drop.candidate,
            reference=drop.reference,
            drop=drop.value,
            low=drop.low,
            high=drop.high,
            n=drop.n,
            lowest=lowest,
            is_within=drop.value <= MAX_DROP if lowest is None else lowest >= MIN_COSINE,
            says=says,
            others=drop.others,
        )

    def _evaluate(self, session: Session, reference: Evaluation | None) -> Evaluation:
        job = self._prepared.job
        pipeline = Pipeline.from_parts(
            task=job.model.task,
            processing=job.model.processing,
            sessions={self._prepared.case.graph: session},
            labels=job.model.labels,
        )
        return evaluate(pipeline, job.splits.report, reference=reference, folder=self._prepared.work / "pixels")

    def _judge_texts(self, session: Session, says: dict[str, str], inputs: tuple[TensorSpec, ...]) -> Judged:
        reference = self._prepared.float_session
        if self._reference_vectors is None:
            self._reference_vectors = self._vectors(reference, reference.inputs)
        cosines = centred_cosine(self._vectors(session, inputs), self._reference_vectors)
        low, high = bootstrap_mean(1 - cosines)
        drop = float(1 - cosines.mean())
        return Judged(
            metric=COSINE,
            value=1 - drop,
            reference=1.0,
            drop=drop,
            low=low,
            high=high,
            n=len(cosines),
            lowest=float(cosines.min()),
            is_within=float(cosines.min()) >= MIN_COSINE,
            says=says,
        )

    def _vectors(self, session: Session, inputs: tuple[TensorSpec, ...]) -> Array:
        texts = padded(report_texts(self._prepared), inputs)
        rows = [session.run(row)["text_embeds"] for row in _rows(texts)]
        return np.concatenate(rows)

    def _key(self, subject: Subject) -> str:
        file = Path(subject.file)
        parts = hashlib.sha256(
            f"{self._prepared.digest} {subject.backend} {sorted(subject.session.entries.items())}".encode()
        )
        for part in sorted(file.parent.glob(f"{file.stem}.*")) if file.is_file() else sorted(file.glob("*.json")):
            parts.update(part.read_bytes())
        return parts.hexdigest()[:24]


def _rows(inputs: dict[str, Array]) -> list[dict[str, Array]]:
    n = len(next(iter(inputs.values())))
    return [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(n)]
