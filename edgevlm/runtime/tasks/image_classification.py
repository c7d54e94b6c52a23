"""One of the labels that the model was trained on.

Component ``model``: pixel_values -> logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from edgevlm.errors import BundleError, UsageError
from edgevlm.runtime.classes import Classification, need_finite, rank, softmax
from edgevlm.runtime.image import Size
from edgevlm.runtime.session import output_of, run_rows
from edgevlm.runtime.spec import Array, Processing, Scoring
from edgevlm.runtime.tasks import Need, Parts, Result, check_needs


class ImageClassification:
    needs: ClassVar[tuple[Need, ...]] = (Need(component="model", inputs=("pixel_values",), outputs=("logits",)),)
    result_type: ClassVar[type[Result]] = Classification

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    @classmethod
    def check(cls, components: frozenset[str], processing: Processing, scoring: Scoring | None) -> None:
        check_needs(cls.needs, components)

    def outputs(self, pixel_values: Array) -> dict[str, Array]:
        return run_rows(self._parts.sessions["model"], {self._parts.processing.image.input_name: pixel_values})

    def results(
        self,
        outputs: Mapping[str, Array],
        *,
        labels: tuple[str, ...] | None,
        top_k: int | None,
        sizes: Sequence[Size] | None,
    ) -> tuple[Classification, ...]:
        if labels is not None:
            raise UsageError(
                "This model has its own labels; it cannot be asked for others.",
                hint="Leave the labels out, or use a zero-shot-image-classification model.",
            )
        logits = need_finite(output_of(outputs, "logits"), "logits")
        n_classes = logits.shape[-1]
        names = self._parts.labels or tuple(map(str, range(n_classes)))
        if len(names) != n_classes:
            raise BundleError(
                f"The graph tells {n_classes} classes apart, but there are {len(names)} labels.",
                hint="Give one label for each class.",
            )
        return rank(softmax(logits), names, top_k=top_k)
