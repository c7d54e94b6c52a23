"""Folders and files that look like models, made without torch: enough for reading them, not for running them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "image_size": 32,
    "patch_size": 8,
    "id2label": {"0": "cat", "1": "dog", "2": "crane"},
}
PREPROCESSOR: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}


def write_folder(folder: Path, *, config: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A checkpoint's folder; ``changes`` of its configuration, None leaving a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {**(CONFIG if config is None else config), **changes}
    write_json(folder / "config.json", {key: value for key, value in values.items() if value is not None})
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    save_file({"vit.weight": np.arange(64, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_onnx(
    path: Path,
    *,
    batch: int | str = "n",
    size: int | str = 8,
    opset: int = 17,
    ir_version: int = 8,
    op: str = "GlobalAveragePool",
    domain: str = "",
    softmax: bool = False,
    weight: float = 1.0,
    bakes_batch: bool = False,
    external: bool = False,
) -> Path:
    """A classifier of three classes: the mean of each channel, times a matrix (image, pooled, flat, scores)."""
    weights = numpy_helper.from_array(np.eye(3, dtype=np.float32) * np.float32(weight), "matrix")
    shape = numpy_helper.from_array(np.array([1 if bakes_batch else -1, 3], dtype=np.int64), "shape")
    nodes = [
        helper.make_node(op, ["image"], ["pooled"], name="pool", domain=domain),
        helper.make_node("Reshape", ["pooled", "shape"], ["flat"], name="flatten"),
        helper.make_node("MatMul", ["flat", "matrix"], ["scores"], name="classify"),
    ]
    last = "scores"
    if softmax:
        nodes.append(helper.make_node("Softmax", ["scores"], ["probabilities"], name="softmax"))
        last = "probabilities"
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [batch, 3])],
        [weights, shape],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    if external:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def write_card(path: Path, text: str = 'task = "image-classification"\nlabels = ["red", "green", "blue"]\n') -> Path:
    path.write_text(text, encoding="utf-8")
    return path
