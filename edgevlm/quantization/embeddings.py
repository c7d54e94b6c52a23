"""Embeddings in 8 or 4 bits: rows are read and scaled one by one, so a small table costs no time and few bits."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal

import numpy as np

from edgevlm.runtime.spec import Array

Bits = Literal[4, 8]
MICROSOFT = "com.microsoft"

# The least that GatherBlockQuantized and MatMulNBits take.
MIN_BLOCK_SIZE = 16
# In 8 bits larger blocks lose nothing that shows, and smaller ones cost bytes.
EMBEDDING_BLOCK_SIZE = 128
# Share of padding at which a smaller block is taken: a layer of 64 inputs in blocks of 128 would be half zeros.
_MAX_PADDING = 1 / 8


def fitting_block_size(n_values: int, block_size: int) -> int:
    """The largest power of two up to ``block_size`` that cuts ``n_values`` into blocks with little padding.

    Example:
        >>> [fitting_block_size(n, 128) for n in (768, 64, 96, 100)]
        [128, 64, 32, 16]
    """
    while block_size > MIN_BLOCK_SIZE and -n_values % block_size > n_values * _MAX_PADDING:
        block_size //= 2
    return block_size


def embedding_nodes(graph: Any) -> list[Any]:
    """Gathers of whole rows out of a constant float table."""
    import onnx

    tables = {
        tensor.name: tensor.dims
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2 and _can_pack(tensor.dims[1])
    }
    return [
        node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables and _axis(node) in (0, -2)
    ]


def embedding_names(graph: Any) -> tuple[str, ...]:
    """Names of ``embedding_nodes``."""
    return tuple(node.name for node in embedding_nodes(graph))


def quantize_embeddings(
    model: Any, *, bits: Bits, block_size: int, is_symmetric: bool = False, keep_float: Container[str] = ()
) -> int:
    """Make the embeddings of a ``ModelProto`` small, in place; nodes named in ``keep_float`` stay as they are.

    Returns: how many there were.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    nodes = [node for node in embedding_nodes(graph) if node.name not in keep_float]
    tables = {tensor.name: tensor for tensor in graph.initializer}
    packed: dict[str, tuple[list[str], int]] = {}
    for node in nodes:
        name = node.input[0]
        if name not in packed:
            table = numpy_helper.to_array(tables[name])
            block = fitting_block_size(table.shape[1], block_size)
            values = pack_rows(table, bits=bits, block_size=block, is_symmetric=is_symmetric)
            parts = {f"{name}_{part}": value for part, value in zip(("rows", "scales", "zeros"), values, strict=True)}
            made = {part: value for part, value in parts.items() if value is not None}
            graph.initializer.extend(numpy_helper.from_array(value, part) for part, value in made.items())
            packed[name] = (list(made), block)
        (rows, *rest), block = packed[name]
        node.CopyFrom(
            helper.make_node(
                "GatherBlockQuantized",
                [rows, node.input[1], *rest],
                list(node.output),
                name=node.name,
                domain=MICROSOFT,
                bits=bits,
                block_size=block,
                gather_axis=0,
                quantize_axis=1,
            )
        )
    if nodes:
        use_microsoft(model)
        drop_unused_weights(graph)
    return len(nodes)


def pack_rows(table: Array, *, bits: Bits, block_size: int, is_symmetric: bool) -> tuple[Array, Array, Array | None]:
    """Quantize a table row by row, in blocks along each row, as ONNX Runtime quantizes the weight of a linear layer.

    Shapes:  table [R, C] -> rows [R, C * bits / 8] of bytes, scales [R, blocks], zero points [R, blocks * bits / 8].
    Returns: ``(rows, scales, zeros)``; ``zeros`` is null where ``is_symmetric``: the middle of the range then.
    """
    from onnxruntime.capi import _pybind_state as kernels  # what its own MatMulNBitsQuantizer calls

    n_rows, n_columns = table.shape
    n_blocks = -(-n_columns // block_size)
    padded = np.pad(table.astype(np.float32), ((0, 0), (0, n_blocks * block_size - n_columns)))
    packed = np.zeros((n_rows, n_blocks, block_size * bits // 8), np.uint8)
    scales = np.zeros((n_rows, n_blocks), np.float32)
    zeros = np.zeros((n_rows, -(-n_blocks * bits // 8)), np.uint8)
    quantize = kernels.quantize_matmul_4bits if bits == 4 else kernels.quantize_matmul_8bits
    quantize(packed, np.ascontiguousarray(padded.T), scales, zeros, block_size, n_rows, n_columns, is_symmetric)
    rows = np.ascontiguousarray(packed.reshape(n_rows, -1)[:, : n_columns * bits // 8])
    return rows, scales, None if is_symmetric else zeros


def use_microsoft(model: Any) -> None:
    """Declare ONNX Runtime's own operators."""
    from onnx import helper

    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def drop_unused_weights(graph: Any) -> None:
    """Leave out initializers that nothing reads, and repetitions of one."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = {tensor.name: tensor for tensor in graph.initializer if tensor.name in read}
    copies = list(kept.values())
    del graph.initializer[:]
    graph.initializer.extend(copies)


def _can_pack(n_columns: int) -> bool:
    return n_columns >= MIN_BLOCK_SIZE and n_columns % 2 == 0


def _axis(node: Any) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
