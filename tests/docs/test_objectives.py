"""The tables of docs/objectives.md say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from edgevlm.distillation.objectives import OBJECTIVES
from edgevlm.distillation.objectives.combined import load_objective
from edgevlm.distillation.objectives.objective import Objective
from edgevlm.distillation.recipe import Term, load_recipe, recipe_names

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")


def objective_row(name: str) -> str:
    objective = load_objective(name)
    return f"| `{name}` | {objective.formula} | {objective.source} | {needs_of(objective)} | {options_of(objective)} |"


def needs_of(objective: Objective) -> str:
    sides = (("student", objective.student), ("teacher", objective.teacher), ("data", objective.batch))
    return "; ".join(f"{who}: {', '.join(f'`{need}`' for need in needs)}" for who, needs in sides if needs)


def options_of(objective: Objective) -> str:
    fields = msgspec.structs.fields(objective.options())
    return ", ".join(f"`{field.name} = {shown(field.default)}`" for field in fields) or "none"


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower() if value in (True, False) else str(value)


def recipe_row(name: str) -> str:
    recipe = load_recipe(name)
    return f"| `{name}` | {recipe.description} | {', '.join(term_of(term) for term in recipe.terms)} |"


def term_of(term: Term) -> str:
    output = term.options.get("output")
    return f"{term.weight:g} `{term.objective}`" + (f" of `{output}`" if output else "")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_its_row(name):
    assert objective_row(name) in TEXT


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_its_row(name):
    assert recipe_row(name) in TEXT


def test_no_row_is_left_over():
    rows = re.findall(r"^\| `([a-z-]+)` \|", TEXT, re.MULTILINE)
    assert rows == [*OBJECTIVES, *recipe_names()]


def test_the_example_is_a_recipe(tmp_path):
    (example,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(example)
    assert {term.objective for term in load_recipe(str(path)).terms} <= set(OBJECTIVES)
