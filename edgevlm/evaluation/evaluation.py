"""Run a pipeline over a data set, judge its answers, and compare two such runs picture by picture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edgevlm.data.annotated import ANNOTATED_TASKS, MASKS
from edgevlm.data.data_set import Count, DataSet
from edgevlm.data.prompts import prompts_of_sample
from edgevlm.data.readers import read_data_set
from edgevlm.errors import DataError, UsageError
from edgevlm.evaluation.intervals import bootstrap_mean, bootstrap_pooled, paired_proportions, wilson
from edgevlm.evaluation.metrics import METRICS, TOP_K, Boxes, Embeddings, Metric, Pooled
from edgevlm.evaluation.pixels import picture_sizes, pixel_slices
from edgevlm.runtime.bundle import check_same_task
from edgevlm.runtime.classes import need_finite
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.session import output_of
from edgevlm.runtime.spec import Accuracy, Array, Spec

ZERO_SHOT = "zero-shot-image-classification"

# What YOLOX and the COCO tools evaluate with: boxes below hardly change the precision, and cost time.
_EVERY_BOX = 0.001
_MOST_BOXES = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """One pipeline's answers on one data set.

    Args:
        value: the mean of ``scores``, or the metric of all pictures together where ``pooled`` says so.
        n: pictures that were judged.
        others: further metrics, by name.
        is_relative: the scores compare with a reference pipeline, whose own are 1 by definition.
        pictures: digest of the pictures in their order: two evaluations are paired where it is the same.
        pooled: of a metric that is no mean over pictures.
    Shapes: ``scores`` [n]; ``predictions`` [len(data), k] class indices, [len(data), d] embeddings, or [len(data)]
        answers with boxes or masks.
    """

    metric: str
    value: float
    n: int
    scores: Array
    predictions: Array
    others: Mapping[str, float]
    is_binary: bool
    is_relative: bool
    data: str
    has_labels: bool
    pictures: str
    pooled: Pooled | None = None

    def interval(self, *, confidence: float = 0.95) -> tuple[float, float]:
        """Of ``value``: Wilson's for what is right or wrong, else a bootstrap."""
        if self.is_binary:
            return wilson(round(float(self.scores.sum())), self.n, confidence=confidence)
        if self.pooled is not None:
            return bootstrap_pooled(self.pooled.values, self.n, confidence=confidence)
        return bootstrap_mean(self.scores, confidence=confidence)


class Drop(Spec, frozen=True, kw_only=True):
    """How far a candidate falls behind a reference on the same pictures, with a 95 % interval.

    Units: fractions (0.01 is one point); ``value`` = ``reference`` - ``candidate``, so above 0 is worse.
    Args:
        n_worse: pictures on which the candidate scores lower; ``n_better`` higher.
        interval: how the interval was made.
        others: the candidate's further metrics by name, among them how far its answers are the reference's.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    candidate: float
    reference: float
    n_worse: int
    n_better: int
    interval: str
    data: str
    has_labels: bool
    others: dict[str, float] = {}

    def to_accuracy(self) -> Accuracy:
        """As a bundle's manifest states it."""
        return Accuracy(
            metric=self.metric,
            value=self.candidate,
            reference=self.reference,
            drop=self.value,
            drop_low=self.low,
            drop_high=self.high,
            n=self.n,
            data=self.data,
            has_labels=self.has_labels,
            others=self.others,
        )


class BundleEvaluation(Spec, frozen=True, kw_only=True):
    """What ``edgevlm evaluate`` finds.

    Args:
        digest: of the data set's contents.
        drop: from the bundle that it was compared with.
        recorded: what the bundle says of itself, on the data that it was compiled with.
    """

    bundle: str
    task: str
    data: str
    digest: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    others: dict[str, float]
    notes: tuple[str, ...]
    drop: Drop | None
    recorded: Accuracy | None


def evaluate(
    pipeline: Pipeline,
    data: DataSet,
    *,
    reference: Evaluation | None = None,
    batch: int = 1,
    folder: Path | None = None,
    count: Count | None = None,
) -> Evaluation:
    """Judge a pipeline on a data set by its task's metric.

    With labels that is top-1 (or, for embeddings, whether the nearest other picture is of the same class; mAP50 of
    boxes; mIoU of masks, of classes or of prompted things); without, how far the answers agree with ``reference``'s.

    Args:
        reference: the float model's evaluation on the same pictures; None where this *is* the float model.
        batch: pictures in a call. It is part of what is judged: dynamic quantization scales by the whole batch.
        folder: keeps preprocessed pictures for the next candidate.
    Raises:  DataError: a picture cannot be used. UsageError: ``reference`` is of other pictures.
    """
    metric, predictions = _predict(pipeline, data, batch=batch, folder=folder, count=count)
    pictures = _pictures(data)
    if reference is not None and reference.pictures != pictures:
        raise UsageError(f"The reference was evaluated on other pictures than those of '{data.name}'.")
    judgement = metric.judge(
        predictions, labels=_truths(data), reference=None if reference is None else reference.predictions
    )
    pooled = judgement.pooled
    return Evaluation(
        metric=judgement.metric,
        value=float(judgement.scores.mean()) if pooled is None else pooled.value,
        pooled=pooled,
        n=len(judgement.scores),
        scores=judgement.scores,
        predictions=predictions,
        others=judgement.others,
        is_binary=judgement.is_binary,
        is_relative=judgement.is_relative,
        data=data.name,
        has_labels=data.has_labels,
        pictures=pictures,
    )


