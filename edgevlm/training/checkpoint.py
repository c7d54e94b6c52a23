"""The state of a training on disk. Needs torch at import."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from edgevlm.errors import StoreError

_OWN = frozenset({"identity", "n_done"})


class Checkpoint:
    """The state of a training as one safetensors file: weights, optimizer, random numbers; no pickle.

    Args:
        identity: digest of everything that decides the result; the file of another training only gets
            another name.
        more: further tensors that the training changes in place, such as a moving average of the weights.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        more: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.file = folder / "checkpoint.safetensors"
        self.facts: dict[str, str] = {}
        """What ``save`` was told beside the tensors, once ``load`` has found it."""
        self.note = ""
        """What ``load`` found instead, a sentence."""
        self._identity = identity
        self._module = module
        self._optimizer = optimizer
        self._more = more or {}

    def save(self, n_done: int, facts: Mapping[str, str] | None = None) -> None:
        """Whole, or not at all."""
        tensors = {f"model.{name}": value for name, value in self._state().items()}
        tensors |= {f"more.{name}": value for name, value in self._more.items()}
        for index, state in enumerate(self._optimizer_states()):
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        tensors["random"] = torch.get_rng_state()
        write_tensors(self.file, tensors, {"identity": self._identity, "n_done": str(n_done), **(facts or {})})

    def load(self) -> int:
        """Put the state back; the number of steps that were done, 0 where there is no checkpoint of this training.

        A file that is another's, or damaged, gets another name, so that nothing is lost that took hours.
        """
        from safetensors import SafetensorError, safe_open

        if not self.file.is_file():
            return 0
        try:
            with safe_open(self.file, framework="pt") as opened:
                about = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError):
            return self._set_aside("is damaged")
        if about.get("identity") != self._identity:
            return self._set_aside(f"is of a training with other settings, after step {about.get('n_done', '?')}")
        with torch.no_grad():
            for name, value in self._state().items():
                value.copy_(tensors[f"model.{name}"])
            for name, value in self._more.items():
                value.copy_(tensors[f"more.{name}"])
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            names = [name for name in tensors if name.startswith(f"optimizer.{index}.")]
            if names:
                self._optimizer.state[parameter] = {name.rpartition(".")[2]: tensors[name] for name in names}
        torch.set_rng_state(tensors["random"])
        self.facts = {name: value for name, value in about.items() if name not in _OWN}
        return int(about["n_done"])

    def _set_aside(self, why: str) -> int:
        kept = self.file.with_name("checkpoint.earlier.safetensors")
        with contextlib.suppress(OSError):  # of several processes one comes first
            self.file.replace(kept)
        self.note = f"The checkpoint '{self.file}' {why}; it is now called '{kept.name}', and training begins anew."
        return 0

    def _state(self) -> dict[str, Tensor]:
        """Weights and buffers, each once: a range that two places share has one name."""
        return {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}

    def _optimizer_states(self) -> list[dict[str, Any]]:
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        return [self._optimizer.state.get(parameter, {}) for parameter in parameters]


def write_tensors(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """A safetensors file, whole or not at all.

    Raises: StoreError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    held = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(held, unfinished, metadata=dict(facts))
        unfinished.replace(file)
    except (OSError, SafetensorError) as error:
        told = error.strerror if isinstance(error, OSError) else str(error)
        raise StoreError(f"The checkpoint '{file}' cannot be written: {told}.", hint="Free some space.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def identity_of(*parts: object) -> str:
    """A digest of what decides a training's result."""
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()
