"""Multiply-accumulates against what was counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.errors import ModelError
from edgevlm.measure.work import count_macs, work_of_graph
from tests.quantization.graphs import Builder, save_cnn


@pytest.mark.parametrize(
    ("op_type", "inputs", "output", "macs"),
    [
        ("Conv", [(1, 3, 8, 8), (16, 3, 3, 3)], (1, 16, 8, 8), 16 * 8 * 8 * 3 * 3 * 3),
        ("Conv", [(2, 8, 8, 8), (8, 4, 3, 3)], (2, 8, 4, 4), 2 * 8 * 4 * 4 * 4 * 3 * 3),  # two groups, stride 2
        ("Conv", [(1, 8, 4, 4), (8, 1, 3, 3)], (1, 8, 4, 4), 8 * 4 * 4 * 9),  # depthwise
        ("Conv", [(1, 4, 10), (6, 4, 3)], (1, 6, 8), 6 * 8 * 4 * 3),
        ("GroupConvolution", [(1, 8, 4, 4), (8, 1, 1, 3, 3)], (1, 8, 4, 4), 8 * 4 * 4 * 9),  # OpenVINO's groups first
        ("ConvTranspose", [(1, 4, 5, 5), (4, 6, 2, 2)], (1, 6, 10, 10), 4 * 5 * 5 * 6 * 4),
        ("QLinearConv", [(1, 8, 8, 3), (), (), (16, 3, 3, 3)], (1, 8, 8, 16), 16 * 8 * 8 * 27),  # channels last
        ("Gemm", [(5, 16), (16, 3), (3,)], (5, 3), 5 * 16 * 3),
        ("Gemm", [(16, 5), (16, 3)], (5, 3), 5 * 16 * 3),  # transA
        ("QGemm", [(5, 16), (), (), None], (5, 3), 5 * 16 * 3),
        ("MatMul", [(2, 4, 5, 16), (2, 4, 16, 7)], (2, 4, 5, 7), 2 * 4 * 5 * 16 * 7),
        ("MatMul", [None, (16, 7)], (5, 7), 5 * 16 * 7),
        ("MatMulInteger", [(5, 16), (16, 7)], (5, 7), 5 * 16 * 7),
        ("DynamicQuantizeMatMul", [(1, 5, 16), None], (1, 5, 7), 5 * 16 * 7),
        ("Softmax", [(5, 7)], (5, 7), 0),
        ("QLinearConv", [(1, 3, 8, 8), (), (), None], (1, 16, 8, 8), None),
        ("MatMul", [None, None], (5, 7), None),
        ("Attention", [(1, 5, 16)], (1, 5, 16), None),
    ],
)
def test_macs_are_those_counted_by_hand(op_type, inputs, output, macs):
    assert count_macs(op_type, inputs, output) == macs


def test_a_graph_with_a_free_batch_is_counted_at_the_batch_of_its_inputs(tmp_path: Path):
    file = save_cnn(tmp_path / "cnn.onnx")
    convolutions = 16 * 16 * 16 * 27 + 16 * 16 * 16 * 9 + 16 * 16 * 16 * 16 + 32 * 7 * 7 * 16 * 9
    for batch in (1, 3):
        work = work_of_graph(file, {"pixel_values": (batch, 3, 16, 16)})
        assert work.by_op == {"Conv": batch * convolutions, "Gemm": batch * 320}
        assert work.macs == batch * (convolutions + 320)
        assert work.uncounted == ()
    weights = 16 * 27 + 16 + 16 * 9 + 16 + 256 + 16 + 32 * 144 + 32 + 320 + 10 + 2
    assert work.weight_bytes == 4 * weights
    assert work.activation_bytes > 3 * 4 * 16 * 16 * 16


def test_bytes_are_those_of_every_result_written_once(tmp_path: Path):
    b = Builder()
    b.node("Relu", b.node("MatMul", "x", b.weight(16, 4)), out="y")
    file = b.save(tmp_path / "g.onnx", {"x": (5, 16)}, {"y": (5, 4)})
    work = work_of_graph(file, {"x": (5, 16)})
    assert (work.macs, work.weight_bytes, work.activation_bytes) == (320, 256, 2 * 80)


def test_the_work_of_resnet_20_is_what_is_published(assets: Path):
    """ResNet-20: 40.55 million multiply-accumulates beside its 0.27 million parameters (He et al., 2015)."""
    work = work_of_graph(assets / "models" / "resnet20-cifar10.onnx", {"image": (1, 3, 32, 32)})
    assert work.macs == 40_551_040
    assert work.weight_bytes == pytest.approx(4 * 0.27e6, rel=0.02)


def test_what_is_no_graph_is_told(tmp_path: Path):
    (tmp_path / "x.onnx").write_bytes(b"hello")
    with pytest.raises(ModelError, match=r"'x\.onnx' is no ONNX graph"):
        work_of_graph(tmp_path / "x.onnx", {})
