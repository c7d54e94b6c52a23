"""Real inputs for graphs: pictures through the model's own preprocessing, texts through its tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgevlm.data.data_set import DataSet
from edgevlm.export import Exported
from edgevlm.job import Job, Work, place
from edgevlm.plan import TEXT_ENCODER
from edgevlm.runtime.image import decode_image, preprocess
from edgevlm.runtime.spec import Array, Processing, TextProcessing
from edgevlm.runtime.text import load_tokenizer, tokenize
from edgevlm.store import read_spec

TOKENIZER = "processing/tokenizer.json"
LABEL_EMBEDDINGS = "processing/label_embeddings.npy"


def processing_of(work: Work) -> Processing:
    """The model's processing, with texts as the export left them: of one length, or at their own."""
    processing = work.job.model.processing
    folder = work.inputs.get(f"export:{TEXT_ENCODER}")
    if processing.text is None or folder is None:
        return processing
    shape = read_spec(folder / "exported.json", Exported).inputs[0].shape
    text = msgspec.structs.replace(processing.text, padding="longest")
    if isinstance(shape[-1], int):
        text = msgspec.structs.replace(text, padding="max_length", max_length=shape[-1])
    return msgspec.structs.replace(processing, text=text)


def graph_inputs(
    job: Job, graph: str, data: DataSet, n: int, *, text: TextProcessing | None = None
) -> dict[str, Array]:
    """The first ``n`` inputs of a graph that ``data`` gives.

    Args: text: ``processing_of(work).text``, for texts as long as the longest of them where the graph takes such; left
        out, they have the full length, which every text graph takes.
    Shapes: each [at most n, ...].
    """
    if graph == TEXT_ENCODER:
        return text_inputs(job, prompts(job, data)[:n], text)
    image = job.model.processing.image
    rows = [preprocess(decode_image(sample.read()), image) for sample in data.samples[:n]]
    return {image.input_name: np.stack(rows)}


def prompts(job: Job, data: DataSet) -> tuple[str, ...]:
    """Sentences that the text tower will really see: the labels in the model's prompt."""
    from edgevlm.data.shapes import class_names

    labels = job.request.labels or data.class_names or class_names()
    text = job.model.processing.text
    template = text.prompt_template if text else "{}"
    return tuple(template.replace("{}", label) for label in labels)


def text_inputs(job: Job, texts: Sequence[str], text: TextProcessing | None = None) -> dict[str, Array]:
    """Token ids of ``texts``, padded as ``text`` says, or else to the full length."""
    processing = text or job.model.processing.text
    assert processing is not None, "a text tower comes with its processing"
    return tokenize(texts, load_tokenizer(Path(job.model.tokenizer_file), processing), processing)


def save_inputs(file: Path, inputs: Mapping[str, Array]) -> Path:
    """As an ``.npz``, which a worker reads."""
    with file.open("wb") as opened:
        np.savez(opened, allow_pickle=False, **{name: np.ascontiguousarray(value) for name, value in inputs.items()})
    return file


def at_batch(inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
    """Exactly ``batch`` rows, filled up from the front."""
    n = len(next(iter(inputs.values())))
    index = np.arange(batch) % n
    return {name: value[index] for name, value in inputs.items()}


def processing_folder(job: Job, fold: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A folder in which the files that processing and scoring name lie where a bundle has them."""
    folder = tempfile.TemporaryDirectory(prefix="edgevlm-")
    for path, source in processing_files(job, fold).items():
        place(source, Path(folder.name) / path)
    return folder


def processing_files(job: Job, fold: Path | None) -> dict[str, Path]:
    """The files beside the graphs, by path in the bundle: label embeddings, or the tokenizer of a text tower."""
    if fold is not None:
        return {LABEL_EMBEDDINGS: fold / "label_embeddings.npy"}
    return {TOKENIZER: Path(job.model.tokenizer_file)} if job.model.tokenizer_file else {}
