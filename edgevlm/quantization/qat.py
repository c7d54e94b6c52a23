"""Quantization-aware training: fine-tune a model for its int8 form, export that form, and prove that it is the same.

quantize_model()    what `edgevlm quantize` does, from the model to the bundle
  _read_data()      what to train on and what to judge on
  _quantize()       float graph -> prepared -> quantized after training; the traced program with fake quantizers
    of_teacher()    edgevlm.quantization.teaching: a larger model's answers, where one is named
    train()         edgevlm.quantization.training
                    the fine-tuned weights -> float graph -> prepared -> quantized with the learned ranges
    prove_exported()  edgevlm.quantization.proving: on pictures that training never saw
  compile_job()     edgevlm.compiler: the bundle, with the quantized graph as a candidate
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edgevlm.bundle.write import check_destination
from edgevlm.compiler import Compiled, compile_job, prepare
from edgevlm.data.data_set import DataSet
from edgevlm.data.readers import SHAPES, SHAPES_TRAINING_SEED, read_data_set
from edgevlm.data.splits import hold_out
from edgevlm.data.trained_on import part_by_training
from edgevlm.errors import DataError, GateError, MissingToolError, ModelError, UsageError, did_you_mean
from edgevlm.evaluation.evaluation import Drop, compare_evaluations
from edgevlm.export import export_graph, graph_of, open_source, traced_program
from edgevlm.extras import require_compile, silence_telemetry
from edgevlm.ingest import read_model
from edgevlm.ingest.weights import combined_sha256, sha256_of
from edgevlm.model import Model
from edgevlm.progress import Progress, doing, renamed, silent
from edgevlm.quantization.calibration import collect_ranges
from edgevlm.quantization.fine_tuning import Training
from edgevlm.quantization.graphs import fix_batch, schemes_of_graph
from edgevlm.quantization.placement import Placement, read_placement
from edgevlm.quantization.post_training import Fusion
from edgevlm.quantization.post_training import prepare as prepare_graph
from edgevlm.quantization.post_training import quantize as quantize_graph
from edgevlm.quantization.proving import Equality, Judge, open_graph, prove_exported
from edgevlm.quantization.schemes import Scheme
from edgevlm.runtime.image import decode_image, preprocess
from edgevlm.runtime.spec import Array, Spec
from edgevlm.store import cache_root, write_spec
from edgevlm.target import load_target

QUANTIZED_FOLDER = "quantized"
QUANTIZATION_FILE = "quantization.json"

WEIGHTS = ("per-channel", "per-tensor")
TRAINED_TASKS = ("image-classification", "zero-shot-image-classification", "image-feature-extraction")
_N_SHAPES = 16_384
_N_SHAPES_HELD_OUT = 1000
_N_CALIBRATION = 100
_N_EXPORT_SAMPLES = 5
_HELD_OUT_SHARE = 0.3
# What a folder in Hugging Face's layout holds beside the weights.
_KEPT = ("preprocessor_config.json", "processor_config.json", "tokenizer*.json", "special_tokens_map.json",
         "vocab.*", "merges.txt", "README.md", "LICENSE*", "*.py")  # fmt: skip


class Quantization(Spec, frozen=True, kw_only=True):
    """What ``quantization.json`` says.

    Args:
        graph: the one that was quantized.
        weights: in words, such as ``4 bits on an int8 grid, per tensor``.
        ranges_sha256: of every scale and zero point.
        teacher: whose answers were learned beside the labels.
        post_training: how far the model quantized without training falls behind the float model.
        trained: how far the exported graph does, on the same pictures.
        tuned_float: how far the fine-tuned float weights do, unquantized.
        fusion: what ONNX Runtime runs of the exported graph.
    """

    schema_version: Literal[1] = 1
    source: str
    model: str
    graph: str
    scheme: dict[str, str]
    weights: str
    ranges_sha256: str
    training: Training
    teacher: str = "the float model"
    n_training_pictures: int
    training_data: str
    held_out_data: str
    post_training: Drop
    trained: Drop
    tuned_float: Drop
    proof: Equality
    fusion: Fusion


class QuantizedModel(Spec, frozen=True, kw_only=True):
    """What ``edgevlm quantize`` made: the folder, what is in it, and the bundle inside, where one was compiled."""

    folder: Path
    quantization: Quantization
    compiled: Compiled | None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prepared:
    """A float graph, ready for a scheme, at batch 1."""

    file: Path
    ranges: Path
    scheme: Scheme


def quantize_model(
    model: str,
    *,
    qat: bool = False,
    data: str | os.PathLike[str] | None = None,
    eval_data: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    task: str | None = None,
    labels: Sequence[str] = (),
    revision: str | None = None,
    card: Path | str | None = None,
    image_size: int | None = None,
    trust_remote_code: bool = False,
    target: str = "cpu",
    scheme: str | None = None,
    weights: str = "per-channel",
    weight_bits: int = 8,
    training: Training | None = None,
    teacher: str | None = None,
    max_drop: float = 0.01,
    threads: int | None = None,
    is_bundled: bool = True,
    overwrite: bool = False,
    progress: Progress = silent,
) -> QuantizedModel:
    """Fine-tune a model for its int8 form and export that form, proven equal to what was trained.

    Args:
        model: as ``compile`` takes it; not an ONNX file, which has nothing to train.
        data: pictures to train on, as ``read_data_set`` takes them; ``shapes`` are generated.
        eval_data: pictures to judge on; a part of ``data`` that training then never sees, where left out.
        output: a folder for the fine-tuned weights, the quantized graph, and the bundle.
        scheme: a scheme's name, or its group (``core``, ``all``, ``linear``, ``conv``); the most promising if left out.
        weights: ``per-channel`` or ``per-tensor``.
        weight_bits: 8, or fewer: then int8 weights of fewer levels, which are as fast and as large as int8.
        teacher: a larger model whose answers are learned in place of the float model's, as ``compile`` takes it.
        is_bundled: also compile the float model with the quantized graph as a candidate.
    Raises:
        UsageError: without ``qat``, or of what cannot be trained. MissingToolError: accelerate is not installed.
        GateError: the exported graph does not answer as the trained program.
    """
    require_compile("quantize")
    silence_telemetry()
    if not qat:
        raise UsageError(
            "`edgevlm quantize` trains, and --qat does not stand there.",
            hint="Add --qat, or run `edgevlm compile`, which tries quantization after training by itself.",
        )
    if importlib.util.find_spec("accelerate") is None:
        raise MissingToolError(
            "Training needs accelerate, which is not installed here.", hint="Run: pip install 'edgevlm[train]'"
        )
    if weights not in WEIGHTS:
        raise UsageError(f"There are no '{weights}' weights.", hint=did_you_mean(weights, WEIGHTS))
    if not 2 <= weight_bits <= 8:
        raise UsageError(f"Weights of {weight_bits} bits were asked for.", hint="Ask for 2 to 8.")
    if data is None:
        raise UsageError("There is nothing to train on.", hint=f"Pass --data with pictures, or --data {SHAPES}.")
    found = read_model(
        model,
        task=task,
        card=card,
        revision=revision,
        labels=labels,
        image_size=image_size,
        trust_remote_code=trust_remote_code,
    )
    if not found.family:
        raise UsageError(
            f"'{model}' is an ONNX file, and training needs the PyTorch model that it was exported from.",
            hint="Pass that checkpoint or package.module:factory.",
        )
    if found.task not in TRAINED_TASKS:
        raise UsageError(
            f"'{model}' is for {found.task}, which `edgevlm quantize` does not train.",
            hint=f"It trains {', '.join(TRAINED_TASKS)}; `edgevlm compile` quantizes after training.",
        )
    destination = Path(output) if output is not None else Path(f"{found.name}-qat")
    _check_output(destination, overwrite=overwrite)
    known = tuple(labels) or _own_labels(found) or found.labels
    train_on, held_out = _read_data(found, known, data, eval_data)
    training = msgspec.structs.replace(training or Training(), has_labels=train_on.has_labels)
    quantization = _quantize(
        found,
        known,
        train_on,
        held_out,
        destination,
        target=target,
        asked=scheme,
        is_per_channel=weights == "per-channel",
        n_bits=weight_bits,
        training=training,
        teacher=teacher,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    if quantization is None:  # a process that only helped
        raise SystemExit(0)
    compiled = None
    if is_bundled:
        job = prepare(
            model,
            target=target,
            task=task,
            labels=labels,
            revision=revision,
            card=card,
            image_size=image_size,
            trust_remote_code=trust_remote_code,
            eval_data=held_out,
            max_drop=max_drop,
            threads=threads,
            precision="fp32",
            backends=("onnxruntime",),  # whose scheme it was trained for
            quantized=destination / QUANTIZED_FOLDER,
            output=destination / "bundle",
        )
        compiled = compile_job(job, progress=progress)
    return QuantizedModel(folder=destination, quantization=quantization, compiled=compiled)


# --- what is read -----------------------------------------------------------------------------------------


def _own_labels(model: Model) -> tuple[str, ...]:
    from edgevlm.data.shapes import class_names

    return class_names() if model.source.kind == "demo" else ()


def _read_data(
    model: Model,
    labels: tuple[str, ...],
    data: str | os.PathLike[str],
    eval_data: str | os.PathLike[str] | None,
) -> tuple[DataSet, DataSet]:
    """What to train on and what to judge on; they share no picture."""

    def read(source: str | os.PathLike[str], **options: Any) -> DataSet:
        size = max(model.processing.image.height, model.processing.image.width)
        cache = cache_root() / "digests"
        return read_data_set(source, labels=labels, task=model.task, cache=cache, shapes_size=size, **options)

    if os.fspath(data) == SHAPES:
        train_on = read(SHAPES, n_shapes=_N_SHAPES, shapes_seed=SHAPES_TRAINING_SEED)
        eval_data = eval_data or SHAPES
    else:
        train_on = read(data)
    own = Path(model.source.location)
    if eval_data is None:
        train_on, held_out = hold_out(train_on, share=_HELD_OUT_SHARE)
        return train_on, part_by_training(held_out, own)[1]
    _, held_out = part_by_training(read(eval_data, n_shapes=_N_SHAPES_HELD_OUT), own)
    taken = {sample.digest for sample in held_out.samples}
    train_on = train_on.only([sample for sample in train_on.samples if sample.digest not in taken])
    if not train_on.samples:
        raise DataError(
            f"Every picture of '{data}' is in the pictures to judge on too.", hint="Leave --eval-data out to cut them."
        )
    return train_on, held_out


def _check_output(destination: Path, *, overwrite: bool) -> None:
    if destination.is_dir() and overwrite and (destination / QUANTIZATION_FILE).is_file():
        return
    check_destination(destination, overwrite=False)


def _scheme(prepared: Path, target: str, asked: str | None, *, is_per_channel: bool) -> Scheme:
    """The scheme asked for, or the most promising."""
    activation = load_target(target).activation_sign
    schemes = [scheme for scheme in schemes_of_graph(prepared, activation_sign=activation) if scheme.method == "static"]
    if not schemes:
        raise ModelError(
            "The graph has no convolution and no linear layer that could become int8.", hint="Compile it as fp32."
        )
    if asked is None:
        chosen = schemes[0]
    else:
        fitting = [scheme for scheme in schemes if asked in (scheme.name, scheme.group)]
        if not fitting:
            names = sorted({scheme.group for scheme in schemes})
            raise UsageError(f"There is no scheme '{asked}' for this graph.", hint=did_you_mean(asked, names))
        chosen = fitting[0]
    return msgspec.structs.replace(chosen, per_channel=is_per_channel)


# --- the work ---------------------------------------------------------------------------------------------


def _quantize(
    model: Model,
    labels: tuple[str, ...],
    train_on: DataSet,
    held_out: DataSet,
    destination: Path,
    *,
    target: str,
    asked: str | None,
    is_per_channel: bool,
    n_bits: int,
    training: Training,
    teacher: str | None,
    trust_remote_code: bool,
    progress: Progress,
) -> Quantization | None:
    """Everything up to the folder; None in a process that is not the main one."""
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    from edgevlm.quantization.fake_graph import fake_quantized, plain_module
    from edgevlm.quantization.teaching import Texts, of_program, of_teacher
    from edgevlm.quantization.training import train
    from edgevlm.training.checkpoint import identity_of
    from edgevlm.training.memory import keep_memory
    from edgevlm.training.processes import PATIENCE, must_use_cpu

    accelerator = Accelerator(cpu=must_use_cpu(), kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    if training.batch_size % accelerator.num_processes:
        raise UsageError(
            f"{accelerator.num_processes} processes cannot share a batch of {training.batch_size} pictures evenly.",
            hint=f"Pass a --batch-size that {accelerator.num_processes} divides.",
        )
    if accelerator.device.type == "cpu":
        keep_memory()
    say = progress if accelerator.is_main_process else silent
    graph = model.graphs[0].name
    state = destination.parent / f".{destination.name}.training"
    state.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="edgevlm-qat-") as scratch:
        work = Path(scratch)
        with doing("prepare", "export, quantize after training, trace", say):
            samples = _samples(model, train_on, _N_EXPORT_SAMPLES)
            file = _float_graph(model, graph, samples, work / "float", say)
            scheme = _scheme(file, target, asked, is_per_channel=is_per_channel)
            ranges = _ranges(model, train_on, file, scheme, work, say)
            before = _Prepared(file=file, ranges=ranges, scheme=scheme)
            plain = work / "post_training" / f"{graph}.onnx"
            plain.parent.mkdir()
            quantize_graph(file, scheme, ranges=ranges, out=plain)
            placement = read_placement(file, plain, scheme)
            program = _on_device(traced_program(model, graph, samples), accelerator.device)
            student = fake_quantized(program, graph_of(model, graph), placement, scheme, prepared=file, n_bits=n_bits)
            lesson = of_program(plain_module(program).to(accelerator.device))
            if n_bits < 8:  # the quantizer itself knows no grid of fewer levels
                quantize_graph(file, scheme, ranges=ranges, out=plain, overrides=student.overrides())
            judge = Judge(model, labels, held_out, work, graph)
        if teacher is not None:
            with doing("teach", f"{teacher} on {train_on.name}", say):
                lesson = of_teacher(
                    teacher, model, train_on, labels, size=_output_size(file), accelerator=accelerator,
                    trust_remote_code=trust_remote_code, progress=renamed(say, "teach"),
                )  # fmt: skip
        identity = identity_of(
            model.source.digest, lesson.digest, train_on.digest, msgspec.to_builtins(scheme), n_bits,
            msgspec.to_builtins(training), [sample.digest for sample in train_on.samples], list(labels),
            accelerator.num_processes, str(torch.__version__), sorted(student.scales_in_words()),
        )  # fmt: skip
        scoring = judge.scoring
        texts = None
        if scoring is not None and judge.embeddings is not None:
            texts = Texts(embeddings=torch.from_numpy(judge.embeddings), scale=scoring.scale, bias=scoring.bias or 0.0)
        with doing("train", f"{training.n_steps} steps of {training.batch_size} pictures", say):
            train(
                student,
                lesson,
                train_on,
                model.processing.image,
                training,
                texts=texts,
                is_classifier=model.task == "image-classification",
                folder=state,
                identity=identity,
                accelerator=accelerator,
                progress=say,
            )
        if not accelerator.is_main_process:
            return None
        student.module.to("cpu")
        with doing("export", "the fine-tuned weights, with the learned ranges", say):
            made = work / "made"
            _write_weights(model, student.module.state_dict(), made)
            tuned = _tuned(model, made)
            tuned_file = _float_graph(tuned, graph, samples, work / "tuned", say)
            exported = made / QUANTIZED_FOLDER / f"{graph}.onnx"
            exported.parent.mkdir()
            fusion = quantize_graph(
                tuned_file, scheme, ranges=before.ranges, out=exported, overrides=student.overrides()
            ).fusion
            _check_placement(read_placement(tuned_file, exported, scheme), placement)
        with doing("prove", f"on {len(held_out)} pictures that training never saw", say):
            reference = judge.evaluate(open_source(model, graph), None, say, "float")
            proof, trained = prove_exported(judge, student, open_graph(exported), reference, say)
            if not proof.holds:
                raise GateError(
                    f"The exported graph does not answer as the trained model: {proof.agreement:.2%} of {proof.n} "
                    f"pictures alike ({proof.min_agreement:.0%} needed), {proof.metric} {proof.exported:.2%} against "
                    f"{proof.trained:.2%}.",
                    hint="Report the model and this message; nothing was written.",
                )
            plainly = judge.evaluate(open_graph(plain), reference, say, "quantized after training")
            unquantized = judge.evaluate(open_graph(tuned_file), reference, say, "fine-tuned float")
        quantization = Quantization(
            source=model.source.asked,
            model=model.source.digest,
            graph=graph,
            scheme=scheme.describe(),
            weights=_weights_in_words(n_bits, is_per_channel=is_per_channel),
            ranges_sha256=combined_sha256(student.scales_in_words()),
            training=training,
            teacher=lesson.name,
            n_training_pictures=len(train_on),
            training_data=train_on.name,
            held_out_data=held_out.name,
            post_training=compare_evaluations(plainly, reference),
            trained=compare_evaluations(trained, reference),
            tuned_float=compare_evaluations(unquantized, reference),
            proof=proof,
            fusion=fusion,
        )
        write_spec(made / QUANTIZATION_FILE, quantization)
        shutil.copyfile(state / "training.jsonl", made / "training.jsonl")
        _place(made, destination)
    shutil.rmtree(state, ignore_errors=True)
    return quantization


def _weights_in_words(n_bits: int, *, is_per_channel: bool) -> str:
    levels = "int8" if n_bits == 8 else f"{n_bits} bits ({2**n_bits - 1} levels of an int8 grid)"
    return f"{levels}, {'per channel' if is_per_channel else 'per tensor'}"


def _float_graph(model: Model, graph: str, samples: Mapping[str, Array], folder: Path, progress: Progress) -> Path:
    """The model's graph at batch 1, prepared; its values are named as in a graph of free batch, as the trained one."""
    exported = export_graph(model, graph, batch=None, out=folder / "free", samples=samples, progress=progress)
    fixed = fix_batch(folder / "free" / exported.file, 1, folder / f"fixed-{graph}.onnx")
    return prepare_graph(fixed, folder / f"{graph}.onnx")


