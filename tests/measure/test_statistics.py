from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevlm.measure.spec import Protocol
from edgevlm.measure.statistics import (
    MAX_HALF_WIDTH,
    MAX_HALF_WIDTH_AROUND_1,
    MAX_OTHER_LOAD,
    MIN_PAIRS,
    PROCESS_DEVIATION,
    comparison_reasons,
    ratio_of,
    turn_medians,
)
from tests.measure.fakes import measurement

PROTOCOL = Protocol()


def lognormal(rng: np.random.Generator, n: int, *, mean: float = 1.0, deviation: float) -> np.ndarray:
    return mean * np.exp(rng.normal(0, deviation, n))


def test_a_ratio_is_time_over_the_baselines_time():
    ratio = ratio_of(measurement("s", [5.0] * 10), measurement("b", [10.0] * 10), PROTOCOL)
    assert ratio is not None
    assert ratio.value == pytest.approx(0.5)
    assert ratio.low < 0.5 < ratio.high
    assert ratio.is_valid
    assert (ratio.subject, ratio.baseline, ratio.n_pairs) == ("s", "b", 10)


def test_only_rounds_that_both_took_part_in_are_paired():
    late = measurement("s", [1.0, 1.0, 1.0], rounds=(2, 3, 9))
    baseline = measurement("b", [8.0, 8.0, 2.0, 2.0, 8.0])
    ratio = ratio_of(late, baseline, PROTOCOL)
    assert ratio is not None
    assert ratio.n_pairs == 2
    assert ratio.value == pytest.approx(0.5)
    assert ratio_of(measurement("s", [1.0], rounds=(7,)), baseline, PROTOCOL) is None


def test_what_disturbs_both_alike_does_not_move_the_ratio():
    rng = np.random.default_rng(0)
    shared = lognormal(rng, 40, deviation=1.0)
    ratio = ratio_of(measurement("s", 3 * shared), measurement("b", 4 * shared), PROTOCOL)
    assert ratio is not None
    assert ratio.value == pytest.approx(0.75)
    assert ratio.high - ratio.low < 0.02


def test_a_fifth_of_spoilt_turns_does_not_move_the_ratio():
    rng = np.random.default_rng(1)
    turns = lognormal(rng, 40, mean=5.0, deviation=0.01)
    turns[::5] *= 6
    ratio = ratio_of(measurement("s", turns), measurement("b", lognormal(rng, 40, mean=10, deviation=0.01)), PROTOCOL)
    assert ratio is not None
    assert ratio.value == pytest.approx(0.5, rel=0.02)
    assert ratio.is_valid


def test_waits_for_others_are_taken_off():
    waited = measurement("s", [12.0, 30.0], waits_ms=((2.0,), (20.0,)))
    assert turn_medians(waited) == {0: 10.0, 1: 10.0}
    assert waited.percentile_ms(99) == 10.0
    assert waited.turns_ms == ((12.0,), (30.0,))


def test_the_same_graph_twice_is_told_apart_from_itself_in_one_of_twenty():
    """300 simulated measurements of a graph against itself, each in 4 sittings that differ as processes do."""
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(300):
        turns = [
            lognormal(rng, 40, deviation=0.04) * np.repeat(lognormal(rng, 4, deviation=PROCESS_DEVIATION / 2**0.5), 10)
            for _ in range(2)
        ]
        ratio = ratio_of(measurement("s", turns[0]), measurement("b", turns[1]), Protocol(seed=seed))
        assert ratio is not None
        covered += ratio.low <= 1 <= ratio.high
    assert 0.92 <= covered / 300 <= 0.985


def test_the_interval_is_the_same_for_the_same_seed():
    rng = np.random.default_rng(3)
    pair = measurement("s", lognormal(rng, 20, deviation=0.1)), measurement("b", lognormal(rng, 20, deviation=0.1))
    assert ratio_of(*pair, PROTOCOL) == ratio_of(*pair, PROTOCOL)
    assert ratio_of(*pair, PROTOCOL) != ratio_of(*pair, Protocol(seed=1))


@given(
    turns=st.lists(st.floats(0.01, 1e4), min_size=1, max_size=30),
    scale=st.floats(0.01, 100),
)
def test_the_value_lies_in_its_interval_and_scales_with_the_times(turns: list[float], scale: float):
    baseline = measurement("b", [10.0] * len(turns))
    one = ratio_of(measurement("s", turns), baseline, PROTOCOL)
    other = ratio_of(measurement("s", [scale * ms for ms in turns]), baseline, PROTOCOL)
    assert one is not None
    assert other is not None
    assert 0 < one.low <= one.value <= one.high
    assert (other.value, other.low, other.high) == pytest.approx(
        (scale * one.value, scale * one.low, scale * one.high), rel=1e-9
    )


# --- verdicts ---------------------------------------------------------------------------------------------


def test_too_few_turns_are_no_measurement():
    few = MIN_PAIRS - 1
    ratio = ratio_of(measurement("s", [5.0] * few), measurement("b", [10.0] * few), PROTOCOL)
    assert ratio is not None
    assert not ratio.is_valid
    assert ratio.reasons == (f"s has {few} turns beside the baseline; {MIN_PAIRS} are needed.",)


