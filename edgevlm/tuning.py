"""Choosing on the device: a bundle that was made without it holds several forms; here they are verified and timed.

The base install does this. What comes out is a bundle of the chosen form alone, with its measurements.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from edgevlm.bundle.write import check_destination, copy_bundle, write_bundle
from edgevlm.devices import open_device
from edgevlm.errors import BundleError, EdgeVLMError, ModelError, UsageError
from edgevlm.measure.arrays import save_arrays
from edgevlm.measure.bundles import graph_input, timed
from edgevlm.measure.environment import describe_environment
from edgevlm.measure.protocol import ALL_STAY
from edgevlm.measure.spec import Environment, Measurement, Protocol, Subject
from edgevlm.plan import Budgets
from edgevlm.progress import Progress, StepFinished, StepProgress, StepStarted, silent
from edgevlm.report import FORMATS, text_from_report
from edgevlm.report.spec import CandidateRow, Report, Status
from edgevlm.runtime.bundle import Bundle, named_files, open_bundle
from edgevlm.runtime.machine import describe_machine, emulated_cpu
from edgevlm.runtime.spec import BundleForm, Latency, Manifest, Spec, from_json, to_json
from edgevlm.runtime.verify import NO_ENGINE, verify_form
from edgevlm.search.choose import FLOAT, Choice, Trial, choose
from edgevlm.search.spec import Candidate, Timing, Variant
from edgevlm.search.trials import GraphTrials, combined_ratio, measurements_of, members_of

Selection = Literal["measured", "float-fallback", "unmeasured"]


class TunedForm(Spec, frozen=True, kw_only=True):
    """What was found out about one form on the device.

    Units: ``ratio*`` is time ÷ float's time.
    Args:
        max_error: of its golden vectors, the largest |difference| over the largest |expected|; null where it did not
            run.
    """

    name: str
    status: Status
    reason: str
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    load_ms: float | None = None
    memory_bytes: int | None = None
    max_error: float | None = None


class Tuned(Spec, frozen=True, kw_only=True):
    """What ``edgevlm tune`` found, and where the chosen bundle is.

    Args:
        timings: the comparisons that decided, a graph each.
        emulated_cpu: empty where the times are the device's own.
    """

    bundle: str
    chosen: str
    selection: Selection
    reason: str
    forms: tuple[TunedForm, ...]
    timings: tuple[Timing, ...]
    environment: Environment
    emulated_cpu: str = ""


def tune(
    bundle: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    n_threads: int | None = None,
    max_drop: float | None = None,
    max_latency_ms: float | None = None,
    protocol: Protocol | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Tuned:
    """Verify and time every form of a bundle on this machine, and write the bundle of the one that deserves to ship.

    That is the fastest form that answers here as it should and is surely faster than float; else float.

    Args:
        output: a new folder, or a file ending in ``.evlm``.
        n_threads: all cores where left out.
        max_drop: a narrower budget than the forms were made with, as a fraction.
        max_latency_ms: what the median of the graphs together may take.
    Raises: UsageError: the bundle holds one form alone. BundleError: not even float answers here as it should.
        GateError: nothing is inside the budgets.

    Example:
        >>> tune("mobilenet-raspberry-pi-5/", output="tuned/").chosen  # doctest: +SKIP
        'int8-static-core-minmax'
    """
    opened = open_bundle(bundle)
    if not opened.manifest.forms:
        raise UsageError(
            f"'{opened.origin}' holds one form alone, so there is nothing to choose.",
            hint="Compile for a target that is not at hand, such as --target raspberry-pi-5.",
        )
    check_destination(Path(output), overwrite=overwrite)
    for entry in opened.manifest.files:
        opened.file(entry.path)
    checked = _checked(opened, progress)
    known = _timed(opened, checked, n_threads, protocol or ALL_STAY, progress)
    trials = tuple(_trial(form, checked, known) for form in opened.manifest.forms)
    budgets = Budgets(max_drop=1.0 if max_drop is None else max_drop, max_latency_ms=max_latency_ms)
    choice = choose(trials, budgets)
    tuned = _told(opened, choice, trials, checked, known)
    manifest = _manifest(opened, tuned, known)
    report = _report(opened, tuned, trials, manifest.latency)
    write_bundle(Path(output), manifest, _files(opened, manifest, tuned, report), overwrite=overwrite)
    return msgspec.structs.replace(tuned, bundle=os.fspath(output))


def tune_on(
    device: str,
    bundle: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    options: Mapping[str, float | None],
    overwrite: bool = False,
    progress: Progress = silent,
) -> Tuned:
    """Tune on the device at an address; the chosen bundle comes back.

    Args:    options: those of ``edgevlm tune``, by name; None leaves one out.
    Raises:  as ``tune``, and where the device cannot be reached.
    """
    place = Path(output)
    check_destination(place, overwrite=overwrite)
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", f"{value:g}")]
    with tempfile.TemporaryDirectory(prefix="edgevlm-") as folder, open_device(device, progress=progress) as opened:
        made = Path(folder) / "tuned"
        tuned = from_json(opened.run("tune", Path(bundle), words, output=made), Tuned)
        copy_bundle(made, place, overwrite=overwrite)
    return msgspec.structs.replace(tuned, bundle=os.fspath(place))


# --- verifying --------------------------------------------------------------------------------------------


class _Checked(Spec, frozen=True, kw_only=True):
    max_error: float | None = None
    failure: str = ""


def _checked(bundle: Bundle, progress: Progress) -> dict[str, _Checked]:
    """Whether each form answers here as it should."""
    forms, found, started = bundle.manifest.forms, {}, time.monotonic()
    progress(StepStarted("verify", f"{len(forms)} forms, raw picture to answer"))
    for i, form in enumerate(forms):
        progress(StepProgress("verify", i / len(forms), form.name))
        if form.status != "ready":
            found[form.name] = _Checked(failure=NO_ENGINE)
            continue
        try:
            check = verify_form(bundle.in_form(form))
        except EdgeVLMError as error:
            if form.name == FLOAT:
                raise
            found[form.name] = _Checked(failure=error.message)
            continue
        found[form.name] = _Checked(
            max_error=max(case.max_error for case in check.cases) if check.cases else None,
            failure=" ".join(check.reasons[:2]),
        )
    if found[FLOAT].failure:
        raise BundleError(
            f"Not even the float form answers here as where it was made: {found[FLOAT].failure}",
            hint="Fetch the bundle again; if that does not help, this machine's backend computes something else.",
        )
    progress(StepFinished("verify", time.monotonic() - started))
    return found


# --- timing -----------------------------------------------------------------------------------------------


def _timed(
    bundle: Bundle, checked: Mapping[str, _Checked], n_threads: int | None, protocol: Protocol, progress: Progress
) -> dict[str, GraphTrials]:
    """Each graph's forms in turns, those that answer as they should."""
    manifest = bundle.manifest
    picture = bundle.file(manifest.golden.cases[0].picture)
    known = {}
    with tempfile.TemporaryDirectory(prefix="edgevlm-") as folder:
        for graph in (part.name for part in manifest.components):
            trials = GraphTrials(graph=graph)
            subjects: list[Subject] = []
            for form in manifest.forms:
                variant = _variant(bundle, form, graph)
                twin = next((v for v in trials.variants.values() if v.file == variant.file), None)
                trials.variants[form.name] = variant if twin is None else twin
                if twin is not None or checked[form.name].failure:
                    continue
                part = next(each for each in form.components if each.name == graph)
                inputs = Path(folder) / f"{graph}-{len(subjects)}.npz"
                rows = part.inputs[0].shape[0]
                feeds = graph_input(bundle.in_form(form), part, picture)
                repeats = rows if isinstance(rows, int) else 1
                save_arrays(inputs, {k: np.repeat(v, repeats, axis=0) for k, v in feeds.items()})
                threads = part.session.n_threads if n_threads is None else n_threads
                subjects.append(
                    Subject(
                        name=form.name,
                        backend=part.backend,
                        file=str(bundle.root / part.file),
                        inputs=str(inputs),
                        session=msgspec.structs.replace(part.session, n_threads=threads),
                    )
                )
            comparison = timed(graph, subjects, protocol, progress)
            if why := comparison.measurement(FLOAT).failure:
                raise ModelError(
                    f"The float form's '{graph}' cannot be timed here: {why}",
                    hint="Free some memory, or give --threads.",
                )
            trials.timings.append(Timing(graph=graph, comparison=comparison))
            known[graph] = trials
    return known


