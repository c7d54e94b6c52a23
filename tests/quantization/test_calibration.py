from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.quantization.calibrate import load_tensors_data

from edgevlm.errors import DataError, ModelError, UsageError
from edgevlm.progress import Event, StepProgress
from edgevlm.quantization.calibration import CalibrationRecipe, collect_ranges, load_recipe, recipe_names
from edgevlm.quantization.post_training import prepare
from edgevlm.quantization.schemes import CALIBRATIONS
from tests.quantization.graphs import Builder, feeds, save_cnn, save_transformer

GOOD = """
name = "mine"
methods = ["minmax"]
n_samples = 8
seed = 1
source = "a folder"
licence = "CC0-1.0"
"""


def test_every_shipped_recipe_reads_and_is_called_as_its_file() -> None:
    assert {"default", "quick", "thorough"} <= set(recipe_names())
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_a_recipe_is_read_from_a_path(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(GOOD)
    assert load_recipe(str(tmp_path / "mine.toml")) == CalibrationRecipe(
        name="mine", methods=("minmax",), n_samples=8, seed=1, source="a folder", licence="CC0-1.0"
    )


@pytest.mark.parametrize(
    ("before", "after", "says", "hint"),
    [
        ("n_samples = 8", "n_sample = 8", "`n_sample`", "'n_samples'"),
        ('["minmax"]', '["minmx"]', "'minmx'", "'minmax'"),
        ("n_samples = 8", 'n_samples = "8"', "`$.n_samples`", "Compare"),
        ("n_samples = 8", "n_samples = 0", ">= 1", "Compare"),
        ('["minmax"]', "[]", "`$.methods`", "Compare"),
        ("seed = 1", "", "`seed`", "Compare"),
        ("seed = 1", "seed = = 1", "not TOML", "line"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(tmp_path: Path, before: str, after: str, says: str, hint: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace(before, after))
    with pytest.raises(UsageError) as caught:
        load_recipe(str(path))
    assert says in caught.value.message
    assert hint in caught.value.hint


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("defualt")
    assert "default" in caught.value.hint


def test_the_documented_recipe_is_a_recipe(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    assert all(f"\n{name} = " in text for name in CalibrationRecipe.__struct_fields__)
    assert recipe.methods == CALIBRATIONS


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(str(tmp_path / "none.toml"))


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cnn")
    return prepare(save_cnn(folder / "cnn.onnx"), folder / "prepared.onnx")


def ranges_of(path: Path) -> dict[str, tuple[float, float]]:
    return {
        name: (np.asarray(data.lowest).item(), np.asarray(data.highest).item())
        for name, data in load_tensors_data(path).items()
    }


def test_min_max_covers_what_was_seen_and_percentile_lies_within(cnn: Path, tmp_path: Path) -> None:
    samples = feeds("cnn", 9)
    minmax = ranges_of(collect_ranges(cnn, samples, "minmax", tmp_path / "minmax"))
    percentile = ranges_of(collect_ranges(cnn, samples, "percentile", tmp_path / "percentile"))
    everything = np.concatenate([s["pixel_values"].ravel() for s in samples])
    assert minmax["pixel_values"] == (everything.min(), everything.max())
    assert percentile.keys() == minmax.keys()
    for name, (low, high) in percentile.items():
        assert minmax[name][0] <= low < high <= minmax[name][1]


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_one_sample_is_enough(cnn: Path, tmp_path: Path, method: Any) -> None:
    assert ranges_of(collect_ranges(cnn, feeds("cnn", 1), method, tmp_path / "ranges.json"))


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_no_sample_is_an_error_and_leaves_no_file(cnn: Path, tmp_path: Path, method: Any) -> None:
    with pytest.raises(DataError, match="0 samples"):
        collect_ranges(cnn, [], method, tmp_path / "ranges.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["minmax", "percentile"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_picture_that_is_no_number_is_an_error(cnn: Path, tmp_path: Path, method: Any, bad: float) -> None:
    samples = feeds("cnn", 5)
    samples[4]["pixel_values"][0, 0, 3, 3] = bad
    with pytest.raises(ModelError, match="input 'pixel_values'"):
        collect_ranges(cnn, samples, method, tmp_path / "ranges.json")


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_an_activation_that_is_no_number_is_an_error(tmp_path: Path, method: Any) -> None:
    b = Builder()
    weight = b.weight(8, 3, 1, 1)
    x = b.node("Sqrt", b.node("Conv", "x", weight))
    b.node("Conv", x, b.weight(4, 8, 1, 1), out="y")
    b.save(tmp_path / "nan.onnx", {"x": [1, 3, 4, 4]}, {"y": [1, 4, 4, 4]})
    sample = {"x": np.random.default_rng(0).normal(size=(1, 3, 4, 4)).astype(np.float32)}
    with pytest.raises(ModelError, match="NaN or infinity in activation"):
        collect_ranges(tmp_path / "nan.onnx", [sample], method, tmp_path / "ranges.json")


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_a_mask_of_minus_infinity_is_none_of_our_business(tmp_path: Path, method: Any) -> None:
    prepared = prepare(save_transformer(tmp_path / "t.onnx"), tmp_path / "prepared.onnx")
    ranges = ranges_of(collect_ranges(prepared, feeds("transformer", 3), method, tmp_path / "ranges.json"))
    assert np.isfinite(list(ranges.values())).all()


def test_values_that_hardly_differ_are_an_error_of_the_method_and_not_a_traceback(tmp_path: Path) -> None:
    b = Builder()
    b.node("Conv", "pixel_values", b.weight(4, 3, 1, 1, scale=1e-4), b.constant(np.full(4, 1e3, np.float32)), out="y")
    file = b.save(tmp_path / "flat.onnx", {"pixel_values": [1, 3, 16, 16]}, {"y": [1, 4, 16, 16]})
    prepared = prepare(file, tmp_path / "prepared.onnx")
    collect_ranges(prepared, feeds("cnn", 2), "minmax", tmp_path / "minmax.json")
    with pytest.raises(ModelError, match="by percentile: Too many bins") as caught:
        collect_ranges(prepared, feeds("cnn", 2), "percentile", tmp_path / "percentile.json")
    assert "--calibration quick" in caught.value.hint
    assert not (tmp_path / "percentile.json").exists()


def test_a_graph_without_anything_to_quantize_is_an_error(tmp_path: Path) -> None:
    b = Builder()
    b.node("Relu", "x", out="y")
    b.save(tmp_path / "relu.onnx", {"x": [1, 4]}, {"y": [1, 4]})
    with pytest.raises(ModelError, match="no convolution and no linear layer"):
        collect_ranges(tmp_path / "relu.onnx", [{"x": np.zeros((1, 4), np.float32)}], "minmax", tmp_path / "r")


def test_progress_is_told(cnn: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    collect_ranges(cnn, iter(feeds("cnn", 6)), "minmax", tmp_path / "ranges.json", told.append)
    assert [e.detail for e in told if isinstance(e, StepProgress)] == ["minmax: 4 samples", "minmax: 6 samples"]


def test_what_a_search_depends_on_is_the_recipe_and_not_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    from edgevlm.compiler import prepare as prepared_job

    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "mine.toml"
    params = []
    for text in (GOOD, GOOD, GOOD.replace('"minmax"', '"percentile"')):
        path.write_text(text)
        job = prepared_job("demo", calibration=str(path), output=tmp_path / "out")
        params.append(next(step.params for step in job.steps if step.name == "search"))
    assert params[0] == params[1] != params[2]
