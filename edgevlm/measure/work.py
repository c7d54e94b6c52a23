"""How much a graph computes: multiply-accumulates and bytes, from shapes alone.

One multiply-accumulate is one product and its addition (two FLOP). Only convolutions and matrix products count, as is
usual; what else a graph does shows in its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgevlm.errors import ModelError
from edgevlm.runtime.spec import Spec

# Operator types as written and as run, ONNX Runtime's and OpenVINO's, by how their multiply-accumulates are counted,
# and where among the inputs the right-hand operand (a kernel, a matrix) stands.
_CONV = {
    "Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvInteger": 1, "QLinearConv": 3, "NhwcQLinearConv": 3,
    "Convolution": 1, "GroupConvolution": 1,
}  # fmt: skip
_TRANSPOSED_CONV = {"ConvTranspose": 1, "QLinearConvTranspose": 3, "Deconvolution": 1}
_MATRIX = {
    "Gemm": 1, "FusedGemm": 1, "QGemm": 3, "MatMul": 1, "FusedMatMul": 1, "TransposeMatMul": 1, "QLinearMatMul": 3,
    "MatMulInteger": 1, "MatMulInteger16": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "MatMulNBits": 1,
    "FullyConnected": 1, "FullyConnectedCompressed": 1, "FullyConnectedQuantized": 1,
    "FullyConnectedQuantizedLegacy": 1,
}  # fmt: skip
RIGHT_OPERAND: dict[str, int] = {**_CONV, **_TRANSPOSED_CONV, **_MATRIX}

Shape = Sequence[int]


class Work(Spec, frozen=True, kw_only=True):
    """What one inference of a graph takes, as the graph is written.

    Args:
        macs: multiply-accumulates; ``by_op`` splits them by operator type.
        weight_bytes: all constants, as they are stored.
        activation_bytes: every node's result, written once; an upper bound, since fusions write fewer.
        uncounted: operator types that multiply and accumulate inside, of which only the bytes are known.
    """

    macs: int
    by_op: dict[str, int]
    weight_bytes: int
    activation_bytes: int
    uncounted: tuple[str, ...] = ()


# Operators that hold matrix products which shapes alone do not tell.
_OPAQUE = frozenset({
    "Attention", "QAttention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "Einsum", "LSTM", "GRU",
    "RNN", "DeformConv", "Loop", "If", "Scan",
})  # fmt: skip


def count_macs(op_type: str, inputs: Sequence[Shape | None], output: Shape | None) -> int | None:
    """Multiply-accumulates of one node, whatever groups, strides and transpositions it has.

    0 for an operator that multiplies no matrix; None where a shape that decides is unknown. A shape that is not known
    (packed away by the backend) is given as None.

    Example:
        >>> count_macs("Conv", [(1, 3, 224, 224), (32, 3, 3, 3)], (1, 32, 112, 112))
        10838016
        >>> count_macs("Conv", [(1, 8, 4, 4), (8, 1, 3, 3)], (1, 8, 4, 4))  # depthwise
        1152
        >>> count_macs("MatMul", [(2, 5, 16), (16, 3)], (2, 5, 3))
        480
    """
    if op_type not in RIGHT_OPERAND:
        return None if op_type in _OPAQUE else 0
    left = inputs[0] if inputs else None
    at = RIGHT_OPERAND[op_type]
    right = inputs[at] if at < len(inputs) else None
    if op_type in _MATRIX:
        return _matrix_macs(op_type, left, right, output)
    if not right or not left or not output:
        return None
    # A kernel holds all of its channels' weights: ONNX has outputs (transposed: inputs) first, OpenVINO the groups
    # before them. Each output value takes the weights of its channel, each input value of a transposed one likewise.
    n_channels = right[0] * right[1] if len(right) > len(output) else right[0]
    n_values = math.prod(left) if op_type in _TRANSPOSED_CONV else math.prod(output)
    return n_values * math.prod(right) // n_channels


def _matrix_macs(op_type: str, left: Shape | None, right: Shape | None, output: Shape | None) -> int | None:
    if not output:
        return None
    if op_type in ("Gemm", "FusedGemm", "QGemm") and left:
        return math.prod(left) * output[-1]  # whichever side is transposed, left holds M × K values
    if left:
        return math.prod(output) * left[-1]
    return math.prod(output) * right[-2] if right and len(right) > 1 else None


def work_of_graph(file: Path, shapes: Mapping[str, Shape]) -> Work:
    """Count an ONNX graph's work for inputs of these shapes.

    Args:
        shapes: by input; dimensions that a graph leaves free are filled in from here.
    Raises: ModelError: it is no ONNX graph.
    """
    import onnx
    from onnx import shape_inference

    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:  # protobuf raises its own classes
        raise ModelError(f"'{file.name}' is no ONNX graph: {error}.", hint="Name an ONNX file.") from error
    for value in model.graph.input:
        if value.name in shapes:
            dims = value.type.tensor_type.shape.dim
            for dim, size in zip(dims, shapes[value.name], strict=True):
                dim.Clear()
                dim.dim_value = int(size)
    # Shapes inferred before for a free batch would win over the new ones.
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    model = shape_inference.infer_shapes(model, data_prop=True)
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    known = {**weights, **_value_shapes(model.graph)}
    sizes = _value_bytes(model.graph)
    by_op: dict[str, int] = {}
    uncounted: set[str] = set()
    weight_bytes = sum(math.prod(t.dims) * _item_bits(t.data_type) // 8 for t in model.graph.initializer)
    activation_bytes = 0
    for node in model.graph.node:
        n_bytes = sum(sizes.get(name, 0) for name in node.output)
        if node.op_type == "Constant":
            weight_bytes += n_bytes
            continue
        activation_bytes += n_bytes
        macs = count_macs(node.op_type, [known.get(name) for name in node.input], known.get(node.output[0]))
        if macs is None:
            uncounted.add(node.op_type)
        elif macs:
            by_op[node.op_type] = by_op.get(node.op_type, 0) + macs
    return Work(
        macs=sum(by_op.values()),
        by_op=by_op,
        weight_bytes=weight_bytes,
        activation_bytes=activation_bytes,
        uncounted=tuple(sorted(uncounted)),
    )


def _value_shapes(graph: Any) -> dict[str, tuple[int, ...]]:
    """The values whose every dimension is known."""
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            found[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
    return found


def _value_bytes(graph: Any) -> dict[str, int]:
    shapes = _value_shapes(graph)
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return {name: math.prod(shape) * _item_bits(kinds[name]) // 8 for name, shape in shapes.items()}


def _item_bits(elem_type: int) -> int:
    """Bits of one element; ONNX packs its 2- and 4-bit types, and text has no size."""
    from onnx import TensorProto, helper

    name = TensorProto.DataType.Name(elem_type)
    if name in ("STRING", "UNDEFINED"):
        return 0
    packed = next((bits for bits in (2, 4) if name.startswith((f"INT{bits}", f"UINT{bits}", f"FLOAT{bits}E"))), None)
    return packed if packed else int(helper.tensor_dtype_to_np_dtype(elem_type).itemsize) * 8
