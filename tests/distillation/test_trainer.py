"""The trainer: goes on where it stopped, shares its work among processes, and says where it fails."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs PyTorch")
pytest.importorskip("accelerate", reason="training needs accelerate")

import msgspec  # noqa: E402 - torch first

from edgevlm.distillation import trainer  # noqa: E402
from edgevlm.distillation.lessons import Lessons  # noqa: E402
from edgevlm.distillation.step import Batch, Step  # noqa: E402
from edgevlm.errors import ModelError, UsageError  # noqa: E402
from edgevlm.progress import Event, Note, StepProgress  # noqa: E402
from tests.distillation import small  # noqa: E402
from tests.distillation.small import RECIPE, make_lessons, make_pictures, teach  # noqa: E402
from tests.quantization.tiny_qat import write_pictures  # noqa: E402


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "colours", 21)


@pytest.fixture(scope="module")
def lessons(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Lessons:
    return make_lessons(make_pictures(colours), tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def whole(lessons: Lessons, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A training that nobody stopped: its folder, its weights."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, teach(lessons, folder)[1]


def stop_after(step: int) -> Any:
    def say(event: Event) -> None:
        if isinstance(event, StepProgress) and f"step {step}/" in event.detail:
            raise KeyboardInterrupt

    return say


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_training_learns(whole: Any) -> None:
    losses = [row["loss"] for row in rows_of(whole[0])]
    assert len(losses) == RECIPE.n_steps and losses[-1] < 0.7 * losses[0]
    assert not same(small.Student().state_dict(), whole[1])


def test_a_training_that_was_stopped_ends_with_the_same_bits(lessons: Lessons, whole: Any, tmp_path: Path) -> None:
    for step in (5, 10):  # between checkpoints, so that steps are done twice
        with pytest.raises(KeyboardInterrupt):
            teach(lessons, tmp_path, progress=stop_after(step))
    told: list[Event] = []
    assert same(teach(lessons, tmp_path, progress=told.append)[1], whole[1])
    assert Note("The training goes on after step 9 of 12.") in told
    rows, expected = rows_of(tmp_path), rows_of(whole[0])
    for name in ("step", "loss", "terms", "learning_rate"):
        assert [row[name] for row in rows] == [row[name] for row in expected], name
    assert [row.get("metric") for row in rows] == [row.get("metric") for row in expected]


@pytest.mark.parametrize("is_training", [True, False])
def test_batch_norms_keep_nothing_of_pictures_that_an_objective_altered(is_training: bool) -> None:
    class Kind:
        def outputs(self, module: Any, batch: Batch, names: frozenset[str]) -> dict[str, Any]:
            return {"logits": module(batch.pixel_values).mean((2, 3))}

    class Alters(torch.nn.Module):
        student_needs = frozenset({"logits"})

        def forward(self, step: Step) -> dict[str, Any]:
            altered = step.run(replace(step.batch, pixel_values=step.batch.pixel_values + 100))
            return {"apart": (altered["logits"] - step.student["logits"]).abs().max()}

    student = torch.nn.BatchNorm2d(3, momentum=1.0).train(is_training)
    learner = trainer.Learner(Kind(), student, Alters())  # type: ignore[arg-type]
    batch = Batch(pixel_values=torch.full((2, 3, 2, 2), 7.0))
    apart = learner(batch, {}, lambda rows: rows, torch.Generator())["apart"].item()
    assert apart == pytest.approx(0 if is_training else 100, abs=0.01), "each pass is normalised by its own batch"
    assert student.running_mean.tolist() == [7.0 if is_training else 0.0] * 3
    assert student.num_batches_tracked.item() == int(is_training)
    assert student.track_running_stats


def test_the_teacher_is_not_asked_while_the_student_learns(lessons: Lessons, tmp_path: Path, monkeypatch: Any) -> None:
    from edgevlm.distillation.teachers import TorchTeacher

    def refuse(*_: Any) -> None:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(TorchTeacher, "_call", refuse)
    teach(lessons, tmp_path)


def test_every_row_says_what_happened(whole: Any) -> None:
    row = rows_of(whole[0])[-1]
    assert row.keys() == {
        "step", "loss", "terms", "learning_rate", "metric", "pictures_per_s", "left_s",
    }  # fmt: skip
    assert row["terms"].keys() == {"distance", "relations"}
    assert row["loss"] == pytest.approx(row["terms"]["distance"] + 0.5 * row["terms"]["relations"])


def test_the_checkpoint_holds_everything_that_the_training_changes(whole: Any) -> None:
    from safetensors import safe_open

    with safe_open(whole[0] / "checkpoint.safetensors", framework="pt") as opened:
        names, facts = set(opened.keys()), opened.metadata()
    assert {"model.student.head.weight", "model.objectives.head.weight", "more.average.head.weight", "random"} <= names
    assert any(name.startswith("optimizer.") and name.endswith("exp_avg_sq") for name in names)
    assert facts["n_done"] == "12" and json.loads(facts["state"])["best_step"] > 0


def test_the_average_of_the_weights_is_what_is_kept(lessons: Lessons, tmp_path: Path, whole: Any) -> None:
    plain = msgspec.structs.replace(RECIPE, average=0.0)
    weights = teach(lessons, tmp_path, recipe=plain)[1]
    assert not same(weights, whole[1])
    # The same steps were done: only what was kept differs.
    assert [row["loss"] for row in rows_of(tmp_path)] == [row["loss"] for row in rows_of(whole[0])]


def test_without_progress_the_training_stops_and_the_best_weights_are_kept(
    lessons: Lessons, tmp_path: Path, monkeypatch: Any
) -> None:
    values = iter([0.2, 0.6, 0.5, 0.6])  # at steps 3, 6, 9, 12
    seen: list[dict[str, Any]] = []

    def judge(self: Any, student: Any, accelerator: Any) -> float:
        seen.append({name: value.clone() for name, value in student.state_dict().items()})
        return next(values)

    monkeypatch.setattr(trainer.Judge, "__call__", judge)
    recipe = msgspec.structs.replace(RECIPE, patience=2, n_steps=30)
    trained, weights = teach(lessons, tmp_path, recipe=recipe)
    assert (trained.n_steps, trained.best_step, trained.metric) == (12, 6, 0.6)
    assert same(weights, seen[1])
    # Started again it is over at once, and still knows.
    again, weights = teach(lessons, tmp_path, recipe=recipe)
    assert again == trained and same(weights, seen[1])


@pytest.mark.parametrize("n_parts", [2, 4])
def test_a_batch_in_parts_is_the_batch(lessons: Lessons, tmp_path: Path, monkeypatch: Any, n_parts: int) -> None:
    # Without the term that relates the whole batch, which a part cannot see.
    monkeypatch.setattr(small.Terms, "weights", {"distance": 1.0, "relations": 0.0})
    expected = teach(lessons, tmp_path / "one", is_judged=False)[1]
    parts = msgspec.structs.replace(RECIPE, n_accumulated=n_parts)
    got = teach(lessons, tmp_path / "parts", recipe=parts, is_judged=False)[1]
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(
    lessons: Lessons, tmp_path: Path, monkeypatch: Any
) -> None:
    forward, calls = small.Terms.forward, iter(range(100))

    def diverge(self: Any, step: Any) -> Any:
        terms = forward(self, step)
        return terms if next(calls) < 7 else terms | {"distance": terms["distance"] * float("nan")}

    monkeypatch.setattr(small.Terms, "forward", diverge)
    with pytest.raises(ModelError, match="diverged at step 8: 'loss' is nan") as caught:
        teach(lessons, tmp_path)
    assert "The last good checkpoint is kept" in caught.value.message and "learning-rate" in caught.value.hint
    from safetensors.torch import safe_open

    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as opened:
        assert opened.metadata()["n_done"] == "6"
        assert all(bool(opened.get_tensor(name).isfinite().all()) for name in opened.keys())  # noqa: SIM118


def test_bf16_trains_too(lessons: Lessons, tmp_path: Path) -> None:
    teach(lessons, tmp_path, recipe=msgspec.structs.replace(RECIPE, precision="bf16"))
    losses = [row["loss"] for row in rows_of(tmp_path)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"precision": "fp16"}, "no GPU here"), ({"n_accumulated": 3}, "cannot be shared evenly")],
)
def test_what_cannot_be_trained_so(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        trainer.new_accelerator(msgspec.structs.replace(RECIPE, **change), tmp_path, cpu=True)


def test_every_step_is_logged_by_a_tracker(lessons: Lessons, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.tracking import GeneralTracker

    logged: dict[int, dict[str, float]] = {}

    class Recording(GeneralTracker):
        name = "recording"
        requires_logging_directory = False
        tracker = None

        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

        def log(self, values: dict[str, float], step: int | None, **_: Any) -> None:
            assert step is not None
            logged[step] = values

    AcceleratorState._reset_state()
    teach(lessons, tmp_path, accelerator=Accelerator(cpu=True, log_with=Recording()))
    assert list(logged) == list(range(RECIPE.n_steps))
    assert logged[2].keys() == {"loss", "learning_rate", "metric", "pictures_per_s", "left_s"}
    assert [values["loss"] for values in logged.values()] == [row["loss"] for row in rows_of(tmp_path)]


def test_seeds_differ_by_step_process_and_part() -> None:
    seeds = {trainer.seed_of(0, step, process, part) for step in range(5) for process in range(3) for part in range(3)}
    assert len(seeds) == 45 and trainer.seed_of(-1, 0) == trainer.seed_of(-1, 0)


# --- real processes ---------------------------------------------------------------------------------------


def environment(folder: Path) -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    ours = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **ours, "EDGEVLM_CACHE": str(folder / "cache")}


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(folder), cwd=root
    )


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bits(colours: Path, tmp_path: Path) -> None:
    script = [sys.executable, "-m", "tests.distillation.small", str(colours)]
    plain = start([*script, str(tmp_path / "a-outputs"), str(tmp_path / "a")], tmp_path)
    out, err = plain.communicate(timeout=500)
    assert plain.returncode == 0, err
    n_lines = len(out.splitlines())
    assert n_lines == 7 + RECIPE.n_steps  # seven shards, then the steps
    draws = random.Random(7)
    command = [*script, str(tmp_path / "b-outputs"), str(tmp_path / "b")]
    for _ in range(5):  # each goes on where the last one was killed: in the shards first, then in the steps
        process = start(command, tmp_path)
        assert process.stdout is not None and process.stderr is not None
        for _ in range(draws.randint(2, 5)):
            assert process.stdout.readline()
        time.sleep(draws.random() * 0.02)  # somewhere in the next step, or in writing a checkpoint
        process.kill()
        process.wait()
        process.stdout.close(), process.stderr.close()
        assert process.returncode == -9
    assert (tmp_path / "b" / "checkpoint.safetensors").is_file()  # at least one was killed after its first steps
    last = start(command, tmp_path)
    _, err = last.communicate(timeout=500)
    assert last.returncode == 0, err
    weights = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    shards = sorted((tmp_path / "a-outputs").glob("*.safetensors"))
    assert len(shards) == 7
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "b-outputs" / shard.name).read_bytes()


@pytest.mark.slow
def test_two_processes_follow_the_loss_of_one(colours: Path, tmp_path: Path) -> None:
    single = start([sys.executable, "-m", "tests.distillation.small", str(colours), str(tmp_path / "outputs"),
                    str(tmp_path / "one")], tmp_path)  # fmt: skip
    _, err = single.communicate(timeout=500)
    assert single.returncode == 0, err
    double = start(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m",
         "tests.distillation.small", str(colours), str(tmp_path / "two-outputs"), str(tmp_path / "two")],
        tmp_path,
    )  # fmt: skip
    _, err = double.communicate(timeout=500)
    assert double.returncode == 0, err
    # Two really ran, and what one read the other did not, in the outputs that they had computed by halves.
    read = [np.load(tmp_path / "two" / f"read-{rank}-of-2.npy") for rank in range(2)]
    alone = np.load(tmp_path / "one" / "read-0-of-1.npy")
    assert not (read[0] & read[1]).any() and read[0].sum() > 10 and read[1].sum() > 10
    np.testing.assert_array_equal(read[0] | read[1], alone)
    for shard in sorted((tmp_path / "outputs").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "two-outputs" / shard.name).read_bytes()
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    np.testing.assert_allclose([r["loss"] for r in two], [r["loss"] for r in one], rtol=1e-4)
    np.testing.assert_allclose(
        [r["terms"]["relations"] for r in two], [r["terms"]["relations"] for r in one], rtol=1e-4
    )
    from safetensors.torch import load_file

    expected = load_file(tmp_path / "one" / "student.safetensors")
    got = load_file(tmp_path / "two" / "student.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4)
