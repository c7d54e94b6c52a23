"""A vector that says what a picture shows.

Component ``model``: pixel_values -> image_embeds, pooler_output or last_hidden_state.

The embedding is ``image_embeds`` where the graph gives it, else ``pooler_output``, else the mean of
``last_hidden_state`` over its tokens ([n, tokens, d]) or its places ([n, d, height, width]): every family has that
mean, while only some have a class token. It is not normalized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from edgevlm.errors import BundleError, UsageError
from edgevlm.runtime.classes import need_finite
from edgevlm.runtime.image import Size
from edgevlm.runtime.session import output_of, run_rows
from edgevlm.runtime.spec import Array, Processing, Scoring, Spec
from edgevlm.runtime.tasks import Need, Parts, Result, check_needs

_OUTPUTS = ("image_embeds", "pooler_output", "last_hidden_state")


class Embedding(Spec, frozen=True, kw_only=True):
    """One vector."""

    embedding: tuple[float, ...]

    def to_array(self) -> Array:
        return np.array(self.embedding, dtype=np.float32)

    def to_text(self) -> str:
        norm = float(np.linalg.norm(self.to_array()))
        first = ", ".join(f"{value:.4f}" for value in self.embedding[:6])
        return f"{len(self.embedding)} numbers, length {norm:.4f}: {first}, …"

    def is_same_answer(self, other: Any, *, tolerance: float) -> bool:
        """Vectors that differ by at most ``tolerance`` of the largest value."""
        mine, theirs = self.to_array(), other.to_array()
        return mine.shape == theirs.shape and bool(np.abs(mine - theirs).max() <= tolerance * np.abs(mine).max())


class ImageFeatureExtraction:
    needs: ClassVar[tuple[Need, ...]] = (Need(component="model", inputs=("pixel_values",), outputs=_OUTPUTS),)
    result_type: ClassVar[type[Result]] = Embedding

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
    ) -> tuple[Embedding, ...]:
        if labels is not None:
            raise UsageError("This model gives a vector, not labels.", hint="Leave the labels out.")
        vectors = need_finite(_pool(output_of(outputs, *_OUTPUTS).astype(np.float32)), "embedding")
        return tuple(Embedding(embedding=tuple(row)) for row in vectors.tolist())


def _pool(features: Array) -> Array:
    # pooler_output of convolutional families is [n, d, 1, 1]; the mean over one place changes nothing.
    places = {2: (), 3: (1,), 4: (2, 3)}
    if features.ndim in places:
        pooled: Array = features.mean(axis=places[features.ndim])
        return pooled
    raise BundleError(
        f"The graph's features have the shape {features.shape}, not [n, d], [n, tokens, d] or [n, d, height, width].",
        hint="Export the model with one of the outputs " + ", ".join(_OUTPUTS) + ".",
    )
