"""Weights in signed 4 bits, block by block, in ONNX's own form: a DequantizeLinear with ``block_size`` (opset 21).

Unlike ``weight_only``, whose packed weights only ONNX Runtime reads, any library that knows the operator takes these.
"""

from __future__ import annotations

import tempfile
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.errors import ModelError
from edgevlm.quantization.graphs import has_external_data
from edgevlm.quantization.post_training import external_file, first_line, kernel_counts, quiet, save_model
from edgevlm.quantization.schemes import LINEAR
from edgevlm.runtime.spec import Array, Spec

OPSET = 21  # the first with 4 bits and blocks
_IR_VERSION = 10  # the first with 4 bits
_MIN_BLOCK_SIZE = 16

# Cutting off the largest weights of a block leaves the others finer steps: of normal weights in blocks of 128 the error
# falls from 11.2 to 10.1 % of the weights, of heavier tails (Student's t, 5) from 16.3 to 14.8 %.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)

# Operators that mean something else in opset 21 than in 18: other names of modes, another shape of a scale, an input
# where an attribute was. All others only take more types. Source: onnx/docs/Changelog.md.
_CHANGED_SINCE_18 = frozenset({"DFT", "GridSample", "GroupNormalization"})


class Blocked(Spec, frozen=True, kw_only=True):
    """A graph with weights in blocks.

    Args:
        files: names in the folder of the graph: it first, then its external data.
        n_packed: linear layers with weights of 4 bits.
        n_float: matrix products left as they were.
    """

    files: tuple[str, ...]
    n_packed: int
    n_float: int

    def describe(self) -> str:
        """In words, for a report."""
        return f"{self.n_packed} linear layers with weights of 4 bits, {self.n_float} matrix products in float"


def blocked_names(prepared: Path, block_size: int) -> tuple[str, ...]:
    """Linear layers of a prepared graph whose weights fall into whole blocks, by name, in the graph's order."""
    import onnx

    return tuple(node.name for node in _nodes(onnx.load(prepared, load_external_data=False).graph, block_size))


def quantize_blocks(prepared: Path, block_size: int, *, out: Path, keep_float: Container[str] = ()) -> Blocked:
    """Write ``prepared`` with the weights of linear layers in 4 bits. The same graph gives the same bytes.

    Args:
        block_size: inputs of an output that share a scale, a power of two from 16 on. A layer whose inputs it does not
            divide takes a smaller one that does; where none does, the layer stays float.
        keep_float: nodes, by name, that keep their weights.
    Raises:  ModelError: there is nothing to quantize, or ONNX Runtime does not open what comes out.
    """
    import onnx
    from onnx import numpy_helper

    if block_size < _MIN_BLOCK_SIZE or block_size & (block_size - 1):
        raise ValueError(f"block_size: {block_size} is no power of two from {_MIN_BLOCK_SIZE} on")
    model = at_opset(onnx.load(prepared), OPSET)
    wanted = {node.name for node in _nodes(model.graph, block_size) if node.name not in keep_float}
    if not wanted:
        raise ModelError(
            f"'{prepared.name}' has no linear layer whose weights could be in blocks of 4 bits.",
            hint="Leave that precision out: convolutions have int8-static.",
        )
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    made: dict[tuple[str, int], str] = {}
    nodes = []
    for node in model.graph.node:
        if node.name in wanted:
            name, axis = node.input[1], _axis(node)
            if (name, axis) not in made:
                dequantize, tensors = _dequantized(numpy_helper.to_array(weights[name]), name, axis, block_size)
                model.graph.initializer.extend(tensors)
                nodes.append(dequantize)
                made[name, axis] = dequantize.output[0]
            node.input[1] = made[name, axis]
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unread(model.graph, {name for name, _ in made})
    n_products = sum(node.op_type in LINEAR for node in nodes)
    is_large = has_external_data(prepared)
    with tempfile.TemporaryDirectory(prefix=".edgevlm-", dir=out.parent) as folder, quiet():
        written = Path(folder) / out.name
        save_model(model, written, is_large=is_large)
        kernel_counts(written)  # opens it
        files = [out.name]
        if is_large:
            external_file(written).replace(external_file(out))
            files.append(external_file(out).name)
        written.replace(out)
    return Blocked(files=tuple(files), n_packed=len(wanted), n_float=n_products - len(wanted))


