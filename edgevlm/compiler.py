"""A model goes in, a bundle comes out: read, plan, run the plan through the store, write.

prepare()      what was asked for -> Job (model, target, data, plan); light, fails early
compile_job()  Job -> bundle with its report
"""

from __future__ import annotations

import importlib
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgevlm.bundle.write import check_destination, write_bundle
from edgevlm.cache import LAST_RUN, Run
from edgevlm.data.data_set import DataSet
from edgevlm.data.readers import SHAPES, read_data_set
from edgevlm.data.splits import Splits, split, split_apart
from edgevlm.data.trained_on import part_by_training
from edgevlm.errors import UsageError, did_you_mean
from edgevlm.extras import require_compile, silence_telemetry, tool_versions
from edgevlm.ingest import read_model
from edgevlm.job import Action, Job, Work
from edgevlm.lowering.ready_made import find_ready_made
from edgevlm.measure.environment import describe_environment, fingerprint
from edgevlm.measure.spec import Protocol
from edgevlm.model import Model
from edgevlm.plan import PRECISIONS, TEXT_ENCODER, Budgets, DataDigests, Precision, Request, Step, plan
from edgevlm.progress import Note, Progress, StepFinished, StepStarted, silent
from edgevlm.quantization.calibration import load_recipe
from edgevlm.report.spec import Report, StepRow
from edgevlm.runtime.engine import AskedRange, ShapeRange, ranges_to_text
from edgevlm.runtime.machine import describe_machine
from edgevlm.runtime.spec import Manifest, Spec
from edgevlm.steps.finish import assemble_report, bundle_files
from edgevlm.steps.variants import file_digest
from edgevlm.store import Entry, Store, cache_root, code_digest, read_spec, storing, write_spec
from edgevlm.target import Target, is_gpu, load_target, pick_backends, why_not_at_hand

# Pictures that the built-in set gives where no data was passed; a fifth of them may calibrate.
_N_SHAPES = 1000


class ActionSpec(Spec, frozen=True, kw_only=True):
    """What runs a step, and what its result depends on beside its parameters and inputs.

    Args:
        tools: distributions whose version is part of the key.
        per_machine: the machine is part of the key, since the result was measured on it.
        keep: "module:function" that is asked whether the result is to be stored; empty means it always is.
    """

    run: str
    tools: tuple[str, ...]
    per_machine: bool = False
    keep: str = ""


_RUN_TOOLS = ("onnxruntime", "numpy", "pillow", "tokenizers")
_OTHER_BACKENDS = ("openvino", "nncf")
ACTIONS: dict[str, ActionSpec] = {
    "export": ActionSpec(
        run="edgevlm.steps.export:run", tools=("torch", "transformers", "onnx", "onnxscript", *_RUN_TOOLS)
    ),
    "fold": ActionSpec(run="edgevlm.steps.fold:run", tools=_RUN_TOOLS),
    "search": ActionSpec(
        run="edgevlm.steps.search:run",
        tools=("onnx", *_RUN_TOOLS, *_OTHER_BACKENDS),
        per_machine=True,
        keep="edgevlm.steps.search:is_kept",
    ),
    "offer": ActionSpec(run="edgevlm.steps.offer:run", tools=("onnx", *_RUN_TOOLS, *_OTHER_BACKENDS), per_machine=True),
    "confirm": ActionSpec(run="edgevlm.steps.confirm:run", tools=(*_RUN_TOOLS, *_OTHER_BACKENDS), per_machine=True),
    "explain": ActionSpec(
        run="edgevlm.steps.explain:run", tools=("onnx", *_RUN_TOOLS, *_OTHER_BACKENDS), per_machine=True
    ),
    "bundle": ActionSpec(
        run="edgevlm.steps.bundle:run", tools=("onnx", "msgspec", *_RUN_TOOLS, *_OTHER_BACKENDS), per_machine=True
    ),
    "count": ActionSpec(run="edgevlm.steps.count:run", tools=_RUN_TOOLS),
}


class Compiled(Spec, frozen=True, kw_only=True):
    """What a compile made."""

    bundle: Path
    manifest: Manifest
    report: Report


def compile(model: str, *, progress: Progress = silent, **asked: Any) -> Compiled:
    """Compile ``model``; the keyword arguments are those of :func:`prepare`.

    Raises: EdgeVLMError: with a sentence that says what is wrong, and a hint.
    """
    return compile_job(prepare(model, **asked), progress=progress)