def _variant(bundle: Bundle, form: BundleForm, graph: str) -> Variant:
    part = next(each for each in form.components if each.name == graph)
    return Variant(
        graph=graph,
        name=form.name,
        precision=part.precision,
        backend=part.backend,
        file=part.file,
        files=part.files,
        n_bytes=sum(bundle.entries[file].n_bytes for file in part.files),
        session=part.session,
    )


def _candidate(form: str, known: Mapping[str, GraphTrials]) -> Candidate:
    """Of graphs that two forms have in common, the first's stands for both."""
    return Candidate(name=form, variants={graph: trials.variants[form].name for graph, trials in known.items()})


def _trial(form: BundleForm, checked: Mapping[str, _Checked], known: Mapping[str, GraphTrials]) -> Trial:
    if failure := checked[form.name].failure:
        return Trial(name=form.name, failure=failure)
    candidate = _candidate(form.name, known)
    measured = measurements_of(candidate, known)
    failures = [m.failure if m else "it was not timed" for m in measured if m is None or m.failure]
    if failures:
        return Trial(name=form.name, failure=failures[0] or "it was not timed")
    ratio = combined_ratio(candidate, known)
    return Trial(
        name=form.name,
        size_bytes=sum(variant.n_bytes for variant in members_of(candidate, known)),
        p50_ms=sum(m.percentile_ms(50) for m in measured if m),
        ratio=ratio.value if ratio else None,
        ratio_low=ratio.low if ratio else None,
        ratio_high=ratio.high if ratio else None,
        drop=form.accuracy.drop,
        invalid_because=ratio.reasons if ratio and not ratio.is_valid else (),
    )


