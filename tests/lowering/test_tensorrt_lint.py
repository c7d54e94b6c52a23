"""What the lint has against a graph is what TensorRT has against it, and no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgevlm.errors import ModelError
from edgevlm.lowering.tensorrt_lint import RULES, check_graph, lint
from edgevlm.runtime.engine import ShapeRange
from tests.lowering.tensorrt_graphs import BAD, CLEAN, activation, constant, gemm, model, save
from tests.quantization.graphs import save_cnn, save_transformer

PIXELS = ShapeRange(min=(1, 3, 16, 16), opt=(4, 3, 16, 16), max=(8, 3, 16, 16))


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_with_its_node_and_a_remedy(name: str, tmp_path: Path):
    case = BAD[name]
    findings = lint(case.save(tmp_path))
    assert (case.kind, case.node, case.effect) in {(f.kind, f.node, f.effect) for f in findings}
    # One cause, one kind: a graph with one thing wrong is told of that alone.
    assert {f.kind for f in findings} == {case.kind}
    for finding in findings:
        assert finding.what.endswith(".") and finding.remedy.endswith(".")


def test_every_rule_has_a_graph_that_breaks_it():
    kinds = {case.kind for case in BAD.values()}
    assert len(kinds) == len(RULES) - 1  # sizes have tests of their own, below


@pytest.mark.parametrize("name", CLEAN)
def test_what_tensorrt_takes_is_left_alone(name: str, tmp_path: Path):
    assert lint(save(CLEAN[name](), tmp_path)) == ()


@pytest.mark.parametrize("save_graph", [save_cnn, save_transformer])
def test_a_float_graph_is_left_alone(save_graph, tmp_path: Path):
    assert lint(save_graph(tmp_path / "model.onnx")) == ()


def test_an_error_names_node_reason_and_remedy(tmp_path: Path):
    with pytest.raises(ModelError) as caught:
        check_graph(BAD["bias of 32 bits"].save(tmp_path))
    assert "TensorRT rejects 'model.onnx': node 'bdq' (DequantizeLinear)" in caught.value.message
    assert "float" in caught.value.hint
    with pytest.raises(ModelError, match="would not compute what is meant by"):
        check_graph(BAD["unsigned activation"].save(tmp_path))


def test_several_findings_are_counted(tmp_path: Path):
    with pytest.raises(ModelError, match="and 1 more"):
        check_graph(save(gemm(zero=np.int8(3)), tmp_path))  # the QuantizeLinear and its DequantizeLinear


def test_a_node_without_a_name_is_called_by_what_it_writes(tmp_path: Path):
    graph = gemm(zero=np.int8(3))
    for node in graph.graph.node:
        node.name = ""
    assert {finding.node for finding in lint(save(graph, tmp_path))} == {"q_out", "xd"}


def test_zero_points_that_lie_apart_are_read(tmp_path: Path):
    graph = activation(np.full(600, 3, np.int8), scale=np.full(600, 0.1, np.float32), axis=1)
    graph.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 600
    file = tmp_path / "model.onnx"
    onnx.save(graph, file, save_as_external_data=True, location="model.onnx.data", size_threshold=100)
    assert (tmp_path / "model.onnx.data").stat().st_size > 600
    assert "zero-point" in {finding.kind for finding in lint(file)}


def test_an_operator_that_the_model_brings_itself_is_left_alone(tmp_path: Path):
    graph = model([helper.make_node("Twice", ["x"], ["y"], name="twice", domain="ours")])
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    opsets = [helper.make_opsetid("", 17)]
    graph.functions.append(helper.make_function("ours", "Twice", ["a"], ["b"], body, opsets))
    graph.opset_import.append(helper.make_opsetid("ours", 1))
    assert lint(save(graph, tmp_path)) == ()


def test_what_is_no_graph_is_refused(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff no graph")
    with pytest.raises(ModelError, match="not an ONNX graph"):
        lint(tmp_path / "model.onnx")


# --- sizes ------------------------------------------------------------------------------------------------


def test_sizes_that_fit_are_left_alone(tmp_path: Path):
    free = save_cnn(tmp_path / "free.onnx")
    assert lint(free, shapes={"pixel_values": PIXELS}, fed=[{"pixel_values": (1, 3, 16, 16)}]) == ()
    fixed = save_cnn(tmp_path / "fixed.onnx", batch=1)
    assert lint(fixed, shapes={}, fed=[{"pixel_values": (1, 3, 16, 16)}]) == ()
    assert lint(free) == ()  # nothing was said of sizes


@pytest.mark.parametrize(
    ("batch", "shapes", "fed", "words"),
    [
        ("batch", {}, (), "no range of sizes"),
        ("batch", {"pixel_values": PIXELS}, ((9, 3, 16, 16),), "will be 9×3×16×16"),
        (
            "batch",
            {"pixel_values": ShapeRange(min=(1, 3, 8, 8), opt=(1, 3, 16, 16), max=(1, 3, 16, 16))},
            (),
            "is ?×3×16×16",
        ),
        (2, {"pixel_values": PIXELS}, (), "is 2×3×16×16"),
        (2, {}, ((1, 3, 16, 16),), "will be 1×3×16×16"),
        ("batch", {"pixel_values": ShapeRange(min=(1, 3), opt=(1, 3), max=(1, 3))}, (), "is ?×3×16×16"),
        (1, {"pixels": PIXELS}, (), "no such input"),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_their_input(batch, shapes, fed, words, tmp_path: Path):
    file = save_cnn(tmp_path / "model.onnx", batch=batch)
    (finding,) = lint(file, shapes=shapes, fed=[{"pixel_values": shape} for shape in fed])
    assert finding.kind == "shape-range" and finding.op_type == "Input" and words in finding.what
    if not fed:
        with pytest.raises(ModelError, match="rejects"):
            check_graph(file, shapes=shapes)


def test_weights_that_are_graph_inputs_too_need_no_range(tmp_path: Path):
    graph = model([helper.make_node("Mul", ["x", "c"], ["y"], name="mul")], [constant("c", np.float32(2))])
    graph.graph.input.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, []))
    assert lint(save(graph, tmp_path), shapes={}) == ()


def test_the_lint_loads_no_tensorrt():
    code = "import sys, edgevlm.lowering.tensorrt_lint; print(*{n.partition('.')[0] for n in sys.modules})"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(modules) & {"tensorrt", "tensorrt_rtx", "onnx", "onnxruntime", "torch"}


# --- TensorRT's own word ----------------------------------------------------------------------------------


def rtx_errors(file: Path):
    from edgevlm.lowering.tensorrt_engine import parser_errors

    return parser_errors(file, "tensorrt-rtx")


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("name", [name for name, case in BAD.items() if case.effect == "rejected"])
def test_tensorrt_rejects_what_the_lint_says_it_rejects(name: str, tmp_path: Path):
    assert rtx_errors(BAD[name].save(tmp_path))


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("name", [name for name, case in BAD.items() if case.effect == "wrong"])
def test_tensorrt_takes_what_the_lint_says_it_gets_wrong(name: str, tmp_path: Path):
    assert not rtx_errors(BAD[name].save(tmp_path))


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("name", CLEAN)
def test_tensorrt_takes_what_the_lint_leaves_alone(name: str, tmp_path: Path):
    assert not rtx_errors(save(CLEAN[name](), tmp_path))
