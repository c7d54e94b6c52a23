"""The traced PyTorch program of a graph, with fake quantizers exactly where ONNX Runtime puts them in its ONNX form.

The exporter names ONNX values after the traced program's nodes, which is how a quantizer finds its place; that every
weight is the same on both sides is checked. Needs torch at import.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from edgevlm.errors import ModelError
from edgevlm.families.loading import quiet
from edgevlm.model import Graph
from edgevlm.quantization.fake_quantization import ActivationQuantizer, QuantizedLayer
from edgevlm.quantization.placement import Placement, QuantizedWeight
from edgevlm.quantization.schemes import Scheme
from edgevlm.runtime.spec import Array, TensorSpec

_ATEN = torch.ops.aten
_CONVOLUTIONS = (_ATEN.conv2d.default, _ATEN.conv2d.padding, _ATEN.convolution.default)
_LINEAR = (_ATEN.linear.default,)
_NORM = _ATEN._native_batch_norm_legit_no_training.default
# From a value back to the layer that made it: an activation, a batch norm, a view, at most.
_NEAR = 6
# The folded weights of PyTorch and of ONNX Runtime differ by rounding alone.
_SAME_WEIGHT = 1e-5


@dataclass(frozen=True, kw_only=True, eq=False)
class _Placed:
    """A layer of the program and the weight of the ONNX graph that it stands for; ``arguments`` name its tensors."""

    layer: QuantizedLayer
    arguments: tuple[str | None, ...]
    onnx: QuantizedWeight


class FakeQuantized:
    """A program that answers as its int8 graph will, and can be trained.

    Args:
        module: the program; its parameters have the names of the traced model's.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        graph: Graph,
        quantizers: Mapping[str, ActivationQuantizer],
        layers: tuple[_Placed, ...],
    ) -> None:
        self.module = module
        self._graph = graph
        self._quantizers = dict(quantizers)
        self._layers = layers

    def observe(self, is_observing: bool) -> None:
        """Whether ranges follow the batches of a training."""
        for quantizer in self._quantizers.values():
            quantizer.is_observing = is_observing

    def adapt(self, is_adapting: bool) -> None:
        """Whether batch norms normalize by the batches of a training."""
        for placed in self._layers:
            placed.layer.is_adapting = is_adapting

    @property
    def has_norms(self) -> bool:
        return any(placed.layer.norm is not None for placed in self._layers)

    def overrides(self) -> dict[str, list[dict[str, Any]]]:
        """Scales and zero points as ONNX Runtime's ``TensorQuantOverrides``, by value of the ONNX graph."""
        from onnxruntime.quantization import QuantType

        found: dict[str, list[dict[str, Any]]] = {}
        for owner, quantizer in self._quantizers.items():
            scale, zero_point = quantizer.parameters_of_range()
            is_unsigned = quantizer.integers[0] == 0
            kind = QuantType.QUInt8 if is_unsigned else QuantType.QInt8
            zero = np.array(int(zero_point), dtype=np.uint8 if is_unsigned else np.int8)
            found[owner] = [{"quant_type": kind, "scale": _number(scale), "zero_point": zero}]
        for placed in self._layers:
            scales = self._scales(placed)
            each = [{"quant_type": QuantType.QInt8, "scale": scale, "zero_point": np.int8(0)} for scale in scales]
            if placed.layer.per_channel:
                each = [{**one, "axis": placed.onnx.axis} for one in each]
            found[placed.onnx.weight] = each
        return found

    def folded_weights(self) -> dict[str, Array]:
        """Weights with batch norms folded in, by name in the ONNX graph, output channels first."""
        return {placed.onnx.weight: _numpy(self._folded(placed)[0]) for placed in self._layers}

    def scales_in_words(self) -> list[str]:
        """Every scale and zero point, in order: what a digest of the ranges is taken over."""
        return [
            f"{name} {float(one['scale'])!r} {int(one['zero_point'])}"
            for name, each in sorted(self.overrides().items())
            for one in each
        ]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=name, dtype="float32", shape=("batch",)) for name in self._graph.outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """As the runtime's ``Session``: what the program answers, by output name."""
        device = next(self.module.buffers()).device
        inputs = [torch.tensor(feeds[spec.name], device=device) for spec in self._graph.inputs]
        was_training = self.module.training
        self.module.eval()
        with torch.inference_mode():
            outputs = self.module(*inputs)
        self.module.train(was_training)
        return {name: _numpy(value) for name, value in zip(self._graph.outputs, outputs, strict=True)}

    def _folded(self, placed: _Placed) -> tuple[Tensor, Tensor | None]:
        tensors: list[Any] = [None if name is None else _tensor(self.module, name) for name in placed.arguments]
        with torch.no_grad():
            return placed.layer.folded(*tensors)

    def _scales(self, placed: _Placed) -> list[Any]:
        return [_number(one) for one in placed.layer.scale_of(*self._folded(placed)).flatten()]


