"""Whether a training runs in several processes, and on what."""

from __future__ import annotations

import os
from datetime import timedelta

PATIENCE = timedelta(hours=24)
"""How long processes wait for one that computes a teacher's outputs, or measures, while they have nothing to do."""


def must_use_cpu() -> bool:
    """Whether several processes were started and there is no GPU: then accelerate must be told, or each runs alone."""
    import torch

    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
