"""How busy the machine is with other things, and how much memory is free. Linux tells; elsewhere the answer is None."""

from __future__ import annotations

import os
from pathlib import Path

from edgevlm.runtime.machine import describe_machine
from edgevlm.runtime.spec import Spec


class CpuTimes(Spec, frozen=True, kw_only=True):
    """Seconds since boot, summed over the cores.

    Args:
        used_s: taken by processes and by the kernel.
        stolen_s: taken by other guests of the host.
        all_s: everything, idle time included.
    """

    used_s: float
    stolen_s: float
    all_s: float


def read_cpu_times() -> CpuTimes | None:
    try:
        text = Path("/proc/stat").read_text(encoding="ascii")
    except OSError:
        return None
    return parse_cpu_times(text, ticks_per_s=os.sysconf("SC_CLK_TCK"))


def parse_cpu_times(stat: str, *, ticks_per_s: int) -> CpuTimes:
    """The first line of ``/proc/stat``.

    Source: proc(5). guest and guest_nice are left out: user and nice hold them already.
    """
    user, nice, system, idle, iowait, irq, softirq, steal = (int(word) / ticks_per_s for word in stat.split()[1:9])
    used = user + nice + system + irq + softirq
    return CpuTimes(used_s=used, stolen_s=steal, all_s=used + steal + idle + iowait)


def share_of_others(before: CpuTimes, after: CpuTimes, *, ours_s: float) -> float | None:
    """The share of all CPU time between two readings that went to others; ``ours_s`` is what this measurement used."""
    all_s = after.all_s - before.all_s
    if all_s <= 0:
        return None
    others_s = (after.used_s - before.used_s) - ours_s + (after.stolen_s - before.stolen_s)
    return min(1.0, max(0.0, others_s / all_s))


def read_free_memory() -> int | None:
    """Bytes that can be taken without swapping, at most what this process's group is allowed."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return None if free is None else min(free, describe_machine().memory_bytes)
