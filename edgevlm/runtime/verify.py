"""Whether a bundle is whole and gives here what it gave where it was made."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import PIL

from edgevlm.errors import BundleError, ForeignEngineError, MissingToolError, RefusedGraphError
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.bundle import Bundle, open_bundle
from edgevlm.runtime.engine import EngineBackend
from edgevlm.runtime.image import decode_image, size_of
from edgevlm.runtime.machine import describe_machine
from edgevlm.runtime.pipeline import OpenGraph, Pipeline
from edgevlm.runtime.spec import Array, Component, GoldenCase, Spec, from_json, to_json
from edgevlm.runtime.tasks import Result, load_task

NO_ENGINE = "It has no engine yet; run `edgevlm build` on the device."
"""Why a form that ships as the graph of an engine is left out, whether TensorRT is here or not."""


class CaseCheck(Spec, frozen=True, kw_only=True):
    """A golden case, replayed from the picture to the answer.

    Units: ``max_error`` is the largest |difference| over the largest |expected|, of the worst output.
    Args:
        form: of a bundle that holds several.
        tolerance: what ``max_error`` may be on another machine.
    """

    picture: str
    form: str = ""
    tolerance: float = 0.0
    max_error: float
    is_bit_equal: bool
    is_same_answer: bool


class Verification(Spec, frozen=True, kw_only=True):
    """Falsy when something is wrong; ``reasons`` say what, a sentence each.

    Args:
        is_same_machine: this processor and these tool versions made the golden vectors, so every bit must agree.
        tolerance: of the form that is allowed most.
        left_out: forms that this machine cannot run, and why.
    """

    name: str
    n_files: int
    n_bytes: int
    is_same_machine: bool
    tolerance: float
    cases: tuple[CaseCheck, ...]
    reasons: tuple[str, ...]
    left_out: dict[str, str] = {}

    def __bool__(self) -> bool:
        return not self.reasons

    def to_text(self) -> str:
        """For people, without a line feed at the end."""
        lines = [f"{self.n_files} files, {self.n_bytes / 1e6:.1f} MB: every sha256 is what the manifest says."]
        for case in self.cases:
            bits = (
                "every bit equal"
                if case.is_bit_equal
                else f"error {case.max_error:.2g} of {case.tolerance:.2g} allowed"
            )
            answer = "same answer" if case.is_same_answer else "another answer"
            form = f"{case.form}, " if case.form else ""
            lines.append(f"{form}{case.picture}: {answer}, {bits}")
        lines += [f"{form}: not run here: {why}" for form, why in self.left_out.items()]
        verdict = "as where it was made" if self.is_same_machine else "within the tolerance for another machine"
        return "\n".join([*lines, *(self.reasons or (f"'{self.name}' answers here {verdict}.",))])


def verify_bundle(path: str | os.PathLike[str]) -> Verification:
    """Check every file's sha256, then replay every golden case, of every form that this machine can run.

    Raises: BundleError: a file is not what the manifest says. MissingToolError: this machine cannot run the bundle.
    """
    bundle = open_bundle(path)
    for entry in bundle.manifest.files:
        bundle.file(entry.path)
    bundle.check_requires()
    found = [verify_form(bundle)]
    left_out = {}
    for form in bundle.manifest.forms[1:]:
        if form.status != "ready":
            left_out[form.name] = NO_ENGINE
            continue
        try:
            found.append(verify_form(bundle.in_form(form), name=form.name))
        except (MissingToolError, ForeignEngineError, RefusedGraphError) as error:
            left_out[form.name] = error.message
    return Verification(
        name=bundle.manifest.name,
        n_files=len(bundle.manifest.files),
        n_bytes=sum(entry.n_bytes for entry in bundle.manifest.files),
        is_same_machine=all(each.is_same_machine for each in found),
        tolerance=max(each.tolerance for each in found),
        cases=tuple(case for each in found for case in each.cases),
        reasons=tuple(reason for each in found for reason in each.reasons),
        left_out=left_out,
    )


class FormCheck(Spec, frozen=True, kw_only=True):
    """What replaying one form's golden cases gave."""

    is_same_machine: bool
    tolerance: float
    cases: tuple[CaseCheck, ...]
    reasons: tuple[str, ...]