@pytest.mark.parametrize(
    ("mean", "deviation", "is_valid"),
    [
        (1.0, 0.01, True),  # surely about 1
        (1.0, 0.30, False),  # could be 10 % faster or slower
        (0.5, 0.30, True),  # not exact, but surely faster
        (0.5, 1.50, False),  # anything
    ],
)
def test_how_wide_an_interval_may_be_depends_on_whether_it_holds_1(mean: float, deviation: float, is_valid: bool):
    rng = np.random.default_rng(4)
    subject = measurement("s", lognormal(rng, 40, mean=mean, deviation=deviation))
    ratio = ratio_of(subject, measurement("b", np.ones(40)), PROTOCOL)
    assert ratio is not None
    assert ratio.is_valid is is_valid, ratio
    half_width = (ratio.high - ratio.low) / 2 / ratio.value
    limit = MAX_HALF_WIDTH_AROUND_1 if ratio.low <= 1 <= ratio.high else MAX_HALF_WIDTH
    assert (half_width <= limit) is is_valid
    if not is_valid:
        assert "is only known to" in ratio.reasons[0]


def test_a_ratio_that_drifts_is_not_valid():
    rng = np.random.default_rng(5)
    drifting = np.concatenate([lognormal(rng, 20, mean=5, deviation=0.01), lognormal(rng, 20, mean=6, deviation=0.01)])
    ratio = ratio_of(measurement("s", drifting), measurement("b", np.full(40, 10.0)), PROTOCOL)
    assert ratio is not None
    assert not ratio.is_valid
    assert ratio.reasons == ("The ratio of s drifted from 0.50 to 0.60 while it was measured.",)


def test_a_few_turns_cannot_show_drift():
    turns = [5.0] * MIN_PAIRS + [5.5] * (MIN_PAIRS - 1)
    baseline = measurement("b", [10.0] * 2 * MIN_PAIRS)
    few = ratio_of(measurement("s", turns), baseline, PROTOCOL)
    enough = ratio_of(measurement("s", [*turns, 5.5]), baseline, PROTOCOL)
    assert few is not None
    assert enough is not None
    assert few.is_valid
    assert "drifted" in enough.reasons[0]


def test_sittings_that_differ_widen_the_interval():
    """As a busy machine does it: where threads are put lasts as long as their process."""
    rng = np.random.default_rng(7)
    held = {"alike": 0, "unlike": 0}
    for seed in range(200):
        for name, deviation in (("alike", 0.0), ("unlike", 0.15)):
            turns = lognormal(rng, 40, deviation=0.3) * np.repeat(lognormal(rng, 4, deviation=deviation), 10)
            ratio = ratio_of(measurement("s", turns), measurement("b", np.ones(40)), Protocol(seed=seed))
            assert ratio is not None
            held[name] += ratio.low <= 1 <= ratio.high
    assert 0.92 <= held["alike"] / 200 <= 0.99
    assert 0.92 <= held["unlike"] / 200 <= 0.99, "0.86 without looking at how the sittings differ"


def test_a_sitting_that_has_only_begun_adds_little():
    widths = []
    for n in (20, 21, 30):
        ratio = ratio_of(measurement("s", [5.0] * n), measurement("b", [10.0] * n), PROTOCOL)
        assert ratio is not None
        widths.append(ratio.high - ratio.low)
    assert widths[0] == pytest.approx(widths[2] * (3 / 2) ** 0.5, rel=1e-3)
    assert widths[1] > widths[0] * 0.94


def test_noise_is_not_called_drift():
    rng = np.random.default_rng(6)
    for _ in range(50):
        subject = measurement("s", lognormal(rng, 40, mean=0.5, deviation=0.1))
        ratio = ratio_of(subject, measurement("b", lognormal(rng, 40, deviation=0.1)), PROTOCOL)
        assert ratio is not None
        assert ratio.is_valid, ratio.reasons


def test_a_subject_that_was_dropped_says_so_and_nothing_else():
    dropped = measurement("s", [30.0] * 6, dropped_after_round=6)
    ratio = ratio_of(dropped, measurement("b", [10.0] * 40), PROTOCOL)
    assert ratio is not None
    assert not ratio.is_valid
    assert len(ratio.reasons) == 1
    assert "dropped after 6 turns" in ratio.reasons[0]


def test_a_comparison_is_as_valid_as_its_ratios_its_baseline_and_its_machine():
    baseline = measurement("b", [10.0] * 40)
    sound = ratio_of(measurement("s", [5.0] * 40), baseline, PROTOCOL)
    poor = ratio_of(measurement("p", [5.0] * 3), baseline, PROTOCOL)
    assert sound is not None
    assert poor is not None
    assert comparison_reasons(baseline, [sound], other_load=0.5) == ()
    assert comparison_reasons(baseline, [sound], other_load=None) == ()
    assert comparison_reasons(baseline, [sound, poor], other_load=0.5) == poor.reasons
    (busy,) = comparison_reasons(baseline, [sound], other_load=(1 + MAX_OTHER_LOAD) / 2)
    assert busy.startswith("Other processes took 98% of the CPU")
    assert comparison_reasons(measurement("b", [10.0]), [], other_load=0.0), "rivals that all failed vouch for nothing"
    broken = measurement("b", [], failure="It died.")
    assert comparison_reasons(broken, [], other_load=0.0) == ("The baseline b failed: It died.",)


def test_one_subject_alone_needs_turns_too():
    assert comparison_reasons(measurement("b", [1.0] * MIN_PAIRS), [], other_load=0.0) == ()
    assert comparison_reasons(measurement("b", [1.0]), [], other_load=0.0) != ()
