"""A model made ready: what edgevlm compiles, the float graph that rivals start from, and the inputs of everybody."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.suite.backends import MODULE
from benchmarks.suite.cases import SHAPES, TINY_VIT, Case
from benchmarks.suite.environments import interpreter
from benchmarks.suite.making import make
from benchmarks.suite.random_weights import MODELS, N_SETTLING, write_checkpoint
from benchmarks.suite.spec import MakeRequest
from edgevlm.compiler import prepare
from edgevlm.data.data_set import DataSet
from edgevlm.data.shapes import write_folder
from edgevlm.errors import EdgeVLMError
from edgevlm.export import Exported, export_graph
from edgevlm.job import Job
from edgevlm.model import Model
from edgevlm.runtime.backends import Session, load_backend
from edgevlm.runtime.image import decode_image, preprocess
from edgevlm.runtime.spec import Array, SessionOptions, TensorSpec
from edgevlm.steps.inputs import prompts, save_inputs, text_inputs

CARDS = Path(__file__).parents[1] / "cards"
N_UNLABELLED = 160
"""Pictures for models with random weights: a fifth calibrates, 64 choose and 64 report."""
N_TEXTS = 64
N_CALIBRATION_TEXTS = 32


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A case on disk.

    Args:
        asked: keyword arguments of ``edgevlm.compile`` beside the threads and the output.
        job: of a compile that is never run: the model, its splits and its target.
        exported: the float graph at batch 1.
        checkpoint: a Transformers folder, or None; ``architecture`` is its class.
        module: the folder that PyTorch's rivals open.
        inputs: an ``.npz`` with one real input.
        calibration: an ``.npz`` with what edgevlm calibrates on.
    """

    case: Case
    work: Path
    asked: dict[str, Any]
    job: Job
    exported: Exported
    graph: Path
    checkpoint: Path | None
    architecture: str
    module: Path
    inputs: Path
    calibration: Path
    n_calibrate: int

    @cached_property
    def float_session(self) -> Session:
        return load_backend("onnxruntime").open(self.graph, SessionOptions(n_threads=1))

    @cached_property
    def digest(self) -> str:
        """Of what everybody is judged on."""
        parts = hashlib.sha256(self.graph.read_bytes())
        parts.update(self.job.splits.report.digest.encode())
        return parts.hexdigest()


def prepare_case(case: Case, *, assets: Path | None, work: Path, environments: Path) -> Prepared:
    """Raises: EdgeVLMError: the model or its data cannot be read. DataError among them, where there are no assets."""
    work.mkdir(parents=True, exist_ok=True)
    data = _data(case, assets, work)
    asked: dict[str, Any] = {"model": str(_model(case, assets, work, environments)), "eval_data": data}
    if case.card:
        asked["card"] = CARDS / case.card
    if case.n_tokens is not None:
        asked["text_length"] = case.n_tokens  # as the rivals' graphs
    job = prepare(**asked, threads=1, output=work / "bundle", overwrite=True)
    model = _with_length(job.model, case)
    calibrate = _inputs(job, case, job.splits.calibrate, job.recipe.n_samples)
    samples = {name: value[:5] for name, value in calibrate.items()}
    folder = work / "float"
    shutil.rmtree(folder, ignore_errors=True)
    exported = export_graph(model, case.graph, batch=1, out=folder, samples=samples, opset=job.target.opset)
    checkpoint = _checkpoint(case, Path(asked["model"]))
    first = {name: value[:1] for name, value in _inputs(job, case, job.splits.select, 1).items()}
    return Prepared(
        case=case,
        work=work,
        asked=asked,
        job=job,
        exported=exported,
        graph=folder / exported.file,
        checkpoint=checkpoint,
        architecture=_architecture(case, checkpoint),
        module=_module(case, checkpoint, folder / exported.file, exported, work),
        inputs=save_inputs(work / "inputs.npz", first),
        calibration=save_inputs(work / "calibration.npz", calibrate),
        n_calibrate=len(next(iter(calibrate.values()))),
    )


def pictures_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))


def report_texts(prepared: Prepared) -> dict[str, Array]:
    """Token ids that nobody calibrated on.

    Shapes: int64 [N_TEXTS, n_tokens].
    """
    texts = prompts(prepared.job, prepared.job.splits.report)[N_CALIBRATION_TEXTS:][:N_TEXTS]
    return _cut(text_inputs(prepared.job, texts), prepared.case)


