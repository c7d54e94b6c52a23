from __future__ import annotations

import numpy as np
import pytest

from edgevlm.evaluation.metrics import (
    AGREEMENT,
    COSINE,
    METRICS,
    NEAREST,
    TOP_1,
    TOP_5,
    Classes,
    Embeddings,
    centred_cosine,
    nearest_other,
)
from edgevlm.runtime.tasks import TASKS


def test_every_task_is_judged() -> None:
    assert METRICS.keys() == TASKS.keys()


def test_top_1_and_top_5() -> None:
    predictions = np.array([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [5, 6, 7, 8, 9]])
    judged = Classes().judge(predictions, labels=np.array([0, 0, 0]), reference=np.array([[0], [1], [9]]))
    assert judged.metric == TOP_1
    assert judged.scores.tolist() == [1, 0, 0]
    assert judged.others == {AGREEMENT: pytest.approx(2 / 3), TOP_5: pytest.approx(2 / 3)}


def test_top_5_of_three_classes_is_not_said() -> None:
    judged = Classes().judge(np.array([[0, 1, 2]]), labels=np.array([2]), reference=None)
    assert judged.others == {}


def test_without_labels_the_reference_is_the_measure() -> None:
    predictions = np.array([[0, 1], [1, 0]])
    judged = Classes().judge(predictions, labels=None, reference=np.array([[0, 1], [0, 1]]))
    assert (judged.metric, judged.scores.tolist()) == (AGREEMENT, [1, 0])
    assert Classes().judge(predictions, labels=None, reference=None).scores.tolist() == [1, 1]


def test_centring_shows_what_a_shared_part_hides() -> None:
    rng = np.random.default_rng(0)
    reference = 100 + rng.normal(size=(50, 8))
    unrelated = 100 + rng.normal(size=(50, 8))
    plain = (reference * unrelated).sum(1) / np.linalg.norm(reference, axis=1) / np.linalg.norm(unrelated, axis=1)
    assert plain.min() > 0.999
    assert abs(centred_cosine(unrelated, reference).mean()) < 0.2
    assert centred_cosine(reference, reference).min() > 1 - 1e-9
    shifted = reference + 5
    assert centred_cosine(shifted, reference).mean() < 0.9, "the mean is the reference's, so a shift is seen"


def test_vectors_without_direction() -> None:
    same = np.ones((3, 4))
    assert centred_cosine(same, same).tolist() == [1, 1, 1]
    assert centred_cosine(same * 2, same).tolist() == [0, 0, 0]


def test_nearest_other_is_never_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [0, 0]])
    assert nearest_other(vectors)[:4].tolist() == [1, 0, 3, 2]
    monkeypatch.setattr("edgevlm.evaluation.metrics._ROWS", 2)
    assert nearest_other(vectors)[:4].tolist() == [1, 0, 3, 2]


def test_embeddings_are_judged_by_their_nearest_where_classes_repeat() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 10)
    vectors = np.eye(3)[labels] + 0.1 * rng.normal(size=(30, 3))
    judged = Embeddings().judge(vectors, labels=labels, reference=vectors)
    assert (judged.metric, judged.scores.mean()) == (NEAREST, 1)
    assert judged.others == {COSINE: pytest.approx(1)}
    alone = np.append(labels, 7)
    judged = Embeddings().judge(np.vstack([vectors, [[1, 1, 1]]]), labels=alone, reference=None)
    assert len(judged.scores) == 30, "a picture alone in its class has no right answer"


def test_embeddings_of_pictures_alone_in_their_classes_are_compared_with_the_reference() -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 3))
    assert Embeddings().judge(vectors, labels=np.arange(30), reference=None).metric == COSINE
