"""The terms of a recipe as one module: read, checked against what student and teacher give, computed in float32."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from edgevlm.data_files import convert_table
from edgevlm.distillation.objectives import OBJECTIVES
from edgevlm.distillation.objectives.objective import Head, Objective, Scale, Sizes
from edgevlm.distillation.recipe import Term
from edgevlm.distillation.step import Batch, Outputs, Step
from edgevlm.errors import UsageError, did_you_mean

_AXES = {1: "a vector", 2: "a row of vectors (length, width)", 3: "a map (channels, height, width)"}
_DATA = {"labels": "labels", "input_ids": "texts", "prompts": "prompts"}


def load_objective(name: str) -> Objective:
    module, attribute = OBJECTIVES[name].split(":")
    objective: Objective = getattr(importlib.import_module(module), attribute)
    return objective


class Objectives(nn.Module):
    """Every term of a recipe.

    Args:
        student_needs, teacher_needs: outputs by name. Where logits were stored sparse, ``logits`` of a teacher stands
            for ``logits.values``, ``logits.indices`` and ``logits.rest``.
        reads_sparse: whatever asks for the teacher's ``logits`` takes them so.
        batch_needs: fields of ``Batch``; a term with ``prompts`` calls ``Step.decode`` as well.
        notes: what was added so that student and teacher fit together.
        weights: by the keys of what a call gives.
    """

    def __init__(self, terms: Sequence[Term], sizes: Sizes) -> None:
        super().__init__()
        read = [_read(number, term, sizes) for number, term in enumerate(terms, start=1)]
        names = _unique([term.objective for term in terms])
        self.student_needs = frozenset(need for term in read for need in term.student)
        self.teacher_needs = frozenset(need for term in read for need in term.teacher)
        self.reads_sparse = all(term.objective.reads_sparse for term in read if "logits" in term.teacher)
        self.batch_needs = frozenset(need for term in read for need in term.objective.batch)
        self.weights = {name: term.weight for name, term in zip(names, terms, strict=True)}
        self.heads = nn.ModuleDict({name: term.make(sizes) for name, term in zip(names, read, strict=True)})
        self.notes = tuple(dict.fromkeys(str(head.note) for head in self.heads.values() if head.note))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The value of each term, unweighted; a second term of an objective is called ``name#2``."""
        for need in sorted(self.batch_needs):
            if getattr(step.batch, need) is None:
                raise self._lacking(need)
        device = step.batch.pixel_values.device.type
        full = _in_float32(step, device, self.student_needs, self.teacher_needs)
        with torch.autocast(device, enabled=False):
            return {name: head(full) for name, head in self.heads.items()}

    def refuse_data(self, *, has_labels: bool, has_texts: bool) -> None:
        """Raises: UsageError: a term needs texts and there are none, or all learn from labels that are not there."""
        if "input_ids" in self.batch_needs and not has_texts:
            raise self._lacking("input_ids")
        if not has_labels and all("labels" in _objective_of(name).batch for name in self.heads):
            raise self._lacking("labels")

    def _lacking(self, need: str) -> UsageError:
        user = next(name for name in self.heads if need in _objective_of(name).batch)
        return UsageError(
            f"The objective '{user}' needs {_DATA[need]}, and the data set has none.",
            hint=f"Take a data set with {_DATA[need]}, or a recipe without the objective.",
        )

    def scales(self) -> dict[str, float]:
        """What the terms with a contrastive scale have learned, by term: a student that gives probabilities takes it
        along, though the parameter itself is thrown away."""
        return {
            name: float(module().detach())
            for name, head in self.heads.items()
            for module in head.modules()
            if isinstance(module, Scale)
        }


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A term whose options were read, and its needs by name."""

    objective: Objective
    options: Mapping[str, Any]
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    where: str

    def make(self, sizes: Sizes) -> Head:
        compute = self.objective.compute
        if not isinstance(compute, type):
            return _Function(compute, self.options)
        try:
            head: Head = compute(sizes, **self.options)
        except UsageError as error:
            raise UsageError(f"{self.where}: {error.message}", hint=error.hint) from error
        return head


class _Function(Head):
    """An objective without parameters."""

    def __init__(self, compute: Callable[..., Tensor], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.compute = compute
        self.options = options

    def forward(self, step: Step) -> Tensor:
        return self.compute(step, **self.options)


def _read(number: int, term: Term, sizes: Sizes) -> _Read:
    where = f"Term {number} of the recipe ('{term.objective}')"
    if term.objective not in OBJECTIVES:
        raise UsageError(
            f"Term {number} of the recipe names the objective '{term.objective}', and none is called so.",
            hint=did_you_mean(term.objective, OBJECTIVES),
        )
    objective = load_objective(term.objective)
    read = convert_table(term.options, objective.options(), where=f"options of term {number} ('{term.objective}')")
    options = msgspec.structs.asdict(read)
    student, teacher = (
        tuple(need.format(**options) for need in needs) for needs in (objective.student, objective.teacher)
    )
    _check_given(where, "student", student, sizes.student, objective.n_axes)
    _check_given(where, "teacher", teacher, sizes.teacher, objective.n_axes)
    _check_same(where, tuple(need for need in student if need in teacher), sizes, objective.same)
    return _Read(objective=objective, options=options, student=student, teacher=teacher, where=where)


def _check_given(
    where: str, who: str, needs: tuple[str, ...], given: Mapping[str, tuple[int, ...]], n_axes: int
) -> None:
    for need in needs:
        if need not in given and not (who == "teacher" and f"{need}.values" in given):
            raise UsageError(
                f"{where} needs '{need}' of the {who}, which gives {', '.join(sorted(given)) or 'nothing'}.",
                hint=f"Take a {who} that gives it, or another recipe.",
            )
        if n_axes and need in given and len(given[need]) != n_axes:
            raise UsageError(
                f"{where} needs '{need}' of the {who} to be {_AXES[n_axes]}, and it has the shape {given[need]}.",
                hint=f"Take a {who} whose output is so, or another recipe.",
            )


def _check_same(where: str, needs: tuple[str, ...], sizes: Sizes, same: str) -> None:
    for need in needs if same else ():
        mine, theirs = sizes.student[need], sizes.teacher.get(need)
        if theirs is not None and (mine != theirs if same == "shape" else mine[0] != theirs[0]):
            what = "the same shape" if same == "shape" else "as many channels or classes"
            raise UsageError(
                f"{where} needs {what} in '{need}' of student and teacher; the student's are {mine}, "
                f"the teacher's {theirs}.",
                hint="Build the student with the teacher's sizes, or use the objective 'features', which projects.",
            )


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    numbered = [(name, names[: index + 1].count(name)) for index, name in enumerate(names)]
    return tuple(name if number == 1 else f"{name}#{number}" for name, number in numbered)


def _objective_of(name: str) -> Objective:
    return load_objective(name.split("#")[0])


def _in_float32(step: Step, device: str, student: frozenset[str], teacher: frozenset[str]) -> Step:
    """``step`` with outputs in float32; the models that it runs compute in the precision that holds outside."""
    is_lower, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    decode = step.decode

    def run(batch: Batch) -> Outputs:
        with torch.autocast(device, dtype=dtype, enabled=is_lower):
            return _floats(step.run(batch))

    def run_decoder(who: str, image_embeds: Tensor, prompts: Mapping[str, Tensor]) -> Outputs:
        assert decode is not None
        with torch.autocast(device, dtype=dtype, enabled=is_lower):
            return _floats(decode(who, image_embeds, prompts))

    return replace(
        step,
        student=_floats({name: value for name, value in step.student.items() if name in student}),
        teacher=_floats({name: value for name, value in step.teacher.items() if name.split(".")[0] in teacher}),
        run=run,
        decode=run_decoder if decode else None,
    )


def _floats(outputs: Outputs) -> Outputs:
    return {name: value.float() if value.is_floating_point() else value for name, value in outputs.items()}
