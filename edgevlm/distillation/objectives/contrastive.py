"""What belongs together is near, what does not is far: two views of a picture, or a picture and its text."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.distillation.objectives.objective import (
    MAX_SCALE,
    Count,
    Head,
    Objective,
    Positive,
    Scale,
    Sizes,
    draw,
    pooled,
)
from edgevlm.distillation.objectives.texts import paired_embeds, text_keys
from edgevlm.distillation.step import Step

ScaleOption = Annotated[float, msgspec.Meta(gt=0, le=MAX_SCALE)]

# 1 / 0.07, where CLIP's learned scale starts (Radford et al. 2021, section 2.5).
_START = 1 / 0.07
# Random resized crops: the ratio is Inception's, as in SimCLR; the least area is MoCo's 0.2, since SimCLR's 0.08 is for
# hundreds of epochs.
_LOG_RATIO = math.log(4 / 3)


class ImageContrastive(Head):
    """Tell a picture's other view from the views of all other pictures, in all processes.

    The other view is a crop of at least ``min_area``, mirrored half of the time, that the student sees in a second
    pass. A small network stands between the embedding and the comparison, as in SimCLR.

    Source: Chen et al. 2020 (SimCLR), arXiv:2002.05709, equation 1.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        temperature: Positive = 0.1,
        width: Count = 128,
        min_area: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.2,
    ) -> None:
        super().__init__()
        self.temperature, self.min_area = temperature, min_area
        given = sizes.student["image_embeds"][0]
        self.projection = nn.Sequential(nn.Linear(given, given), nn.ReLU(), nn.Linear(given, width))

    def forward(self, step: Step) -> Tensor:
        other = step.run(replace(step.batch, pixel_values=alter(step, self.min_area)))
        views = [
            step.gather(F.normalize(self.projection(pooled(outputs["image_embeds"])), dim=1))
            for outputs in (step.student, other)
        ]
        return contrast_views(views[0], views[1], self.temperature)


def contrast_views(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent: of all 2n - 1 other views, the likeliest should be the one of the same picture.

    Shapes:  first, second [n, d], at unit length.
    """
    views = torch.cat((first, second))
    scores = (views @ views.T / temperature).fill_diagonal_(-torch.inf)
    n = len(first)
    return F.cross_entropy(scores, torch.arange(2 * n, device=scores.device).roll(n))


def alter(step: Step, min_area: float) -> Tensor:
    """Each picture's pixels cropped at random, at their old size, and mirrored half of the time."""
    pictures = step.batch.pixel_values
    area, ratio, across, down, mirror = draw(step, 5, len(pictures))
    side = (min_area + (1 - min_area) * area).sqrt()
    # No more stretched than fits into the picture.
    stretch = ((2 * ratio - 1) * _LOG_RATIO / 2).exp().clamp(min=side, max=1 / side)
    width, height = side * stretch, side / stretch
    moves = torch.zeros(len(pictures), 2, 3, device=pictures.device)
    moves[:, 0, 0] = torch.where(mirror < 0.5, -width, width)
    moves[:, 1, 1] = height
    moves[:, 0, 2] = (1 - width) * (2 * across - 1)
    moves[:, 1, 2] = (1 - height) * (2 * down - 1)
    grid = F.affine_grid(moves, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures.float(), grid, padding_mode="border", align_corners=False).to(pictures.dtype)


class ImageText(Head):
    """Tell a picture's text from all others and a text's picture from all others, in all processes.

    Pictures with the same text are each other's: the same tokens are never held against one another.

    Args:
        scale: of the cosines; where it is learned, what it starts from.

    Source: Radford et al. 2021 (CLIP), arXiv:2103.00020, figure 3.
    """

    def __init__(self, sizes: Sizes, *, scale: ScaleOption = _START, is_learned: bool = True) -> None:
        super().__init__()
        self.scale = Scale(scale, is_learned=is_learned)

    def forward(self, step: Step) -> Tensor:
        images, texts = (step.gather(embeds) for embeds in paired_embeds(step, step.student))
        return contrast(self.scale() * images @ texts.T, self.positives(step))

    def positives(self, step: Step) -> Tensor:
        """Which text belongs to which picture; [n, n] over all processes."""
        keys = step.gather(text_keys(step))
        return keys[:, None] == keys


class ImageTextLabel(ImageText):
    """The same, with the texts of all pictures of one label belonging to each of them.

    A picture without a label has its own text alone, as all have in a data set without labels.

    Source: Yang et al. 2022 (UniCL), arXiv:2204.03610, equations 2 to 4.
    """

    def positives(self, step: Step) -> Tensor:
        positives = super().positives(step)
        if step.batch.labels is None:
            return positives
        labels = step.gather(step.batch.labels)
        return positives | ((labels[:, None] == labels) & (labels >= 0))


def contrast(scores: Tensor, positives: Tensor) -> Tensor:
    """Cross entropy, by row and by column, to what is positive, each with the same share.

    Shapes:  scores [n, n], positives bool [n, n], symmetric, the diagonal true.
    """
    target = positives / positives.sum(1, keepdim=True)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


IMAGE = Objective(
    compute=ImageContrastive,
    student=("image_embeds",),
    formula="-log(exp(cos(z, z') / T) / Σ exp(cos(z, z_k) / T)); z' the other view, k over all other views",
    source="SimCLR, arXiv:2002.05709",
)
IMAGE_TEXT = Objective(
    compute=ImageText,
    student=("image_embeds", "text_embeds"),
    batch=("input_ids",),
    n_axes=1,
    formula="½ CE over texts + ½ CE over pictures of scale · cos, to the pair",
    source="CLIP, arXiv:2103.00020",
)
IMAGE_TEXT_LABEL = Objective(
    compute=ImageTextLabel,
    student=("image_embeds", "text_embeds"),
    batch=("input_ids",),
    n_axes=1,
    formula="the same, to all pairs of one label, where there are labels, in equal shares",
    source="UniCL, arXiv:2204.03610",
)