# --- what is told -----------------------------------------------------------------------------------------


def _told(
    bundle: Bundle,
    choice: Choice,
    trials: Sequence[Trial],
    checked: Mapping[str, _Checked],
    known: Mapping[str, GraphTrials],
) -> Tuned:
    chosen, machine, cpu = choice.contenders[0], describe_machine().name, emulated_cpu()
    timings = tuple(timing for each in known.values() for timing in each.timings)
    invalid = [reason for timing in timings if not timing.comparison.is_valid for reason in timing.comparison.reasons]
    selection: Selection = "measured"
    reason = f"the fastest inside the budgets, timed on {machine}"
    if chosen == FLOAT:
        selection, reason = "float-fallback", f"nothing inside the budgets is surely faster than float on {machine}"
        if invalid:
            reason = f"nothing could be measured validly on {machine}: {'; '.join(dict.fromkeys(invalid))}"
    if cpu:
        selection, reason = "unmeasured", f"chosen by times under emulation of {cpu}, which are not the device's"
    forms = []
    for trial in trials:
        verdict = choice.verdict(trial.name)
        is_chosen = trial.name == chosen
        measured = [] if trial.failure else _measured(trial.name, known)
        forms.append(
            TunedForm(
                name=trial.name,
                status="winner" if is_chosen else verdict.status,
                reason=reason if is_chosen else verdict.reason,
                p50_ms=trial.p50_ms,
                p90_ms=sum(m.percentile_ms(90) for m in measured) if measured else None,
                p99_ms=sum(m.percentile_ms(99) for m in measured) if measured else None,
                load_ms=sum(m.load_ms or 0.0 for m in measured) if measured else None,
                memory_bytes=sum(m.memory_bytes or 0 for m in measured) if measured else None,
                ratio=trial.ratio,
                ratio_low=trial.ratio_low,
                ratio_high=trial.ratio_high,
                max_error=checked[trial.name].max_error,
            )
        )
    return Tuned(
        bundle="",
        chosen=chosen,
        selection=selection,
        reason=reason,
        forms=tuple(forms),
        timings=timings,
        environment=describe_environment(),
        emulated_cpu=cpu,
    )


