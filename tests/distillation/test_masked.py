"""Hidden patches and hidden tokens, against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from edgevlm.errors import UsageError
from tests.distillation.steps import LENGTH, MASK, SIZES, TOKENS, WIDTH, N, make_step, objectives_of, random, tokens


class Student:
    """Gives what it is told to, and keeps what it saw."""

    def __init__(self, **gives):
        self.gives = gives
        self.saw = None

    def __call__(self, batch):
        self.saw = batch
        return self.gives


# --- pictures ---------------------------------------------------------------------------------------------


def test_masked_image_is_the_l1_of_hidden_pixels():
    student = Student(image_features=random(N, 4, 3, 3))
    step = make_step(run=student)
    objectives = objectives_of("masked-image", detail=2)
    weight, bias = (parameter.detach().numpy().astype(float) for parameter in objectives.parameters())
    found = objectives(step)["masked-image"].item()
    pictures, seen = step.batch.pixel_values.numpy(), student.saw.pixel_values.numpy()
    features = student.gives["image_features"].numpy().astype(float)
    total, n_hidden = 0.0, 0
    for n in range(N):
        for cell in np.ndindex(3, 3):
            # A cell stands for 4 pixels of 12, and predicts 2 across.
            y, x = 4 * cell[0], 4 * cell[1]
            here, shown = (each[n, :, y : y + 4, x : x + 4] for each in (pictures, seen))
            if np.array_equal(here, shown):
                continue
            np.testing.assert_allclose(shown, np.broadcast_to(pictures[n].mean((1, 2))[:, None, None], (3, 4, 4)), 1e-4)
            n_hidden += 1
            guess = weight[:, :, 0, 0] @ features[n, :, cell[0], cell[1]] + bias
            target = here.reshape(3, 2, 2, 2, 2).mean((2, 4)).ravel()
            total += np.abs(guess - target).sum()
    assert n_hidden == N * round(0.6 * 9)
    assert found == pytest.approx(total / (n_hidden * 3 * 4), rel=1e-4)


def test_patches_may_be_several_cells_wide():
    student = Student(image_features=random(N, 4, 3, 3))
    step = make_step(run=student)
    objectives_of("masked-image", cells=2, ratio=0.25)(step)
    for picture, seen in zip(step.batch.pixel_values, student.saw.pixel_values, strict=True):
        hidden = (picture != seen).any(0)[::4, ::4]
        # 3 cells are a patch of two and a half one, in each direction.
        blocks = [hidden[:2, :2], hidden[:2, 2:], hidden[2:, :2], hidden[2:, 2:]]
        assert sorted(bool(block.all()) for block in blocks) == [False, False, False, True]
        assert sum(bool(block.any()) for block in blocks) == 1


def test_the_same_generator_hides_the_same():
    saw = []
    for seed in (1, 1, 2):
        student = Student(image_features=random(N, 4, 3, 3))
        objectives_of("masked-image")(make_step(run=student, seed=seed))
        saw.append(student.saw.pixel_values)
    assert torch.equal(saw[0], saw[1])
    assert not torch.equal(saw[0], saw[2])


def test_a_picture_can_be_learned():
    """One cell's features hold the mean colour: the head finds it."""
    colours = random(64, 3, 1, 1)
    step = make_step(
        n=64,
        pixel_values=colours.expand(64, 3, 12, 12),
        run=lambda batch: {"image_features": colours.expand(64, 3, 3, 3)},
    )
    objectives = objectives_of("masked-image", student={**SIZES, "image_features": (3, 3, 3)})
    optimizer = torch.optim.Adam(objectives.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        loss = objectives(step)["masked-image"]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.03


# --- texts ------------------------------------------------------------------------------------------------


def test_masked_language_is_the_cross_entropy_of_hidden_tokens():
    student = Student(text_features=random(N, LENGTH, WIDTH))
    step = make_step(run=student)
    objectives = objectives_of("masked-language", ratio=0.4)
    weight, bias = (parameter.detach().numpy().astype(float) for parameter in objectives.parameters())
    (head,) = objectives.heads.values()
    chosen = head.choose(make_step(), step.batch.input_ids)
    # Two of the five between the ends of each text.
    assert chosen.sum(1).tolist() == [2] * N
    total = 0.0
    for text, place in chosen.nonzero().tolist():
        scores = weight @ student.gives["text_features"][text, place].numpy().astype(float) + bias
        total -= log_softmax(scores)[step.batch.input_ids[text, place]]
    assert objectives(step)["masked-language"].item() == pytest.approx(total / chosen.sum().item(), rel=1e-5)


def many(n, seed=5):
    mask = torch.ones(n, 20, dtype=torch.int64)
    mask[: n // 2, 12:] = 0
    mask[n // 2 :, :5] = 0
    student = Student(text_features=torch.zeros(n, 20, WIDTH))
    step = make_step(n=n, input_ids=tokens(n, 20), attention_mask=mask, text_index=None, run=student, seed=seed)
    return step, student, mask


def test_neither_ends_nor_padding_are_hidden():
    step, student, mask = many(2000)
    objectives_of("masked-language")(step)
    changed = student.saw.input_ids != step.batch.input_ids
    inside = mask.clone()
    inside[:1000, [0, 11]] = 0
    inside[1000:, [5, 19]] = 0
    assert changed.any(0).sum() > 15
    assert not (changed & (inside == 0)).any()


def test_hidden_tokens_are_masked_replaced_or_left_as_in_bert():
    step, student, _ = many(2000)
    objectives = objectives_of("masked-language")
    (head,) = objectives.heads.values()
    chosen = head.choose(many(2000)[0], step.batch.input_ids)
    # 15 % of 10 and of 13 tokens, in whole numbers.
    assert set(chosen.sum(1).tolist()) == {2}
    objectives(step)
    saw, said = student.saw.input_ids[chosen], step.batch.input_ids[chosen]
    assert torch.equal(student.saw.input_ids[~chosen], step.batch.input_ids[~chosen])
    n = len(said)
    # Four standard errors. Of the replaced ones, one in the number of tokens is the mask, and one the token itself.
    near = 4 * math.sqrt(0.25 / n)
    assert (saw == MASK).float().mean().item() == pytest.approx(0.8 + 0.1 / TOKENS, abs=near)
    assert (saw == said).float().mean().item() == pytest.approx(0.1 + 0.1 / TOKENS, abs=near)
    others = saw[(saw != MASK) & (saw != said)]
    assert len(others.unique()) > 30


def test_texts_of_two_tokens_hide_nothing():
    student = Student(text_features=random(N, 2, WIDTH).requires_grad_())
    step = make_step(input_ids=tokens(N, 2), attention_mask=None, run=student)
    loss = objectives_of("masked-language")(step)["masked-language"]
    loss.backward()
    assert loss.item() == 0


def test_without_a_mask_token_any_token_hides_another():
    step, student, _ = many(2000)
    objectives = objectives_of("masked-language", mask_token=None)
    assert objectives.notes == ("masked-language: the tokenizer has no mask token; hidden tokens become any other",)
    (head,) = objectives.heads.values()
    chosen = head.choose(many(2000)[0], step.batch.input_ids)
    objectives(step)
    saw, said = student.saw.input_ids[chosen], step.batch.input_ids[chosen]
    near = 4 * math.sqrt(0.25 / len(said))
    assert (saw == said).float().mean().item() == pytest.approx(0.2 + 0.8 / TOKENS, abs=near)
    # One in as many as there are.
    counts = torch.bincount(saw[saw != said], minlength=TOKENS)
    assert counts.min() > 0
    assert counts.max() < 2.5 * counts.float().mean()


def test_hiding_tokens_needs_a_tokenizer():
    with pytest.raises(UsageError, match=r"Term 1 of the recipe \('masked-language'\): .* the student has none"):
        objectives_of("masked-language", n_tokens=None, mask_token=None)
