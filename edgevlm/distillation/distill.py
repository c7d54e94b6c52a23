"""What ``edgevlm distill`` does: a large model teaches a small one, which then goes into ``edgevlm compile``.

distill()              from the teacher's name to the student's folder
  _read_data()         what to train on and what to judge on
  fit_student()        edgevlm.distillation.fitting: the student beside its teacher, the objectives that fit both
  compute_outputs()    edgevlm.distillation.teacher_outputs: the teacher is asked once
  train()              edgevlm.distillation.trainer
  _write()             the student in Hugging Face's layout, with ``distillation.json`` and ``training.jsonl``
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from edgevlm.bundle.write import check_destination
from edgevlm.data.data_set import DataSet
from edgevlm.data.readers import SHAPES, SHAPES_TRAINING_SEED, read_data_set
from edgevlm.data.splits import MIN_PICTURES, hold_out
from edgevlm.data.trained_on import part_by_training, trained_on, write_trained_on
from edgevlm.distillation.fitting import fit_student, take_scale, teachers_scale
from edgevlm.distillation.pictures import TrainingPictures
from edgevlm.distillation.recipe import DEFAULT_RECIPES, Recipe, load_recipe
from edgevlm.distillation.students import STUDENTS, Student, load_student, refuse_task
from edgevlm.distillation.students.facts import StudentBesideTeacher, StudentFacts
from edgevlm.distillation.teacher_outputs import (
    StoredOutputs,
    compute_outputs,
    describe_outputs,
    place_of,
)
from edgevlm.distillation.teachers import teacher_of
from edgevlm.errors import DataError, UsageError
from edgevlm.extras import require_compile, silence_telemetry
from edgevlm.families import ZERO_SHOT
from edgevlm.ingest import read_model
from edgevlm.model import Model
from edgevlm.progress import Note, Progress, doing, renamed, silent
from edgevlm.runtime.spec import ImageProcessing, Spec, from_json
from edgevlm.store import cache_root, write_spec

if TYPE_CHECKING:
    from torch import nn

    from edgevlm.distillation.lessons import Lessons

DISTILLATION_FILE = "distillation.json"

_N_SHAPES = 16_384
_N_SHAPES_HELD_OUT = 1000
_HELD_OUT_SHARE = 0.1
_MOST_HELD_OUT_SHARE = 0.3
# Of the pictures may be unreadable, and at least one: a crawled data set has some, and more are a mistake.
_UNREADABLE_SHARE = 0.01


class Distillation(Spec, frozen=True, kw_only=True):
    """What ``distillation.json`` says.

    Args:
        teacher: what the user wrote; ``teacher_digest`` is of its weights, configuration, processing and tokenizer.
        recipe: with what was changed on the command line.
        data_digest: of the pictures that were trained on, in their order; ``outputs`` of what the teacher said of them.
        n_steps: that were done; ``best_step`` the one whose weights the student has.
        metric: of student and teacher on pictures that training never saw; the teacher's is null where the metric
            compares with the teacher.
        facts: parameters, multiply-accumulates and latency before training; null where they were left out.
        notes: what was added, taken over or left out, a sentence each.
    """

    schema_version: Literal[1] = 1
    teacher: str
    teacher_digest: str
    task: str
    student: str
    n_parameters: int
    image: ImageProcessing
    recipe: Recipe
    n_processes: int
    data: str
    data_digest: str
    outputs: str
    n_training_pictures: int
    held_out_data: str
    held_out_digest: str
    n_held_out_pictures: int
    n_steps: int
    best_step: int
    loss: float
    metric: str
    student_metric: float | None
    teacher_metric: float | None
    facts: StudentBesideTeacher | None
    notes: tuple[str, ...]


class Distilled(Spec, frozen=True, kw_only=True):
    """What ``edgevlm distill`` made: a checkpoint's folder, ready for ``edgevlm compile``, and how it came about."""

    folder: Path
    distillation: Distillation


