"""A classifier of three colours that is compiled in seconds, and pictures for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

LABELS = ("red", "green", "blue")
SIZE = 24
CARD = f'task = "image-classification"\nlabels = {list(LABELS)}\nlicence = "MIT"\n'


def write_classifier(path: Path, *, weight: float = 1.0, n_filters: int = 16) -> Path:
    """An ONNX file with its card: a convolution whose first three filters see one channel each, pooled and read."""
    generator = np.random.default_rng(0)
    filters = generator.normal(scale=0.01, size=(n_filters, 3, 3, 3)).astype(np.float32)
    filters[:3] += weight * np.eye(3, dtype=np.float32)[:, :, None, None] / 9
    readout = np.zeros((n_filters, 3), dtype=np.float32)
    readout[:3] = 8 * np.eye(3)
    nodes = [
        helper.make_node("Conv", ["image", "filters"], ["seen"], name="see", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["seen"], ["kept"], name="keep"),
        helper.make_node("GlobalAveragePool", ["kept"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node("MatMul", ["flat", "readout"], ["scores"], name="read"),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(filters, "filters"), numpy_helper.from_array(readout, "readout")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    path.with_suffix(".card.toml").write_text(CARD, encoding="utf-8")
    return path


def colour(label: str, i: int) -> Image.Image:
    """The i-th picture of a colour; no two are alike."""
    generator = np.random.default_rng((LABELS.index(label), i))
    pixels = generator.integers(0, 120, (30, 40, 3))
    pixels[..., LABELS.index(label)] += 120
    return Image.fromarray(pixels.astype(np.uint8))


def write_pictures(folder: Path, *, n_per_class: int = 12) -> Path:
    """Folders by class."""
    for label in LABELS:
        (folder / label).mkdir(parents=True)
        for i in range(n_per_class):
            colour(label, i).save(folder / label / f"{i}.png")
    return folder
