"""ONNX Runtime's profiler: every kernel's time, and the optimised graph where the package ``onnx`` can read it.

Source: onnxruntime/core/framework/sequential_executor.cc writes the events (``<node>_kernel_time`` with ``op_name``,
``input_type_shape``, ...); a node without a name is called ``<operator>_<index>``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgevlm.measure.operators import (
    N_WARMUP,
    OperatorRow,
    Profile,
    ProfileRequest,
    feeds_for,
    run_for,
    typical_ms,
    with_shares,
)
from edgevlm.measure.work import RIGHT_OPERAND, count_macs
from edgevlm.runtime.backends.onnxruntime import OnnxRuntime, OnnxRuntimeSession, session_settings
from edgevlm.runtime.spec import Array, Spec

_KERNEL = "_kernel_time"
_RUN = "model_run"
# Their time includes that of the operators inside.
_CONTAINERS = frozenset({"If", "Loop", "Scan"})
_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast"})
_TYPES = {"float": "float32", "double": "float64"}
# Chains of 1 to 400 operators on one number, run from Python (Zen 4, ONNX Runtime 1.32, 1 and 2 threads).
_RUN_MS, _CALL_MS = 0.005, 0.0002


class Node(Spec, frozen=True, kw_only=True):
    """A node of the optimised graph: what stands around it, and the shapes of its constant inputs."""

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    constant_shapes: tuple[tuple[int, ...] | None, ...]


def profile(request: ProfileRequest) -> Profile:
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="edgevlm-") as name:
        folder = Path(name)
        file = _with_names(Path(request.file), folder)
        feeds, samples = _run_plain(file, request)
        session, optimised = _open_profiled(file, request, folder)
        profiled = OnnxRuntimeSession(session)
        profiled_samples = run_for(lambda: profiled.run(feeds), request)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        nodes = _read_nodes(optimised) if optimised.is_file() else {}
        settings = session_settings(request.session)
    rows, n_runs = rows_of_events(events, nodes, n_warmup=N_WARMUP)
    latency_ms = statistics.median(samples)
    rows, profiler_ms = without_profiler(rows, added_ms=statistics.median(profiled_samples) - latency_ms)
    return Profile(
        backend="onnxruntime",
        version=str(ort.__version__),
        n_threads=settings.intra_op_num_threads,
        n_runs=n_runs,
        latency_ms=latency_ms,
        operators_ms=math.fsum(row.time_ms for row in rows),
        profiler_ms=profiler_ms,
        dispatch_ms=_RUN_MS + _CALL_MS * sum(row.n_calls for row in rows),
        has_real_inputs=bool(request.inputs),
        rows=with_shares(rows),
    )


def _run_plain(file: Path, request: ProfileRequest) -> tuple[dict[str, Array], list[float]]:
    """The inputs, and runs without the profiler. It ends here: its threads would take the next session's cores."""
    plain = OnnxRuntime().open(file, request.session)
    feeds = feeds_for(request, plain.inputs)
    return feeds, run_for(lambda: plain.run(feeds), request)


def _open_profiled(file: Path, request: ProfileRequest, folder: Path) -> tuple[Any, Path]:
    import onnxruntime as ort

    optimised = folder / "optimised.onnx"
    settings = session_settings(request.session)
    settings.enable_profiling = True
    settings.profile_file_prefix = str(folder / "profile")
    providers = ["CPUExecutionProvider"]
    if importlib.util.find_spec("onnx"):
        settings.optimized_model_filepath = str(optimised)
        # Weights beside the graph: a protobuf above 2 GB cannot be written.
        settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        settings.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        try:
            return ort.InferenceSession(str(file), settings, providers=providers), optimised
        except Exception:  # some optimised graphs cannot be written; the profile is worth having without
            optimised.unlink(missing_ok=True)
            settings.optimized_model_filepath = ""
    return ort.InferenceSession(str(file), settings, providers=providers), optimised


