"""A checkpoint is whole or not there, and only of its own training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="checkpoints hold PyTorch's tensors")

from edgevlm.errors import StoreError  # noqa: E402 - torch first
from edgevlm.training.checkpoint import Checkpoint, identity_of, write_tensors  # noqa: E402


def start(folder: Path, identity: str = "one") -> tuple[Any, Any, dict[str, Any], Checkpoint]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    more = {"average": torch.zeros(4)}
    return module, optimizer, more, Checkpoint(folder, identity, module, optimizer, more=more)


def step(module: Any, optimizer: Any) -> None:
    module(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_everything_comes_back(tmp_path: Path) -> None:
    module, optimizer, more, checkpoint = start(tmp_path)
    step(module, optimizer)
    more["average"] += 2
    checkpoint.save(7, {"best": "0.5"})
    step(module, optimizer)
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    again, other_optimizer, other_more, other = start(tmp_path)
    assert other.load() == 7 and other.facts == {"best": "0.5"}
    assert torch.equal(other_more["average"], torch.full((4,), 2.0))
    step(again, other_optimizer)  # with the same random numbers and the same moments
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("harm", ["truncated", "another's", "missing"])
def test_what_is_not_this_trainings_is_left_alone(tmp_path: Path, harm: str) -> None:
    module, optimizer, _, checkpoint = start(tmp_path)
    step(module, optimizer)
    checkpoint.save(7)
    if harm == "truncated":
        checkpoint.file.write_bytes(checkpoint.file.read_bytes()[:-9])
    if harm == "missing":
        checkpoint.file.unlink()
    again, _, _, other = start(tmp_path, "two" if harm == "another's" else "one")
    before = {name: value.clone() for name, value in again.state_dict().items()}
    assert other.load() == 0 and other.facts == {}
    kept = checkpoint.file.with_name("checkpoint.earlier.safetensors")
    assert kept.is_file() == bool(other.note) == (harm != "missing")
    assert ("damaged" if harm == "truncated" else "after step 7" if harm == "another's" else "") in other.note
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        write_tensors(tmp_path / "missing" / "a.safetensors", {"a": torch.zeros(1)}, {})
    assert not list(tmp_path.iterdir())


def test_an_identity_is_of_its_parts_in_their_order() -> None:
    assert identity_of("a", {"x": 1, "y": 2}) == identity_of("a", {"y": 2, "x": 1})
    assert identity_of("a", "b") != identity_of("b", "a")
