"""Profiles: recorded ones read by hand, and small graphs profiled for real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.errors import ModelError, UsageError
from edgevlm.measure.apart import call_apart
from edgevlm.measure.kinds import KINDS, kind_of
from edgevlm.measure.operators import OperatorRow, ProfileRequest, profile_graph, with_shares
from edgevlm.measure.operators_onnxruntime import Node, rows_of_events, without_profiler
from edgevlm.measure.process import WorkerError
from edgevlm.runtime.spec import SessionOptions
from tests.measure import graphs
from tests.quantization.graphs import save_cnn

ONE_THREAD = SessionOptions(n_threads=1)


def recorded() -> list[dict[str, Any]]:
    """Four runs of ``graphs.save_fused`` as ONNX Runtime 1.32 wrote them, shortened to what is read."""
    events: list[dict[str, Any]] = json.loads((Path(__file__).parent / "recorded_profile.json").read_text())
    return events


# --- reading ----------------------------------------------------------------------------------------------


def test_a_recorded_profile_is_read_without_its_first_runs():
    rows, n_runs = rows_of_events(recorded(), {}, n_warmup=2)
    assert n_runs == 2
    # The lower quartile of 4 and 3, 4 and 4, 4 and 4, 3 and 3 microseconds.
    assert [(row.name, row.op_type, row.time_ms) for row in rows] == [
        ("quantizelinear_0", "QuantizeLinear", pytest.approx(0.00325)),
        ("matmul_3", "QLinearMatMul", 0.004),
        ("matmul_7", "QLinearMatMul", 0.004),
        ("dequantizelinear_9", "DequantizeLinear", 0.003),
    ]
    assert [row.precision for row in rows] == ["conversion", "int8", "int8", "conversion"]
    assert all(row.n_calls == 1 and row.provider == "CPUExecutionProvider" for row in rows)
    assert rows_of_events(recorded(), {}, n_warmup=0)[1] == 4


def test_a_matrix_that_was_packed_away_is_put_back_from_the_optimised_graph():
    (plain,) = (row for row in rows_of_events(recorded(), {}, n_warmup=0)[0] if row.name == "matmul_3")
    assert plain.input_types[:5] == ("uint8", "float32", "uint8", "int8", "float32")
    assert plain.input_shapes[3] is None
    assert plain.macs == 16 * 64 * 64, "a product's left side and its result tell enough"
    assert plain.n_bytes == 1024 + 15 + 1024
    node = Node(
        producers=("QuantizeLinear", *("constant",) * 7),
        consumers=("QLinearMatMul",),
        constant_shapes=(None, (), (), (64, 64), (), (), (), ()),
    )
    rows, _ = rows_of_events(recorded(), {("matmul_3", "QLinearMatMul"): node}, n_warmup=0)
    (known,) = (row for row in rows if row.name == "matmul_3")
    assert known.input_shapes[3] == (64, 64)
    assert (known.producers, known.consumers) == (node.producers, node.consumers)


def event(name: str, op: str, ts: int, dur: int) -> dict[str, Any]:
    args = {"op_name": op, "provider": "CPUExecutionProvider", "input_type_shape": [{"float": [1]}],
            "output_type_shape": [{"float": [1]}]}  # fmt: skip
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": args}


def test_a_loop_takes_only_what_its_body_does_not():
    events = [
        {"cat": "Session", "name": "model_run", "ts": 0, "dur": 200, "args": {}},
        event("loop", "Loop", 10, 100),
        event("body", "Add", 20, 30),
        event("body", "Add", 60, 40),
        event("after", "Mul", 120, 50),
    ]
    rows, _ = rows_of_events(events, {}, n_warmup=0)
    told = {row.name: (row.n_calls, row.time_ms) for row in rows}
    assert told == {"loop": (1, 0.03), "body": (2, 0.07), "after": (1, 0.05)}


def test_the_cost_of_the_profiler_is_taken_off_each_call_and_never_more_than_the_fastest_took():
    def row(name: str, time_ms: float, n_calls: int = 1) -> OperatorRow:
        return OperatorRow(
            name=name, op_type="Add", n_calls=n_calls, time_ms=time_ms, share=0.0, precision="float32", provider=""
        )

    rows = (row("a", 0.010), row("b", 0.003), row("c", 0.016, n_calls=2))
    told, cost = without_profiler(rows, added_ms=0.1)
    assert cost == 0.003
    assert [each.time_ms for each in told] == pytest.approx([0.007, 0.0, 0.010])
    assert without_profiler(rows, added_ms=0.004)[1] == 0.001
    assert without_profiler(rows, added_ms=-1.0) == (rows, 0.0)
    assert without_profiler((), added_ms=1.0) == ((), 0.0)


def test_shares_add_up_and_the_slowest_is_first():
    rows, _ = rows_of_events(recorded(), {}, n_warmup=0)
    shared = with_shares(rows)
    assert sum(row.share for row in shared) == pytest.approx(1)
    assert [row.time_ms for row in shared] == sorted((row.time_ms for row in rows), reverse=True)


def test_every_kind_is_one_of_those_that_reports_know():
    assert {kind_of(op) for op in ("Conv", "QGemm", "Reshape", "Softmax", "Add", "MaxPool", "Cast", "New")} == set(
        KINDS
    )


# --- for real ---------------------------------------------------------------------------------------------


def test_a_convolutional_net_is_profiled_in_the_form_that_ran(tmp_path: Path):
    file = save_cnn(tmp_path / "cnn.onnx")
    found = profile_graph(
        file, inputs={"pixel_values": np.ones((1, 3, 16, 16), np.float32)}, session=ONE_THREAD, block_ms=20
    )
    assert (found.backend, found.n_threads, found.has_real_inputs) == ("onnxruntime", 1, True)
    assert 5 <= found.n_runs <= 100
    assert found.latency_ms > 0
    assert found.dispatch_ms > 0
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert {row.precision for row in found.rows} == {"float32"}
    convolutions = [row for row in found.rows if kind_of(row.op_type) == "convolution"]
    assert len(convolutions) == 4
    assert {"Relu", "Clip"}.isdisjoint(row.op_type for row in found.rows), "they were fused"
    assert all(row.macs and row.producers and row.consumers for row in convolutions)
    assert any(row.producers[0] == "input" or "input" in row.producers for row in found.rows)


def test_made_up_inputs_fit_a_free_batch_and_every_type(tmp_path: Path):
    assert not profile_graph(save_cnn(tmp_path / "cnn.onnx"), session=ONE_THREAD, block_ms=1).has_real_inputs
    from tests.runtime import tiny

    (tmp_path / "text.onnx").write_bytes(tiny.text_graph())
    found = profile_graph(tmp_path / "text.onnx", session=ONE_THREAD, block_ms=1)
    assert {"Gather", "Cast"} <= {row.op_type for row in found.rows}


def test_nodes_without_names_are_matched_with_the_graph_as_run(tmp_path: Path):
    import onnx

    file = graphs.save_fused(tmp_path / "g.onnx")
    model = onnx.load(file)
    for node in model.graph.node:
        node.ClearField("name")
    onnx.save(model, file)
    found = profile_graph(file, session=ONE_THREAD, block_ms=1)
    assert len(found.rows) == 4
    assert all(row.producers and row.consumers for row in found.rows)


def test_an_int8_graph_tells_its_types_and_neighbours(tmp_path: Path):
    found = profile_graph(graphs.save_fused(tmp_path / "g.onnx"), session=ONE_THREAD, block_ms=1)
    rows = {row.name: row for row in found.rows}
    products = [row for row in found.rows if row.op_type == "QLinearMatMul"]
    assert len(products) == 2
    assert {row.precision for row in products} == {"int8"}
    assert {row.input_types[0] for row in products} == {"uint8"}
    assert {row.macs for row in products} == {16 * 64 * 64}
    assert rows["quantizelinear_0"].producers[0] == "input"
    assert rows["quantizelinear_0"].consumers == ("QLinearMatMul",)


def test_openvino_tells_the_precision_that_it_chose(tmp_path: Path):
    pytest.importorskip("openvino", reason="OpenVINO is an extra of its own")
    found = profile_graph(
        save_cnn(tmp_path / "cnn.onnx", batch=1),
        backend="openvino",
        session=SessionOptions(n_threads=1, entries={"INFERENCE_PRECISION_HINT": "f32"}),
        block_ms=20,
    )
    convolutions = [row for row in found.rows if kind_of(row.op_type) == "convolution"]
    assert len(convolutions) == 4
    assert {row.precision for row in convolutions} == {"float32"}
    assert all(row.detail and row.macs for row in convolutions)


def test_a_base_install_profiles_without_onnx(tmp_path: Path):
    """Nothing but numpy, msgspec and ONNX Runtime: less detail, the same operators."""
    file = graphs.save_fused(tmp_path / "g.onnx")
    probe = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"onnx", "torch", "transformers", "jinja2", "matplotlib", "PIL"}}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "onnx" else find_spec(name, *rest)
from edgevlm.measure.operators import ProfileRequest, profile_here
from edgevlm.measure.findings import find_causes
found = profile_here(ProfileRequest(backend="onnxruntime", file={str(file)!r}, block_ms=1.0))
find_causes(found)
print(*sorted(row.op_type for row in found.rows), {{row.producers for row in found.rows}})
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DequantizeLinear", "QLinearMatMul", "QLinearMatMul", "QuantizeLinear", "{()}"]


# --- what goes wrong --------------------------------------------------------------------------------------


def test_what_does_not_load_or_run_is_one_sentence(tmp_path: Path):
    (tmp_path / "bad.onnx").write_bytes(b"hello")
    with pytest.raises(ModelError, match=r"'bad\.onnx' could not be profiled on onnxruntime: ONNX Runtime .* refuses"):
        profile_graph(tmp_path / "bad.onnx")
    file = save_cnn(tmp_path / "cnn.onnx")
    with pytest.raises(ModelError, match="could not run the graph"):
        profile_graph(file, inputs={"pixel_values": np.ones((1, 4, 16, 16), np.float32)})
    with pytest.raises(UsageError, match="Nothing profiles graphs on 'onnxruntme'") as caught:
        profile_graph(file, backend="onnxruntme")
    assert "onnxruntime" in caught.value.hint


def crash(_request: ProfileRequest) -> ProfileRequest:
    import os
    import signal

    sys.stderr.write("a last word\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def sleep(request: ProfileRequest) -> ProfileRequest:
    import time

    time.sleep(60)
    return request


def give_back(request: ProfileRequest) -> ProfileRequest:
    sys.stdout.write("a library's noise\n")
    return request


REQUEST = ProfileRequest(backend="b", file="f")


def test_a_function_runs_apart_whatever_it_prints():
    assert call_apart(give_back, REQUEST, returns=ProfileRequest, timeout_s=60) == REQUEST


def test_a_crash_and_silence_are_sentences():
    with pytest.raises(WorkerError, match=r"Its process crashed \(SIGSEGV\)\. It said: a last word"):
        call_apart(crash, REQUEST, returns=ProfileRequest, timeout_s=60)
    with pytest.raises(WorkerError, match="gave no answer for 2 s"):
        call_apart(sleep, REQUEST, returns=ProfileRequest, timeout_s=2)
