"""Real inputs for graphs: pictures through the model's own preprocessing, texts through its tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgevlm.data.data_set import DataSet
from edgevlm.data.prompts import prompts_of_sample
from edgevlm.export import Exported, open_source
from edgevlm.job import Job, Work, place
from edgevlm.measure.arrays import save_arrays
from edgevlm.plan import TEXT_ENCODER
from edgevlm.runtime.image import decode_image, preprocess, size_of
from edgevlm.runtime.spec import Array, Processing, Prompt, TextProcessing
from edgevlm.runtime.tasks.mask_generation import IMAGE_ENCODER, MASK_DECODER, decoder_prompts
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
    if graph == MASK_DECODER:
        # One prompt for each picture, as a device asks; a box and one point take as much, so they can stand beside.
        asked = [prompts_of_sample(sample, size_of(decode_image(sample.read()))) for sample in data.samples[:n]]
        return decoder_inputs(job, data.only(data.samples[:n]), [[each[i % len(each)]] for i, each in enumerate(asked)])
    image = job.model.processing.image
    rows = [preprocess(decode_image(sample.read()), image) for sample in data.samples[:n]]
    return {image.input_name: np.stack(rows)}


def proof_inputs(job: Job, graph: str, data: DataSet, n: int) -> dict[str, Array]:
    """Inputs to trace and prove a graph with, whose free sizes are large enough to be told from constants."""
    if graph != MASK_DECODER:
        return graph_inputs(job, graph, data, n)
    samples = data.only(data.samples[:n])
    sizes = [size_of(decode_image(sample.read())) for sample in samples.samples]
    # Four prompts of four tokens: two points, the first of them on the thing, and a box.
    asked = [
        [
            Prompt(
                points=((width * x, height * 0.4), (width * 0.1, height * x)), labels=(1, 0), box=(0, 0, width, height)
            )
            for x in (0.2, 0.4, 0.6, 0.8)
        ]
        for height, width in sizes
    ]
    return decoder_inputs(job, samples, asked)


def decoder_inputs(job: Job, data: DataSet, asked: Sequence[Sequence[Prompt]]) -> dict[str, Array]:
    """What the mask decoder is fed for each picture and its prompts, after the model's own encoder."""
    model = job.model
    image = model.processing.image
    encoder = open_source(model, IMAGE_ENCODER)
    embeds, sizes = [], []
    for sample in data.samples:  # one by one: an encoder of 1024 × 1024 pixels takes gigabytes for many
        picture = decode_image(sample.read())
        sizes.append(size_of(picture))
        embeds.append(encoder.run({image.input_name: preprocess(picture, image)[None]})["image_embeds"])
    return {"image_embeds": np.concatenate(embeds), **decoder_prompts(asked, sizes, image)}


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
        save_arrays(opened, {name: np.ascontiguousarray(value) for name, value in inputs.items()})
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
