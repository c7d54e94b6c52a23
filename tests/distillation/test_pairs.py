"""Pictures and their texts, against scikit-learn, SciPy and loops over the definition of each paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics import log_loss
from sklearn.metrics.pairwise import cosine_similarity

from edgevlm.distillation.objectives.contrastive import alter
from edgevlm.distillation.objectives.matching import draw_wrong
from edgevlm.distillation.objectives.texts import text_keys
from tests.distillation.steps import (
    LENGTH,
    SIZES,
    WIDTH,
    N,
    make_step,
    objectives_of,
    outputs,
    random,
    tokens,
    value_of,
)


def cosines(side, step):
    images, texts = (side[name].detach().numpy().astype(float) for name in ("image_embeds", "text_embeds"))
    return cosine_similarity(images, texts[step.batch.text_index.numpy()])


# --- affinity ---------------------------------------------------------------------------------------------


def test_affinity_is_a_divergence_both_ways():
    step = make_step()
    mine, theirs = 20 * cosines(step.student, step), 50 * cosines(step.teacher, step)
    rows = [entropy(softmax(t), softmax(s)) for s, t in zip(mine, theirs, strict=True)]
    columns = [entropy(softmax(t), softmax(s)) for s, t in zip(mine.T, theirs.T, strict=True)]
    expected = (np.mean(rows) + np.mean(columns)) / 2
    found = value_of("affinity", step, scale=50.0, student_scale=20.0)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_affinity_has_the_gradient_of_tinyclips_cross_entropy():
    step = make_step()
    images = step.student["image_embeds"]
    value_of("affinity", step, scale=10.0, student_scale=10.0).backward()
    found, images.grad = images.grad, None
    units = {
        name: torch.nn.functional.normalize(side[key], dim=1)
        for name, side, key in (
            ("si", step.student, "image_embeds"), ("st", step.student, "text_embeds"),
            ("ti", step.teacher, "image_embeds"), ("tt", step.teacher, "text_embeds"),
        )
    }  # fmt: skip
    mine, theirs = 10 * units["si"] @ units["st"].T, 10 * units["ti"] @ units["tt"].T
    for scores, target in ((mine, theirs), (mine.T, theirs.T)):
        (-(target.softmax(1) * scores.log_softmax(1)).sum(1).mean() / 2).backward(retain_graph=True)
    torch.testing.assert_close(found, images.grad, rtol=1e-3, atol=1e-6)


# --- image-text contrastive -------------------------------------------------------------------------------


def test_image_text_contrastive_is_clips():
    step = make_step()
    scores = 10 * cosines(step.student, step)
    expected = (log_loss(range(N), softmax(scores, axis=1)) + log_loss(range(N), softmax(scores.T, axis=1))) / 2
    found = value_of("image-text-contrastive", step, scale=10.0, is_learned=False)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_same_text_is_never_held_against_a_picture():
    ids = tokens()
    index = torch.tensor([0, 1, 2, 0, 1, 0])
    step = make_step(input_ids=ids[:3], attention_mask=None, text_index=index)
    expected = unicl(10 * cosines(step.student, step), index.tolist())
    found = value_of("image-text-contrastive", step, scale=10.0, is_learned=False)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def unicl(scores, labels):
    """Yang et al. 2022, equations 3 and 4, as they stand."""
    total = 0.0
    for table in (scores, scores.T):
        for i, row in enumerate(table):
            positives = [k for k, label in enumerate(labels) if label == labels[i]]
            norm = math.log(sum(math.exp(score) for score in row))
            total -= sum(row[k] - norm for k in positives) / len(positives) / len(table)
    return total / 2


def test_image_text_label_contrastive_is_unicls():
    labels = [0, 1, 0, 2, 1, 0]
    step = make_step(labels=torch.tensor(labels))
    expected = unicl(10 * cosines(step.student, step), labels)
    found = value_of("image-text-label-contrastive", step, scale=10.0, is_learned=False)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_an_unknown_label_is_a_label_of_its_own():
    step = make_step(labels=torch.full((N,), -1))
    one = value_of("image-text-label-contrastive", step)
    assert one.item() == pytest.approx(value_of("image-text-contrastive", step).item(), rel=1e-6)
    none = value_of("image-text-label-contrastive", make_step(labels=None))
    assert none.item() == pytest.approx(one.item(), rel=1e-6)


def test_texts_are_known_by_their_tokens_however_they_are_padded():
    ids = tokens(3)
    ids[1] = ids[0]
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    padded = torch.cat((torch.zeros_like(ids), ids), dim=1)
    left = torch.cat((torch.zeros_like(mask), mask), dim=1)
    keys = text_keys(make_step(n=3, input_ids=ids, attention_mask=mask, text_index=None))
    again = text_keys(make_step(n=3, input_ids=padded, attention_mask=left, text_index=None))
    assert torch.equal(keys, again)
    assert keys[0] == keys[1] != keys[2]
    other = ids.clone()
    other[:, [0, 1]] = other[:, [1, 0]]
    assert not (text_keys(make_step(n=3, input_ids=other, attention_mask=mask, text_index=None)) == keys).any()


def test_the_scale_is_learned_and_held_at_100():
    step = make_step()
    objectives = objectives_of("image-text-contrastive")
    assert objectives.scales() == {"image-text-contrastive": pytest.approx(1 / 0.07)}
    (log,) = objectives.parameters()
    with torch.no_grad():
        log.fill_(9.0)
    objectives(step)["image-text-contrastive"].backward()
    assert log.grad.abs() > 0
    assert objectives.scales() == {"image-text-contrastive": pytest.approx(100)}


def test_a_given_scale_is_not_learned():
    objectives = objectives_of("image-text-contrastive", is_learned=False, scale=50.0)
    assert [parameter.requires_grad for parameter in objectives.parameters()] == [False]


# --- in several processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["affinity", "image-text-contrastive", "image-text-label-contrastive", "image-contrastive"]
)
def test_two_processes_see_one_batch(name):
    """The value, and the gradient of each process's rows, are those of one process with all of them."""
    ids, labels = tokens(2 * N), torch.arange(2 * N) % 3
    ids[N] = ids[0]
    student = {key: value.detach() for key, value in outputs(SIZES, n=2 * N).items()}
    teacher = outputs(SIZES, n=2 * N, seed=100)
    second = {"image_embeds": random(2 * N, WIDTH, seed=50)}
    objectives = objectives_of(name)

    def part(rows, gather):
        mine = {key: value[rows].clone().requires_grad_() for key, value in student.items()}
        return mine, make_step(
            mine,
            {key: value[rows] for key, value in teacher.items()},
            n=len(mine["logits"]),
            run=lambda batch: {key: value[rows] for key, value in second.items()},
            gather=gather,
            input_ids=ids[rows],
            attention_mask=None,
            labels=labels[rows],
        )

    whole, step = part(slice(None), lambda rows: rows)
    objectives(step)[name].backward()
    for mine, others in ((slice(0, N), slice(N, None)), (slice(N, None), slice(0, N))):
        sent = []
        _, step = part(others, lambda rows, sent=sent: sent.append(rows.detach()) or rows)
        objectives(step)
        is_first = mine.start == 0

        def gather(rows, sent=sent, is_first=is_first):
            other = sent.pop(0)
            return torch.cat((rows, other) if is_first else (other, rows))

        leaves, step = part(mine, gather)
        value = objectives(step)[name]
        value.backward()
        torch.testing.assert_close(leaves["image_embeds"].grad, whole["image_embeds"].grad[mine], rtol=1e-4, atol=1e-6)
        assert not sent