def compare_evaluations(candidate: Evaluation, reference: Evaluation, *, seed: int = 0) -> Drop:
    """How far ``candidate`` falls behind ``reference``, picture by picture.

    The interval is Bonett and Price's where each picture is right or wrong; Wilson's of the share that differs where
    the score *is* agreement with the reference, which cannot be better than the reference itself; else a bootstrap of
    the paired differences, or for a metric of all pictures together of the difference over the same drawn pictures.

    Raises: UsageError: they are not evaluations of the same pictures by the same metric.
    """
    if (candidate.metric, candidate.pictures) != (reference.metric, reference.pictures):
        raise UsageError(
            f"'{candidate.metric}' on '{candidate.data}' cannot be compared with '{reference.metric}' on "
            f"'{reference.data}'.",
            hint="Evaluate both on the same data set.",
        )
    n = candidate.n
    drops = reference.scores - candidate.scores
    n_worse, n_better = int((drops > 0).sum()), int((drops < 0).sum())
    if candidate.is_binary and candidate.is_relative:
        interval, (low, high) = "Wilson", wilson(n_worse, n)
    elif candidate.is_binary:
        interval, (low, high) = "Bonett-Price", paired_proportions(n_worse, n_better, n)
    elif candidate.pooled is not None and reference.pooled is not None:
        mine, theirs = candidate.pooled, reference.pooled
        interval = "paired bootstrap"
        low, high = bootstrap_pooled(lambda weights: theirs.values(weights) - mine.values(weights), n, seed=seed)
    else:
        interval, (low, high) = "paired bootstrap", bootstrap_mean(drops, seed=seed)
    return Drop(
        metric=candidate.metric,
        value=reference.value - candidate.value if candidate.pooled else float(drops.mean()),
        low=low,
        high=high,
        n=n,
        candidate=candidate.value,
        reference=reference.value,
        n_worse=n_worse,
        n_better=n_better,
        interval=interval,
        data=candidate.data,
        has_labels=candidate.has_labels,
        others=dict(candidate.others),
    )


def evaluate_bundle(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    n_threads: int | None = None,
    cache: Path | None = None,
    count: Count | None = None,
) -> BundleEvaluation:
    """Judge a bundle on a data set, with what the base install has.

    Args:
        source: as ``read_data_set`` takes it.
        reference: another bundle, such as the float one, to state the drop from; needed where the data has no labels.
        cache: a folder that keeps the pictures' digests.
    Raises:  DataError: the data set cannot be used. BundleError, MissingToolError: a bundle cannot.
    """
    paths = [path] if reference is None else [reference, path]
    return evaluate_bundles(paths, source, n_threads=n_threads, cache=cache, count=count)[-1]


def evaluate_bundles(
    paths: Sequence[str | os.PathLike[str]],
    source: str | os.PathLike[str],
    *,
    n_threads: int | None = None,
    cache: Path | None = None,
    count: Count | None = None,
) -> tuple[BundleEvaluation, ...]:
    """Judge bundles of one task on the same pictures, each once; all but the first with their drop from it.

    Args: as ``evaluate_bundle``.
    Raises: as ``evaluate_bundle``; data without labels needs a second bundle.
    """
    # Generated pictures are drawn at the size of the last, which is the one that is asked about.
    pipelines = [Pipeline.load(path, n_threads=n_threads) for path in paths]
    asked = pipelines[-1]
    check_same_task({os.fspath(path): pipeline.task for path, pipeline in zip(paths, pipelines, strict=True)})
    size = max(asked.processing.image.height, asked.processing.image.width)
    data = read_data_set(
        source, labels=asked.labels, task=asked.task, cache=cache, count=count, shapes_size=min(size, 256)
    )
    if not data.has_labels and len(paths) == 1:
        raise DataError(
            f"'{data.name}' has no labels that the bundle knows, so there is nothing to judge its answers by.",
            hint="Pass a data set with labels, or a second bundle to compare the answers with.",
        )
    found: list[BundleEvaluation] = []
    first: Evaluation | None = None
    for path, pipeline in zip(paths, pipelines, strict=True):
        _check_classes(path, pipeline, data, paths[-1], asked)
    for path, pipeline in zip(paths, pipelines, strict=True):
        evaluation = _evaluate_bundled(pipeline, data, first, count)
        low, high = evaluation.interval()
        found.append(
            BundleEvaluation(
                bundle=os.fspath(path),
                task=pipeline.task,
                data=data.name,
                digest=data.digest,
                metric=evaluation.metric,
                value=evaluation.value,
                low=low,
                high=high,
                n=evaluation.n,
                others=dict(evaluation.others),
                notes=data.notes,
                drop=compare_evaluations(evaluation, first) if first else None,
                recorded=pipeline.manifest.accuracy if pipeline.manifest else None,
            )
        )
        first = first or evaluation
    return tuple(found)


