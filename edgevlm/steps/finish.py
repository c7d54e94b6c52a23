"""The report of a compile, and the files of the bundle that it goes into."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edgevlm.export import Exported
from edgevlm.job import Job
from edgevlm.measure.counts import Instructions
from edgevlm.measure.environment import describe_environment
from edgevlm.measure.explanation import Explanation
from edgevlm.plan import TEXT_ENCODER, Budgets
from edgevlm.report import write_report
from edgevlm.report.notation import count
from edgevlm.report.spec import REPORT_SCHEMA_VERSION, CandidateRow, DataUse, Report, ShippedForm, StepRow
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.machine import describe_machine
from edgevlm.runtime.spec import BundleForm, Manifest
from edgevlm.search.choose import FLOAT
from edgevlm.search.spec import SearchResult
from edgevlm.steps.confirm import Confirmation
from edgevlm.steps.variants import is_text_judged
from edgevlm.store import read_spec

COUNTS = "instructions.json"


def assemble_report(job: Job, folders: Mapping[str, Path], manifest: Manifest, steps: tuple[StepRow, ...]) -> Report:
    """Everything that the steps found out, as one value."""
    found = read_spec(folders["search"] / "search.json", SearchResult)
    confirmed = read_spec(folders["confirm"] / "confirmation.json", Confirmation)
    winner, reference = found.row(confirmed.winner), found.row(FLOAT)
    return Report(
        schema_version=REPORT_SCHEMA_VERSION,
        title=f"{manifest.name} for {manifest.target}",
        task=manifest.task,
        target=manifest.target,
        source=manifest.provenance.source,
        licence=manifest.provenance.licence,
        verdict=verdict(manifest, winner, confirmed),
        selection=manifest.selection,
        winner=confirmed.winner,
        metric=found.metric,
        budgets=_budgets(job.request.budgets),
        accuracy=manifest.accuracy,
        latency=manifest.latency,
        size_bytes=winner.size_bytes or 0,
        float_size_bytes=reference.size_bytes or 0,
        candidates=tuple(_told(row, confirmed, is_measured=job.request.is_measured) for row in found.rows),
        proofs=tuple(exported.proof for exported in _exports(folders)),
        data=DataUse(
            source=job.data.source,
            n_calibrate=job.data.n_calibrate,
            n_select=job.data.n_select,
            n_report=job.data.n_report,
            has_labels=job.data.has_labels,
            is_synthetic=job.data.is_synthetic,
        ),
        comparisons=found.comparisons,
        environment=found.comparisons[0].environment if found.comparisons else describe_environment(),
        steps=steps,
        warnings=(*_warnings(job, found, confirmed, winner), *_unbuilt(manifest), *_export_notes(folders)),
        reproduce=job.command,
        tools=manifest.provenance.tools,
        screenings=found.screenings,
        sensitivities=found.sensitivities,
        pareto=found.pareto,
        explanation=_explanation(folders),
        instructions=_instructions(folders),
        forms=shipped_forms(job, manifest, {each.name: each for each in found.rows}, folders["bundle"] / "files"),
    )


def shipped_forms(
    job: Job, manifest: Manifest, rows: Mapping[str, CandidateRow], folder: Path
) -> tuple[ShippedForm, ...]:
    """What is known of each form that the device chooses from, and what is not.

    Args:    folder: holds the bundle's files.
    """
    here, target = describe_machine(), job.target
    forms = []
    for form in manifest.forms:
        verified: tuple[str, ...] = (
            f"Accuracy and golden vectors: {form.judged_by} on this machine ({here.name}, {here.arch}).",
            f"Runs on {', '.join(f'{name} {least}' for name, least in form.requires.backends.items())} or newer"
            + (f", ONNX IR {form.requires.onnx_ir}, opset {form.requires.opset}." if form.requires.opset else "."),
        )
        unproven = [f"How fast it is on {target.name}: nothing was timed."]
        if form.build:
            verified = (*verified[:1], "No pattern that TensorRT rejects or gets wrong stands in its graph.")
            unproven.append(f"What a GPU of compute capability {target.compute_capability} answers.")
        if form.why_not_built:
            unproven.append("That an engine can be built of it.")
        if form.build and form.status == "ready":
            verified = (*verified, _built(form))
        if target.arch != here.arch and not form.build:
            unproven.append(f"That {target.arch}'s own kernels answer alike: `edgevlm verify` there says so.")
        forms.append(
            ShippedForm(
                name=form.name,
                precision=rows[form.name].precision,
                backend=rows[form.name].backend,
                status="ready to tune" if form.status == "ready" else form.status,
                size_bytes=sum((folder / file).stat().st_size for part in form.components for file in part.files),
                accuracy=form.accuracy,
                verified=verified,
                unproven=tuple(unproven),
            )
        )
    return tuple(forms)


def _unbuilt(manifest: Manifest) -> tuple[str, ...]:
    """Why forms ship without their engines."""
    reasons = [form.why_not_built for form in manifest.forms if form.why_not_built]
    return tuple(
        f"{count(reasons.count(why), 'form')} ship as graphs that `edgevlm build` makes engines of on the device: {why}"
        for why in dict.fromkeys(reasons)
    )


def _explanation(folders: Mapping[str, Path]) -> Explanation | None:
    return read_spec(folders["explain"] / "explanation.json", Explanation) if "explain" in folders else None


def _instructions(folders: Mapping[str, Path]) -> Instructions | None:
    return read_spec(folders["count"] / COUNTS, Instructions) if "count" in folders else None


def _built(form: BundleForm) -> str:
    backend, capabilities = form.components[0].backend, ", ".join(form.build["compute_capabilities"])
    version = load_backend(backend).version()
    return f"Its engine was built by {backend} {version} for compute capability {capabilities}; it was never run."


def verdict(manifest: Manifest, winner: CandidateRow, confirmed: Confirmation) -> str:
    """One or two sentences: what was chosen, and why."""
    if manifest.forms:
        return (
            f"{len(manifest.forms)} forms ship, float first; none was timed: {manifest.selection_reason}. "
            "`edgevlm tune BUNDLE` there verifies and times them, and writes the chosen bundle."
        )
    if winner.name == FLOAT:
        return f"The float model ships: {manifest.selection_reason}."
    accuracy = confirmed.accuracy
    assert winner.ratio is not None and winner.ratio_low is not None and winner.ratio_high is not None
    speed = (
        f"{1 / winner.ratio:.2f}× as fast as float (95 % interval {1 / winner.ratio_high:.2f} to "
        f"{1 / winner.ratio_low:.2f})"
    )
    change = f"{abs(accuracy.drop) * 100:.2f} points {'less' if accuracy.drop > 0 else 'more'}"
    if accuracy.drop == 0:
        change = "exactly as much"
    return (
        f"{winner.name} ships ({manifest.selection_reason}): {speed}, with {change} {accuracy.metric} on {accuracy.n} "
        f"pictures that nothing was chosen by."
    )


def made_files(folder: Path) -> dict[str, Path | bytes]:
    """What the bundle step made, by path in the bundle."""
    found = sorted(path for path in (folder / "files").rglob("*") if path.is_file())
    return {path.relative_to(folder / "files").as_posix(): path for path in found}


def bundle_files(folder: Path, report: Report) -> dict[str, Path | bytes]:
    """Everything that the bundle step made, and the report in every format."""
    files = made_files(folder)
    with tempfile.TemporaryDirectory(prefix="edgevlm-") as written:
        for path in write_report(report, Path(written)):
            files[f"report/{path.name}"] = path.read_bytes()
    return files


def _told(row: CandidateRow, confirmed: Confirmation, *, is_measured: bool) -> CandidateRow:
    """The row with what the report split said of it."""
    if is_measured and row.name == confirmed.winner:
        return msgspec.structs.replace(row, status="winner")
    rejected = next((each for each in confirmed.rejected if each.name == row.name), None)
    if rejected is not None:
        reason = f"lost {rejected.drop:.2%} on the report split, more than is allowed"
        return msgspec.structs.replace(row, status="over a budget", reason=reason)
    return row


def _exports(folders: Mapping[str, Path]) -> tuple[Exported, ...]:
    exports = [folder for name, folder in folders.items() if name.startswith("export:")]
    return tuple(read_spec(folder / "exported.json", Exported) for folder in exports)


def _export_notes(folders: Mapping[str, Path]) -> tuple[str, ...]:
    return tuple(note for exported in _exports(folders) for note in exported.notes)


def _budgets(budgets: Budgets) -> dict[str, float]:
    asked = {name: getattr(budgets, name) for name in budgets.__struct_fields__}
    return {name: value for name, value in asked.items() if value is not None}


def _warnings(job: Job, found: SearchResult, confirmed: Confirmation, winner: CandidateRow) -> tuple[str, ...]:
    # The report says by itself that pictures were generated, and which measurements are not valid.
    warnings = [note for note in job.notes if not (job.data.is_synthetic and note in job.splits.report.notes)]
    if confirmed.rejected and job.request.is_measured:  # else nothing is chosen by it
        warnings.append(
            f"{len(confirmed.rejected) + 1} candidates were tried on the report split: its figure is slightly too good."
        )
    if winner.name != FLOAT and winner.ratio_high is not None and winner.ratio_high >= 1:
        warnings.append(
            "What ships is not surely faster than float: it was asked for, or the budgets leave nothing else."
        )
    ships_text = any(variant.graph == TEXT_ENCODER for variant in found.variants)
    if ships_text and job.request.precision != FLOAT and not is_text_judged(job):
        warnings.append("The text tower stays float: without --labels or labelled --eval-data nothing can judge it.")
    if job.request.batch is None:
        warnings.append("The batch is free; latency was measured at batch 1.")
    return tuple(dict.fromkeys(warnings))
