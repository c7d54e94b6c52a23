"""The example of docs/tensorrt.md runs as it stands, and its table names the kinds that the lint knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import onnx
from onnx import TensorProto, helper

from edgevlm.lowering.tensorrt_lint import Kind
from edgevlm.runtime.engine import read_card

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "tensorrt.md").read_text(encoding="utf-8")


def test_the_table_has_every_kind_of_finding():
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", TEXT.split("## The lint")[1].split("## Where")[0], re.MULTILINE)
    assert sorted(rows) == sorted(get_args(Kind))


def test_the_example_builds_an_engine(rtx, tmp_path: Path, monkeypatch):
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 224, 224])
    means = helper.make_tensor_value_info("means", TensorProto.FLOAT, ["batch", 3, 1, 1])
    nodes = [helper.make_node("GlobalAveragePool", ["pixel_values"], ["means"])]
    graph = helper.make_graph(nodes, "g", [pixels], [means])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "model.onnx"
    )
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(example, {})
    assert read_card(tmp_path / "model.engine").compute_capabilities == ("8.6", "8.9", "12.0")
