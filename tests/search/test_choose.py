"""The rule that decides what ships: no regression, budgets, honest reasons."""

import pytest

from edgevlm.errors import GateError
from edgevlm.plan import Budgets
from edgevlm.search.choose import Trial, choose, pareto

FLOAT = Trial(name="fp32", size_bytes=40_000_000, p50_ms=10.0, ratio=1.0, drop=0.0)


def int8(name="int8", **changes):
    values = {
        "size_bytes": 10_000_000,
        "p50_ms": 5.0,
        "ratio": 0.5,
        "ratio_low": 0.48,
        "ratio_high": 0.52,
        "drop": 0.002,
    }
    return Trial(name=name, **(values | changes))


def test_the_fastest_inside_the_budgets_comes_first_and_float_last():
    choice = choose((FLOAT, int8("a"), int8("b", p50_ms=4.0, ratio=0.4)), Budgets())
    assert choice.contenders == ("b", "a", "fp32")


def test_what_is_not_surely_faster_than_float_never_ships():
    choice = choose((FLOAT, int8(ratio=0.99, ratio_low=0.95, ratio_high=1.01)), Budgets())
    assert choice.contenders == ("fp32",)
    assert choice.verdict("int8").status == "slower than float"
    assert "not surely faster" in choice.verdict("int8").reason


def test_what_loses_too_much_accuracy_never_ships():
    choice = choose((FLOAT, int8(drop=0.0101)), Budgets(max_drop=0.01))
    assert choice.contenders == ("fp32",)
    assert "1.01%" in choice.verdict("int8").reason


def test_an_invalid_measurement_is_no_ground_to_choose():
    choice = choose((FLOAT, int8(invalid_because=("the machine was busy",))), Budgets())
    assert choice.contenders == ("fp32",)
    assert choice.verdict("int8").reason == "the machine was busy"


def test_where_float_is_too_large_a_slower_candidate_inside_the_budgets_ships():
    slow = int8(ratio=1.2, ratio_low=1.1, ratio_high=1.3, p50_ms=12.0)
    assert choose((FLOAT, slow), Budgets(max_size_mb=20)).contenders == ("int8",)


def test_where_even_float_breaks_a_budget_the_nearest_misses_are_named():
    with pytest.raises(GateError) as caught:
        choose((FLOAT, int8()), Budgets(max_latency_ms=1))
    assert caught.value.exit_code == 4
    assert "int8 takes 5.00 ms where 1 ms is allowed" in caught.value.message
    assert "fp32 takes 10.00 ms" in caught.value.message


def test_a_precision_that_was_asked_for_is_not_replaced_by_float():
    unrequested = Trial(name="fp32", p50_ms=10.0, size_bytes=1, is_requested=False)
    slow = int8(ratio=1.2, ratio_low=1.1, ratio_high=1.3)
    assert choose((unrequested, slow), Budgets()).contenders == ("int8",)
    with pytest.raises(GateError):
        choose((unrequested, int8(drop=0.5)), Budgets())


def test_failures_and_dropped_candidates_say_so():
    choice = choose(
        (FLOAT, Trial(name="broken", failure="zero point must be a scalar"), int8(was_dropped=True)), Budgets()
    )
    assert choice.verdict("broken").status == "failed"
    assert choice.verdict("int8").status == "dropped early"


def test_where_nothing_that_was_asked_for_runs_the_reason_is_told():
    unrequested = Trial(name="fp32", p50_ms=10.0, size_bytes=1, is_requested=False)
    with pytest.raises(GateError, match="no convolution"):
        choose((unrequested, Trial(name="int8", failure="the graph has no convolution")), Budgets())


def test_a_rough_time_is_no_ground_to_refuse_a_precision_that_was_asked_for():
    unrequested = Trial(name="fp32", p50_ms=10.0, size_bytes=1, is_requested=False)
    rough = int8(invalid_because=("the machine was busy",))
    choice = choose((unrequested, rough), Budgets())
    assert choice.contenders == ("int8",)
    assert "the machine was busy" in choice.verdict("int8").reason
    with pytest.raises(GateError):
        choose((unrequested, rough), Budgets(max_latency_ms=20))


def test_what_was_only_screened_ships_after_what_was_timed_well():
    choice = choose((FLOAT, int8("rough", ratio=0.4, is_rough=True), int8("exact", ratio=0.5)), Budgets())
    assert choice.contenders == ("exact", "rough", "fp32")


def test_the_pareto_front_holds_what_no_other_beats_at_once():
    fast = int8("fast", ratio=0.4, drop=0.03)
    exact = int8("exact", ratio=0.6, drop=0.0)
    beaten = int8("beaten", ratio=0.7, drop=0.01)
    small = int8("small", ratio=0.9, drop=0.02, size_bytes=5_000_000)
    unjudged = int8("unjudged", ratio=0.1, drop=None)
    noisy = int8("noisy", ratio=0.1, drop=0.0, invalid_because=("noise",))
    front = pareto((FLOAT, fast, exact, beaten, small, unjudged, noisy))
    assert front == ("fast", "exact", "small")  # float is beaten by exact, which is no worse in anything
