"""What the teacher says of a picture, or of each of its pixels."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from edgevlm.distillation.objectives.objective import Objective, Positive, Share
from edgevlm.distillation.step import Outputs, Step


def logits(step: Step, *, temperature: Positive = 4.0) -> Tensor:
    """How far the student's classes are from the teacher's; over stored sparse logits too.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, with their 4 as the default among the temperatures tried;
        the factor T² keeps the gradient's size.
    """
    student = step.student["logits"]
    return _divergence(student, dense_logits(step.teacher, student.shape[1]), temperature)


def pixels(
    step: Step, *, output: str = "logits", loss: Literal["kl", "bce"] = "kl", temperature: Positive = 1.0
) -> Tensor:
    """The same at each pixel of a dense output: classes that exclude each other (kl), or masks that do not (bce).

    The teacher's map is resized to the student's.
    """
    student = step.student[output]
    teacher = resized(step.teacher[output], student)
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(student, torch.sigmoid(teacher / temperature))
    return _divergence(student, teacher, temperature)


def pseudo_labels(step: Step, *, confidence: Share = 0.95) -> Tensor:
    """Cross entropy to what the teacher holds likeliest, where it gives that more than ``confidence``.

    The mean is over all pictures or pixels, sure or not: what few sure ones say weighs little.

    Source: Sohn et al. 2020 (FixMatch), arXiv:2001.07685, equation 4 and its threshold.
    """
    student = step.student["logits"]
    teacher = dense_logits(step.teacher, student.shape[1])
    if teacher.ndim == 4:
        teacher = resized(teacher, student)
    share, label = teacher.softmax(1).max(1)
    return (F.cross_entropy(student, label, reduction="none") * (share >= confidence)).mean()


def dense_logits(outputs: Outputs, n_classes: int) -> Tensor:
    """``logits`` as they are, or rebuilt from the largest few and the log-sum-exp of all others.

    The others share their probability evenly. At temperature 1 the few keep their own probabilities exactly, and so
    does the sum of the others; at other temperatures they do not, since the others are not even. Measured with the
    1000 classes of MobileNetV2 on 200 pictures, so much of the probability lies elsewhere than the teacher put it:
    with 10 stored 5 % at temperature 1, 18 % at 2, 10 % at 4; with 100 stored 2 %, 11 % and 7 %.

    Shapes:  values and indices [n, k], rest [n] -> [n, n_classes].
    Source:  Wu et al. 2022 (TinyViT), arXiv:2207.10666, section 3.1.
    """
    if "logits" in outputs:
        return outputs["logits"]
    values, indices, rest = (outputs[f"logits.{part}"] for part in ("values", "indices", "rest"))
    n_others = max(n_classes - values.shape[1], 1)
    return (rest[:, None] - math.log(n_others)).repeat(1, n_classes).scatter(1, indices, values)


def resized(teacher: Tensor, student: Tensor) -> Tensor:
    """The teacher's map at the size of the student's."""
    if teacher.shape[2:] == student.shape[2:]:
        return teacher
    return F.interpolate(teacher, size=student.shape[2:], mode="bilinear", align_corners=False)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) over axis 1, the mean over all others."""
    mine, theirs = (F.log_softmax(scores / temperature, dim=1) for scores in (student, teacher))
    return F.kl_div(mine, theirs, log_target=True, reduction="none").sum(1).mean() * temperature**2


LOGITS = Objective(
    compute=logits,
    student=("logits",),
    teacher=("logits",),
    reads_sparse=True,
    n_axes=1,
    same="channels",
    formula="T² · KL(softmax(t / T) ‖ softmax(s / T))",
    source="Hinton et al., arXiv:1503.02531; stored sparse: TinyViT, arXiv:2207.10666",
)
PIXELS = Objective(
    compute=pixels,
    student=("{output}",),
    teacher=("{output}",),
    n_axes=3,
    same="channels",
    formula="mean over pixels of T² · KL(softmax(t / T) ‖ softmax(s / T)), or of BCE(s, σ(t / T))",
    source="Liu et al., arXiv:1903.04197",
)
PSEUDO_LABELS = Objective(
    compute=pseudo_labels,
    student=("logits",),
    teacher=("logits",),
    reads_sparse=True,
    same="channels",
    formula="mean of [max softmax(t) ≥ c] · CE(s, argmax t)",
    source="FixMatch, arXiv:2001.07685",
)
