"""The rows of all processes in each of them, for what compares across a batch. Needs torch at import."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def gather_rows(value: Tensor) -> Tensor:
    """Every process's rows, in the processes' order; with gradient.

    What is computed from them must be the same in every process, and gradients be averaged over processes, as
    ``DistributedDataParallel`` does. Then no process need ask the others for gradients: its own rows' are exact once
    they are multiplied by the number of processes. ``torch.distributed.nn.functional.all_gather`` does ask, between
    the averagings of ``DistributedDataParallel``, and two processes have been seen to wait for each other for ever.

    Shapes: [n, ...], n the same in every process -> [n_processes * n, ...].
    """
    gathered: Tensor = _Gathered.apply(value)  # type: ignore[no-untyped-call]
    return gathered


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.n_rows = len(value)
        rows = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(_n_processes())]
        distributed.all_gather(rows, value.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        first = distributed.get_rank() * ctx.n_rows
        return gradient[first : first + ctx.n_rows] * _n_processes()


def _n_processes() -> int:
    return distributed.get_world_size()
