"""The students: small models that a large one teaches. One file per kind, one line per student here.

What a student becomes follows from its teacher's task: a classifier with the teacher's classes, an image tower, two
towers that meet in the teacher's space, a mask generator. It is saved in Hugging Face's layout, so that what comes out
of a training goes into ``edgevlm compile`` as any other checkpoint does. Importing this loads no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgevlm.errors import UsageError, did_you_mean
from edgevlm.model import Model
from edgevlm.runtime.spec import ImageProcessing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgevlm.distillation.step import Batch

STUDENTS: dict[str, str] = {
    "mobilevit-xxs": "edgevlm.distillation.students.mobilevit:XXS",
    "mobilevit-xs": "edgevlm.distillation.students.mobilevit:XS",
    "mobilevit-s": "edgevlm.distillation.students.mobilevit:S",
    "mobilevitv2-0.5": "edgevlm.distillation.students.mobilevit_v2:HALF",
    "mobilevitv2-0.75": "edgevlm.distillation.students.mobilevit_v2:THREE_QUARTERS",
    "mobilevitv2-1.0": "edgevlm.distillation.students.mobilevit_v2:WHOLE",
    "tinyvit-5m-sam": "edgevlm.distillation.students.tiny_vit_sam:TINY_VIT_5M",
}


class Student(Protocol):
    """A kind of model that can be taught.

    Args:
        name: in ``STUDENTS``.
        tasks: of the teachers that it can learn from.
    """

    @property
    def name(self) -> str: ...

    @property
    def tasks(self) -> tuple[str, ...]: ...

    def build(
        self, teacher: Model, *, image_size: int | None = None, seed: int = 0, n_classes: int | None = None
    ) -> nn.Module:
        """The untrained module, a ``PreTrainedModel`` in evaluation mode with eager attention; same seed, same weights.

        Args:
            image_size: of the pictures that it sees; the teacher's where left out.
            n_classes: of a classifier whose teacher has no labels.
        Raises: UsageError: it cannot learn the teacher's task, or the number of classes is not known.
        """
        ...

    def outputs(self, module: nn.Module, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        """What ``module`` makes of ``batch``, and no tower runs that ``names`` does not ask for; with gradient.

        Shapes:
            logits: [n, classes].
            image_embeds: [n, d], of two towers before they are brought to length 1; of an image tower the pooled
                features, in its own width.
            text_embeds: [m, d], likewise, for the batch's distinct texts.
            image_features: [n, c, h, w], before pooling.
            text_features: [m, length, width].
            pred_masks, iou_scores: of a mask generator, as ``edgevlm.families.sam.decode`` gives them for the batch's
                prompts; its image_embeds are [n, d, h, w], and its image_features are those before the neck.
            logit_scale: [], what cosines are multiplied by (not its logarithm).
        Raises: UsageError: it has no output of a name.
        """
        ...

    def processing(self, teacher: Model, image_size: int | None = None) -> ImageProcessing:
        """How a picture becomes what the student sees.

        Raises: UsageError: Hugging Face's layout cannot say it, or the student does not take the size.
        """
        ...

    def save(self, module: nn.Module, folder: Path, teacher: Model) -> None:
        """Write ``folder`` in Hugging Face's layout: configuration with labels, weights, preprocessing, tokenizer.

        The folder appears whole or not at all; what is there is replaced where it is such a folder too.
        """
        ...


def student_names() -> tuple[str, ...]:
    """Every student, in the table's order."""
    return tuple(STUDENTS)


def load_student(name: str) -> Student:
    """The student called ``name``.

    Raises: UsageError: there is none.
    """
    place = STUDENTS.get(name)
    if place is None:
        raise UsageError(f"There is no student '{name}'.", hint=did_you_mean(name, STUDENTS))
    module, _, attribute = place.partition(":")
    student: Student = getattr(importlib.import_module(module), attribute)
    return student


def refuse_task(student: Student, teacher: Model) -> None:
    """Raises: UsageError: the student cannot learn what the teacher does."""
    if teacher.task in student.tasks:
        return
    able = [name for name in STUDENTS if teacher.task in load_student(name).tasks]
    raise UsageError(
        f"'{student.name}' cannot learn {teacher.task}, which is what '{teacher.name}' does.",
        hint=f"Use one of: {', '.join(able)}." if able else f"Use a teacher for one of: {', '.join(student.tasks)}.",
    )


def refuse_names(student: Student, names: frozenset[str], known: Mapping[str, object] | frozenset[str]) -> None:
    """Raises: UsageError: an output was asked for that the student does not have."""
    unknown = sorted(names - set(known))
    if unknown:
        raise UsageError(
            f"'{student.name}' has no output '{unknown[0]}' here; it has {', '.join(sorted(known))}.",
            hint="Use a recipe whose objectives ask for these.",
        )
