from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest

from edgevlm.errors import UsageError
from edgevlm.measure.interleave import compare, order_of_round
from edgevlm.measure.protocol import extended
from edgevlm.measure.spec import Comparison, Protocol
from tests.measure.fakes import ENVIRONMENT, FakeMachine, noisy, subject

PROTOCOL = Protocol(halve_at=(), stop_half_width=0.0)


def measure(machine: FakeMachine, *names: str, protocol: Protocol = PROTOCOL, baseline: str = "float") -> Comparison:
    found = compare(
        [subject(name) for name in names], baseline=baseline, protocol=protocol, surroundings=machine.surroundings()
    )
    assert not machine.open_now, "every worker is closed"
    return found


# --- turns ------------------------------------------------------------------------------------------------


def test_everyone_takes_one_turn_a_round():
    machine = FakeMachine(noisy({"float": 10.0, "int8": 5.0, "int4": 8.0}))
    found = measure(machine, "float", "int8", "int4")
    rounds = [machine.turns[i : i + 3] for i in range(0, len(machine.turns), 3)]
    assert len(rounds) == PROTOCOL.n_rounds
    assert all(sorted(each) == ["float", "int4", "int8"] for each in rounds)
    assert {m.subject: len(m.turns_ms) for m in found.measurements} == dict.fromkeys(("float", "int8", "int4"), 40)
    assert found.is_valid, found.reasons
    ratio = found.ratio("int8")
    assert ratio is not None
    assert ratio.low < 0.5 < ratio.high
    assert found.ratio("float") is None
    assert found.environment == ENVIRONMENT


def test_nobody_always_follows_the_same_one():
    names = ["a", "b", "c"]
    orders = [order_of_round(names, round_index=i, seed=7) for i in range(40)]
    sequence = list(itertools.chain.from_iterable(orders))
    for name in names:
        before = {earlier for earlier, later in itertools.pairwise(sequence) if later == name}
        assert before >= set(names) - {name}
    for first, second in zip(orders[::2], orders[1::2], strict=True):
        assert second == first[::-1], "what drifts steadily over two rounds cancels"


def test_orders_depend_on_the_seed():
    names = list("abcdef")
    assert order_of_round(names, round_index=0, seed=0) == order_of_round(names, round_index=0, seed=0)
    assert len({order_of_round(names, round_index=0, seed=seed) for seed in range(5)}) > 1


def test_every_sitting_has_new_processes_and_another_order():
    machine = FakeMachine(noisy({"float": 10.0, "int8": 5.0}))
    found = measure(machine, "float", "int8")
    assert machine.opened[:4] == ["float", "int8", "int8", "float"]
    assert len(machine.opened) == 2 * 4
    assert found.measurement("float").rounds == tuple(range(40))


def test_measuring_stops_once_every_interval_is_narrow():
    machine = FakeMachine(noisy({"float": 10.0, "int8": 5.0}, deviation=0.001))
    found = measure(machine, "float", "int8", protocol=Protocol(halve_at=(), stop_half_width=0.02))
    assert len(found.measurement("float").turns_ms) == Protocol().min_rounds
    assert found.is_valid


def test_measuring_stops_at_the_budget_and_says_what_is_missing():
    machine = FakeMachine(noisy({"float": 1000.0, "int8": 500.0}))
    protocol = msgspec.structs.replace(PROTOCOL, budget_s=20.0)
    found = measure(machine, "float", "int8", protocol=protocol)
    assert 0 < len(found.measurement("int8").turns_ms) < 6
    assert not found.is_valid
    assert "turns beside the baseline; 6 are needed" in found.reasons[0]
    assert found.wall_s < 30

    again = measure(machine, "float", "int8", protocol=extended(extended(protocol)))
    assert again.is_valid


def test_a_subject_alone_is_measured_too():
    found = measure(FakeMachine(noisy({"float": 10.0})), "float")
    assert found.is_valid
    assert found.ratios == ()
    assert found.measurement("float").percentile_ms(50) == pytest.approx(10, rel=0.05)


def test_progress_counts_rounds():
    seen: list[tuple[str, int, int]] = []
    machine = FakeMachine(noisy({"float": 10.0, "int8": 5.0}))
    compare(
        [subject("float"), subject("int8")],
        baseline="float",
        protocol=PROTOCOL,
        progress=lambda *event: seen.append(event),
        surroundings=machine.surroundings(),
    )
    assert seen[0] == ("opening float", 0, 40)
    assert ("round 40 of 40, 2 in turn", 39, 40) in seen


# --- halving ----------------------------------------------------------------------------------------------


def test_who_is_surely_slower_than_the_best_is_dropped_early():
    machine = FakeMachine(noisy({"float": 10.0, "int8": 5.0, "close": 5.2, "slow": 20.0}))
    found = measure(machine, "float", "int8", "close", "slow", protocol=Protocol(stop_half_width=0.0))
    assert found.measurement("slow").dropped_after_round == 6
    assert found.measurement("close").dropped_after_round is None
    assert found.measurement("float").dropped_after_round is None, "the baseline stays, however slow"
    assert len(found.measurement("slow").turns_ms) == 6
    assert len(found.measurement("float").turns_ms) == 40
    slow = found.ratio("slow")
    assert slow is not None
    assert not slow.is_valid
    assert found.is_valid, "who was dropped does not count against the others"
    assert machine.opened.count("slow") == 1


