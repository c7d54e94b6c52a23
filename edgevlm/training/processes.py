"""Whether a training runs in several processes, and on what."""

from __future__ import annotations

import os


def must_use_cpu() -> bool:
    """Whether several processes were started and there is no GPU: then accelerate must be told, or each runs alone."""
    import torch

    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
