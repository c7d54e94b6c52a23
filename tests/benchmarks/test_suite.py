"""The benchmark suite without rivals' environments: its parts, and a run of everything on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from benchmarks.suite import environments, making
from benchmarks.suite.__main__ import main, slug
from benchmarks.suite.cases import CASES
from benchmarks.suite.making import make
from benchmarks.suite.remote import RemoteSession, named_as
from benchmarks.suite.rivals import RIVALS, rivals_named
from benchmarks.suite.spec import CaseResult, MakeRequest
from edgevlm.errors import ModelError
from edgevlm.measure.spec import Subject
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.spec import SessionOptions, TensorSpec, from_json

X = TensorSpec(name="x", dtype="float32", shape=(1, 3, 8, 8))
Y = TensorSpec(name="y", dtype="float32", shape=(1, 4))


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Every operator that the real ONNX models have, in a graph of a few kilobytes."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(4, 3, 3, 3)),
        "slope": rng.random((4, 1, 1)),
        **{name: rng.random(4) + 0.5 for name in ("scale", "shift", "mean", "variance")},
        "scales": np.array([1, 1, 2, 2]),
        "half": np.array([0.5]),
        "gemm": rng.normal(size=(4, 4)),
        "bias": rng.normal(size=4),
        "square": rng.normal(size=(9, 9)),
    }
    ints = {"from": [0, 0], "to": [9, 2**62], "axes": [2, 3], "steps": [1, 1], "pads": [0, 0, 0, 0, 0, 0, 1, 1]}
    initializers = [onnx.numpy_helper.from_array(np.float32(value), name) for name, value in weights.items()]
    initializers += [onnx.numpy_helper.from_array(np.int64(value), name) for name, value in ints.items()]
    initializers.append(onnx.numpy_helper.from_array(np.int64([0, 2, 2, 9, 9]), "groups"))
    initializers.append(onnx.numpy_helper.from_array(np.int64([0, 4, 9, 9]), "channels"))
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("PRelu", ["a", "slope"], ["b"]),
        node("BatchNormalization", ["b", "scale", "shift", "mean", "variance"], ["c"]),
        node("Resize", ["c", "", "scales"], ["d"], mode="linear", coordinate_transformation_mode="align_corners"),
        node("Resize", ["c", "", "scales"], ["e"], mode="nearest", coordinate_transformation_mode="asymmetric",
             nearest_mode="floor"),
        node("Sigmoid", ["d"], ["f"]),
        node("Mul", ["e", "f"], ["g"]),
        node("MaxPool", ["g"], ["h"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1]),
        node("AveragePool", ["h"], ["i"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1], count_include_pad=1),
        node("Pad", ["i", "pads"], ["j"]),
        node("Slice", ["j", "from", "to", "axes", "steps"], ["k"]),
        node("MatMul", ["k", "square"], ["l"]),
        node("Reshape", ["l", "groups"], ["m"]),
        node("Transpose", ["m"], ["n"], perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["n", "channels"], ["o"]),
        node("Concat", ["o", "l"], ["p"], axis=2),
        node("Relu", ["p"], ["q"]),
        node("GlobalAveragePool", ["q"], ["r"]),
        node("Add", ["r", "half"], ["s"]),
        node("Flatten", ["s"], ["t"]),
        node("Gemm", ["t", "gemm", "bias"], ["y"], transB=1),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, list(s.shape)) for s in (X, Y)]
    proto = helper.make_graph(nodes, "operators", ends[:1], ends[1:], initializers)
    onnx.save(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def pixels() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)}


def test_torch_runs_the_operators_of_an_onnx_graph_as_onnx_runtime_does(graph: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from benchmarks.suite.onnx_in_torch import module_from_onnx

    expected = load_backend("onnxruntime").open(graph, SessionOptions(n_threads=1)).run(pixels())["y"]
    with torch.inference_mode():
        (got,) = module_from_onnx(graph)(**{name: torch.from_numpy(value) for name, value in pixels().items()})
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_an_operator_that_has_no_torch_call_is_named(graph: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    from benchmarks.suite.onnx_in_torch import module_from_onnx

    model = onnx.load(graph)
    model.graph.node[-4].op_type = "GlobalMaxPool"
    onnx.save(model, graph)
    with pytest.raises(NotImplementedError, match="GlobalMaxPool"):
        module_from_onnx(graph)


def test_a_session_of_another_process_answers_as_one_here(graph: Path) -> None:
    here = load_backend("onnxruntime").open(graph, SessionOptions(n_threads=1))
    subject = Subject(name="there", backend="onnxruntime", file=str(graph), inputs="", python=sys.executable)
    with RemoteSession(subject, inputs=here.inputs, outputs=here.outputs) as there:
        for _ in range(2):
            np.testing.assert_array_equal(there.run(pixels())["y"], here.run(pixels())["y"])


def test_what_cannot_be_opened_there_is_said_in_the_tools_words(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    subject = Subject(name="there", backend="onnxruntime", file=str(tmp_path / "broken.onnx"), inputs="")
    with pytest.raises(ModelError, match=r"refuses 'broken.onnx'"):
        RemoteSession(subject, inputs=(X,), outputs=(Y,))


def test_outputs_go_by_name_or_by_order() -> None:
    one, two = np.zeros(1), np.ones(1)
    assert named_as({"b": two, "a": one}, ["a", "b"]) == {"a": one, "b": two}
    assert named_as({"first": one, "second": two}, ["a", "b"]) == {"a": one, "b": two}
    assert named_as({"a": one, "more": two}, ["a"]) == {"a": one}
    with pytest.raises(ModelError, match="gives x, y, where a"):
        named_as({"x": one, "y": two}, ["a"])


def request(graph: Path, out: Path, maker: str) -> MakeRequest:
    calibration = graph.with_name("calibration.npz")
    np.savez(calibration, x=np.concatenate([pixels()["x"]] * 3))
    return MakeRequest(
        maker=f"benchmarks.suite.makers.{maker}",
        source=str(graph),
        calibration=str(calibration),
        outputs=("y",),
        is_transformer=False,
        settings={},
        out=str(out),
    )


def test_an_artifact_is_made_once(graph: Path, tmp_path: Path) -> None:
    asked = request(graph, tmp_path / "out", "onnxruntime:dynamic_int8")
    made = make(sys.executable, asked)
    assert made.failure is None, made.failure
    first = (tmp_path / "out" / made.file).stat().st_mtime_ns
    assert make(sys.executable, asked) == made
    assert (tmp_path / "out" / made.file).stat().st_mtime_ns == first
    onnx.save(onnx.load(graph), graph.with_name("other.onnx"))
    model = onnx.load(graph)
    model.doc_string = "another"
    onnx.save(model, graph)
    make(sys.executable, asked)
    assert (tmp_path / "out" / made.file).stat().st_mtime_ns > first


def test_why_an_artifact_cannot_be_made_is_kept(graph: Path, tmp_path: Path) -> None:
    graph.write_bytes(b"no graph")
    failure = make(sys.executable, request(graph, tmp_path / "out", "onnxruntime:dynamic_int8")).failure
    assert failure is not None and "Error" in failure


def test_last_words_skip_empty_lines() -> None:
    assert making.last_words("one\ntwo\n\n", 1) == "two"
    assert making.last_words("", 3) == "Its process ended with status 3."


def test_every_rival_has_its_environment_pinned() -> None:
    assert {rival.environment for rival in RIVALS} <= set(environments.names())
    for name in environments.names():
        for file in environments.HERE.glob(f"{name}*.txt"):
            lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
            assert lines and all(line.count("==") == 1 for line in lines), file.name
    assert len({rival.name for rival in RIVALS}) == len(RIVALS)


def test_rivals_are_found_by_parts_of_their_names() -> None:
    assert [each.name for each in rivals_named(["nncf"], environment="openvino")] == ["OpenVINO NNCF int8"]
    assert [each.name for each in rivals_named(["EAGER"])] == ["PyTorch eager", "ONNX Runtime float"]
    assert rivals_named(()) == RIVALS


def test_cases_write_files_of_their_own() -> None:
    assert len({case.key for case in CASES}) == len(CASES)


def test_a_processor_has_a_folder() -> None:
    assert slug("Intel(R) Xeon(R) Processor") == "intel-xeon-processor"
    assert slug("AMD EPYC") == "amd-epyc"


@pytest.mark.slow
def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a random model to the table: edgevlm, float and two rivals in turns."""
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "store"))
    arguments = ["--quick", "--threads", "1", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (written,) = (tmp_path / "suite").glob("*/quick.json")
    result = from_json(written.read_bytes(), CaseResult)
    assert [each.failure for each in result.rivals] == [None] * 3
    (found,) = result.threads
    assert found.ours.judged is not None and found.ours.judged.is_within
    assert {ratio.subject for ratio in found.final.ratios} == {each.name for each in result.rivals}
    assert all(each.turns_ms and each.tools for each in found.final.measurements)
    assert found.best in {each.name for each in result.rivals}
    table = (tmp_path / "suite.md").read_text()
    assert "ONNX Runtime static int8" in table and "a small ResNet" in (tmp_path / "suite-summary.md").read_text()
    again = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert again.exit_code == 0 and "preparing" not in again.output
