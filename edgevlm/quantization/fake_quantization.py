"""Fake quantization in PyTorch: what ONNX's QuantizeLinear and DequantizeLinear do, with a gradient.

Needs torch at import; only what trains imports this module.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

# How fast observed ranges follow: TensorFlow's default for its moving averages of ranges is 0.999 over long trainings;
# fine-tuning has some hundred steps, of which the last ones must count.
_MOMENTUM = 0.02
# The largest bias ÷ the largest int32, with some room for float32 rounding.
_INT32_STEP = 1.001 / (2**31 - 1)
# ONNX Runtime's smallest scale, of a range that holds nothing but zero.
_TINY = float(torch.finfo(torch.float32).tiny)


class _RoundStraight(torch.autograd.Function):
    """Round half to even; the gradient passes as if nothing had happened."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return torch.round(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def fake_quantize(value: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """``value`` as it comes out of QuantizeLinear and DequantizeLinear.

    The gradient is 1 inside the range and 0 where the value saturates (the straight-through estimator).

    Args:
        low, high: the smallest and the largest integer.
    Shapes: ``scale`` and ``zero_point`` broadcast against ``value``.
    Source:  Bengio et al., arXiv:1308.3432; ONNX QuantizeLinear (round half to even, then saturate).
    """
    rounded: Tensor = _RoundStraight.apply(value / scale)  # type: ignore[no-untyped-call]
    return (torch.clamp(rounded + zero_point, low, high) - zero_point) * scale


def weight_scale(weight: Tensor, *, n_bits: int, per_channel: bool) -> Tensor:
    """The scale of symmetric signed weights: the largest absolute value becomes the largest integer.

    Shapes: weight [C, ...] -> [C, 1, ...] per channel, else [].
    """
    largest = weight.detach().abs()
    largest = largest.flatten(1).amax(1).reshape(-1, *[1] * (weight.ndim - 1)) if per_channel else largest.amax()
    return torch.clamp(largest / largest_integer(n_bits), min=_TINY)


def largest_integer(n_bits: int) -> int:
    """The largest integer of symmetric signed weights: 127 of 8 bits, 7 of 4.

    Example:
        >>> largest_integer(8), largest_integer(4)
        (127, 7)
    """
    return int(2 ** (n_bits - 1)) - 1


class ActivationQuantizer(torch.nn.Module):
    """Fake quantization of an activation, one range for the whole tensor.

    While it observes, the range follows the smallest and largest values of the batches by a moving average.
    """

    low: Tensor
    high: Tensor

    def __init__(self, *, low: float, high: float, sign: Literal["u8", "s8"]) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(low, dtype=torch.float32))
        self.register_buffer("high", torch.tensor(high, dtype=torch.float32))
        self.integers = (0, 255) if sign == "u8" else (-128, 127)
        self.is_observing = False

    def forward(self, value: Tensor) -> Tensor:
        if self.is_observing and self.training:
            self.low.lerp_(value.detach().amin(), _MOMENTUM)
            self.high.lerp_(value.detach().amax(), _MOMENTUM)
        scale, zero_point = self.parameters_of_range()
        return fake_quantize(value, scale, zero_point, *self.integers)

    def parameters_of_range(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point such that zero itself is an integer.

        Source: ONNX Runtime's ``compute_scale_zp``.
        """
        first, last = self.integers
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        scale = torch.clamp((high - low) / (last - first), min=_TINY)
        return scale, torch.clamp(torch.round(first - low / scale), first, last)


