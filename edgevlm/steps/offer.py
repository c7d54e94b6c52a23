"""Forms for a target that is not at hand: made and judged here, timed nowhere, a few of them for the device to choose.

Float is the first of them. Of forms that differ in how they were calibrated alone, the one that loses least stands for
all: what they take on the device is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgevlm.errors import EdgeVLMError, GateError
from edgevlm.evaluation.evaluation import Drop
from edgevlm.job import Work
from edgevlm.quantization.schemes import CALIBRATIONS
from edgevlm.report.spec import CandidateRow
from edgevlm.runtime.bundle import release
from edgevlm.search.choose import FLOAT, Trial, misses
from edgevlm.search.spec import Candidate, SearchResult, Variant
from edgevlm.steps.judging import Judge
from edgevlm.steps.requires import requires_of
from edgevlm.steps.variants import Form, GraphForms, check_keep_float, made_baseline
from edgevlm.store import write_spec
from edgevlm.target import IR_OF_OPSET, is_gpu

MAX_FORMS = 6
"""Each is the whole model once more in the bundle, and some seconds of tuning on the device."""


def run(work: Work) -> None:
    """``search.json`` and the variants' graphs, none of them timed.

    Raises: GateError: a precision was insisted on, and no form of it is inside the budgets.
    """
    forms = [GraphForms(work, graph) for graph in work.step.params["graphs"]]
    baselines = tuple(made_baseline(each) for each in forms)
    check_keep_float(work, forms)
    variants = {each.graph: _made(work, each, base) for each, base in zip(forms, baselines, strict=True)}
    for each in variants.values():
        if failure := each[FLOAT].failure:
            raise GateError(
                f"Not even the float graph runs on {work.step.params['target']}: {failure}",
                hint="Name a newer runtime in the target's file, where the device has one.",
            )
    candidates = _candidates(variants)
    with Judge(work, work.job.splits.select, baselines, work.out) as judge:
        drops, failures = _judged(judge, candidates, variants)
    kept = _kept(work, candidates, variants, drops)
    if kept == (FLOAT,) and (missed := _missed(work, candidates[0], variants, drops)):
        raise GateError(
            f"No form is inside the budgets: float {'; '.join(missed)}. {_nearest(drops, failures)}",
            hint="Loosen the budget that is missed, choose a smaller model, or lower --image-size.",
        )
    if kept == (FLOAT,) and work.step.params["precision"] not in ("auto", FLOAT):
        raise GateError(
            f"No form in {work.step.params['precision']} is inside the budgets. {_nearest(drops, failures)}",
            hint="Allow more with --max-drop, give more --calibration-data, or leave --precision at auto.",
        )
    write_spec(
        work.out / "search.json",
        SearchResult(
            variants=tuple(variant for each in variants.values() for variant in each.values()),
            candidates=candidates,
            rows=tuple(_row(work, each, variants, drops, failures, kept) for each in candidates),
            contenders=kept,
            timings=(),
            sensitivities=(),
            pareto=(),
            was_cut=False,
            metric=drops[FLOAT].metric,
            is_valid=True,
            reasons=(),
        ),
    )


Variants = Mapping[str, Mapping[str, Variant]]
"""Graph -> form's name -> variant."""


def _made(work: Work, forms: GraphForms, baseline: Variant) -> dict[str, Variant]:
    made = {FLOAT: _fitting(work, baseline)}
    has_gpu = any(is_gpu(backend) for backend in work.step.params["backends"])
    for form in forms.forms()[1:]:
        if has_gpu and not is_gpu(form.backend):
            continue  # a GPU is what the hardware was bought for; float on its processor is enough to compare with
        variant = _fitting(work, forms.make(form)) if isinstance(form, Form) else form
        made[variant.name] = variant
    return made


def _fitting(work: Work, variant: Variant) -> Variant:
    """In the file format that the target reads; with a failure where it needs more than the target's own runtime."""
    if variant.backend == "onnxruntime" and variant.failure is None and work.step.params["onnx_ir"]:
        _limit_ir(work.out / variant.file, work.step.params["onnx_ir"])
    at_hand: Mapping[str, str] = work.step.params["runtimes"]
    if variant.failure is not None or variant.backend not in at_hand or is_gpu(variant.backend):
        return variant
    least = requires_of((variant,), work.out, {}).backends[variant.backend]
    if release(least) <= release(at_hand[variant.backend]):
        return variant
    failure = f"It needs {variant.backend} {least}, and the target has {at_hand[variant.backend]}."
    return msgspec.structs.replace(variant, failure=failure)


def _limit_ir(file: Path, onnx_ir: int) -> None:
    """Say an older version of the file format, where the graph's operator set exists in it.

    Between 8 and 11 the format only gained types, which come with operator sets of their own.
    """
    import onnx

    model = onnx.load(file, load_external_data=False)
    opset = max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if model.ir_version > onnx_ir >= IR_OF_OPSET.get(opset, model.ir_version):
        model.ir_version = onnx_ir
        file.unlink()  # it may be a link to a result of the store
        onnx.save(model, file)


