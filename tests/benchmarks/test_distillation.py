"""The studies of distillation: what they tell, and that each runs from its teacher to the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("accelerate", reason="training needs accelerate")

from benchmarks.distillation.__main__ import main
from benchmarks.distillation.spec import Arm, Run, Study, StudyResult
from benchmarks.distillation.table import table
from edgevlm.distillation.recipe import load_recipe
from edgevlm.runtime.spec import from_json


def run(arm: str, seed: int, top_1: float) -> Run:
    return Run(arm=arm, seed=seed, n_steps=10, n_parameters=1_000_000, n_bytes=4_000_000, metrics={"top-1": top_1})


def test_a_row_for_each_arm_with_its_worst_and_best_seed() -> None:
    arms = tuple(Arm(name=name, recipe=load_recipe("logits")) for name in ("distilled", "from scratch", "not run yet"))
    study = Study(
        key="a", title="A study", teacher="t", student="s", data="d", unseen="u", image_size=None, arms=arms
    )  # fmt: skip
    result = StudyResult(
        study=study,
        made_at="2026-01-01",
        n_unseen=100,
        teacher={"top-1": 0.9},
        teacher_digest="0",
        teacher_n_parameters=5_000_000,
        teacher_n_bytes=20_000_000,
        facts=None,
        machine="a machine",
        runs=(run("distilled", 0, 0.7), run("distilled", 1, 0.8), run("from scratch", 0, 0.5)),
        versions={"torch": "2"},
    )
    rows = [line for line in table(result).splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "| teacher | 5.00 M | 20.0 | – | | 0.900 |",
        "| distilled, 10 steps | 1.00 M | 4.0 | – | 2 | 0.750 [0.700, 0.800] |",
        "| from scratch, 10 steps | 1.00 M | 4.0 | – | 1 | 0.500 [0.500, 0.500] |",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("study", ["two-towers", "sam"])
def test_a_study_ends_in_its_table(study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))
    arguments = [study, "--steps", "2", "--seeds", "1", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = from_json((tmp_path / f"{study}.json").read_bytes(), StudyResult)
    assert [each.arm for each in result.runs] == [arm.name for arm in result.study.arms]
    assert all(0 <= value <= 1 for each in result.runs for value in each.metrics.values())
    assert result.facts is not None and result.facts.student.latency_ms
    assert str(tmp_path) not in json.dumps(result.study.teacher)
    again = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert again.exit_code == 0 and (tmp_path / f"{study}.md").read_text().startswith("**")
