"""A student fitted to its teacher: built for its task and tokens, with objectives that both can give something to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevlm.data.data_set import DataSet
from edgevlm.distillation.recipe import Recipe
from edgevlm.distillation.students import Student
from edgevlm.distillation.teachers import Teacher, TorchTeacher
from edgevlm.errors import UsageError, did_you_mean
from edgevlm.model import Model
from edgevlm.runtime.spec import ImageProcessing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgevlm.distillation.lessons import Texts
    from edgevlm.distillation.trainer import Decode, Learner

_OUTPUTS = ("logits", "image_embeds", "image_features", "text_embeds", "text_features", "pred_masks", "iou_scores")
# Of each picture in a step; EdgeSAM asks up to 16 (arXiv:2312.06660), of pictures with some hundred things in them.
_N_PROMPTS = 4
_MASK_TOKENS = ("[MASK]", "<mask>")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pupil:
    """A student and its objectives, ready to be taught.

    Args:
        needs: of the teacher's outputs, for training; ``judge_needs`` for the held-out pictures.
        top_k: so many logits are stored for training; 0 stands for all.
    """

    learner: Learner
    image: ImageProcessing
    n_classes: int | None
    needs: frozenset[str]
    top_k: int
    judge_needs: frozenset[str]
    metric: str
    metric_needs: frozenset[str]
    n_prompts: int
    notes: tuple[str, ...]


def fit_student(
    model: Model,
    teacher: Teacher,
    kind: Student,
    recipe: Recipe,
    image_size: int | None,
    *,
    earlier: Path | None,
    their_texts: Texts | None,
    data: DataSet,
    has_labels: bool,
    has_texts: bool,
) -> Pupil:
    """The student for ``recipe``.

    Args:
        earlier: a folder with weights to start from.
        their_texts, data: to judge on; ``has_labels`` and ``has_texts`` say what there is to train on.
    """
    import torch

    from edgevlm.distillation.judging import LOSS, choose_metric
    from edgevlm.distillation.objectives import make_objectives
    from edgevlm.distillation.students.inheritance import inherit_weights
    from edgevlm.distillation.trainer import Learner

    theirs = teacher.sizes()
    n_classes = None if model.labels or len(theirs.get("logits", ())) != 1 else theirs["logits"][0]
    student = kind.build(model, image_size=image_size, seed=recipe.seed, n_classes=n_classes)
    image = kind.processing(model, image_size)
    notes: list[str] = []
    if earlier is not None:
        _take_up(student, earlier)
    elif recipe.inherits:
        if not isinstance(teacher, TorchTeacher):
            raise UsageError(
                f"The recipe '{recipe.name}' starts from the teacher's layers, and '{model.name}' is an ONNX file.",
                hint="Pass the checkpoint that it was exported from, or take another recipe.",
            )
        inherited = inherit_weights(student, teacher.module)
        notes += inherited or ("Nothing of the teacher's has the names and shapes of the student's layers.",)
    ours = _student_sizes(kind, student, model, image)
    n_tokens, mask_token = _tokens(model, student)
    torch.manual_seed(recipe.seed)  # of the objectives' own parameters
    objectives = make_objectives(recipe.terms, ours, theirs, n_tokens, mask_token)
    objectives.refuse_data(has_labels=has_labels, has_texts=has_texts)
    has_prompts = "prompts" in objectives.batch_needs
    if "labels" in objectives.batch_needs and not has_labels:
        notes.append("The pictures have no labels, so what learns from labels has nothing to do.")
    needs = frozenset(name for name in objectives.teacher_needs if name in theirs)
    has_class_texts = their_texts is not None and bool(their_texts.n_classes)
    is_labelled = all(sample.label is not None for sample in data.samples)
    metric, metric_needs = choose_metric(ours, theirs, is_labelled=is_labelled, has_class_texts=has_class_texts)
    judge_needs = needs if metric == LOSS else metric_needs | ({"text_embeds"} & theirs.keys())
    _freeze(student, recipe, kind)
    return Pupil(
        learner=Learner(
            kind,
            student,
            objectives,
            decode=_decoder_of(student, teacher, image) if has_prompts else None,
        ),
        image=image,
        n_classes=n_classes,
        needs=needs,
        top_k=recipe.top_k if objectives.reads_sparse else 0,
        judge_needs=judge_needs if their_texts is not None or metric == LOSS else judge_needs - {"text_embeds"},
        metric=metric,
        metric_needs=metric_needs,
        n_prompts=_N_PROMPTS if has_prompts else 0,
        notes=(*notes, *objectives.notes),
    )


def _freeze(student: nn.Module, recipe: Recipe, kind: Student) -> None:
    """Raises: UsageError: the recipe names a part that the student has not."""
    student.requires_grad_(True)
    parts = {name: part for name, part in student.named_modules() if name}
    for name in recipe.frozen:
        if name not in parts:
            raise UsageError(
                f"The recipe '{recipe.name}' freezes '{name}', and '{kind.name}' has no part of that name.",
                hint=did_you_mean(name, [each for each in parts if each.count(".") <= name.count(".")]),
            )
        parts[name].requires_grad_(False)


def _take_up(student: nn.Module, folder: Path) -> None:
    """The weights of a student of this kind that learned before.

    Raises: UsageError: it was taught for other classes, texts or sizes.
    """
    from edgevlm.families.loading import load_module
    from edgevlm.ingest import read_model

    try:
        student.load_state_dict(load_module(read_model(str(folder))).state_dict())
    except RuntimeError as error:
        # torch's first line says whose weights they are, each further one what is wrong with one of them.
        what = str(error).splitlines()[-1].strip()
        raise UsageError(
            f"The student in '{folder}' does not fit this teacher: {what}",
            hint="Name a student that learned from this teacher, or one of the same classes, texts and sizes.",
        ) from error


def _decoder_of(student: nn.Module, teacher: Teacher, image: ImageProcessing) -> Decode | None:
    """The mask decoders of both, called as their family calls them; None where they have none."""
    graph = next((graph for graph in teacher.model.graphs if graph.name == "mask_decoder"), None)
    if graph is None or not isinstance(teacher, TorchTeacher):
        return None
    from edgevlm.families import load_family

    family, theirs = load_family(teacher.model.family), teacher.module
    # Prompts are in the student's pixels.
    scale = teacher.processing.image.height / image.height

    def decode(who: str, image_embeds: Tensor, prompts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        points, labels = prompts["input_points"], prompts["input_labels"]
        if who == "teacher":
            points = (points + 0.5) * scale - 0.5  # a whole number is the middle of a pixel
        module = student if who == "student" else theirs
        return dict(zip(graph.outputs, family.call(module, graph.name, image_embeds, points, labels), strict=True))

    return decode


def _student_sizes(
    kind: Student, student: nn.Module, model: Model, image: ImageProcessing
) -> dict[str, tuple[int, ...]]:
    """Everything that a student can give: the shape of one row by output.

    Raises: UsageError: it does not take pictures of that size.
    """
    import torch

    from edgevlm.distillation.lessons import tokenize_texts
    from edgevlm.distillation.step import Batch
    from edgevlm.families.loading import first_line

    tokens: dict[str, Any] = {}
    if model.processing.text is not None:
        tokens = {name: torch.from_numpy(value) for name, value in tokenize_texts(model, ["a"]).items()}
    batch = Batch(pixel_values=torch.from_numpy(np.zeros((1, 3, image.height, image.width), np.float32)), **tokens)
    found = {}
    with torch.no_grad():
        for name in _OUTPUTS:
            try:
                found[name] = tuple(kind.outputs(student, batch, frozenset({name}))[name].shape[1:])
            except UsageError:  # it has no output of that name
                continue
            except RuntimeError as error:  # halved until nothing is left of them
                raise UsageError(
                    f"'{kind.name}' cannot take pictures of {image.height}×{image.width}: {first_line(error)}",
                    hint="Pass a larger --image-size.",
                ) from error
    return found


def _tokens(model: Model, student: Any) -> tuple[int | None, int | None]:
    """How many tokens the teacher's tokenizer knows, which the student takes over, and the one that stands for none.

    Raises: UsageError: the student was made for other tokens.
    """
    if model.processing.text is None:
        return None, None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(model.tokenizer_file)
    config = getattr(getattr(student, "config", None), "text_config", None)
    n_tokens = int(getattr(config, "vocab_size", tokenizer.get_vocab_size()))
    if n_tokens < tokenizer.get_vocab_size():
        raise UsageError(
            f"The student knows {n_tokens} tokens and the teacher's tokenizer has {tokenizer.get_vocab_size()}: their "
            "tokenizers differ.",
            hint="Take a student that is made for its teacher's tokenizer; see `edgevlm distill --help`.",
        )
    ids = (tokenizer.token_to_id(token) for token in _MASK_TOKENS)
    return n_tokens, next((each for each in ids if each is not None), None)


def teachers_scale(teacher: Teacher) -> float | None:
    """What the teacher multiplies cosines by; null where it has not two towers."""
    if not isinstance(teacher, TorchTeacher):
        return None
    from edgevlm.families import load_family

    scoring = load_family(teacher.model.family).scoring(teacher.module)
    return None if scoring is None else scoring.scale


def take_scale(learner: Learner, teachers: float | None) -> tuple[str, ...]:
    """Two towers give probabilities by the scale that training learned, else by the teacher's."""
    import torch

    scale = getattr(learner.student, "logit_scale", None)
    learned = learner.objectives.scales()
    if scale is None or not (learned or teachers):
        return ()
    name, value = next(iter(learned.items()), ("", teachers or 1.0))
    with torch.no_grad():
        scale.fill_(math.log(value))
    whose = f"the objective '{name}' has it" if name else "the teacher's are"
    return (f"Cosines are multiplied by {value:.1f}, as {whose}.",)