def _ranges(model: Model, data: DataSet, file: Path, scheme: Scheme, work: Path, progress: Progress) -> Path:
    (name,) = (spec.name for spec in model.graphs[0].inputs)
    image = model.processing.image
    feeds = ({name: preprocess(decode_image(sample.read()), image)[None]} for sample in data.samples[:_N_CALIBRATION])
    assert scheme.calibration is not None, "a static scheme"

    return collect_ranges(file, feeds, scheme.calibration, work / "ranges.json", renamed(progress, "prepare"))


def _output_size(file: Path) -> tuple[int, ...]:
    """Of a row of the graph's first output."""
    return tuple(int(side) for side in open_graph(file).outputs[0].shape[1:])


def _samples(model: Model, data: DataSet, n: int) -> dict[str, Array]:
    image = model.processing.image
    return {image.input_name: np.stack([preprocess(decode_image(s.read()), image) for s in data.samples[:n]])}


def _on_device(program: Any, device: Any) -> Any:
    if device.type == "cpu":
        return program
    from torch.export.passes import move_to_device_pass

    return move_to_device_pass(program, device)


def _check_placement(got: Placement, expected: Placement) -> None:
    if got.names() != expected.names():
        other = sorted(set(got.names()) ^ set(expected.names())) or ["their order"]
        raise ModelError(
            f"The fine-tuned graph is quantized at other places than the trained one, the first being '{other[0]}'.",
            hint="Report the model and this message.",
        )


