"""Compiling through the command line, each time in a process of its own, as a user does it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import edgevlm
from edgevlm.data import shapes
from edgevlm.measure.kinds import KINDS
from edgevlm.report.spec import Report
from edgevlm.runtime.spec import from_json
from tests import colours
from tests.fast import FAST, FAST_OPTIONS


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


def edgevlm_command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgevlm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def compiled(*arguments: object) -> dict[str, object]:
    """A compile of its own process, float only: whether the machine is quiet enough to choose is not the question."""
    done = edgevlm_command("compile", *FAST_OPTIONS, *arguments, "--precision", "fp32", "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def hits(result: dict[str, object]) -> dict[str, bool]:
    return {step["name"]: step["hit"] for step in result["report"]["steps"]}  # type: ignore[index]


def why(*arguments: object) -> dict[str, str]:
    done = edgevlm_command("cache", "why", *arguments, "--json")
    return {step["name"]: step["why"] for step in json.loads(done.stdout)["steps"]}


@pytest.fixture(scope="module")
def first(model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "colours-cpu"
    result = compiled(model, "--eval-data", pictures, "-o", output)
    assert not any(hits(result).values())
    return output


# --- where the time goes ----------------------------------------------------------------------------------


def test_the_report_says_where_the_time_goes(first):
    report = from_json((first / "report" / "report.json").read_bytes(), Report)
    explanation = report.explanation
    assert explanation is not None
    (ships,) = explanation.winner
    assert {each.name for each in explanation.reference} <= {"fp32"}
    assert ships.failure is None
    assert ships.profile is not None
    assert ships.profile.has_real_inputs
    assert ships.by_kind_ms.keys() <= set(KINDS)
    (work,) = explanation.work.values()
    assert work.macs > 0
    assert ships.roofline is not None
    assert ships.roofline.precision == "float32"
    assert explanation.notes == ()
    for name in ("report.html", "report.md"):
        text = (first / "report" / name).read_text(encoding="utf-8")
        assert "Where the time goes" in text
        assert ships.profile.rows[0].op_type in text


# --- the same again, and almost the same ------------------------------------------------------------------


def test_the_same_again_is_a_look_up_in_any_process(first, model, pictures, record_property):
    began = time.monotonic()
    result = compiled(model, "--eval-data", pictures, "-o", first, "--overwrite")
    record_property("wall_s", time.monotonic() - began)
    assert all(hits(result).values())
    assert set(why(first).values()) == {"the same inputs, parameters, tools and code"}
    assert edgevlm.verify(first)


def test_what_is_the_same_is_the_same_to_the_byte(first, model, pictures, tmp_path):
    compiled(model, "--eval-data", pictures, "-o", tmp_path / "again")
    for file in first.rglob("*"):
        path = file.relative_to(first)
        if file.is_file() and path.parts[0] not in ("report", "manifest.json"):  # they say what was looked up
            assert (tmp_path / "again" / path).read_bytes() == file.read_bytes(), path


def test_a_model_that_was_moved_is_the_same_model(first, model, pictures, tmp_path):
    """Where a file lies says nothing; only the bundle, which tells what was asked for, is written anew."""
    shutil.copy(model, tmp_path / "colours.onnx")
    shutil.copy(model.with_suffix(".card.toml"), tmp_path)
    result = compiled(tmp_path / "colours.onnx", "--eval-data", pictures, "-o", tmp_path / "out")
    assert [name for name, hit in hits(result).items() if not hit] == ["bundle"]
    assert why() | {"bundle": ""} == dict.fromkeys(why(), "the same inputs, parameters, tools and code") | {
        "bundle": ""
    }
    assert why()["bundle"].endswith(": params.asked")


def test_one_changed_weight_is_another_model(first, pictures, tmp_path):
    other = colours.write_classifier(tmp_path / "colours.onnx", weight=1.0001)
    result = compiled(other, "--eval-data", pictures, "-o", tmp_path / "out")
    assert not any(hits(result).values())
    assert why()["export:model"].endswith(": params.model")


def test_one_changed_word_of_the_card_is_another_model(first, model, pictures, tmp_path):
    shutil.copy(model, tmp_path / "colours.onnx")
    card = model.with_suffix(".card.toml").read_text(encoding="utf-8")
    (tmp_path / "colours.card.toml").write_text(f"{card}[input]\nmean = [0.1, 0.1, 0.1]\n", encoding="utf-8")
    result = compiled(tmp_path / "colours.onnx", "--eval-data", pictures, "-o", tmp_path / "out")
    assert not any(hits(result).values())


def test_another_recipe_leaves_the_export_alone(first, model, pictures, tmp_path):
    result = compiled(model, "--eval-data", pictures, "-o", tmp_path / "out", "--calibration", "default")
    assert hits(result)["export:model"]
    assert not hits(result)["search"]
    assert "params.calibration" in why()["search"]


def test_one_changed_picture_is_other_data(first, model, pictures, tmp_path):
    other = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    colours.colour("red", 99).save(other / "red" / "0.png")
    result = compiled(model, "--eval-data", other, "-o", tmp_path / "out")
    assert hits(result)["export:model"]
    assert not hits(result)["bundle"]


# --- what was asked for -----------------------------------------------------------------------------------


def test_int8_of_a_convolution_answers_as_float_does(first, model, pictures, tmp_path):
    made = edgevlm.compile(
        str(model),
        eval_data=pictures,
        precision="int8",
        **FAST,
        output=tmp_path / "int8",
    )
    assert made.manifest.components[0].precision.startswith("int8")
    assert made.report.accuracy is not None
    assert made.report.accuracy.value == 1.0
    for label in colours.LABELS:
        picture = colours.colour(label, 1000)
        assert edgevlm.run(made.bundle, picture).top.label == edgevlm.run(first, picture).top.label == label


def test_a_budget_that_nothing_keeps_ends_with_the_nearest_misses(model, pictures, tmp_path):
    asked = ("--eval-data", pictures, "--precision", "fp32", *FAST_OPTIONS, "-q", "-o", tmp_path / "out")
    done = edgevlm_command("compile", model, *asked, "--max-latency-ms", "0.000001")
    assert done.returncode == 4
    assert "fp32 takes" in done.stderr
    assert "1e-06 ms is allowed" in done.stderr
    assert " hint: " in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_report_repeats_the_command_that_makes_it_again(first, pictures, model, tmp_path):
    report = json.loads((first / "report" / "report.json").read_text(encoding="utf-8"))
    words = report["reproduce"]
    assert words.startswith("edgevlm compile ")
    command = f"{sys.executable} -m {words} -o {tmp_path / 'again'} --json"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(hits(json.loads(done.stdout)).values())


@pytest.mark.slow
def test_pictures_smaller_than_any_that_can_be_generated(tmp_path):
    """The generated pictures stand in for a model of tiny inputs too."""
    (tmp_path / "tiny_models.py").write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))\n",
        encoding="utf-8",
    )
    (tmp_path / "tiny_models.card.toml").write_text(
        'task = "image-classification"\nlabels = ["a", "b"]\n[input]\nheight = 8\nwidth = 8\n', encoding="utf-8"
    )
    done = edgevlm_command(
        "compile", "tiny_models:make", "--precision", "fp32", *FAST_OPTIONS, "-o", "out", "-q", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert edgevlm.verify(tmp_path / "out")


def test_a_bundle_called_demo_does_not_hide_the_demo(first, tmp_path):
    shutil.copytree(first, tmp_path / "demo")
    done = edgevlm_command("compile", "demo", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "export:text_encoder" in done.stdout


def test_a_dry_run_writes_nothing(model, pictures, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("EDGEVLM_CACHE", str(cache))
    done = edgevlm_command("compile", model, "--eval-data", pictures, "--dry-run", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == [
        "export:model",
        "search",
        "confirm",
        "explain",
        "bundle",
    ]
    assert not (cache / "store").exists()
    assert not (tmp_path / "out").exists()


# --- the whole of it, without a shortcut ------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_as_everybody_compiles_it(tmp_path, monkeypatch, record_property):
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))
    done = edgevlm_command("compile", "demo", "-o", tmp_path / "demo-cpu", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["report"]
    assert report["data"]["is_synthetic"]
    assert report["accuracy"]["value"] >= 0.94
    assert report["accuracy"]["n"] == report["data"]["n_report"]
    assert {file.name for file in (tmp_path / "demo-cpu" / "report").iterdir()} == {
        "report.html",
        "report.json",
        "report.md",
    }
    page = (tmp_path / "demo-cpu" / "report" / "report.html").read_text(encoding="utf-8")
    assert report["verdict"].split(" ships")[0] in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    shapes.write_folder(tmp_path / "unseen", n=60, seed=4242)
    judged = edgevlm_command("evaluate", tmp_path / "demo-cpu", "--data", tmp_path / "unseen", "--json", "-q")
    assert json.loads(judged.stdout)["value"] >= 0.9
    began = time.monotonic()
    again = edgevlm_command("compile", "demo", "-o", tmp_path / "demo-cpu", "--overwrite", "-q", "--json")
    record_property("wall_s", time.monotonic() - began)
    # What could not be measured validly on a busy machine is not stored, and only that is made anew.
    steps = hits(json.loads(again.stdout))
    assert steps["export:image_encoder"] and steps["export:text_encoder"] and steps["fold"]
    assert steps["search"] == all(each["is_valid"] for each in report["comparisons"])


@pytest.mark.slow
def test_two_compiles_at_once_do_not_disturb_each_other(model, pictures, tmp_path):
    environment = os.environ | {"EDGEVLM_CACHE": str(tmp_path / "cache")}
    asked = ["compile", model, "--eval-data", pictures, "--precision", "fp32", *FAST_OPTIONS, "-q", "-o"]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "edgevlm", *map(str, asked), tmp_path / name],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in both:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    assert edgevlm.verify(tmp_path / "one")
    assert edgevlm.verify(tmp_path / "two")
    assert not list((tmp_path / "cache").rglob("tmp-*"))
