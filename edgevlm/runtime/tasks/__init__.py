"""What a model is for. One file per task, one line here.

A task says which components it needs, runs them, and turns what they give into a typed result. The compile side
evaluates with the same code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from edgevlm.errors import BundleError, UsageError, did_you_mean
from edgevlm.runtime.backends import Session
from edgevlm.runtime.image import Size
from edgevlm.runtime.spec import Array, CenterCrop, ImageProcessing, Processing, Prompt, Scoring

TASKS: dict[str, str] = {
    "image-classification": "edgevlm.runtime.tasks.image_classification:ImageClassification",
    "image-feature-extraction": "edgevlm.runtime.tasks.image_feature_extraction:ImageFeatureExtraction",
    "mask-generation": "edgevlm.runtime.tasks.mask_generation:MaskGeneration",
    "object-detection": "edgevlm.runtime.tasks.object_detection:ObjectDetection",
    "semantic-segmentation": "edgevlm.runtime.tasks.semantic_segmentation:SemanticSegmentation",
    "zero-shot-image-classification": (
        "edgevlm.runtime.tasks.zero_shot_image_classification:ZeroShotImageClassification"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Need:
    """A component of a task.

    Args:
        component: its name.
        inputs: what it is fed, by name; ``pixel_values`` stands for the image processing's ``input_name``.
        outputs: it gives at least one of these, best first.
        is_optional: it may be missing where the task has a substitute.
    """

    component: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    is_optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a task is made of.

    Args:
        sessions: by component name; looked up when needed.
        file: the local path of a file that ``processing`` or ``scoring`` names.
    """

    sessions: Mapping[str, Session]
    processing: Processing
    labels: tuple[str, ...]
    scoring: Scoring | None
    file: Callable[[str], Path]


class Result(Protocol):
    """An answer for one picture: a frozen ``Spec``, so ``edgevlm.runtime.spec.to_json`` writes it."""

    def to_text(self) -> str:
        """For people, without a line feed at the end."""
        ...

    def is_same_answer(self, other: Any, *, tolerance: float) -> bool:
        """Whether ``other`` decides the same; what lies within ``tolerance`` of each other counts as a tie."""
        ...


class Task(Protocol):
    """Everything that is done between a graph's input and the answer."""

    needs: ClassVar[tuple[Need, ...]]
    result_type: ClassVar[type[Result]]

    def __init__(self, parts: Parts) -> None: ...

    @classmethod
    def check(cls, components: frozenset[str], processing: Processing, scoring: Scoring | None) -> None:
        """Refuse what the task cannot work with, before anything is opened.

        Raises: BundleError: with what is missing.
        """
        ...

    def outputs(self, pixel_values: Array) -> dict[str, Array]:
        """What the image graph gives, by output name, float32 [n, 3, height, width] in."""
        ...

    def results(
        self,
        outputs: Mapping[str, Array],
        *,
        labels: tuple[str, ...] | None,
        top_k: int | None,
        sizes: Sequence[Size] | None,
    ) -> tuple[Result, ...]:
        """One answer per row of ``outputs``.

        Args:
            top_k: how much an answer names at most; None leaves it to the task.
            sizes: of the pictures as they came, for answers that say where something is; where None, such an answer is
                in the pixels of the graph's input.
        Raises: UsageError: the labels cannot be used.
        """
        ...


@runtime_checkable
class Prompted(Protocol):
    """A task whose answer says something of the things that points and boxes show."""

    def prompted_results(
        self, outputs: Mapping[str, Array], *, prompts: Sequence[Sequence[Prompt]], sizes: Sequence[Size] | None
    ) -> tuple[Result, ...]:
        """One answer per row of ``outputs``, about all of that row's prompts.

        Args:   prompts: of each row, in the pixels that ``sizes`` are of.
        Raises: UsageError: a prompt cannot be used.
        """
        ...


def load_task(name: str) -> type[Task]:
    """The task called ``name``.

    Raises: UsageError: nothing is called so.
    """
    if name not in TASKS:
        raise UsageError(f"There is no task '{name}'.", hint=did_you_mean(name, TASKS))
    module, _, attribute = TASKS[name].partition(":")
    task: type[Task] = getattr(importlib.import_module(module), attribute)
    return task


def check_needs(needs: tuple[Need, ...], components: frozenset[str]) -> None:
    """Raises: BundleError: a component that the task must have is missing."""
    missing = [need.component for need in needs if not need.is_optional and need.component not in components]
    if missing:
        raise BundleError(
            f"The task needs the component '{missing[0]}', but there is {', '.join(sorted(components)) or 'none'}.",
            hint="Compile the model again.",
        )


def check_whole_picture(processing: ImageProcessing) -> None:
    """Raises: BundleError: what lies at the picture's edges never reaches a graph that is to say where things are."""
    if any(isinstance(step, CenterCrop) for step in processing.steps):
        raise BundleError(
            "The picture is cropped, so nothing could be found at its edges.",
            hint='Use resize = "letterbox" or "stretch" in the model\'s card.',
        )


def refuse_labels(labels: tuple[str, ...] | None) -> None:
    """Raises: UsageError: a model that knows its own classes was asked for others."""
    if labels is not None:
        raise UsageError("This model has its own labels; it cannot be asked for others.", hint="Leave the labels out.")


def class_labels(labels: tuple[str, ...], n_classes: int) -> tuple[str, ...]:
    """The classes' names; their numbers where they have none.

    Raises: BundleError: there are more or fewer names than the graph tells classes apart.
    """
    if labels and len(labels) != n_classes:
        raise BundleError(
            f"The graph tells {n_classes} classes apart, but there are {len(labels)} labels.",
            hint="Give one label for each class.",
        )
    return labels or tuple(map(str, range(n_classes)))
