"""Models that cannot be compiled and bundles that cannot be read: one sentence each, beside tests/test_bad_input.py."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

import edgevlm
from edgevlm.cli.main import exit_code_of
from edgevlm.data import shapes
from tests import colours
from tests.fast import FAST, FAST_OPTIONS

MODULES = """
import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.read = nn.Linear(3, 3)

    def forward(self, pixel_values):
        return self.read(pixel_values.mean((2, 3)))


class Branches(Net):
    def forward(self, pixel_values):
        pooled = pixel_values.mean((2, 3))
        return self.read(2 * pooled if pooled.sum() > 0 else pooled)


class HasNoForm(Net):
    def forward(self, pixel_values):
        pooled = pixel_values.mean((2, 3))
        return self.read(torch.linalg.eigvalsh(pooled[:, :, None] * pooled[:, None, :]))


class Random(Net):
    def forward(self, pixel_values):
        pooled = pixel_values.mean((2, 3))
        return self.read(pooled + torch.rand_like(pooled))


class Misshapen(Net):
    def forward(self, pixel_values):
        return self.read(pixel_values)


class GivesNan(Net):
    def forward(self, pixel_values):
        return torch.log(-1 - super().forward(pixel_values).abs())


branches, has_no_form, random, misshapen, gives_nan = Branches, HasNoForm, Random, Misshapen, GivesNan


def poisoned():
    net = Net()
    net.read.weight.data[1, 1] = float("inf")
    return net
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colours.write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return colours.write_classifier(tmp_path / "colours.onnx")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int, words: str) -> None:
    """The command line ends with ``code`` and one sentence that holds ``words``, and a hint."""
    assert exit_code_of([str(argument) for argument in arguments]) == code
    told = capsys.readouterr()
    errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, told.err
    assert words in errors[0]
    assert told.err.count(" hint: ") == 1
    assert "Traceback" not in told.err
    assert "should not" not in told.err
    assert told.out == ""


def compiling(capsys: pytest.CaptureFixture[str], *arguments: object, folder: Path, words: str, code: int = 1) -> None:
    """``edgevlm compile`` is refused and leaves neither a bundle nor a half result."""
    refused(capsys, "compile", *arguments, "-q", "-o", folder / "out", code=code, words=words)
    assert not (folder / "out").exists()
    assert not list(folder.rglob("*.partial"))
    assert not list((folder / "cache").rglob("tmp-*"))


# --- PyTorch modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("branches", "cannot be traced"),
        ("has_no_form", "has no ONNX form"),
        ("random", "RandomUniformLike"),
        ("misshapen", "cannot be traced"),
        ("gives_nan", "NaN or infinite values in 'logits'"),
        ("poisoned", "'read.weight'"),
    ],
)
def test_a_module_that_cannot_be_exported(capsys, tmp_path, monkeypatch, pictures, factory, words):
    (tmp_path / "odd_modules.py").write_text(MODULES, encoding="utf-8")
    (tmp_path / "odd_modules.card.toml").write_text(f"{colours.CARD}[input]\nheight = 24\nwidth = 24\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "odd_modules", raising=False)
    compiling(capsys, f"odd_modules:{factory}", "--eval-data", pictures, folder=tmp_path, words=words)


# --- checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(Path(shapes.__file__).parent / "demo_model", tmp_path / "checkpoint"))


def test_weights_in_a_pickle_alone(capsys, checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    compiling(capsys, checkpoint, folder=tmp_path, words="only as a pickle")


def test_a_model_of_a_task_that_is_not_compiled(capsys, checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"architectures": ["DetrForObjectDetection"]}))
    compiling(capsys, checkpoint, folder=tmp_path, words="is an object-detection model")


def test_code_that_comes_with_a_checkpoint_is_not_run_unasked(capsys, checkpoint, tmp_path):
    (checkpoint / "mine.py").write_text("raise SystemExit('ran')\n")
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"architectures": ["Mine"], "auto_map": {"AutoModelForImageClassification": "mine.Mine"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    compiling(capsys, checkpoint, folder=tmp_path, words="brings its own code")


# --- ONNX files -------------------------------------------------------------------------------------------


def test_an_onnx_file_whose_weights_are_no_numbers(capsys, tmp_path, pictures):
    model = colours.write_classifier(tmp_path / "colours.onnx", weight=np.nan)
    compiling(capsys, model, "--eval-data", pictures, folder=tmp_path, words="'filters'")


def test_an_onnx_file_without_a_card(capsys, model, tmp_path):
    model.with_suffix(".card.toml").unlink()
    compiling(capsys, model, folder=tmp_path, words="has no card")


def test_labels_that_are_not_as_many_as_the_classes(capsys, model, tmp_path):
    compiling(capsys, model, "--labels", "red,green", folder=tmp_path, words="2 labels", code=2)


# --- wishes and data --------------------------------------------------------------------------------------


def test_a_budget_that_nothing_keeps(capsys, model, pictures, tmp_path):
    asked = (model, "--eval-data", pictures, "--precision", "fp32", "--max-size-mb", "0.0001", *FAST_OPTIONS)
    compiling(capsys, *asked, folder=tmp_path, words="Nearest: fp32 is", code=4)


def test_too_few_pictures(capsys, model, tmp_path):
    few = colours.write_pictures(tmp_path / "few", n_per_class=3)
    compiling(capsys, model, "--eval-data", few, folder=tmp_path, words="has 9 different pictures")


def test_a_calibration_set_with_a_picture_that_cannot_be_read(capsys, model, pictures, tmp_path):
    broken = colours.write_pictures(tmp_path / "broken")
    (broken / "green" / "4.png").write_bytes((broken / "green" / "4.png").read_bytes()[:-40])
    asked = (model, "--eval-data", pictures, "--calibration-data", broken)
    compiling(capsys, *asked, folder=tmp_path, words="1 of 36 pictures cannot be read")


def test_one_picture_is_no_data_set(capsys, model, pictures, tmp_path):
    compiling(capsys, model, "--eval-data", pictures / "red" / "0.png", folder=tmp_path, words="is one picture")


# --- archives ---------------------------------------------------------------------------------------------


@pytest.fixture
def archive(model: Path, pictures: Path, tmp_path: Path) -> Path:
    made = edgevlm.compile(
        str(model),
        eval_data=pictures,
        precision="fp32",
        **FAST,
        output=tmp_path / "colours.evlm",
    )
    assert edgevlm.verify(made.bundle)
    shutil.rmtree(tmp_path / "cache")  # what was unpacked to verify it
    return made.bundle


def test_an_archive_that_was_cut_short_or_changed(capsys, archive, tmp_path):
    whole = archive.read_bytes()
    picture = tmp_path / "x.png"
    colours.colour("red", 0).save(picture)
    archive.write_bytes(whole[: len(whole) // 2])
    refused(capsys, "run", archive, picture, code=1, words="colours.evlm")
    with zipfile.ZipFile(tmp_path / "whole.evlm", "w") as written, zipfile.ZipFile(_saved(tmp_path, whole)) as read:
        for name in read.namelist():
            data = bytearray(read.read(name))
            if name == "components/model.onnx":
                data[-1] ^= 1
            written.writestr(name, bytes(data))
    refused(capsys, "run", tmp_path / "whole.evlm", picture, code=1, words="components/model.onnx")


def _saved(folder: Path, data: bytes) -> Path:
    (folder / "saved.zip").write_bytes(data)
    return folder / "saved.zip"
