"""What a search found."""

from __future__ import annotations

from edgevlm.measure.spec import Comparison, Measurement
from edgevlm.report.spec import CandidateRow, GroupSensitivity
from edgevlm.runtime.spec import SessionOptions, Spec


class Variant(Spec, frozen=True, kw_only=True):
    """One graph in one form.

    Args:
        name: ``fp32``, or the scheme's.
        file: the graph; ``files`` adds its external data. Both relative to the search's folder.
        recipe: how it was made, in words.
        failure: why it could not be made; then there are no files.
    """

    graph: str
    name: str
    precision: str
    backend: str
    file: str = ""
    files: tuple[str, ...] = ()
    n_bytes: int = 0
    session: SessionOptions = SessionOptions()
    recipe: dict[str, str] = {}
    failure: str | None = None


class Candidate(Spec, frozen=True, kw_only=True):
    """A variant for every graph; ``variants`` maps a graph to a variant's name."""

    name: str
    variants: dict[str, str]


class Timing(Spec, frozen=True, kw_only=True):
    """One comparison of forms of one graph, by turns."""

    graph: str
    comparison: Comparison


class SearchResult(Spec, frozen=True, kw_only=True):
    """Every variant and candidate with its verdict, and the order in which they may ship.

    Args:
        contenders: candidates that may ship, best first; the float one is last where it is inside the budgets.
        timings: in the order in which they were taken; what a later one says of a variant is what counts.
        sensitivities: what single groups of nodes cost and save, where there was time to find out.
        pareto: candidates that no other beats in time, accuracy and size at once, fastest first.
        was_cut: the time given was over before there was nothing left to try.
        is_valid: whether the latencies are to be trusted; where not, ``reasons`` say why.
    """

    variants: tuple[Variant, ...]
    candidates: tuple[Candidate, ...]
    rows: tuple[CandidateRow, ...]
    contenders: tuple[str, ...]
    timings: tuple[Timing, ...]
    sensitivities: tuple[GroupSensitivity, ...]
    pareto: tuple[str, ...]
    was_cut: bool
    metric: str
    is_valid: bool
    reasons: tuple[str, ...]

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The last one of each graph."""
        return tuple({timing.graph: timing.comparison for timing in self.timings}.values())

    @property
    def screenings(self) -> tuple[Comparison, ...]:
        """All before them."""
        return tuple(t.comparison for t in self.timings if t.comparison not in self.comparisons)

    def variants_of(self, candidate: str) -> tuple[Variant, ...]:
        """The candidate's graphs, in the order of ``variants``."""
        chosen = next(each for each in self.candidates if each.name == candidate).variants
        return tuple(v for v in self.variants if chosen.get(v.graph) == v.name)

    def row(self, candidate: str) -> CandidateRow:
        return next(row for row in self.rows if row.name == candidate)

    def measurement(self, variant: Variant) -> Measurement:
        """What counts of a variant's times."""
        return next(
            timing.comparison.measurement(variant.name)
            for timing in reversed(self.timings)
            if timing.graph == variant.graph and timing.comparison.has(variant.name)
        )