def verify_form(bundle: Bundle, *, name: str = "", open_graph: OpenGraph | None = None) -> FormCheck:
    """Replay the golden cases of the form that ``bundle`` is in.

    Args:    open_graph: what opens the graphs in their backend's place.
    Raises:  MissingToolError: this machine cannot run it.
    """
    bundle.check_requires()
    pipeline = Pipeline.from_bundle(bundle, open_graph=open_graph)
    golden = bundle.manifest.golden
    cases = tuple(msgspec.structs.replace(_replay(bundle, pipeline, case), form=name) for case in golden.cases)
    # An engine's golden vectors are those of its graph on a processor: not a bit of them need be the GPU's.
    is_engine = any(part.backend in get_args(EngineBackend) for part in bundle.manifest.components)
    is_same_machine = not is_engine and golden.made_on == golden_conditions(bundle.manifest.components)
    reasons = [reason for case in cases for reason in _reasons(case, is_same_machine, golden.tolerance)]
    if not cases:
        reasons.append("The bundle holds no golden vectors, so nothing says what it should answer.")
    return FormCheck(is_same_machine=is_same_machine, tolerance=golden.tolerance, cases=cases, reasons=tuple(reasons))


def golden_conditions(components: Iterable[Component]) -> dict[str, str]:
    """What decides every bit of an output here: processor, number of threads, versions."""
    machine = describe_machine()
    used = tuple(components)
    versions = {component.backend: load_backend(component.backend).version() or "" for component in used}
    n_threads = {component.name: component.session.n_threads or machine.n_physical_cores for component in used}
    return {
        "cpu": machine.name,
        "arch": machine.arch,
        "isa": " ".join(machine.isa),
        "n_threads": " ".join(f"{name}={n}" for name, n in sorted(n_threads.items())),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        **versions,
    }


def _replay(bundle: Bundle, pipeline: Pipeline, case: GoldenCase) -> CaseCheck:
    labels = case.labels or None
    picture = decode_image(bundle.file(case.picture))
    outputs = pipeline.outputs(pipeline.preprocess(picture)[None])
    if missing := case.outputs.keys() - outputs.keys():
        raise BundleError(
            f"The graph does not give '{min(missing)}', which '{case.picture}' has a golden vector for.",
            hint="Compile the model again.",
        )
    expected = {name: _load_array(bundle.file(path), path) for name, path in case.outputs.items()}
    kept = {name: kept_part(outputs[name], case, name) for name in expected}
    answer_bytes = bundle.file(case.answer).read_bytes()
    answer = _read_answer(answer_bytes, case, bundle)
    asked = [case.prompts] if case.prompts else None
    given = pipeline.results(outputs, labels=labels, sizes=[size_of(picture)], prompts=asked)[0]
    return CaseCheck(
        picture=case.picture,
        tolerance=bundle.manifest.golden.tolerance,
        max_error=max((relative_error(value, kept[name]) for name, value in expected.items()), default=0.0),
        is_bit_equal=to_json(given) == answer_bytes
        and all(np.array_equal(value, kept[name]) for name, value in expected.items()),
        is_same_answer=answer.is_same_answer(given, tolerance=bundle.manifest.golden.tolerance),
    )


def kept_part(output: Array, case: GoldenCase, name: str) -> Array:
    """What a golden case keeps of an output."""
    step = case.every.get(name, 1)
    return output if step < 2 else output.ravel()[::step]


def _load_array(file: Path, path: str) -> Array:
    try:
        array: Array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BundleError(f"'{path}' is not a numpy array: {error}.", hint="Compile the model again.") from error
    return array


def _read_answer(data: bytes, case: GoldenCase, bundle: Bundle) -> Result:
    try:
        return from_json(data, load_task(bundle.manifest.task).result_type)
    except msgspec.MsgspecError as error:
        raise BundleError(f"'{case.answer}' is no answer: {error}.", hint="Compile the model again.") from error


def relative_error(expected: Array, actual: Array) -> float:
    """The largest |difference| over the largest |expected|; infinite where the shapes differ or NaN turned up."""
    if expected.shape != actual.shape:
        return float("inf")
    wide = expected.astype(np.float64)
    scale = float(np.abs(wide).max(initial=0.0)) or 1.0
    error = float(np.abs(wide - actual).max(initial=0.0)) / scale
    return error if np.isfinite(error) else float("inf")


def _reasons(case: CaseCheck, is_same_machine: bool, tolerance: float) -> list[str]:
    reasons = []
    if is_same_machine and not case.is_bit_equal:
        reasons.append(
            f"'{case.picture}' gave other bits here, where its golden vectors were made (error {case.max_error:.2g})."
        )
    if case.max_error > tolerance:
        reasons.append(f"'{case.picture}' is off by {case.max_error:.2g}, more than {tolerance:.2g}.")
    if not case.is_same_answer:
        reasons.append(f"'{case.picture}' got another answer than where the bundle was made.")
    return reasons
