"""Cards of detectors and segmenters, and graphs of the kinds that they come in: opset 11, one picture at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgevlm.errors import EdgeVLMError, ModelError, UsageError
from edgevlm.ingest import read_model
from edgevlm.ingest.card import read_card
from edgevlm.runtime.spec import FlipChannels, GridDecoding, Letterbox, QueryDecoding, Rescale
from tests.ingest.layouts import write_card

ROOT = Path(__file__).resolve().parents[2]
DETECTOR = """
task = "object-detection"
labels = ["cat", "dog"]
[input]
channel_order = "bgr"
resize = "letterbox"
scale = 1.0
[detection]
kind = "grid"
strides = [8]
"""
SEGMENTER = """
task = "semantic-segmentation"
labels = ["background", "cat", "dog"]
"""


def write_detector(path: Path, *, opset: int = 11, ir_version: int = 6) -> Path:
    """A cat in each 8 × 8 cell of a picture of 32 × 32 (BGR) that is green: [1, 16, 5 + 2]."""
    weight = np.zeros((7, 3, 1, 1), np.float32)
    weight[4:6, :, 0, 0] = np.array([-0.5, 1, -0.5]) / 255
    bias = np.array([0.5, 0.5, 0, 0, 0, 0, 0], np.float32)  # in the middle of its cell, and as large
    nodes = [
        helper.make_node("AveragePool", ["images"], ["cells"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Conv", ["cells", "weight", "bias"], ["scores"]),
        helper.make_node("Reshape", ["scores", "shape"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["output"], perm=[0, 2, 1]),
    ]
    constants = {"weight": weight, "bias": bias, "shape": np.array([1, 7, 16])}
    return _write(path, nodes, "images", {"output": [1, 16, 7]}, constants, batch=1, opset=opset, ir_version=ir_version)


def write_segmenter(path: Path, *, last: str = "") -> Path:
    """Logits at a quarter of 32 × 32, which say which colour is strongest."""
    nodes = [helper.make_node("AveragePool", ["image"], ["logits"], kernel_shape=[4, 4], strides=[4, 4])]
    if last == "ArgMax":
        nodes.append(helper.make_node(last, ["logits"], ["classes"], axis=1, keepdims=0))
        kind, outputs = TensorProto.INT64, {"classes": ["n", 8, 8]}
    elif last:
        nodes.append(helper.make_node(last, ["logits"], ["classes"], axis=1))
        kind, outputs = TensorProto.FLOAT, {"classes": ["n", 3, 8, 8]}
    else:
        kind, outputs = TensorProto.FLOAT, {"logits": ["n", 3, 8, 8]}
    return _write(path, nodes, "image", outputs, {}, batch="n", kind=kind)


def write_queries(path: Path, names: tuple[str, str] = ("logits", "pred_boxes")) -> Path:
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        helper.make_node("Squeeze", ["mean", "last"], ["means"]),
        helper.make_node("Transpose", ["means"], [names[0]], perm=[0, 2, 1]),
        helper.make_node("Concat", [names[0], "one"], [names[1]], axis=2),
    ]
    constants = {"last": np.array([3]), "one": np.ones((1, 1, 1), np.float32)}
    return _write(path, nodes, "image", {names[0]: [1, 1, 3], names[1]: [1, 1, 4]}, constants, batch=1)


def _write(
    path: Path,
    nodes: list[Any],
    picture: str,
    outputs: dict[str, list[int | str]],
    constants: dict[str, Any],
    *,
    batch: int | str,
    opset: int = 17,
    ir_version: int = 8,
    kind: int = TensorProto.FLOAT,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(picture, TensorProto.FLOAT, [batch, 3, 32, 32])],
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def test_a_detector_of_opset_11_and_one_picture(tmp_path: Path):
    write_card(tmp_path / "net.card.toml", DETECTOR)
    model = read_model(str(write_detector(tmp_path / "net.onnx")))
    assert (model.task, model.labels) == ("object-detection", ("cat", "dog"))
    assert model.processing.detection == GridDecoding(strides=(8,))
    assert model.processing.image.steps == (Letterbox(height=32, width=32), Rescale(factor=1.0), FlipChannels())
    assert model.source.options == {"inputs": {"pixel_values": "images"}, "outputs": {"detections": "output"}}


def test_the_decoding_is_part_of_what_a_model_is(tmp_path: Path):
    write_detector(tmp_path / "net.onnx")
    digests = []
    for i, text in enumerate((DETECTOR, DETECTOR + "nms_iou = 0.5\n")):
        card = write_card(tmp_path / f"{i}.toml", text)
        digests.append(read_model(str(tmp_path / "net.onnx"), card=card).source.digest)
    assert digests[0] != digests[1]


def test_labels_of_ones_own(tmp_path: Path):
    card = write_card(tmp_path / "net.card.toml", DETECTOR)
    file = write_detector(tmp_path / "net.onnx")
    assert read_model(str(file), card=card, labels=["a", "b"]).labels == ("a", "b")
    with pytest.raises(UsageError, match=r"3 labels .* has 2 classes"):
        read_model(str(file), card=card, labels=["a", "b", "c"])


def test_a_segmenter(tmp_path: Path):
    write_card(tmp_path / "net.card.toml", SEGMENTER)
    model = read_model(str(write_segmenter(tmp_path / "net.onnx")))
    assert (model.task, model.graphs[0].outputs) == ("semantic-segmentation", ("logits",))
    with pytest.raises(UsageError, match=r"2 labels .* has 3 classes"):
        read_model(str(tmp_path / "net.onnx"), labels=["a", "b"])
    assert read_model(str(write_segmenter(tmp_path / "net.onnx", last="Softmax"))).graphs, "the likeliest is the same"
    with pytest.raises(ModelError, match="ArgMax") as caught:
        read_model(str(write_segmenter(tmp_path / "net.onnx", last="ArgMax")))
    assert 'logits = "logits"' in caught.value.hint


@pytest.mark.parametrize("names", [("logits", "pred_boxes"), ("classes", "boxes")])
def test_queries_have_two_outputs(tmp_path: Path, names: tuple[str, str]):
    text = 'task = "object-detection"\nlabels = ["cat", "dog"]\n[detection]\nkind = "queries"\n'
    file = write_queries(tmp_path / "net.onnx", names)
    if names[0] == "classes":
        with pytest.raises(ModelError, match="does not say which are logits and pred_boxes"):
            read_model(str(file), card=write_card(tmp_path / "a.toml", text))
        text += f'[outputs]\nlogits = "{names[0]}"\npred_boxes = "{names[1]}"\n'
    model = read_model(str(file), card=write_card(tmp_path / "net.toml", text))
    assert model.processing.detection == QueryDecoding()
    assert model.graphs[0].outputs == ("logits", "pred_boxes")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DETECTOR.partition("[detection]")[0], r"has no \[detection\]"),
        (SEGMENTER + '[detection]\nkind = "grid"\n', r"has a \[detection\]"),
        (DETECTOR + "nms = 0.5\n", "unknown field `nms`"),
        (DETECTOR.replace("grid", "anchors"), "anchors"),
        (DETECTOR.replace("[8]", "[7]"), r"strides of \[7\] do not divide 32 × 32"),
        (DETECTOR + "nms_iou = 2.0\n", "nms_iou is 2.0"),
        (DETECTOR.replace('"letterbox"', '"shortest_edge"'), "is cropped"),
        (DETECTOR.replace('"letterbox"', '"stretch"\nfill = 3'), "places and fills"),
        (DETECTOR.replace('"letterbox"', '"letterbox"\nfill = 300'), "fill = 300"),
        (DETECTOR.replace('"letterbox"', '"letterbox"\nresize_to = 40'), "letterboxes to 40"),
        (DETECTOR + '[outputs]\nlogits = "output"\n', "the output 'logits'"),
        (DETECTOR.replace('kind = "grid"\nstrides = [8]', 'kind = "queries"') + '[outputs]\nlogits = "x"\n', "alone"),
    ],
)
def test_a_wrong_card(tmp_path: Path, text: str, words: str):
    file = write_detector(tmp_path / "net.onnx")
    with pytest.raises(EdgeVLMError, match=words) as caught:
        read_model(str(file), card=write_card(tmp_path / "net.toml", text))
    assert caught.value.hint


@pytest.mark.parametrize("name", ["yolox-nano-coco", "espnetv2-voc"])
def test_the_cards_of_the_benchmarks(name: str):
    card = read_card(ROOT / "benchmarks" / "cards" / f"{name}.card.toml")
    assert len(card.labels) == {"yolox-nano-coco": 80, "espnetv2-voc": 21}[name]


def test_the_documented_decoding():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = next(block.split("```")[0] for block in text.split("```toml\n")[1:] if block.startswith("[detection]"))
    import tomllib

    documented = tomllib.loads(table)["detection"]
    assert set(documented) == {"kind", *GridDecoding.__struct_fields__} - {"version"}
    assert msgspec.convert(documented, GridDecoding) == GridDecoding()
