"""Weights in 8 or 4 bits, block by block, while activations stay float. ONNX Runtime's quantizer packs the weights.

Linear layers become ``MatMulNBits``, embeddings ``GatherBlockQuantized``: both read the packed weights as they are.
"""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.errors import ModelError
from edgevlm.quantization.embeddings import (
    MIN_BLOCK_SIZE,
    Bits,
    drop_unused_weights,
    embedding_nodes,
    fitting_block_size,
    quantize_embeddings,
)
from edgevlm.quantization.graphs import has_external_data
from edgevlm.quantization.post_training import external_file, first_line, kernel_counts, quiet, save_model
from edgevlm.quantization.schemes import LINEAR
from edgevlm.runtime.spec import Spec

# MatMulNBits' ``accuracy_level``: 4 quantizes its input to int8 as it comes, the fast path on CPUs.
_ACCURACY_LEVEL = 4
_FLOAT_PRODUCTS = ("FusedGemm", "FusedMatMul", "Gemm", "MatMul")


class WeightScheme(Spec, frozen=True, kw_only=True):
    """One way to make weights small.

    Args:
        bits: of a linear layer's weight.
        block_size: inputs of an output that share a scale, a power of two from 16 on. Narrow layers take smaller
            blocks.
        is_symmetric: no zero points.
        embedding_bits: of an embedding's table; null leaves embeddings float.
    """

    name: str
    bits: Bits
    block_size: int
    is_symmetric: bool
    embedding_bits: Bits | None = 8

    def __post_init__(self) -> None:
        if self.block_size < MIN_BLOCK_SIZE or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size: {self.block_size} is no power of two from {MIN_BLOCK_SIZE} on")

    @property
    def precision(self) -> str:
        """``int8-weights`` or ``int4-weights``."""
        return f"int{self.bits}-weights"

    def describe(self) -> dict[str, str]:
        """The scheme in words, for a report."""
        return {
            "method": "weight-only",
            "activations": "float",
            "weights": f"{self.bits} bits in blocks of {self.block_size}"
            + ("" if self.is_symmetric else " with zero points"),
            "embeddings": f"{self.embedding_bits} bits" if self.embedding_bits else "float",
        }


# docs/quantization.md has what was measured: 8 bits lose nothing even in large blocks, 4 bits need small ones.
WEIGHT_SCHEMES = (
    WeightScheme(name="int8-weights-block128", bits=8, block_size=128, is_symmetric=True),
    WeightScheme(name="int4-weights-block32", bits=4, block_size=32, is_symmetric=False),
    WeightScheme(name="int4-weights-block128", bits=4, block_size=128, is_symmetric=False),
)


class WeightFusion(Spec, frozen=True, kw_only=True):
    """What ONNX Runtime really runs, after its own fusions.

    Args:
        n_packed: linear layers whose weights it reads packed.
        n_embeddings: embeddings that it reads packed.
        n_float: matrix products left in float (products of two activations are meant to be).
    """

    n_packed: int
    n_embeddings: int
    n_float: int

    def describe(self) -> str:
        """In words, for a report."""
        return (
            f"{self.n_packed} linear layers and {self.n_embeddings} embeddings with packed weights, "
            f"{self.n_float} matrix products in float"
        )


class WeightQuantized(Spec, frozen=True, kw_only=True):
    """A graph with packed weights.

    Args:
        files: names in the folder of the graph: it first, then its external data.
    """

    files: tuple[str, ...]
    fusion: WeightFusion


def weight_nodes(graph: Any, scheme: WeightScheme) -> list[Any]:
    """The nodes of a prepared graph whose weights ``scheme`` makes small, in the graph's order."""
    import onnx

    weights = {
        tensor.name: tensor.dims
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
    }
    embeddings = {node.name for node in embedding_nodes(graph)} if scheme.embedding_bits else set()
    return [node for node in graph.node if node.name in embeddings or _is_linear(node, weights)]


def weight_names(prepared: Path, scheme: WeightScheme) -> tuple[str, ...]:
    """Names of ``weight_nodes``."""
    import onnx

    return tuple(node.name for node in weight_nodes(onnx.load(prepared, load_external_data=False).graph, scheme))


def weight_schemes_of_graph(prepared: Path) -> tuple[WeightScheme, ...]:
    """Those of ``WEIGHT_SCHEMES`` that find something in a graph."""
    return tuple(scheme for scheme in WEIGHT_SCHEMES if weight_names(prepared, scheme))


