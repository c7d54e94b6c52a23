"""OpenVINO's own counters (``PERF_COUNT``), with the precision and the shapes from the compiled graph.

Source: openvino.InferRequest.get_profiling_info and CompiledModel.get_runtime_model, whose operators carry
``layerType``, ``primitiveType``, ``runtimePrecision`` and ``originalLayersNames``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from edgevlm.measure.work import count_macs
from edgevlm.runtime.backends.openvino import OpenVino, for_one_row, openvino_core, session_settings

_PRECISIONS = {"f32": "float32", "f16": "float16", "bf16": "bf16", "i8": "int8", "u8": "int8"}
_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "uint8", "i32": "int32",
          "i64": "int64", "boolean": "bool"}  # fmt: skip
# Chains of 1 to 400 operators on one number, run from Python (Zen 4, OpenVINO 2026.4, 1 thread).
_RUN_MS, _CALL_MS = 0.032, 0.0004
_CONVERSIONS = frozenset({"Convert", "FakeQuantize", "Reorder"})


def profile(request: ProfileRequest) -> Profile:
    file = Path(request.file)
    plain = OpenVino().open(file, request.session)
    feeds = feeds_for(request, plain.inputs)
    samples = run_for(lambda: plain.run(feeds), request)
    core = openvino_core()
    settings = session_settings(request.session)
    model = core.read_model(str(file))
    is_single = all(value.shape[:1] == (1,) for value in feeds.values())
    model = (for_one_row(model) if is_single else None) or model  # as the runtime runs it
    compiled = core.compile_model(model, "CPU", {**settings, "PERF_COUNT": "YES"})
    counted = compiled.create_infer_request()
    counters: list[dict[tuple[str, str], tuple[str, float]]] = []

    def run() -> None:
        counted.infer(list(feeds.values()))  # in the order of the graph's inputs
        counters.append(
            {
                (info.node_name, info.node_type): (info.exec_type, info.real_time.total_seconds() * 1000)
                for info in counted.get_profiling_info()
                if str(info.status).endswith("EXECUTED")
            }
        )

    run_for(run, request)
    counters = counters[N_WARMUP:]
    operators = {op.get_friendly_name(): op for op in compiled.get_runtime_model().get_ordered_ops()}
    rows = [
        _row(key, typical_ms([run[key][1] for run in counters if key in run]), exec_type, operators.get(key[0]))
        for key, (exec_type, _) in counters[0].items()
    ]
    return Profile(
        backend="openvino",
        version=OpenVino().version() or "",
        n_threads=int(settings["INFERENCE_NUM_THREADS"]),
        n_runs=len(counters),
        latency_ms=statistics.median(samples),
        operators_ms=math.fsum(row.time_ms for row in rows),
        profiler_ms=0.0,
        dispatch_ms=_RUN_MS + _CALL_MS * len(rows),
        has_real_inputs=bool(request.inputs),
        rows=with_shares(rows),
    )


def _row(key: tuple[str, str], time_ms: float, exec_type: str, op: Any) -> OperatorRow:
    name, layer = key
    facts = _facts(op)
    kind = facts.get("runtimePrecision", exec_type.rpartition("_")[2]).lower()
    inputs = [(str(port.get_element_type().to_string()), _shape(port)) for port in op.inputs()] if op else []
    output = _shape(op.outputs()[0]) if op and op.outputs() else None
    sizes = [
        math.prod(shape) * port.get_element_type().bitwidth // 8
        for port in ([*op.inputs(), *op.outputs()] if op else [])
        if (shape := _shape(port)) is not None
    ]
    return OperatorRow(
        name=name,
        op_type=layer,
        n_calls=1,
        time_ms=time_ms,
        share=0.0,
        precision="conversion" if layer in _CONVERSIONS else _PRECISIONS.get(kind, kind),
        provider="CPU",
        input_types=tuple(_TYPES.get(kind, kind) for kind, _ in inputs),
        input_shapes=tuple(shape for _, shape in inputs),
        output_shape=output,
        macs=count_macs(layer, [shape for _, shape in inputs], output),
        n_bytes=sum(sizes) or None,
        producers=tuple(_layer(port.get_source_output().get_node()) for port in op.inputs()) if op else (),
        consumers=tuple(
            dict.fromkeys(_layer(port.get_node()) for out in op.outputs() for port in out.get_target_inputs())
        )
        if op
        else (),
        detail=exec_type,
    )


def _facts(op: Any) -> Mapping[str, str]:
    if op is None:
        return {}
    found = {}
    for key, value in dict(op.get_rt_info()).items():
        found[key] = str(value.astype(str)) if hasattr(value, "astype") else str(value)
    return found


def _layer(op: Any) -> str:
    layer = _facts(op).get("layerType") or str(op.get_type_name())
    return {"Const": "constant", "Input": "input", "Output": "output"}.get(layer, layer)


def _shape(port: Any) -> tuple[int, ...] | None:
    shape = port.get_partial_shape()
    return tuple(shape.to_shape()) if shape.is_static else None
