"""`edgevlm distill`: from a teacher to a checkpoint that `edgevlm compile` takes, and what a user can get wrong."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs PyTorch")
pytest.importorskip("accelerate", reason="training needs accelerate")
pytest.importorskip("transformers", reason="teachers are checkpoints of Transformers")

from safetensors.torch import load_file  # noqa: E402 - torch first

from edgevlm.cli.main import exit_code_of  # noqa: E402 - torch first
from edgevlm.compiler import prepare  # noqa: E402
from edgevlm.data.trained_on import trained_on  # noqa: E402
from edgevlm.distillation import distill as verb  # noqa: E402
from edgevlm.distillation import fitting  # noqa: E402
from edgevlm.distillation.distill import DISTILLATION_FILE, Distillation, distill  # noqa: E402
from edgevlm.distillation.recipe import Recipe, Term  # noqa: E402
from edgevlm.distillation.students.facts import GraphFacts, StudentBesideTeacher, StudentFacts  # noqa: E402
from edgevlm.errors import DataError, MissingToolError, ModelError, StoreError, UsageError  # noqa: E402
from edgevlm.ingest import read_model  # noqa: E402
from edgevlm.progress import Event, Note, StepProgress  # noqa: E402
from tests.colours import LABELS, colour, write_classifier, write_pictures  # noqa: E402
from tests.families.checkpoints import write_checkpoint  # noqa: E402

STUDENT = "mobilevit-xxs"
SHORT: dict[str, Any] = {"steps": 3, "batch_size": 4, "image_size": 32, "is_timed": False}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "colours", n_per_class=24)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An ONNX file that tells three colours apart."""
    return str(write_classifier(tmp_path_factory.mktemp("teacher") / "colours.onnx"))


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint("CLIPModel", tmp_path_factory.mktemp("clip") / "clip"))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def test_a_classifier_learns_from_an_onnx_file(classifier: str, pictures: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    made = distill(classifier, student=STUDENT, data=pictures, output=tmp_path / "out", progress=told.append, **SHORT)
    found = msgspec.json.decode((made.folder / DISTILLATION_FILE).read_bytes(), type=Distillation)
    assert found == made.distillation and found.metric == "top-1 accuracy"
    assert found.teacher_metric == 1.0 and 0 <= (found.student_metric or 0) <= 1
    # Three steps of four pictures see no more of the 52 that are not held out.
    assert (found.n_training_pictures, found.n_held_out_pictures) == (12, 20)
    assert "12 of 52 pictures are used: 3 steps of 4 see no more." in found.notes
    assert found.recipe.n_steps == 3 and len(rows_of(made.folder)) == 3
    student = read_model(str(made.folder))
    assert student.labels == LABELS and student.task == "image-classification"
    assert (student.processing.image.height, student.processing.image.width) == (32, 32)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert any(isinstance(event, StepProgress) and "pictures/s" in event.detail for event in told)


def test_what_taught_a_student_does_not_judge_it(classifier: str, pictures: Path, tmp_path: Path) -> None:
    made = distill(classifier, student=STUDENT, data=pictures, output=tmp_path / "out", **{**SHORT, "batch_size": 16})
    taught = trained_on(made.folder)
    assert len(taught) == made.distillation.n_training_pictures == 48
    job = prepare(str(made.folder), eval_data=pictures, output=tmp_path / "bundle")
    judged = [*job.splits.select.samples, *job.splits.report.samples]
    assert len(judged) == 24 and not {sample.digest[:16] for sample in judged} & taught
    assert {sample.digest[:16] for sample in job.splits.calibrate.samples} <= taught
    assert any("48 of 72 pictures of 'colours' taught this model" in note for note in job.notes)
    again = distill(
        classifier, student=made.folder, data=pictures, output=tmp_path / "again", steps=1, batch_size=4, seed=1,
        is_timed=False,
    )  # fmt: skip
    assert trained_on(again.folder) >= taught


def test_the_teachers_task_decides_the_recipe(two_towers: str, pictures: Path, tmp_path: Path) -> None:
    made = distill(two_towers, student=STUDENT, data=pictures, output=tmp_path / "out", **SHORT)
    assert made.distillation.recipe.name == "clip-reinforced"


def test_what_the_data_lacks_is_said_before_the_teacher_is_asked(
    classifier: str, two_towers: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "compute_outputs", lambda *_, **__: pytest.fail("the teacher was asked"))
    flat = tmp_path / "flat"
    flat.mkdir()
    for label in LABELS:
        for picture in (pictures / label).iterdir():
            shutil.copyfile(picture, flat / f"{label}-{picture.name}")
    options = {**SHORT, "student": STUDENT, "data": flat, "output": tmp_path / "out"}
    with pytest.raises(UsageError, match="'affinity' needs texts, and the data set has none"):
        distill(two_towers, **options)
    with pytest.raises(UsageError, match="'labels' needs labels, and the data set has none"):
        distill(classifier, recipe="labels", **options)
    rows = [f"{path.name},{'' if i == 5 else 'a picture'}" for i, path in enumerate(sorted(flat.iterdir()))]
    (flat / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    with pytest.raises(DataError, match=r"1 of the \d+ pictures of 'captions' have no caption; the first is"):
        distill(two_towers, **{**options, "data": flat / "captions.csv"})


def test_frozen_parts_stay_as_they_are(two_towers: str, pictures: Path, tmp_path: Path) -> None:
    embeds = Term(objective="features", options={"output": "image_embeds", "distance": "cosine"})
    terms = (embeds, Term(objective="affinity"))
    learned = {}
    for steps in (1, 3):
        recipe = Recipe(name="half", terms=terms, frozen=("text_model", "text_projection"))
        options = {**SHORT, "steps": steps, "data": pictures, "recipe": recipe, "output": tmp_path / str(steps)}
        learned[steps] = load_file(distill(two_towers, student=STUDENT, **options).folder / "model.safetensors")
    same = {name for name, value in learned[1].items() if torch.equal(value, learned[3][name])}
    assert {name for name in learned[1] if name.startswith("text_")} <= same
    assert any(name.startswith("vision_model") and name not in same for name in learned[1])
    with pytest.raises(UsageError, match=r"freezes 'text_mode', .* no part of that name"):
        recipe = Recipe(name="half", terms=terms, frozen=("text_mode",))
        distill(two_towers, student=STUDENT, **{**options, "recipe": recipe, "output": tmp_path / "none"})


def test_sparse_logits_are_not_stored_for_what_needs_them_all(classifier: str, pictures: Path, tmp_path: Path) -> None:
    recipe = Recipe(name="all", terms=(Term(objective="features", options={"output": "logits"}),), top_k=1)
    made = distill(classifier, student=STUDENT, data=pictures, recipe=recipe, output=tmp_path / "out", **SHORT)
    assert made.distillation.n_steps == 3


def test_a_second_student_does_not_ask_the_teacher_again(
    classifier: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgevlm.distillation.teachers import OnnxTeacher

    distill(classifier, student=STUDENT, data=pictures, output=tmp_path / "one", **SHORT)
    monkeypatch.setattr(OnnxTeacher, "outputs", lambda *_: pytest.fail("the teacher was asked"))
    options = {**SHORT, "image_size": 64}
    distill(classifier, student="mobilevitv2-0.5", data=pictures, output=tmp_path / "two", **options)
    distill(classifier, student=STUDENT, data=pictures, output=tmp_path / "three", seed=1, **SHORT)
    one, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "three"))
    assert one != three, "another seed starts from other weights"


@pytest.mark.parametrize("recipe", ["labels", "pretrain"])
def test_what_learns_from_the_data_alone_has_nothing_stored(
    recipe: str, classifier: str, two_towers: str, pictures: Path, tmp_path: Path
) -> None:
    teacher = classifier if recipe == "labels" else two_towers
    options = {**SHORT, "recipe": recipe, "image_size": 32}
    made = distill(teacher, student=STUDENT, data=pictures, output=tmp_path / "out", **options)
    assert made.distillation.n_steps == 3
    assert len(rows_of(made.folder)) == 3 and all(row["loss"] > 0 for row in rows_of(made.folder))


def test_two_towers_learn_texts_too(two_towers: str, pictures: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        name="both",
        terms=(
            Term(objective="features", options={"output": "image_embeds", "distance": "cosine"}),
            Term(objective="features", options={"output": "text_embeds", "distance": "cosine"}),
            Term(objective="affinity"),
        ),
        n_steps=2,
        batch_size=4,
    )
    made = distill(
        two_towers, student=STUDENT, data=pictures, recipe=recipe, output=tmp_path / "out", image_size=32,
        is_timed=False,
    )  # fmt: skip
    found = made.distillation
    assert found.metric == "top-1 accuracy" and found.teacher_metric is not None
    assert set(rows_of(made.folder)[0]["terms"]) == {"features", "features#2", "affinity"}
    student = read_model(str(made.folder))
    assert student.task == "zero-shot-image-classification" and student.tokenizer_file
    assert Path(student.tokenizer_file).read_bytes() == (Path(two_towers) / "tokenizer.json").read_bytes()
    assert any("Cosines are multiplied by" in note for note in found.notes)


def test_captions_are_texts(two_towers: str, tmp_path: Path) -> None:
    folder = tmp_path / "captioned"
    folder.mkdir()
    rows = ["file,caption"]
    for i in range(72):
        colour(LABELS[i % 3], i).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{'ab'[i % 2]} {LABELS[i % 3]}")
    (folder / "pictures.csv").write_text("\n".join(rows))
    recipe = Recipe(name="texts", terms=(Term(objective="affinity"),), n_steps=2, batch_size=4)
    made = distill(
        two_towers, student=STUDENT, data=folder, recipe=recipe, output=tmp_path / "out", image_size=32,
        is_timed=False,
    )  # fmt: skip
    assert made.distillation.metric == "cosine with the teacher"
    assert all(np.isfinite(row["terms"]["affinity"]) for row in rows_of(made.folder))


def test_vectors_of_unlike_length_are_projected_and_said(tmp_path: Path, pictures: Path) -> None:
    teacher = str(write_checkpoint("Dinov2Model", tmp_path / "dino"))
    recipe = Recipe(name="vectors", terms=(Term(objective="features"),), n_steps=2, batch_size=4)
    told: list[Event] = []
    made = distill(
        teacher, student=STUDENT, data=pictures, recipe=recipe, output=tmp_path / "out", image_size=32, is_timed=False,
        progress=told.append,
    )  # fmt: skip
    (note,) = [note for note in made.distillation.notes if "projection" in note]
    assert "320 numbers and the teacher 16" in note and Note(note) in told
    # Neither labels nor vectors of one length: the loss itself is judged by.
    assert made.distillation.metric == "loss" and made.distillation.teacher_metric is None


def test_unlabelled_pictures_are_judged_by_the_teacher(classifier: str, pictures: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in pictures.rglob("*.png"):
        shutil.copyfile(file, flat / f"{file.parent.name}-{file.name}")
    recipe = Recipe(name="both", terms=(Term(objective="logits"), Term(objective="labels")))
    made = distill(classifier, student=STUDENT, data=flat, recipe=recipe, output=tmp_path / "out", **SHORT)
    assert {row["terms"]["labels"] for row in rows_of(made.folder)} == {0.0}
    assert made.distillation.metric == "top-1 as the teacher" and made.distillation.teacher_metric is None
    assert any("no labels" in note for note in made.distillation.notes)


def test_what_was_stopped_goes_on_and_ends_the_same(classifier: str, pictures: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        name="short", terms=(Term(objective="logits"),), n_steps=6, batch_size=4, checkpoint_every=2, average=0.9
    )
    options: dict[str, Any] = {"student": STUDENT, "data": pictures, "recipe": recipe, "image_size": 32}
    expected = distill(classifier, output=tmp_path / "whole", is_timed=False, **options)
    told: list[Event] = []

    def stop(event: Event) -> None:
        told.append(event)
        if isinstance(event, StepProgress) and "step 5/" in event.detail:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(classifier, output=tmp_path / "parts", is_timed=False, progress=stop, **options)
    assert isinstance(told[-1], Note) and "the same command goes on from there" in told[-1].text
    assert not (tmp_path / "parts").exists()
    got = distill(classifier, output=tmp_path / "parts", is_timed=False, **options)
    weights = [(made.folder / "model.safetensors").read_bytes() for made in (expected, got)]
    assert weights[0] == weights[1]


FACTS = StudentBesideTeacher(
    student=StudentFacts(
        name="small", height=32, width=32, n_parameters=950_000, n_macs=21_000_000,
        graphs={"model": GraphFacts(n_parameters=950_000, n_macs=21_000_000)}, latency_ms={"model": 1.5},
    ),
    teacher=None,
)  # fmt: skip


def test_size_and_speed_are_said_before_training(
    classifier: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgevlm.distillation.students.facts.describe_student", lambda *_, **__: FACTS)
    told: list[Event] = []
    made = distill(
        classifier, student=STUDENT, data=pictures, output=tmp_path / "out", progress=told.append,
        **{**SHORT, "is_timed": True},
    )  # fmt: skip
    assert made.distillation.facts == FACTS
    said = [event.text if isinstance(event, Note) else type(event).__name__ for event in told]
    line = "student: small, 32×32, 0.95 million parameters, 21 million multiply-accumulates, model 1.50 ms"
    place = next(i for i, text in enumerate(said) if text.startswith(line))
    steps = [i for i, event in enumerate(told) if isinstance(event, StepProgress) and event.name == "train"]
    assert place < min(steps)


def test_from_the_command_line(
    classifier: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["distill", "--teacher", classifier, "--student", STUDENT, "--data", str(pictures), "--steps", "2",
                 "--batch-size", "4", "--image-size", "32", "--no-latency", "-q",
                 "-o", str(tmp_path / "out")]  # fmt: skip
    assert exit_code_of([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert told["distillation"]["student"] == STUDENT and told["folder"] == str(tmp_path / "out")
    assert exit_code_of(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert exit_code_of([*arguments, "--overwrite"]) == 0
    text = capsys.readouterr().out
    assert "top-1 accuracy on 20 pictures" in text and f"edgevlm compile {tmp_path / 'out'}" in text


# --- what a user can get wrong ----------------------------------------------------------------------------


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], classifier: str, pictures: Path, tmp_path: Path) -> Iterator[Any]:
    def run(*arguments: str, student: str = STUDENT, data: Path = pictures) -> tuple[int, str]:
        given = ["distill", "--teacher", classifier, "--student", student, "--data", str(data), "--no-latency", "-q",
                 "--steps", "2", "--batch-size", "4", "--image-size", "32", "-o", str(tmp_path / "out")]  # fmt: skip
        code = exit_code_of([*given, *arguments])
        return code, capsys.readouterr().err

    yield run


def test_names_get_their_nearest_neighbours(told: Any) -> None:
    code, message = told(student="mobilevit-xss")
    assert code == 2 and "Did you mean 'mobilevit-xs' or 'mobilevit-xxs'" in message
    code, message = told("--recipe", "logit")
    assert code == 2 and "Did you mean 'logits'" in message


def test_an_unknown_objective_is_named(told: Any, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('name = "own"\n[[terms]]\nobjective = "logit"\n')
    code, message = told("--recipe", str(file))
    assert code == 2 and "Did you mean 'logits'" in message


def test_layers_cannot_be_inherited_from_an_onnx_file(told: Any, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('name = "own"\ninherits = true\n[[terms]]\nobjective = "logits"\n')
    code, message = told("--recipe", str(file))
    assert code == 2 and "is an ONNX file" in message


def test_what_the_teacher_does_not_give_is_said(told: Any, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('name = "own"\n[[terms]]\nobjective = "features"\n')
    code, message = told("--recipe", str(file))
    assert code == 2 and "'image_embeds'" in message


def test_a_few_unreadable_pictures_are_left_out_and_more_are_an_error(
    classifier: str, pictures: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    (data / "red" / "torn.png").write_bytes((data / "red" / "0.png").read_bytes()[:100])
    made = distill(classifier, student=STUDENT, data=data, output=tmp_path / "out", **SHORT)
    assert any("1 of 73 pictures cannot be read and were left out: " in note for note in made.distillation.notes)
    (data / "blue" / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 74 pictures cannot be read, and at most 1 .*empty\.png.*torn\.png"):
        distill(classifier, student=STUDENT, data=data, output=tmp_path / "out2", **SHORT)


def test_stored_outputs_of_another_teacher_are_refused(pictures: Path, tmp_path: Path) -> None:
    options = {**SHORT, "student": STUDENT, "data": pictures, "teacher_outputs": tmp_path / "outputs"}
    for weight in (1.0, 2.0):
        file = str(write_classifier(tmp_path / f"{weight}.onnx", weight=weight))
        if weight == 1.0:
            distill(file, output=tmp_path / "one", **options)
            continue
        with pytest.raises(StoreError, match="holds the teacher outputs of another teacher"):
            distill(file, output=tmp_path / "two", **options)


def test_a_shard_that_was_changed_is_refused(classifier: str, pictures: Path, tmp_path: Path) -> None:
    options = {**SHORT, "student": STUDENT, "data": pictures, "teacher_outputs": tmp_path / "outputs"}
    distill(classifier, output=tmp_path / "one", **options)
    shard = next((tmp_path / "outputs" / "train").glob("shard-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match="its sha256 is another"):
        distill(classifier, output=tmp_path / "two", **options)


def test_a_rate_that_is_too_high_ends_in_one_sentence(classifier: str, pictures: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        name="wild", terms=(Term(objective="logits"),), n_steps=40, batch_size=4, learning_rate=1e30, warmup_share=0.0
    )
    with pytest.raises(ModelError, match="Training diverged at step"):
        distill(
            classifier, student=STUDENT, data=pictures, recipe=recipe, output=tmp_path / "out", image_size=32,
            is_timed=False,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_pictures_too_small_for_a_student_are_refused(told: Any) -> None:
    code, message = told(student="mobilevitv2-0.5")
    assert code == 2 and "cannot take pictures of 32×32" in message and "larger --image-size" in message


def test_other_tokens_are_refused(two_towers: str) -> None:
    class Config:
        text_config = type("Text", (), {"vocab_size": 5})()

    student = type("Student", (), {"config": Config()})()
    with pytest.raises(UsageError, match="their tokenizers differ"):
        fitting._tokens(read_model(two_towers), student)


def test_without_accelerate_the_extra_is_named(
    classifier: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "accelerate" else find(name))
    with pytest.raises(MissingToolError, match="needs accelerate"):
        distill(classifier, student=STUDENT, data=pictures)


def test_pictures_that_are_judged_on_are_not_trained_on(classifier: str, pictures: Path, tmp_path: Path) -> None:
    both = tmp_path / "some"
    for label in LABELS:
        (both / label).mkdir(parents=True)
        for i in range(8):
            shutil.copyfile(pictures / label / f"{i}.png", both / label / f"{i}.png")
    train_on, held_out = verb._read_data(read_model(classifier), LABELS, pictures, both)
    assert (len(train_on), len(held_out)) == (48, 24)
    assert not {s.digest for s in train_on.samples} & {s.digest for s in held_out.samples}