# --- the weights ------------------------------------------------------------------------------------------


def _write_weights(model: Model, trained: Mapping[str, Any], folder: Path) -> None:
    """The model in its own layout, with the trained weights in place of those that it came with."""
    from safetensors.torch import save_file

    from edgevlm.families.loading import load_module, quiet

    folder.mkdir()
    module = copy.deepcopy(load_module(model))
    state = {name.removeprefix("module."): value for name, value in trained.items() if name.startswith("module.")}
    # Buffers that are computed and never saved, such as position ids, are in the traced program's state all the same.
    computed = dict(module.named_buffers()).keys() - module.state_dict().keys()
    state = {name: value for name, value in state.items() if name not in computed}
    unknown = module.load_state_dict(state, strict=False).unexpected_keys
    if unknown:
        raise ModelError(
            f"The trained weight '{unknown[0]}' has no place in '{model.source.asked}'.",
            hint="Report the model and this message.",
        )
    if model.source.kind == "torch_module":
        state = {name: value.contiguous().clone() for name, value in module.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        return
    with quiet():
        module.save_pretrained(folder)
    for pattern in _KEPT:
        for file in Path(model.source.location).glob(pattern):
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def _tuned(model: Model, folder: Path) -> Model:
    """The model with the weights in ``folder``."""
    files = sorted(folder.glob("*.safetensors"))
    weights = combined_sha256([sha256_of(file) for file in files])
    source = msgspec.structs.replace(
        model.source, weights_sha256=weights, digest=combined_sha256([model.source.digest, weights])
    )
    if model.source.kind == "torch_module":
        source = msgspec.structs.replace(source, options={**source.options, "weights": str(files[0])})
    else:
        source = msgspec.structs.replace(source, location=str(folder), options={**source.options, "is_pickle": False})
    return msgspec.structs.replace(model, source=source)


def _place(made: Path, destination: Path) -> None:
    """Whole, or not at all: a finished folder under its own name."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    draft = destination.parent / f".{destination.name}.{os.getpid()}.partial"
    try:
        shutil.copytree(made, draft)
        if destination.exists():
            shutil.rmtree(destination)
        draft.replace(destination)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
