"""The table of objectives, what its terms are checked for, and how they are computed together."""

from __future__ import annotations

import io

import pytest
import torch
from sklearn.metrics import log_loss

from edgevlm.distillation.objectives import OBJECTIVES, make_objectives
from edgevlm.distillation.objectives.combined import load_objective
from edgevlm.distillation.recipe import Term, load_recipe, recipe_names
from edgevlm.errors import UsageError
from tests.distillation.steps import (
    CLASSES,
    DENSE,
    MASK,
    SAM,
    SIZES,
    TOKENS,
    N,
    make_step,
    objectives_of,
    outputs,
    random,
    value_of,
)


def sizes_for(*names):
    if {"prompts", "encoder"} & set(names):
        return SAM
    return DENSE if {"pixels"} & set(names) else SIZES


def decode(who, embeds, prompts):
    masks = random(N, 1, 2, 4, 4, seed=len(who)) + embeds.mean()
    return {"pred_masks": masks, "iou_scores": random(N, 1, 2)}


def step_for(*names, **more):
    prompts = {"input_points": torch.ones(N, 1, 1, 2), "input_labels": torch.ones(N, 1, 1)}
    sizes = sizes_for(*names)
    # A teacher that is sure of something.
    teacher = {name: 10 * value for name, value in outputs(sizes, seed=100).items()}
    return make_step(sizes=sizes, decode=decode, prompts=prompts, **{"teacher": teacher, **more})


# --- labels, the simplest objective -----------------------------------------------------------------------


def test_labels_are_a_cross_entropy():
    step = make_step()
    shares = step.student["logits"].detach().double().softmax(1).numpy()
    expected = log_loss(step.batch.labels.numpy(), shares, labels=range(CLASSES))
    assert value_of("labels", step).item() == pytest.approx(expected, rel=1e-5)


def test_pictures_without_a_label_count_for_nothing():
    labels = torch.tensor([1, -1, 2, -1, 0, 4])
    step = make_step(labels=labels)
    shares = step.student["logits"].detach().double().softmax(1).numpy()
    known = (labels >= 0).numpy()
    expected = log_loss(labels[labels >= 0].numpy(), shares[known], labels=range(CLASSES))
    assert value_of("labels", step).item() == pytest.approx(expected, rel=1e-5)
    none = make_step(labels=torch.full((N,), -1))
    assert value_of("labels", none).item() == 0


def test_smoothing_gives_every_class_a_share():
    step = make_step()
    scores = step.student["logits"].detach().double().log_softmax(1)
    target = torch.full((N, CLASSES), 0.2 / CLASSES, dtype=torch.float64)
    target[range(N), step.batch.labels] += 0.8
    expected = -(target * scores).sum() / N
    assert value_of("labels", step, smoothing=0.2).item() == pytest.approx(expected.item(), rel=1e-5)


