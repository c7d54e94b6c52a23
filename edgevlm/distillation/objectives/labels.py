"""What the data set says of a picture."""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch.nn.functional as F
from torch import Tensor

from edgevlm.distillation.objectives.objective import Objective
from edgevlm.distillation.step import Step

_UNKNOWN = -1


def labels(step: Step, *, smoothing: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0) -> Tensor:
    """Cross entropy to the labels of those pictures that have one; 0 where none does."""
    scores, target = step.student["logits"], step.batch.labels
    assert target is not None
    total = F.cross_entropy(scores, target, ignore_index=_UNKNOWN, label_smoothing=smoothing, reduction="sum")
    return total / (target != _UNKNOWN).sum().clamp(min=1)


LABELS = Objective(
    compute=labels,
    student=("logits",),
    batch=("labels",),
    n_axes=1,
    formula="CE(s, y)",
    source="smoothing: Szegedy et al., arXiv:1512.00567",
)
