"""Calibration data that says nothing or too little, and wishes that no layer answers to: told, and nothing breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

import edgevlm
from edgevlm.cli.main import exit_code_of
from edgevlm.compiler import Compiled
from edgevlm.errors import GateError, ModelError, UsageError
from tests import colours
from tests.fast import FAST

BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colours.write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colours.write_classifier(tmp_path_factory.mktemp("model") / "colours.onnx")


def compiled(model: Path, pictures: Path, out: Path, **asked: Any) -> Compiled:
    return edgevlm.compile(str(model), eval_data=pictures, output=out, **FAST | asked)


def write_constants(folder: Path, *values: int, size: tuple[int, int] = (24, 24)) -> Path:
    folder.mkdir()
    for value in values:
        Image.new("RGB", size, (value, value, value)).save(folder / f"{value}.png")
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("values", "size"),
    [((0, 64, 128, 255), (24, 24)), ((0,), (24, 24)), ((200,), (24, 24)), ((90, 180), (1, 1)), ((90, 180), (500, 3))],
    ids=["constants", "one black picture", "one grey picture", "single pixels", "slivers"],
)
def test_calibration_pictures_that_say_little_break_nothing(model, pictures, tmp_path, backend, values, size):
    if backend == "openvino":
        pytest.importorskip("nncf", reason="NNCF is an extra of its own")
    few = write_constants(tmp_path / "few", *values, size=size)
    made = compiled(
        model, pictures, tmp_path / "out", calibration_data=few, backends=("onnxruntime", backend), calibration="quick"
    )
    # Whatever such ranges do to int8, what ships keeps to the budget on pictures that it has not seen.
    assert made.report.accuracy.drop <= 0.01
    assert edgevlm.verify(made.bundle)


def test_weights_that_are_no_numbers_are_refused_with_the_place(pictures, tmp_path):
    model = colours.write_classifier(tmp_path / "broken.onnx")
    proto = onnx.load(model)
    filters = next(tensor for tensor in proto.graph.initializer if tensor.name == "filters")
    values = numpy_helper.to_array(filters).copy()
    values[0, 0, 0, 0] = np.nan
    filters.CopyFrom(numpy_helper.from_array(values, "filters"))
    onnx.save(proto, model)
    with pytest.raises(ModelError, match="NaN"):
        compiled(model, pictures, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_matches_no_layer_is_an_error_that_names_some(model, pictures, tmp_path):
    with pytest.raises(UsageError, match=r"'\*attention\*' matches none of the \d+ nodes") as caught:
        compiled(model, pictures, tmp_path / "out", keep_float=("*attention*",))
    assert "see" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_to_stay_float_does(model, pictures, tmp_path):
    made = compiled(model, pictures, tmp_path / "out", keep_float=("see",), precision="int8", max_drop=1)
    row = next(row for row in made.report.candidates if row.name == made.report.winner)
    assert row.recipe["kept in float"] == "see"
    assert "1 in float" in row.recipe["runs"]


def test_a_size_that_no_form_has_names_the_nearest_and_exits_with_4(model, pictures, tmp_path, capsys):
    with pytest.raises(GateError, match=r"Nearest: .*MB is allowed") as caught:
        compiled(model, pictures, tmp_path / "out", max_size_mb=1e-5)
    assert caught.value.exit_code == 4


def test_a_ready_made_folder_that_is_not_there_is_an_error(model, pictures, tmp_path, capsys):
    folder = tmp_path / "no"
    arguments = ["compile", model, "--eval-data", pictures, "--quantized", folder, "-o", tmp_path / "out", "-q"]
    assert exit_code_of([str(argument) for argument in arguments]) in (1, 2)
    told = capsys.readouterr().err
    assert "no" in told and " hint: " in told and "Traceback" not in told