def _candidates(variants: Variants) -> tuple[Candidate, ...]:
    """Float, then each form that some graph has; a graph that has no such form stays float."""
    names = dict.fromkeys(name for each in variants.values() for name in each)
    return tuple(
        Candidate(name=name, variants={graph: name if name in each else FLOAT for graph, each in variants.items()})
        for name in names
    )


def _members(candidate: Candidate, variants: Variants) -> tuple[Variant, ...]:
    return tuple(variants[graph][name] for graph, name in candidate.variants.items())


def _judged(
    judge: Judge, candidates: Iterable[Candidate], variants: Variants
) -> tuple[dict[str, Drop], dict[str, str]]:
    drops: dict[str, Drop] = {}
    failures: dict[str, str] = {}
    for candidate in candidates:
        members = _members(candidate, variants)
        if broken := [member.failure for member in members if member.failure]:
            failures[candidate.name] = broken[0]
            continue
        try:
            drops[candidate.name] = judge.drop(members)
        except EdgeVLMError as error:
            if candidate.name == FLOAT:
                raise
            failures[candidate.name] = error.message
    return drops, failures


def _kept(
    work: Work, candidates: tuple[Candidate, ...], variants: Variants, drops: Mapping[str, Drop]
) -> tuple[str, ...]:
    """Float, then the best of each kind: first one of each backend and precision, then more of them."""
    best: dict[str, str] = {}
    for candidate in candidates:
        name = candidate.name
        if name == FLOAT or name not in drops or _missed(work, candidate, variants, drops):
            continue
        kind = _kind(name)
        if kind not in best or drops[name].value < drops[best[kind]].value:
            best[kind] = name
    by_class: dict[Any, int] = {}
    ranked = []
    for place, name in enumerate(best.values()):
        members = _members(next(each for each in candidates if each.name == name), variants)
        key = tuple((member.backend, member.precision) for member in members)
        by_class[key] = by_class.get(key, 0) + 1
        ranked.append((by_class[key], place, name))
    return (FLOAT, *(name for _, _, name in sorted(ranked)[: MAX_FORMS - 1]))


def _kind(name: str) -> str:
    """What is left of a form's name without its calibration: the same operators in the same precision."""
    return "-".join(word for word in name.split("-") if word not in CALIBRATIONS)


def _missed(work: Work, candidate: Candidate, variants: Variants, drops: Mapping[str, Drop]) -> tuple[str, ...]:
    size = sum(member.n_bytes for member in _members(candidate, variants))
    trial = Trial(name=candidate.name, size_bytes=size, drop=drops[candidate.name].value)
    return misses(trial, work.job.request.budgets)


def _row(
    work: Work,
    candidate: Candidate,
    variants: Variants,
    drops: Mapping[str, Drop],
    failures: Mapping[str, str],
    kept: tuple[str, ...],
) -> CandidateRow:
    members, name = _members(candidate, variants), candidate.name
    row = CandidateRow(
        name=name,
        precision="+".join(dict.fromkeys(member.precision for member in members)),
        backend="+".join(dict.fromkeys(member.backend for member in members)),
        recipe=members[-1].recipe if len(members) == 1 else dict(candidate.variants),
        status="failed",
        reason=failures.get(name, ""),
    )
    if name in failures:
        return row
    drop = drops[name]
    row = msgspec.structs.replace(
        row,
        size_bytes=sum(member.n_bytes for member in members),
        accuracy=drop.candidate,
    )
    missed = _missed(work, candidate, variants, drops)
    if name == FLOAT:  # what the others' drops are measured from
        reason = "; ".join(("ships first, to be compared with on the device", *missed))
        return msgspec.structs.replace(row, status="float", reason=reason)
    row = msgspec.structs.replace(row, drop=drop.value, drop_low=drop.low, drop_high=drop.high)
    if missed:
        return msgspec.structs.replace(row, status="over a budget", reason="; ".join(missed))
    if name in kept:
        return msgspec.structs.replace(row, status="inside budgets", reason="ships, to be timed on the device")
    other = next((each for each in kept if _kind(each) == _kind(name)), None)
    reason = f"{other} is as fast by its make and loses less" if other else f"{MAX_FORMS} forms ship at most"
    return msgspec.structs.replace(row, status="left out", reason=reason)


def _nearest(drops: Mapping[str, Drop], failures: Mapping[str, str]) -> str:
    lowered = sorted((drop.value, name) for name, drop in drops.items() if name != FLOAT)
    if lowered:
        return f"Nearest: {lowered[0][1]} drops {lowered[0][0]:.2%}."
    return " ".join(f"{name} failed ({reason})." for name, reason in list(failures.items())[:3])
