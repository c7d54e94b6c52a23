"""Fake quantization is what ONNX Runtime's QuantizeLinear and DequantizeLinear do, and has a gradient."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

torch = pytest.importorskip("torch", reason="training needs PyTorch")

from edgevlm.quantization.fake_quantization import (  # noqa: E402 - torch first
    ActivationQuantizer,
    QuantizedLayer,
    fake_quantize,
    weight_scale,
)

INTEGERS = {"u8": (0, 255), "s8": (-128, 127)}


@cache
def quantize_dequantize(sign: str) -> Any:
    """A session of QuantizeLinear and DequantizeLinear that are run as they stand."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    kind = TensorProto.UINT8 if sign == "u8" else TensorProto.INT8
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ],
        "pair",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
            helper.make_tensor_value_info("zero", kind, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(onnx.ModelProto.SerializeToString(model), options, providers=["CPUExecutionProvider"])


def by_onnx(values: np.ndarray, scale: np.float32, zero: int, sign: str) -> np.ndarray:
    kind = np.uint8 if sign == "u8" else np.int8
    feeds = {"x": values, "scale": np.array(scale), "zero": np.array(zero, dtype=kind)}
    result: np.ndarray = quantize_dequantize(sign).run(None, feeds)[0]
    return result


@settings(max_examples=200)
@given(
    values=hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e4, 1e4, width=32)),
    scale=st.floats(2**-13, 128, width=32),
    sign=st.sampled_from(["u8", "s8"]),
    zero=st.integers(0, 255),
)
def test_it_gives_what_onnx_gives(values: np.ndarray, scale: float, sign: str, zero: int) -> None:
    low, high = INTEGERS[sign]
    zero += low
    expected = by_onnx(values, np.float32(scale), zero, sign)
    got = fake_quantize(torch.from_numpy(values), torch.tensor(scale), torch.tensor(float(zero)), low, high)
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize("sign", ["u8", "s8"])
def test_it_rounds_halves_to_even_and_saturates(sign: str) -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e6, -1e6], dtype=np.float32)
    zero = 10 if sign == "u8" else 0
    low, high = INTEGERS[sign]
    got = fake_quantize(torch.from_numpy(values), torch.tensor(1.0), torch.tensor(float(zero)), low, high).numpy()
    np.testing.assert_array_equal(got, [0, 2, 2, 0, -2, high - zero, low - zero])
    np.testing.assert_array_equal(got, by_onnx(values, np.float32(1), zero, sign))


@given(low=st.floats(-100, 0, width=32), high=st.floats(0, 100, width=32), sign=st.sampled_from(["u8", "s8"]))
def test_zero_is_an_integer_of_every_range_and_the_range_is_covered(low: float, high: float, sign: str) -> None:
    quantizer = ActivationQuantizer(low=low, high=high, sign=sign)  # type: ignore[arg-type]
    ends = torch.tensor([0.0, low, high])
    got = quantizer(ends)
    scale = float(quantizer.parameters_of_range()[0])
    assert got[0] == 0
    assert torch.all((got - ends).abs() <= scale * 1.001)


def test_the_gradient_passes_inside_the_range_and_stops_where_it_saturates() -> None:
    values = torch.tensor([-3.0, -0.2, 0.3, 250.0, 300.0], requires_grad=True)
    fake_quantize(values, torch.tensor(1.0), torch.tensor(0.0), 0, 255).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_low_bit_weights_have_few_levels_and_keep_the_largest() -> None:
    weight = torch.linspace(-2, 1, 301).reshape(1, 1, 301)
    for n_bits in (2, 4, 8):
        layer = QuantizedLayer(None, n_bits=n_bits, per_channel=True)
        got = layer.quantized(weight, weight_scale(weight, n_bits=n_bits, per_channel=True))
        assert len(got.unique()) <= 2**n_bits - 1
        assert got.min() == -2


def test_scales_are_per_channel_or_one() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.25]])
    torch.testing.assert_close(weight_scale(weight, n_bits=8, per_channel=True), torch.tensor([[2 / 127], [0.5 / 127]]))
    torch.testing.assert_close(weight_scale(weight, n_bits=4, per_channel=False), torch.tensor(2 / 7))


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_folded_norm_is_the_convolution_and_its_norm(has_bias: bool) -> None:
    torch.manual_seed(0)
    value, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    bias = torch.randn(4) if has_bias else None
    statistics = (torch.randn(4), torch.randn(4), torch.randn(4), torch.rand(4) + 0.5)
    layer = QuantizedLayer(torch.conv2d, n_bits=8, per_channel=True, norm=(0.1, 1e-5))
    gain, offset, mean, variance = statistics
    expected = torch.nn.functional.batch_norm(
        torch.conv2d(value, weight, bias), mean, variance, gain, offset, False, 0.1, 1e-5
    )
    torch.testing.assert_close(torch.conv2d(value, *layer.folded(weight, bias, *statistics)), expected)


def test_an_adapting_norm_follows_the_batch_and_a_still_one_does_not() -> None:
    torch.manual_seed(0)
    value, weight = torch.randn(8, 3, 5, 5) * 3 + 1, torch.randn(4, 3, 3, 3)
    statistics = [torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4)]
    layer = QuantizedLayer(torch.conv2d, n_bits=8, per_channel=True, norm=(0.1, 1e-5)).train()
    layer(value, weight, None, *statistics)
    assert statistics[2].abs().max() == 0
    layer.is_adapting = True
    out = layer(value, weight, None, *statistics)
    assert statistics[2].abs().max() > 0
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)


def test_ranges_move_only_while_they_observe_in_training() -> None:
    quantizer = ActivationQuantizer(low=-1, high=1, sign="u8")
    for is_observing, is_training, moves in ((True, False, False), (False, True, False), (True, True, True)):
        quantizer.is_observing = is_observing
        quantizer.train(is_training)
        before = float(quantizer.high)
        quantizer(torch.tensor([-5.0, 5.0]))
        assert (float(quantizer.high) != before) == moves
