"""What a quantized model learns from beside the labels: its own float program, or a larger model. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgevlm.data.data_set import DataSet
from edgevlm.distillation.pictures import TrainingPictures
from edgevlm.distillation.teacher_outputs import StoredOutputs, compute_outputs, describe_outputs, place_of
from edgevlm.distillation.teachers import Teacher, teacher_of
from edgevlm.errors import UsageError
from edgevlm.export import scoring_of
from edgevlm.ingest import read_model
from edgevlm.model import Model
from edgevlm.progress import Progress
from edgevlm.runtime.tasks.zero_shot_image_classification import unit_rows

Answers = Callable[[Sequence[int], Tensor], Tensor]
"""From the numbers of training pictures and their pixels to what the first output should be: [n, ...]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """What an image tower's vectors are compared with: the labels' embeddings, of length 1.

    Shapes: ``embeddings`` [number of labels, d].
    """

    embeddings: Tensor
    scale: float
    bias: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """Answers, and the texts that they are compared with: the student's own where null.

    Args:
        name: whose answers; ``digest`` of all that decides them.
    """

    answers: Answers
    texts: Texts | None = None
    name: str = "the float model"
    digest: str = ""


def of_program(program: Callable[[Tensor], Any]) -> Lesson:
    """The float program's own answers, computed in every step."""

    def answers(_rows: Sequence[int], pixels: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = program(pixels)[0]
        return found

    return Lesson(answers=answers)


def of_teacher(
    asked: str, model: Model, data: DataSet, labels: Sequence[str], *, size: Sequence[int], accelerator: Any,
    trust_remote_code: bool = False, progress: Progress,
) -> Lesson:  # fmt: skip
    """A larger model's answers to the training pictures, computed once and stored as `edgevlm distill` stores them.

    Args:
        model: the student's; ``size`` of a row of its first output.
        labels: whose texts the teacher reads too, where it has two towers.
    Raises: UsageError: the teacher answers something else.
    """
    found = read_model(asked, task=model.task, trust_remote_code=trust_remote_code)
    if found.task != model.task:
        raise UsageError(
            f"'{asked}' is for {found.task}, and '{model.name}' for {model.task}.",
            hint="Name a teacher for the same task.",
        )
    teacher = teacher_of(found, device="cpu" if accelerator.device.type == "cpu" else str(accelerator.device))
    name = "logits" if "logits" in teacher.sizes() else "image_embeds"
    is_scored = name == "image_embeds" and bool(labels) and found.processing.text is not None
    theirs = teacher.sizes().get(name)
    if theirs is None or (not is_scored and theirs != tuple(size)):
        raise UsageError(
            f"'{asked}' answers with {list(theirs or ())} values a picture, and '{model.name}' with {list(size)}.",
            hint="Name a teacher with the same classes, or vectors of the same length.",
        )
    # A checkpoint that nobody named the classes of calls them LABEL_0 and so on.
    has_names = found.labels != tuple(f"LABEL_{i}" for i in range(len(found.labels)))
    if found.labels and has_names and labels and found.labels != tuple(labels):
        raise UsageError(f"The classes of '{asked}' are not those of '{model.name}'.", hint="Name another teacher.")
    pictures = TrainingPictures(data, augmentation="none", seed=0, n_variants=1)
    of = describe_outputs(teacher, pictures, frozenset({name}))
    compute_outputs(
        teacher,
        pictures,
        of,
        place_of(of),
        process=accelerator.process_index,
        n_processes=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
        progress=progress,
    )
    stored = StoredOutputs(place_of(of), of)

    def answers(rows: Sequence[int], pixels: Tensor) -> Tensor:
        return torch.from_numpy(stored.rows(rows)[name]).to(pixels.device)

    return Lesson(
        answers=answers,
        texts=_texts(teacher, labels) if is_scored else None,
        name=found.name,
        digest=found.source.digest,
    )


def _texts(teacher: Teacher, labels: Sequence[str]) -> Texts:
    """The teacher's own embeddings of the labels, and how it scores by them."""
    text, scoring = teacher.processing.text, scoring_of(teacher.model)
    assert text is not None and scoring is not None, "a model of two towers"
    prompts = [text.prompt_template.replace("{}", label) for label in labels]
    embeds = teacher.text_outputs(prompts, frozenset({"text_embeds"}))["text_embeds"]
    return Texts(
        embeddings=torch.from_numpy(unit_rows(embeds).astype(np.float32)), scale=scoring.scale, bias=scoring.bias or 0.0
    )
