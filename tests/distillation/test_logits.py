"""What the teacher says, against SciPy's entropy and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import entropy

from edgevlm.distillation.objectives.logits import dense_logits, resized
from edgevlm.errors import UsageError
from tests.distillation.steps import CLASSES, DENSE, N, make_step, objectives_of, random, value_of


def sparse(logits, k):
    values, indices = logits.topk(k, dim=1)
    others = logits.scatter(1, indices, -torch.inf)
    return {"logits.values": values, "logits.indices": indices, "logits.rest": others.logsumexp(1)}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logits_are_a_divergence(temperature):
    step = make_step()
    student, teacher = (side["logits"].detach().numpy().astype(float) for side in (step.student, step.teacher))
    divergences = [
        entropy(softmax(theirs / temperature), softmax(mine / temperature))
        for mine, theirs in zip(student, teacher, strict=True)
    ]
    expected = temperature**2 * np.mean(divergences)
    assert value_of("logits", step, temperature=temperature).item() == pytest.approx(expected, rel=1e-5)


def test_a_student_that_says_the_same_has_nothing_to_learn():
    logits = random(N, CLASSES).requires_grad_()
    value = value_of("logits", make_step({"logits": logits}, {"logits": logits.detach()}))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad.abs().max() < 1e-6


def test_the_gradient_at_a_high_temperature_is_that_of_a_squared_difference():
    # Hinton et al. 2015, equation 4: for centred logits the gradient tends to (s - t) / classes.
    student = random(1, CLASSES, seed=1)
    teacher = random(1, CLASSES, seed=2)
    student, teacher = (student - student.mean()).requires_grad_(), teacher - teacher.mean()
    value_of("logits", make_step({"logits": student}, {"logits": teacher}), temperature=1000.0).backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / CLASSES, rtol=0.02, atol=1e-3)


def test_all_logits_stored_sparse_are_all_logits():
    teacher = random(N, CLASSES, seed=9)
    mine = random(N, CLASSES)
    dense = value_of("logits", make_step({"logits": mine}, {"logits": teacher}))
    stored = value_of("logits", make_step({"logits": mine}, sparse(teacher, CLASSES)))
    assert stored.item() == pytest.approx(dense.item(), rel=1e-5)


def test_the_largest_few_keep_their_shares_and_the_others_share_evenly():
    teacher = 3 * random(N, 9, seed=9)
    true = softmax(teacher.numpy().astype(float), axis=1)
    rebuilt = dense_logits(sparse(teacher, 3), 9).softmax(1).numpy()
    for shares, found in zip(true, rebuilt, strict=True):
        order = np.argsort(-shares)
        expected = shares.copy()
        # TinyViT: (1 - Σ kept) / (classes - k)
        expected[order[3:]] = (1 - shares[order[:3]].sum()) / 6
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_sparse_logits_teach_what_their_distribution_does():
    teacher, mine = 3 * random(N, 9, seed=9), random(N, 9)
    kept = sparse(teacher, 3)
    shares = np.zeros((N, 9))
    for row in range(N):
        norm = math.log(sum(math.exp(value) for value in teacher[row].tolist()))
        shares[row] = math.exp(kept["logits.rest"][row].item() - norm) / 6
        for value, index in zip(kept["logits.values"][row], kept["logits.indices"][row], strict=True):
            shares[row, index] = math.exp(value.item() - norm)
    expected = np.mean([entropy(t, softmax(s)) for t, s in zip(shares, mine.numpy().astype(float), strict=True)])
    found = value_of(
        "logits", make_step({"logits": mine}, kept), student={"logits": (9,)}, teacher={"logits": (9,)}, temperature=1.0
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_classes_must_be_as_many():
    with pytest.raises(UsageError, match=r"as many channels or classes in 'logits'.*\(5,\).*\(7,\)"):
        objectives_of("logits", student={"logits": (5,)}, teacher={"logits": (7,)})


def test_classes_of_a_picture_are_a_vector():
    with pytest.raises(UsageError, match="'logits' of the student to be a vector"):
        objectives_of("logits", student=DENSE)


def test_pixels_are_divergences_of_each():
    step = make_step(sizes=DENSE)
    student, teacher = (side["logits"].detach().numpy().astype(float) for side in (step.student, step.teacher))
    expected = np.mean(
        [
            entropy(softmax(teacher[n, :, y, x]), softmax(student[n, :, y, x]))
            for n in range(N)
            for y in range(4)
            for x in range(6)
        ]
    )
    assert value_of("pixels", step, student=DENSE).item() == pytest.approx(expected, rel=1e-5)


def test_pixels_of_masks_are_cross_entropies_of_each():
    step = make_step(sizes=DENSE)
    student, teacher = (side["logits"].detach().numpy().astype(float) for side in (step.student, step.teacher))
    p, q = expit(student), expit(teacher / 2)
    expected = -(q * np.log(p) + (1 - q) * np.log(1 - p)).mean()
    found = value_of("pixels", step, student=DENSE, loss="bce", temperature=2.0)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_teacher_of_another_resolution_is_resized():
    # The middle of each of the student's pixels lies between four of the teacher's.
    teacher = torch.arange(16.0).reshape(1, 1, 4, 4)
    expected = torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]])
    torch.testing.assert_close(resized(teacher, torch.zeros(1, 1, 2, 2)), expected)
    step = make_step(outputs_of(4, 6), outputs_of(8, 12))
    found = value_of("pixels", step, student=DENSE, teacher={"logits": (CLASSES, 8, 12)})
    assert found.isfinite()


def outputs_of(height, width):
    return {"logits": random(N, CLASSES, height, width)}


@pytest.mark.parametrize("sizes", [{"logits": (CLASSES,)}, DENSE], ids=["pictures", "pixels"])
def test_pseudo_labels_are_what_the_teacher_is_sure_of(sizes):
    step = make_step(sizes=sizes)
    student, teacher = (
        np.moveaxis(side["logits"].detach().numpy().astype(float), 1, -1).reshape(-1, CLASSES)
        for side in (step.student, step.teacher)
    )
    total, n_sure = 0.0, 0
    for mine, theirs in zip(student, teacher, strict=True):
        if softmax(theirs).max() >= 0.5:
            n_sure += 1
            total -= math.log(softmax(mine)[theirs.argmax()])
    assert 0 < n_sure < len(student)
    found = value_of("pseudo-labels", step, student=sizes, confidence=0.5)
    assert found.item() == pytest.approx(total / len(student), rel=1e-5)


def test_an_unsure_teacher_labels_nothing():
    step = make_step(outputs_of(4, 6), {"logits": torch.zeros(N, CLASSES, 4, 6)})
    assert value_of("pseudo-labels", step, student=DENSE).item() == 0
