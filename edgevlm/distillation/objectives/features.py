"""What the teacher sees in a picture or a text: vectors, rows of vectors, or maps."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.distillation.objectives.objective import Head, Objective, Sizes
from edgevlm.distillation.step import Step
from edgevlm.errors import UsageError


class Features(Head):
    """The distance of an output to the teacher's, after a learned linear map where their widths differ.

    Maps of other sizes are resized to the teacher's. In a row of vectors for a text, padding counts for nothing.

    Args:
        output: any that student and teacher both give.
        distance: the mean squared difference, or 1 - cosine of the vectors.

    Source: Romero et al. 2015 (FitNets), arXiv:1412.6550, equation 3.
    """

    def __init__(
        self, sizes: Sizes, *, output: str = "image_embeds", distance: Literal["mse", "cosine"] = "mse"
    ) -> None:
        super().__init__()
        self.output, self.distance = output, distance
        mine, theirs = sizes.student[output], sizes.teacher[output]
        if len(mine) != len(theirs):
            raise UsageError(
                f"'{output}' has the shape {mine} for the student and {theirs} for the teacher.",
                hint="Choose an output that is a vector for both, or a map for both.",
            )
        # Channels come first in a map, last in a vector or a row of vectors.
        self.is_map = len(mine) == 3
        axis = 0 if self.is_map else -1
        self.projection: nn.Module = nn.Identity()
        if mine[axis] != theirs[axis]:
            self.projection = (
                nn.Conv2d(mine[0], theirs[0], kernel_size=1) if self.is_map else nn.Linear(mine[-1], theirs[-1])
            )
            what, kind = ("channels", "1x1 convolution") if self.is_map else ("numbers", "linear projection")
            self.note = (
                f"{output}: the student has {mine[axis]} {what} and the teacher {theirs[axis]}; "
                f"a {kind} was added, and is not part of the student"
            )

    def forward(self, step: Step) -> Tensor:
        student: Tensor = self.projection(step.student[self.output])
        teacher = step.teacher[self.output]
        if self.is_map and student.shape[2:] != teacher.shape[2:]:
            student = F.interpolate(student, size=teacher.shape[2:], mode="bilinear", align_corners=False)
        axis = 1 if self.is_map else -1
        if self.distance == "cosine":
            far = 1 - F.cosine_similarity(student, teacher, dim=axis)
        else:
            far = (student - teacher).square().mean(axis)
        mask = step.batch.attention_mask
        if self.output.startswith("text_") and far.ndim == 2 and mask is not None:
            return (far * mask).sum() / mask.sum()
        return far.mean()


def encoder(step: Step) -> Tensor:
    """Mean squared difference of image embeddings, so that the teacher's mask decoder fits the student's encoder.

    Source: Zhang et al. 2023 (MobileSAM), arXiv:2306.14289: decoupled distillation.
    """
    return F.mse_loss(step.student["image_embeds"], step.teacher["image_embeds"])


FEATURES = Objective(
    compute=Features,
    student=("{output}",),
    teacher=("{output}",),
    formula="mean of (W s - t)², or 1 - cos(W s, t); W only where the widths differ",
    source="FitNets, arXiv:1412.6550",
)
ENCODER = Objective(
    compute=encoder,
    student=("image_embeds",),
    teacher=("image_embeds",),
    n_axes=3,
    same="shape",
    formula="mean of (s - t)² over [256, h, w]",
    source="MobileSAM, arXiv:2306.14289",
)
