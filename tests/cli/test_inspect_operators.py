"""`edgevlm inspect --operators`: on a bundle, on any graph, and on what is neither."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from edgevlm.cli.inspect import operators_text
from edgevlm.cli.main import exit_code_of
from edgevlm.measure.explanation import Explained
from edgevlm.measure.look_inside import inspect_operators
from tests.measure import graphs
from tests.report.example import example_explanation
from tests.runtime import tiny

EXPECTED = """\
model int8-static-u8s8-minmax on onnxruntime 1.32.0, 2 threads: 3.71 ms, real inputs, 100 runs

operator       type as run  computes in     ms  share  GMAC/s
features.1_dw  QLinearConv  int8         0.630  18.7%    5.71
features.0     Conv         float32      0.290   8.6%    37.2
features.2     QLinearConv  int8         0.210   6.2%     119
13 others                                 2.24  66.5%

By kind of work: convolution 89.6%, quantize and convert 6.5%, matrix product 3.3%, pooling and
reduction 0.6%.

! float operators: In an int8 graph 1 Conv ran in float32: 9% of the time.
  → Quantize the 1 Conv among them, or take the time as the price of the accuracy that they
    keep.
  at features.0

! unfused quantization: 1 DequantizeLinear did not fuse into int8 operators: 3% of the time.
  → Put a quantize and a dequantize around every input and the output of an operator that has an
    int8 kernel, and none around one that has not.
  at features.0_dequantized"""


def test_the_text_is_as_it_was():
    assert operators_text(example_explanation().winner[0], top=3) == EXPECTED


def test_nothing_that_stands_out_is_said():
    (quiet,) = example_explanation().winner
    assert operators_text(msgspec.structs.replace(quiet, findings=())).endswith("\n\nNothing stands out.")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_bundle(tmp_path_factory.mktemp("made") / "towers", "zero-shot-image-classification")


def test_every_graph_of_a_bundle_gets_its_golden_picture(towers: Path):
    image, text = inspect_operators(towers)
    assert (image.graph, text.graph) == ("image_encoder", "text_encoder")
    for each in (image, text):
        assert each.profile is not None
        assert each.profile.has_real_inputs
        assert each.profile.n_threads == 1, "as the bundle was compiled"
    assert text.profile is not None
    assert "Gather" in {row.op_type for row in text.profile.rows}


def test_json_is_the_value(towers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert exit_code_of(["inspect", str(towers), "--operators", "--json"]) == 0
    told = msgspec.json.decode(capsys.readouterr().out, type=tuple[Explained, ...])
    assert [each.graph for each in told] == ["image_encoder", "text_encoder"]
    file = graphs.save_float_bias(tmp_path / "any.onnx")
    assert exit_code_of(["inspect", str(file), "--operators", "--threads", "1", "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)
    assert only["graph"] == "any"
    assert "float bias" in {finding["kind"] for finding in only["findings"]}


def test_any_graph_is_told_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = graphs.save_float_bias(tmp_path / "any.onnx")
    assert exit_code_of(["inspect", str(file), "--operators", "--threads", "1", "--top", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("any on onnxruntime ")
    assert "made-up inputs" in text
    assert "! float bias: 1 Gemm with quantized inputs stayed in float" in text


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [("none.onnx", 2, "There is no file"), ("bad.onnx", 1, "could not be profiled"), ("bad", 1, "error")],
)
def test_what_is_no_graph_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int, words: str):
    (tmp_path / "bad.onnx").write_bytes(b"hello")
    (tmp_path / "bad").mkdir()
    assert exit_code_of(["inspect", str(tmp_path / name), "--operators"]) == code
    told = capsys.readouterr()
    assert words in told.err
    assert "should not" not in told.err
    assert told.out == ""
