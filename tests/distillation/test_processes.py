"""Two processes that gather and average gradients learn what one process with the whole batch does."""

from __future__ import annotations

import pytest
import torch
from torch import distributed
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from edgevlm.distillation.gathering import gather_rows
from tests.distillation.steps import WIDTH, N, make_step, objectives_of, random, tokens

NAMES = ("affinity", "image-text-contrastive", "image-text-label-contrastive", "image-contrastive")


class Learner(torch.nn.Module):
    """A student of one layer for each tower, with its objectives."""

    def __init__(self):
        super().__init__()
        self.objectives = objectives_of(*NAMES)
        torch.manual_seed(0)
        self.towers = torch.nn.ModuleDict({name: torch.nn.Linear(WIDTH, WIDTH) for name in ("image", "text")})

    def forward(self, rows, gather):
        inputs = {name: random(2 * N, WIDTH, seed=place)[rows] for place, name in enumerate(self.towers)}

        def run(_):
            return {f"{name}_embeds": tower(inputs[name]) for name, tower in self.towers.items()}

        ids = tokens(2 * N)
        ids[N] = ids[0]
        step = make_step(
            run(None),
            {f"{name}_embeds": random(2 * N, WIDTH, seed=9 + place)[rows] for place, name in enumerate(self.towers)},
            n=len(rows),
            # The other view is the first one, so that it does not hang on which process draws it.
            run=run,
            gather=gather,
            input_ids=ids[rows],
            attention_mask=None,
            labels=(torch.arange(2 * N) % 4)[rows],
        )
        return torch.stack(list(self.objectives(step).values()))


def learn(rank, store, result):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    learner = Learner()
    rows = torch.arange(2 * N)[rank * N : (rank + 1) * N]
    averaging = DistributedDataParallel(learner)
    values = averaging(rows, gather_rows)
    values.sum().backward()
    if rank == 0:
        gradients = {name: parameter.grad for name, parameter in learner.named_parameters()}
        torch.save({"values": values.detach(), "gradients": gradients}, result)
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no Gloo")
def test_two_processes_learn_as_one(tmp_path):
    spawn(learn, args=(str(tmp_path / "store"), str(tmp_path / "result.pt")), nprocs=2)
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    learner = Learner()
    values = learner(torch.arange(2 * N), lambda value: value)
    values.sum().backward()
    torch.testing.assert_close(found["values"], values.detach())
    for name, parameter in learner.named_parameters():
        torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-3, atol=1e-5)
