"""How good a teacher or a student is on pictures that nobody trained on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgevlm.data.data_set import DataSet
from edgevlm.distillation.teachers import Teacher, TorchTeacher
from edgevlm.evaluation.evaluation import evaluate
from edgevlm.families import MASKS, load_family
from edgevlm.model import Graph
from edgevlm.runtime.image import decode_image, preprocess
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import Array, TensorSpec

_PICTURES_IN_A_CALL = 8

Answers = Mapping[str, Array]


def judge(model: Teacher, data: DataSet, expected: Answers) -> dict[str, float]:
    """The metrics of the model's task.

    Args: expected: the teacher's answers for the same pictures; empty where no metric compares with them.
    """
    if model.model.task == MASKS:
        assert isinstance(model, TorchTeacher), "an encoder and a decoder in PyTorch"
        return _of_masks(model, data)
    return metrics_of(answers_of(model, data), expected, data)


# --- masks ------------------------------------------------------------------------------------------------


class _TorchSession:
    """A graph of a module in PyTorch, as the runtime's pipeline runs one."""

    def __init__(self, teacher: TorchTeacher, graph: Graph) -> None:
        self._teacher, self._graph = teacher, graph
        self._family = load_family(teacher.model.family)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return ()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        with torch.inference_mode():
            given = [torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in self._graph.inputs]
            found = self._family.call(self._teacher.module, self._graph.name, *given)
        return {name: value.numpy() for name, value in zip(self._graph.outputs, found, strict=True)}


def _of_masks(model: TorchTeacher, data: DataSet) -> dict[str, float]:
    """Mean overlap with the true outlines, asked by boxes and by points, through the runtime's own postprocessing."""
    pipeline = Pipeline.from_parts(
        task=MASKS,
        processing=model.processing,
        sessions={graph.name: _TorchSession(model, graph) for graph in model.model.graphs},
    )
    found = evaluate(pipeline, data)
    return {found.metric: found.value, **{name: float(value) for name, value in found.others.items()}}


# --- classes and embeddings -------------------------------------------------------------------------------


def answers_of(model: Teacher, data: DataSet) -> dict[str, Array]:
    """Logits, or embeddings of pictures and of the class names, over all pictures in order."""
    image = model.processing.image
    found: dict[str, list[Array]] = {}
    for start in range(0, len(data), _PICTURES_IN_A_CALL):
        samples = data.samples[start : start + _PICTURES_IN_A_CALL]
        pixels = np.stack([preprocess(decode_image(sample.read()), image) for sample in samples])
        for key, value in model.outputs(pixels, frozenset({"logits", "image_embeds"})).items():
            found.setdefault(key, []).append(value)
    whole = {key: np.concatenate(values) for key, values in found.items()}
    text = model.processing.text
    if text is not None:
        prompts = [text.prompt_template.replace("{}", name) for name in data.class_names]
        whole |= model.text_outputs(prompts, frozenset({"text_embeds"}))
    return whole


def metrics_of(answers: Mapping[str, Array], expected: Mapping[str, Array], data: DataSet) -> dict[str, float]:
    labels = np.array([-1 if sample.label is None else sample.label for sample in data.samples])
    scores, theirs = _scores(answers), _scores(expected)
    best, their_best = scores.argmax(1), theirs.argmax(1)
    found = {"top-1 as the teacher": float((best == their_best).mean())}
    if (labels >= 0).all():
        found["top-1"] = float((best == labels).mean())
    if "text_embeds" in answers:
        # Of a class's name to pictures: is one of its pictures among the nearest?
        ranked = np.argsort(-scores, axis=0, kind="stable")
        for k in (1, 5):
            hit = [bool((labels[ranked[:k, c]] == c).any()) for c in range(scores.shape[1]) if (labels == c).any()]
            found[f"recall@{k}"] = float(np.mean(hit))
    return found


def _scores(answers: Mapping[str, Array]) -> Array:
    if "logits" in answers:
        return answers["logits"]
    pictures, texts = (
        value / np.linalg.norm(value, axis=1, keepdims=True)
        for value in (answers["image_embeds"], answers["text_embeds"])
    )
    scores: Array = pictures @ texts.T
    return scores
