"""What `edgevlm benchmark` prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edgevlm.cli import benchmark as verb
from edgevlm.cli.main import exit_code_of
from edgevlm.measure import bundles
from edgevlm.measure.bundles import WHOLE, BundleBenchmark
from edgevlm.measure.interleave import compare
from edgevlm.measure.protocol import ALL_STAY
from edgevlm.measure.spec import Comparison
from tests.measure.fakes import ENVIRONMENT, FakeMachine, noisy, subject
from tests.runtime.tiny import make_bundle, picture


def found(machine: FakeMachine, *, batch: int = 1) -> BundleBenchmark:
    def times() -> Comparison:
        return compare(
            [subject("float"), subject("int8")],
            baseline="float",
            protocol=ALL_STAY,
            surroundings=machine.surroundings(),
        )

    return BundleBenchmark(
        bundles=("float", "int8"),
        task="image-classification",
        comparisons={"model": times(), WHOLE: times()},
        batches={"model": batch},
        picture_size=(640, 480),
        environment=ENVIRONMENT,
    )


def test_a_table_for_each_graph_and_for_the_whole_way():
    text = verb.benchmark_text(found(FakeMachine(noisy({"float": 10.0, "int8": 5.0}), other_load=0.1), batch=4))
    graph, whole, where = text.split("\n\n")
    header, first, second, verdict = graph.splitlines()
    assert header.split("  ")[0] == "model, 4 in a run"
    assert header.endswith("÷ first [95 %]")
    assert first.split()[-1] == "–", "the first has no ratio to itself"
    assert second.startswith("int8")
    assert "0.50 [0.4" in second
    assert re.fullmatch(r"valid: 20 rounds, \d+ threads?; others took 10% of the CPU", verdict), verdict
    assert whole.startswith("end to end ")
    assert where == "on a fake, with a picture of 640 × 480"


def test_what_is_not_valid_says_so_and_why():
    text = verb.benchmark_text(found(FakeMachine(noisy({"float": 10.0, "int8": 9.5}, deviation=0.6))))
    assert "\nnot valid: The ratio of int8 is only known to ±" in text
    assert "\nvalid" not in text


def test_a_bundle_that_fails_is_named_with_the_reason():
    machine = FakeMachine(noisy({"float": 10.0, "int8": 5.0}), fails_at={"int8": -1})
    table = verb.benchmark_text(found(machine)).split("\n\n")[0].splitlines()
    assert table[2].split() == ["int8", *"––––––"]
    assert table[3:] == ["failed: int8: It does not open.", table[-1]]
    assert table[-1].startswith("valid")


def test_a_first_bundle_that_fails_leaves_nothing_to_compare_with():
    machine = FakeMachine(noisy({"float": 10.0, "int8": 5.0}), fails_at={"float": -1})
    text = verb.benchmark_text(found(machine))
    assert "failed: float: It does not open." in text
    assert "not valid: The baseline float failed: It does not open." in text


def test_a_benchmark_that_is_not_valid_still_ends_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    doubtful = found(FakeMachine(noisy({"float": 10.0, "int8": 9.5}, deviation=0.6)))
    monkeypatch.setattr(bundles, "benchmark_bundles", lambda *paths, **options: doubtful)
    assert exit_code_of(["benchmark", "float", "int8"]) == 0
    assert capsys.readouterr().out.count("not valid: ") == 2


def test_a_bundle_alone_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bundle = make_bundle(tmp_path / "bundle")
    assert exit_code_of(["benchmark", str(bundle), "--rounds", "6", "-q"]) == 0
    graph, whole, _ = capsys.readouterr().out.split("\n\n")
    for table in (graph, whole):
        row = table.splitlines()[1]
        assert row.startswith(str(bundle))
        assert row.endswith("–")
        assert "valid: " in table


def test_json_holds_the_raw_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bundle = make_bundle(tmp_path / "bundle")
    assert exit_code_of(["benchmark", str(bundle), "--rounds", "6", "--threads", "1", "--json", "-q"]) == 0
    value = json.loads(capsys.readouterr().out)
    (measurement,) = value["comparisons"]["model"]["measurements"]
    assert measurement["n_threads"] == 1
    assert len(measurement["turns_ms"]) >= 6
    assert all(ms > 0 for turn in measurement["turns_ms"] for ms in turn)


def test_fewer_rounds_than_a_verdict_needs_are_refused(capsys: pytest.CaptureFixture[str]):
    assert exit_code_of(["benchmark", "anything", "--rounds", "5"]) == 2
    assert "6" in capsys.readouterr().err


def test_bundles_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("jinja2", reason="pages need the compile side")
    teacher, student = (make_bundle(tmp_path / name) for name in ("teacher", "student"))
    for colour in ("red", "green", "blue"):
        (tmp_path / "pictures" / colour).mkdir(parents=True)
        for i, size in enumerate(((24, 16), (16, 24))):
            picture(colour, size).save(tmp_path / "pictures" / colour / f"{i}.png")
    command = ["benchmark", str(teacher), str(student), "--rounds", "6", "--data", str(tmp_path / "pictures"), "-q"]
    assert exit_code_of([*command, "--report", str(tmp_path / "out" / "here")]) == 0
    out = capsys.readouterr().out
    assert "÷ first [95 %]" in out and f"Side by side  {tmp_path / 'out' / 'here' / 'side-by-side.html'}" in out
    value = json.loads((tmp_path / "out" / "here" / "side-by-side.json").read_text())
    first, second = (dict(zip(value["header"], row, strict=True)) for row in value["rows"])
    assert first["bundle"].startswith(str(teacher)) and second["bundle"].startswith(str(student))
    assert second["top-1 [95 %]"].startswith("100") and first["drop from the first, points [95 %]"] == "–"
    assert second["drop from the first, points [95 %]"].startswith("0.0"), second
    assert float(first["end to end, ms"]) > 0 and re.match(r"[\d.]+ \[", second["× the first, end to end"])
    assert [each["n"] for each in value["evaluations"]] == [6, 6]
    for suffix in ("md", "html"):
        page = (tmp_path / "out" / "here" / f"side-by-side.{suffix}").read_text()
        assert "2 bundles for image-classification" in page and "6 pictures" in page


def test_a_device_does_not_judge(capsys: pytest.CaptureFixture[str]):
    assert exit_code_of(["benchmark", "a", "--data", "shapes", "--device", "ssh://nobody@nowhere"]) == 2
    assert "not on a device" in capsys.readouterr().err
