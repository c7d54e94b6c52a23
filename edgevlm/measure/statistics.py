"""From turns to a ratio, its interval and a verdict: pure functions of the samples.

A turn counts as its median run, a round as the logarithm of the ratio of two turns in it, a measurement as the median
of its rounds. Why, with the experiments behind every threshold: docs/measuring.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from edgevlm.measure.spec import Measurement, Protocol, Ratio
from edgevlm.runtime.spec import Array, Spec

_N_RESAMPLES = 2000

# Two processes of the same graph differ by more than their rounds tell (where their memory lies, for one): standard
# deviation of the logarithm of the ratio, on a machine where nothing else disturbs it. Measured: docs/measuring.md,
# "The same graph twice".
PROCESS_DEVIATION = 0.012

# With five pairs even the whole range from the smallest to the largest is only a 94 % interval of the median:
# 1 - 2 * 0.5 ** 5.
MIN_PAIRS = 6

# Wider than this, relative to the value, and nobody can plan with the number, whichever side of 1 it lies on. On a
# machine that others keep busy, int8 at half of float's time comes out at ±15 to 22 %: rough, but no ground for float.
MAX_HALF_WIDTH = 0.25
# An interval that holds 1 says "no difference was found"; wider than this it could as well hide one worth having.
MAX_HALF_WIDTH_AROUND_1 = 0.05

# A shift between the first and the second half counts as drift when the halves' intervals part and it is this large:
# a virtual machine's neighbours move the ratio of int8 to float by up to 8 % without anything being wrong.
MIN_DRIFT = 0.08

# Waits are taken off, but caches and memory bandwidth are shared all the same. Measured up to 94 %, where valid
# ratios were still within 10 % of those on the idle machine; beyond that nothing is known.
MAX_OTHER_LOAD = 0.95


class Estimate(Spec, frozen=True, kw_only=True):
    """A ratio of times and its interval from ``n`` pairs of turns."""

    value: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the interval's width as a fraction of the value."""
        return (self.high - self.low) / 2 / self.value


def turn_medians(measurement: Measurement) -> dict[int, float]:
    """Round -> the median run of the turn in it, less what the runs waited for others."""
    turns = zip(measurement.rounds, measurement.own_turns_ms(), strict=True)
    return {round_index: float(np.median(turn)) for round_index, turn in turns}


def paired_ratio(subject: Measurement, baseline: Measurement, protocol: Protocol) -> Estimate | None:
    """Time of the subject ÷ time of the baseline over the rounds that both took part in; None where there is none."""
    pairs = _Pairs.of(subject, baseline, protocol)
    return pairs.estimate(protocol) if len(pairs.logs) else None


