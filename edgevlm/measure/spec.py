"""What a measurement is made of: raw samples first, everything else derived."""

from __future__ import annotations

import numpy as np

from edgevlm.measure.conditions import Conditions
from edgevlm.runtime.spec import SessionOptions, Spec

# Runs before each turn that are not reported: they bring caches and threads back from the rival.
SETTLING_RUNS = 1


class Subject(Spec, frozen=True, kw_only=True):
    """A graph to be timed: any backend's, opened in a worker of its own.

    Args:
        name: unique among the subjects of one measurement.
        backend: a name in ``edgevlm.runtime.backends``, or ``package.module:attribute`` for something else that has
            the same methods (a rival in a benchmark). The latter runs code: never take it from a bundle.
        file: path of the graph.
        inputs: path of an ``.npz`` with one array per input.
        python: the interpreter of the worker, 3.11 or newer, where the subject lives in an environment of its own; that
            needs numpy, msgspec and what the backend imports, and takes edgevlm from here. Empty: this one.
    """

    name: str
    backend: str
    file: str
    inputs: str
    session: SessionOptions = SessionOptions()
    python: str = ""


class Protocol(Spec, frozen=True, kw_only=True):
    """How to measure. The defaults are for models of 1 to 100 ms; see ``docs/measuring.md``.

    Args:
        n_rounds: turns that a subject which is never dropped gets at most.
        rounds_per_sitting: after so many rounds every worker is started anew, in another order: what differs between
            two processes of the same graph then averages out.
        min_rounds: rounds before measuring may stop because every interval is narrow enough.
        stop_half_width: narrow enough: half of the interval's width over the ratio.
        block_ms: a turn lasts about this long, at least ``min_runs_per_turn`` and at most ``max_runs_per_turn`` runs;
            a single one where that takes a second.
        warmup_ms: every worker runs for at least this long before its first turn.
        halve_at: after these rounds, drop a subject whose ratio to the best is surely worse than ``drop_ratio``.
        budget_s: stop adding rounds after this long (what is missing then shows in the verdict).
        timeout_s: a worker that stays silent for this long during one command is stopped and counts as failed.
        max_memory_fraction: workers held open at once may use this share of the free memory.
    """

    n_rounds: int = 40
    rounds_per_sitting: int = 10
    min_rounds: int = 20
    stop_half_width: float = 0.02
    block_ms: float = 25.0
    min_runs_per_turn: int = 3
    max_runs_per_turn: int = 200
    warmup_ms: float = 300.0
    halve_at: tuple[int, ...] = (6, 12)
    drop_ratio: float = 1.10
    budget_s: float = 120.0
    timeout_s: float = 120.0
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

    Shapes: ``turns_ms[i]`` holds every run's wall-clock latency in the subject's i-th turn, ``waits_ms[i]`` how much
        of each the run was ready to go on while other processes had the CPU (empty: the system does not tell);
        ``rounds[i]`` says in which round. Rounds of one sitting share ``rounds[i] // rounds_per_sitting``.
    Args:
        warmup_ms: the first runs of all, the very first included.
        load_ms: median of the times from a process with the backend imported to a session
            ready to run; null where it never opened.
        memory_bytes: peak resident memory of the worker less what it held before the graph was opened; null where the
            system does not tell.
        dropped_after_round: the number of turns after which it was dropped as surely slower; null where it stayed.
        failure: why it could not run, or not to the end, in the backend's words; then it has no ratio.
        tools: versions in its worker, by name; empty where it never opened.
        turns_j: the energy that the processor package took in each turn, other processes' part and the settling run's
            included; empty where the system does not tell.
    """

    subject: str
    turns_ms: tuple[tuple[float, ...], ...]
    rounds: tuple[int, ...]
    warmup_ms: tuple[float, ...]
    load_ms: float | None
    memory_bytes: int | None
    n_threads: int
    dropped_after_round: int | None = None
    failure: str | None = None
    waits_ms: tuple[tuple[float, ...], ...] = ()
    tools: dict[str, str] = {}
    turns_j: tuple[float, ...] = ()

    def own_turns_ms(self) -> tuple[tuple[float, ...], ...]:
        """What the runs took by themselves: wall-clock time less the waits. On a quiet machine the two are equal."""
        if not self.waits_ms:
            return self.turns_ms
        pairs = zip(self.turns_ms, self.waits_ms, strict=True)
        return tuple(tuple(t - w for t, w in zip(turn, waits, strict=True)) for turn, waits in pairs)

    def samples_ms(self) -> tuple[float, ...]:
        """All runs after warm-up, less the waits."""
        return tuple(sample for turn in self.own_turns_ms() for sample in turn)

    def energy_j(self) -> float | None:
        """The energy of one run, the mean over the turns; None where the system does not tell."""
        n_runs = sum(len(turn) + SETTLING_RUNS for turn in self.turns_ms)
        return sum(self.turns_j) / n_runs if self.turns_j and len(self.turns_j) == len(self.turns_ms) else None

    def percentile_ms(self, q: float) -> float:
        """The q-th percentile (0 to 100) of ``samples_ms``."""
        return float(np.percentile(self.samples_ms(), q))


class Ratio(Spec, frozen=True, kw_only=True):
    """Time of ``subject`` ÷ time of ``baseline`` over the paired turns, with its bootstrap interval; below 1 is faster.

    ``reasons`` say in sentences why it is not valid, or that the subject was dropped early.
    """

    subject: str
    baseline: str
    value: float
    low: float
    high: float
    n_pairs: int
    is_valid: bool
    reasons: tuple[str, ...] = ()


class Comparison(Spec, frozen=True, kw_only=True):
    """Everything that one interleaved measurement saw.

    ``other_load`` is the share of the machine's CPU time that other processes and other guests of the host took while
    turns were taken; null where the system does not tell. ``reasons`` say in sentences why it is not valid.
    ``conditions`` is what the machine said of itself meanwhile; null where it was not asked.
    """

    baseline: str
    protocol: Protocol
    environment: Environment
    measurements: tuple[Measurement, ...]
    ratios: tuple[Ratio, ...]
    is_valid: bool
    reasons: tuple[str, ...]
    wall_s: float
    other_load: float | None = None
    was_extended: bool = False
    conditions: Conditions | None = None

    def has(self, subject: str) -> bool:
        return any(m.subject == subject for m in self.measurements)

    def measurement(self, subject: str) -> Measurement:
        return next(m for m in self.measurements if m.subject == subject)

    def ratio(self, subject: str) -> Ratio | None:
        return next((r for r in self.ratios if r.subject == subject), None)