# --- image contrastive ------------------------------------------------------------------------------------


def test_image_contrastive_is_simclrs():
    other = {"image_embeds": random(N, WIDTH, seed=9)}
    step = make_step(run=lambda batch: other)
    objectives = objectives_of("image-contrastive", temperature=0.5)
    w1, b1, w2, b2 = (parameter.detach().numpy().astype(float) for parameter in objectives.parameters())
    views = np.concatenate([step.student["image_embeds"].detach().numpy(), other["image_embeds"].numpy()]).astype(float)
    projected = np.maximum(views @ w1.T + b1, 0) @ w2.T + b2
    scores = cosine_similarity(projected) / 0.5
    total = 0.0
    for i in range(2 * N):
        # SimCLR, equation 1: the sum leaves the view itself out.
        norm = sum(math.exp(scores[i, k]) for k in range(2 * N) if k != i)
        total -= math.log(math.exp(scores[i, (i + N) % (2 * N)]) / norm)
    assert objectives(step)["image-contrastive"].item() == pytest.approx(total / (2 * N), rel=1e-4)


def test_the_other_view_is_what_the_student_sees():
    seen = []

    def run(batch):
        seen.append(batch)
        return {"image_embeds": random(N, WIDTH)}

    step = make_step(run=run)
    value_of("image-contrastive", step)
    assert seen[0].pixel_values.shape == step.batch.pixel_values.shape
    assert not torch.equal(seen[0].pixel_values, step.batch.pixel_values)
    assert seen[0].input_ids is step.batch.input_ids


