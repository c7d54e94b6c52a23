"""What the teacher sees, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_squared_error
from sklearn.metrics.pairwise import paired_cosine_distances

from edgevlm.errors import UsageError
from tests.distillation.steps import LENGTH, SAM, WIDTH, N, make_step, objectives_of, outputs, random, value_of

WIDE = {"image_embeds": (12,), "image_features": (10, 6, 6), "text_features": (LENGTH, 12)}


def arrays(step, name):
    return tuple(side[name].detach().numpy().astype(float) for side in (step.student, step.teacher))


def test_features_of_the_same_width_are_compared_as_they_are():
    step = make_step()
    objectives = objectives_of("features")
    assert not list(objectives.parameters())
    assert objectives.notes == ()
    mine, theirs = arrays(step, "image_embeds")
    assert objectives(step)["features"].item() == pytest.approx(mean_squared_error(theirs, mine), rel=1e-5)


def test_cosine():
    step = make_step()
    mine, theirs = arrays(step, "image_embeds")
    expected = paired_cosine_distances(mine, theirs).mean()
    assert value_of("features", step, distance="cosine").item() == pytest.approx(expected, rel=1e-5)


def test_another_width_is_projected_and_said():
    step = make_step(teacher=outputs(WIDE, seed=100))
    objectives = objectives_of("features", teacher=WIDE)
    weight, bias = (parameter.detach().numpy().astype(float) for parameter in objectives.parameters())
    mine, theirs = arrays(step, "image_embeds")
    projected = np.array([[weight[o] @ row + bias[o] for o in range(12)] for row in mine])
    assert objectives(step)["features"].item() == pytest.approx(mean_squared_error(theirs, projected), rel=1e-5)
    assert objectives.notes == (
        "image_embeds: the student has 8 numbers and the teacher 12; a linear projection was added, and is not part of "
        "the student",
    )


def test_maps_are_projected_at_each_place_and_resized():
    step = make_step(teacher=outputs(WIDE, seed=100))
    objectives = objectives_of("features", teacher=WIDE, output="image_features")
    weight, bias = (parameter.detach().numpy().astype(float) for parameter in objectives.parameters())
    assert weight.shape == (10, 4, 1, 1)
    mine, theirs = arrays(step, "image_features")
    projected = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0], mine) + bias[:, None, None]
    expected = ((resize(projected, 6) - theirs) ** 2).mean()
    assert objectives(step)["features"].item() == pytest.approx(expected, rel=1e-5)
    assert "a 1x1 convolution was added" in objectives.notes[0]


def resize(maps, size):
    """Bilinear, pixel middles aligned, edges repeated."""
    old = maps.shape[-1]
    at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
    low = np.minimum(at.astype(int), old - 2)
    share = at - low
    rows = maps[..., low, :] * (1 - share)[:, None] + maps[..., low + 1, :] * share[:, None]
    return rows[..., low] * (1 - share) + rows[..., low + 1] * share


def test_padding_of_texts_counts_for_nothing():
    mask = torch.ones(N, LENGTH, dtype=torch.int64)
    mask[:, 4:] = 0
    step = make_step(attention_mask=mask)
    mine, theirs = arrays(step, "text_features")
    expected = ((mine - theirs) ** 2)[:, :4].mean()
    assert value_of("features", step, output="text_features").item() == pytest.approx(expected, rel=1e-5)


def test_a_vector_is_not_compared_with_a_map():
    with pytest.raises(UsageError, match=r"Term 1 .*'image_embeds' has the shape \(8,\) .* \(4, 3, 3\)"):
        objectives_of("features", teacher=SAM)


def test_the_projection_learns():
    torch.manual_seed(0)
    truth = torch.nn.Linear(WIDTH, 12)
    mine = random(64, WIDTH)
    step = make_step({"image_embeds": mine}, {"image_embeds": truth(mine).detach()}, n=64)
    objectives = objectives_of("features", teacher=WIDE)
    optimizer = torch.optim.Adam(objectives.parameters(), lr=0.05)
    first = objectives(step)["features"].item()
    for _ in range(200):
        optimizer.zero_grad()
        objectives(step)["features"].backward()
        optimizer.step()
    assert objectives(step)["features"].item() < first / 1000


def test_encoder():
    step = make_step(sizes=SAM)
    mine, theirs = arrays(step, "image_embeds")
    expected = mean_squared_error(theirs.reshape(N, -1), mine.reshape(N, -1))
    assert value_of("encoder", step, student=SAM).item() == pytest.approx(expected, rel=1e-5)


def test_an_encoder_must_give_what_the_decoder_takes():
    with pytest.raises(UsageError, match="the same shape in 'image_embeds'"):
        objectives_of("encoder", student=SAM, teacher={"image_embeds": (4, 6, 6)})