def rows_of_events(
    events: Iterable[Mapping[str, Any]], nodes: Mapping[tuple[str, str], Node], *, n_warmup: int
) -> tuple[tuple[OperatorRow, ...], int]:
    """The operators as the profiler times them, without shares yet, and the number of runs counted.

    Args:
        events: the profile as ONNX Runtime writes it.
        nodes: of the optimised graph by name and operator type; empty where it could not be read.
        n_warmup: the first runs, which are not counted.
    """
    events = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    runs = [event for event in events if event["name"] == _RUN][n_warmup:]
    kernels = [event for event in events if event["name"].endswith(_KERNEL)]
    times: dict[tuple[str, str], list[float]] = {}
    calls: dict[tuple[str, str], int] = {}
    examples: dict[tuple[str, str], Mapping[str, Any]] = {}
    at = 0
    for i, run in enumerate(runs):
        start, end = run["ts"], run["ts"] + run["dur"]
        while at < len(kernels) and kernels[at]["ts"] < start:
            at += 1
        inside = []
        while at < len(kernels) and kernels[at]["ts"] <= end:
            inside.append(kernels[at])
            at += 1
        for event, own_us in zip(inside, _own_times(inside), strict=True):
            key = (event["name"].removesuffix(_KERNEL), event["args"]["op_name"])
            times.setdefault(key, [0.0] * len(runs))[i] += own_us / 1000
            examples.setdefault(key, event["args"])
            calls[key] = calls.get(key, 0) + 1
    rows = [
        _row(key, typical_ms(times[key]), max(1, round(calls[key] / len(runs))), examples[key], nodes.get(key))
        for key in times
    ]
    return tuple(rows), len(runs)


def without_profiler(rows: Sequence[OperatorRow], *, added_ms: float) -> tuple[tuple[OperatorRow, ...], float]:
    """The rows less what the profiler itself costs, and that cost for one call.

    Its events hold a part of what it takes to write them: on chains of operators that have nothing to do, a call adds
    5 to 9 µs to the run, of which 3 to 8 µs stand in the event. So no more is taken off than the fastest operator of
    the graph took, nor more than the whole run became slower by.

    Args:
        added_ms: median run with the profiler less median run without.
    """
    n_calls = sum(row.n_calls for row in rows)
    if not n_calls:
        return tuple(rows), 0.0
    cost_ms = max(0.0, min(added_ms / n_calls, min(row.time_ms / row.n_calls for row in rows)))
    told = (msgspec.structs.replace(row, time_ms=max(0.0, row.time_ms - cost_ms * row.n_calls)) for row in rows)
    return tuple(told), cost_ms


def _own_times(events: Sequence[Mapping[str, Any]]) -> list[float]:
    """Each event's microseconds, less those of the events inside it where it is a container."""
    own = [float(event["dur"]) for event in events]
    open_containers: list[tuple[int, float]] = []
    for i, event in enumerate(events):
        while open_containers and event["ts"] >= open_containers[-1][1]:
            open_containers.pop()
        if open_containers:
            outer = open_containers[-1][0]
            own[outer] = max(0.0, own[outer] - event["dur"])
        if event["args"]["op_name"] in _CONTAINERS:
            open_containers.append((i, event["ts"] + event["dur"]))
    return own


def _row(key: tuple[str, str], time_ms: float, n_calls: int, args: Mapping[str, Any], node: Node | None) -> OperatorRow:
    name, op_type = key
    types, shapes = _inputs(op_type, args["input_type_shape"], node)
    outputs = [tuple(shape) for each in args.get("output_type_shape", ()) for shape in each.values()]
    output = outputs[0] if outputs else None
    macs = count_macs(op_type, shapes, output)
    sizes = [int(args[field]) for field in ("activation_size", "parameter_size", "output_size") if args.get(field)]
    return OperatorRow(
        name=name,
        op_type=op_type,
        n_calls=n_calls,
        time_ms=time_ms,
        share=0.0,
        precision=precision_of(op_type, types),
        provider=str(args.get("provider", "")),
        input_types=types,
        input_shapes=shapes,
        output_shape=output,
        macs=None if macs is None else macs * n_calls,
        n_bytes=sum(sizes) * n_calls if sizes else None,
        producers=node.producers if node else (),
        consumers=node.consumers if node else (),
    )


