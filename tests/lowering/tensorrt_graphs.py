"""Small graphs, each with one thing that TensorRT rejects or gets wrong, and the same without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

S8, U8 = np.int8(0), np.uint8(0)


@dataclass(frozen=True)
class Case:
    """A graph, and what is wrong with it: the rule, the node that it names, and whether it is rejected."""

    make: Callable[[], Any]
    kind: str
    node: str
    effect: str = "rejected"

    def save(self, folder: Path) -> Path:
        return save(self.make(), folder)


def save(model: Any, folder: Path) -> Path:
    file = folder / "model.onnx"
    onnx.save(model, file)
    return file


def constant(name: str, value: Any) -> Any:
    return numpy_helper.from_array(np.asarray(value), name)


def integers(*shape: int, dtype: Any = np.int8) -> Any:
    return np.random.default_rng(0).integers(0, 100, size=shape).astype(dtype)


def four_bits(name: str, kind: int, *shape: int) -> Any:
    values = np.random.default_rng(0).integers(0, 8, size=shape)
    return helper.make_tensor(name, kind, shape, values.ravel().tolist())


def model(
    nodes: Sequence[Any],
    constants: Sequence[Any] = (),
    *,
    x: Sequence[int | str] = (2, 32),
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
) -> Any:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, list(x))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def quantized(inputs: Sequence[str], out: str, *, prefix: str = "", **attributes: Any) -> list[Any]:
    """A QuantizeLinear and a DequantizeLinear behind each other, called ``q`` and ``dq``."""
    first, *rest = inputs
    return [
        helper.make_node("QuantizeLinear", [first, *rest], [f"{prefix}q_out"], name=f"{prefix}q", **attributes),
        helper.make_node("DequantizeLinear", [f"{prefix}q_out", *rest], [out], name=f"{prefix}dq", **attributes),
    ]


def gemm(
    *,
    zero: Any = S8,
    scale: float = 0.1,
    weight: Any = np.int8,
    weight_zero: int = 0,
    axis: int = 0,
    turned: bool = True,
    weight_scale: float = 0.02,
) -> Any:
    """A linear layer of 32 inputs and 8 outputs, quantized as TensorRT takes it unless told otherwise."""
    shape = (8, 32) if turned else (32, 8)
    scales = np.full(shape[axis], weight_scale, np.float32)
    nodes = [
        *quantized(["x", "s", "z"], "xd"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], name="wdq", axis=axis),
        helper.make_node("Gemm", ["xd", "wd"], ["y"], name="gemm", transB=int(turned)),
    ]
    constants = [
        constant("s", np.float32(scale)),
        constant("z", zero),
        constant("w", integers(*shape, dtype=weight)),
        constant("ws", scales),
        constant("wz", np.full(scales.shape, weight_zero, weight)),
    ]
    return model(nodes, constants)


def convolution(op_type: str = "Conv", *, axis: int = 0) -> Any:
    shape = (5, 3, 3, 3) if op_type == "Conv" else (3, 5, 2, 2)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], name="wdq", axis=axis),
        helper.make_node(op_type, ["x", "wd"], ["y"], name="conv"),
    ]
    constants = [constant("w", integers(*shape)), constant("ws", np.full(shape[axis], 0.02, np.float32))]
    return model(nodes, constants, x=(1, 3, 8, 8))


def transposed(*, axis: int) -> Any:
    """Weights [8 outputs, 32 inputs] that are dequantized, turned and then multiplied with."""
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], name="wdq", axis=axis),
        helper.make_node("Transpose", ["wd"], ["wt"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["y"], name="matmul"),
    ]
    return model(nodes, [constant("w", integers(8, 32)), constant("ws", np.full((8, 32)[axis], 0.02, np.float32))])


def float_weights() -> Any:
    """QuantizeLinear and DequantizeLinear on weights that are still in float."""
    nodes = [
        *quantized(["w", "ws", "wz"], "wd", prefix="w", axis=0),
        helper.make_node("Conv", ["x", "wd"], ["y"], name="conv"),
    ]
    weights = np.random.default_rng(0).normal(size=(5, 3, 3, 3)).astype(np.float32)
    constants = [constant("w", weights), constant("ws", np.full(5, 0.02, np.float32))]
    return model(nodes, [*constants, constant("wz", np.zeros(5, np.int8))], x=(1, 3, 8, 8))


def blocks(
    kind: int = TensorProto.INT4, *, n: int = 32, block: int = 16, zero: int | None = None, n_outputs: int = 8
) -> Any:
    """A MatMul whose weights are in blocks along its inputs."""
    shape = (-(-n // block), n_outputs)
    nodes = [
        helper.make_node(
            "DequantizeLinear",
            ["w", "ws", "wz"][: 2 + (zero is not None)],
            ["wd"],
            name="wdq",
            axis=0,
            block_size=block,
        ),
        helper.make_node("MatMul", ["x", "wd"], ["y"], name="matmul"),
    ]
    constants = [four_bits("w", kind, n, n_outputs), constant("ws", np.full(shape, 0.02, np.float32))]
    if zero is not None:
        constants.append(helper.make_tensor("wz", kind, shape, [zero] * (shape[0] * shape[1])))
    return model(nodes, constants, x=(2, n), opset=21)


def activation(zero: Any = None, *, scale: Any = 0.1, opset: int = 17, **attributes: Any) -> Any:
    """An activation that is quantized and dequantized, and no more."""
    names = ["x", "s"] if zero is None else ["x", "s", "z"]
    first, second = quantized(names, "y", **attributes)
    if "output_dtype" in attributes:
        second = helper.make_node("DequantizeLinear", ["q_out", *names[1:]], ["y"], name="dq")
    constants = [constant("s", np.float32(scale)), *([] if zero is None else [constant("z", zero)])]
    return model([first, second], constants, opset=opset)


def constant_node() -> Any:
    """A zero point that is no initializer."""
    node = helper.make_node("Constant", [], ["z"], name="zero", value=numpy_helper.from_array(np.int8(3)))
    return model([node, *quantized(["x", "s", "z"], "y")], [constant("s", np.float32(0.1))])


def branch() -> Any:
    """What is wrong stands in a branch."""
    first, second = quantized(["x", "s", "z"], "out")
    values = [constant("s", np.float32(0.1)), constant("z", np.uint8(128))]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    quantizes = helper.make_graph([first, second], "then", [], [output], values)
    other = helper.make_tensor_value_info("other", TensorProto.FLOAT, None)
    keeps = helper.make_graph([helper.make_node("Identity", ["x"], ["other"])], "else", [], [other])
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "limit"], ["is_large"]),
        helper.make_node("If", ["is_large"], ["y"], name="if", then_branch=quantizes, else_branch=keeps),
    ]
    return model(nodes, [constant("limit", np.float32(0))])


def bias() -> Any:
    nodes = [
        *quantized(["x", "s", "z"], "xd"),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], name="wdq", axis=0),
        helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"], name="bdq", axis=0),
        helper.make_node("Gemm", ["xd", "wd", "bd"], ["y"], name="gemm", transB=1),
    ]
    constants = [
        constant("s", np.float32(0.1)),
        constant("z", S8),
        constant("w", integers(8, 32)),
        constant("ws", np.full(8, 0.02, np.float32)),
        constant("b", np.arange(8, dtype=np.int32)),
        constant("bs", np.full(8, 0.002, np.float32)),
    ]
    return model(nodes, constants)


def q_linear(op_type: str, x: Sequence[int], weight: Any) -> Any:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="q"),
        helper.make_node(op_type, ["xq", "s", "z", "w", "s", "z", "s", "z"], ["yq"], name="product"),
        helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"], name="dq"),
    ]
    constants = [constant("s", np.float32(0.1)), constant("z", S8), constant("w", weight)]
    return model(nodes, constants, x=x)


def over_integers(op_type: str, x: Sequence[int], weight: Any) -> Any:
    nodes = [
        helper.make_node("Cast", ["x"], ["xi"], to=TensorProto.INT8),
        helper.make_node(op_type, ["xi", "w"], ["yi"], name="product"),
        helper.make_node("Cast", ["yi"], ["y"], to=TensorProto.FLOAT),
    ]
    return model(nodes, [constant("w", weight)], x=x)


def dynamic() -> Any:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "s", "z"], name="dynamic"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["y"], name="dq"),
    ]
    return model(nodes)


def contrib(op_type: str) -> Any:
    return model([helper.make_node(op_type, ["x"], ["y"], name="contrib", domain="com.microsoft")])


def packed() -> Any:
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "ws"], ["y"], name="packed", domain="com.microsoft", K=32, N=8, bits=4, block_size=16
    )
    constants = [constant("w", integers(8, 2, 8, dtype=np.uint8)), constant("ws", np.full((8, 2), 0.02, np.float32))]
    return model([node], constants)


def fold() -> Any:
    """What ``torch.nn.Fold`` becomes."""
    node = helper.make_node("Col2Im", ["x", "size", "block"], ["y"], name="fold")
    return model(
        [node], [constant("size", np.int64([4, 4])), constant("block", np.int64([2, 2]))], x=(1, 12, 9), opset=18
    )


def bitwise() -> Any:
    nodes = [
        helper.make_node("Cast", ["x"], ["xi"], to=TensorProto.INT32),
        helper.make_node("BitwiseAnd", ["xi", "mask"], ["yi"], name="and"),
        helper.make_node("Cast", ["yi"], ["y"], to=TensorProto.FLOAT),
    ]
    return model(nodes, [constant("mask", np.int32([1]))], opset=18)


def loose_int16() -> Any:
    """An initializer of 16 bits that nothing reads."""
    return model([helper.make_node("Relu", ["x"], ["y"], name="relu")], [constant("loose", np.int16([1, 2]))])


BAD: dict[str, Case] = {
    "asymmetric unsigned activation": Case(lambda: gemm(zero=np.uint8(128)), "zero-point", "q"),
    "asymmetric signed activation": Case(lambda: gemm(zero=np.int8(3)), "zero-point", "q"),
    "asymmetric weights": Case(lambda: gemm(weight_zero=2), "zero-point", "wdq"),
    "zero point from a Constant": Case(constant_node, "zero-point", "q"),
    "zero point within a branch": Case(branch, "zero-point", "q"),
    "zero points of int4": Case(lambda: blocks(zero=1), "zero-point", "wdq"),
    "unsigned weights": Case(lambda: gemm(weight=np.uint8), "uint8-weights", "wdq"),
    "unsigned activation asked for": Case(
        lambda: activation(opset=21, output_dtype=TensorProto.UINT8), "uint8-activations", "q"
    ),
    "bias of 32 bits": Case(bias, "int32-bias", "bdq"),
    "QLinearMatMul": Case(lambda: q_linear("QLinearMatMul", (2, 32), integers(32, 8)), "q-operator", "product"),
    "QLinearConv": Case(lambda: q_linear("QLinearConv", (1, 3, 8, 8), integers(4, 3, 3, 3)), "q-operator", "product"),
    "MatMulInteger": Case(lambda: over_integers("MatMulInteger", (2, 32), integers(32, 8)), "q-operator", "product"),
    "ConvInteger": Case(
        lambda: over_integers("ConvInteger", (1, 3, 8, 8), integers(4, 3, 3, 3)), "q-operator", "product"
    ),
    "DynamicQuantizeLinear": Case(dynamic, "dynamic-quantization", "dynamic"),
    "FastGelu": Case(lambda: contrib("FastGelu"), "contrib-operator", "contrib"),
    "MatMulNBits": Case(packed, "contrib-operator", "packed"),
    "Col2Im": Case(fold, "unsupported-operator", "fold"),
    "BitwiseAnd": Case(bitwise, "unsupported-operator", "and"),
    "one block for a whole weight": Case(lambda: blocks(n=16, n_outputs=1), "single-block", "wdq"),
    "activation of 16 bits": Case(lambda: activation(np.int16(0), opset=21), "int16", "q"),
    "16 bits that nothing reads": Case(loose_int16, "int16", "loose"),
    "unsigned int4": Case(lambda: blocks(TensorProto.UINT4), "uint4", "wdq"),
    "negative scale": Case(lambda: gemm(scale=-0.1), "scale", "q"),
    "scale of zero": Case(lambda: gemm(weight_scale=0.0), "scale", "wdq"),
    "blocks that leave a rest": Case(lambda: blocks(n=40), "uneven-blocks", "wdq"),
    "unsigned activation": Case(lambda: gemm(zero=U8), "uint8-activations", "q", "wrong"),
    "unsigned activation for want of a zero point": Case(activation, "uint8-activations", "q", "wrong"),
    "Conv along its inputs": Case(lambda: convolution(axis=1), "weight-axis", "wdq", "wrong"),
    "ConvTranspose along its inputs": Case(lambda: convolution("ConvTranspose"), "weight-axis", "wdq", "wrong"),
    "Gemm along its inputs": Case(lambda: gemm(axis=1), "weight-axis", "wdq", "wrong"),
    "turned Gemm along its inputs": Case(lambda: gemm(axis=0, turned=False), "weight-axis", "wdq", "wrong"),
    "MatMul along its inputs, through a Transpose": Case(lambda: transposed(axis=1), "weight-axis", "wdq", "wrong"),
    "activation per channel": Case(
        lambda: activation(np.zeros(32, np.int8), scale=np.full(32, 0.1, np.float32), axis=1),
        "per-channel-activations",
        "q",
        "wrong",
    ),
    "blocks that are cut anew": Case(lambda: blocks(n=33), "uneven-blocks", "wdq", "wrong"),
}

CLEAN: dict[str, Callable[[], Any]] = {
    "linear layer": gemm,
    "linear layer, weights as they lie": lambda: gemm(axis=1, turned=False),
    "convolution": convolution,
    "transposed convolution": lambda: convolution("ConvTranspose", axis=1),
    "weights that are turned": lambda: transposed(axis=0),
    "weights still in float": float_weights,
    "int4 in blocks": blocks,
    "int4 in one block for each output": lambda: blocks(n=16),
    "int4 with zero points of zero": lambda: blocks(zero=0),
    "activation": lambda: activation(S8),
    "signed activation asked for": lambda: activation(opset=21, output_dtype=TensorProto.INT8),
    "pixels of 8 bits": lambda: model(
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)], kind=TensorProto.UINT8
    ),
    "an ONNX operator by its contrib name": lambda: contrib("Gelu"),
}
