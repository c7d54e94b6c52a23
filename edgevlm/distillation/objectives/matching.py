"""Does this text belong to this picture?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.distillation.objectives.objective import Count, Head, Objective, Positive, Sizes, draw
from edgevlm.distillation.objectives.texts import paired_embeds, text_keys
from edgevlm.distillation.step import Step


class ImageTextMatching(Head):
    """Tell each pair from one of its picture with a wrong text, and one of its text with a wrong picture.

    The wrong ones are drawn from this process's batch, the more often the nearer the student holds them. The towers of
    the students here meet nowhere, so they do in the head: it sees both vectors and their product.

    Args:
        width: of the head's hidden layer.
        scale: of the cosines that the wrong ones are drawn by; ALBEF's own start, 1 / 0.07.

    Source: Li et al. 2021 (ALBEF), arXiv:2107.07651, section 3.2.
    """

    def __init__(self, sizes: Sizes, *, width: Count = 256, scale: Positive = 1 / 0.07) -> None:
        super().__init__()
        self.scale = scale
        given = sizes.student["image_embeds"][0]
        self.classifier = nn.Sequential(nn.Linear(3 * given, width), nn.GELU(), nn.Linear(width, 2))

    def forward(self, step: Step) -> Tensor:
        images, texts = paired_embeds(step, step.student)
        keys = text_keys(step)
        wrong = keys[:, None] != keys
        scores = self.scale * (images @ texts.T).detach()
        has_wrong = wrong.any(1)
        text, image = draw_wrong(step, scores, wrong), draw_wrong(step, scores.T, wrong)
        pairs = torch.cat(
            (join(images, texts), join(images, texts[text])[has_wrong], join(images[image], texts)[has_wrong])
        )
        answers: Tensor = self.classifier(pairs)
        matches = torch.zeros(len(pairs), dtype=torch.int64, device=pairs.device)
        matches[: len(images)] = 1
        return F.cross_entropy(answers, matches)


def join(images: Tensor, texts: Tensor) -> Tensor:
    """What the head sees of each pair; [n, d] and [n, d] -> [n, 3 d]."""
    return torch.cat((images, texts, images * texts), dim=1)


def draw_wrong(step: Step, scores: Tensor, wrong: Tensor) -> Tensor:
    """For each row one column that is wrong, with softmax(scores) as its chance; int64 [n]."""
    # The largest of scores plus Gumbel noise is distributed as their softmax (Gumbel 1954).
    noise = -(-draw(step, *scores.shape).clamp(min=1e-20).log()).log()
    return (scores + noise).masked_fill(~wrong, -torch.inf).argmax(1)


MATCHING = Objective(
    compute=ImageTextMatching,
    student=("image_embeds", "text_embeds"),
    batch=("input_ids",),
    n_axes=1,
    formula="CE(head(v, w, v ∘ w), is a pair) over each pair, its hardest-drawn wrong text and wrong picture",
    source="ALBEF, arXiv:2107.07651",
)
