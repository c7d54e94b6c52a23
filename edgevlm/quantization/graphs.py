"""Reading ONNX graphs for quantization: what they hold, and which nodes a scheme makes int8."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from edgevlm.quantization.schemes import CONV, LINEAR, Scheme


def operator_counts(graph: Any) -> dict[str, int]:
    """How many nodes of each operator type a ``GraphProto`` has, by name."""
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


def selected_nodes(graph: Any, scheme: Scheme) -> list[Any]:
    """The nodes that ``scheme`` makes int8, in the graph's order (which is topological, as ONNX demands)."""
    weights = {tensor.name for tensor in graph.initializer}
    from_convolutions: set[str] = set()
    nodes = []
    for node in graph.node:
        activations = [name for name in node.input if name and name not in weights]
        in_chain = node.op_type in scheme.chain_op_types and all(name in from_convolutions for name in activations)
        if in_chain or (node.op_type in CONV and node.op_type in scheme.op_types):
            from_convolutions.update(node.output)
        if in_chain or (node.op_type in scheme.op_types and _has_weight(node, weights)):
            nodes.append(node)
    return nodes


def _has_weight(node: Any, weights: set[str]) -> bool:
    return node.op_type not in (*CONV, *LINEAR) or node.input[1] in weights


def has_external_data(graph: Path) -> bool:
    """Whether some weights lie in a file beside ``graph``."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    model = onnx.load(graph, load_external_data=False)
    return any(uses_external_data(tensor) for tensor in model.graph.initializer)