def test_who_might_be_as_fast_as_the_best_is_kept():
    machine = FakeMachine(noisy({"float": 10.0, "int8": 5.0, "slow": 6.0}, deviation=0.5))
    found = measure(machine, "float", "int8", "slow", protocol=Protocol(n_rounds=6))
    assert found.measurement("slow").dropped_after_round is None


# --- what goes wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [-1, 0, 3, 12])
def test_who_fails_fails_alone(turn: int):
    machine = FakeMachine(noisy({"float": 10.0, "int8": 5.0, "bad": 7.0}), fails_at={"bad": turn})
    found = measure(machine, "float", "bad", "int8")
    assert found.measurement("bad").failure == ("It does not open." if turn < 0 else "It died.")
    assert len(found.measurement("bad").turns_ms) == max(turn, 0)
    assert found.ratio("bad") is None
    assert found.is_valid
    assert len(found.measurement("int8").turns_ms) == 40


@pytest.mark.parametrize("turn", [-1, 3, 12])
def test_without_its_baseline_a_comparison_ends(turn: int):
    machine = FakeMachine(noisy({"float": 10.0, "int8": 5.0}), fails_at={"float": turn})
    found = measure(machine, "float", "int8")
    assert not found.is_valid
    assert found.reasons[0].startswith("The baseline float failed: It")
    assert len(machine.turns) <= 2 * 13


def test_workers_are_closed_when_something_else_breaks():
    def run_ms(name: str, turn: int) -> float:
        if turn == 2:
            raise KeyboardInterrupt
        return 1.0

    machine = FakeMachine(run_ms)
    with pytest.raises(KeyboardInterrupt):
        measure(machine, "float", "int8")
    assert not machine.open_now


@pytest.mark.parametrize(
    ("names", "baseline", "message"),
    [(("a", "a"), "a", "the same name"), (("a", "b"), "c", "The baseline 'c' is not among the subjects")],
)
def test_what_cannot_be_compared_is_refused(names: tuple[str, ...], baseline: str, message: str):
    with pytest.raises(UsageError, match=message):
        measure(FakeMachine(noisy({})), *names, baseline=baseline)


# --- memory and load --------------------------------------------------------------------------------------


def test_who_does_not_fit_waits_for_the_next_group():
    names = ("float", "a", "b", "c")
    machine = FakeMachine(
        noisy({"float": 10.0, "a": 5.0, "b": 6.0, "c": 7.0}), peak_bytes=240 << 20, free_bytes=1000 << 20
    )
    found = measure(machine, *names)  # two of 240 MiB, and 64 MiB for one that is not known: more than half of 1000
    assert machine.most_open == 2
    assert [m.subject for m in found.measurements if m.turns_ms] == list(names)
    assert len(found.measurement("float").turns_ms) == 3 * 40
    for name in names[1:]:
        own, shared = set(found.measurement(name).rounds), set(found.measurement("float").rounds)
        assert own <= shared
        assert len(own) == 40
    assert not set(found.measurement("a").rounds) & set(found.measurement("b").rounds)
    assert found.is_valid, found.reasons


def test_files_tell_how_much_a_worker_will_hold(tmp_path: Path):
    (tmp_path / "big.onnx").write_bytes(b"")
    with (tmp_path / "big.onnx.data").open("wb") as opened:
        opened.truncate(400 << 20)
    machine = FakeMachine(noisy({"float": 10.0, "small": 5.0, "big": 6.0}), free_bytes=2000 << 20)
    compare(
        [subject("float"), subject("small"), subject("big", str(tmp_path / "big.onnx"))],
        baseline="float",
        protocol=PROTOCOL,
        surroundings=machine.surroundings(),
    )
    assert machine.most_open == 2, "three times 400 MB do not fit into half of 2000 MB"


def test_the_load_of_others_is_told_and_judged():
    assert measure(FakeMachine(noisy({"float": 10.0})), "float").other_load == 0.0
    busy = measure(FakeMachine(noisy({"float": 10.0, "int8": 5.0}), other_load=0.7), "float", "int8")
    assert busy.other_load == pytest.approx(0.7)
    assert busy.is_valid
    hopeless = measure(FakeMachine(noisy({"float": 10.0, "int8": 5.0}), other_load=0.97), "float", "int8")
    assert not hopeless.is_valid
    assert hopeless.reasons[0].startswith("Other processes took 97% of the CPU")


def test_a_comparison_survives_being_written():
    found = measure(FakeMachine(noisy({"float": 10.0, "int8": 5.0})), "float", "int8")
    assert msgspec.json.decode(msgspec.json.encode(found), type=Comparison) == found