def distill(
    teacher: str,
    *,
    student: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    recipe: str | Recipe | None = None,
    output: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    precision: str | None = None,
    seed: int | None = None,
    eval_data: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    teacher_outputs: str | os.PathLike[str] | None = None,
    task: str | None = None,
    labels: Sequence[str] = (),
    revision: str | None = None,
    card: Path | str | None = None,
    trust_remote_code: bool = False,
    is_timed: bool = True,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Distilled:
    """Teach a small student what a large model knows; what comes out goes into ``compile``.

    Args:
        teacher: as ``compile`` takes it.
        student: a name in ``edgevlm.distillation.students.STUDENTS``, or the folder of one that this made: it learns
            on.
        data: pictures to train on, labelled or not, as ``read_data_set`` takes them; ``shapes`` are generated.
        recipe: a built-in one's name, a TOML file, or the value itself; the one for the teacher's task where left out.
        steps, batch_size, learning_rate, precision, seed: instead of the recipe's.
        eval_data: pictures to judge on; a part of ``data`` that training then never sees, where left out.
        image_size: of the student's pictures; where left out the teacher's own, or of a student that learns on its.
        teacher_outputs: where the teacher's outputs lie or are to lie; the cache folder where left out.
        is_timed: count and time the untrained student and the teacher before training.
    Raises:
        UsageError: teacher, student, recipe and data do not fit. MissingToolError: accelerate is not installed.
        StoreError: stored teacher outputs are damaged or of something else. ModelError: the training diverged.
    """
    require_compile("distill")
    silence_telemetry()
    from edgevlm.distillation.trainer import require_accelerate

    require_accelerate()
    # A name is a name, whatever folder is called so.
    earlier = None if os.fspath(student) in STUDENTS else _earlier(Path(student))
    kind = load_student(earlier.distillation.student if earlier else os.fspath(student))
    if isinstance(recipe, str):  # a wrong name or file is said before the teacher is read
        recipe = load_recipe(recipe)
    if data is None:
        raise UsageError("There is nothing to train on.", hint=f"Pass --data with pictures, or --data {SHAPES}.")
    model = read_model(
        teacher, task=task, card=card, revision=revision, labels=labels, trust_remote_code=trust_remote_code
    )
    refuse_task(kind, model)
    asked = _with_options(
        recipe or load_recipe(DEFAULT_RECIPES[model.task]),
        n_steps=steps, batch_size=batch_size, learning_rate=learning_rate, precision=precision, seed=seed,
    )  # fmt: skip
    destination = Path(output) if output is not None else Path(f"{model.name}-{kind.name}")
    _check_output(destination, overwrite=overwrite)
    train_on, held_out = _read_data(model, tuple(labels) or model.labels, data, eval_data)
    if earlier:
        _, held_out = part_by_training(held_out, earlier.folder)
    train_on = _as_many_as_are_seen(train_on, asked)
    state = destination.parent / f".{destination.name}.training"
    state.mkdir(parents=True, exist_ok=True)
    try:
        made = _distill(
            model,
            kind,
            asked,
            train_on,
            held_out,
            earlier=earlier,
            image_size=image_size or _own_size(earlier, model),
            outputs_folder=None if teacher_outputs is None else Path(teacher_outputs),
            state=state,
            destination=destination,
            is_timed=is_timed,
            progress=progress,
        )
    except KeyboardInterrupt:
        if (state / "checkpoint.safetensors").is_file():
            progress(Note(f"The last checkpoint is kept in '{state}'; the same command goes on from there."))
        raise
    if made is None:  # a process that only helped
        raise SystemExit(0)
    shutil.rmtree(state, ignore_errors=True)
    return Distilled(folder=destination, distillation=made)


def _distill(
    model: Model,
    kind: Student,
    recipe: Recipe,
    train_on: DataSet,
    held_out: DataSet,
    *,
    earlier: Distilled | None,
    image_size: int | None,
    outputs_folder: Path | None,
    state: Path,
    destination: Path,
    is_timed: bool,
    progress: Progress,
) -> Distillation | None:
    """Everything up to the folder; None in a process that is not the main one."""
    import torch

    from edgevlm.distillation.judging import Judge
    from edgevlm.distillation.lessons import Lessons, texts_of
    from edgevlm.distillation.trainer import has_tensorboard, new_accelerator, seed_of, train
    from edgevlm.training.checkpoint import identity_of
    from edgevlm.training.memory import keep_memory

    accelerator = new_accelerator(recipe, state)
    if accelerator.device.type == "cpu":
        keep_memory()
    say = progress if accelerator.is_main_process else silent
    teacher = teacher_of(model, device="cpu" if accelerator.device.type == "cpu" else str(accelerator.device))
    texts, their_texts = texts_of(model, train_on), texts_of(model, held_out)
    with doing("prepare", f"{kind.name}, taught by {model.name}", say):
        ready = fit_student(
            model,
            teacher,
            kind,
            recipe,
            image_size,
            earlier=earlier.folder if earlier else None,
            their_texts=their_texts,
            data=held_out,
            has_labels=train_on.has_labels,
            has_texts=texts is not None,
        )
    notes = list(dict.fromkeys((*train_on.notes, *held_out.notes, *ready.notes)))
    for note in notes:
        say(Note(note))
    facts = None
    if is_timed and accelerator.is_main_process:
        with doing("time", "the untrained student beside its teacher", say):
            facts = _facts(kind, model, image_size, n_classes=ready.n_classes, folder=state, progress=say)
        for line in facts_in_words(facts):
            say(Note(line))
    if not has_tensorboard():
        say(Note("tensorboard is not installed, so there are no logs for it; training.jsonl has every step."))
    lessons: dict[str, Lessons] = {}
    of_what: dict[str, str] = {}
    for name, data, named, needs, top_k in (
        ("train", train_on, texts, ready.needs, ready.top_k),
        ("held-out", held_out, their_texts, ready.judge_needs, 0),
    ):
        is_training = name == "train"
        pictures = TrainingPictures(
            data,
            augmentation=recipe.augmentation if is_training else "none",
            seed=recipe.data_seed,
            # Forms that no step comes to are not worth asking the teacher about.
            n_variants=min(recipe.n_variants, math.ceil(recipe.n_steps * recipe.batch_size / len(data))),
        )
        its_texts = named.texts if named else ()
        of = describe_outputs(teacher, pictures, needs, top_k=top_k, texts=its_texts)
        folder = place_of(of) if outputs_folder is None else outputs_folder / name
        with doing("teach" if is_training else "teach held-out", f"{teacher.model.name} on {data.name}", say):
            compute_outputs(
                teacher,
                pictures,
                of,
                folder,
                texts=its_texts,
                process=accelerator.process_index,
                n_processes=accelerator.num_processes,
                wait=accelerator.wait_for_everyone,
                progress=renamed(say, "teach" if is_training else "teach held-out"),
            )
            # One process of a machine hashes the files, and the others trust it.
            if accelerator.is_local_main_process:
                StoredOutputs(folder, of)
            accelerator.wait_for_everyone()
            stored = StoredOutputs(folder, of, is_verified=True)
        lessons[name] = Lessons(
            pictures=pictures, stored=stored, image=ready.image, texts=named, n_prompts=ready.n_prompts
        )
        of_what[name] = of.key
    learner = ready.learner

    def loss(batch: Any, outputs: Mapping[str, Any]) -> Any:
        generator = torch.Generator().manual_seed(seed_of(recipe.seed))
        # Nothing is gathered: processes judge unequal shares of the pictures.
        return learner.loss(learner(batch, outputs, lambda value: value, generator))

    scale = teachers_scale(teacher)
    del teacher  # it has said all that it has to say, and its memory is the student's
    judge = Judge(kind, lessons["held-out"], metric=ready.metric, needs=ready.metric_needs, loss=loss)
    start = read_model(str(earlier.folder)).source.digest if earlier else ""
    identity = identity_of(
        of_what, kind.name, start, msgspec.to_builtins(ready.image), msgspec.to_builtins(recipe),
        accelerator.num_processes, str(torch.__version__), train_on.digest, held_out.digest,
        *([each.texts, each.of_picture.tolist()] for each in (texts, their_texts) if each is not None),
    )  # fmt: skip
    with doing("train", f"{recipe.n_steps} steps of {recipe.batch_size} pictures", say):
        trained = train(
            learner,
            lessons["train"],
            recipe,
            judge=judge,
            folder=state,
            identity=identity,
            accelerator=accelerator,
            progress=say,
        )
    if not accelerator.is_main_process:
        return None
    notes += take_scale(learner, scale)
    if earlier:
        before = earlier.distillation
        notes.append(f"Starts from a student that learned {before.n_steps} steps by '{before.recipe.name}'.")
    made = Distillation(
        teacher=model.source.asked,
        teacher_digest=model.source.digest,
        task=model.task,
        student=kind.name,
        n_parameters=sum(parameter.numel() for parameter in learner.student.parameters()),
        image=ready.image,
        recipe=recipe,
        n_processes=accelerator.num_processes,
        data=train_on.name,
        data_digest=lessons["train"].pictures.digest,
        outputs=of_what["train"],
        n_training_pictures=len(train_on),
        held_out_data=held_out.name,
        held_out_digest=lessons["held-out"].pictures.digest,
        n_held_out_pictures=len(held_out),
        n_steps=trained.n_steps,
        best_step=trained.best_step,
        loss=trained.loss,
        metric=judge.metric,
        student_metric=trained.metric,
        teacher_metric=judge.of_teacher(),
        facts=facts,
        notes=tuple(notes),
    )
    with doing("write", str(destination), say):
        taught = {sample.digest for sample in train_on.samples} | (trained_on(earlier.folder) if earlier else set())
        _write(kind, learner.student, model, made, taught, state, destination)
    return made


# --- what is asked for ------------------------------------------------------------------------------------


def _with_options(recipe: Recipe, **options: Any) -> Recipe:
    """The recipe with what was asked for instead of its own.

    Raises: UsageError: a value is out of range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return msgspec.convert(msgspec.to_builtins(recipe) | given, Recipe)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"The recipe '{recipe.name}' cannot be changed so: {error}.", hint="See `edgevlm distill --help`."
        ) from error


def _own_size(earlier: Distilled | None, model: Model) -> int | None:
    """Of a student's pictures that learns on; null where it sees what its teacher sees, which may be no square."""
    if earlier is None:
        return None
    image, theirs = earlier.distillation.image, model.processing.image
    return None if (image.height, image.width) == (theirs.height, theirs.width) else image.height


def _earlier(folder: Path) -> Distilled | None:
    """A student that was made here before; None where this is no such folder."""
    try:
        content = (folder / DISTILLATION_FILE).read_bytes()
    except OSError:
        return None
    try:
        return Distilled(folder=folder, distillation=from_json(content, Distillation))
    except msgspec.MsgspecError as error:
        raise DataError(
            f"'{folder / DISTILLATION_FILE}' does not say which student this is: {error}.",
            hint="Name a student, or a folder that `edgevlm distill` made.",
        ) from error


def _check_output(destination: Path, *, overwrite: bool) -> None:
    if destination.is_dir() and overwrite and (destination / DISTILLATION_FILE).is_file():
        return
    check_destination(destination, overwrite=False)


def _read_data(
    model: Model,
    labels: tuple[str, ...],
    data: str | os.PathLike[str],
    eval_data: str | os.PathLike[str] | None,
) -> tuple[DataSet, DataSet]:
    """What to train on and what to judge on; they share no picture."""

    def read(source: str | os.PathLike[str], names: Sequence[str], **options: Any) -> DataSet:
        size = max(model.processing.image.height, model.processing.image.width)
        cache = cache_root() / "digests"
        return read_data_set(
            source,
            labels=names,
            task=model.task,
            cache=cache,
            shapes_size=size,
            takes_captions=model.task == ZERO_SHOT,
            **options,
        )

    if os.fspath(data) == SHAPES:
        train_on = read(SHAPES, labels, n_shapes=_N_SHAPES, shapes_seed=SHAPES_TRAINING_SEED)
        eval_data = eval_data or SHAPES
    else:
        train_on = read(data, labels, unreadable_share=_UNREADABLE_SHARE)
    if eval_data is None:
        n = len({sample.digest for sample in train_on.samples})
        share = min(_MOST_HELD_OUT_SHARE, max(_HELD_OUT_SHARE, MIN_PICTURES / max(n, 1)))
        return hold_out(train_on, share=share)
    # Class names that are the data set's own must mean the same in both.
    held_out = read(eval_data, labels or train_on.class_names, n_shapes=_N_SHAPES_HELD_OUT)
    taken = {sample.digest for sample in held_out.samples}
    train_on = train_on.only([sample for sample in train_on.samples if sample.digest not in taken])
    if not train_on.samples:
        raise DataError(
            f"Every picture of '{data}' is in the pictures to judge on too.", hint="Leave --eval-data out to cut them."
        )
    return train_on, held_out


def _as_many_as_are_seen(data: DataSet, recipe: Recipe) -> DataSet:
    """A short training sees some of the pictures; the teacher need not be asked about the others."""
    n_seen = recipe.n_steps * recipe.batch_size
    if n_seen >= len(data):
        return data
    chosen = np.sort(np.random.default_rng(recipe.data_seed).permutation(len(data))[:n_seen])
    note = f"{n_seen} of {len(data)} pictures are used: {recipe.n_steps} steps of {recipe.batch_size} see no more."
    return replace(data.only([data.samples[i] for i in chosen]), notes=(*data.notes, note))


# --- facts ------------------------------------------------------------------------------------------------


def _facts(
    kind: Student, model: Model, image_size: int | None, *, n_classes: int | None, folder: Path, progress: Progress
) -> StudentBesideTeacher:
    """Measured once: a training that goes on is not timed again."""
    from edgevlm.distillation.students.facts import describe_student

    file = folder / "facts.json"
    asked = f"{kind.name} {image_size} {model.source.digest}"
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        known = from_json(file.read_bytes(), _KnownFacts)
        if known.asked == asked:
            return known.facts
    facts = describe_student(kind, model, image_size=image_size, n_classes=n_classes, progress=progress)
    write_spec(file, _KnownFacts(asked=asked, facts=facts))
    return facts


class _KnownFacts(Spec, frozen=True, kw_only=True):
    asked: str
    facts: StudentBesideTeacher


def facts_in_words(facts: StudentBesideTeacher) -> list[str]:
    """A line each for student and teacher."""
    rows = {"student": facts.student, "teacher": facts.teacher}
    return [f"{who}: {_in_words(each)}" for who, each in rows.items() if each is not None]


def _in_words(facts: StudentFacts) -> str:
    parts = [
        f"{facts.name}, {facts.height}×{facts.width}",
        f"{facts.n_parameters / 1e6:.2f} million parameters",
        f"{facts.n_macs / 1e6:.0f} million multiply-accumulates",
    ]
    parts += [f"{name} {ms:.2f} ms (median on this machine in float32)" for name, ms in facts.latency_ms.items()]
    return "; ".join([", ".join(parts), *facts.reasons])


# --- what comes out ---------------------------------------------------------------------------------------


def _write(
    kind: Student,
    student: nn.Module,
    model: Model,
    made: Distillation,
    taught: Set[str],
    state: Path,
    destination: Path,
) -> None:
    """Whole, or not at all: a finished folder under its own name.

    Args: taught: digests of the pictures that it learned from.
    """
    from edgevlm.distillation.trainer import LOG_FILE

    draft = destination.parent / f".{destination.name}.{os.getpid()}.partial"
    try:
        kind.save(student, draft, model)
        write_spec(draft / DISTILLATION_FILE, made)
        write_trained_on(draft, taught)
        shutil.copyfile(state / LOG_FILE, draft / LOG_FILE)
        if (state / "tensorboard").is_dir():
            shutil.copytree(state / "tensorboard", draft / "tensorboard")
        if destination.exists():
            shutil.rmtree(destination)
        draft.replace(destination)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
