"""Teachers as values: small checkpoints with random weights, and models that only say what they are."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgevlm.ingest import read_model
from edgevlm.model import Graph, Model, Source
from edgevlm.runtime.spec import ImageProcessing, Processing, Rescale, Resize, TensorSpec
from tests.families.checkpoints import write_checkpoint


def classifier(folder: Path) -> Model:
    """A ViT for 32×32 pictures of five classes, whose names are letters."""
    labels = dict(enumerate("abcde"))
    return read_model(str(write_checkpoint("ViTForImageClassification", folder, id2label=labels)))


def tower(folder: Path) -> Model:
    return read_model(str(write_checkpoint("ViTModel", folder)))


def said(task: str, *, labels: tuple[str, ...] = (), size: int = 64) -> Model:
    """An ONNX file that is not there."""
    image = ImageProcessing(height=size, width=size, steps=(Resize(height=size, width=size), Rescale(factor=1 / 255)))
    inputs = (TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, size, size)),)
    return Model(
        name="said",
        task=task,
        family="",
        graphs=(Graph(name="model", inputs=inputs, outputs=("logits",)),),
        processing=Processing(image=image),
        source=Source(kind="onnx_file", location="", asked="said.onnx", digest="", weights_sha256=""),
        labels=labels,
    )


def with_steps(model: Model, *steps: object) -> Model:
    image = msgspec.structs.replace(model.processing.image, steps=steps)
    return msgspec.structs.replace(model, processing=msgspec.structs.replace(model.processing, image=image))
