"""Where ONNX Runtime put quantizers in a graph, read back from the graph that it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgevlm.quantization.graphs import selected_nodes
from edgevlm.quantization.schemes import CONV, LINEAR, Scheme
from edgevlm.runtime.spec import Spec

# What only moves values about: quantizing before it and after it is the same.
_MOVES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity"})
# What ONNX Runtime's quantizer adds to names.
_SCALE, _QUANTIZED, _INPUT = "_scale", "_quantized", "_QuantizeLinear_Input"


class QuantizedValue(Spec, frozen=True, kw_only=True):
    """An activation that is quantized.

    Args:
        name: in the prepared graph.
        owner: the value whose scale it has; values that are only moved share one.
        low, high: the range that its integers cover.
        source: the value that ``name`` only moves; ``name`` itself where it is computed.
        readers: names of the layers that read it, where ``source`` has other readers that see it unquantized.
    """

    name: str
    owner: str
    low: float
    high: float
    source: tuple[str, ...]
    readers: tuple[str, ...]


class QuantizedWeight(Spec, frozen=True, kw_only=True):
    """A convolution or linear layer whose weight is quantized.

    Args:
        node: its name in the prepared graph.
        weight: the initializer.
        axis: of the output channels in it.
        bias_by: the owner of the scale by which its bias becomes int32; empty where there is no bias, or a float one.
        results: names under which its result appears, nearest first: bias and reshapes are nodes of their own.
    """

    node: str
    weight: str
    axis: int
    bias_by: str
    results: tuple[str, ...]


class Placement(Spec, frozen=True, kw_only=True):
    """Every quantizer of a graph."""

    values: tuple[QuantizedValue, ...]
    weights: tuple[QuantizedWeight, ...]

    def names(self) -> tuple[str, ...]:
        """What two placements must have in common to be the same."""
        return (*sorted(value.name for value in self.values), *sorted(each.weight for each in self.weights))


def read_placement(prepared: Path, quantized: Path, scheme: Scheme) -> Placement:
    """The quantizers that ``scheme`` put into ``prepared``.

    Args:
        quantized: what ``quantize`` made of ``prepared`` by ``scheme``.
    """
    import onnx

    before = onnx.load(prepared, load_external_data=False).graph
    after = onnx.load(quantized).graph
    constants = {tensor.name: tensor for tensor in after.initializer}
    producers = {name: node for node in before.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in before.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    layers = [
        node
        for node in selected_nodes(before, scheme)
        if node.op_type in (*CONV, *LINEAR) and f"{node.input[1]}{_QUANTIZED}" in constants
    ]
    names = {node.name for node in layers}
    values = []
    for node in after.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in constants:
            continue
        scale, zero = (onnx.numpy_helper.to_array(constants[name]) for name in node.input[1:3])
        first, last = (0, 255) if zero.dtype == "uint8" else (-128, 127)
        name = node.input[0].removesuffix(_INPUT)
        values.append(
            QuantizedValue(
                name=name,
                owner=node.input[1].removesuffix(_SCALE),
                low=float((first - int(zero)) * scale),
                high=float((last - int(zero)) * scale),
                source=_moved_from(name, producers),
                readers=tuple(reader.name for reader in readers.get(name, ()) if reader.name in names),
            )
        )
    owners = {value.name: value.owner for value in values}
    biased = {node.name for node in layers if len(node.input) > 2 and f"{node.input[2]}{_QUANTIZED}" in constants}
    return Placement(
        values=tuple(values),
        weights=tuple(
            QuantizedWeight(
                node=node.name,
                weight=node.input[1],
                axis=_channel_axis(node),
                bias_by=owners[node.input[0]] if node.name in biased else "",
                results=_results(node, readers),
            )
            for node in layers
        ),
    )


def _moved_from(name: str, producers: dict[str, Any]) -> tuple[str, ...]:
    """The value itself, then what it is moved from, step by step back to where it is computed."""
    found = [name]
    while (node := producers.get(found[-1])) is not None and node.op_type in _MOVES:
        found.append(node.input[0])
    return tuple(found)


def _results(layer: Any, readers: dict[str, list[Any]]) -> tuple[str, ...]:
    found = [layer.output[0]]
    while len(following := readers.get(found[-1], [])) == 1 and following[0].op_type in (*_MOVES, "Add"):
        found.append(following[0].output[0])
        if following[0].op_type == "Add":  # at most its own bias: the next one is a residual
            break
    return tuple(found)


def _channel_axis(node: Any) -> int:
    if node.op_type in CONV:
        return 0
    is_transposed = any(each.name == "transB" and each.i for each in node.attribute)
    return 0 if is_transposed else 1
