"""Engines are really built here, ahead of time, by TensorRT for RTX, which needs no GPU for that; none is run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import onnx
import pytest

from edgevlm.errors import MissingToolError, ModelError, UsageError
from edgevlm.export import Exported, export_graph
from edgevlm.ingest import read_model
from edgevlm.lowering.tensorrt import TensorRtRtxLowering
from edgevlm.lowering.tensorrt_engine import (
    BuildSettings,
    ShapeRange,
    build_engine,
    buildable_compute_capabilities,
    parser_errors,
)
from edgevlm.quantization.calibration import CalibrationRecipe, collect_ranges
from edgevlm.quantization.schemes import Calibration
from edgevlm.report.spec import Proof
from edgevlm.runtime.backends import tensorrt, tensorrt_build
from edgevlm.runtime.engine import AskedRange, EngineCard, graph_digest, read_card
from edgevlm.runtime.spec import Array, TensorSpec, from_json
from edgevlm.search.spec import Variant
from edgevlm.steps.engines import settings_of
from edgevlm.store import write_spec
from edgevlm.target import load_target
from tests.families.checkpoints import CHECKPOINTS, Tiny, write_checkpoint
from tests.families.samples import samples_of
from tests.lowering.tensorrt_graphs import BAD, contrib, save
from tests.lowering.test_tensorrt import CALIBRATION, NAMES, TARGET, Graph, lower, prepared_graph, recipes
from tests.quantization.graphs import save_cnn
from tests.runtime.backends.tensorrt_stand_in import FakeCuda

GPUS = ("8.6", "8.9", "12.0")  # RTX 30, 40 and 50
SETTINGS = BuildSettings(backend="tensorrt-rtx", compute_capabilities=GPUS)
RANGE = ShapeRange(min=(1, 3, 16, 16), opt=(2, 3, 16, 16), max=(8, 3, 16, 16))

needs_rtx = pytest.mark.usefixtures("rtx")


@pytest.fixture(scope="module", params=["cnn", "transformer"])
def graph(request, tmp_path_factory) -> Graph:
    return prepared_graph(request.param, tmp_path_factory.mktemp(request.param), batch=1)


@needs_rtx
@pytest.mark.parametrize("name", NAMES)
def test_every_form_builds_for_three_kinds_of_gpu(name: str, graph: Graph, tmp_path: Path):
    file = lower(graph, recipes(graph)[name], tmp_path / "out")
    engine = tmp_path / "model.engine"
    card = build_engine(file, engine, settings=SETTINGS)
    assert engine.stat().st_size > 0
    assert card == read_card(engine)
    assert (card.compute_capabilities, card.graph_sha256) == (GPUS, graph_digest(file))
    exported = onnx.load(graph.file).graph
    for specs, values in ((card.inputs, exported.input), (card.outputs, exported.output)):
        assert [(s.name, s.dtype, s.shape) for s in specs] == [
            (v.name, "float32", tuple(d.dim_value for d in v.type.tensor_type.shape.dim)) for v in values
        ]
    assert {file.name for file in tmp_path.iterdir()} == {"out", "model.engine", "model.engine.json"}


@needs_rtx
def test_free_dimensions_are_built_for_a_range(tmp_path: Path):
    file = save_cnn(tmp_path / "model.onnx")
    settings = msgspec.structs.replace(
        SETTINGS, shapes={"pixel_values": RANGE}, workspace_bytes=1 << 28, optimization_level=1
    )
    card = build_engine(file, tmp_path / "model.engine", settings=settings)
    assert card.settings == settings
    assert card.inputs == (TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, 16, 16)),)


@needs_rtx
def test_the_same_graph_gives_the_same_engine(tmp_path: Path):
    file = save_cnn(tmp_path / "model.onnx", batch=1)
    cards = [build_engine(file, tmp_path / f"{n}.engine", settings=SETTINGS) for n in range(2)]
    assert cards[0].key == cards[1].key
    assert (tmp_path / "0.engine").read_bytes() == (tmp_path / "1.engine").read_bytes()


@needs_rtx
def test_one_kind_of_gpu_takes_less_room_than_three(tmp_path: Path):
    file = save_cnn(tmp_path / "model.onnx", batch=1)
    sizes = []
    for gpus in (GPUS, GPUS[:1]):
        settings = msgspec.structs.replace(SETTINGS, compute_capabilities=gpus)
        build_engine(file, tmp_path / "model.engine", settings=settings)
        sizes.append((tmp_path / "model.engine").stat().st_size)
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize(("target", "gpu"), tuple(zip(("rtx-30", "rtx-40", "rtx-50"), GPUS, strict=True)))
def test_a_card_of_each_series_gets_an_engine_for_its_own_gpu(target: str, gpu: str, tmp_path: Path):
    proof = Proof(
        component="model", route="", n_inputs=1, batches=(1,), max_relative_error=0.0, tolerance=0.0, n_nodes=1
    )
    pixels = TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, 16, 16))
    exported = Exported(
        name="model", file="model.onnx", files=("model.onnx",), inputs=(pixels,), outputs=(), opset=20, n_bytes=1,
        proof=proof,
    )  # fmt: skip
    write_spec(tmp_path / "exported.json", exported)
    asked = {"pixel_values": AskedRange(min=RANGE.min, opt=RANGE.opt, max=RANGE.max)}
    job: Any = SimpleNamespace(
        model=SimpleNamespace(processing=SimpleNamespace(text=None)),
        target=load_target(target),
        request=SimpleNamespace(shapes=asked),
    )
    work: Any = SimpleNamespace(job=job, inputs={"export:model": tmp_path})
    variant = Variant(graph="model", name="tensorrt-rtx-fp16", precision="fp16", backend="tensorrt-rtx")
    found = settings_of(work, variant)
    assert found == msgspec.structs.replace(SETTINGS, shapes={"pixel_values": RANGE}, compute_capabilities=(gpu,))


# --- what is refused --------------------------------------------------------------------------------------


def test_the_lint_comes_before_tensorrt(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tensorrt_build, "import_tensorrt", lambda backend: pytest.fail("TensorRT was asked"))
    with pytest.raises(ModelError, match=r"node 'q' \(QuantizeLinear\)"):
        build_engine(BAD["unsigned activation"].save(tmp_path), tmp_path / "model.engine", settings=SETTINGS)
    with pytest.raises(ModelError, match="input 'pixel_values' has free dimensions"):
        build_engine(save_cnn(tmp_path / "free.onnx"), tmp_path / "model.engine", settings=SETTINGS)


@needs_rtx
def test_what_the_parser_rejects_is_told_by_node_operator_and_reason(tmp_path: Path, monkeypatch):
    file = save(contrib("FastGelu"), tmp_path)
    (error,) = parser_errors(file, "tensorrt-rtx")
    assert (error.node, error.op_type) == ("contrib", "FastGelu") and "Plugin not found" in error.reason
    monkeypatch.setattr("edgevlm.lowering.tensorrt_engine.check_graph", lambda graph, shapes: None)
    with pytest.raises(ModelError, match=r"does not take 'model\.onnx': node 'contrib' \(FastGelu\): ") as caught:
        build_engine(file, tmp_path / "model.engine", settings=SETTINGS)
    assert "\n" not in caught.value.message and caught.value.hint
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


@needs_rtx
def test_what_the_builder_rejects_is_told_in_its_words(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("edgevlm.lowering.tensorrt_engine.check_graph", lambda graph, shapes: None)
    with pytest.raises(ModelError, match=r"cannot build 'model\.onnx': .*no optimization profile"):
        build_engine(save_cnn(tmp_path / "model.onnx"), tmp_path / "model.engine", settings=SETTINGS)


@needs_rtx
def test_bytes_that_are_no_graph_are_refused_in_one_sentence(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("edgevlm.lowering.tensorrt_engine.check_graph", lambda graph, shapes: None)
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff no graph")
    with pytest.raises(ModelError, match=r"does not take 'model\.onnx'"):
        build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", settings=SETTINGS)


@needs_rtx
def test_gpus_that_this_tensorrt_does_not_know_are_refused(tmp_path: Path):
    known = buildable_compute_capabilities("tensorrt-rtx")
    assert set(GPUS) <= set(known) and "8.7" not in known  # a Jetson Orin builds its own
    settings = msgspec.structs.replace(SETTINGS, compute_capabilities=("8.6", "8.7"))
    with pytest.raises(UsageError, match=r"cannot build for compute capability 8\.7\."):
        build_engine(save_cnn(tmp_path / "model.onnx", batch=1), tmp_path / "model.engine", settings=settings)


@needs_rtx
def test_a_timing_cache_is_for_full_tensorrt(tmp_path: Path):
    with pytest.raises(UsageError, match="timing cache"):
        build_engine(
            save_cnn(tmp_path / "model.onnx", batch=1),
            tmp_path / "model.engine",
            settings=SETTINGS,
            timing_cache=tmp_path / "cache",
        )


@needs_rtx
def test_the_gpu_at_hand_must_be_at_hand(tmp_path: Path, monkeypatch):
    cuda = FakeCuda(None)
    monkeypatch.setattr(tensorrt, "_import_cuda", lambda: cuda)
    settings = BuildSettings(backend="tensorrt-rtx")
    with pytest.raises(MissingToolError, match="no NVIDIA GPU") as caught:
        build_engine(save_cnn(tmp_path / "model.onnx", batch=1), tmp_path / "model.engine", settings=settings)
    assert caught.value.exit_code == 3


def test_without_tensorrt_there_is_nothing_to_build_with(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingToolError, match="TensorRT is not installed") as caught:
        build_engine(
            save_cnn(tmp_path / "model.onnx", batch=1),
            tmp_path / "model.engine",
            settings=BuildSettings(backend="tensorrt"),
        )
    assert caught.value.exit_code == 3


# --- full TensorRT, by a stand-in that notes what it is told ------------------------------------------------


class Noted:
    """An object that takes every attribute and every call, and notes the calls."""

    def __init__(self, answers: dict[str, Any], calls: list[tuple[Any, ...]]) -> None:
        self.__dict__.update(_answers=answers, _calls=calls)

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            self._calls.append((name, *given, *named.values()))
            return self._answers.get(name)

        return call


class FullTensorRt:
    """The module ``tensorrt`` as far as a build goes; ``is_stale``: the timing cache is another GPU's."""

    __version__ = "10.3.0"
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    HardwareCompatibilityLevel = SimpleNamespace(NONE="none", AMPERE_PLUS="ampere+")
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    ILogger = type("ILogger", (), {"Severity": SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)})

    def __init__(self, *, major: int = 10, is_stale: bool = False) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.NetworkDefinitionCreationFlag = SimpleNamespace(**({"STRONGLY_TYPED": 1} if major == 10 else {}))
        cache = Noted({"serialize": b"timings"}, self.calls)
        self.config = Noted({"create_timing_cache": cache, "set_timing_cache": not is_stale}, self.calls)

    def Builder(self, log: Any) -> Any:
        network = SimpleNamespace(num_inputs=0, num_outputs=0)
        answers = {
            "create_network": network,
            "create_builder_config": self.config,
            "create_optimization_profile": Noted({}, self.calls),
            "build_serialized_network": b"a plan",
        }
        return Noted(answers, self.calls)

    def OnnxParser(self, network: Any, log: Any) -> Any:
        return Noted({"parse_from_file": True}, self.calls)


