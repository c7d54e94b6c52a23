"""The machine at hand: architecture, instruction sets that matter to inference, cores and memory."""

from __future__ import annotations

import functools
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgevlm.runtime.spec import Spec

_ARCHES = {"amd64": "x86-64", "x86_64": "x86-64", "x64": "x86-64", "arm64": "aarch64", "i386": "x86", "i686": "x86"}

# The names are Linux's (/proc/cpuinfo), but for `fp16`, which Linux calls asimdhp on ARM. What is not here does not
# change which kernels ONNX Runtime, OpenVINO or PyTorch pick.
_ISA = frozenset({
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx_vnni_int8", "avx512f", "avx512bw", "avx512dq", "avx512vl",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "fp16", "i8mm", "bf16", "sve", "sve2", "sme",
})  # fmt: skip
_OTHER_NAMES = {
    "asimdhp": "fp16",
    # macOS: hw.optional.arm.*
    "AdvSIMD": "asimd", "FEAT_DotProd": "asimddp", "FEAT_FP16": "fp16", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16",
    "FEAT_SME": "sme",
    # macOS on Intel: machdep.cpu.features, machdep.cpu.leaf7_features
    "sse4.2": "sse4_2", "avx1.0": "avx", "avx512vnni": "avx512_vnni",
}  # fmt: skip

# ARM's cpuinfo has numbers for names: implementer 0x41 is Arm Ltd (Linux, arch/arm64/include/asm/cputype.h).
_ARM_PARTS = {
    "0xd03": "Cortex-A53", "0xd04": "Cortex-A35", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57", "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73", "0xd0a": "Cortex-A75", "0xd0b": "Cortex-A76", "0xd0c": "Neoverse-N1", "0xd0d": "Cortex-A77",
    "0xd40": "Neoverse-V1", "0xd41": "Cortex-A78", "0xd42": "Cortex-A78AE", "0xd46": "Cortex-A510",
    "0xd47": "Cortex-A710", "0xd49": "Neoverse-N2", "0xd4d": "Cortex-A715", "0xd4f": "Neoverse-V2",
}  # fmt: skip


EMULATED = "EDGEVLM_EMULATED"
"""Set by whoever runs this process under an emulator: times taken here are then nobody's."""


class Machine(Spec, frozen=True, kw_only=True):
    """What inference can use here.

    Args:
        arch: ``x86-64``, ``aarch64``, or what the system calls it.
        isa: sorted; on a machine with unlike cores, what all of them have.
        is_isa_known: False where the system does not tell; then nothing may be concluded from ``isa``.
        cpu: the processor's name.
        board: the device tree's name of the board, or empty.
        n_physical_cores: cores this process may use, by its affinity.
        n_logical_cores: hardware threads this process may use, by its affinity and its group's quota.
        memory_bytes: installed, or its group's limit where that is less.
    """

    arch: str
    isa: tuple[str, ...]
    is_isa_known: bool
    cpu: str
    board: str
    n_physical_cores: int
    n_logical_cores: int
    memory_bytes: int
    os: str

    @property
    def name(self) -> str:
        """What tells machines with the same speed and the same rounding apart from others."""
        return f"{self.cpu}, {self.board}" if self.board else self.cpu


@functools.lru_cache(maxsize=1)
def describe_machine() -> Machine:
    """This machine, as this process sees it; looked at once."""
    if sys.platform == "darwin":
        return _describe_macos(platform.machine(), _read_sysctl())
    if sys.platform == "linux":
        return _describe_linux(platform.machine(), os.sched_getaffinity(0), root=Path("/"))
    n_logical = os.cpu_count() or 1
    return Machine(
        arch=normal_arch(platform.machine()), isa=(), is_isa_known=False, cpu=platform.processor() or "unknown",
        board="", n_physical_cores=n_logical, n_logical_cores=n_logical, memory_bytes=0, os=platform.system(),
    )  # fmt: skip


def emulated_cpu() -> str:
    """The processor that an emulator stands in for while this runs, as it says itself; empty on a real machine."""
    return os.environ.get(EMULATED, "")


def is_running(pid: int) -> bool:
    """Whether a process of that number is there; True where the system does not tell without harm."""
    if os.name != "posix":
        return True  # Windows would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def normal_arch(machine: str) -> str:
    """The one name of an architecture.

    Example:
        >>> normal_arch("AMD64"), normal_arch("arm64")
        ('x86-64', 'aarch64')
    """
    return _ARCHES.get(machine.lower(), machine.lower())


