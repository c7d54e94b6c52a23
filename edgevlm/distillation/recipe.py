"""How a student is taught, as a value; read from TOML, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edgevlm.data_files import read_toml
from edgevlm.errors import UsageError, did_you_mean
from edgevlm.families import CLASSIFY, FEATURES, MASKS, ZERO_SHOT
from edgevlm.runtime.spec import Spec

DEFAULT_RECIPES = {CLASSIFY: "logits", ZERO_SHOT: "clip-reinforced", FEATURES: "features", MASKS: "mobilesam"}
"""By the teacher's task."""

_RECIPES = Path(__file__).parent / "recipes"

Option = bool | int | float | str


class Term(Spec, frozen=True, kw_only=True):
    """One objective in the loss.

    Args:
        objective: a name in ``edgevlm.distillation.objectives.OBJECTIVES``.
        weight: what its value is multiplied by.
        options: its keyword arguments.
    """

    objective: str
    weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    options: dict[str, Option] = {}


class Recipe(Spec, frozen=True, kw_only=True):
    """A training from the first step to the last.

    Args:
        name: as in ``--recipe``; a file's stem.
        sources: the papers that it follows.
        terms: the loss is their weighed sum.
        learning_rate: at its highest; it warms up over ``warmup_share`` of the steps and falls along a half cosine.
        batch_size: over all processes, for one step of the optimizer.
        n_accumulated: in so many parts each process takes its share of a batch.
        average: of the exponential moving average of the weights, which then is the student; 0 keeps none.
        precision: what the student's forward pass computes in; ``fp16`` needs a GPU.
        augmentation: what is done to a picture before teacher and student see it, drawn from (data_seed, picture,
            variant).
        n_variants: so many augmented versions of each picture are drawn; later epochs see them again. What a teacher
            says of each is computed once.
        top_k: of stored logits; 0 keeps all.
        inherits: start from the teacher's layers where the student's have the same shape.
        frozen: parts of the student that do not learn, by their names in the module: those that it has of its teacher.
        patience: without a better metric over so many checkpoints the training stops; 0 goes on to the end.
        seed: of the student's first weights, the order of the pictures and what is drawn in a step.
        data_seed: of crops, flips and prompts, and of which pictures a short training sees. What a teacher says follows
            from it, so students of several ``seed`` learn from the same stored outputs.
    """

    name: str
    description: str = ""
    sources: dict[str, str] = {}
    terms: Annotated[tuple[Term, ...], msgspec.Meta(min_length=1)]
    n_steps: Annotated[int, msgspec.Meta(ge=1)] = 1000
    batch_size: Annotated[int, msgspec.Meta(ge=1)] = 64
    n_accumulated: Annotated[int, msgspec.Meta(ge=1)] = 1
    learning_rate: Annotated[float, msgspec.Meta(gt=0)] = 1e-3
    warmup_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.05
    clip_norm: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    average: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    augmentation: Literal["none", "flip", "crop-flip"] = "crop-flip"
    n_variants: Annotated[int, msgspec.Meta(ge=1)] = 1
    top_k: Annotated[int, msgspec.Meta(ge=0)] = 0
    inherits: bool = False
    frozen: tuple[str, ...] = ()
    checkpoint_every: Annotated[int, msgspec.Meta(ge=1)] = 100
    patience: Annotated[int, msgspec.Meta(ge=0)] = 0
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    data_seed: Annotated[int, msgspec.Meta(ge=0)] = 0


def load_recipe(name_or_path: str) -> Recipe:
    """The built-in recipe called so, or the one in a TOML file.

    Raises: UsageError: there is no such recipe, or its file is wrong.
    """
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        path = Path(name_or_path)
    elif name_or_path in recipe_names():
        path = _RECIPES / f"{name_or_path}.toml"
    else:
        raise UsageError(
            f"There is no recipe '{name_or_path}'.",
            hint=did_you_mean(name_or_path, recipe_names()) + " A path to a TOML file works too.",
        )
    recipe = read_toml(path, Recipe, what="recipe")
    if recipe.name != path.stem:
        raise UsageError(
            f"The recipe '{path}' calls itself '{recipe.name}', but its file name says '{path.stem}'.",
            hint=f'Set name = "{path.stem}" or rename the file.',
        )
    return recipe


def recipe_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in _RECIPES.glob("*.toml")))