@pytest.fixture
def use(monkeypatch):
    def use(trt: FullTensorRt) -> FullTensorRt:
        cuda = FakeCuda("8.7")
        monkeypatch.setattr(tensorrt, "_import_cuda", lambda: cuda)
        monkeypatch.setattr(tensorrt_build, "import_tensorrt", lambda backend: trt)
        return trt

    return use


@pytest.mark.parametrize(("major", "flags"), [(10, 2), (11, 0)])
def test_networks_are_strongly_typed(major, flags, use, tmp_path: Path):
    trt = use(FullTensorRt(major=major))
    build_engine(save_cnn(tmp_path / "model.onnx", batch=1), tmp_path / "e", settings=BuildSettings(backend="tensorrt"))
    assert ("create_network", flags) in trt.calls


def test_what_the_settings_say_reaches_tensorrt(use, tmp_path: Path):
    trt = use(FullTensorRt())
    settings = BuildSettings(
        backend="tensorrt",
        shapes={"pixel_values": RANGE},
        workspace_bytes=1 << 30,
        optimization_level=5,
        hardware_compatibility="ampere+",
    )
    card = build_engine(save_cnn(tmp_path / "model.onnx"), tmp_path / "e", settings=settings)
    assert card.compute_capabilities == ("8.7",)  # of the GPU at hand
    assert (tmp_path / "e").read_bytes() == b"a plan"
    assert ("set_shape", "pixel_values", RANGE.min, RANGE.opt, RANGE.max) in trt.calls
    assert ("set_memory_pool_limit", "workspace", 1 << 30) in trt.calls
    told = vars(trt.config)
    assert told["builder_optimization_level"] == 5
    assert (told["profiling_verbosity"], told["hardware_compatibility_level"]) == ("detailed", "ampere+")
    assert from_json((tmp_path / "e.json").read_bytes(), EngineCard) == card


