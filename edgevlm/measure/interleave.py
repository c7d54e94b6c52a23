"""Time subjects against each other: they take turns, so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgevlm.errors import UsageError
from edgevlm.measure.conditions import (
    Counter,
    Reading,
    conditions_of,
    energy_between,
    look_here,
    read_counters_here,
)
from edgevlm.measure.environment import describe_environment
from edgevlm.measure.load import CpuTimes, read_cpu_times, read_free_memory, share_of_others
from edgevlm.measure.process import ProcessWorker, StartWorker, Worker, WorkerError
from edgevlm.measure.spec import Comparison, Environment, Measurement, Protocol, Subject
from edgevlm.measure.statistics import Estimate, comparison_reasons, paired_ratio, ratio_of
from edgevlm.measure.worker import Ran
from edgevlm.runtime.machine import describe_machine

Progress = Callable[[str, int, int], None]
"""Called with a sentence, the number of rounds done and the number of rounds at most."""

# Before a graph is opened its worker is expected to hold this much: the process with ONNX Runtime (measured: 62 MB),
# and the file's bytes as read, as initializers and as packed for the kernels.
_PROCESS_BYTES = 64 << 20
_COPIES_OF_FILE = 3


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a measurement takes from the machine; a test puts others in their place."""

    start_worker: StartWorker = ProcessWorker
    clock: Callable[[], float] = time.monotonic
    cpu_times: Callable[[], CpuTimes | None] = read_cpu_times
    own_cpu_s: Callable[[], float] = time.process_time
    free_memory: Callable[[], int | None] = read_free_memory
    environment: Callable[[], Environment] = describe_environment
    look: Callable[[], Reading | None] = look_here
    energy_counters: Callable[[], tuple[Counter, ...]] = read_counters_here


def compare(
    subjects: Sequence[Subject],
    *,
    baseline: str,
    protocol: Protocol | None = None,
    progress: Progress | None = None,
    surroundings: Surroundings | None = None,
) -> Comparison:
    """Time ``subjects`` against the one called ``baseline``, each in a process of its own, taking turns.

    A subject that crashes, hangs or is refused has a ``failure``; the others go on. Every process is ended whatever
    happens, Ctrl-C included.

    Raises: UsageError: ``baseline`` is not among the subjects, or two have the same name.
    """
    names = [subject.name for subject in subjects]
    if len(set(names)) != len(names):
        raise UsageError(f"Two subjects have the same name: {', '.join(names)}.", hint="Give each a name of its own.")
    if baseline not in names:
        raise UsageError(
            f"The baseline '{baseline}' is not among the subjects.", hint=f"Use one of: {', '.join(sorted(names))}."
        )
    measuring = _Measuring(
        subjects, baseline, protocol or Protocol(), progress or (lambda *_: None), surroundings or Surroundings()
    )
    measuring.measure()
    return measuring.comparison()


