"""Small graphs that have one fault each, and the same graphs without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.quantization.graphs import Builder

D = 64
SHAPE = (16, D)


def quantized(b: Builder, x: str, *, kind: Any = np.uint8, out: str | None = None) -> str:
    scale, zero = b.constant(np.float32(0.05)), b.constant(kind(128 if kind is np.uint8 else 0))
    return b.node("DequantizeLinear", b.node("QuantizeLinear", x, scale, zero), scale, zero, out=out)


def weight(b: Builder, *shape: int) -> str:
    values = b.constant(b.rng.integers(-127, 128, shape).astype(np.int8))
    return b.node("DequantizeLinear", values, b.constant(np.float32(0.01)), b.constant(np.int8(0)))


def save(b: Builder, path: Path, shape: tuple[int, ...] = SHAPE, out: tuple[int, ...] | None = None) -> Path:
    return b.save(path, {"x": shape}, {"y": out or shape})


def save_fused(path: Path) -> Path:
    """Two linear layers between Q/DQ pairs, as they should be: nothing but int8 between the ends."""
    b = Builder()
    y = b.node("MatMul", quantized(b, "x"), weight(b, D, D))
    quantized(b, b.node("MatMul", quantized(b, y), weight(b, D, D)), out="y")
    return save(b, path)


def save_float_bias(path: Path) -> Path:
    """MatMul and Add with a float bias, then something that is not quantized: the Gemm made of them stays float."""
    b = Builder()
    y = b.node("Add", b.node("MatMul", quantized(b, "x"), weight(b, D, D)), b.weight(D))
    quantized(b, b.node("MatMul", quantized(b, b.node("Erf", y)), weight(b, D, D)), out="y")
    return save(b, path)


def save_unfused(path: Path) -> Path:
    """Q/DQ pairs around operators that have no int8 kernel."""
    b = Builder()
    y = b.node("MatMul", quantized(b, "x"), weight(b, D, D))
    for _ in range(4):
        y = b.node("Erf", quantized(b, y))
    quantized(b, b.node("MatMul", quantized(b, y), weight(b, D, D)), out="y")
    return save(b, path)


def save_signed(path: Path, *, kind: Any = np.int8) -> Path:
    """An int8 product with activations of this sign, in the form that ONNX Runtime takes as it is."""
    b = Builder()
    scale, zero = b.constant(np.float32(0.05)), b.constant(kind(0))
    x = b.node("QuantizeLinear", "x", scale, zero)
    w = b.constant(b.rng.integers(-127, 128, (D, D)).astype(np.int8))
    w_scale, w_zero = b.constant(np.float32(0.01)), b.constant(np.int8(0))
    y = b.node("QLinearMatMul", x, scale, zero, w, w_scale, w_zero, scale, zero)
    b.node("DequantizeLinear", y, scale, zero, out="y")
    return save(b, path)


def save_dynamic(path: Path) -> Path:
    """A convolution whose input's range is found at run time, as dynamic quantization of all operators writes it."""
    b = Builder()
    w = b.constant(b.rng.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8))
    y = "x"
    for _ in range(2):
        name = f"q{len(b.nodes)}"
        b.nodes.append(_dynamic(y, name))
        y = b.node("Cast", b.node("ConvInteger", name, w, f"{name}_zero", pads=[1, 1, 1, 1]), to=1)
    b.node("Mul", y, b.constant(np.float32(1e-4)), out="y")
    return save(b, path, (1, 16, 16, 16))


def _dynamic(x: str, name: str) -> Any:
    from onnx import helper

    return helper.make_node("DynamicQuantizeLinear", [x], [name, f"{name}_scale", f"{name}_zero"], name=name)


def save_depthwise(path: Path, *, group: int) -> Path:
    """Convolutions of ``group`` groups over 64 channels, and one dense one."""
    b = Builder()
    y = "x"
    for _ in range(3):
        y = b.node("Conv", y, b.weight(D, D // group, 3, 3), group=group, pads=[1, 1, 1, 1])
    b.node("Conv", y, b.weight(D, D, 3, 3), pads=[1, 1, 1, 1], out="y")
    return save(b, path, (1, D, 24, 24))


def save_transposing(path: Path) -> Path:
    """Layout for its own sake: a product stands between the transposes, so that they cannot cancel."""
    b = Builder()
    y = "x"
    for _ in range(3):
        y = b.node("MatMul", b.node("Transpose", y, perm=[2, 0, 1]), b.weight(D, D))
    b.node("Relu", y, out="y")
    return save(b, path, (D, D, D))