def test_a_view_is_a_crop_of_enough_area_mirrored_half_of_the_time():
    # A picture whose pixels say where they are: channel 0 from left to right, channel 1 from top to bottom.
    n, size = 400, 32
    middles = (torch.arange(size) + 0.5) / size
    picture = torch.stack((middles.expand(size, size), middles[:, None].expand(size, size), torch.zeros(size, size)))
    step = make_step(n=n, pixel_values=picture.expand(n, 3, size, size))
    views = alter(step, 0.3).double()
    # Away from the edge, where a crop of a ramp is a ramp.
    width = (views[:, 0, 16, 20] - views[:, 0, 16, 12]) * size / 8
    height = (views[:, 1, 20, 16] - views[:, 1, 12, 16]) * size / 8
    area, ratio = (width * height).abs(), (width / height).abs()
    assert 0.3 - 1e-3 <= area.min() < 0.35
    assert 0.9 < area.max() <= 1 + 1e-3
    assert 3 / 4 - 0.01 <= ratio.min() < 0.8
    assert 1.25 < ratio.max() <= 4 / 3 + 0.01
    assert (height > 0).all()
    assert 0.4 < (width < 0).double().mean() < 0.6
    centre = (views[:, 0, 16, 16] + views[:, 0, 16, 15]) / 2
    assert ((centre - width.abs() / 2 > -1e-3) & (centre + width.abs() / 2 < 1 + 1e-3)).all()
    assert centre.std() > 0.05


def test_the_same_generator_draws_the_same_view():
    first, again, other = (alter(make_step(seed=seed), 0.2) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- matching ---------------------------------------------------------------------------------------------


def test_matching_is_a_cross_entropy_over_pairs_and_drawn_wrong_ones():
    ids = tokens()
    ids[1] = ids[0]
    step = make_step(input_ids=ids)
    objectives = objectives_of("image-text-matching", width=16)
    w1, b1, w2, b2 = (parameter.detach().double() for parameter in objectives.parameters())
    images, texts = (
        torch.nn.functional.normalize(step.student[name].detach(), dim=1).double()
        for name in ("image_embeds", "text_embeds")
    )
    same = (ids[:, None] == ids).all(2)
    scores = (images @ texts.T / 0.07).float()
    like = make_step(input_ids=ids)
    wrong_text, wrong_image = draw_wrong(like, scores, ~same), draw_wrong(like, scores.T, ~same)
    rows, answers = [], []
    for i in range(N):
        for image, text, answer in ((i, i, 1), (i, wrong_text[i], 0), (wrong_image[i], i, 0)):
            assert answer or not same[image, text]
            seen = torch.cat((images[image], texts[text], images[image] * texts[text]))
            rows.append((w2 @ torch.nn.functional.gelu(w1 @ seen + b1) + b2).numpy())
            answers.append(answer)
    expected = log_loss(answers, softmax(np.array(rows), axis=1))
    assert objectives(step)["image-text-matching"].item() == pytest.approx(expected, rel=1e-5)


def test_the_nearer_the_oftener_drawn():
    n = 4000
    scores = torch.tensor([2.0, 0.0, 1.0, 9.0]).expand(n, 4)
    wrong = torch.tensor([True, True, True, False]).expand(n, 4)
    shares = np.bincount(draw_wrong(make_step(), scores, wrong).numpy(), minlength=4) / n
    # Four standard errors of a share of one half.
    np.testing.assert_allclose(shares[:3], softmax([2.0, 0.0, 1.0]), atol=4 * 0.5 / n**0.5)
    assert shares[3] == 0


def test_a_batch_of_one_text_has_no_wrong_ones():
    step = make_step(input_ids=tokens(1), attention_mask=None, text_index=torch.zeros(N, dtype=torch.int64))
    assert value_of("image-text-matching", step).isfinite()


def test_texts_are_found_by_their_index():
    index = torch.tensor([2, 0, 1, 2, 0, 1])
    step = make_step(input_ids=tokens(3), attention_mask=None, text_index=index)
    spread = make_step(
        {**step.student, "text_embeds": step.student["text_embeds"][index]},
        {**step.teacher, "text_embeds": step.teacher["text_embeds"][index]},
        input_ids=tokens(3)[index],
        attention_mask=torch.ones(N, LENGTH),
        text_index=None,
    )
    for name in ("affinity", "image-text-contrastive", "image-text-matching"):
        assert value_of(name, step).item() == pytest.approx(value_of(name, spread).item(), rel=1e-5)
