"""What a session asks of TensorRT and of CUDA, in which order, and what it says where something is not there.

Most of it runs against a stand-in, which shows that the documented calls are made as documented, and not what TensorRT
makes of them: that takes a GPU, and is marked so.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgevlm.errors import BundleError, MissingToolError, ModelError
from edgevlm.runtime.backends import install_command, load_backend, tensorrt
from edgevlm.runtime.backends.onnxruntime import OnnxRuntime
from edgevlm.runtime.backends.tensorrt import Cuda, TensorRt, TensorRtRtx
from edgevlm.runtime.engine import BuildSettings, EngineCard, ShapeRange, read_card, write_card
from edgevlm.runtime.spec import SessionOptions, TensorSpec
from tests.quantization.graphs import feeds, save_cnn
from tests.runtime.backends.tensorrt_stand_in import (
    VERSION,
    FakeContext,
    FakeCuda,
    FakeEngine,
    FakeInspector,
    FakeTensorRt,
)

NONE = SessionOptions()
RANGE = ShapeRange(min=(1, 3, 16, 16), opt=(1, 3, 16, 16), max=(4, 3, 16, 16))
PIXELS = TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, 16, 16))
LOGITS = TensorSpec(name="logits", dtype="float32", shape=("batch", 10))


def save_engine(folder: Path, *, gpu: str = "8.7", inputs: tuple[TensorSpec, ...] = (PIXELS,)) -> Path:
    """What the stand-in takes for an engine, with its card."""
    graph = save_cnn(folder / "model.onnx")
    engine = folder / "model.engine"
    engine.write_bytes(b"engine:" + graph.read_bytes())
    card = EngineCard(
        version=VERSION,
        compute_capabilities=(gpu,),
        graph_sha256="0" * 64,
        settings=BuildSettings(backend="tensorrt", shapes={"pixel_values": RANGE}),
        inputs=inputs,
        outputs=(LOGITS,),
    )
    write_card(engine, card)
    return engine


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(tensorrt, "_import_cuda", lambda: fake)
    return fake


@pytest.fixture
def use(monkeypatch, cuda):
    """Put a stand-in where TensorRT would be."""

    def use(**options) -> FakeTensorRt:
        trt = FakeTensorRt(cuda, **options)
        monkeypatch.setattr(tensorrt, "import_tensorrt", lambda backend: trt)
        return trt

    return use


def test_answers_come_back_at_every_size_that_was_built_for(use, tmp_path: Path):
    use()
    session = TensorRt().open(save_engine(tmp_path), NONE)
    assert (session.inputs, session.outputs) == ((PIXELS,), (LOGITS,))
    reference = OnnxRuntime().open(tmp_path / "model.onnx", NONE)
    for batch in (1, 4, 2):
        (given,) = feeds("cnn", 1, batch=batch, seed=batch)
        answer = session.run(given)["logits"]
        assert answer.shape == (batch, 10)
        np.testing.assert_array_equal(answer, reference.run(given)["logits"])


def test_memory_is_kept_from_run_to_run_grows_where_it_must_and_is_given_back(use, cuda: FakeCuda, tmp_path: Path):
    use()
    session = TensorRt().open(save_engine(tmp_path), NONE)
    session.run(feeds("cnn", 1, batch=2)[0])
    session.run(feeds("cnn", 1, batch=1)[0])
    assert cuda.n_allocations == 2
    session.run(feeds("cnn", 1, batch=4)[0])
    assert cuda.n_allocations == 4 and len(cuda.blocks) == 2
    del session
    gc.collect()
    assert not cuda.blocks and not cuda.streams


def test_answers_are_the_callers_to_keep(use, tmp_path: Path):
    use()
    session = TensorRt().open(save_engine(tmp_path), NONE)
    first, second = feeds("cnn", 2)
    kept = session.run(first)["logits"]
    before = kept.copy()
    session.run(second)
    np.testing.assert_array_equal(kept, before)


def test_memory_of_any_layout_can_be_fed(use, tmp_path: Path):
    use()
    session = TensorRt().open(save_engine(tmp_path), NONE)
    (given,) = feeds("cnn", 1)
    expected = session.run(given)["logits"]
    mirrored = {"pixel_values": np.asfortranarray(given["pixel_values"])}
    np.testing.assert_array_equal(session.run(mirrored)["logits"], expected)


def test_tensors_that_tensorrt_wants_on_the_host_stay_there(use, cuda: FakeCuda, tmp_path: Path):
    use(on_host=("pixel_values",))
    session = TensorRt().open(save_engine(tmp_path), NONE)
    (given,) = feeds("cnn", 1)
    expected = OnnxRuntime().open(tmp_path / "model.onnx", NONE).run(given)["logits"]
    np.testing.assert_array_equal(session.run(given)["logits"], expected)
    assert cuda.n_allocations == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "was given nothing"),
        ({"pixel_values": np.zeros((1, 3, 16, 16))}, "was given pixel_values .float64"),
        ({"pixels": np.zeros((1, 3, 16, 16), np.float32)}, "was given pixels"),
        (
            {"pixel_values": np.zeros((5, 3, 16, 16), np.float32)},
            "is 5×3×16×16, and the engine was built for 1×3×16×16",
        ),
        ({"pixel_values": np.zeros((3, 16, 16), np.float32)}, "is 3×16×16"),
    ],
)
def test_what_does_not_fit_is_refused_before_tensorrt_sees_it(given, words, use, cuda: FakeCuda, tmp_path: Path):
    use()
    session = TensorRt().open(save_engine(tmp_path), NONE)
    with pytest.raises(ModelError, match=words):
        session.run(given)
    assert not cuda.n_allocations


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("set_input_shape", "Static dimension mismatch"),
        ("infer_shapes", "shapes do not add up"),
        ("get_tensor_shape", "the size of 'logits' depends on the input's values"),
        ("execute_async_v3", "illegal memory access"),
    ],
)
def test_what_fails_in_a_run_is_told_in_tensorrts_words(fails, words, use, tmp_path: Path):
    use(fails=fails)
    session = TensorRt().open(save_engine(tmp_path), NONE)
    with pytest.raises(ModelError, match=words) as caught:
        session.run(feeds("cnn", 1)[0])
    assert "\n" not in caught.value.message


def test_too_little_memory_is_an_error_of_one_line(use, cuda: FakeCuda, tmp_path: Path):
    use()
    session = TensorRt().open(save_engine(tmp_path), NONE)
    cuda.memory_bytes = 100
    with pytest.raises(ModelError, match=r"cudaMalloc: out of memory\."):
        session.run(feeds("cnn", 1)[0])


def test_layers_are_timed_without_the_first_runs(use, tmp_path: Path):
    use()
    found = TensorRt().open(save_engine(tmp_path), NONE).profile(feeds("cnn", 1)[0])
    assert (found.measured_by, found.device) == ("TensorRT 10.3.0", "GPU of compute capability 8.7")
    convolution, view = found.layers
    assert (convolution.precision, convolution.time_ms, convolution.share) == ("fp16", 0.75, 0.75)
    assert (view.name, view.time_ms, view.share) == ("Reshape_4", 0.25, 0.25)


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("get_engine_information", "does not tell the engine's layers: .* is no JSON"),
        ("report_layer_time", "timed none"),
    ],
)
def test_layers_that_tensorrt_does_not_tell_are_an_error(fails, words, use, tmp_path: Path):
    use(fails=fails)
    with pytest.raises(ModelError, match=words):
        TensorRt().open(save_engine(tmp_path), NONE).profile(feeds("cnn", 1)[0])


@pytest.mark.parametrize(
    ("card", "module", "is_taken"),
    [("10.3.0.26", "10.3.0", True), ("10.3.0", "10.3.0.26", True), ("10.3.0.26", "10.3.0.30", False),
     ("10.3.1.26", "10.3.0", False), ("10.3", "10.3.0", False)],
)  # fmt: skip
def test_versions_are_the_same_as_far_as_both_are_told(card, module, is_taken, tmp_path: Path):
    save_engine(tmp_path)
    known = msgspec.structs.replace(read_card(tmp_path / "model.engine"), version=card)
    assert (known.refusal("tensorrt", module) is None) is is_taken


# --- opening ----------------------------------------------------------------------------------------------


def test_an_engine_for_another_gpu_is_refused(use, tmp_path: Path):
    use()
    with pytest.raises(BundleError, match=r"compute capability 8\.9, and this one has 8\.7") as caught:
        TensorRt().open(save_engine(tmp_path, gpu="8.9"), NONE)
    assert "anew" in caught.value.hint


def test_an_engine_of_another_version_is_refused_before_the_gpu_is_asked(use, cuda: FakeCuda, tmp_path: Path):
    use().__version__ = "11.0.0"
    cuda.compute_capability = None
    with pytest.raises(BundleError, match=r"by tensorrt 10\.3\.0, and this is 11\.0\.0"):
        TensorRt().open(save_engine(tmp_path), NONE)


def test_an_engine_of_the_other_library_is_refused(use, tmp_path: Path):
    use()
    with pytest.raises(BundleError, match="built for tensorrt, and this is tensorrt-rtx"):
        TensorRtRtx().open(save_engine(tmp_path), NONE)


def test_bytes_that_are_no_engine_are_refused_in_tensorrts_words(use, tmp_path: Path):
    use()
    engine = save_engine(tmp_path)
    engine.write_bytes(b"no engine")
    with pytest.raises(BundleError, match="readHeader: Assertion bufferSize >= minBufferSize failed") as caught:
        TensorRt().open(engine, NONE)
    assert "but a warning" not in caught.value.message


def test_an_engine_without_a_card_is_refused(use, tmp_path: Path):
    use()
    engine = save_engine(tmp_path)
    (tmp_path / "model.engine.json").unlink()
    with pytest.raises(BundleError, match=r"has no 'model\.engine\.json'"):
        TensorRt().open(engine, NONE)


def test_an_engine_whose_tensors_are_not_those_of_its_card_is_refused(use, tmp_path: Path):
    use()
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch", 16))
    with pytest.raises(BundleError, match=r"pixel_values \(input float32\), and its card says input_ids"):
        TensorRt().open(save_engine(tmp_path, inputs=(ids,)), NONE)


def test_a_session_takes_no_settings(tmp_path: Path):
    with pytest.raises(BundleError, match="cannot be told"):
        TensorRt().open(tmp_path / "model.engine", SessionOptions(entries={"cache": "/etc"}))


# --- what is not there ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_library_that_is_not_installed_has_no_version(backend, monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert load_backend(backend).version() is None
    with pytest.raises(MissingToolError, match="is not installed, or does not load") as caught:
        load_backend(backend).open(tmp_path / "model.engine", NONE)
    assert caught.value.exit_code == 3
    assert install_command(backend).removeprefix("pip install ") in caught.value.hint


def test_without_cuda_bindings_there_is_no_device(monkeypatch):
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "cuda-bindings" in (TensorRt().missing_device() or "")


def test_a_driver_that_is_missing_is_named(cuda: FakeCuda):
    cuda.compute_capability = None
    assert "CUDA driver version is insufficient" in (TensorRt().missing_device() or "")
    cuda.compute_capability = "12.0"
    assert TensorRt().missing_device() is None
    assert Cuda().compute_capability() == "12.0"


def test_neither_library_is_loaded_until_it_is_asked_for():
    code = "import sys, edgevlm.runtime.backends.tensorrt_build; print(*{n.partition('.')[0] for n in sys.modules})"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(modules) & {"tensorrt", "tensorrt_rtx", "cuda", "onnx", "onnxruntime", "torch"}


# --- the real libraries -----------------------------------------------------------------------------------


def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_the_stand_in_has_no_call_that_tensorrt_has_not(rtx):
    assert public(FakeContext) <= set(dir(rtx.IExecutionContext))
    assert public(FakeEngine) | {"num_io_tensors"} <= set(dir(rtx.ICudaEngine))
    assert {"deserialize_cuda_engine"} <= set(dir(rtx.Runtime))
    assert {"profiler"} <= set(dir(rtx.IExecutionContext)) and {"report_layer_time"} <= set(dir(rtx.IProfiler))
    assert public(FakeInspector) | {"execution_context"} <= set(dir(rtx.EngineInspector))
    assert {"JSON"} <= set(rtx.LayerInformationFormat.__members__)
    assert {"INTERNAL_ERROR", "ERROR", "WARNING"} <= set(rtx.ILogger.Severity.__members__)
    assert {"FLOAT", "HALF", "INT8", "INT32", "INT64", "BOOL", "UINT8"} <= set(rtx.DataType.__members__)
    assert {"DEVICE", "HOST"} <= set(rtx.TensorLocation.__members__)


def test_the_stand_in_has_no_call_that_cuda_has_not():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    assert {name for name in public(FakeCuda) if name.startswith("cuda")} <= set(dir(runtime))
    assert {member.name for member in FakeCuda.cudaMemcpyKind} <= set(runtime.cudaMemcpyKind.__members__)
    assert {member.name for member in FakeCuda.cudaDeviceAttr} <= set(runtime.cudaDeviceAttr.__members__)
    assert runtime.cudaGetErrorString(runtime.cudaError_t(35))[1] == FakeCuda().cudaGetErrorString(35)[1]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_built_here_gives_what_onnx_runtime_gives(backend, tmp_path: Path):
    runs = load_backend(backend)
    assert isinstance(runs, TensorRt)
    if runs.version() is None or runs.missing_device():
        pytest.skip(runs.missing_device() or f"{backend} is not installed")
    from edgevlm.lowering.tensorrt_engine import build_engine

    graph = save_cnn(tmp_path / "model.onnx")
    build_engine(
        graph,
        tmp_path / "model.engine",
        settings=BuildSettings(backend=backend, shapes={"pixel_values": RANGE}),
    )
    session = runs.open(tmp_path / "model.engine", NONE)
    reference = OnnxRuntime().open(graph, NONE)
    for batch in (1, 4, 2):
        (given,) = feeds("cnn", 1, batch=batch)
        # TF32 keeps ten bits of a float's fraction.
        np.testing.assert_allclose(session.run(given)["logits"], reference.run(given)["logits"], atol=5e-3)