def _check_classes(
    path: str | os.PathLike[str], pipeline: Pipeline, data: DataSet, asked_path: str | os.PathLike[str], asked: Pipeline
) -> None:
    """Raises: UsageError: the bundle answers with numbers that mean other classes than the data's."""
    meant = asked.labels or (data.class_names if data.has_labels else ())
    is_alike = bool(pipeline.labels) == bool(asked.labels) or data.has_labels
    if not is_alike or (pipeline.labels and meant and tuple(pipeline.labels) != tuple(meant)):
        raise UsageError(
            f"The classes of '{os.fspath(path)}' are not those that '{os.fspath(asked_path)}' is judged by.",
            hint="Compare bundles that were compiled for the same classes, in the same order (--labels).",
        )


def _evaluate_bundled(
    pipeline: Pipeline, data: DataSet, reference: Evaluation | None, count: Count | None
) -> Evaluation:
    batch = pipeline.manifest.batch if pipeline.manifest else None
    return evaluate(pipeline, data, reference=reference, batch=batch or 1, count=count)


def _predict(
    pipeline: Pipeline, data: DataSet, *, batch: int, folder: Path | None, count: Count | None
) -> tuple[Metric, Array]:
    """What the pipeline answers, in the form that its metric judges."""
    if not data.samples:
        raise DataError(f"'{data.name}' holds no pictures.", hint="Pass a data set with pictures.")
    # Two towers without any labels to tell apart: what is left to judge is the image tower's vector.
    is_vector = pipeline.task == ZERO_SHOT and not (pipeline.labels or data.has_labels)
    metric = Embeddings() if is_vector else METRICS[pipeline.task]()
    if pipeline.processing.detection is not None:
        metric = Boxes(score_threshold=pipeline.processing.detection.score_threshold)
        pipeline = _with_every_box(pipeline)
    sizes = picture_sizes(data, folder=folder) if pipeline.task in ANNOTATED_TASKS else None
    # A folded model knows its own labels; one with both towers chooses among the data set's.
    labels = data.class_names if pipeline.task == ZERO_SHOT and not pipeline.labels else None
    top_k = None if sizes else TOP_K
    rows: list[Array] = []
    n_done = 0
    for pixels in pixel_slices(pipeline, data, folder=folder, count=count):
        for start in range(0, len(pixels), batch):
            outputs = pipeline.outputs(pixels[start : start + batch])
            if is_vector:
                rows.append(need_finite(output_of(outputs, "image_embeds"), "image_embeds"))
                continue
            these = slice(n_done, n_done + len(pixels[start : start + batch]))
            of_these = sizes[these] if sizes else None
            prompts = None
            if pipeline.task == MASKS and of_these:
                pairs = zip(data.samples[these], of_these, strict=True)
                prompts = [prompts_of_sample(sample, size) for sample, size in pairs]
            results = pipeline.results(outputs, labels=labels, top_k=top_k, sizes=of_these, prompts=prompts)
            rows.append(metric.collect(results))
            n_done += len(rows[-1])
    return metric, np.concatenate(rows)


def _truths(data: DataSet) -> Array | None:
    """What each picture's answer is judged by."""
    if not data.has_labels:
        return None
    annotations = [sample.annotation for sample in data.samples]
    if any(annotations):
        rows = np.empty(len(annotations), dtype=object)
        rows[:] = annotations
        return rows
    return np.array([sample.label for sample in data.samples])


def _with_every_box(pipeline: Pipeline) -> Pipeline:
    """The same, naming also what users are not shown: average precision weighs boxes by rank, down to the last."""
    assert pipeline.processing.detection is not None
    detection = msgspec.structs.replace(
        pipeline.processing.detection, score_threshold=_EVERY_BOX, max_detections=_MOST_BOXES
    )
    return Pipeline.from_parts(
        task=pipeline.task,
        processing=msgspec.structs.replace(pipeline.processing, detection=detection),
        sessions=pipeline.sessions,
        labels=pipeline.labels,
        scoring=pipeline.scoring,
    )


def _pictures(data: DataSet) -> str:
    return hashlib.sha256("".join(f"{sample.digest} {sample.truth}\n" for sample in data.samples).encode()).hexdigest()
