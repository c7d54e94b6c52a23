"""The verbs on a small bundle: what each prints for people, as JSON, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgevlm.cache import why
from edgevlm.cli.common import beside
from edgevlm.cli.main import exit_code_of
from edgevlm.cli.run import _points
from edgevlm.errors import UsageError
from edgevlm.ingest import read_labels
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.prompts import prompts_of
from edgevlm.target import read_target, target_text
from tests.runtime import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_bundle(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_bundle(tmp_path_factory.mktemp("made") / "towers", "zero-shot-image-classification")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))
    yield


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Folders by class, 8 pictures each, no two alike."""
    for colour in tiny.LABELS:
        (tmp_path / "pictures" / colour).mkdir(parents=True)
        for i in range(8):
            tiny.picture(colour, (16 + i, 24)).save(tmp_path / "pictures" / colour / f"{i}.png")
    return tmp_path / "pictures"


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What a verb prints as its result."""
    assert exit_code_of([str(argument) for argument in arguments]) == code
    printed = capsys.readouterr()
    assert code != 0 or "error" not in printed.err
    return printed.out


# --- run --------------------------------------------------------------------------------------------------


def test_run_names_the_answer_first(capsys, made, pictures):
    text = told(capsys, "run", made, pictures / "green" / "0.png")
    assert text.splitlines()[0].split()[-1] == "green"
    assert len(text.splitlines()) == 3
    assert len(told(capsys, "run", made, pictures / "green" / "0.png", "--top", 1).splitlines()) == 1


def test_run_in_json_is_what_the_pipeline_answers(capsys, made, pictures):
    from edgevlm.runtime.spec import to_json

    picture = pictures / "blue" / "3.png"
    assert told(capsys, "run", made, picture, "--json") == to_json(Pipeline.load(made)(picture)).decode()


def test_run_of_several_pictures_names_each(capsys, made, pictures):
    files = [pictures / "red" / "0.png", pictures / "blue" / "0.png"]
    text = told(capsys, "run", made, *files)
    assert [str(file) in text for file in files] == [True, True]
    answers = json.loads(told(capsys, "run", made, *files, "--json"))
    assert [answers[str(file)]["classes"][0]["label"] for file in files] == ["red", "blue"]


def test_run_asks_about_labels_from_a_line_or_a_file(capsys, towers, pictures, tmp_path):
    picture = pictures / "red" / "0.png"
    (tmp_path / "labels.txt").write_text("blue\nred\n", encoding="utf-8")
    by_line = told(capsys, "run", towers, picture, "--labels", "blue, red")
    assert by_line == told(capsys, "run", towers, picture, "--labels", tmp_path / "labels.txt")
    assert by_line.splitlines()[0].split()[-1] == "red"
    told(capsys, "run", towers, picture, code=2)


# --- inspect, verify, evaluate, benchmark -----------------------------------------------------------------


def test_inspect_says_what_the_manifest_says(capsys, made):
    assert told(capsys, "inspect", made, "--json") == (made / "manifest.json").read_text(encoding="utf-8")
    text = told(capsys, "inspect", made)
    assert {"image-classification", "requested"} <= set(text.replace(":", " ").split())
    assert "components/model.onnx" not in text
    assert "components/model.onnx" in told(capsys, "inspect", made, "-v")


def test_inspect_says_how_long_a_text_may_be(capsys, towers, tmp_path):
    assert "at most 4 tokens, padded to them" in told(capsys, "inspect", towers)
    own = tiny.make_bundle(tmp_path / "own", "zero-shot-image-classification", length="sequence")
    text = told(capsys, "inspect", own)
    assert "at most 4 tokens, each call as long as its longest text" in text
    assert "input_ids int64[batch, sequence]" in text


def test_verify_ends_with_what_it_found(capsys, made, tmp_path):
    assert "every bit equal" in told(capsys, "verify", made)
    other = tiny.make_bundle(tmp_path / "other", "image-feature-extraction")
    changed = Path(shutil.copytree(made, tmp_path / "changed"))
    shutil.copy(other / "components" / "model.onnx", changed / "components" / "model.onnx")
    assert told(capsys, "verify", changed, code=1) == ""


def test_evaluate_states_the_metric_with_its_interval(capsys, made, pictures):
    text = told(capsys, "evaluate", made, "--data", pictures, "-q")
    assert text.startswith("top-1 100.00% (95 % interval ")
    assert "on 24 pictures" in text
    found = json.loads(told(capsys, "evaluate", made, "--data", pictures, "--reference", made, "--json", "-q"))
    assert (found["value"], found["n"], found["drop"]["value"]) == (1.0, 24, 0.0)


def test_benchmark_compares_with_the_first(capsys, made, tmp_path):
    twin = Path(shutil.copytree(made, tmp_path / "twin"))
    found = json.loads(told(capsys, "benchmark", made, twin, "--rounds", 6, "--json", "-q"))
    assert found["bundles"] == [str(made), str(twin)]
    for comparison in found["comparisons"].values():
        assert [ratio["baseline"] for ratio in comparison["ratios"]] == [str(made)]
    assert "twice" not in told(capsys, "benchmark", made, made, code=2)


# --- targets, cache, doctor -------------------------------------------------------------------------------


def test_a_detected_target_is_valid_and_reads_back(capsys, tmp_path):
    file = tmp_path / "here.toml"
    told(capsys, "targets", "detect", "-o", file)
    told(capsys, "targets", "validate", file)
    assert target_text(read_target(str(file))) == file.read_text(encoding="utf-8")
    told(capsys, "targets", "detect", "-o", file, code=2)


def test_the_cache_is_listed_and_cleared(capsys, tmp_path):
    from edgevlm.store import Store

    assert "0 results" in told(capsys, "cache", "list")
    Store().fetch("export", {"a": 1}, lambda folder: (folder / "x").write_bytes(b"12345"))
    assert "1 results" in told(capsys, "cache", "list")
    assert [entry["action"] for entry in json.loads(told(capsys, "cache", "list", "--json"))] == ["export"]
    assert json.loads(told(capsys, "cache", "clear", "--json"))["freed_bytes"] > 5
    assert "0 results" in told(capsys, "cache", "list")
    told(capsys, "cache", "why", code=2)


def test_doctor_ends_well_on_a_machine_that_runs_these_tests(capsys):
    assert json.loads(told(capsys, "doctor", "--json"))


def test_doctor_says_what_reaches_no_device(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))
    checks = {check["name"]: check for check in json.loads(told(capsys, "doctor", "--json"))}
    for name, words in (("ARM emulator", "unavailable: dpkg is not installed"), ("devices", "ssh is not installed")):
        assert checks[name]["state"] == "note" and words in checks[name]["finding"] and checks[name]["remedy"]


# --- where it goes ----------------------------------------------------------------------------------------


def edgevlm(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgevlm", *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_progress_and_results_do_not_mix(made, pictures):
    done = edgevlm("evaluate", made, "--data", pictures, "--json")
    assert json.loads(done.stdout)
    assert done.stderr.startswith("evaluate")
    assert edgevlm("evaluate", made, "--data", pictures, "-q").stderr == ""


def test_colours_stay_off_where_nobody_sees_them(made, tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    assert "\x1b" not in edgevlm("run", made, tmp_path / "x.png").stderr
    assert "\x1b" not in edgevlm("inspect", made, "--no-color").stdout


def test_a_reader_that_goes_away_is_no_error(made):
    process = subprocess.Popen(
        [sys.executable, "-m", "edgevlm", "inspect", str(made), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_standard_output_is_told(made):
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run(
            [sys.executable, "-m", "edgevlm", "inspect", str(made)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "should not" not in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_where_an_error_comes_from_and_keeps_its_exit_code(made):
    done = edgevlm("run", made, os.devnull, "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    done = edgevlm("compile", "demo", "--target", "nowhere", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "error: There is no target 'nowhere'" in done.stderr


def test_many_labels_are_no_file_name():
    labels = [f"a thing of kind {i}" for i in range(40)]
    assert read_labels(",".join(labels)) == tuple(labels)


@pytest.mark.parametrize(
    ("bundle", "expected"),
    [
        ("a", "a-tuned"), ("a/", "a-tuned"), ("b/a.evlm", "b/a-tuned"), ("/b/a", "/b/a-tuned"),
        (".", "../here-tuned"), ("..", "../../above-tuned"),
    ],
)  # fmt: skip
def test_what_is_made_of_a_bundle_lies_beside_it(bundle, expected, tmp_path, monkeypatch):
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert beside(Path(bundle), "tuned") == Path(expected)


def test_a_report_of_another_version_is_one_sentence(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text('{"later": 1}')
    with pytest.raises(UsageError, match="was written by another version"):
        why(tmp_path)


@pytest.mark.parametrize("label", ["0.9", "nan", "2"])
def test_half_a_label_of_a_point_is_refused(label):
    with pytest.raises(UsageError, match="is no point"):
        prompts_of(_points(None, None, (f"1,2,{label}",)))
