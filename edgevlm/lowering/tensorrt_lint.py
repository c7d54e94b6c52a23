"""What TensorRT would reject in an ONNX graph, or take and compute otherwise than meant; TensorRT is not needed.

What it rejects was found with the parser of TensorRT for RTX 1.7.1, which the tests ask again. What it takes wrongly
(signed 8 bits for unsigned ones, scales along the wrong axis) stands in docs.nvidia.com/deeplearning/tensorrt, "Working
with Quantized Types" and "Explicit Quantization": scales are per tensor for activations and per output channel or per
block for weights, and zero points are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgevlm.errors import ModelError
from edgevlm.runtime.engine import ShapeRange
from edgevlm.runtime.spec import Array, Spec

Kind = Literal[
    "q-operator", "dynamic-quantization", "contrib-operator", "unsupported-operator", "int16", "uint4", "zero-point",
    "uint8-weights", "uint8-activations", "int32-bias", "scale", "uneven-blocks", "single-block", "weight-axis",
    "per-channel-activations", "shape-range",
]  # fmt: skip
Effect = Literal["rejected", "wrong"]

_Q_OPERATORS = ("ConvInteger", "MatMulInteger")
# Contrib operators that TensorRT reads as the ONNX operators of the same name, which they are.
_READABLE_CONTRIB = frozenset({"DequantizeLinear", "Gelu", "QuantizeLinear"})
# ONNX's own that its parser does not have: each was tried. Those that full TensorRT may read by a plugin (DeformConv,
# DFT) are left to the parser.
_UNSUPPORTED = frozenset({
    "AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad",
    "Col2Im", "Compress", "Det", "MaxRoiPool", "MaxUnpool", "Multinomial", "SequenceConstruct", "SplitToSequence",
    "Unique",
})  # fmt: skip
_STANDARD_DOMAINS = ("", "ai.onnx")


class Finding(Spec, frozen=True, kw_only=True):
    """Something that TensorRT would not do as the graph says.

    Args:
        node: its name; of what belongs to no node, the name of the tensor.
        op_type: ``Input`` or ``Initializer`` where there is no node.
        what: one sentence.
        remedy: one sentence.
        effect: ``rejected``, or taken and computed ``wrong``.
    """

    kind: Kind
    node: str
    op_type: str
    what: str
    remedy: str
    effect: Effect = "rejected"

    def describe(self) -> str:
        """In one sentence: ``node 'q' (QuantizeLinear) has zero points that are not zero``."""
        return f"{_where(self)} {self.what.rstrip('.')}"


def lint(
    graph: Path,
    *,
    shapes: Mapping[str, ShapeRange] | None = None,
    fed: Sequence[Mapping[str, tuple[int, ...]]] = (),
) -> tuple[Finding, ...]:
    """What TensorRT would reject or get wrong, in the order of the rules and of the nodes; empty if nothing.

    Args:
        shapes: the sizes that an engine is to be built for, by input; null leaves them out.
        fed: sizes that it will be run with, by input; they must lie within ``shapes``.
    Raises: ModelError: the file is no ONNX graph.
    """
    facts = _read(graph, shapes, tuple(fed))
    return tuple(finding for rule in RULES for finding in rule(facts))


def check_graph(
    graph: Path,
    *,
    shapes: Mapping[str, ShapeRange] | None = None,
    fed: Sequence[Mapping[str, tuple[int, ...]]] = (),
) -> None:
    """``lint``, where any finding is an error.

    Raises: ModelError: TensorRT would reject the graph or compute something else.
    """
    findings = lint(graph, shapes=shapes, fed=fed)
    if not findings:
        return
    first, n_more = findings[0], len(findings) - 1
    verb = "rejects" if first.effect == "rejected" else "would not compute what is meant by"
    more = f", and {n_more} more like it or of another kind" if n_more else ""
    raise ModelError(f"TensorRT {verb} '{graph.name}': {first.describe()}{more}.", hint=first.remedy)


# --- what the rules see -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """A graph as the rules see it; its functions and the bodies of its loops and branches count as parts of it.

    Args:
        constants: initializers and the values of Constant nodes, by name.
        types: what ONNX calls the element types of tensors, by name, as far as they are known.
    """

    folder: Path
    model: Any
    nodes: tuple[Any, ...]
    constants: dict[str, Any]
    types: dict[str, int]
    shapes: Mapping[str, ShapeRange] | None
    fed: tuple[Mapping[str, tuple[int, ...]], ...]
    _values: dict[str, Array] = field(default_factory=dict)

    @cached_property
    def producers(self) -> dict[str, Any]:
        return {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def readers(self) -> dict[str, list[tuple[Any, int]]]:
        """Nodes that read a tensor, and by which of their inputs."""
        found: dict[str, list[tuple[Any, int]]] = {}
        for node in self.nodes:
            for index, name in enumerate(node.input):
                found.setdefault(name, []).append((node, index))
        return found

    def linear(self, *op_types: str) -> Iterator[Any]:
        """Nodes of Q/DQ form."""
        return (node for node in self.nodes if node.op_type in (op_types or ("QuantizeLinear", "DequantizeLinear")))

    def value(self, name: str) -> Array | None:
        """A constant's numbers; null where the tensor is none."""
        from onnx import numpy_helper

        if name in self.constants and name not in self._values:
            self._values[name] = numpy_helper.to_array(self.constants[name], str(self.folder))
        return self._values.get(name)

    def input_value(self, node: Any, index: int) -> Array | None:
        return self.value(_input(node, index))

    def source(self, node: Any) -> Any | None:
        """The constant that a Q/DQ pair or a DequantizeLinear alone is over: a weight. Null for an activation."""
        name = _input(node, 0)
        while name not in self.constants:
            producer = self.producers.get(name)
            if producer is None or producer.op_type not in ("QuantizeLinear", "Identity", "Cast"):
                return None
            name = _input(producer, 0)
        return self.constants[name]


