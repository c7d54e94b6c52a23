"""What a measurement is made of: raw samples first, everything else derived."""

from __future__ import annotations

import numpy as np

from edgevlm.runtime.spec import SessionOptions, Spec


class Subject(Spec, frozen=True, kw_only=True):
    """A graph to be timed: any backend's, opened in a worker of its own.

    Args:
        name: unique among the subjects of one measurement.
        backend: a name in ``edgevlm.runtime.backends``.
        file: path of the graph.
        inputs: path of an ``.npz`` with one array per input.
    """

    name: str
    backend: str
    file: str
    inputs: str
    session: SessionOptions = SessionOptions()


class Protocol(Spec, frozen=True, kw_only=True):
    """How to measure. The defaults are for models of 1 to 100 ms; see ``docs/measuring.md``.

    Args:
        n_rounds: turns that a subject which is never dropped gets.
        block_ms: a turn lasts about this long, at least ``min_runs_per_turn`` runs.
        halve_at: after these rounds, drop a subject whose ratio to the best is surely worse than ``drop_ratio``.
        budget_s: stop adding rounds after this long (what is missing then shows in the verdict).
        max_memory_fraction: workers held open at once may use this share of the free memory.
    """

    n_rounds: int = 20
    block_ms: float = 60.0
    min_runs_per_turn: int = 3
    warmup_ms: float = 300.0
    halve_at: tuple[int, ...] = (4, 8)
    drop_ratio: float = 1.10
    budget_s: float = 120.0
    max_memory_fraction: float = 0.5
    confidence: float = 0.95
    seed: int = 0


class Environment(Spec, frozen=True, kw_only=True):
    """Where a measurement was taken. ``fingerprint`` of it keys the store."""

    machine: str
    arch: str
    isa: tuple[str, ...]
    n_cores: int
    memory_bytes: int
    os: str
    python: str
    tools: dict[str, str]


class Measurement(Spec, frozen=True, kw_only=True):
    """Raw samples of one subject.

    Shapes: ``turns_ms[i]`` holds every run's latency in the subject's i-th turn; ``rounds[i]`` says in which round.
    Args:
        load_ms: from an empty process with the backend imported to a session ready to run.
        memory_bytes: peak resident memory of the worker less what it held before the graph was opened.
        dropped_after_round: the round after which it was dropped as surely slower; null where it stayed.
        failure: why it could not run at all, in the backend's words; then there are no samples.
    """

    subject: str
    turns_ms: tuple[tuple[float, ...], ...]
    rounds: tuple[int, ...]
    warmup_ms: tuple[float, ...]
    load_ms: float
    memory_bytes: int
    n_threads: int
    dropped_after_round: int | None = None
    failure: str | None = None

    def samples_ms(self) -> tuple[float, ...]:
        return tuple(sample for turn in self.turns_ms for sample in turn)

    def percentile_ms(self, q: float) -> float:
        """The q-th percentile (0 to 100) over all runs after warm-up."""
        return float(np.percentile(self.samples_ms(), q))


class Ratio(Spec, frozen=True, kw_only=True):
    """Time of ``subject`` ÷ time of ``baseline``, median of the paired turns, with its bootstrap interval."""

    subject: str
    baseline: str
    value: float
    low: float
    high: float
    n_pairs: int
    is_valid: bool
    reasons: tuple[str, ...] = ()


class Comparison(Spec, frozen=True, kw_only=True):
    """Everything that one interleaved measurement saw."""

    baseline: str
    protocol: Protocol
    environment: Environment
    measurements: tuple[Measurement, ...]
    ratios: tuple[Ratio, ...]
    is_valid: bool
    reasons: tuple[str, ...]
    wall_s: float
    was_extended: bool = False

    def measurement(self, subject: str) -> Measurement:
        return next(m for m in self.measurements if m.subject == subject)

    def ratio(self, subject: str) -> Ratio | None:
        return next((r for r in self.ratios if r.subject == subject), None)
