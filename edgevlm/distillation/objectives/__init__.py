"""What a student can be taught by. One function, or one module with a head, for each; one line here.

``docs/objectives.md`` has the formulas, the papers and what each needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgevlm.distillation.recipe import Term

if TYPE_CHECKING:
    from edgevlm.distillation.objectives.combined import Objectives

_HERE = "edgevlm.distillation.objectives"

OBJECTIVES: dict[str, str] = {
    "logits": f"{_HERE}.logits:LOGITS",
    "pixels": f"{_HERE}.logits:PIXELS",
    "pseudo-labels": f"{_HERE}.logits:PSEUDO_LABELS",
    "features": f"{_HERE}.features:FEATURES",
    "encoder": f"{_HERE}.features:ENCODER",
    "affinity": f"{_HERE}.affinity:AFFINITY",
    "prompts": f"{_HERE}.prompts:PROMPTS",
    "labels": f"{_HERE}.labels:LABELS",
    "image-contrastive": f"{_HERE}.contrastive:IMAGE",
    "image-text-contrastive": f"{_HERE}.contrastive:IMAGE_TEXT",
    "image-text-label-contrastive": f"{_HERE}.contrastive:IMAGE_TEXT_LABEL",
    "image-text-matching": f"{_HERE}.matching:MATCHING",
    "masked-image": f"{_HERE}.masked:IMAGE",
    "masked-language": f"{_HERE}.masked:LANGUAGE",
}


def make_objectives(
    terms: tuple[Term, ...],
    student_sizes: Mapping[str, tuple[int, ...]],
    teacher_sizes: Mapping[str, tuple[int, ...]],
    n_tokens: int | None,
    mask_token: int | None,
) -> Objectives:
    """A recipe's terms as one module, whose parameters are trained beside the student and thrown away afterwards.

    Args:
        student_sizes, teacher_sizes: what each can give: the shape of one row, without the batch, by output.
        n_tokens: of the student's tokenizer; null without one.
        mask_token: the id that stands for a hidden token; null where the tokenizer has none.

    Raises: UsageError: a term names no objective or no option, or student or teacher lacks what it needs.
    """
    from edgevlm.distillation.objectives.combined import Objectives
    from edgevlm.distillation.objectives.objective import Sizes

    sizes = Sizes(student=student_sizes, teacher=teacher_sizes, n_tokens=n_tokens, mask_token=mask_token)
    return Objectives(terms, sizes)
