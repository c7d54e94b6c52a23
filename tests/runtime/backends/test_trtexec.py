"""Engines through ``trtexec`` alone: what it is started with, what its answers become, and what its failures say.

It is a stand-in, which shows that documented options are given and documented formats are read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgevlm.errors import BundleError, MissingToolError, ModelError, StoreError, UsageError
from edgevlm.runtime.backends import trtexec
from edgevlm.runtime.backends.onnxruntime import OnnxRuntime
from edgevlm.runtime.backends.tensorrt import TensorRt
from edgevlm.runtime.backends.trtexec import TrtExec, find_trtexec, version_from
from edgevlm.runtime.engine import BuildSettings, ShapeRange, read_card
from edgevlm.runtime.spec import SessionOptions
from tests.quantization.graphs import feeds, save_cnn
from tests.runtime.backends.tensorrt_stand_in import FakeCuda, FakeTensorRt
from tests.runtime.backends.trtexec_stand_in import FUSED, LAYERS, calls_of, save_trtexec

RANGE = ShapeRange(min=(1, 3, 16, 16), opt=(1, 3, 16, 16), max=(4, 3, 16, 16))
SETTINGS = BuildSettings(backend="tensorrt", shapes={"pixel_values": RANGE})


@pytest.fixture
def use(tmp_path: Path, monkeypatch):
    """Put a stand-in first on the PATH."""

    def use(**plays) -> TrtExec:
        program = save_trtexec(tmp_path / "bin", **plays)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        found = find_trtexec()
        assert found is not None and found.program == program
        return found

    return use


def built(tool: TrtExec, folder: Path) -> Path:
    tool.build(save_cnn(folder / "model.onnx"), folder / "model.engine", settings=SETTINGS)
    return folder / "model.engine"


# --- finding it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("banner", "version"),
    [
        ("[TensorRT v100300] [b26]", "10.3.0.26"),
        ("[TensorRT v101300]", "10.13.0"),
        ("[TensorRT v110301] [b99]", "11.3.1.99"),
        ("[TensorRT v8602]", "8.6.2"),
        ("[TensorRT v10.3.0]", "10.3.0"),
        ("trtexec", None),
    ],
)
def test_the_version_is_read_from_what_it_prints_first(banner, version):
    assert version_from(f"&&&& RUNNING TensorRT.trtexec {banner} # trtexec --help") == version


def test_where_there_is_none_there_is_none(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(trtexec, "PLACES", ())
    assert find_trtexec() is None


def test_it_is_found_where_jetpack_puts_it(monkeypatch, tmp_path: Path):
    program = save_trtexec(tmp_path / "src" / "tensorrt" / "bin")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(trtexec, "PLACES", (str(program),))
    found = find_trtexec()
    assert found == TrtExec(program=program, version="10.3.0.26", major=10)


def test_one_of_an_unknown_version_is_quoted(use):
    with pytest.raises(
        MissingToolError, match=r"printed: &&&& RUNNING TensorRT\.trtexec \[Tensor Engine 3\]"
    ) as caught:
        use(banner="[Tensor Engine 3]")
    assert "10.3" in caught.value.hint


def test_one_that_is_too_old_is_refused(use):
    with pytest.raises(MissingToolError, match=r"is of TensorRT 8\.6\.2"):
        use(banner="[TensorRT v8602]")


def test_one_that_does_not_run_is_refused(monkeypatch, tmp_path: Path):
    program = tmp_path / "trtexec"
    program.write_bytes(b"\x7fELF, of another machine")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingToolError, match=r"trtexec' cannot be run: exec format error\."):
        find_trtexec()


# --- building ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("banner", "is_typed"), [("[TensorRT v100300] [b26]", True), ("[TensorRT v110000]", False)])
def test_an_engine_is_built_with_the_flags_of_its_version(banner, is_typed, use, tmp_path: Path):
    tool = use(banner=banner, is_typed=is_typed)
    engine = built(tool, tmp_path)
    (call,) = calls_of(tool.program)
    assert ("--stronglyTyped" in call) is is_typed
    assert "--maxShapes=pixel_values:4x3x16x16" in call and f"--onnx={tmp_path / 'model.onnx'}" in call
    assert not list(tmp_path.glob("partial-*")) and engine.stat().st_size > 1000


def test_the_card_says_what_trtexec_and_the_graph_say(use, tmp_path: Path):
    card = read_card(built(use(), tmp_path))
    assert (card.version, card.compute_capabilities, card.settings) == ("10.3.0.26", ("8.7",), SETTINGS)
    reference = OnnxRuntime().open(tmp_path / "model.onnx", SessionOptions())
    assert (card.inputs, card.outputs) == (reference.inputs, reference.outputs)


def test_what_trtexec_built_opens_through_the_python_module(use, tmp_path: Path, monkeypatch):
    engine = built(use(), tmp_path)
    cuda = FakeCuda()
    monkeypatch.setattr("edgevlm.runtime.backends.tensorrt._import_cuda", lambda: cuda)
    monkeypatch.setattr("edgevlm.runtime.backends.tensorrt.import_tensorrt", lambda backend: FakeTensorRt(cuda))
    (given,) = feeds("cnn", 1)
    answer = TensorRt().open(engine, SessionOptions()).run(given)["logits"]
    expected = OnnxRuntime().open(tmp_path / "model.onnx", SessionOptions()).run(given)["logits"]
    np.testing.assert_array_equal(answer, expected)
    cuda.compute_capability = "8.9"
    with pytest.raises(BundleError, match=r"compute capability 8\.7, and this one has 8\.9"):
        TensorRt().open(engine, SessionOptions())


@pytest.mark.parametrize(
    ("plays", "kind", "words"),
    [
        ({"fails": "node"}, ModelError, r"could not build 'model\.onnx': node '/head/fold' \(Col2Im\): .*not found"),
        ({"fails": "build"}, ModelError, r"Could not find any implementation for node .*\)\.\n"),
        ({"fails": "disk"}, StoreError, r"could not build 'model\.onnx': Saving engine to file failed\.\n"),
        ({"fails": "crash"}, ModelError, r"signal 11 ended it, and the last that it printed is: SMs: 8\.\n"),
        ({"fails": "nothing"}, ModelError, r"ended well but left no engine"),
        ({"fails": "no capability"}, ModelError, r"ended well but did not say for which GPU"),
        ({"gpu": ""}, MissingToolError, r"no CUDA-capable device is detected\.\n"),
    ],
)
def test_what_fails_is_told_in_one_sentence(plays, kind, words, use, tmp_path: Path):
    tool = use(**plays)
    with pytest.raises(kind, match=words) as caught:
        built(tool, tmp_path)
    assert "\n" not in caught.value.message and caught.value.hint
    assert not (tmp_path / "model.engine").exists()


def test_a_build_that_hangs_is_stopped(use, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(trtexec, "BUILD_TIMEOUT_S", 0.3)
    with pytest.raises(ModelError, match=r"was stopped: after 0\.005 minutes it had not come to build 'model\.onnx'\."):
        built(use(fails="hangs"), tmp_path)


def test_sizes_for_a_graph_of_fixed_sizes_are_refused(use, tmp_path: Path):
    graph = save_cnn(tmp_path / "model.onnx", batch=1)
    with pytest.raises(ModelError, match=r"could not build 'model\.onnx': Static model does not take explicit shapes"):
        use().build(graph, tmp_path / "model.engine", settings=SETTINGS)
    use().build(graph, tmp_path / "model.engine", settings=BuildSettings(backend="tensorrt"))


def test_engines_ahead_of_time_are_not_its_business(use, tmp_path: Path):
    settings = BuildSettings(backend="tensorrt-rtx", compute_capabilities=("8.9",))
    with pytest.raises(UsageError, match="for the GPU at hand alone"):
        use().build(save_cnn(tmp_path / "model.onnx"), tmp_path / "model.engine", settings=settings)


# --- running ----------------------------------------------------------------------------------------------


def test_answers_have_six_digits(use, tmp_path: Path):
    tool = use()
    session = tool.open(built(tool, tmp_path))
    reference = OnnxRuntime().open(tmp_path / "model.onnx", SessionOptions())
    for batch in (1, 4):
        (given,) = feeds("cnn", 1, batch=batch, seed=batch)
        answer = session.run({"pixel_values": np.asfortranarray(given["pixel_values"])})["logits"]
        expected = reference.run(given)["logits"]
        assert answer.dtype == np.float32 and answer.shape == (batch, 10)
        np.testing.assert_allclose(answer, expected, rtol=1e-5)
    assert "--shapes=pixel_values:4x3x16x16" in calls_of(tool.program)[-1]


@pytest.mark.parametrize("value", ["nan", "-inf", "inf"])
def test_what_is_no_number_stays_none(value, use, tmp_path: Path):
    tool = use(adds=value)
    engine = built(tool, tmp_path)
    answer = tool.open(engine).run(feeds("cnn", 1)[0])["logits"]
    np.testing.assert_array_equal(answer, np.full((1, 10), float(value), np.float32))


@pytest.mark.parametrize(
    ("plays", "words"),
    [
        ({"fails": "run"}, r"could not run 'model\.engine': .*an illegal memory access was encountered\)\.\n"),
        ({"fails": "names"}, r"wrote as the answers of 'model\.engine' cannot be read: it lacks 'logits'\."),
    ],
)
def test_a_run_that_fails_is_told_in_one_sentence(plays, words, use, tmp_path: Path):
    tool = use()
    engine = built(tool, tmp_path)
    save_trtexec(tool.program.parent, **plays)
    with pytest.raises(ModelError, match=words):
        tool.open(engine).run(feeds("cnn", 1)[0])


def test_bytes_that_are_no_engine_are_refused_in_its_words(use, tmp_path: Path):
    tool = use()
    engine = built(tool, tmp_path)
    engine.write_bytes(b"no engine")
    with pytest.raises(ModelError, match="Version tag does not match"):
        tool.open(engine).run(feeds("cnn", 1)[0])


def test_a_size_outside_the_range_is_refused_before_anything_runs(use, tmp_path: Path):
    tool = use()
    session = tool.open(built(tool, tmp_path))
    with pytest.raises(ModelError, match="is 5×3×16×16, and the engine was built for 1×3×16×16 to 4×3×16×16") as caught:
        session.run({"pixel_values": np.zeros((5, 3, 16, 16), np.float32)})
    assert caught.value.hint and len(calls_of(tool.program)) == 1


def test_an_engine_without_a_card_is_refused(use, tmp_path: Path):
    tool = use()
    engine = built(tool, tmp_path)
    (tmp_path / "model.engine.json").unlink()
    with pytest.raises(BundleError, match=r"has no 'model\.engine\.json'"):
        tool.open(engine)


# --- layers -----------------------------------------------------------------------------------------------


def test_layers_come_with_precision_time_and_share(use, tmp_path: Path):
    tool = use()
    found = tool.open(built(tool, tmp_path)).profile(feeds("cnn", 1)[0])
    assert (found.measured_by, found.device, found.n_runs) == ("trtexec of TensorRT 10.3.0.26", "Orin", 20)
    convolution, product, view = found.layers
    assert (convolution.name, convolution.kind, convolution.precision) == (FUSED, "CaskConvolution", "int8")
    assert convolution.layout == "Row major linear FP16 format"
    assert (convolution.time_ms, convolution.share) == (0.75, 0.75)
    assert (product.precision, product.time_ms) == ("fp16", 0.25)
    assert (view.name, view.time_ms, view.share) == ("Reshape_4", None, None)
    assert [layer.name for layer in found.slowest(1)] == [FUSED]
    call = calls_of(tool.program)[-1]
    assert {"--dumpProfile", "--separateProfileRun"} < set(call)


@pytest.mark.parametrize(
    ("plays", "words"),
    [
        ({"layers": []}, "the engine inspector's answer is no JSON"),
        ({"times": {'a "quoted" name': 1.0}}, "the profile is not as documented"),
    ],
)
def test_layers_that_cannot_be_read_are_an_error(plays, words, use, tmp_path: Path):
    tool = use()
    engine = built(tool, tmp_path)
    save_trtexec(tool.program.parent, **plays)
    with pytest.raises(ModelError, match=words):
        tool.open(engine).profile(feeds("cnn", 1)[0])


def test_a_layer_that_the_inspector_does_not_list_is_told_all_the_same(use, tmp_path: Path):
    tool = use(layers=LAYERS[:1])
    found = tool.open(built(tool, tmp_path)).profile(feeds("cnn", 1)[0])
    assert [(layer.name, layer.share) for layer in found.layers] == [(FUSED, 0.75), ("MatMul_9", 0.25)]
