from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edgevlm.measure import load
from edgevlm.measure.environment import describe_environment, fingerprint
from edgevlm.measure.load import CpuTimes, parse_cpu_times, read_cpu_times, read_free_memory, share_of_others
from edgevlm.measure.protocol import extended
from edgevlm.measure.spec import Protocol
from edgevlm.runtime.machine import describe_machine
from tests.measure.fakes import ENVIRONMENT

STAT = """cpu  300 100 200 3000 400 10 20 70 50 5
cpu0 150 50 100 1500 200 5 10 35 25 2
intr 12345
"""


def test_this_machine_is_described():
    environment = describe_environment()
    assert environment.n_cores >= 1
    assert environment.arch
    assert {"edgevlm", "numpy", "onnxruntime"} <= environment.tools.keys()
    assert describe_environment() == environment


@pytest.mark.parametrize(
    "change",
    [
        {"machine": "another"},
        {"isa": ("avx2",)},
        {"n_cores": 3},
        {"memory_bytes": 2 << 30},
        {"tools": {"onnxruntime": "1.0"}},
    ],
)
def test_another_machine_or_another_tool_has_another_fingerprint(change: dict[str, object]):
    assert fingerprint(msgspec.structs.replace(ENVIRONMENT, **change)) != fingerprint(ENVIRONMENT)


def test_a_fingerprint_does_not_hang_on_a_few_megabytes_or_on_the_order_of_tools():
    assert fingerprint(msgspec.structs.replace(ENVIRONMENT, memory_bytes=(1 << 30) - 5_000_000)) == fingerprint(
        ENVIRONMENT
    )
    one, other = ({"a": "1", "b": "2"}, {"b": "2", "a": "1"})
    assert fingerprint(msgspec.structs.replace(ENVIRONMENT, tools=one)) == fingerprint(
        msgspec.structs.replace(ENVIRONMENT, tools=other)
    )


def test_cpu_times_are_read_from_the_first_line():
    times = parse_cpu_times(STAT, ticks_per_s=100)
    assert times.used_s == pytest.approx(6.3)  # user, nice, system, irq, softirq; guests are within user and nice
    assert times.stolen_s == pytest.approx(0.7)
    assert times.all_s == pytest.approx(41.0)


def test_the_share_of_others_is_what_was_used_less_what_is_ours():
    before = CpuTimes(used_s=100, stolen_s=1, all_s=1000)
    after = CpuTimes(used_s=106, stolen_s=2, all_s=1020)
    assert share_of_others(before, after, ours_s=4.0) == pytest.approx((6 - 4 + 1) / 20)
    assert share_of_others(before, after, ours_s=50.0) == 0.0, "clocks of unlike grain may disagree a little"
    assert share_of_others(before, before, ours_s=0.0) is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat is Linux's")
def test_a_busy_process_is_seen():
    before = read_cpu_times()
    subprocess.run(
        [sys.executable, "-c", "import time; e = time.time() + 0.5\nwhile time.time() < e: pass"], check=True
    )
    after = read_cpu_times()
    assert before is not None
    assert after is not None
    assert after.used_s - before.used_s > 0.3
    assert after.all_s > before.all_s


def test_extended_means_twice_of_everything_and_other_dice():
    longer = extended(Protocol())
    assert longer.n_rounds == 2 * Protocol().n_rounds
    assert longer.budget_s == 2 * Protocol().budget_s
    assert longer.seed != Protocol().seed


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells how much memory is free")
def test_no_more_memory_is_free_than_a_container_may_take(monkeypatch: pytest.MonkeyPatch):
    free = read_free_memory()
    assert free is not None
    assert 0 < free <= describe_machine().memory_bytes
    small = msgspec.structs.replace(describe_machine(), memory_bytes=5_000_000)
    monkeypatch.setattr(load, "describe_machine", lambda: small)
    assert read_free_memory() == 5_000_000