class QuantizedLayer(torch.nn.Module):
    """A convolution or a linear layer whose weight is fake-quantized, a batch norm behind it folded in.

    While ``is_adapting`` in training the batch norm normalizes by the batch and its running statistics follow; the
    quantized weight is the folded one all along, as it will be exported.

    Args:
        call: ``(input, weight, bias)`` -> output.
        norm: momentum and epsilon of the batch norm; None where there is none.
        input: the quantizer of what it reads, where only this layer reads it quantized.
        bias_by: the quantizer of what it reads, where the bias becomes int32 by its scale times the weight's.
    Source: Jacob et al., arXiv:1712.05877; Krishnamoorthi, arXiv:1806.08342, section 3.2.2.
    """

    def __init__(
        self,
        call: Any,
        *,
        n_bits: int,
        per_channel: bool,
        norm: tuple[float, float] | None = None,
        input: ActivationQuantizer | None = None,
        bias_by: ActivationQuantizer | None = None,
    ) -> None:
        super().__init__()
        self.call = call
        self.n_bits = n_bits
        self.per_channel = per_channel
        self.norm = norm
        self.input = input
        self._bias_by = (bias_by,)  # in a tuple: it is a part of another module
        self.is_adapting = False

    def forward(self, value: Tensor, weight: Tensor, bias: Tensor | None = None, *statistics: Tensor) -> Tensor:
        if self.input is not None:
            value = self.input(value)
        if self.norm is None or not (self.is_adapting and self.training):
            folded, folded_bias = self.folded(weight, bias, *statistics)
            scale = self.scale_of(folded, folded_bias)
            result: Tensor = self.call(value, self.quantized(folded, scale), self._quantized_bias(folded_bias, scale))
            return result
        gain, offset, mean, variance = statistics
        momentum, epsilon = self.norm
        factor = gain / torch.sqrt(variance + epsilon)
        # A channel that its batch norm switches off has nothing to be divided by.
        divisor = torch.where(factor == 0, torch.ones_like(factor), factor)
        folded = weight * _over_channels(factor, weight.ndim)
        out = self.call(value, self.quantized(folded, self.scale_of(folded)), None)
        out = out / _across(divisor, out.ndim)
        if bias is not None:
            out = out + _across(bias, out.ndim)
        return functional.batch_norm(out, mean, variance, gain, offset, True, momentum, epsilon)

    def folded(self, weight: Tensor, bias: Tensor | None, *statistics: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the batch norm in them."""
        if self.norm is None:
            return weight, bias
        gain, offset, mean, variance = statistics
        factor = gain / torch.sqrt(variance + self.norm[1])
        moved = -mean if bias is None else bias - mean
        return weight * _over_channels(factor, weight.ndim), offset + moved * factor

    def quantized(self, weight: Tensor, scale: Tensor) -> Tensor:
        last = largest_integer(self.n_bits)
        return fake_quantize(weight, scale, torch.zeros_like(scale), -last, last)

    def scale_of(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The weight's scale, at least so large that the bias fits into int32 (a channel may be all zero but for it).

        Source: ``_adjust_weight_scale_for_int32_bias`` of ONNX Runtime's quantizer.
        """
        scale = weight_scale(weight, n_bits=self.n_bits, per_channel=self.per_channel)
        (quantizer,) = self._bias_by
        if bias is None or quantizer is None:
            return scale
        largest = bias.detach().abs()
        largest = largest.reshape(scale.shape) if self.per_channel else largest.amax()
        return torch.maximum(scale, largest / quantizer.parameters_of_range()[0] * _INT32_STEP)

    def _quantized_bias(self, bias: Tensor | None, scale: Tensor) -> Tensor | None:
        """As int32. It is coarse enough to be felt: half a step of it moved 0.4 % of MobileNetV2's third layer."""
        (quantizer,) = self._bias_by
        if bias is None or quantizer is None:
            return bias
        step = scale.flatten() * quantizer.parameters_of_range()[0]
        rounded: Tensor = _RoundStraight.apply(bias / step)  # type: ignore[no-untyped-call]
        return rounded * step


def _over_channels(values: Tensor, n_dimensions: int) -> Tensor:
    return values.reshape(-1, *[1] * (n_dimensions - 1))


def _across(values: Tensor, n_dimensions: int) -> Tensor:
    return values.reshape(1, -1, *[1] * (n_dimensions - 2))
