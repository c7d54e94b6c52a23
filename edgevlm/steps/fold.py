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
from edgevlm.steps.inputs import LABEL_EMBEDDINGS, text_inputs
from edgevlm.store import read_spec, write_spec

# Texts in a call: a thousand labels at once would need gigabytes of activations.
_BATCH = 32


def run(work: Work) -> None:
    """``label_embeddings.npy`` (float32 [n_labels, d], unit rows) and ``scoring.json``."""
    source = work.inputs[f"export:{TEXT_ENCODER}"]
    exported = read_spec(source / "exported.json", Exported)
    session = load_backend("onnxruntime").open(source / exported.file, SessionOptions())
    texts = [work.step.params["prompt_template"].replace("{}", label) for label in work.step.params["labels"]]
    rows = []
    for start in range(0, len(texts), _BATCH):
        outputs = run_rows(session, text_inputs(work.job, texts[start : start + _BATCH]))
        rows.append(outputs["text_embeds"])
    embeddings = unit_rows(np.concatenate(rows)).astype(np.float32)
    if not np.isfinite(embeddings).all():
        raise ModelError("The text tower gives NaN for a label.", hint="Check the labels and the checkpoint's weights.")
    _save(work.out / "label_embeddings.npy", embeddings)
    scoring = read_spec(source / "scoring.json", Scoring)
    write_spec(work.out / "scoring.json", msgspec.structs.replace(scoring, label_embeddings=LABEL_EMBEDDINGS))


def _save(file: Path, embeddings: np.ndarray) -> None:
    with file.open("wb") as opened:
        np.save(opened, embeddings, allow_pickle=False)