def _manifest(bundle: Bundle, tuned: Tuned, known: Mapping[str, GraphTrials]) -> Manifest:
    form = next(each for each in bundle.manifest.forms if each.name == tuned.chosen)
    provenance = bundle.manifest.provenance
    return msgspec.structs.replace(
        bundle.in_form(form).manifest,
        selection=tuned.selection,
        selection_reason=tuned.reason,
        latency=None if tuned.emulated_cpu else _latency(tuned, known, batch=bundle.manifest.batch or 1),
        provenance=msgspec.structs.replace(provenance, recipe=form.recipe),
        files=(),
    )


def _latency(tuned: Tuned, known: Mapping[str, GraphTrials], *, batch: int) -> Latency:
    """Of all graphs of the chosen form, one after another."""
    row = next(each for each in tuned.forms if each.name == tuned.chosen)
    measured = _measured(tuned.chosen, known)
    return Latency(
        p50_ms=sum(m.percentile_ms(50) for m in measured),
        p90_ms=sum(m.percentile_ms(90) for m in measured),
        p99_ms=sum(m.percentile_ms(99) for m in measured),
        n=min(len(m.samples_ms()) for m in measured),
        n_threads=measured[0].n_threads,
        batch=batch,
        ratio=row.ratio,
        ratio_low=row.ratio_low,
        ratio_high=row.ratio_high,
        machine=tuned.environment.machine,
    )


def _measured(form: str, known: Mapping[str, GraphTrials]) -> list[Measurement]:
    return [m for m in measurements_of(_candidate(form, known), known) if m is not None]


def _report(bundle: Bundle, tuned: Tuned, trials: Sequence[Trial], latency: Latency | None) -> Report | None:
    """The compile's report with what was found here; None where the bundle has none that can be read."""
    if "report/report.json" not in bundle.entries:
        return None
    try:
        report = from_json(bundle.file("report/report.json").read_bytes(), Report)
    except msgspec.MsgspecError:
        return None
    forms = {each.name: each for each in tuned.forms}
    form = next(each for each in bundle.manifest.forms if each.name == tuned.chosen)
    sizes = {trial.name: trial.size_bytes for trial in trials}
    cpu = tuned.emulated_cpu
    warnings = [
        *report.warnings,
        *([f"Times were taken under emulation of {cpu}: none of them is the device's."] if cpu else []),
    ]
    return msgspec.structs.replace(
        report,
        verdict=f"{tuned.chosen} ships: {tuned.reason}.",
        selection=tuned.selection,
        winner=tuned.chosen,
        accuracy=form.accuracy,
        latency=latency,
        size_bytes=sizes[tuned.chosen],
        candidates=tuple(_row(row, forms.get(row.name)) for row in report.candidates),
        comparisons=tuple(timing.comparison for timing in tuned.timings),
        environment=tuned.environment,
        warnings=tuple(warnings),
        reproduce=f"{report.reproduce} && edgevlm tune BUNDLE",
        forms=(),
    )


def _row(row: CandidateRow, form: TunedForm | None) -> CandidateRow:
    if form is None:
        return row
    return msgspec.structs.replace(
        row,
        status=form.status,
        reason=form.reason,
        p50_ms=form.p50_ms,
        p90_ms=form.p90_ms,
        p99_ms=form.p99_ms,
        ratio=form.ratio,
        ratio_low=form.ratio_low,
        ratio_high=form.ratio_high,
        load_ms=form.load_ms,
        memory_bytes=form.memory_bytes,
    )


# --- writing ----------------------------------------------------------------------------------------------


def _files(bundle: Bundle, manifest: Manifest, tuned: Tuned, report: Report | None) -> dict[str, Path | bytes]:
    """What the chosen form needs of the bundle, and what was found out about it."""
    used = set(named_files(manifest))
    others = {path for form in bundle.manifest.forms for path in named_files(bundle.in_form(form).manifest)} - used
    files: dict[str, Path | bytes] = {
        path: bundle.root / path for path in bundle.entries if path not in others and not path.startswith("report/")
    }
    files["report/tuning.json"] = to_json(tuned)
    if report is not None:
        files |= {f"report/report.{suffix}": text_from_report(report, suffix).encode() for suffix in _formats()}
    return files


def _formats() -> tuple[str, ...]:
    """The page needs libraries that a device may not have; Markdown and JSON say the same."""
    can_draw = all(importlib.util.find_spec(name) for name in ("jinja2", "matplotlib"))
    return tuple(suffix for suffix in FORMATS if can_draw or suffix != "html")
