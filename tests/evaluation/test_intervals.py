from __future__ import annotations

import numpy as np
import pytest

from edgevlm.evaluation.intervals import bootstrap_mean, paired_proportions, wilson


def test_no_difference_seen_is_not_no_difference() -> None:
    low, high = paired_proportions(0, 0, 200)
    assert low == -high
    # The rule of three: what happens to 3 in 200 is missed by 200 pictures one time in twenty.
    assert 0.01 < high < 3 / 200


def test_wilson_is_open_at_both_ends() -> None:
    assert wilson(0, 200)[0] == 0 < wilson(0, 200)[1] < 0.02
    assert 0.98 < wilson(200, 200)[0] < wilson(200, 200)[1] == 1
    # Brown, Cai and DasGupta (2001) and every table since: 8 of 10 -> 0.490 to 0.943.
    assert wilson(8, 10) == pytest.approx((0.490, 0.943), abs=5e-4)


def test_more_confidence_is_a_wider_interval() -> None:
    narrow, wide = (paired_proportions(6, 3, 200, confidence=c) for c in (0.9, 0.99))
    assert wide[0] < narrow[0] < 3 / 200 < narrow[1] < wide[1]


@pytest.mark.parametrize("n", [20, 200, 1000])
@pytest.mark.parametrize(("worse", "better"), [(0.002, 0.002), (0.01, 0.002), (0.03, 0.02), (0.1, 0.02)])
def test_the_paired_interval_covers_the_true_drop(n: int, worse: float, better: float) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(n, [worse, better, 1 - worse - better], size=1000)
    inside = [
        low <= worse - better <= high for low, high in (paired_proportions(int(w), int(b), n) for w, b, _ in drawn)
    ]
    # Of 1,000 intervals at 95 %, fewer than 935 cover once in a hundred; Wald's own cover 40 % at n = 20.
    assert np.mean(inside) >= 0.935


def test_the_bootstrap_covers_the_true_mean() -> None:
    rng = np.random.default_rng(0)
    inside = [low <= 0 <= high for low, high in (bootstrap_mean(rng.normal(size=40)) for _ in range(200))]
    assert np.mean(inside) >= 0.9


def test_the_bootstrap_repeats_itself() -> None:
    values = np.random.default_rng(1).random(50)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    low, high = bootstrap_mean(values)
    assert low < values.mean() < high