def order_of_round(names: Sequence[str], *, round_index: int, seed: int) -> tuple[str, ...]:
    """Who goes when: a fresh random order in every even round, and the same one backwards in the round after.

    So every subject follows different ones, and what drifts steadily over two rounds hits all of them alike (ABBA).
    """
    shuffled = np.random.default_rng((seed, round_index // 2)).permutation(len(names))
    order = tuple(names[i] for i in shuffled)
    return order[::-1] if round_index % 2 else order


@dataclass(kw_only=True)
class _Record:
    """What is known of one subject so far."""

    subject: Subject
    turns_ms: dict[int, tuple[float, ...]] = field(default_factory=dict)
    waits_ms: dict[int, tuple[float, ...]] = field(default_factory=dict)
    turns_j: dict[int, float] = field(default_factory=dict)
    warmup_ms: tuple[float, ...] = ()
    loads_ms: list[float] = field(default_factory=list)
    tools: dict[str, str] = field(default_factory=dict)
    memory_bytes: int | None = None
    peak_bytes: int | None = None
    dropped_after_round: int | None = None
    failure: str | None = None
    worker: Worker | None = None
    worker_cpu_s: float = 0.0  # of the worker that runs now
    ended_cpu_s: float = 0.0  # of the workers before it

    def note(self, ran: Ran) -> None:
        self.memory_bytes = ran.memory_bytes
        self.peak_bytes = ran.peak_bytes
        self.worker_cpu_s = ran.cpu_s

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None
            self.ended_cpu_s += self.worker_cpu_s
            self.worker_cpu_s = 0.0

    def measurement(self) -> Measurement:
        return Measurement(
            subject=self.subject.name,
            turns_ms=tuple(self.turns_ms.values()),
            rounds=tuple(self.turns_ms),
            warmup_ms=self.warmup_ms,
            load_ms=float(np.median(self.loads_ms)) if self.loads_ms else None,
            memory_bytes=self.memory_bytes,
            n_threads=self.subject.session.n_threads or describe_machine().n_physical_cores,
            dropped_after_round=self.dropped_after_round,
            failure=self.failure,
            waits_ms=tuple(self.waits_ms.values()),
            tools=self.tools,
            turns_j=tuple(self.turns_j.values()),
        )


class _Measuring:
    """One measurement while it lasts."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        baseline: str,
        protocol: Protocol,
        progress: Progress,
        surroundings: Surroundings,
    ) -> None:
        self.protocol = protocol
        self.progress = progress
        self.surroundings = surroundings
        self.records = {subject.name: _Record(subject=subject) for subject in subjects}
        self.baseline = self.records[baseline]
        self.rounds_done = 0  # in this group
        self.next_round = 0
        self.start_s = surroundings.clock()
        self.wall_s = 0.0
        self.loads: list[tuple[float, float]] = []
        self.sittings: list[list[Reading]] = []

    # --- groups, sittings, rounds -------------------------------------------------------------------------

    def measure(self) -> None:
        """Groups of as many subjects as memory holds at once, the baseline in each of them."""
        free_bytes = self.surroundings.free_memory()
        allowed_bytes = None if free_bytes is None else free_bytes * self.protocol.max_memory_fraction
        waiting = deque(record for record in self.records.values() if record is not self.baseline)
        try:
            while True:
                start_s = self.surroundings.clock()
                group = self._open_group(waiting, allowed_bytes)
                opening_s = self.surroundings.clock() - start_s
                self._take_sittings(group, opening_s, deadline_s=self._deadline(len(group), len(waiting)))
                self._close_all()
                if self.baseline.failure is not None or not waiting:
                    return
        finally:
            self._close_all()
            self.wall_s = self.surroundings.clock() - self.start_s

    def _open_group(self, waiting: deque[_Record], allowed_bytes: float | None) -> list[_Record]:
        """The baseline and at least one more, then what fits beside them."""
        self._open(self.baseline)
        group = [self.baseline]
        while waiting and self.baseline.failure is None:
            needed_bytes = sum(record.peak_bytes or 0 for record in group) + _expected_bytes(waiting[0])
            if allowed_bytes is not None and len(group) > 1 and needed_bytes > allowed_bytes:
                break
            record = waiting.popleft()
            self._open(record)
            if record.failure is None:
                group.append(record)
        return group

    def _open(self, record: _Record) -> None:
        self.progress(f"opening {record.subject.name}", self.rounds_done, self.protocol.n_rounds)
        with self._failing_alone(record):
            record.worker = self.surroundings.start_worker(record.subject, self.protocol)
            opened = record.worker.open()
            record.loads_ms.append(opened.load_ms)
            record.tools = opened.tools
            ran = record.worker.warm_up()
            record.note(ran)
            record.warmup_ms = record.warmup_ms or ran.samples_ms[: self.protocol.max_runs_per_turn]

    def _deadline(self, n_group: int, n_waiting: int) -> float:
        """The budget is shared by the subjects that are still to be measured."""
        now_s = self.surroundings.clock()
        left_s = max(0.0, self.start_s + self.protocol.budget_s - now_s)
        return now_s + left_s * n_group / (n_group + n_waiting)

    def _take_sittings(self, group: list[_Record], opening_s: float, *, deadline_s: float) -> None:
        """Rounds until the group is known well enough, with new processes for every sitting."""
        self.rounds_done = 0
        order = group
        for n_sittings in itertools.count(1):
            if not self._take_rounds([record for record in group if record.worker is not None], deadline_s):
                return
            if self.surroundings.clock() + opening_s >= deadline_s:
                return
            order = self._opening_order(order, n_sittings)
            self._close_all()
            for record in order:
                if record.failure is None and record.dropped_after_round is None:
                    self._open(record)

    def _opening_order(self, last: list[_Record], n_sittings: int) -> list[_Record]:
        """Backwards and anew by turns: the process opened first ran 0.5 % slower on average (docs/measuring.md)."""
        if n_sittings % 2:
            return last[::-1]
        order = np.random.default_rng((self.protocol.seed, n_sittings)).permutation(len(last))
        return [last[i] for i in order]

    def _take_rounds(self, live: list[_Record], deadline_s: float) -> bool:
        """One sitting; whether there should be another."""
        n_max = self.protocol.n_rounds
        self.next_round += -self.next_round % self.protocol.rounds_per_sitting
        self.sittings.append([])
        with self._watching_load():
            self._look()
            for _ in range(self.protocol.rounds_per_sitting):
                if self.baseline.failure is not None or self.rounds_done == n_max:
                    return False
                n_running = sum(record.worker is not None for record in live)
                self.progress(f"round {self.rounds_done + 1} of {n_max}, {n_running} in turn", self.rounds_done, n_max)
                self._take_round([record for record in live if record.worker is not None])
                self._look()
                if self.rounds_done in self.protocol.halve_at:
                    self._drop_slow(live)
                if self.surroundings.clock() >= deadline_s or self._is_precise_enough(live):
                    return False
        return self.rounds_done < n_max

    def _take_round(self, live: list[_Record]) -> None:
        names = [record.subject.name for record in live]
        for name in order_of_round(names, round_index=self.next_round, seed=self.protocol.seed):
            record = self.records[name]
            with self._failing_alone(record):
                assert record.worker is not None
                before = self.surroundings.energy_counters()
                ran = record.worker.take_turn()
                spent_j = energy_between(before, self.surroundings.energy_counters())
                record.note(ran)
                if spent_j is not None:
                    record.turns_j[self.next_round] = spent_j
                record.turns_ms[self.next_round] = ran.samples_ms
                record.waits_ms[self.next_round] = ran.waits_ms
        self.next_round += 1
        self.rounds_done += 1

    def _drop_slow(self, live: list[_Record]) -> None:
        """Successive halving, but by evidence: whoever's interval against the best lies wholly above the limit goes."""
        running = [record for record in live if record.worker is not None]
        if self.baseline not in running:
            return
        best = min(running, key=lambda record: self._estimate(record, self.baseline).value)
        for record in running:
            is_safe = record is best or record is self.baseline
            if not is_safe and self._estimate(record, best).low > self.protocol.drop_ratio:
                record.dropped_after_round = len(record.turns_ms)
                record.close()

    def _is_precise_enough(self, live: list[_Record]) -> bool:
        if self.rounds_done < self.protocol.min_rounds or self.baseline.worker is None:
            return False
        rivals = [record for record in live if record.worker is not None and record is not self.baseline]
        half_widths = [self._estimate(record, self.baseline).half_width for record in rivals]
        return all(half_width <= self.protocol.stop_half_width for half_width in half_widths)

    def _estimate(self, record: _Record, reference: _Record) -> Estimate:
        estimate = paired_ratio(record.measurement(), reference.measurement(), self.protocol)
        assert estimate is not None, "both ran in the last round"
        return estimate

    # --- what can go wrong --------------------------------------------------------------------------------

    @contextmanager
    def _failing_alone(self, record: _Record) -> Iterator[None]:
        try:
            yield
        except (WorkerError, OSError) as error:  # OSError: the system has no room for another process
            record.failure = str(error)
            record.close()

    def _close_all(self) -> None:
        for record in self.records.values():
            record.close()

    @contextmanager
    def _watching_load(self) -> Iterator[None]:
        before, ours_before_s = self.surroundings.cpu_times(), self._our_cpu_s()
        yield
        after, ours_s = self.surroundings.cpu_times(), self._our_cpu_s() - ours_before_s
        if before is not None and after is not None:
            share = share_of_others(before, after, ours_s=ours_s)
            if share is not None:
                self.loads.append((share, after.all_s - before.all_s))

    def _look(self) -> None:
        reading = self.surroundings.look()
        if reading is not None:
            self.sittings[-1].append(reading)

    def _our_cpu_s(self) -> float:
        workers_s = sum(record.worker_cpu_s + record.ended_cpu_s for record in self.records.values())
        return workers_s + self.surroundings.own_cpu_s()

    # --- the result ---------------------------------------------------------------------------------------

    def comparison(self) -> Comparison:
        baseline = self.baseline.measurement()
        rivals = [record for record in self.records.values() if record is not self.baseline]
        ran = [record.measurement() for record in rivals if record.failure is None]
        ratios = [ratio for each in ran if (ratio := ratio_of(each, baseline, self.protocol)) is not None]
        is_dropped = {record.subject.name: record.dropped_after_round is not None for record in rivals}
        other_load = _weighted_mean(self.loads)
        conditions = conditions_of(self.sittings)
        reasons = comparison_reasons(
            baseline,
            [ratio for ratio in ratios if not is_dropped[ratio.subject]],
            other_load=other_load,
            throttling=None if conditions is None else conditions.throttling,
        )
        return Comparison(
            baseline=baseline.subject,
            protocol=self.protocol,
            environment=self.surroundings.environment(),
            measurements=tuple(record.measurement() for record in self.records.values()),
            ratios=tuple(ratios),
            is_valid=not reasons,
            reasons=reasons,
            wall_s=self.wall_s,
            other_load=other_load,
            conditions=conditions,
        )


def _weighted_mean(shares: Sequence[tuple[float, float]]) -> float | None:
    weight = sum(weight for _, weight in shares)
    return sum(share * weight for share, weight in shares) / weight if weight else None


def _expected_bytes(record: _Record) -> int:
    """What a worker for this subject will hold."""
    file = Path(record.subject.file)
    try:
        parts = [part for part in file.parent.iterdir() if part.name.startswith(f"{file.stem}.")]
        n_bytes = sum(part.stat().st_size for part in parts)
    except OSError:
        n_bytes = 0  # opening it will say what is wrong
    return _PROCESS_BYTES + _COPIES_OF_FILE * n_bytes
