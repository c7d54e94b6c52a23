"""Answers that name classes, shared by the tasks that give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from edgevlm.errors import ModelError
from edgevlm.runtime.spec import Array, Spec

TOP_K: Final = 5
"""Classes that an answer names where nobody says how many."""


class ClassScore(Spec, frozen=True, kw_only=True):
    label: str
    index: int
    score: float


class Classification(Spec, frozen=True, kw_only=True):
    """The ``top_k`` likeliest classes, likeliest first; of equal ones the lower index first.

    Units: ``score`` is a probability, 0 to 1.
    """

    classes: tuple[ClassScore, ...]

    @property
    def top(self) -> ClassScore:
        return self.classes[0]

    def to_text(self) -> str:
        return "\n".join(f"{100 * each.score:6.2f} %  {each.label}" for each in self.classes)

    def is_same_answer(self, other: Any, *, tolerance: float) -> bool:
        """The same likeliest class, or one that was as likely within ``tolerance``."""
        scores = {(each.index, each.label): each.score for each in self.classes}
        return scores.get((other.top.index, other.top.label), -1.0) >= self.top.score - tolerance


def softmax(logits: Array) -> Array:
    """Over the last axis, in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    total: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return total


def rank(scores: Array, labels: Sequence[str], *, top_k: int | None) -> tuple[Classification, ...]:
    """The likeliest classes of each row.

    Shapes: scores [n, n_labels].
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, : top_k or TOP_K]
    return tuple(
        Classification(classes=tuple(ClassScore(label=labels[i], index=int(i), score=float(row[i])) for i in indices))
        for row, indices in zip(scores, order, strict=True)
    )


def need_finite(values: Array, name: str) -> Array:
    """Raises: ModelError: ``values`` hold NaN or infinity, from which no answer follows."""
    if not np.isfinite(values).all():
        raise ModelError(
            f"The graph's output '{name}' holds NaN or infinity.",
            hint="Compile the model for this machine, or with --precision fp32.",
        )
    return values
