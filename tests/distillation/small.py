"""A training small enough for a test: a student of linear layers, objectives of its own, stored teacher outputs.

As a script it does the whole of it and says how far it is, a line at a time: for tests that kill it, or start two.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgevlm.data.readers import read_data_set
from edgevlm.distillation.judging import RIGHT, Judge
from edgevlm.distillation.lessons import Lessons
from edgevlm.distillation.pictures import TrainingPictures
from edgevlm.distillation.recipe import Recipe, Term
from edgevlm.distillation.step import Batch, Step
from edgevlm.distillation.teacher_outputs import StoredOutputs, compute_outputs, describe_outputs
from edgevlm.distillation.teachers import teacher_of
from edgevlm.distillation.trainer import Learner, Trained, new_accelerator, train
from edgevlm.ingest import read_model
from edgevlm.progress import Event, Progress, StepProgress, silent
from tests.quantization.tiny_qat import LABELS, SIZE

FACTORY = "tests.quantization.tiny_qat:make"
NEEDS = frozenset({"logits"})
RECIPE = Recipe(
    name="small",
    terms=(Term(objective="distance"), Term(objective="relations", weight=0.5)),
    n_steps=12,
    batch_size=8,
    learning_rate=0.01,
    average=0.9,
    augmentation="crop-flip",
    n_variants=5,  # more rows than the steps take, so that no row is read twice
    checkpoint_every=3,
)


class Student(nn.Module):
    """Patches, a layer norm, a hidden layer; every picture for itself, so that a batch may be cut anywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, len(LABELS))

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.embed(pixel_values).flatten(2).transpose(1, 2)
        scores: Tensor = self.head(functional.gelu(self.norm(tokens)).mean(1))
        return scores


class Kind:
    """How a training runs the student."""

    def outputs(self, module: nn.Module, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        return {"logits": module(batch.pixel_values)}


class Terms(nn.Module):
    """The distance of each picture's logits, and of their relations across the whole batch, with a head."""

    student_needs = teacher_needs = NEEDS
    weights: Mapping[str, float] = {"distance": 1.0, "relations": 0.5}
    notes = ()

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.head = nn.Linear(len(LABELS), 4)

    def forward(self, step: Step) -> dict[str, Tensor]:
        mine, theirs = step.student["logits"], step.teacher["logits"]
        related = functional.normalize(step.gather(self.head(mine)), dim=1)
        wanted = functional.normalize(step.gather(theirs), dim=1)
        return {
            "distance": functional.mse_loss(mine, theirs),
            "relations": functional.mse_loss(related @ related.T, wanted @ wanted.T),
        }


def make_pictures(folder: Path, recipe: Recipe = RECIPE) -> TrainingPictures:
    data = read_data_set(folder, labels=LABELS, task="image-classification")
    return TrainingPictures(data, augmentation=recipe.augmentation, seed=recipe.data_seed, n_variants=recipe.n_variants)


def make_lessons(pictures: TrainingPictures, folder: Path, *, progress: Progress = silent, **options: Any) -> Lessons:
    teacher = teacher_of(read_model(FACTORY))
    of = describe_outputs(teacher, pictures, NEEDS)
    compute_outputs(teacher, pictures, of, folder, rows_in_shard=16, progress=progress, **options)
    stored = StoredOutputs(folder, of)
    return Lessons(pictures=pictures, stored=stored, image=teacher.processing.image)


def make_learner() -> Learner:
    objectives: Any = Terms()
    return Learner(Kind(), Student(), objectives)


def teach(
    lessons: Lessons,
    folder: Path,
    *,
    recipe: Recipe = RECIPE,
    is_judged: bool = True,
    accelerator: Any = None,
    progress: Progress = silent,
) -> tuple[Trained, dict[str, Tensor]]:
    """A whole training, on the CPU unless told; the student's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    learner = make_learner()
    accelerator = accelerator or new_accelerator(recipe, folder, cpu=True)
    # What judging reads is counted for itself.
    held_out = replace(lessons, stored=StoredOutputs(lessons.stored.folder, lessons.stored.index.of))
    judge = Judge(Kind(), held_out, metric=RIGHT, needs=NEEDS, loss=lambda *_: torch.zeros(()))
    trained = train(
        learner,
        lessons,
        recipe,
        judge=judge if is_judged else None,
        folder=folder,
        identity="same",
        accelerator=accelerator,
        progress=progress,
    )
    return trained, {name: value.clone() for name, value in learner.student.state_dict().items()}


def main(pictures: Path, outputs: Path, folder: Path) -> None:
    """Compute, train, save; every event is a line."""
    from safetensors.torch import save_file

    def say(event: Event) -> None:
        if isinstance(event, StepProgress):
            print(event.name, event.detail, flush=True)  # noqa: T201 - read by the test

    folder.mkdir(parents=True, exist_ok=True)
    accelerator = new_accelerator(RECIPE, folder)
    rank, n = accelerator.process_index, accelerator.num_processes
    made = make_lessons(
        make_pictures(pictures),
        outputs,
        process=rank,
        n_processes=n,
        wait=accelerator.wait_for_everyone,
        progress=say,
    )
    _, weights = teach(made, folder, accelerator=accelerator, progress=say)
    np.save(folder / f"read-{rank}-of-{n}.npy", made.stored.was_read)
    if accelerator.is_main_process:
        save_file(weights, folder / "student.safetensors")
    accelerator.end_training()


assert SIZE == 16

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:4]))
