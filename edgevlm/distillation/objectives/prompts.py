"""What the teacher segments when it is asked, and asked again where the student went wrong."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from edgevlm.distillation.objectives.objective import Count, Objective, draw
from edgevlm.distillation.step import Outputs, Step
from edgevlm.errors import UsageError

# What SAM takes for a point: part of the object, part of what is around it, or no point at all.
_OBJECT, _AROUND, _NO_POINT = 1, 0, -1


def prompts(step: Step, *, n_rounds: Count = 2) -> Tensor:
    """How far the student's masks are from the teacher's, for the same prompts, through the mask decoder.

    After each round but the last every prompt gets one more point, drawn from where the two disagree. The teacher's
    masks count as cut at 0. Cross entropy and dice weigh the same, rounds do too. What a picture was filled up with to
    be a square counts for nothing, as in EdgeSAM's training.

    Args:
        n_rounds: EdgeSAM's own training asks twice.

    Shapes:  prompts as Transformers has them: input_points [n, p, k, 2] in pixels of ``pixel_values``, input_labels
        [n, p, k], input_boxes [n, p, 4], at least points or boxes; pred_masks [n, p, c, h, w], iou_scores [n, p, c].
    Source:  Zhou et al. 2023 (EdgeSAM), arXiv:2312.06660; the settings are those of its published training.
    """
    if step.decode is None:
        raise UsageError(
            "The objective 'prompts' needs a mask decoder, and student and teacher have none.",
            hint="Take students and teachers of SAM's kind, or another recipe.",
        )
    assert step.batch.prompts is not None
    asked = dict(step.batch.prompts)
    total = torch.zeros((), device=step.batch.pixel_values.device)
    for left in reversed(range(n_rounds)):
        student = step.decode("student", step.student["image_embeds"], asked)
        with torch.no_grad():
            teacher = dict(step.decode("teacher", step.teacher["image_embeds"], asked))
            teacher["pred_masks"] = _as_large_as(student["pred_masks"], teacher["pred_masks"])
        target = (teacher["pred_masks"] > 0).float()
        shown = _shown(step, target).float()
        wrong = F.binary_cross_entropy_with_logits(student["pred_masks"], target, reduction="none") * shown
        total = total + wrong.sum() / shown.expand_as(wrong).sum()
        total = total + dice(student["pred_masks"], target, shown).mean()
        if left:
            asked = with_point(step, asked, student, teacher)
    return total / n_rounds


def _as_large_as(mine: Tensor, theirs: Tensor) -> Tensor:
    """A teacher's masks at the size of a student's that sees smaller pictures."""
    if mine.shape[-2:] == theirs.shape[-2:]:
        return theirs
    resized = F.interpolate(theirs.flatten(0, 1), mine.shape[-2:], mode="bilinear", align_corners=False)
    return resized.reshape(*theirs.shape[:3], *mine.shape[-2:])


def _shown(step: Step, masks: Tensor) -> Tensor:
    """Where the pixels of masks [n, p, c, h, w] are of the picture: bool [n, 1, 1, h, w]."""
    height, width = masks.shape[-2:]
    if step.batch.shown is None:
        return masks.new_ones((len(masks), 1, 1, height, width), dtype=torch.bool)
    return F.interpolate(step.batch.shown[:, None].float(), (height, width), mode="area")[:, None] > 0.5


def dice(masks: Tensor, target: Tensor, shown: Tensor | float = 1.0) -> Tensor:
    """1 - 2 |A ∩ B| / (|A| + |B|) of each mask, with 1 added above and below for empty ones.

    Args:    shown: 1 where pixels count, 0 elsewhere.
    Shapes:  masks (before the sigmoid) and target [.., h, w] -> [..].
    """
    shares = (masks.sigmoid() * shown).flatten(-2)
    target = (target * shown).flatten(-2)
    return 1 - (2 * (shares * target).sum(-1) + 1) / (shares.sum(-1) + target.sum(-1) + 1)


def with_point(step: Step, asked: Mapping[str, Tensor], student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    """The prompts with one more point each, where the masks that the teacher thinks best disagree.

    Where they do not, the point is none: SAM's padding.
    """
    with torch.no_grad():
        best = teacher["iou_scores"].argmax(-1) if "iou_scores" in teacher else None
        mine, theirs = (best_masks(outputs["pred_masks"], best) > 0 for outputs in (student, teacher))
        height, width = mine.shape[-2:]
        differ = ((mine != theirs) & _shown(step, student["pred_masks"])[:, :, 0]).flatten(-2)
        count = differ.sum(-1)
        nth = (draw(step, *count.shape) * count).long().clamp(max=(count - 1).clamp(min=0))
        place = (differ.cumsum(-1) > nth[..., None]).int().argmax(-1)
        scale = [all_ / part for all_, part in zip(step.batch.pixel_values.shape[:-3:-1], (width, height), strict=True)]
        # SAM adds the half pixel itself that leads to a pixel's middle.
        x, y = (place % width + 0.5) * scale[0] - 0.5, (place // width + 0.5) * scale[1] - 0.5
        is_object = theirs.flatten(-2).gather(-1, place[..., None])[..., 0]
        label = torch.where(is_object, _OBJECT, _AROUND).masked_fill(count == 0, _NO_POINT)
        point = torch.stack((x, y), dim=-1).masked_fill((count == 0)[..., None], 0)[:, :, None]
    label = label[:, :, None]
    if "input_points" in asked:
        point = torch.cat((asked["input_points"], point.to(asked["input_points"].dtype)), dim=2)
        label = torch.cat((asked["input_labels"], label.to(asked["input_labels"].dtype)), dim=2)
    return {**asked, "input_points": point, "input_labels": label}


def best_masks(masks: Tensor, best: Tensor | None) -> Tensor:
    """[n, p, c, h, w] -> [n, p, h, w], the first where nothing says which is best."""
    if best is None:
        return masks[:, :, 0]
    index = best[..., None, None, None].expand(*best.shape, 1, *masks.shape[-2:])
    return masks.gather(2, index)[:, :, 0]


PROMPTS = Objective(
    compute=prompts,
    student=("image_embeds",),
    teacher=("image_embeds",),
    batch=("prompts",),
    n_axes=3,
    formula="mean over rounds of BCE(m_s, [m_t > 0]) + dice(m_s, [m_t > 0]); then a point where they differ",
    source="EdgeSAM, arXiv:2312.06660",
)