@dataclass(frozen=True)
class _Pairs:
    """Logarithms of the ratios of paired turns, in order, and the sitting of each."""

    logs: Array
    sittings: Array

    @classmethod
    def of(cls, subject: Measurement, baseline: Measurement, protocol: Protocol) -> _Pairs:
        ours, theirs = turn_medians(subject), turn_medians(baseline)
        rounds = np.array(sorted(ours.keys() & theirs.keys()), dtype=np.int64)
        logs = np.log([ours[r] for r in rounds]) - np.log([theirs[r] for r in rounds])
        return cls(logs, rounds // protocol.rounds_per_sitting)

    def estimate(self, protocol: Protocol) -> Estimate:
        """The median with its percentile-bootstrap interval, widened by what two processes differ anyway."""
        resampled = np.random.default_rng(protocol.seed).choice(self.logs, size=(_N_RESAMPLES, len(self.logs)))
        tail = (1 - protocol.confidence) / 2
        low, high = np.quantile(np.median(resampled, axis=1), [tail, 1 - tail])
        middle = float(np.median(self.logs))
        process = NormalDist().inv_cdf(1 - tail) * self.process_deviation / np.sqrt(self.n_sittings)
        return Estimate(
            value=float(np.exp(middle)),
            low=float(np.exp(middle - np.hypot(middle - low, process))),
            high=float(np.exp(middle + np.hypot(high - middle, process))),
            n=len(self.logs),
        )

    @property
    def n_sittings(self) -> float:
        """How many equally long sittings would tell as much: one that has only begun adds little (Kish, 1965)."""
        _, lengths = np.unique(self.sittings, return_counts=True)
        return float(lengths.sum() ** 2 / (lengths**2).sum())

    @property
    def process_deviation(self) -> float:
        """By how much sittings differ beyond what their rounds explain, but never less than is usual.

        On a busy machine it is far more than usual: where the system puts threads lasts as long as their process.
        Source: DerSimonian and Laird, Meta-analysis in clinical trials, 1986: the variance between studies.
        """
        groups = [self.logs[self.sittings == sitting] for sitting in np.unique(self.sittings)]
        if len(groups) == 1:
            return PROCESS_DEVIATION
        medians = np.array([np.median(group) for group in groups])
        n_spare = len(self.logs) - len(groups)
        variance = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / max(1, n_spare)
        # The median of n normal values has π/2 times the variance of their mean.
        explained = np.pi / 2 * variance * np.mean([1 / len(group) for group in groups])
        return float(np.sqrt(max(PROCESS_DEVIATION**2, medians.var(ddof=1) - explained)))

    def halves(self) -> tuple[_Pairs, _Pairs]:
        half = len(self.logs) // 2
        return _Pairs(self.logs[:half], self.sittings[:half]), _Pairs(self.logs[half:], self.sittings[half:])


def ratio_of(subject: Measurement, baseline: Measurement, protocol: Protocol) -> Ratio | None:
    """The ratio with its verdict; None where the two never took part in the same round."""
    pairs = _Pairs.of(subject, baseline, protocol)
    if not len(pairs.logs):
        return None
    estimate = pairs.estimate(protocol)
    reasons = _reasons(subject, estimate, pairs, protocol)
    return Ratio(
        subject=subject.subject,
        baseline=baseline.subject,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        n_pairs=estimate.n,
        is_valid=not reasons,
        reasons=reasons,
    )


def _reasons(subject: Measurement, estimate: Estimate, pairs: _Pairs, protocol: Protocol) -> tuple[str, ...]:
    if subject.dropped_after_round is not None:
        return (
            f"{subject.subject} was dropped after {subject.dropped_after_round} turns because it was surely slower "
            "than the best; its ratio is rough.",
        )
    if estimate.n < MIN_PAIRS:
        return (f"{subject.subject} has {estimate.n} turns beside the baseline; {MIN_PAIRS} are needed.",)
    found = (_too_wide(subject, estimate), _drift(subject, pairs, protocol))
    return tuple(reason for reason in found if reason is not None)


def _too_wide(subject: Measurement, estimate: Estimate) -> str | None:
    holds_1 = estimate.low <= 1 <= estimate.high
    limit = MAX_HALF_WIDTH_AROUND_1 if holds_1 else MAX_HALF_WIDTH
    if estimate.half_width <= limit:
        return None
    return (
        f"The ratio of {subject.subject} is only known to ±{estimate.half_width:.0%} "
        f"({estimate.low:.2f} to {estimate.high:.2f}); ±{limit:.0%} are needed"
        f"{' to say whether it differs from 1' if holds_1 else ''}."
    )


def _drift(subject: Measurement, pairs: _Pairs, protocol: Protocol) -> str | None:
    if len(pairs.logs) < 2 * MIN_PAIRS:
        return None  # a half has no interval
    first, second = (half.estimate(protocol) for half in pairs.halves())
    part_ways = first.high < second.low or second.high < first.low
    if not part_ways or abs(np.log(second.value / first.value)) < MIN_DRIFT:
        return None
    return f"The ratio of {subject.subject} drifted from {first.value:.2f} to {second.value:.2f} while it was measured."


def comparison_reasons(
    baseline: Measurement, ratios: Sequence[Ratio], *, other_load: float | None, throttling: str | None = None
) -> tuple[str, ...]:
    """Why a comparison as a whole is not valid; empty where it is.

    Args:
        ratios: of the rivals that were neither dropped nor failed.
        throttling: what the machine said, where it cut its clock.
    """
    if baseline.failure is not None:
        return (f"The baseline {baseline.subject} failed: {baseline.failure}",)
    reasons = [reason for ratio in ratios for reason in ratio.reasons]
    if not ratios and len(baseline.turns_ms) < MIN_PAIRS:
        reasons.append(f"{baseline.subject} has {len(baseline.turns_ms)} turns; {MIN_PAIRS} are needed.")
    if other_load is not None and other_load > MAX_OTHER_LOAD:
        reasons.append(
            f"Other processes took {other_load:.0%} of the CPU; above {MAX_OTHER_LOAD:.0%} no ratio is trusted."
        )
    if throttling is not None:
        reasons.append(throttling)
    return tuple(reasons)
