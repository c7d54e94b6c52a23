"""A model that segments what it is asked about teaches an image encoder, alone and through its mask decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="training needs PyTorch")
pytest.importorskip("accelerate", reason="training needs accelerate")
pytest.importorskip("edgevlm.families.sam", reason="the teacher is a SamModel")

from edgevlm.distillation.distill import distill  # noqa: E402 - torch first
from edgevlm.distillation.lessons import Lessons  # noqa: E402
from edgevlm.distillation.pictures import TrainingPictures  # noqa: E402
from edgevlm.distillation.recipe import Recipe, Term  # noqa: E402
from edgevlm.distillation.students import STUDENTS, tiny_vit_sam  # noqa: E402
from edgevlm.errors import DataError, UsageError  # noqa: E402
from edgevlm.ingest import read_model  # noqa: E402
from tests.distillation.test_distill import rows_of  # noqa: E402
from tests.families.checkpoints import checkpoint, write_checkpoint  # noqa: E402

SMALL = "small-sam"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint("SamModel", tmp_path_factory.mktemp("sam") / "sam"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draws = np.random.default_rng(0)
    for i in range(70):
        Image.fromarray(draws.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def small_student(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))
    config = {
        name: value
        for name, value in checkpoint("TinyVitSam").config["vision_config"].items()
        if name not in ("image_size", "output_channels", "num_pos_feats", "scale")
    }
    student = tiny_vit_sam.TinyVitSamStudent(name=SMALL, config=config)
    monkeypatch.setattr(tiny_vit_sam, "SMALL", student, raising=False)
    monkeypatch.setitem(STUDENTS, SMALL, "edgevlm.distillation.students.tiny_vit_sam:SMALL")


def learn(
    teacher: str, pictures: Path, out: Path, *terms: Term, student: str | Path = SMALL, rate: float = 1e-3
) -> Any:
    recipe = Recipe(name="masks", terms=terms, n_steps=3, batch_size=4, learning_rate=rate, augmentation="none")
    # The teacher cuts 64 pixels into patches of 8, the student 128 into patches of 16: the same 8 x 8 places.
    size = 128 if student == SMALL else None
    return distill(teacher, student=student, data=pictures, recipe=recipe, output=out, image_size=size, is_timed=False)


def test_an_encoder_learns_the_teachers_embeddings(teacher: str, pictures: Path, tmp_path: Path) -> None:
    made = learn(teacher, pictures, tmp_path / "out", Term(objective="encoder"))
    assert made.distillation.metric == "cosine with the teacher"
    assert made.distillation.student_metric is not None
    student = read_model(str(made.folder))
    assert student.task == "mask-generation" and [graph.name for graph in student.graphs][-1] == "mask_decoder"


def test_a_student_learns_through_the_mask_decoder(teacher: str, pictures: Path, tmp_path: Path) -> None:
    made = learn(teacher, pictures, tmp_path / "out", Term(objective="prompts"), Term(objective="encoder"))
    rows = rows_of(made.folder)
    assert all(np.isfinite(row["terms"]["prompts"]) and row["terms"]["prompts"] > 0 for row in rows)
    from safetensors.torch import load_file

    theirs = load_file(Path(teacher) / "model.safetensors")
    ours = load_file(made.folder / "model.safetensors")
    decoder = [name for name in theirs if name.startswith("mask_decoder.")]
    assert not all(torch.equal(theirs[name], ours[name]) for name in decoder)  # it learned too


def test_prompts_follow_from_the_row(teacher: str, pictures: Path) -> None:
    from edgevlm.data.readers import read_data_set

    model = read_model(teacher)
    data = read_data_set(pictures, task=model.task)
    made = TrainingPictures(data, augmentation="crop-flip", seed=0, n_variants=2)
    stored: Any = None
    lessons = Lessons(pictures=made, stored=stored, image=model.processing.image, n_prompts=4)
    (one, shown), (other, _) = lessons._prompts([3, 80]), lessons._prompts([80])
    for points, where in zip(one["input_points"].round().long(), shown, strict=True):
        assert not bool(where.all()), "a picture that is no square is filled up"
        x, y = points.clamp(min=0, max=len(where) - 1).reshape(-1, 2).T
        assert bool((where[y, x] | where[(y - 1).clamp(min=0), x] | where[y, (x - 1).clamp(min=0)]).all())
    assert one["input_points"].shape == (2, 4, 2, 2) and one["input_labels"].shape == (2, 4, 2)
    assert torch.equal(one["input_points"][1], other["input_points"][0])
    image = model.processing.image
    assert bool((one["input_points"] >= 0).all()) and float(one["input_points"].max()) <= max(image.height, image.width)


def test_a_student_learns_on(teacher: str, pictures: Path, tmp_path: Path) -> None:
    first = learn(teacher, pictures, tmp_path / "first", Term(objective="encoder"))
    terms = (Term(objective="prompts"), Term(objective="encoder"))
    second = learn(teacher, pictures, tmp_path / "second", *terms, student=first.folder, rate=1e-9)
    assert second.distillation.image.height == 128 and second.distillation.student == SMALL
    assert "Starts from a student that learned 3 steps by 'masks'." in second.distillation.notes
    from safetensors.torch import load_file

    before, after = (load_file(made.folder / "model.safetensors") for made in (first, second))
    assert before.keys() == after.keys()
    name = next(name for name in before if "vision_encoder" in name and name.endswith("weight"))
    torch.testing.assert_close(before[name], after[name], atol=1e-6, rtol=0)


def test_a_students_name_is_no_folder(
    teacher: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier run was told to write under the student's own name does not stand for the student."""
    monkeypatch.chdir(tmp_path)
    learn(teacher, pictures, tmp_path / SMALL, Term(objective="encoder"))
    again = learn(teacher, pictures, tmp_path / "again", Term(objective="encoder"))
    assert not any("Starts from" in note for note in again.distillation.notes)


def test_a_student_of_something_else_does_not_learn_on(teacher: str, pictures: Path, tmp_path: Path) -> None:
    first = learn(teacher, pictures, tmp_path / "first", Term(objective="encoder"))
    with pytest.raises(UsageError, match="'small-sam' cannot learn zero-shot-image-classification"):
        distill("demo", student=first.folder, data="shapes", recipe="features", output=tmp_path / "second")
    (first.folder / "distillation.json").write_text("{}")
    with pytest.raises(DataError, match=r"does not say which student this is: .*teacher"):
        learn(teacher, pictures, tmp_path / "second", Term(objective="encoder"), student=first.folder)
