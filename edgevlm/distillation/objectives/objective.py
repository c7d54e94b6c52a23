"""What an objective is: how it is computed, and what it needs for that."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import torch
from torch import Tensor, nn

from edgevlm.distillation.step import Step

Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]

# CLIP (Radford et al. 2021, section 2.5): above it training is not stable.
MAX_SCALE = 100.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What student and teacher can give: the shape of one row by output, and the tokenizer's numbers."""

    student: Mapping[str, tuple[int, ...]]
    teacher: Mapping[str, tuple[int, ...]]
    n_tokens: int | None = None
    mask_token: int | None = None


class Head(nn.Module):
    """An objective with parameters of its own. A subclass takes ``(sizes, *, options)``, and a step in ``forward``.

    Args:
        note: what the user should know of the parameters; empty where that is nothing.
    """

    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """How an objective is computed, and what it needs.

    Args:
        compute: a function ``(step, *, options) -> Tensor``, or a subclass of ``Head``.
        formula, source: as the documentation shows them.
        student, teacher: outputs by name; ``{output}`` stands for the option so called.
        batch: fields of ``Batch`` beside the pictures.
        n_axes: of one row of those outputs; 0 where any will do.
        reads_sparse: takes a teacher's ``logits`` as their largest few too.
        same: how far these outputs must agree between student and teacher.
    """

    compute: Callable[..., Tensor] | type[Head]
    formula: str
    source: str
    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()
    n_axes: int = 0
    reads_sparse: bool = False
    same: Literal["", "channels", "shape"] = ""

    def options(self) -> type[msgspec.Struct]:
        """The keyword arguments of ``compute`` as a struct that reads them strictly."""
        parameters = inspect.signature(self.compute, eval_str=True).parameters.values()
        fields = [(each.name, each.annotation, each.default) for each in parameters if each.kind is each.KEYWORD_ONLY]
        return msgspec.defstruct("Options", fields, kw_only=True, frozen=True, forbid_unknown_fields=True)


class Scale(nn.Module):
    """What cosines are multiplied by before a softmax: given, or learned and held at 100 or less."""

    def __init__(self, start: float, *, is_learned: bool) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(start)), requires_grad=is_learned)

    def forward(self) -> Tensor:
        with torch.no_grad():
            # Not in the graph: there it would stop the gradient that leads back down.
            self.log.clamp_(max=math.log(MAX_SCALE))
        return self.log.exp()


def draw(step: Step, *shape: int) -> Tensor:
    """Numbers from 0 to 1 by the step's generator, wherever that is, on the device of the pictures."""
    generator = step.generator
    return torch.rand(shape, generator=generator, device=generator.device).to(step.batch.pixel_values.device)


def pooled(outputs: Tensor) -> Tensor:
    """Vectors as they are; the mean over the places of a map [n, d, h, w]."""
    return outputs.flatten(2).mean(2) if outputs.ndim > 2 else outputs