def pack_blocks(weight: Array, *, axis: int, block_size: int) -> tuple[Array, Array]:
    """Quantize a weight to -8 … 7 in blocks along ``axis``, one scale for each block.

    Shapes:  weight [.., n at ``axis``, ..] -> q, same shape, int8; scale [.., n / block_size, ..].
    Returns: ``(q, scale)``; of the scales tried each block has the one with the least squared error.
    """
    moved = np.moveaxis(weight.astype(np.float32), axis, 0)
    blocks = moved.reshape(moved.shape[0] // block_size, block_size, *moved.shape[1:])
    whole = np.maximum(blocks.max(axis=1) / 7, -blocks.min(axis=1) / 8)  # nothing is cut off
    whole = np.where(whole > 0, whole, np.float32(1)).astype(np.float32)  # a block of zeros
    scale, least = whole, np.full(whole.shape, np.inf, np.float32)
    for share in _SHARES:
        tried = whole * np.float32(share)
        error = np.square(blocks - _rounded(blocks, tried) * tried[:, None]).sum(axis=1)
        scale, least = np.where(error < least, tried, scale), np.minimum(error, least)
    q = _rounded(blocks, scale).astype(np.int8).reshape(moved.shape)
    return np.moveaxis(q, 0, axis), np.moveaxis(scale, 0, axis)


def _rounded(blocks: Array, scale: Array) -> Array:
    return np.clip(np.rint(blocks / scale[:, None]), -8, 7)


def at_opset(model: Any, opset: int) -> Any:
    """A ``ModelProto`` at least at ``opset``; most of what lies between 18 and 21 only takes more types.

    Raises: ModelError: onnx cannot convert it.
    """
    import onnx

    (main,) = [each for each in model.opset_import if each.domain in ("", "ai.onnx")]
    if main.version < 18 or (main.version < opset and _CHANGED_SINCE_18 & {node.op_type for node in model.graph.node}):
        try:
            model = onnx.version_converter.convert_version(model, opset)
        except Exception as error:  # the converter raises RuntimeError and classes of its own
            raise ModelError(
                f"The graph cannot be brought from opset {main.version} to {opset}: {first_line(error)}",
                hint="Export the model with a newer opset, or leave that precision out.",
            ) from error
        (main,) = [each for each in model.opset_import if each.domain in ("", "ai.onnx")]
    main.version = max(main.version, opset)
    model.ir_version = max(model.ir_version, _IR_VERSION)
    return model


def _nodes(graph: Any, block_size: int) -> list[Any]:
    import onnx

    weights = {
        tensor.name: tensor.dims
        for tensor in graph.initializer
        # One output is no work, and TensorRT takes no weight of a single block.
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2 and min(tensor.dims) > 1
    }
    return [
        node
        for node in graph.node
        if node.op_type in LINEAR
        and node.input[1] in weights
        and _fitting(weights[node.input[1]][_axis(node)], block_size) is not None
    ]


def _fitting(n: int, block_size: int) -> int | None:
    """The largest power of two up to ``block_size`` that divides ``n``, if it is any use."""
    while n % block_size:
        block_size //= 2
    return block_size if block_size >= _MIN_BLOCK_SIZE else None


def _axis(node: Any) -> int:
    """The inputs of a linear layer's weight."""
    return int(any(attribute.name == "transB" and attribute.i for attribute in node.attribute))


def _dequantized(weight: Array, name: str, axis: int, block_size: int) -> tuple[Any, list[Any]]:
    from onnx import TensorProto, helper, numpy_helper

    block = _fitting(weight.shape[axis], block_size)
    assert block is not None, "such weights are left alone"
    q, scale = pack_blocks(weight, axis=axis, block_size=block)
    flat = np.append(q.ravel(), np.int8(0))[: q.size + q.size % 2].view(np.uint8) & 0xF
    packed = flat[0::2] | flat[1::2] << 4  # ONNX puts the first of two in the lower half of a byte
    own = f"{name}_{axis}_int4"
    tensors = [
        helper.make_tensor(own, TensorProto.INT4, q.shape, packed.astype(np.uint8).tobytes(), raw=True),
        numpy_helper.from_array(np.ascontiguousarray(scale), f"{own}_scale"),
    ]
    node = helper.make_node(
        "DequantizeLinear",
        [own, f"{own}_scale"],
        [f"{own}_dequantized"],
        name=f"{own}_DequantizeLinear",
        axis=axis,
        block_size=block,
    )
    return node, tensors


def _drop_unread(graph: Any, candidates: set[str]) -> None:
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read or tensor.name not in candidates]
    del graph.initializer[:]
    graph.initializer.extend(kept)