def padded(feeds: dict[str, Array], inputs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """Texts as long as the graph wants them, where it takes one length alone; the last token is repeated.

    A causal tower is read at its first end token, so what stands behind it changes nothing.
    """
    found = {}
    for spec in inputs:
        value, length = feeds[spec.name], spec.shape[-1]
        if value.ndim == 2 and isinstance(length, int):
            value = np.pad(value, ((0, 0), (0, length - value.shape[1])), mode="edge")
        found[spec.name] = value
    return found


def _need(assets: Path | None) -> Path:
    if assets is None:
        raise EdgeVLMError("The folder of models and pictures is not there.", hint="Name it with --assets.")
    return assets


def _data(case: Case, assets: Path | None, work: Path) -> Path:
    """As it is where it judges trained weights; without labels where only fidelity can be judged."""
    if not case.is_random or case.n_tokens is not None:
        return _need(assets) / case.data
    folder = work / "pictures"
    if folder.is_dir():
        return folder
    if case.data == SHAPES:
        source = work / "shapes"
        write_folder(source, n=60, seed=0, size=64, layout="csv")
    else:
        source = _need(assets) / case.data
    pictures = pictures_of(source)
    unfinished = work / "pictures.part"
    unfinished.mkdir(exist_ok=True)
    for picture in pictures[:: max(1, len(pictures) // N_UNLABELLED)][:N_UNLABELLED]:
        shutil.copyfile(picture, unfinished / picture.name)
    return unfinished.rename(folder)


def _model(case: Case, assets: Path | None, work: Path, environments: Path) -> Path:
    if not case.is_random:
        return _need(assets) / case.model
    folder = _data(case, assets, work)
    pictures = pictures_of(folder)
    if case.model == TINY_VIT:
        return _tiny_vit(pictures, work, environments)
    merges = _need(assets) / "models/clip-bpe/bpe_simple_vocab_16e6.txt.gz" if MODELS[case.model].has_text else None
    # Kept beside the cases, since two of them have the same.
    checkpoint = work.parent / "checkpoints" / case.model
    write_checkpoint(case.model, checkpoint, pictures=pictures, merges=merges)
    return checkpoint


def _tiny_vit(pictures: list[Path], work: Path, environments: Path) -> Path:
    from benchmarks.suite.random_weights import pixels

    settling = work / "settling.npz"
    if not settling.is_file():
        save_inputs(settling, {"pixel_values": pixels(pictures[:N_SETTLING], 224)})
    request = MakeRequest(
        maker="benchmarks.suite.tinyvit:export",
        source=str(settling),
        calibration=str(settling),
        outputs=("image_embeds",),
        is_transformer=True,
        settings={},
        out=str(work / TINY_VIT),
    )
    made = make(interpreter("timm", environments), request)
    if made.failure is not None:
        raise EdgeVLMError(f"TinyViT could not be made: {made.failure}", hint=f"See {work / TINY_VIT / 'log.txt'}.")
    return work / TINY_VIT / made.file


def _checkpoint(case: Case, model: Path) -> Path | None:
    return model if (model / "config.json").is_file() else None


def _architecture(case: Case, checkpoint: Path | None) -> str:
    if checkpoint is None:
        return ""
    if case.n_tokens is not None:
        return "CLIPTextModelWithProjection"
    return str(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["architectures"][0])


def _module(case: Case, checkpoint: Path | None, graph: Path, exported: Exported, work: Path) -> Path:
    """What PyTorch runs: the checkpoint's class, timm's class, or the graph's operators as torch calls."""
    outputs = [spec.name for spec in exported.outputs]
    description: dict[str, Any] = {"graph": str(graph.resolve())}
    if checkpoint is not None:
        description = {"checkpoint": str(checkpoint.resolve()), "architecture": _architecture(case, checkpoint)}
    folder = work / "module"
    if case.model == TINY_VIT:
        folder = work / TINY_VIT
        description = {"factory": "benchmarks.suite.tinyvit:load"}
    folder.mkdir(exist_ok=True)
    (folder / MODULE).write_text(json.dumps({**description, "outputs": outputs}), encoding="utf-8")
    return folder


def _with_length(model: Model, case: Case) -> Model:
    """The same model whose texts are ``n_tokens`` long: rivals get the shape that suits them best, a fixed one."""
    if case.n_tokens is None:
        return model

    def cut(spec: TensorSpec) -> TensorSpec:
        return msgspec.structs.replace(spec, shape=("batch", case.n_tokens))

    graphs = tuple(
        msgspec.structs.replace(graph, inputs=tuple(map(cut, graph.inputs))) if graph.name == case.graph else graph
        for graph in model.graphs
    )
    return msgspec.structs.replace(model, graphs=graphs)


def _inputs(job: Job, case: Case, data: DataSet, n: int) -> dict[str, Array]:
    """Shapes: each [at most n, ...]."""
    if case.n_tokens is not None:
        return _cut(text_inputs(job, prompts(job, data)[: min(n, N_CALIBRATION_TEXTS)]), case)
    image = job.model.processing.image
    rows = [preprocess(decode_image(sample.read()), image) for sample in data.samples[:n]]
    return {image.input_name: np.stack(rows)}


def _cut(inputs: dict[str, Array], case: Case) -> dict[str, Array]:
    """Texts cut to ``n_tokens``; one that is longer ends with the end token, as a tokenizer cuts it."""
    found = {}
    for name, value in inputs.items():
        cut = value[:, : case.n_tokens].copy()
        if name == "input_ids":
            cut[:, -1] = np.where(value[:, : case.n_tokens].max(1) == value.max(), cut[:, -1], value.max())
        found[name] = np.ascontiguousarray(cut)
    return found
