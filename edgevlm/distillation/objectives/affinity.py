"""Which texts the teacher finds near which pictures."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgevlm.distillation.objectives.objective import MAX_SCALE, Objective, Positive
from edgevlm.distillation.objectives.texts import paired_embeds
from edgevlm.distillation.step import Outputs, Step


def affinity(step: Step, *, scale: Positive = MAX_SCALE, student_scale: Positive = MAX_SCALE) -> Tensor:
    """How far the student's affinities, picture to text and text to picture, are from the teacher's, over the batch of
    all processes.

    TinyCLIP writes a cross entropy; the divergence has the same gradient, and is 0 where student and teacher agree.

    Args:
        scale: the teacher's; 100 is where CLIP's own ended.

    Source: Wu et al. 2023 (TinyCLIP), arXiv:2309.12314, section 3.1.
    """

    def affinities(outputs: Outputs) -> Tensor:
        images, texts = (step.gather(embeds) for embeds in paired_embeds(step, outputs))
        return images @ texts.T

    student, teacher = student_scale * affinities(step.student), scale * affinities(step.teacher)
    return (_divergence(student, teacher) + _divergence(student.T, teacher.T)) / 2


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(
        F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1), log_target=True, reduction="batchmean"
    )


AFFINITY = Objective(
    compute=affinity,
    student=("image_embeds", "text_embeds"),
    teacher=("image_embeds", "text_embeds"),
    batch=("input_ids",),
    n_axes=1,
    formula="½ KL(A_t ‖ A_s) + ½ KL(B_t ‖ B_s); A = softmax over texts of scale · cos, B over pictures",
    source="TinyCLIP, arXiv:2309.12314; MobileCLIP, arXiv:2311.17049",
)
