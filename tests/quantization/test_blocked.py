"""Weights in blocks of 4 bits: the numbers, the layers that are taken, and the opset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgevlm.errors import ModelError
from edgevlm.quantization.blocked import at_opset, blocked_names, pack_blocks, quantize_blocks
from edgevlm.runtime.backends.onnxruntime import OnnxRuntime
from edgevlm.runtime.spec import SessionOptions
from tests.quantization.graphs import Builder, save_transformer


@given(
    seed=st.integers(0, 1000),
    scale=st.floats(1e-6, 1e6),
    block_size=st.sampled_from([16, 32, 64]),
    axis=st.sampled_from([0, 1]),
)
def test_no_weight_is_further_off_than_the_largest_that_is_cut_off(seed, scale, block_size, axis):
    weight = (np.random.default_rng(seed).standard_t(4, size=(64, 64)) * scale).astype(np.float32)
    q, scales = pack_blocks(weight, axis=axis, block_size=block_size)
    assert q.shape == weight.shape and q.min() >= -8 and q.max() <= 7 and (scales > 0).all()
    back = q * np.repeat(scales, block_size, axis=axis)
    # Half a step, or what is cut off: at most 30 % of the largest, and the step beyond -8 … 7.
    assert np.abs(back - weight).max() <= 0.45 * np.abs(weight).max()
    plain = np.repeat(whole_scale(weight, axis, block_size), block_size, axis=axis)
    rounded = np.clip(np.rint(weight / plain), -8, 7) * plain
    assert np.square(back - weight).sum() <= np.square(rounded - weight).sum() * (1 + 1e-5)


def whole_scale(weight, axis, block_size):
    parts = np.moveaxis(weight, axis, 0).reshape(-1, block_size, weight.shape[1 - axis])
    return np.moveaxis(np.maximum(parts.max(axis=1) / 7, -parts.min(axis=1) / 8), 0, axis)


def test_a_block_of_zeros_stays_zero():
    q, scales = pack_blocks(np.zeros((32, 4), np.float32), axis=0, block_size=16)
    assert not q.any() and np.isfinite(scales).all() and (scales > 0).all()


def test_onnx_runtime_unpacks_what_was_packed(tmp_path: Path):
    b = Builder()
    weight = np.random.default_rng(1).normal(size=(48, 5)).astype(np.float32)  # an odd number of outputs
    b.node("MatMul", "x", b.constant(weight), out="y")
    prepared = b.save(tmp_path / "model.onnx", {"x": [48, 48]}, {"y": [48, 5]})
    (tmp_path / "out").mkdir()
    quantize_blocks(prepared, 128, out=tmp_path / "out" / "model.onnx")
    session = OnnxRuntime().open(tmp_path / "out" / "model.onnx", SessionOptions(n_threads=1))
    q, scales = pack_blocks(weight, axis=0, block_size=16)
    unpacked = session.run({"x": np.eye(48, dtype=np.float32)})["y"]
    np.testing.assert_allclose(unpacked, q * np.repeat(scales, 16, axis=0), rtol=1e-6)


def test_a_weight_that_two_layers_share_is_packed_once(tmp_path: Path):
    b = Builder()
    weight = b.weight(32, 32)
    b.node("MatMul", b.node("MatMul", "x", weight), weight, out="y")
    prepared = b.save(tmp_path / "model.onnx", {"x": [2, 32]}, {"y": [2, 32]})
    (tmp_path / "out").mkdir()
    quantize_blocks(prepared, 32, out=tmp_path / "out" / "model.onnx")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert [node.op_type for node in graph.node] == ["DequantizeLinear", "MatMul", "MatMul"]
    assert weight not in {tensor.name for tensor in graph.initializer}


def test_layers_that_no_block_divides_stay_as_they_are(tmp_path: Path):
    b = Builder()
    b.node("MatMul", b.node("MatMul", "x", b.weight(40, 32)), b.weight(32, 8), out="y")
    prepared = b.save(tmp_path / "model.onnx", {"x": [2, 40]}, {"y": [2, 8]})
    assert blocked_names(prepared, 32) == ("matmul_1",)
    with pytest.raises(ModelError, match="no linear layer"):
        quantize_blocks(prepared, 32, out=tmp_path / "out.onnx", keep_float=("matmul_1",))


def test_a_layer_of_one_output_stays_as_it_is(tmp_path: Path):
    b = Builder()
    b.node("MatMul", "x", b.weight(32, 1), out="y")
    assert blocked_names(b.save(tmp_path / "model.onnx", {"x": [2, 32]}, {"y": [2, 1]}), 32) == ()


@pytest.mark.parametrize("size", [0, 8, 48])
def test_block_sizes_are_powers_of_two(size, tmp_path: Path):
    prepared = save_transformer(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="power of two"):
        quantize_blocks(prepared, size, out=tmp_path / "out.onnx")


def test_an_operator_whose_meaning_changed_is_converted(tmp_path: Path):
    nodes = [helper.make_node("GridSample", ["x", "grid"], ["y"], mode="bilinear")]
    grid = numpy_helper.from_array(np.random.default_rng(0).uniform(-1, 1, (1, 4, 4, 2)).astype(np.float32), "grid")
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 4, 4])
    graph = helper.make_graph(nodes, "g", [image], [answer], [grid])
    old = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    new = at_opset(onnx.ModelProto.FromString(old.SerializeToString()), 21)
    assert new.opset_import[0].version == 21 and new.ir_version == 10
    assert new.graph.node[0].attribute[0].s == b"linear"  # what opset 20 calls bilinear
    x = {"x": np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)}
    answers = []
    for name, model in (("old", old), ("new", new)):
        onnx.save(model, tmp_path / f"{name}.onnx")
        answers.append(OnnxRuntime().open(tmp_path / f"{name}.onnx", SessionOptions(n_threads=1)).run(x)["y"])
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-6)


def test_a_newer_opset_stays(tmp_path: Path):
    model = onnx.load(save_transformer(tmp_path / "model.onnx"))
    model.opset_import[0].version = 22
    assert at_opset(model, 21).opset_import[0].version == 22