def _read(
    graph: Path, shapes: Mapping[str, ShapeRange] | None, fed: tuple[Mapping[str, tuple[int, ...]], ...]
) -> _Facts:
    import onnx

    try:
        # Without the weights: types do not depend on them, and with them a model may be more than protobuf carries.
        model = onnx.load(graph, load_external_data=False)
    except Exception as error:  # protobuf and onnx share no base but Exception
        raise ModelError(f"'{graph}' is not an ONNX graph.", hint="Export the model anew.") from error
    graphs = [model.graph, *_bodies(model.graph.node)]
    nodes = [node for each in graphs for node in each.node]
    nodes += [node for function in model.functions for node in function.node]
    constants = {tensor.name: tensor for each in graphs for tensor in each.initializer}
    constants |= {
        node.output[0]: attribute.t
        for node in nodes
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    return _Facts(
        folder=graph.parent,
        model=model,
        nodes=tuple(nodes),
        constants=constants,
        types=_types(model, constants),
        shapes=shapes,
        fed=fed,
    )


def _bodies(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield body
                yield from _bodies(body.node)


def _types(model: Any, constants: Mapping[str, Any]) -> dict[str, int]:
    import onnx

    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # an operator that it does not know; what the graph says itself is left
        inferred = model.graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {name: tensor.data_type for name, tensor in constants.items()}


def _input(node: Any, index: int) -> str:
    return str(node.input[index]) if index < len(node.input) else ""


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _name(node: Any) -> str:
    """What TensorRT calls a node without a name is not the graph's; its first output is."""
    return str(node.name or next(iter(node.output), ""))


def _found(kind: Kind, node: Any, what: str, remedy: str, *, effect: Effect = "rejected") -> Finding:
    return Finding(kind=kind, node=_name(node), op_type=node.op_type, what=what, remedy=remedy, effect=effect)


def _where(finding: Finding) -> str:
    if finding.op_type in ("Input", "Initializer"):
        return f"{finding.op_type.lower()} '{finding.node}'"
    return f"node '{finding.node}' ({finding.op_type})"


# --- operators --------------------------------------------------------------------------------------------


def q_operators(facts: _Facts) -> Iterator[Finding]:
    """Operators that compute in integers themselves."""
    for node in facts.nodes:
        if node.op_type.startswith("QLinear") or node.op_type in _Q_OPERATORS:
            yield _found(
                "q-operator", node, "is an operator over integers, which TensorRT does not have.",
                "Quantize in Q/DQ form: QuantizeLinear and DequantizeLinear around the float operator.",
            )  # fmt: skip


def dynamic_quantization(facts: _Facts) -> Iterator[Finding]:
    for node in facts.nodes:
        if node.op_type == "DynamicQuantizeLinear":
            yield _found(
                "dynamic-quantization", node, "finds the range of its input as it comes, in unsigned 8 bits.",
                "Quantize statically, with ranges from calibration data.",
            )  # fmt: skip


def contrib_operators(facts: _Facts) -> Iterator[Finding]:
    ours = {(function.domain, function.name) for function in facts.model.functions}
    for node in facts.nodes:
        is_known = node.domain in _STANDARD_DOMAINS or (node.domain, node.op_type) in ours
        if not is_known and node.op_type not in _READABLE_CONTRIB:
            yield _found(
                "contrib-operator", node, f"is an operator of {node.domain}, which TensorRT does not have.",
                "Export the graph anew and leave out ONNX Runtime's own fusions and weight-only quantizer.",
            )  # fmt: skip


def unsupported_operators(facts: _Facts) -> Iterator[Finding]:
    for node in facts.nodes:
        if node.domain in _STANDARD_DOMAINS and node.op_type in _UNSUPPORTED:
            yield _found(
                "unsupported-operator", node, "is an operator that TensorRT does not have.",
                "Export the model without it, or use another backend.",
            )  # fmt: skip


# --- types ------------------------------------------------------------------------------------------------


def int16(facts: _Facts) -> Iterator[Finding]:
    """16-bit integers, even in an initializer that nothing reads."""
    remedy = "Quantize activations to 8 bits, or leave that part in float."
    yield from _of_type(facts, "int16", ("INT16", "UINT16"), remedy)


def uint4(facts: _Facts) -> Iterator[Finding]:
    remedy = "Quantize weights to signed 4 bits (symmetric, without zero points)."
    yield from _of_type(facts, "uint4", ("UINT4",), remedy)


def _of_type(facts: _Facts, kind: Kind, names: tuple[str, ...], remedy: str) -> Iterator[Finding]:
    """One finding for each node that reads or writes such a tensor first, and for tensors that no node touches."""
    from onnx import TensorProto

    wanted = {TensorProto.DataType.Value(name): name.lower() for name in names}
    tensors = {name: wanted[kind] for name, kind in facts.types.items() if kind in wanted}
    told: set[str] = set()
    for node in facts.nodes:
        mine = [name for name in (*node.input, *node.output) if name in tensors]
        if any(name not in told for name in mine):
            yield _found(kind, node, f"has {tensors[mine[0]]} numbers, a type that TensorRT does not have.", remedy)
        told.update(mine)
    for name in tensors.keys() - told:
        op_type = "Initializer" if name in facts.constants else "Input"
        what = f"has {tensors[name]} numbers, a type that TensorRT does not have."
        yield Finding(kind=kind, node=name, op_type=op_type, what=what, remedy=remedy)


# --- Q/DQ -------------------------------------------------------------------------------------------------


def zero_points(facts: _Facts) -> Iterator[Finding]:
    for node in facts.linear():
        zeros = facts.input_value(node, 2)
        if zeros is not None and np.any(zeros.astype(np.int64) != 0):
            yield _found(
                "zero-point", node, "has zero points that are not zero; TensorRT's quantization is symmetric.",
                "Quantize symmetrically, to signed 8 bits.",
            )  # fmt: skip


def uint8_weights(facts: _Facts) -> Iterator[Finding]:
    from onnx import TensorProto

    for node in facts.linear("DequantizeLinear"):
        if facts.types.get(_input(node, 0)) == TensorProto.UINT8 and _input(node, 0) in facts.constants:
            yield _found(
                "uint8-weights", node, "has weights of unsigned 8 bits.", "Quantize weights to signed 8 bits."
            )  # fmt: skip


def uint8_activations(facts: _Facts) -> Iterator[Finding]:
    """With zero points of zero they are taken, and then for signed ones: what is above 127 steps is cut off."""
    from onnx import TensorProto

    for node in facts.linear("QuantizeLinear"):
        zeros = facts.input_value(node, 2)
        if zeros is not None and np.any(zeros != 0):
            continue  # told of already
        asked = _attribute(node, "output_dtype", 0)
        if _input(node, 2):
            is_unsigned, effect = facts.types.get(_input(node, 2)) == TensorProto.UINT8, "wrong"
        else:  # without either it is unsigned: so ONNX says, and TensorRT does not
            is_unsigned, effect = asked in (0, TensorProto.UINT8), "rejected" if asked else "wrong"
        if is_unsigned:
            yield _found(
                "uint8-activations", node, "quantizes to unsigned 8 bits, which TensorRT takes for signed ones.",
                "Quantize activations to signed 8 bits.", effect="rejected" if effect == "rejected" else "wrong",
            )  # fmt: skip


def int32_bias(facts: _Facts) -> Iterator[Finding]:
    from onnx import TensorProto

    for node in facts.linear("DequantizeLinear"):
        if facts.types.get(_input(node, 0)) == TensorProto.INT32:
            yield _found(
                "int32-bias", node, "dequantizes 32-bit integers, as ONNX Runtime writes biases.",
                "Leave biases in float.",
            )  # fmt: skip


def scales(facts: _Facts) -> Iterator[Finding]:
    for node in facts.linear():
        scale = facts.input_value(node, 1)
        if scale is not None and not np.all(np.isfinite(scale) & (scale > 0)):
            yield _found(
                "scale", node, "has scales that are not positive numbers.",
                "Quantize anew; in float16 a scale below 6e-8 becomes 0, so leave that layer in float32.",
            )  # fmt: skip


def uneven_blocks(facts: _Facts) -> Iterator[Finding]:
    """TensorRT takes the size of a block from the number of scales, not from ``block_size``."""
    for node in facts.linear():
        block, scale, weight = _attribute(node, "block_size", 0), facts.input_value(node, 1), facts.source(node)
        if not block or scale is None or weight is None:
            continue
        axis = _attribute(node, "axis", 1) % len(weight.dims)
        n, n_blocks = weight.dims[axis], scale.shape[axis]
        if n % block:
            yield _found(
                "uneven-blocks", node, f"cuts {n} weights into blocks of {block}, which leaves a rest.",
                "Take a block size that divides them, or leave that layer in float.",
                effect="wrong" if n % n_blocks == 0 else "rejected",
            )  # fmt: skip


def single_blocks(facts: _Facts) -> Iterator[Finding]:
    for node in facts.linear():
        scale = facts.input_value(node, 1)
        if _attribute(node, "block_size", 0) and scale is not None and scale.size == 1:
            yield _found(
                "single-block", node, "has one block for a whole weight.",
                "Take smaller blocks, or leave that layer in float.",
            )  # fmt: skip


def per_channel_activations(facts: _Facts) -> Iterator[Finding]:
    for node in facts.linear("QuantizeLinear"):
        scale = facts.input_value(node, 1)
        if scale is not None and scale.size > 1 and facts.source(node) is None:
            yield _found(
                "per-channel-activations", node,
                f"gives an activation {scale.size} scales; TensorRT has one for each.",
                "Quantize activations per tensor.", effect="wrong",
            )  # fmt: skip


def weight_axis(facts: _Facts) -> Iterator[Finding]:
    """Scales of a weight must run along the output channels of what reads it."""
    for node in facts.linear("DequantizeLinear"):
        scale, weight = facts.input_value(node, 1), facts.source(node)
        if weight is None or scale is None or scale.size == 1 or scale.ndim != 1:
            continue
        rank = len(weight.dims)
        axis = _attribute(node, "axis", 1) % rank
        for reader, index, moved in _readers_of(facts, node.output[0], axis, rank):
            wanted = _output_channels(reader, index, rank)
            if wanted is not None and moved != wanted:
                yield _found(
                    "weight-axis", node,
                    f"has scales along axis {moved} of what '{_name(reader)}' ({reader.op_type}) reads, whose output "
                    f"channels are axis {wanted}.",
                    "Quantize weights per output channel.", effect="wrong",
                )  # fmt: skip


def _readers_of(facts: _Facts, name: str, axis: int, rank: int) -> Iterator[tuple[Any, int, int]]:
    """Who reads a weight, by which input, and where its axis is by then."""
    for reader, index in facts.readers.get(name, []):
        if reader.op_type in ("Cast", "Identity"):
            yield from _readers_of(facts, reader.output[0], axis, rank)
        elif reader.op_type == "Transpose":
            order = next((list(a.ints) for a in reader.attribute if a.name == "perm"), list(range(rank))[::-1])
            yield from _readers_of(facts, reader.output[0], order.index(axis), rank)
        else:
            yield reader, index, axis


def _output_channels(node: Any, index: int, rank: int) -> int | None:
    """The axis of a weight that its output channels are, by who reads it; null where that is nothing known."""
    if node.op_type == "MatMul":
        return rank - 1 if index == 1 else rank - 2
    if node.op_type == "Gemm" and index < 2:
        is_turned = bool(_attribute(node, "transB" if index else "transA", 0))
        return int(is_turned != bool(index))
    return {"Conv": 0, "ConvTranspose": 1}.get(node.op_type) if index == 1 else None


# --- sizes ------------------------------------------------------------------------------------------------


def shape_ranges(facts: _Facts) -> Iterator[Finding]:
    """Each input with free dimensions needs a range of sizes, and all that is fed must lie in it."""
    if facts.shapes is None:
        return
    inputs = {value.name: value for value in facts.model.graph.input if value.name not in facts.constants}
    for name, value in inputs.items():
        for what, remedy in _misfits(name, _sizes(value), facts.shapes.get(name), facts.fed):
            yield Finding(kind="shape-range", node=name, op_type="Input", what=what, remedy=remedy)
    for name in facts.shapes.keys() - inputs.keys():
        what = "is given a range of sizes, but the graph has no such input."
        yield Finding(
            kind="shape-range", node=name, op_type="Input", what=what, remedy=f"Name one of: {', '.join(inputs)}."
        )


def _misfits(
    name: str,
    sizes: tuple[int | None, ...],
    given: ShapeRange | None,
    fed: tuple[Mapping[str, tuple[int, ...]], ...],
) -> Iterator[tuple[str, str]]:
    written = "×".join("?" if size is None else str(size) for size in sizes)
    remedy = f"Give '{name}' sizes that fit {written}."
    if given is None and None in sizes:
        yield f"has free dimensions ({written}) and no range of sizes to build for.", f"Give '{name}' a range of sizes."
        return
    fixed = tuple(size or 0 for size in sizes)
    span = given or ShapeRange(min=fixed, opt=fixed, max=fixed)
    fits = len(span.min) == len(sizes) and all(
        size is None or low == high == size for low, high, size in zip(span.min, span.max, sizes, strict=True)
    )
    if not fits:
        yield f"is {written}, but the engine is to be built for {span.describe()}.", remedy
        return
    for shape in {each[name] for each in fed if name in each}:
        if not span.holds(shape):
            yield (
                f"will be {'×'.join(map(str, shape))}, but the engine is to be built for {span.describe()}.",
                f"Widen the range of '{name}', or feed it what lies inside.",
            )


def _sizes(value: Any) -> tuple[int | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)


RULES: tuple[Callable[[_Facts], Iterator[Finding]], ...] = (
    q_operators,
    dynamic_quantization,
    contrib_operators,
    unsupported_operators,
    int16,
    uint4,
    zero_points,
    uint8_weights,
    uint8_activations,
    int32_bias,
    scales,
    uneven_blocks,
    single_blocks,
    weight_axis,
    per_channel_activations,
    shape_ranges,
)