def _inputs(
    op_type: str, given: Iterable[Mapping[str, Sequence[int]]], node: Node | None
) -> tuple[tuple[str, ...], tuple[tuple[int, ...] | None, ...]]:
    """Types and shapes as the profiler tells them, with the operand put back that it leaves out.

    A constant matrix or kernel that was packed at loading is no input any more; the optimised graph knows its shape.
    """
    inputs: list[tuple[str, tuple[int, ...] | None]] = [
        (_TYPES.get(kind, kind), tuple(shape)) for each in given for kind, shape in each.items()
    ]
    right = RIGHT_OPERAND.get(op_type)
    if right is not None and not _is_operand(op_type, inputs[right : right + 1]):
        known = node.constant_shapes if node else ()
        kind = "int8" if _is_int8(op_type) else inputs[0][0]
        inputs.insert(right, (kind, known[right] if right < len(known) else None))
    return tuple(kind for kind, _ in inputs), tuple(shape for _, shape in inputs)


def _is_operand(op_type: str, given: Sequence[tuple[str, tuple[int, ...] | None]]) -> bool:
    """Whether what stands in the operand's place is one: a scale, a zero point or a bias has fewer dimensions."""
    if not given:
        return False
    kind, shape = given[0]
    return bool(shape) and len(shape or ()) > 1 and (not _is_int8(op_type) or kind in ("int8", "uint8"))


def _is_int8(op_type: str) -> bool:
    return op_type.startswith(("QLinear", "QGemm", "NhwcQLinear", "DynamicQuantize")) or "Integer" in op_type


def precision_of(op_type: str, input_types: Sequence[str]) -> str:
    """In which precision a kernel computes, by what it reads.

    Example:
        >>> precision_of("QLinearConv", ("uint8", "float32", "uint8", "int8"))
        'int8'
        >>> precision_of("MatMulNBits", ("float32", "uint8", "float32")), precision_of("Conv", ("float32",))
        ('float32, packed weights', 'float32')
    """
    if op_type in _CONVERSIONS:
        return "conversion"
    if op_type == "MatMulNBits":
        return f"{input_types[0]}, packed weights"
    if any(kind in ("int8", "uint8") for kind in input_types):
        return "int8"
    return input_types[0] if input_types else "none"


def _with_names(file: Path, folder: Path) -> Path:
    """The graph with a name for every node, so that its profile and its optimised form can be matched."""
    if not importlib.util.find_spec("onnx"):
        return file
    import onnx
    from onnx.external_data_helper import uses_external_data

    try:
        model = onnx.load(file, load_external_data=False)
    except Exception:  # ONNX Runtime will say it better
        return file
    if all(node.name for node in model.graph.node) or any(map(uses_external_data, model.graph.initializer)):
        return file
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
    onnx.save(model, folder / file.name)
    return folder / file.name


def _read_nodes(optimised: Path) -> dict[tuple[str, str], Node]:
    """The optimised graph's nodes by name and operator type, those of inner graphs left out."""
    import onnx

    graph = onnx.load(optimised, load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    makers = {name: node.op_type for node in graph.node for name in node.output}
    readers: dict[str, list[str]] = {value.name: ["output"] for value in graph.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    return {
        (node.name, node.op_type): Node(
            producers=tuple(
                "constant" if name in shapes or not name else makers.get(name, "input") for name in node.input
            ),
            consumers=tuple(dict.fromkeys(reader for name in node.output for reader in readers.get(name, ()))),
            constant_shapes=tuple(shapes.get(name) for name in node.input),
        )
        for node in graph.node
    }