def plain_module(program: Any) -> fx.GraphModule:
    """The traced program with weights of its own, as a module that can be trained."""
    with quiet():  # copying a traced graph warns of torch's own ways
        unlifted = program.module(check_guards=False)
        module = copy.deepcopy(fx.GraphModule(unlifted, unlifted.graph))
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module.eval().requires_grad_(False)


def fake_quantized(
    program: Any,
    graph: Graph,
    placement: Placement,
    scheme: Scheme,
    *,
    prepared: Path,
    n_bits: int,
) -> FakeQuantized:
    """Put fake quantizers into a traced program.

    Args:
        program: ``traced_program`` of the model that ``prepared`` was exported from.
        n_bits: of the weights; less than 8 means fewer levels of an int8 grid.
    Raises: ModelError: a quantized layer or value of the ONNX graph cannot be found in the program.
    """
    module = plain_module(program)
    names = _names(module.graph, graph)
    names |= _split_silus(module.graph, prepared)
    layers = {each.node: _layer_node(each, names) for each in placement.weights}
    quantizers: dict[str, ActivationQuantizer] = {}
    inputs: dict[str, str] = {}
    for value in placement.values:
        if value.owner not in quantizers:
            quantizers[value.owner] = ActivationQuantizer(low=value.low, high=value.high, sign=scheme.activation)
        if value.name in names:
            _quantize_value(module, names[value.name], value.owner, quantizers)
        elif any(name in names for name in value.source) and value.readers:
            inputs.update(dict.fromkeys(value.readers, value.owner))
        else:
            raise _lost(f"the value '{value.name}'")
    placed = []
    for each in placement.weights:
        read = quantizers[inputs[each.node]] if each.node in inputs else None
        bias_by = quantizers[each.bias_by] if each.bias_by else None
        make = partial(QuantizedLayer, n_bits=n_bits, per_channel=scheme.per_channel, input=read, bias_by=bias_by)
        placed.append(_quantize_layer(module, layers[each.node], each, make))
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    made = FakeQuantized(module, graph, quantizers, tuple(placed))
    _check_weights(made, prepared, placement)
    return made


def trainable(module: fx.GraphModule) -> dict[str, torch.nn.Parameter]:
    """The parameters that the program reads, by name, made trainable."""
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in read and parameter.is_floating_point())
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _names(program: fx.Graph, graph: Graph) -> dict[str, fx.Node]:
    """The program's nodes by the names that their values have in the ONNX graph."""
    names = {node.name: node for node in program.nodes if node.op == "call_function"}
    placeholders = [node for node in program.nodes if node.op == "placeholder"]
    names |= {spec.name: node for spec, node in zip(graph.inputs, placeholders, strict=True)}
    results: Any = next(node for node in program.nodes if node.op == "output").args[0]
    return names | dict(zip(graph.outputs, results, strict=True))


def _split_silus(program: fx.Graph, prepared: Path) -> dict[str, fx.Node]:
    """SiLU as the two operators that it is in ONNX, ``x * sigmoid(x)``, both of which may be quantized.

    Returns: the new nodes by the names that their values have in the ONNX graph.
    """
    import onnx

    found: dict[str, fx.Node] = {}
    nodes = onnx.load(prepared, load_external_data=False).graph.node
    maker = {output: node for node in nodes for output in node.output}
    for silu in [node for node in program.nodes if node.target is _ATEN.silu.default]:
        factors = maker[silu.name].input if silu.name in maker else ()
        gates = [value for value in factors if value in maker and maker[value].op_type == "Sigmoid"]
        if len(gates) != 1:
            continue
        with program.inserting_before(silu):
            gate = program.call_function(_ATEN.sigmoid.default, (silu.args[0],))
            product = program.call_function(_ATEN.mul.Tensor, (silu.args[0], gate))
        silu.replace_all_uses_with(product)
        program.erase_node(silu)
        found |= {gates[0]: gate, silu.name: product}
    return found


