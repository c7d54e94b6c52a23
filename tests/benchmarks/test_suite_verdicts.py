"""Who goes into the long comparison, who counts as the best rival, and what the tables say of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from benchmarks.suite.__main__ import _joined
from benchmarks.suite.rivals import EAGER, FLOAT
from benchmarks.suite.running import OURS, _best, _finalists, rounded_samples
from benchmarks.suite.spec import CaseResult, Contender, Judged, ThreadsResult
from benchmarks.suite.table import details, is_behind, summary
from edgevlm.measure.spec import Comparison, Environment, Measurement, Protocol, Ratio
from edgevlm.runtime.spec import SessionOptions

ENVIRONMENT = Environment(
    machine="a machine", arch="x86-64", isa=(), n_cores=2, memory_bytes=1, os="an os", python="3.11", tools={}
)
TIMES_MS = {OURS: 1.0, "fast but wrong": 0.5, "quick": 2.0, "quicker": 1.5, "slow": 9.0, FLOAT: 4.0, EAGER: 10.0}


def judged(value: float, *, lowest: float | None = None) -> Judged:
    drop = 1 - value
    return Judged(
        metric="top-1", value=value, reference=1, drop=drop, low=0, high=drop, n=9, lowest=lowest, is_within=drop < 0.01
    )


CONTENDERS = (
    *(Contender(name=name, environment="e", judged=judged(0.5 if "wrong" in name else 1)) for name in TIMES_MS
      if name != OURS),
    Contender(name="broken", environment="e", failure="It said | no."),
)  # fmt: skip


def measurement(name: str, ms: float, *, failure: str | None = None) -> Measurement:
    turns = () if failure else ((ms, ms),)
    return Measurement(
        subject=name, turns_ms=turns, rounds=(0,) if turns else (), warmup_ms=(ms,), load_ms=1, memory_bytes=1,
        n_threads=1, failure=failure, tools={"onnxruntime": "1.2.3"},
    )  # fmt: skip


def comparison(*, failed: str = "") -> Comparison:
    measurements = tuple(measurement(n, ms, failure="It fell." if n == failed else None) for n, ms in TIMES_MS.items())
    ratios = tuple(
        Ratio(subject=n, baseline=OURS, value=ms, low=ms - 0.1, high=ms + 0.1, n_pairs=9, is_valid=True)
        for n, ms in TIMES_MS.items()
        if n not in (OURS, failed)
    )
    return Comparison(
        baseline=OURS, protocol=Protocol(), environment=ENVIRONMENT, measurements=measurements, ratios=ratios,
        is_valid=True, reasons=(), wall_s=1,
    )  # fmt: skip


def result(**changes: object) -> CaseResult:
    found = ThreadsResult(
        n_threads=1,
        ours=Contender(name=OURS, environment="", judged=judged(0.998)),
        winner="int8",
        backend="onnxruntime",
        session=SessionOptions(),
        screening=comparison(),
        final=comparison(),
        best="quicker",
    )
    found = msgspec.structs.replace(found, **changes)
    return CaseResult(
        schema_version=1, key="k", name="a model", is_random=False, made_at="2026-01-01", n_calibrate=3,
        rivals=CONTENDERS, threads=(found,),
    )  # fmt: skip


def test_finalists_are_the_fastest_within_the_budget_then_float_and_pytorch() -> None:
    assert _finalists(CONTENDERS, comparison()) == ("quicker", "quick", FLOAT, EAGER)


def test_who_fails_in_the_short_comparison_is_no_finalist() -> None:
    assert _finalists(CONTENDERS, comparison(failed="quicker")) == ("quick", "slow", FLOAT, EAGER)
    assert _finalists(CONTENDERS, comparison(failed=EAGER)) == ("quicker", "quick", FLOAT)


def test_the_best_rival_is_within_the_budget_and_ran_to_the_end() -> None:
    assert _best(CONTENDERS, comparison()) == "quicker"
    assert _best(CONTENDERS, comparison(failed="quicker")) == "quick"
    assert _best((), comparison()) is None


@pytest.mark.parametrize(
    ("high", "is_valid", "expected"), [(0.97, True, True), (0.972, True, False), (2, True, False), (0.5, False, False)]
)
def test_only_a_whole_valid_interval_counts(high: float, is_valid: bool, expected: bool) -> None:
    ratio = Ratio(subject="a", baseline=OURS, value=0.4, low=0.3, high=high, n_pairs=9, is_valid=is_valid)
    assert is_behind(ratio) is expected
    assert not is_behind(None)


def test_the_summary_says_how_many_times_faster() -> None:
    text = summary([result()])
    row = next(line for line in text.splitlines() if line.startswith("| a model"))
    assert "int8 (onnxruntime)" in row and "0.20 points" in row
    assert "quicker | 1.50 [1.40, 1.60] | no | 4.00 [3.90, 4.10] | 10.00" in row
    assert "1.50 × the best rival, 4.00 × ONNX Runtime float, 10.00 × PyTorch eager" in text
    assert "surely behind the best rival by more than 1.03 on 0" in text
    assert "onnxruntime 1.2.3" in text


def test_a_result_without_a_rival_within_the_budget_says_so() -> None:
    assert "| none | – | no |" in summary([result(best=None)])


def test_what_edgevlm_ships_outside_the_budget_is_called_so() -> None:
    worse = Contender(name=OURS, environment="", judged=judged(0.9, lowest=0.5))
    assert "cosine 0.9000, outside the budget" in summary([result(ours=worse)])


def test_the_details_hold_everybody_and_why_some_did_not_run() -> None:
    lines = details([result()]).splitlines()
    assert any(line.startswith("| broken |  | not run: It said / no. |") for line in lines)
    assert any(line.startswith("| fast but wrong | 0.50 | 0.5000 | no |") for line in lines)
    assert any(line.startswith("| **edgevlm**: int8 (onnxruntime) | 1.00 | 0.9980 | yes |") for line in lines)


def test_samples_are_kept_to_a_tenth_of_a_microsecond() -> None:
    fine = msgspec.structs.replace(comparison(), measurements=(measurement(OURS, 1.23456789),))
    assert rounded_samples(fine).measurement(OURS).turns_ms == ((1.2346, 1.2346),)


def test_numbers_of_threads_that_were_measured_before_stay() -> None:
    def at(n_threads: int) -> Any:
        found = result()
        return msgspec.structs.replace(found, threads=(msgspec.structs.replace(found.threads[0], n_threads=n_threads),))

    assert [found.n_threads for found in _joined(at(1), at(2)).threads] == [1, 2]
    assert [found.n_threads for found in _joined(at(2), at(2)).threads] == [2]
    assert _joined(None, at(4)) == at(4)
