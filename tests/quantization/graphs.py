"""Small seeded graphs: a convolutional net and a transformer block, with the traits that decide how they quantize."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Nodes in order, each named; weights drawn from one generator."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, *shape: int, scale: float | None = None) -> str:
        fan_in = int(np.prod(shape[1:])) or 1
        values = self.rng.normal(0, scale or (1 / fan_in) ** 0.5, shape).astype(np.float32)
        return self.constant(values)

    def constant(self, values: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, op: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out or name], name=name, **attributes))
        return out or name

    def save(self, path: Path, inputs: dict[str, Sequence[int | str]], outputs: dict[str, Sequence[int | str]]) -> Path:
        def values(specs: dict[str, Sequence[int | str]]) -> list[Any]:
            return [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in specs.items()]

        graph = helper.make_graph(self.nodes, "g", values(inputs), values(outputs), self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def save_cnn(path: Path, *, batch: int | str = "batch") -> Path:
    """Convolutions with clamps, a residual and a SiLU, then pooling and one linear layer."""
    b = Builder()
    x = b.node("Relu", b.node("Conv", "pixel_values", b.weight(16, 3, 3, 3), b.weight(16), pads=[1, 1, 1, 1]))
    low, high = b.constant(np.float32(0)), b.constant(np.float32(6))
    y = b.node("Clip", b.node("Conv", x, b.weight(16, 1, 3, 3), b.weight(16), group=16, pads=[1, 1, 1, 1]), low, high)
    y = b.node("Conv", y, b.weight(16, 16, 1, 1), b.weight(16))
    x = b.node("Add", x, y)
    y = b.node("Conv", x, b.weight(32, 16, 3, 3), b.weight(32), strides=[2, 2])
    x = b.node("Mul", y, b.node("Sigmoid", y))
    x = b.node("Flatten", b.node("GlobalAveragePool", x))
    b.node("Gemm", x, b.weight(10, 32), b.weight(10), transB=1, out="logits")
    return b.save(path, {"pixel_values": [batch, 3, 16, 16]}, {"logits": [batch, 10]})


def save_transformer(path: Path, *, batch: int | str = "batch") -> Path:
    """One block with a causal mask of minus infinity: biased linear layers as MatMul + Add, as torch exports them."""
    b, d, n = Builder(), 32, 6

    def linear(x: str, n_in: int, n_out: int) -> str:
        return b.node("Add", b.node("MatMul", x, b.weight(n_in, n_out, scale=n_in**-0.5)), b.weight(n_out, scale=0.1))

    def norm(x: str) -> str:
        return b.node("LayerNormalization", x, b.constant(np.ones(d, np.float32)), b.weight(d, scale=0.1), axis=-1)

    h = norm("tokens")
    q, k, v = (linear(h, d, d) for _ in range(3))
    scores = b.node("MatMul", q, b.node("Transpose", k, perm=[0, 2, 1]))
    mask = b.constant(np.triu(np.full((n, n), -np.inf, np.float32), 1))
    attended = b.node("MatMul", b.node("Softmax", b.node("Add", scores, mask), axis=-1), v)
    x = b.node("Add", "tokens", linear(attended, d, d))
    h = linear(norm(x), d, 2 * d)
    x = b.node("Add", x, linear(b.node("Mul", h, b.node("Sigmoid", h)), 2 * d, d))
    b.node("LayerNormalization", x, b.constant(np.ones(d, np.float32)), b.weight(d, scale=0.1), axis=-1, out="embeds")
    return b.save(path, {"tokens": [batch, n, d]}, {"embeds": [batch, n, d]})


def feeds(name: str, n: int, *, seed: int = 1, batch: int = 1) -> list[dict[str, Any]]:
    """Inputs for the graph called ``name`` (``cnn`` or ``transformer``)."""
    rng = np.random.default_rng(seed)
    key, shape = {"cnn": ("pixel_values", (batch, 3, 16, 16)), "transformer": ("tokens", (batch, 6, 32))}[name]
    return [{key: rng.normal(size=shape).astype(np.float32)} for _ in range(n)]