def _describe_linux(machine: str, affinity: Iterable[int], *, root: Path) -> Machine:
    cpus = sorted(affinity)
    blocks = _read_cpuinfo(root / "proc/cpuinfo")
    features = [words.split() for block in blocks if (words := block.get("flags") or block.get("Features"))]
    common = set(features[0]).intersection(*features[1:]) if features else set()
    return Machine(
        arch=normal_arch(machine),
        isa=_known_isa(common),
        is_isa_known=bool(features),
        cpu=_cpu_name(blocks),
        board=_read(root / "proc/device-tree/model").strip("\0\n "),
        n_physical_cores=_count_cores(cpus, root),
        n_logical_cores=max(1, min(len(cpus), _cpu_quota(root))),
        memory_bytes=_linux_memory(root),
        os=f"{platform.system()} {platform.release()}",
    )


def _read_cpuinfo(file: Path) -> list[dict[str, str]]:
    blocks = []
    for text in _read(file).split("\n\n"):
        pairs = (line.partition(":") for line in text.splitlines())
        blocks.append({key.strip(): value.strip() for key, _, value in pairs})
    return [block for block in blocks if block]


def _cpu_name(blocks: list[dict[str, str]]) -> str:
    names: dict[str, None] = {}
    for block in blocks:
        implementer, part = block.get("CPU implementer"), block.get("CPU part")
        # First: what QEMU and 32-bit processes are told as "model name" is the same for every ARM processor.
        if implementer == "0x41" and part in _ARM_PARTS:
            names[_ARM_PARTS[part]] = None
        elif name := block.get("model name"):
            names[name] = None
        elif part:
            names[f"{implementer or '?'}/{part}"] = None
    return " + ".join(names) or "unknown"


def _known_isa(features: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(_ISA.intersection(_OTHER_NAMES.get(feature, feature) for feature in features)))


def _count_cores(cpus: list[int], root: Path) -> int:
    folder = root / "sys/devices/system/cpu"
    siblings = {_read(folder / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return max(1, len(siblings))


def _cpu_quota(root: Path) -> int:
    """How many cores' worth of time the control groups give, rounded up; a large number where there is no limit."""
    limits = [math.inf]
    for folder in _groups("cpu", root):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        quota = quota or _read(folder / "cpu.cfs_quota_us")
        period = period or _read(folder / "cpu.cfs_period_us")
        if quota.strip().isdigit() and period.strip().isdigit():  # "max" and "-1" say that there is no limit
            limits.append(math.ceil(int(quota) / int(period)))
    return int(min(limits)) if len(limits) > 1 else sys.maxsize


def _linux_memory(root: Path) -> int:
    limits = []
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * 1024)
    for folder in _groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (text := _read(folder / name).strip()).isdigit():
                limits.append(int(text))
    return min(limits, default=0)


def _groups(controller: str, root: Path) -> list[Path]:
    """This process's control group for ``controller`` and the groups around it, version 1 or 2."""
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        folders += [top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    return folders


def _describe_macos(machine: str, values: Mapping[str, str]) -> Machine:
    arm = "hw.optional.arm."
    features = [key.removeprefix(arm) for key, value in values.items() if key.startswith(arm) and value == "1"]
    for key in ("machdep.cpu.features", "machdep.cpu.leaf7_features"):
        features += values.get(key, "").lower().split()
    n_logical = int(values.get("hw.logicalcpu", os.cpu_count() or 1))
    return Machine(
        arch=normal_arch(machine),
        isa=_known_isa(features),
        is_isa_known=bool(features),
        cpu=values.get("machdep.cpu.brand_string", "unknown"),
        board=values.get("hw.model", ""),
        n_physical_cores=int(values.get("hw.physicalcpu", n_logical)),
        n_logical_cores=n_logical,
        memory_bytes=int(values.get("hw.memsize", 0)),
        os=f"{platform.system()} {platform.release()}",
    )


def _read_sysctl() -> dict[str, str]:
    command = ["/usr/sbin/sysctl", "hw", "machdep.cpu"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    pairs = (line.partition(":") for line in output.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
