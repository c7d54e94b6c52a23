"""Embed the labels once, so that the bundle needs no text tower."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from edgevlm.errors import ModelError
from edgevlm.export import Exported
from edgevlm.job import Work
from edgevlm.plan import TEXT_ENCODER
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.session import run_rows
from edgevlm.runtime.spec import Scoring, SessionOptions
from edgevlm.runtime.tasks.zero_shot_image_classification import unit_rows
from edgevlm.runtime.text import embed_texts, load_tokenizer
from edgevlm.steps.inputs import LABEL_EMBEDDINGS, processing_of
from edgevlm.store import read_spec, write_spec


def run(work: Work) -> None:
    """``label_embeddings.npy`` (float32 [n_labels, d], unit rows) and ``scoring.json``."""
    source = work.inputs[f"export:{TEXT_ENCODER}"]
    exported = read_spec(source / "exported.json", Exported)
    session = load_backend("onnxruntime").open(source / exported.file, SessionOptions())
    texts = [work.step.params["prompt_template"].replace("{}", label) for label in work.step.params["labels"]]
    processing = processing_of(work).text
    assert processing is not None, "a text tower comes with its processing"
    tokenizer = load_tokenizer(Path(work.job.model.tokenizer_file), processing)
    rows = embed_texts(texts, tokenizer, processing, lambda feeds: run_rows(session, feeds)["text_embeds"])
    embeddings = unit_rows(rows).astype(np.float32)
    if not np.isfinite(embeddings).all():
        raise ModelError("The text tower gives NaN for a label.", hint="Check the labels and the checkpoint's weights.")
    _save(work.out / "label_embeddings.npy", embeddings)
    scoring = read_spec(source / "scoring.json", Scoring)
    write_spec(work.out / "scoring.json", msgspec.structs.replace(scoring, label_embeddings=LABEL_EMBEDDINGS))


def _save(file: Path, embeddings: np.ndarray) -> None:
    with file.open("wb") as opened:
        np.save(opened, embeddings, allow_pickle=False)
