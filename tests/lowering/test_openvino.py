"""OpenVINO's forms of a graph: what is offered, that it is what it says, and the same bytes every time."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgevlm.errors import DataError, MissingToolError, ModelError
from edgevlm.lowering import load_lowering
from edgevlm.lowering.openvino import BF16, DYNAMIC, OpenVinoLowering, OpenVinoRecipe
from edgevlm.quantization.calibration import CalibrationRecipe, collect_ranges
from edgevlm.quantization.schemes import Calibration
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.backends.openvino import import_openvino, openvino_core
from edgevlm.runtime.spec import Array, SessionOptions
from edgevlm.target import Target
from tests.quantization.graphs import feeds, save_cnn, save_transformer

pytest.importorskip("nncf", reason="NNCF makes the int8 forms, and is not installed")
pytest.importorskip("openvino", reason="openvino is not installed")

SAVE: dict[str, Callable[..., Path]] = {"cnn": save_cnn, "transformer": save_transformer}
CALIBRATION = CalibrationRecipe(name="default", methods=("minmax",), n_samples=6, seed=0, source="", licence="")
THOROUGH = msgspec.structs.replace(CALIBRATION, name="thorough")
TARGET = Target(name="vnni", description="", arch="x86-64", isa=("avx512_vnni",), backends=("onnxruntime", "openvino"))
WITH_BF16 = msgspec.structs.replace(TARGET, isa=("avx512_bf16", "avx512_vnni"))

INT8 = OpenVinoRecipe(name="int8", precision="int8-static", is_calibrated=True, method="quantize")
SMOOTH = msgspec.structs.replace(INT8, is_transformer=True)


@dataclass(frozen=True)
class Data:
    graph: str
    recipe: CalibrationRecipe = CALIBRATION
    first: float = 0.0

    def feeds(self) -> Iterator[dict[str, Array]]:
        for i, feed in enumerate(feeds(self.graph, self.recipe.n_samples)):
            yield {name: value + (self.first if i == 0 else 0) for name, value in feed.items()}

    def ranges(self, prepared: Path, method: Calibration) -> Path:
        return collect_ranges(prepared, self.feeds(), method, prepared.parent / f"{method}.json")


@dataclass(frozen=True)
class Graph:
    name: str
    file: Path
    prepared: Path


@pytest.fixture(scope="module", params=["cnn", "transformer"])
def graph(request, tmp_path_factory) -> Graph:
    folder = tmp_path_factory.mktemp(request.param)
    file = SAVE[request.param](folder / "model.onnx", batch=1)
    (folder / "prepared").mkdir()
    return Graph(request.param, file, OpenVinoLowering().prepare(file, folder / "prepared"))


def lower(graph: Graph, recipe: OpenVinoRecipe, out: Path, data: Data | None = None):
    out.mkdir()
    return OpenVinoLowering().lower(graph.file, graph.prepared, recipe, data or Data(graph.name), out)


def answer(file: Path, given: dict[str, Array], session: SessionOptions = BF16) -> Array:
    options = SessionOptions(n_threads=1, entries=session.entries)
    backend = "openvino" if file.suffix == ".xml" else "onnxruntime"
    (value,) = load_backend(backend).open(file, options).run(given).values()
    return value


def error_of(graph: Graph, file: Path) -> float:
    (given,) = feeds(graph.name, 1, seed=9)
    expected = answer(graph.file, given, SessionOptions())
    return float(np.abs(answer(file, given, SessionOptions()) - expected).max() / np.abs(expected).max())


def digest(folder: Path) -> str:
    files = sorted(file for file in folder.iterdir() if file.suffix in (".xml", ".bin"))
    assert len(files) == 2
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def runtime_kinds(file: Path) -> dict[str, str]:
    """What the plugin says that it computes each named node in, ``i8`` or ``f32``."""
    compiled = openvino_core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = {}
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        for name in str(info["originalLayersNames"].value).split(","):
            if info["layerType"].value in ("Convolution", "FullyConnected"):
                kinds[name] = str(info["runtimePrecision"].value)
    return kinds


@pytest.mark.parametrize("batch", [2, "n"])
def test_a_prepared_graph_keeps_names_shapes_and_answers(batch, tmp_path: Path):
    file = save_cnn(tmp_path / "tower.onnx", batch=batch)
    (tmp_path / "out").mkdir()
    prepared = OpenVinoLowering().prepare(file, tmp_path / "out")
    assert prepared == tmp_path / "out" / "tower.xml"
    session = load_backend("openvino").open(prepared, SessionOptions(n_threads=1))
    reference = load_backend("onnxruntime").open(file, SessionOptions(n_threads=1))
    assert (session.inputs, session.outputs) == (reference.inputs, reference.outputs)
    (given,) = feeds("cnn", 1, batch=2)
    np.testing.assert_allclose(session.run(given)["logits"], reference.run(given)["logits"], atol=1e-4)


def test_a_graph_that_cannot_be_read_is_a_model_error(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(ModelError) as caught:
        OpenVinoLowering().prepare(tmp_path / "model.onnx", tmp_path)
    assert "\n" not in caught.value.message


def test_what_is_offered_suits_the_graph_and_the_processor(graph: Graph):
    def offered(target: Target, calibration: CalibrationRecipe = CALIBRATION) -> list[OpenVinoRecipe]:
        recipes = load_lowering("openvino").recipes(graph.prepared, target=target, calibration=calibration)
        return [recipe for recipe in recipes if not recipe.is_for_size]

    names = [recipe.name for recipe in offered(TARGET)]
    with_bf16 = [recipe.name for recipe in offered(WITH_BF16)]
    if graph.name == "cnn":
        assert names == ["openvino-fp32", "openvino-int8-onnx", "openvino-int8"]
        assert with_bf16 == ["openvino-fp32", "openvino-bf16", "openvino-int8-onnx", "openvino-int8"]
        assert not offered(TARGET)[-1].is_transformer
    else:
        assert names == ["openvino-fp32", "openvino-int8", "openvino-int8-dynamic"]
        of_int8 = ["openvino-int8", "openvino-int8-bf16", "openvino-int8-dynamic"]
        assert with_bf16 == ["openvino-fp32", "openvino-bf16", *of_int8]
        assert offered(TARGET)[1].is_transformer
    assert [r.name for r in offered(TARGET, THOROUGH)][-1] == "openvino-int8-by-layer"
    assert [r.name for r in offered(msgspec.structs.replace(WITH_BF16, precisions=("fp32",)))] == ["openvino-fp32"]
    without_vnni = offered(msgspec.structs.replace(TARGET, isa=("avx2",)))
    assert {r.reduces_range for r in offered(TARGET) if r.method == "quantize"} == {False}
    assert {r.reduces_range for r in without_vnni if r.method == "quantize"} == {True}
    for recipe in offered(WITH_BF16, THOROUGH):
        is_bf16 = "bf16" in recipe.precision
        assert is_bf16 == (recipe.session == BF16) == (recipe.describe()["the rest in"] == "bf16")
        assert (recipe.precision == "int8-dynamic") == (recipe.session == DYNAMIC)


def test_weights_alone_are_for_size(graph: Graph):
    recipes = OpenVinoLowering().recipes(graph.prepared, target=TARGET, calibration=CALIBRATION)
    assert {r.precision for r in recipes if r.is_for_size} == {"int8-weights", "int4-weights"}
    only_int8 = msgspec.structs.replace(TARGET, precisions=("fp32", "int8"))
    recipes = OpenVinoLowering().recipes(graph.prepared, target=only_int8, calibration=CALIBRATION)
    assert {r.precision for r in recipes if r.is_for_size} == {"int8-weights"}


def test_float_is_the_prepared_graph(graph: Graph, tmp_path: Path):
    recipe = OpenVinoRecipe(name="fp32", precision="fp32")
    lowered = lower(graph, recipe, tmp_path / "out")
    assert lowered.files == ("model.xml", "model.bin")
    assert digest(tmp_path / "out") == digest(graph.prepared.parent)
    assert OpenVinoLowering().lowered_nodes(graph.prepared, recipe) == ()


# The tolerances are half again what was seen; a random transformer of 32 channels is as bad as it gets.
@pytest.mark.parametrize(
    ("recipe", "of_cnn", "of_transformer"),
    [
        (INT8, 0.05, 0.2),
        (SMOOTH, 0.05, 0.2),
        (msgspec.structs.replace(INT8, ranges="minmax", bias="as it is"), 0.05, 0.2),
        (msgspec.structs.replace(INT8, preset="performance", reduces_range=True), 0.08, 0.3),
        (msgspec.structs.replace(SMOOTH, bias="by layer"), 0.05, 0.2),
        (OpenVinoRecipe(name="w8", precision="int8-weights", method="compress"), 0.01, 0.02),
        (
            OpenVinoRecipe(
                name="w4", precision="int4-weights", is_calibrated=True, method="compress", weights="int4_asym",
                group_size=32, is_data_aware=True,
            ),
            0.05,
            0.5,
        ),
    ],
    ids=["int8", "smooth", "minmax", "7 bits", "by layer", "int8 weights", "int4 weights"],
)  # fmt: skip
def test_a_form_is_close_to_float_smaller_and_the_same_every_time(
    recipe, of_cnn, of_transformer, graph: Graph, tmp_path: Path, capfd
):
    lowered = lower(graph, recipe, tmp_path / "one")
    lower(graph, recipe, tmp_path / "two")
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert (
        0 < error_of(graph, tmp_path / "one" / lowered.files[0]) < (of_cnn if graph.name == "cnn" else of_transformer)
    )
    n_bytes = (tmp_path / "one" / lowered.files[1]).stat().st_size
    assert n_bytes < 0.6 * graph.prepared.with_suffix(".bin").stat().st_size
    assert "int" in lowered.runs["runs"]
    assert capfd.readouterr().out == ""
    text = (tmp_path / "one" / lowered.files[0]).read_text()
    assert str(tmp_path) not in text and "conversion_parameters" not in text


def test_nncf_makes_no_core_of_its_own(graph: Graph, tmp_path: Path, monkeypatch):
    openvino_core()
    monkeypatch.setattr(import_openvino(), "Core", lambda: pytest.fail("a second Core"))
    lower(graph, msgspec.structs.replace(SMOOTH, bias="by layer"), tmp_path / "out")


def test_nodes_that_are_kept_stay_in_float(graph: Graph, tmp_path: Path):
    lowering = OpenVinoLowering()
    nodes = lowering.lowered_nodes(graph.prepared, INT8)
    assert len(nodes) == (5 if graph.name == "cnn" else 6)
    kept = (nodes[0], nodes[-1])
    recipe = msgspec.structs.replace(SMOOTH, keep_float=kept)
    assert lowering.lowered_nodes(graph.prepared, recipe) == nodes[1:-1]
    lowered = lower(graph, recipe, tmp_path / "out")
    assert lowered.runs["runs"].startswith(f"{len(nodes) - 2} int8, 2 float")
    kinds = runtime_kinds(tmp_path / "out" / lowered.files[0])
    # A kernel is called after the addition of its bias where that is fused, so some names are lost.
    known = {node: kind for node, kind in kinds.items() if node in nodes}
    assert len(known) > 2
    assert all((kind == "f32") == (node in kept) for node, kind in known.items())
    assert recipe.describe()["kept in float"] == " ".join(kept)


def test_what_comes_between_layers_in_float_stays_in_float_too(tmp_path: Path):
    """Sums and poolings: with the last layer alone in int8, what it reads is all that is quantized."""
    file = save_cnn(tmp_path / "model.onnx", batch=1)
    (tmp_path / "prepared").mkdir()
    graph = Graph("cnn", file, OpenVinoLowering().prepare(file, tmp_path / "prepared"))
    nodes = OpenVinoLowering().lowered_nodes(graph.prepared, INT8)

    def quantizers(name: str, kept: tuple[str, ...]) -> int:
        (xml, _) = lower(graph, msgspec.structs.replace(INT8, keep_float=kept), tmp_path / name).files
        ops = openvino_core().read_model(str(tmp_path / name / xml)).get_ordered_ops()
        # Those of weights are integers by now.
        return sum(op.get_type_name() == "FakeQuantize" for op in ops)

    assert quantizers("all", ()) > 4
    assert quantizers("last", nodes[:-1]) == 1
    assert quantizers("first", nodes[1:]) <= 2


def test_what_onnx_runtime_quantized_runs_in_int8_too(tmp_path: Path):
    file = save_cnn(tmp_path / "model.onnx", batch=1)
    (tmp_path / "prepared").mkdir()
    lowering = OpenVinoLowering()
    graph = Graph("cnn", file, lowering.prepare(file, tmp_path / "prepared"))
    (recipe,) = (
        recipe
        for recipe in lowering.recipes(graph.prepared, target=TARGET, calibration=CALIBRATION)
        if recipe.method == "convert"
    )
    lowered = lower(graph, recipe, tmp_path / "one")
    lower(graph, recipe, tmp_path / "two")
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert lowered.runs["runs"].startswith("5 int8 ")
    assert 0 < error_of(graph, tmp_path / "one" / "model.xml") < 0.05
    nodes = lowering.lowered_nodes(graph.prepared, recipe)
    kept = msgspec.structs.replace(recipe, keep_float=nodes[:1])
    assert lower(graph, kept, tmp_path / "kept").runs["runs"].startswith("4 int8, 1 float")


def test_a_node_that_is_not_there_cannot_be_kept(graph: Graph, tmp_path: Path):
    with pytest.raises(ModelError, match="nowhere"):
        lower(graph, msgspec.structs.replace(INT8, keep_float=("nowhere",)), tmp_path / "out")


@pytest.mark.parametrize("first", [np.nan, np.inf])
def test_calibration_data_that_is_no_number_is_refused(first, graph: Graph, tmp_path: Path):
    with pytest.raises(DataError, match="NaN or infinity"):
        lower(graph, INT8, tmp_path / "out", Data(graph.name, first=first))
    assert list((tmp_path / "out").iterdir()) == []


class NoData(Data):
    def feeds(self) -> Iterator[dict[str, Array]]:
        return iter(())


def test_nothing_to_calibrate_with_is_refused(graph: Graph, tmp_path: Path):
    with pytest.raises(DataError, match="0 samples"):
        lower(graph, INT8, tmp_path / "out", NoData(graph.name))


def test_other_ways_to_open_a_form_keep_its_precision():
    recipe = msgspec.structs.replace(INT8, session=BF16)
    sessions = OpenVinoLowering().sessions(recipe, n_threads=4, may_use_fewer=True)
    assert {name: session.n_threads for name, session in sessions.items()} == {"pinned": 4, "1-thread": 1}
    assert all(session.entries["INFERENCE_PRECISION_HINT"] == "bf16" for session in sessions.values())
    assert OpenVinoLowering().sessions(recipe, n_threads=1, may_use_fewer=True) == {}


def test_without_nncf_there_is_float_alone_and_a_hint(graph: Graph, monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "nncf", None)
    recipes = OpenVinoLowering().recipes(graph.prepared, target=WITH_BF16, calibration=CALIBRATION)
    of_int8 = ["openvino-int8-onnx"] if graph.name == "cnn" else []
    assert [recipe.name for recipe in recipes] == ["openvino-fp32", "openvino-bf16", *of_int8]
    with pytest.raises(MissingToolError) as caught:
        lower(graph, INT8, tmp_path / "out")
    assert "edgevlm[openvino]" in caught.value.hint