def quantize_weights(
    prepared: Path, scheme: WeightScheme, *, out: Path, keep_float: Container[str] = ()
) -> WeightQuantized:
    """Write ``prepared`` with its weights made small by ``scheme``. The same graph and scheme give the same bytes.

    Args:    keep_float: nodes, by name, that keep their weights.
    Raises:  ModelError: there is nothing to quantize, or ONNX Runtime refuses.
    """
    import onnx

    model = onnx.load(prepared)
    nodes = [node for node in weight_nodes(model.graph, scheme) if node.name not in keep_float]
    if not nodes:
        raise ModelError(
            f"'{prepared.name}' has no linear layer and no embedding that {scheme.name} could make smaller.",
            hint="Leave that precision out: convolutions have int8-static.",
        )
    linear = {node.name for node in nodes if node.op_type in LINEAR}
    is_large = has_external_data(prepared)
    with tempfile.TemporaryDirectory(prefix=".edgevlm-", dir=out.parent) as folder, quiet():
        written = Path(folder) / out.name
        try:
            if scheme.embedding_bits:
                quantize_embeddings(
                    model, bits=scheme.embedding_bits, block_size=scheme.block_size, keep_float=keep_float
                )
            if linear:
                _gemms_to_matmuls(model.graph, linear)
                model = _quantize_linear(model, linear, scheme)
                drop_unused_weights(model.graph)
            save_model(model, written, is_large=is_large)
        except Exception as error:  # the quantizer raises bare ValueError, RuntimeError, AssertionError, ...
            raise ModelError(
                f"ONNX Runtime cannot quantize '{prepared.name}' by {scheme.name}: {first_line(error)}",
                hint="Leave that precision out, or compile with --precision fp32.",
            ) from error
        fusion = weight_fusion_of(written)
        files = [out.name]
        if is_large:
            external_file(written).replace(external_file(out))
            files.append(external_file(out).name)
        written.replace(out)
    return WeightQuantized(files=tuple(files), fusion=fusion)


def weight_fusion_of(file: Path) -> WeightFusion:
    """Let ONNX Runtime optimise ``file`` and count what it will run.

    Raises: ModelError: it does not open the graph.
    """
    counts = kernel_counts(file)
    return WeightFusion(
        n_packed=counts.get("MatMulNBits", 0),
        n_embeddings=counts.get("GatherBlockQuantized", 0),
        n_float=sum(counts.get(op, 0) for op in _FLOAT_PRODUCTS),
    )


def _is_linear(node: Any, weights: dict[str, Any]) -> bool:
    if node.op_type not in LINEAR or node.input[1] not in weights:
        return False
    attributes = {attribute.name: attribute for attribute in node.attribute}
    is_plain = all(attributes[name].f == 1.0 for name in ("alpha", "beta") if name in attributes)
    n_inputs = weights[node.input[1]][1 if _is_transposed(node) else 0]
    return is_plain and not ("transA" in attributes and attributes["transA"].i) and n_inputs >= MIN_BLOCK_SIZE


def _is_transposed(node: Any) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _gemms_to_matmuls(graph: Any, linear: Container[str]) -> None:
    """The quantizer knows MatMul alone; a Gemm is one with a bias, and often with its weight transposed."""
    from onnx import helper, numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != "Gemm" or node.name not in linear:
            nodes.append(node)
            continue
        weight = node.input[1]
        if _is_transposed(node):
            weight = f"{node.name}_weight"
            turned = np.ascontiguousarray(numpy_helper.to_array(weights[node.input[1]]).T)
            graph.initializer.append(numpy_helper.from_array(turned, weight))
        has_bias = len(node.input) > 2 and bool(node.input[2])
        product = f"{node.output[0]}_product" if has_bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], weight], [product], name=node.name))
        if has_bias:
            nodes.append(helper.make_node("Add", [product, node.input[2]], list(node.output), name=f"{node.name}_bias"))
    del graph.node[:]
    graph.node.extend(nodes)


def _quantize_linear(model: Any, linear: Container[str], scheme: WeightScheme) -> Any:
    """One pass for each block size that some layer's width asks for."""
    widths = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 2}
    by_block: dict[int, set[str]] = defaultdict(set)
    matmuls = [node for node in model.graph.node if node.op_type == "MatMul"]
    for node in matmuls:
        if node.name in linear:
            by_block[fitting_block_size(widths[node.input[1]], scheme.block_size)].add(node.name)
    for block_size, names in sorted(by_block.items()):
        quantizer = _quantizer()(
            model,
            bits=scheme.bits,
            block_size=block_size,
            is_symmetric=scheme.is_symmetric,
            accuracy_level=_ACCURACY_LEVEL,
            nodes_to_exclude=[node.name for node in matmuls if node.name not in names],
        )
        quantizer.process()
        model = quantizer.model.model
    return model


def _quantizer() -> Any:
    """ONNX Runtime's class; its module sets up the root logger when it is imported, which is not its to do."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    root.handlers[:] = handlers
    root.setLevel(level)
    return MatMulNBitsQuantizer
