"""An ONNX graph's operators as torch calls, for models that came as ONNX alone: what PyTorch would run for them.

Batch norms that the graph has folded into its convolutions stay folded, which favours PyTorch a little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def module_from_onnx(file: Path) -> Any:
    """A ``torch.fx.GraphModule`` with the graph's input and output names.

    Raises: NotImplementedError: an operator, or a form of it, is not in ``_CALLS``.
    """
    import onnx
    import torch
    from onnx import numpy_helper

    proto = onnx.load(file).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.initializer}
    root = torch.nn.Module()
    graph = torch.fx.Graph()
    values: dict[str, Any] = {
        value.name: graph.placeholder(value.name) for value in proto.input if value.name not in constants
    }

    def value_of(name: str) -> Any:
        """A tensor of the graph; a weight becomes a buffer when something takes it."""
        if name not in values:
            buffer = f"weight_{len(values)}"
            root.register_buffer(buffer, torch.from_numpy(np.array(constants[name])))
            values[name] = graph.get_attr(buffer)
        return values[name]

    for node in proto.node:
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(attributes["value"])
            continue
        if node.op_type not in _CALLS:
            raise NotImplementedError(f"'{node.op_type}' has no torch call here")
        function, n_tensors, settings = _CALLS[node.op_type](attributes, [constants.get(name) for name in node.input])
        names = [name for name in node.input[:n_tensors] if name]
        tensors = tuple(value_of(name) for name in names)
        call = (list(tensors),) if node.op_type == "Concat" else tensors
        values[node.output[0]] = graph.call_function(function, call, settings)
    graph.output(tuple(values[value.name] for value in proto.output))
    return torch.fx.GraphModule(root, graph).eval()


Call = tuple[Callable[..., Any], int, dict[str, Any]]
"""A function, how many of the node's inputs are its tensors, and its keyword arguments."""

Attributes = Mapping[str, Any]
Constants = list[Any]


def _conv(a: Attributes, c: Constants) -> Call:
    import torch.nn.functional as functional

    return functional.conv2d, 3, {
        "stride": tuple(a.get("strides", (1, 1))),
        "padding": _symmetric(a),
        "dilation": tuple(a.get("dilations", (1, 1))),
        "groups": a.get("group", 1),
    }  # fmt: skip


def _symmetric(a: Attributes) -> tuple[int, int]:
    top, left, bottom, right = a.get("pads", (0, 0, 0, 0))
    if (top, left) != (bottom, right) or a.get("auto_pad", b"NOTSET") not in (b"", b"NOTSET"):
        raise NotImplementedError("padding that differs from side to side")
    return top, left


def _average_pool(a: Attributes, c: Constants) -> Call:
    import torch.nn.functional as functional

    pool = {"kernel_size": tuple(a["kernel_shape"]), "stride": tuple(a["strides"]), "padding": _symmetric(a)}
    return functional.avg_pool2d, 1, {**pool, "count_include_pad": bool(a.get("count_include_pad", 0))}


def _max_pool(a: Attributes, c: Constants) -> Call:
    import torch.nn.functional as functional

    pool = {"kernel_size": tuple(a["kernel_shape"]), "stride": tuple(a["strides"]), "padding": _symmetric(a)}
    return functional.max_pool2d, 1, pool


def _batch_norm(a: Attributes, c: Constants) -> Call:
    return _normalized, 5, {"eps": a.get("epsilon", 1e-5)}


def _normalized(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, eps: float) -> Any:
    import torch.nn.functional as functional

    return functional.batch_norm(x, mean, variance, weight, bias, eps=eps)


def _resize(a: Attributes, c: Constants) -> Call:
    import torch.nn.functional as functional

    mode, places = a.get("mode", b"nearest"), a.get("coordinate_transformation_mode", b"half_pixel")
    known = {
        (b"linear", b"align_corners"): {"mode": "bilinear", "align_corners": True},
        (b"linear", b"half_pixel"): {"mode": "bilinear", "align_corners": False},
        (b"nearest", b"asymmetric"): {"mode": "nearest"},
    }
    if (mode, places) not in known:
        raise NotImplementedError(f"Resize {mode!r} {places!r}")
    scales, sizes = (c[i] if len(c) > i and c[i] is not None and len(c[i]) else None for i in (2, 3))
    size = {"size": tuple(sizes[2:].tolist())} if sizes is not None else {"scale_factor": tuple(scales[2:].tolist())}
    return functional.interpolate, 1, {**size, **known[mode, places]}


def _reshape(a: Attributes, c: Constants) -> Call:
    return _reshaped, 1, {"shape": tuple(c[1].tolist())}


def _reshaped(x: Any, shape: tuple[int, ...]) -> Any:
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)])


def _slice(a: Attributes, c: Constants) -> Call:
    starts, ends, axes, steps = (each.tolist() for each in c[1:5])
    return _sliced, 1, {"places": tuple(zip(axes, starts, ends, steps, strict=True))}


def _sliced(x: Any, places: tuple[tuple[int, int, int, int], ...]) -> Any:
    index = [slice(None)] * x.ndim
    for axis, start, end, step in places:
        index[axis] = slice(start, min(end, x.shape[axis]), step)
    return x[tuple(index)]


def _pad(a: Attributes, c: Constants) -> Call:
    import torch.nn.functional as functional

    before, after = np.split(c[1], 2)
    pairs = [int(n) for axis in reversed(range(len(before))) for n in (before[axis], after[axis])]
    return functional.pad, 1, {"pad": tuple(pairs)}


def _gemm(a: Attributes, c: Constants) -> Call:
    import torch.nn.functional as functional

    if (a.get("alpha", 1.0), a.get("beta", 1.0), a.get("transA", 0), a.get("transB", 0)) != (1.0, 1.0, 0, 1):
        raise NotImplementedError("Gemm other than x · Wᵀ + b")
    return functional.linear, 3, {}


def _simple(name: str, n_tensors: int, **settings: Any) -> Callable[[Attributes, Constants], Call]:
    def call(a: Attributes, c: Constants) -> Call:
        import torch

        return getattr(torch, name), n_tensors, settings

    return call


def _concat(a: Attributes, c: Constants) -> Call:
    import torch

    return torch.cat, len(c), {"dim": a["axis"]}


def _transpose(a: Attributes, c: Constants) -> Call:
    import torch

    return torch.permute, 1, {"dims": tuple(a["perm"])}


def _prelu(a: Attributes, c: Constants) -> Call:
    return _rectified, 2, {}


def _rectified(x: Any, slope: Any) -> Any:
    import torch

    return torch.prelu(x, slope.reshape(-1))


def _global_average(a: Attributes, c: Constants) -> Call:
    import torch.nn.functional as functional

    return functional.adaptive_avg_pool2d, 1, {"output_size": 1}


_CALLS: dict[str, Callable[[Attributes, Constants], Call]] = {
    "Add": _simple("add", 2),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Conv": _conv,
    "Flatten": _simple("flatten", 1, start_dim=1),
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "MatMul": _simple("matmul", 2),
    "MaxPool": _max_pool,
    "Mul": _simple("mul", 2),
    "PRelu": _prelu,
    "Pad": _pad,
    "Relu": _simple("relu", 1),
    "Reshape": _reshape,
    "Resize": _resize,
    "Sigmoid": _simple("sigmoid", 1),
    "Slice": _slice,
    "Transpose": _transpose,
}
