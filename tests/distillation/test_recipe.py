"""Recipes: the built-in ones, and files that say something that no recipe says."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from edgevlm.distillation.objectives import make_objectives
from edgevlm.distillation.recipe import load_recipe, recipe_names
from edgevlm.errors import UsageError
from tests.distillation.steps import DENSE, MASK, SAM, SIZES, TOKENS

GIVEN = {"mobilesam": SAM, "edgesam": SAM, "segmenter": DENSE}


def test_the_built_in_recipes():
    assert recipe_names() == (
        "clip-affinity",
        "clip-reinforced",
        "edgesam",
        "features",
        "labels",
        "logits",
        "mobilesam",
        "pretrain",
        "segmenter",
    )


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_whole(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description.endswith(".")
    assert recipe.sources
    assert all(url.startswith("https://") for url in recipe.sources.values())
    sizes = GIVEN.get(name, SIZES)
    objectives = make_objectives(recipe.terms, sizes, sizes, TOKENS, MASK)
    assert sum(objectives.weights.values()) > 0
    # A share of a batch is a whole number of pictures.
    assert recipe.batch_size % recipe.n_accumulated == 0
    assert recipe.checkpoint_every < recipe.n_steps


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_read_can_be_written_and_read(name):
    recipe = load_recipe(name)
    assert msgspec.json.decode(msgspec.json.encode(recipe), type=type(recipe)) == recipe


def test_a_name_that_no_recipe_has():
    with pytest.raises(UsageError, match="There is no recipe 'mobile-sam'") as caught:
        load_recipe("mobile-sam")
    assert caught.value.hint == "Did you mean 'mobilesam'? A path to a TOML file works too."


def test_a_recipe_may_be_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nn_steps = 5\n[[terms]]\nobjective = "labels"\n')
    recipe = load_recipe(str(path))
    assert recipe.n_steps == 5
    assert recipe.terms[0].weight == 1


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('name = "mine"\nterms = []', "is wrong", ""),
        ('name = "mine"\nn_step = 5\n[[terms]]\nobjective = "labels"', "unknown field `n_step`", "'n_steps'"),
        ('name = "mine"\n[[terms]]\nobjective = "labels"\nwieght = 1', "unknown field `wieght`", "'weight'"),
        ('name = "mine"\n[[terms]]\nobjective = "labels"\nweight = -1', "weight", ""),
        ('name = "yours"\n[[terms]]\nobjective = "labels"', "calls itself 'yours'", 'name = "mine"'),
        ('name = "mine"\nprecision = "fp61"\n[[terms]]\nobjective = "labels"', "fp61", "'fp16'"),
        ("name = ", "is not TOML", ""),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, message, hint):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(str(path))
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"cannot be read"):
        load_recipe(str(tmp_path / "none.toml"))


def test_recipes_are_read_without_torch():
    code = (
        "import sys, edgevlm.distillation.objectives\n"
        "from edgevlm.distillation.recipe import load_recipe\n"
        "load_recipe('edgesam')\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