def prepare(
    model: str,
    *,
    target: str = "cpu",
    task: str | None = None,
    labels: Sequence[str] = (),
    revision: str | None = None,
    card: Path | str | None = None,
    calibration_data: str | os.PathLike[str] | None = None,
    eval_data: str | os.PathLike[str] | DataSet | None = None,
    max_drop: float = 0.01,
    max_latency_ms: float | None = None,
    max_size_mb: float | None = None,
    precision: str = "auto",
    threads: int | None = None,
    batch: int | None = 1,
    image_size: int | None = None,
    backends: Sequence[str] = (),
    calibration: str = "default",
    search_minutes: float = 4.0,
    keep_float: Sequence[str] = (),
    quantized: str | os.PathLike[str] | None = None,
    shapes: Mapping[str, ShapeRange | AskedRange] | None = None,
    text_length: int | None = None,
    count_instructions: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    check_output: bool = True,
    protocol: Protocol | None = None,
) -> Job:
    """Read the model, the target and the data, and plan; no heavy library is loaded and nothing is written.

    Args:
        model: a Hugging Face folder or hub id, an ONNX file, ``package.module:factory``, or ``demo``.
        target: a target's name, or a path to a TOML file.
        labels: class names; a two-tower model keeps only their embeddings.
        calibration_data, eval_data: as ``read_data_set`` takes them, or (``eval_data``) gives them; the built-in
            pictures where both are left out.
        max_drop: accuracy that may be lost, as a fraction.
        batch: pictures in a call; None leaves it free.
        search_minutes: for mixed precision and tuning, once every form was made and timed.
        keep_float: patterns such as ``*attention*`` of the nodes that stay in float.
        quantized: a folder of ready-made graphs, ``<graph>.onnx`` each, that compete as candidates; with the
            precision ``fp32`` they and float are all that competes.
        shapes: the sizes that TensorRT's engines are built for, by input, where they are free.
        text_length: tokens that every text is cut and padded to, where they are known to be short; faster than a free
            length, which is what texts have where this is left out.
        output: a folder, or a file ending in ``.evlm``; ``MODEL-TARGET`` where left out.
        count_instructions: of a run of each form, on the emulated processor of an ARM target, for the report.
        check_output: refuse an output that may not be written now, not after the work.
        protocol: how candidates are timed; the default suits models of 1 to 100 ms.
    """
    require_compile("compile")
    silence_telemetry()
    if precision not in PRECISIONS:
        raise UsageError(f"There is no precision '{precision}'.", hint=did_you_mean(precision, PRECISIONS))
    hardware = load_target(target)
    elsewhere = why_not_at_hand(hardware, describe_machine())
    if elsewhere and max_latency_ms is not None:
        raise UsageError(
            f"--max-latency-ms cannot be kept to: target '{hardware.name}' is not at hand, {elsewhere}.",
            hint="Leave it out here, and pass it to `edgevlm tune` on the device.",
        )
    found_backends = pick_backends(hardware, tuple(backends))
    # Float comes first, and as something that runs on any machine.
    found_backends = tuple(sorted(found_backends, key=is_gpu)) if elsewhere else found_backends
    counted_on = _counted_on(hardware) if count_instructions else ""
    recipe = load_recipe(calibration)
    found = read_model(
        model,
        task=task,
        card=card,
        revision=revision,
        labels=labels,
        image_size=image_size,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    destination = Path(output) if output is not None else Path(f"{found.name}-{hardware.name}")
    if check_output:
        check_destination(destination, overwrite=overwrite)
    folded = tuple(labels) or _own_labels(found)
    ready_made = find_ready_made(Path(quantized), found) if quantized is not None else {}
    if ready_made and "onnxruntime" not in found_backends:
        raise UsageError("Ready-made graphs run on ONNX Runtime.", hint="Add onnxruntime to --backends.")
    request = Request(
        budgets=Budgets(max_drop=max_drop, max_latency_ms=max_latency_ms, max_size_mb=max_size_mb),
        precision=msgspec.convert(precision, Precision),
        labels=folded if len(found.graphs) > 1 else (),
        batch=batch,
        n_threads=threads or hardware.n_cores or (0 if elsewhere else describe_machine().n_physical_cores),
        backends=found_backends,
        calibration=recipe,
        protocol=protocol or Protocol(),
        may_use_fewer_threads=threads is None,
        search_minutes=search_minutes,
        keep_float=tuple(keep_float),
        ready_made={name: file_digest(file) for name, file in ready_made.items()},
        is_measured=not elsewhere,
        shapes=_checked_shapes(found, batch, shapes or {}),
        text_length=_checked_length(found, text_length),
        counted_on=counted_on,
    )
    splits = _read_splits(found, folded, calibration_data, eval_data, recipe.n_samples, recipe.seed)
    data = _digests(splits, takes_names=found.processing.text is not None and not folded)
    uncounted = (_uncounted(hardware),) if count_instructions and not counted_on else ()
    notes = (*found.warnings, *splits.report.notes, *splits.warnings, *uncounted)
    return Job(
        model=found,
        target=hardware,
        request=request,
        recipe=recipe,
        splits=splits,
        data=data,
        steps=plan(found, hardware, request, data),
        output=destination,
        overwrite=overwrite,
        command=_command(
            model,
            target=target,
            task=task,
            labels="labels.txt" if any("," in label for label in labels) else ",".join(labels) or None,
            revision=revision,
            card=card,
            calibration_data=calibration_data,
            eval_data=eval_data.name if isinstance(eval_data, DataSet) else eval_data,
            max_drop=None if max_drop == 0.01 else max_drop,
            max_latency_ms=max_latency_ms,
            max_size_mb=max_size_mb,
            precision=None if precision == "auto" else precision,
            threads=threads,
            batch=None if batch == 1 else batch or "free",
            image_size=image_size,
            backends=",".join(backends) or None,
            calibration=None if calibration == "default" else calibration,
            search_minutes=None if search_minutes == 4.0 else search_minutes,
            keep_float=",".join(keep_float) or None,
            quantized=quantized,
            **ranges_to_text(shapes or {}),
            text_length=text_length,
            count_instructions=count_instructions,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        ),
        notes=tuple(dict.fromkeys(notes)),
        ready_made=ready_made,
    )


def compile_job(job: Job, *, progress: Progress = silent) -> Compiled:
    """Run the plan through the store and write the bundle with its report."""
    store = Store()
    try:
        entries = _run_steps(job, store, progress)
        rows = tuple(
            StepRow(
                name=step.name, hit=entries[step.name].hit, wall_s=entries[step.name].wall_s, why=entries[step.name].why
            )
            for step in job.steps
        )
        with storing(store.root):
            write_spec(store.root / LAST_RUN, Run(source=job.model.source.asked, target=job.target.name, steps=rows))
        folders = {name: entry.path for name, entry in entries.items()}
        manifest = read_spec(folders["bundle"] / "manifest.json", Manifest)
        report = assemble_report(job, folders, manifest, rows)
        written = write_bundle(job.output, manifest, bundle_files(folders["bundle"], report), overwrite=job.overwrite)
    finally:
        store.forget_unkept()
    return Compiled(bundle=job.output, manifest=written, report=report)


# --- running ----------------------------------------------------------------------------------------------


def _run_steps(job: Job, store: Store, progress: Progress) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for note in job.notes:
        progress(Note(note))
    for step in job.steps:
        progress(StepStarted(step.name, step.summary))
        started = time.monotonic()
        entry = entries[step.name] = _run_step(job, step, entries, store, progress)
        progress(StepFinished(step.name, time.monotonic() - started, entry.hit))
    return entries


def _run_step(job: Job, step: Step, entries: dict[str, Entry], store: Store, progress: Progress) -> Entry:
    action = ACTIONS[step.action]
    needs = {name: entries[name] for name in step.needs}
    parts: dict[str, Any] = {
        "params": step.params,
        "needs": {name: entry.key for name, entry in needs.items()},
        "tools": tool_versions(*action.tools),
        "code": code_digest(),
    }
    if action.per_machine:
        parts["machine"] = fingerprint(describe_environment())
    inputs = {name: entry.path for name, entry in needs.items()}

    def make(out: Path) -> None:
        run: Action = _load(action.run)
        run(Work(job=job, step=step, inputs=inputs, out=out, store=store, progress=progress))

    def keep(out: Path) -> bool:
        # What follows from a result that was not stored is not stored either.
        return all(store.is_kept(entry) for entry in needs.values()) and (not action.keep or _load(action.keep)(out))

    return store.fetch(step.action, parts, make, keep=keep)


def _load(place: str) -> Callable[..., Any]:
    module, _, attribute = place.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def _counted_on(target: Target) -> str:
    """The processor whose instructions are counted; empty where the target's cannot be.

    Raises: MissingToolError: what counts is not here.
    """
    from edgevlm.devices.instructions import CPUS, check_can_count

    if target.emulated_as not in CPUS:
        return ""
    check_can_count(target.emulated_as)
    return target.emulated_as


def _uncounted(target: Target) -> str:
    why = f"{target.emulated_as} is emulated, but not counted" if target.emulated_as else "it is not emulated"
    return f"No instructions were counted for {target.name}: {why}."


# --- reading ----------------------------------------------------------------------------------------------


def _checked_length(model: Model, length: int | None) -> int | None:
    """Raises: UsageError: the model takes no texts, or none of that length."""
    if length is None:
        return None
    text = model.processing.text
    if text is None:
        raise UsageError(f"'{model.name}' takes no texts.", hint="Leave --text-length out.")
    if not 2 <= length <= text.max_length:
        raise UsageError(
            f"Texts of {length} tokens are not between 2 and {text.max_length}, which is what '{model.name}' takes.",
            hint="Count the start and the end token too.",
        )
    return length


def _checked_shapes(
    model: Model, batch: int | None, shapes: Mapping[str, ShapeRange | AskedRange]
) -> dict[str, AskedRange]:
    """Raises: UsageError: a range is for no input of the model, or does not suit it."""
    inputs = {
        # As many texts as there are labels, whatever the batch.
        spec.name: tuple(
            batch if size == "batch" and batch is not None and graph.name != TEXT_ENCODER else size
            for size in spec.shape
        )
        for graph in model.graphs
        for spec in graph.inputs
    }
    found = {}
    for name, asked in shapes.items():
        if name not in inputs:
            raise UsageError(f"No input of the model is called '{name}'.", hint=did_you_mean(name, inputs))
        found[name] = AskedRange(min=asked.min, opt=asked.opt, max=asked.max)
        span, shape = found[name].as_given(), inputs[name]
        fixed = {i: size for i, size in enumerate(shape) if isinstance(size, int)}
        if len(span.min) != len(shape) or any(not span.min[i] == span.max[i] == n for i, n in fixed.items()):
            words = "×".join(map(str, shape))
            raise UsageError(
                f"'{name}' is {words}, and cannot be {span.describe()}.",
                hint="Only what has a name can vary; --batch free frees the batch.",
            )
    return found


def _own_labels(model: Model) -> tuple[str, ...]:
    """The built-in model is compiled for the classes of the built-in pictures."""
    from edgevlm.data.shapes import class_names

    return class_names() if model.source.kind == "demo" else ()


def _read_splits(
    model: Model,
    labels: tuple[str, ...],
    calibration_data: str | os.PathLike[str] | None,
    eval_data: str | os.PathLike[str] | DataSet | None,
    n_calibrate: int,
    seed: int,
) -> Splits:
    def read(source: str | os.PathLike[str]) -> DataSet:
        size = max(model.processing.image.height, model.processing.image.width)
        return read_data_set(
            source,
            labels=labels or model.labels,
            task=model.task,
            cache=cache_root() / "digests",
            n_shapes=_N_SHAPES,
            shapes_size=size,
        )

    own = Path(model.source.location)
    if (
        not isinstance(eval_data, DataSet | None)
        and calibration_data is not None
        and os.fspath(calibration_data) != os.fspath(eval_data)
    ):
        _, fresh = part_by_training(read(eval_data), own)
        return split_apart(read(calibration_data), fresh, n_calibrate=n_calibrate, seed=seed)
    data = eval_data if isinstance(eval_data, DataSet) else read(eval_data or calibration_data or SHAPES)
    taught, fresh = part_by_training(data, own)
    # What a model was trained on is good enough to calibrate it on.
    if taught.samples and len(taught) >= min(n_calibrate, len(fresh) // 5):
        return split_apart(taught, fresh, n_calibrate=n_calibrate, seed=seed)
    return split(fresh, n_calibrate=n_calibrate, seed=seed)


def _digests(splits: Splits, *, takes_names: bool) -> DataDigests:
    return DataDigests(
        source=splits.source,
        calibrate=splits.calibrate.digest,
        select=splits.select.digest,
        report=splits.report.digest,
        n_calibrate=len(splits.calibrate),
        n_select=len(splits.select),
        n_report=len(splits.report),
        has_labels=splits.report.has_labels,
        is_synthetic=splits.report.is_synthetic,
        class_names=splits.report.class_names if takes_names else (),
    )


def _command(model: str, **options: object) -> str:
    words = ["edgevlm", "compile", model]
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *(() if value is True else (str(value),))]
    return shlex.join(words)
