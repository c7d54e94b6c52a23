"""How a quantized model is fine-tuned, as a value."""

from __future__ import annotations

from typing import Annotated

import msgspec

from edgevlm.runtime.spec import Spec


class Training(Spec, frozen=True, kw_only=True):
    """A fine-tuning.

    Args:
        learning_rate: at its highest.
        weight_decay: of AdamW.
        clip_norm: the gradient's length at most.
        distill_share: weight of the distance from the float model; the labels have the rest.
        observe_share: share of the steps in which activation ranges follow the batches; then they stand still.
        adapt_share: share of the steps in which batch norms normalize by the batch; then by their statistics.
        checkpoint_every: steps between checkpoints.
        has_labels: the pictures are labelled; without labels the float model alone teaches.
    """

    n_steps: Annotated[int, msgspec.Meta(ge=1)] = 400
    batch_size: Annotated[int, msgspec.Meta(ge=1)] = 64
    learning_rate: Annotated[float, msgspec.Meta(gt=0)] = 3e-4
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    distill_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    observe_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    adapt_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.3
    checkpoint_every: Annotated[int, msgspec.Meta(ge=1)] = 50
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    has_labels: bool = True
