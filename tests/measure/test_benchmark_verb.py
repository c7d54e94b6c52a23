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
from tests.runtime.tiny import make_bundle


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
