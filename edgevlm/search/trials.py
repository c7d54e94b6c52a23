"""What a search knows of one graph's forms, and what follows for several graphs' forms together. No work here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgevlm.evaluation.evaluation import Drop
from edgevlm.measure.spec import Comparison, Measurement, Ratio
from edgevlm.search.choose import FLOAT, Trial
from edgevlm.search.spec import Candidate, Timing, Variant

# Combinations of several graphs' variants that are judged at most, fastest first: two towers with six variants each
# give 36, and what is not among the fastest dozen will not ship.
MAX_COMBINATIONS = 12


@dataclass(kw_only=True)
class GraphTrials:
    """One graph's variants, with every timing, drop and failure so far.

    Args:
        drops: by variant, judged with the other graphs in float.
        failures: why a variant could not be judged.
    """

    graph: str
    variants: dict[str, Variant] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    drops: dict[str, Drop] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def comparison_of(self, name: str) -> Comparison | None:
        """The last one that the variant took part in."""
        return next((t.comparison for t in reversed(self.timings) if t.comparison.has(name)), None)

    def measurement(self, name: str) -> Measurement | None:
        found = self.comparison_of(name)
        return found.measurement(name) if found else None

    def ratio(self, name: str) -> Ratio | None:
        found = self.comparison_of(name)
        return found.ratio(name) if found else None

    def is_rough(self, name: str) -> bool:
        """It did not take part in the last comparison, which is of the best."""
        return not (self.timings and self.timings[-1].comparison.has(name))

    def trial(self, name: str) -> Trial:
        """The variant as a candidate of its own, the other graphs in float."""
        variant, measured, ratio = self.variants[name], self.measurement(name), self.ratio(name)
        drop = self.drops.get(name)
        failure = variant.failure or self.failures.get(name) or (measured.failure if measured else None)
        if failure or measured is None:
            return Trial(name=name, failure=failure or "it was not timed")
        return Trial(
            name=name,
            size_bytes=variant.n_bytes,
            p50_ms=measured.percentile_ms(50),
            ratio=ratio.value if ratio else None,
            ratio_low=ratio.low if ratio else None,
            ratio_high=ratio.high if ratio else None,
            drop=drop.value if drop else None,
            invalid_because=ratio.reasons if ratio and not ratio.is_valid else (),
            is_rough=self.is_rough(name),
            was_dropped=measured.dropped_after_round is not None,
        )

    def is_faster(self, name: str) -> bool:
        """Surely faster than float."""
        ratio = self.ratio(name)
        return self.ran(name) and ratio is not None and ratio.is_valid and ratio.high < 1

    def ran(self, name: str) -> bool:
        """To the end of its comparison."""
        trial = self.trial(name)
        return not trial.failure and not trial.was_dropped


Known = Mapping[str, GraphTrials]
"""By graph, in the order in which the graphs run."""


def candidates_of(known: Known, *, must_be_faster: bool = True) -> tuple[Candidate, ...]:
    """Float first. One graph: every variant. Several: combinations of those that beat float, fastest first.

    Args: must_be_faster: else of all that ran, smallest first: what was asked for is a size or a precision.
    """
    if len(known) == 1:
        ((graph, trials),) = known.items()
        return tuple(Candidate(name=name, variants={graph: name}) for name in trials.variants)

    def is_hopeful(trials: GraphTrials, name: str) -> bool:
        return trials.is_faster(name) if must_be_faster else trials.ran(name)

    hopeful = [
        [v for v in trials.variants.values() if v.name == FLOAT or is_hopeful(trials, v.name)]
        for trials in known.values()
    ]
    combined = [
        Candidate(name=_combined_name(members), variants={v.graph: v.name for v in members})
        for members in itertools.product(*hopeful)
    ]

    def rank(candidate: Candidate) -> float:
        if not must_be_faster:
            return sum(member.n_bytes for member in members_of(candidate, known))
        ratio = combined_ratio(candidate, known)
        return ratio.value if ratio else 1.0

    return (combined[0], *sorted(combined[1:], key=rank)[:MAX_COMBINATIONS])


def _combined_name(members: tuple[Variant, ...]) -> str:
    names = {variant.name for variant in members}
    return names.pop() if len(names) == 1 else "+".join(f"{v.graph.split('_')[0]}:{v.name}" for v in members)


def members_of(candidate: Candidate, known: Known) -> tuple[Variant, ...]:
    return tuple(trials.variants[candidate.variants[graph]] for graph, trials in known.items())


def measurements_of(candidate: Candidate, known: Known) -> tuple[Measurement | None, ...]:
    return tuple(trials.measurement(candidate.variants[graph]) for graph, trials in known.items())


def combined_ratio(candidate: Candidate, known: Known) -> Ratio | None:
    """Time of the candidate ÷ time of float over all graphs together, each weighed by its float time.

    The bounds add up too, which makes the interval wider than need be, never narrower.
    """
    if candidate.name == FLOAT:
        return None
    weights = {}
    for graph, trials in known.items():
        measured = trials.measurement(FLOAT)
        assert measured is not None, "float is timed first"
        weights[graph] = measured.percentile_ms(50)
    total = sum(weights.values())
    parts = []
    for graph, trials in known.items():
        name = candidate.variants[graph]
        ratio = trials.ratio(name)
        if name == FLOAT:
            ratio = Ratio(subject=FLOAT, baseline=FLOAT, value=1, low=1, high=1, n_pairs=0, is_valid=True)
        if ratio is None:
            return None
        parts.append((weights[graph] / total, ratio))
    return Ratio(
        subject=candidate.name,
        baseline=FLOAT,
        value=sum(weight * ratio.value for weight, ratio in parts),
        low=sum(weight * ratio.low for weight, ratio in parts),
        high=sum(weight * ratio.high for weight, ratio in parts),
        n_pairs=min((ratio.n_pairs for _, ratio in parts if ratio.n_pairs), default=0),
        is_valid=all(ratio.is_valid for _, ratio in parts),
        reasons=tuple(reason for _, ratio in parts for reason in ratio.reasons),
    )
