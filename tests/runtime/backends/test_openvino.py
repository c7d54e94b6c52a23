"""OpenVINO gives what ONNX Runtime gives, by the same names, and says plainly what it will not take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgevlm.errors import BundleError, MissingToolError, ModelError
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.backends.onnxruntime import OnnxRuntime
from edgevlm.runtime.backends.openvino import OpenVino, openvino_core
from edgevlm.runtime.spec import Array, SessionOptions
from tests.quantization.graphs import feeds, save_cnn, save_transformer
from tests.runtime import tiny

ONE = SessionOptions(n_threads=1)

needs_openvino = pytest.mark.skipif(OpenVino().version() is None, reason="openvino is not installed")


def save_two_outputs(file: Path) -> Path:
    """Word vectors and their mean: int64 in, two outputs, one of them under two names."""
    table = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["hidden"]),
            helper.make_node("Identity", ["hidden"], ["last_hidden_state"]),
            helper.make_node("Identity", ["hidden"], ["copy"]),
            helper.make_node("ReduceMean", ["hidden"], ["text_embeds"], axes=[1], keepdims=0),
        ],
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [
            helper.make_tensor_value_info("text_embeds", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", 3]),
            helper.make_tensor_value_info("copy", TensorProto.FLOAT, ["batch", "sequence", 3]),
        ],
        [numpy_helper.from_array(table, "table")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    return file


def save_text(file: Path) -> Path:
    file.write_bytes(tiny.text_graph())
    return file


def save_image(file: Path) -> Path:
    file.write_bytes(tiny.image_graph())
    return file


def ids(*shape: int) -> Array:
    return np.random.default_rng(3).integers(0, 6, size=shape, dtype=np.int64)


CASES = {
    "cnn": (save_cnn, [feeds("cnn", 1, batch=n)[0] for n in (1, 3)]),
    "transformer": (save_transformer, [feeds("transformer", 1, batch=n)[0] for n in (2, 1)]),
    "image": (save_image, [{"pixel_values": np.ones((n, 3, 8, 8), np.float32)} for n in (1, 4)]),
    "text": (save_text, [{"input_ids": ids(n, 4), "attention_mask": np.ones((n, 4), np.int64)} for n in (1, 5)]),
    "two outputs": (save_two_outputs, [{"input_ids": ids(1, 3)}, {"input_ids": ids(2, 5)}]),
}


@needs_openvino
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_onnx_runtime(name: str, tmp_path: Path):
    save, inputs = CASES[name]
    file = save(tmp_path / "graph.onnx")
    ours, theirs = OpenVino().open(file, ONE), OnnxRuntime().open(file, ONE)
    assert [(s.name, s.dtype, len(s.shape)) for s in ours.inputs] == [
        (s.name, s.dtype, len(s.shape)) for s in theirs.inputs
    ]
    assert [s.name for s in ours.outputs] == [s.name for s in theirs.outputs]
    for given in inputs:
        expected, actual = theirs.run(given), ours.run(given)
        assert actual.keys() == expected.keys()
        for output, value in expected.items():
            assert actual[output].dtype == value.dtype
            np.testing.assert_allclose(actual[output], value, atol=1e-4)


@needs_openvino
def test_what_a_run_gives_is_the_callers_to_keep_and_what_it_takes_stays_as_it_is(tmp_path: Path):
    session = OpenVino().open(save_cnn(tmp_path / "graph.onnx"), ONE)
    first, second = feeds("cnn", 2)
    before = first["pixel_values"].copy()
    kept = session.run(first)["logits"]
    copy = kept.copy()
    session.run(second)
    assert np.array_equal(kept, copy)
    assert kept.flags.owndata and kept.flags.writeable
    assert np.array_equal(first["pixel_values"], before)


@needs_openvino
def test_an_answer_is_written_anew_only_where_nobody_holds_the_last_one(tmp_path: Path):
    session = OpenVino().open(save_cnn(tmp_path / "graph.onnx", batch=1), ONE)
    first, second = feeds("cnn", 2)
    place = session.run(first)["logits"].__array_interface__["data"][0]
    assert session.run(second)["logits"].__array_interface__["data"][0] == place
    view = session.run(first)["logits"][0, 2:]
    copy = view.copy()
    assert session.run(second)["logits"].__array_interface__["data"][0] != place
    assert np.array_equal(view, copy)


@needs_openvino
def test_memory_of_any_layout_can_be_fed(tmp_path: Path):
    session = OpenVino().open(save_cnn(tmp_path / "graph.onnx"), ONE)
    (given,) = feeds("cnn", 1)
    expected = session.run(given)["logits"]
    mirrored = np.asfortranarray(given["pixel_values"])
    frozen = given["pixel_values"].copy()
    frozen.flags.writeable = False
    assert np.array_equal(session.run({"pixel_values": mirrored})["logits"], expected)
    assert np.array_equal(session.run({"pixel_values": frozen})["logits"], expected)


@needs_openvino
def test_a_fixed_batch_is_a_number(tmp_path: Path):
    session = OpenVino().open(save_cnn(tmp_path / "graph.onnx", batch=2), ONE)
    assert session.inputs[0].shape == (2, 3, 16, 16)
    with pytest.raises(ModelError, match="could not run"):
        session.run(feeds("cnn", 1)[0])


@needs_openvino
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"pixel_values": np.zeros((1, 3, 16, 16), np.float64)},
        {"pixels": np.zeros((1, 3, 16, 16), np.float32)},
        {"pixel_values": np.zeros((1, 3, 16, 17), np.float32)},
    ],
    ids=["nothing", "other type", "other name", "other shape"],
)
def test_what_does_not_fit_is_refused_in_one_line(given, tmp_path: Path):
    session = OpenVino().open(save_cnn(tmp_path / "graph.onnx"), ONE)
    with pytest.raises(ModelError) as caught:
        session.run(given)
    assert "\n" not in caught.value.message
    assert "src/" not in caught.value.message


@needs_openvino
@pytest.mark.parametrize(
    ("name", "content", "entries"),
    [
        ("graph.onnx", b"nonsense", {}),
        ("graph.xml", b"<net>", {}),
        ("graph.bin", b"", {}),
        ("good", None, {"CACHE_DIR": "cache"}),
        ("good", None, {"NUM_STREAMS": "many"}),
    ],
)
def test_a_graph_or_a_setting_that_is_refused_is_a_bundle_error(name, content, entries, tmp_path: Path):
    file = tmp_path / name
    if content is None:
        file = save_cnn(tmp_path / "good.onnx")
    else:
        file.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        OpenVino().open(file, SessionOptions(n_threads=1, entries=entries))
    assert "\n" not in caught.value.message
    assert not (Path.cwd() / "cache").exists()


@needs_openvino
def test_it_computes_in_float32_unless_it_is_told_otherwise(tmp_path: Path):
    if "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor does not compute in bfloat16, so OpenVINO would not either")
    file, (given,) = save_transformer(tmp_path / "graph.onnx"), feeds("transformer", 1)
    expected = OnnxRuntime().open(file, ONE).run(given)["embeds"]
    plain = OpenVino().open(file, ONE).run(given)["embeds"]
    told = SessionOptions(n_threads=1, entries={"INFERENCE_PRECISION_HINT": "bf16"})
    short = OpenVino().open(file, told).run(given)["embeds"]
    assert np.abs(plain - expected).max() < 1e-4
    assert 1e-3 < np.abs(short - expected).max() < 0.2


def test_without_the_library_there_is_no_version_and_a_hint(monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    backend = load_backend("openvino")
    assert backend.version() is None
    with pytest.raises(MissingToolError) as caught:
        backend.open(tmp_path / "graph.xml", ONE)
    assert caught.value.exit_code == 3
    assert "edgevlm[openvino]" in caught.value.hint


@needs_openvino
def test_nothing_is_reported_home_and_the_module_that_would_do_it_stays_usable():
    script = (
        "import sys\n"
        "from edgevlm.runtime.backends import load_backend\n"
        "assert load_backend('openvino').version()\n"
        "print(*[name for name in sys.modules if name.startswith('openvino_telemetry') or name == 'torch'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@needs_openvino
def test_one_row_has_a_plan_of_its_own_and_any_number_another(tmp_path: Path):
    session = OpenVino().open(save_image(tmp_path / "model.onnx"), ONE)
    rows = np.random.default_rng(0).random((3, 3, tiny.SIZE, tiny.SIZE), dtype=np.float32)
    assert list(session._plans) == [True], "most pictures come alone"
    first = session.run({"pixel_values": rows[:1]})["logits"]
    assert list(session._plans) == [True] and first.shape == (1, 3)
    whole = session.run({"pixel_values": rows})["logits"]
    assert sorted(session._plans) == [False, True] and whole.shape == (3, 3)
    np.testing.assert_allclose(first, whole[:1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(session.run({"pixel_values": rows[:1]})["logits"], first)
    assert session.inputs[0].shape[0] == session.outputs[0].shape[0] != 1, "what it takes is still free"


@needs_openvino
def test_where_more_than_the_batch_is_free_there_is_one_plan(tmp_path: Path):
    session = OpenVino().open(save_two_outputs(tmp_path / "model.onnx"), ONE)
    session.run({"input_ids": ids(1, 4)})
    session.run({"input_ids": ids(2, 3)})
    assert list(session._plans) == [False]


TWO_SESSIONS = """
import signal, sys
from pathlib import Path
from edgevlm.runtime.backends.openvino import OpenVino
from edgevlm.runtime.spec import SessionOptions

first, second = (OpenVino().open(Path(sys.argv[1]), SessionOptions(n_threads=1)) for _ in range(2))
del first
del second
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@needs_openvino
@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks of Linux")
def test_a_signal_finds_its_stack_after_sessions_that_went_in_the_order_in_which_they_came(tmp_path: Path):
    command = [sys.executable, "-c", TWO_SESSIONS, save_cnn(tmp_path / "graph.onnx")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
