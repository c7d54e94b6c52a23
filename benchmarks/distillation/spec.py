"""Studies, and what came of them."""

from __future__ import annotations

from edgevlm.distillation.recipe import Recipe
from edgevlm.distillation.students.facts import StudentBesideTeacher
from edgevlm.runtime.spec import Spec


class Arm(Spec, frozen=True, kw_only=True):
    """What a student learns from.

    Args: after: the arm whose student, of the same seed, it goes on with; empty where it starts untrained.
    """

    name: str
    recipe: Recipe
    after: str = ""


class Study(Spec, frozen=True, kw_only=True):
    """Arms that differ in nothing but the recipe.

    Args:
        data, unseen: to train on and to judge on, as ``read_data_set`` takes them.
        image_size: of the student's pictures; the teacher's where null.
        n_unseen: of generated pictures.
    """

    key: str
    title: str
    teacher: str
    student: str
    data: str
    unseen: str
    image_size: int | None
    arms: tuple[Arm, ...]
    n_unseen: int = 1000


class Run(Spec, frozen=True, kw_only=True):
    """A trained student, judged.

    Args: n_steps: with those of the arm that it went on from.
    """

    arm: str
    seed: int
    n_steps: int
    n_parameters: int
    n_bytes: int
    metrics: dict[str, float]


class StudyResult(Spec, frozen=True, kw_only=True):
    """A study as far as it got.

    Args:
        teacher: its metrics on the same pictures; ``teacher_digest`` is of its weights, configuration and processing.
        facts: both before any training, with latencies on ``machine``; null until every run ended.
    """

    schema_version: int = 1
    study: Study
    made_at: str
    n_unseen: int
    teacher: dict[str, float]
    teacher_digest: str
    teacher_n_parameters: int
    teacher_n_bytes: int
    facts: StudentBesideTeacher | None
    machine: str
    runs: tuple[Run, ...]
    versions: dict[str, str]