def _layer_node(each: QuantizedWeight, names: Mapping[str, fx.Node]) -> fx.Node:
    node: Any = next((names[name] for name in each.results if name in names), None)
    for _ in range(_NEAR):
        if not isinstance(node, fx.Node):
            break
        if node.target in (*_CONVOLUTIONS, *_LINEAR):
            return node
        node = node.args[0] if node.args else None
    raise _lost(f"the layer '{each.node}'")


def _quantize_value(
    module: fx.GraphModule, node: fx.Node, owner: str, quantizers: Mapping[str, ActivationQuantizer]
) -> None:
    name = _submodule(module, f"quantizer_{list(quantizers).index(owner)}", quantizers[owner])
    with module.graph.inserting_after(node):
        made = module.graph.call_module(name, (node,))
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def _quantize_layer(
    module: fx.GraphModule,
    node: fx.Node,
    each: QuantizedWeight,
    make: Callable[..., QuantizedLayer],
) -> _Placed:
    value, weight, *rest = node.args
    bias = rest.pop(0) if rest else node.kwargs.get("bias")
    options = {name: option for name, option in node.kwargs.items() if name != "bias"}
    norm = _norm_after(node)
    statistics = tuple(norm.args[1:5]) if norm is not None else ()
    arguments = (weight, bias, *statistics)
    if not all(each is None or (isinstance(each, fx.Node) and each.op == "get_attr") for each in arguments):
        raise _lost(f"the weight of the layer '{each.node}'")
    layer = make(
        partial(_call, node.target, tuple(rest), options),
        norm=None if norm is None else (float(norm.args[5]), float(norm.args[6])),  # type: ignore[arg-type]
    )
    name = _submodule(module, f"layer_{node.name}", layer)
    replaced = node if norm is None else next(iter(norm.users))
    with module.graph.inserting_before(replaced):
        made = module.graph.call_module(name, (value, *arguments))
    replaced.replace_all_uses_with(made)
    for old in (replaced, *((norm, node) if norm is not None else ())):
        module.graph.erase_node(old)
    return _Placed(
        layer=layer,
        arguments=tuple(str(one.target) if isinstance(one, fx.Node) else None for one in arguments),
        onnx=each,
    )


def _norm_after(node: fx.Node) -> fx.Node | None:
    """The batch norm that alone reads this convolution; exporting folds it in."""
    users = list(node.users)
    if node.target not in _CONVOLUTIONS or len(users) != 1 or users[0].target is not _NORM:
        return None
    (norm,) = users
    is_alone = len(norm.users) == 1 and next(iter(norm.users)).target is operator.getitem
    return norm if is_alone and all(isinstance(each, fx.Node) for each in norm.args[:5]) else None


def _call(
    target: Any, rest: tuple[Any, ...], options: Mapping[str, Any], value: Tensor, weight: Tensor, bias: Tensor | None
) -> Any:
    return target(value, weight, bias, *rest, **options)


def _submodule(module: fx.GraphModule, name: str, child: torch.nn.Module) -> str:
    full = f"fake_quantization.{name}"
    if not any(known is child for known in module.modules()):
        module.add_submodule(full, child)
    return full


def _check_weights(made: FakeQuantized, prepared: Path, placement: Placement) -> None:
    import onnx

    constants = {tensor.name: tensor for tensor in onnx.load(prepared).graph.initializer}
    axes = {each.weight: each.axis for each in placement.weights}
    for name, ours in made.folded_weights().items():
        theirs = np.moveaxis(onnx.numpy_helper.to_array(constants[name]), axes[name], 0)
        if ours.shape != theirs.shape or np.abs(ours - theirs).max() > _SAME_WEIGHT * max(np.abs(theirs).max(), 1e-30):
            raise _lost(f"the weight '{name}'")


def _lost(what: str) -> ModelError:
    return ModelError(
        f"Training cannot follow the quantized graph: {what} of the ONNX graph is not found in the PyTorch program.",
        hint="Quantize with another --scheme, or compile without --qat.",
    )


def _tensor(module: torch.nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(path), attribute)
    return found


def _numpy(value: Tensor) -> Array:
    return value.detach().cpu().numpy()


def _number(value: Tensor) -> Any:
    """As ONNX Runtime's quantizer takes a scale."""
    return np.array(value.detach().cpu().item(), dtype=np.float32)
