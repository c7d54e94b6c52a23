"""Reading ONNX graphs for quantization: what they hold, which schemes suit them, which nodes a scheme makes int8."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import msgspec

from edgevlm.quantization.embeddings import embedding_names
from edgevlm.quantization.schemes import (
    CALIBRATIONS,
    CLAMPS,
    CONV,
    LINEAR,
    ActivationSign,
    Calibration,
    Scheme,
    schemes_for,
)


def operator_counts(graph: Any) -> dict[str, int]:
    """How many nodes of each operator type a ``GraphProto`` has, by name."""
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


def schemes_of_graph(
    prepared: Path,
    *,
    activation_sign: ActivationSign,
    methods: Iterable[Calibration] = CALIBRATIONS,
    reduce_range: bool = False,
) -> tuple[Scheme, ...]:
    """Those of ``schemes_for`` that make this graph int8, each in a way of its own."""
    import onnx

    graph = onnx.load(prepared, load_external_data=False).graph
    schemes = schemes_for(
        activation_sign=activation_sign,
        op_counts=operator_counts(graph),
        methods=methods,
        reduce_range=reduce_range,
    )
    by_effect: dict[tuple[object, ...], Scheme] = {}
    for scheme in schemes:
        nodes = selected_nodes(graph, scheme)
        kept_float = {node.op_type for node in nodes} & set(scheme.float_output_op_types)
        effect = (scheme.method, scheme.calibration, tuple(node.name for node in nodes), frozenset(kept_float))
        if any(node.op_type in scheme.op_types for node in nodes):
            by_effect.setdefault(effect, scheme)
    embedding_bits = 8 if embedding_names(graph) else None
    return tuple(msgspec.structs.replace(s, embedding_bits=embedding_bits) for s in by_effect.values())


def lowered_names(prepared: Path, scheme: Scheme) -> tuple[str, ...]:
    """Embeddings, convolutions and matrix products that ``scheme`` makes int8, by name, in the graph's order."""
    import onnx

    graph = onnx.load(prepared, load_external_data=False).graph
    names = {node.name for node in selected_nodes(graph, scheme) if node.op_type in (*CONV, *LINEAR)}
    names.update(embedding_names(graph) if scheme.embedding_bits else ())
    return tuple(node.name for node in graph.node if node.name in names)


def has_embedding(prepared: Path) -> bool:
    """Whether a graph reads rows of a table by number, as a text tower does."""
    import onnx

    return bool(embedding_names(onnx.load(prepared, load_external_data=False).graph))


def selected_nodes(graph: Any, scheme: Scheme, keep_float: Container[str] = ()) -> list[Any]:
    """The nodes that ``scheme`` makes int8, in the graph's order (which is topological, as ONNX demands).

    Args:    keep_float: names of nodes that it leaves alone.
    """
    weights = {tensor.name for tensor in graph.initializer}
    from_convolutions: set[str] = set()
    from_kept: set[str] = set()
    nodes = []
    chain: set[str] = set()
    for node in graph.node:
        activations = [name for name in node.input if name and name not in weights]
        # A clamp behind a float layer fuses into it; in int8 it would cost a quantize and a dequantize.
        if node.name in keep_float or (node.op_type in CLAMPS and not from_kept.isdisjoint(activations)):
            from_kept.update(node.output)
            continue
        in_chain = node.op_type in scheme.chain_op_types and all(name in from_convolutions for name in activations)
        if in_chain or (node.op_type in CONV and node.op_type in scheme.op_types):
            from_convolutions.update(node.output)
        if in_chain or (node.op_type in scheme.op_types and _has_weight(node, weights)):
            nodes.append(node)
        if in_chain and node.op_type not in CLAMPS:
            chain.add(node.name)
    return _without_loose_ends(nodes, chain)


def _without_loose_ends(nodes: list[Any], chain: Container[str]) -> list[Any]:
    """The nodes less those of a chain that leads to no other int8 node.

    What stands behind the last layer gains nothing by int8 and can lose all: a detector's Concat would give boxes and
    scores one range (YOLOX-nano lost 20 points of mAP50 by it).
    """
    kept = []
    read: set[str] = set()
    for node in reversed(nodes):
        if node.name not in chain or not read.isdisjoint(node.output):
            kept.append(node)
            read.update(node.input)
    return kept[::-1]


def _has_weight(node: Any, weights: set[str]) -> bool:
    return node.op_type not in (*CONV, *LINEAR) or node.input[1] in weights


def has_external_data(graph: Path) -> bool:
    """Whether some weights lie in a file beside ``graph``."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    model = onnx.load(graph, load_external_data=False)
    return any(uses_external_data(tensor) for tensor in model.graph.initializer)


def fix_batch(graph: Path, batch: int, out: Path) -> Path:
    """Write a graph of free batch for calls of ``batch`` pictures; its values keep their names."""
    import onnx
    from onnx.external_data_helper import convert_model_to_external_data

    model = onnx.load(graph)
    for value in (*model.graph.input, *model.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if first.dim_param:
            first.dim_value = batch
    del model.graph.value_info[:]  # they hold the free batch; inferred again
    if has_external_data(graph):
        convert_model_to_external_data(model, location=f"{out.name}.data")
    onnx.save(model, out)
    return out
