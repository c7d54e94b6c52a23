"""What a step does, from its number alone: so a training that was stopped goes on as if it had not been."""

from __future__ import annotations

import functools
import math
from typing import Protocol

import numpy as np

from edgevlm.runtime.spec import Array


class Order(Protocol):
    """As much of a training as decides which pictures a step has."""

    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...


class Rates(Protocol):
    """As much of a training as decides the learning rate."""

    @property
    def n_steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...


def batch_of(step: int, n: int, training: Order) -> list[int]:
    """The pictures of a step: every picture once before any comes again, in an order that the seed decides."""
    return [index for index, _ in batch_with_epochs(step, n, training)]


def batch_with_epochs(step: int, n: int, training: Order) -> list[tuple[int, int]]:
    """The pictures of a step, each with how often all pictures had been seen before: (index, epoch)."""
    found: list[tuple[int, int]] = []
    position = step * training.batch_size
    while len(found) < training.batch_size:
        epoch, start = divmod(position + len(found), n)
        indices = _order(training.seed, epoch, n)[start : start + training.batch_size - len(found)]
        found += [(index, epoch) for index in indices.tolist()]
    return found


def rate_at(step: int, training: Rates, *, warmup_share: float | None = None) -> float:
    """Warm up over a share of the steps, then fall along a half cosine to nothing.

    Args: warmup_share: a twentieth where left out, during which the rate falls already, as quantization-aware training
        was measured.
    """
    share = 0.05 if warmup_share is None else warmup_share
    n_warmup = max(1, int(training.n_steps * share + 1e-9))  # 0.29 of 100 are 29, which floats make 28.999
    warm = min(1.0, (step + 1) / n_warmup)
    first = 0 if warmup_share is None else n_warmup - 1
    done = max(0, step - first) / (training.n_steps - first)
    return training.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))


@functools.lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
def _order(seed: int, epoch: int, n: int) -> Array:
    return np.random.default_rng((seed, epoch)).permutation(n)
