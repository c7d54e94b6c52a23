from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.runtime import machine

X86 = """processor\t: {n}
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9354
flags\t\t: fpu sse4_2 avx avx2 fma avx512f avx512_vnni syscall
"""
PI5 = """processor\t: {n}
Features\t: fp asimd evtstrm aes fphp asimdhp cpuid asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b
"""
LITTLE = """processor\t: {n}
Features\t: fp asimd
CPU implementer\t: 0x41
CPU part\t: 0xd05
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def siblings(*groups: str) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": g + "\n" for i, g in enumerate(groups)}


def test_an_x86_server(tmp_path: Path):
    files = {"proc/cpuinfo": "\n".join(X86.format(n=n) for n in range(4)), "proc/meminfo": "MemTotal:  1024 kB\n"}
    root = write(tmp_path, files | siblings("0,2", "1,3", "0,2", "1,3"))
    found = machine._describe_linux("x86_64", {0, 1, 2, 3}, root=root)
    assert (found.arch, found.cpu, found.name) == ("x86-64", "AMD EPYC 9354", "AMD EPYC 9354")
    assert found.isa == ("avx", "avx2", "avx512_vnni", "avx512f", "fma", "sse4_2")
    assert (found.n_physical_cores, found.n_logical_cores, found.memory_bytes) == (2, 4, 1 << 20)


def test_an_arm_board_names_its_board_and_its_cores(tmp_path: Path):
    files = {"proc/cpuinfo": PI5.format(n=0) + "\n", "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"}
    found = machine._describe_linux("aarch64", {0}, root=write(tmp_path, files))
    assert found.name == "Cortex-A76, Raspberry Pi 5 Model B Rev 1.0"
    assert found.isa == ("asimd", "asimddp", "fp16")


def test_a_model_name_that_every_arm_processor_has_is_not_its_name(tmp_path: Path):
    files = {"proc/cpuinfo": "model name\t: ARMv8 Processor rev 1 (v8l)\n" + PI5.format(n=0)}
    assert machine._describe_linux("aarch64", {0}, root=write(tmp_path, files)).cpu == "Cortex-A76"


def test_unlike_cores_have_what_all_of_them_have(tmp_path: Path):
    files = {"proc/cpuinfo": LITTLE.format(n=0) + "\n" + PI5.format(n=1)}
    found = machine._describe_linux("aarch64", {0, 1}, root=write(tmp_path, files))
    assert found.isa == ("asimd",)
    assert found.cpu == "Cortex-A55 + Cortex-A76"


@pytest.mark.parametrize(
    ("files", "n_cores", "memory_bytes"),
    [
        ({}, 4, 1 << 30),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 2, 1 << 30),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 4, 1 << 30),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "4096\n"}, 4, 4096),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/x\n2:memory:/x\n0::/\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "8192\n",
            },
            1,
            8192,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
            1 << 30,
        ),
    ],
)
def test_control_groups_limit_cores_and_memory(tmp_path: Path, files: dict[str, str], n_cores: int, memory_bytes: int):
    root = write(tmp_path, {"proc/meminfo": "MemTotal: 1048576 kB\n", **files})
    found = machine._describe_linux("x86_64", {0, 1, 2, 3}, root=root)
    assert (found.n_logical_cores, found.memory_bytes) == (n_cores, memory_bytes)


def test_affinity_limits_both_counts(tmp_path: Path):
    root = write(tmp_path, siblings("0,2", "1,3", "0,2", "1,3"))
    found = machine._describe_linux("x86_64", {0, 2}, root=root)
    assert (found.n_physical_cores, found.n_logical_cores) == (1, 2)


def test_a_system_that_tells_nothing_claims_nothing(tmp_path: Path):
    found = machine._describe_linux("riscv64", {0}, root=tmp_path)
    assert (found.arch, found.cpu, found.is_isa_known, found.isa) == ("riscv64", "unknown", False, ())


def test_an_apple_machine():
    values = {
        "machdep.cpu.brand_string": "Apple M2",
        "hw.model": "Mac14,2",
        "hw.logicalcpu": "8",
        "hw.physicalcpu": "8",
        "hw.memsize": "1024",
        "hw.optional.arm.FEAT_DotProd": "1",
        "hw.optional.arm.FEAT_I8MM": "1",
        "hw.optional.arm.FEAT_SME": "0",
    }
    found = machine._describe_macos("arm64", values)
    assert (found.arch, found.name, found.isa) == ("aarch64", "Apple M2, Mac14,2", ("asimddp", "i8mm"))
    assert (found.n_physical_cores, found.memory_bytes) == (8, 1024)


def test_this_machine_is_described():
    found = machine.describe_machine()
    assert found.n_logical_cores >= found.n_physical_cores >= 1
    assert found.arch and found.cpu and found.memory_bytes > 0