@pytest.mark.parametrize("is_stale", [False, True])
def test_a_timing_cache_is_read_and_written(is_stale, use, tmp_path: Path):
    trt = use(FullTensorRt(is_stale=is_stale))
    cache = tmp_path / "timings"
    cache.write_bytes(b"of before")
    build_engine(
        save_cnn(tmp_path / "model.onnx", batch=1),
        tmp_path / "e",
        settings=BuildSettings(backend="tensorrt"),
        timing_cache=cache,
    )
    assert cache.read_bytes() == b"timings"
    read = [call[1] for call in trt.calls if call[0] == "create_timing_cache"]
    assert read == ([b"of before", b""] if is_stale else [b"of before"])


def test_full_tensorrt_builds_for_no_other_gpu(use, tmp_path: Path):
    use(FullTensorRt())
    settings = BuildSettings(backend="tensorrt", compute_capabilities=("8.6",))
    with pytest.raises(MissingToolError, match="for the GPU at hand alone") as caught:
        build_engine(save_cnn(tmp_path / "model.onnx", batch=1), tmp_path / "e", settings=settings)
    assert caught.value.exit_code == 3


# --- real architectures -----------------------------------------------------------------------------------

_MOBILEVIT = {
    "hidden_sizes": [144, 192, 240],
    "neck_hidden_sizes": [16, 32, 64, 96, 128, 160, 640],
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
# As wide as CLIP B/32 and half as deep, for its layers are all alike; of a small picture.
_CLIP = {
    "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072,
    "image_size": 32, "patch_size": 8, "projection_dim": 16,
}  # fmt: skip
_OF_CLIP = ("fp32", "fp16", "int8-minmax", "int4-weights-fp16")  # one of each precision: each takes some seconds
LARGE: dict[str, dict[str, Any]] = {
    "MobileNetV2ForImageClassification": {"depth_multiplier": 1.0, "min_depth": 8},
    "MobileViTForImageClassification": _MOBILEVIT,
    "CLIPModel": {"vision_config": _CLIP},
}


@dataclass(frozen=True)
class Drawn:
    """Drawn pictures as calibration data."""

    samples: tuple[dict[str, Array], ...]
    recipe: CalibrationRecipe = CALIBRATION

    def feeds(self) -> Iterator[dict[str, Array]]:
        yield from self.samples

    def ranges(self, prepared: Path, method: Calibration) -> Path:
        """Found once for all forms, as a compile does."""
        file = prepared.parent / f"{method}.json"
        return file if file.is_file() else collect_ranges(prepared, self.feeds(), method, file)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("architecture", LARGE)
def test_real_architectures_build(architecture: str, tmp_path: Path):
    model = read_model(str(write_checkpoint(architecture, tmp_path / "checkpoint", **LARGE[architecture])))
    component = model.graphs[0]
    samples = samples_of(model, component)
    exported = tmp_path / export_graph(model, component.name, batch=1, out=tmp_path, samples=samples).file
    (tmp_path / "prepared").mkdir()
    lowering = TensorRtRtxLowering()
    prepared = lowering.prepare(exported, tmp_path / "prepared")
    data = Drawn(tuple({name: value[i : i + 1] for name, value in samples.items()} for i in range(4)))
    for recipe in lowering.recipes(prepared, target=TARGET, calibration=CALIBRATION):
        if architecture == "CLIPModel" and recipe.name.removeprefix("tensorrt-rtx-") not in _OF_CLIP:
            continue
        out = tmp_path / recipe.name
        out.mkdir()
        lowered = lowering.lower(exported, prepared, recipe, data, out)
        card = build_engine(out / lowered.files[0], out / "model.engine", settings=SETTINGS)
        assert json.loads((out / "model.engine.json").read_text())["graph_sha256"] == card.graph_sha256
        if architecture == "CLIPModel" and recipe.precision.startswith("int"):
            # The weights alone are a quarter in int8, and would be half in float16; an engine has kernels too.
            assert (out / "model.engine").stat().st_size < 0.45 * exported.stat().st_size
        for file in out.iterdir():
            file.unlink()


# Graphs that are a part of another architecture's, where their operators are tried: Transformers' classifiers run the
# tower and one linear layer on what it gives, those "WithTeacher" two. What towers have of their own, ResNetModel and
# ViTModel stand for: outputs that are read inside the graph too, and the pooler with tanh of ViT and DeiT.
_PARTS = {
    "BeitModel": "BeitForImageClassification",
    "BitModel": "BitForImageClassification",
    "CLIPVisionModel": "CLIPModel",
    "CLIPVisionModelWithProjection": "CLIPModel",
    "ConvNextModel": "ConvNextForImageClassification",
    "ConvNextV2Model": "ConvNextV2ForImageClassification",
    "DeiTForImageClassification": "DeiTForImageClassificationWithTeacher",
    "DeiTModel": "DeiTForImageClassificationWithTeacher",
    "Dinov2Model": "Dinov2ForImageClassification",
    "Dinov2WithRegistersModel": "Dinov2WithRegistersForImageClassification",
    "EfficientNetModel": "EfficientNetForImageClassification",
    "LevitForImageClassification": "LevitForImageClassificationWithTeacher",
    "MobileNetV1Model": "MobileNetV1ForImageClassification",
    "MobileNetV2Model": "MobileNetV2ForImageClassification",
    "MobileViTModel": "MobileViTForImageClassification",
    "MobileViTV2Model": "MobileViTV2ForImageClassification",
    "RegNetModel": "RegNetForImageClassification",
    "SiglipVisionModel": "SiglipModel",
    "SwinModel": "SwinForImageClassification",
    "Swinv2Model": "Swinv2ForImageClassification",
    "VisionTextDualEncoderModel": "MobileViTForImageClassification",  # and the text tower is CLIPModel's
}
WHOLE = tuple(tiny for tiny in CHECKPOINTS if tiny.architecture not in _PARTS)


def test_what_an_architecture_is_a_part_of_is_tried():
    assert _PARTS.keys() < {tiny.architecture for tiny in CHECKPOINTS}
    assert {*_PARTS.values(), "ResNetModel", "ViTModel"} <= {tiny.architecture for tiny in WHOLE}


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("tiny", WHOLE, ids=str)
def test_what_the_lint_lets_pass_tensorrt_takes(tiny: Tiny, tmp_path: Path):
    """Of every kind of graph; what is refused here is refused with the node, and not by TensorRT later."""
    model = read_model(str(write_checkpoint(tiny.architecture, tmp_path / "checkpoint")))
    lowering = TensorRtRtxLowering()
    for component in model.graphs:
        samples = samples_of(model, component)
        exported = tmp_path / export_graph(model, component.name, batch=1, out=tmp_path, samples=samples).file
        (tmp_path / f"{component.name}-prepared").mkdir()
        prepared = lowering.prepare(exported, tmp_path / f"{component.name}-prepared")
        n = len(next(iter(samples.values())))
        data = Drawn(tuple({name: value[i : i + 1] for name, value in samples.items()} for i in range(n)))
        for recipe in lowering.recipes(prepared, target=TARGET, calibration=CALIBRATION):
            out = tmp_path / f"{component.name}-{recipe.name}"
            out.mkdir()
            if tiny.architecture in _REFUSED:
                with pytest.raises(ModelError, match=_REFUSED[tiny.architecture]):
                    lowering.lower(exported, prepared, recipe, data, out)
                continue
            lowered = lowering.lower(exported, prepared, recipe, data, out)
            assert parser_errors(out / lowered.files[0], "tensorrt-rtx") == ()


_REFUSED = {"MobileViTV2ForImageClassification": r"node 'node_col2im' \(Col2Im\)"}
