"""A machine whose time is a number: workers that take no time, for tests of the protocol and the statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgevlm.measure.conditions import Counter, Reading
from edgevlm.measure.interleave import Surroundings
from edgevlm.measure.load import CpuTimes
from edgevlm.measure.process import WorkerError
from edgevlm.measure.spec import Environment, Measurement, Protocol, Subject
from edgevlm.measure.worker import Opened, Ran

ENVIRONMENT = Environment(
    machine="a fake", arch="x86-64", isa=(), n_cores=2, memory_bytes=1 << 30, os="none", python="3", tools={}
)


def subject(name: str, file: str = "") -> Subject:
    return Subject(name=name, backend="fake", file=file or f"/nowhere/{name}.onnx", inputs="/nowhere/inputs.npz")


@dataclass
class FakeMachine:
    """Runs take what ``run_ms`` says for a subject at a turn (counted from 0 over all its processes).

    Args:
        fails_at: subject -> the turn in which its process dies; -1 is when it is opened.
        peak_bytes: what each worker holds.
        other_load: share of the two cores that others take.
        reading: what the machine says of itself at a time.
    """

    run_ms: Callable[[str, int], float]
    fails_at: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    free_bytes: int | None = None
    other_load: float = 0.0
    now_s: float = 0.0
    turns: list[str] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    open_now: set[str] = field(default_factory=set)
    most_open: int = 0
    reading: Callable[[float], Reading] | None = None
    has_energy: bool = False

    def surroundings(self) -> Surroundings:
        return Surroundings(
            start_worker=lambda subject, protocol: FakeWorker(self, subject, protocol),
            clock=lambda: self.now_s,
            cpu_times=self.cpu_times,
            own_cpu_s=lambda: 0.0,
            free_memory=lambda: self.free_bytes,
            environment=lambda: ENVIRONMENT,
            look=self.look,
            energy_counters=self.energy_counters,
        )

    def look(self) -> Reading | None:
        return self.reading(self.now_s) if self.reading else None

    def energy_counters(self) -> tuple[Counter, ...]:
        """A counter that rises by 10 W and begins anew after 5 J."""
        return (Counter(value_uj=round(self.now_s * 10e6) % 5_000_000, range_uj=5_000_000),) if self.has_energy else ()

    def cpu_times(self) -> CpuTimes:
        """One core is ours, of the other one others take a part."""
        return CpuTimes(used_s=self.now_s * 2 * self.other_load, stolen_s=0.0, all_s=self.now_s * 2)


class FakeWorker:
    def __init__(self, machine: FakeMachine, subject: Subject, protocol: Protocol) -> None:
        self.machine, self.name, self.protocol = machine, subject.name, protocol

    def open(self) -> Opened:
        self.machine.opened.append(self.name)
        self.machine.open_now.add(self.name)
        self.machine.most_open = max(self.machine.most_open, len(self.machine.open_now))
        if self.machine.fails_at.get(self.name) == -1:
            raise WorkerError("It does not open.")
        return Opened(load_ms=10.0, cpu_s=0.0)

    def warm_up(self) -> Ran:
        return self._run([self.machine.run_ms(self.name, 0)] * 2)

    def take_turn(self) -> Ran:
        turn = self.machine.turns.count(self.name)
        self.machine.turns.append(self.name)
        if self.machine.fails_at.get(self.name) == turn:
            raise WorkerError("It died.")
        return self._run([self.machine.run_ms(self.name, turn)] * 3)

    def close(self) -> None:
        self.machine.open_now.discard(self.name)

    def _run(self, samples_ms: list[float]) -> Ran:
        self.machine.now_s += sum(samples_ms) / 1e3
        return Ran(
            samples_ms=tuple(samples_ms),
            waits_ms=(0.0,) * len(samples_ms),
            peak_bytes=self.machine.peak_bytes,
            memory_bytes=self.machine.peak_bytes // 2,
            cpu_s=0.0,
        )


def noisy(base_ms: dict[str, float], *, deviation: float = 0.02, seed: int = 0) -> Callable[[str, int], float]:
    """Run times with log-normal noise from turn to turn, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return lambda name, turn: float(base_ms[name] * np.exp(rng.normal(0, deviation)))


def measurement(name: str, turns_ms: Sequence[float], **changes: object) -> Measurement:
    """One run per turn, rounds in order."""
    facts: dict[str, object] = {
        "subject": name,
        "turns_ms": tuple((float(ms),) for ms in turns_ms),
        "rounds": tuple(range(len(turns_ms))),
        "warmup_ms": (),
        "load_ms": 1.0,
        "memory_bytes": 1,
        "n_threads": 1,
    }
    return Measurement(**{**facts, **changes})  # type: ignore[arg-type]