# --- every objective --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_teaches(name):
    step = step_for(name)
    objectives = objectives_of(name, student=sizes_for(name))
    value = objectives(step)[name]
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.isfinite()
    value.backward()
    needs = objectives.student_needs
    assert all(step.student[need].grad.abs().sum() > 0 for need in needs)
    assert all(parameter.grad is not None for parameter in objectives.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_computed_in_float32(name):
    """Under autocast, with outputs in bfloat16, the value is that of the same numbers in float32."""
    step = step_for(name)
    low = {side: {k: v.detach().bfloat16() for k, v in getattr(step, side).items()} for side in ("student", "teacher")}
    high = {side: {k: v.float() for k, v in given.items()} for side, given in low.items()}
    objectives = objectives_of(name, student=sizes_for(name))
    expected = objectives(step_for(name, run=lambda batch: high["student"], **high))[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objectives(step_for(name, run=lambda batch: low["student"], **low))[name]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_student_runs_in_the_precision_outside():
    seen = []

    def run(batch):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return outputs(SIZES)

    objectives = objectives_of("masked-image")
    objectives(make_step(run=run))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objectives(make_step(run=run))
    assert seen[0][0] is False
    assert seen[1] == (True, torch.bfloat16)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_used_by_a_recipe(name):
    assert name in {term.objective for recipe in recipe_names() for term in load_recipe(recipe).terms}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_a_formula_and_a_source(name):
    objective = load_objective(name)
    assert objective.formula
    assert "arXiv:" in objective.source


def test_the_same_step_gives_the_same_values():
    names = [name for name in OBJECTIVES if sizes_for(name) is SIZES]
    objectives = objectives_of(*names)
    first, again = objectives(make_step()), objectives(make_step())
    assert {name: value.item() for name, value in first.items()} == {name: v.item() for name, v in again.items()}


# --- together ---------------------------------------------------------------------------------------------


def test_terms_are_told_apart_and_weighed():
    terms = (
        Term(objective="features", weight=2.0),
        Term(objective="labels"),
        Term(objective="features", weight=0.5, options={"output": "text_embeds"}),
    )
    objectives = make_objectives(terms, SIZES, SIZES, None, None)
    assert objectives.weights == {"features": 2.0, "labels": 1.0, "features#2": 0.5}
    assert objectives.student_needs == {"image_embeds", "text_embeds", "logits"}
    assert objectives.teacher_needs == {"image_embeds", "text_embeds"}
    assert objectives.batch_needs == {"labels"}
    step = make_step()
    values = objectives(step)
    assert list(values) == ["features", "labels", "features#2"]
    assert values["features#2"].item() == pytest.approx(value_of("features", step, output="text_embeds").item())


def test_pretraining_asks_no_teacher():
    objectives = make_objectives(load_recipe("pretrain").terms, SIZES, {}, TOKENS, MASK)
    assert objectives.teacher_needs == frozenset()


def test_heads_are_saved_and_loaded():
    terms = load_recipe("pretrain").terms
    first, second = (make_objectives(terms, SIZES, {}, TOKENS, MASK) for _ in range(2))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    values = [objectives(make_step()) for objectives in (first, second)]
    assert {k: v.item() for k, v in values[0].items()} == {k: v.item() for k, v in values[1].items()}


def test_only_what_is_needed_is_kept():
    objectives = objectives_of("labels")
    step = make_step({"logits": random(N, CLASSES), "image_embeds": object()})
    assert objectives(step)["labels"].isfinite()


# --- what is wrong ----------------------------------------------------------------------------------------


def fails(term, student=SIZES, teacher=SIZES):
    with pytest.raises(UsageError) as caught:
        make_objectives((Term(objective="labels"), term), student, teacher, TOKENS, MASK)
    assert caught.value.exit_code == 2
    return caught.value


def test_an_unknown_objective():
    error = fails(Term(objective="feature"))
    assert error.message == "Term 2 of the recipe names the objective 'feature', and none is called so."
    assert error.hint == "Did you mean 'features'?"


def test_an_unknown_option():
    error = fails(Term(objective="logits", options={"temprature": 2.0}))
    assert "options of term 2 ('logits')" in error.message
    assert error.hint == "Did you mean 'temperature'?"


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("logits", {"temperature": "hot"}),
        ("logits", {"temperature": 0.0}),
        ("logits", {"temperature": True}),
        ("masked-image", {"ratio": 1.5}),
        ("image-text-contrastive", {"scale": 101.0}),
        ("labels", {"smoothing": -0.1}),
    ],
)
def test_an_option_of_the_wrong_type_or_size(objective, options):
    error = fails(Term(objective=objective, options=options))
    assert f"options of term 2 ('{objective}')" in error.message
    assert next(iter(options)) in error.message


def test_a_word_that_an_option_does_not_know():
    error = fails(Term(objective="features", options={"distance": "cosin"}))
    assert error.hint == "Did you mean 'cosine'?"


def test_a_whole_number_is_a_number():
    assert objectives_of("logits", temperature=2)(make_step())["logits"].isfinite()


def test_who_lacks_what():
    error = fails(Term(objective="logits"), teacher={"image_embeds": (8,), "text_embeds": (8,)})
    assert error.message == (
        "Term 2 of the recipe ('logits') needs 'logits' of the teacher, which gives image_embeds, text_embeds."
    )
    assert (
        "needs 'image_embeds' of the student, which gives logits."
        in fails(Term(objective="features"), student={"logits": (CLASSES,)}).message
    )


def test_sparse_logits_are_logits():
    stored = {"logits.values": (2,), "logits.indices": (2,), "logits.rest": ()}
    objectives = make_objectives((Term(objective="logits"),), SIZES, stored, None, None)
    assert objectives.teacher_needs == {"logits"}
    teacher = {
        "logits.values": torch.ones(N, 2),
        "logits.indices": torch.tensor([[0, 1]]).expand(N, 2),
        "logits.rest": torch.zeros(N),
    }
    assert objectives(make_step(teacher=teacher))["logits"].isfinite()


@pytest.mark.parametrize(
    ("name", "field", "lacks"),
    [("labels", "labels", "labels"), ("affinity", "input_ids", "texts"), ("masked-language", "input_ids", "texts")],
)
def test_a_data_set_that_lacks_something(name, field, lacks):
    with pytest.raises(UsageError, match=f"'{name}' needs {lacks}, and the data set has none"):
        objectives_of(name)(make_step(**{field: None}))
