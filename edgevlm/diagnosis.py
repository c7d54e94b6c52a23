"""Is everything here that edgevlm needs, and what does this machine mean for speed?"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from typing import Literal

from edgevlm.data_files import data_names
from edgevlm.errors import MissingToolError
from edgevlm.extras import COMPILE_MODULES, INSTALL_COMPILE, missing_compile_modules, tool_versions
from edgevlm.runtime.backends import BACKENDS, install_command, load_backend
from edgevlm.runtime.machine import Machine, describe_machine
from edgevlm.runtime.spec import Spec
from edgevlm.store import cache_root

# A compile of a CLIP ViT-B/32 with its candidates takes about 2 GB of the cache.
_LOW_DISK_BYTES = 4_000_000_000


class Check(Spec, frozen=True, kw_only=True):
    """One finding. ``ok`` is fine, ``note`` is worth knowing, ``missing`` stops some verbs, ``broken`` stops all."""

    name: str
    state: Literal["ok", "note", "missing", "broken"]
    finding: str
    remedy: str = ""


def doctor() -> tuple[Check, ...]:
    """Look at Python, the libraries, the CPU, memory, disk and settings; nothing heavy is imported."""
    machine = describe_machine()
    return (
        _python(),
        *_runtime(),
        _compile_side(),
        _torchvision(),
        _processor(machine),
        _threads(machine),
        _cache(),
        _data(),
        _emulator(),
        _ssh(),
    )


def _python() -> Check:
    return Check(name="python", state="ok", finding=f"{sys.version.split()[0]} at {sys.executable}")


def _runtime() -> tuple[Check, ...]:
    return tuple(_backend(name) for name in BACKENDS)


def _backend(name: str) -> Check:
    """The base install has the first; the others are extras, and without them there are fewer candidates."""
    version = load_backend(name).version()
    if version:
        return Check(name=f"backend {name}", state="ok", finding=version)
    return Check(
        name=f"backend {name}",
        state="broken" if name == next(iter(BACKENDS)) else "note",
        finding="not installed, or does not load",
        remedy=install_command(name),
    )


def _compile_side() -> Check:
    missing = missing_compile_modules()
    if missing:
        return Check(
            name="compile side", state="missing", finding=f"without {', '.join(missing)}", remedy=INSTALL_COMPILE
        )
    versions = tool_versions(*COMPILE_MODULES)
    return Check(name="compile side", state="ok", finding=", ".join(f"{k} {v}" for k, v in versions.items()))


def _torchvision() -> Check:
    torchvision, torch = tool_versions("torchvision"), tool_versions("torch")
    if not torchvision:
        return Check(name="torchvision", state="ok", finding="not installed; edgevlm does not need it")
    if importlib.util.find_spec("torch") is None:
        return Check(name="torchvision", state="note", finding="installed without torch")
    finding = f"{torchvision['torchvision']} beside torch {torch.get('torch', '?')}"
    if "+cpu" in torch.get("torch", "") and "+cpu" not in torchvision["torchvision"]:
        return Check(
            name="torchvision",
            state="note",
            finding=f"{finding}: builds that may not fit together break transformers' imports",
            remedy="If compile fails on `torchvision::nms`, uninstall torchvision: edgevlm does not need it.",
        )
    return Check(name="torchvision", state="ok", finding=finding)


def _processor(machine: Machine) -> Check:
    isa = set(machine.isa)
    name = f"{machine.name} ({machine.arch})"
    if not machine.is_isa_known:
        return Check(name="processor", state="note", finding=f"{name}: its instruction sets cannot be read here")
    if isa & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        return Check(name="processor", state="ok", finding=f"{name}: has VNNI, int8 is likely to pay")
    if isa & {"asimddp", "i8mm"}:
        return Check(name="processor", state="ok", finding=f"{name}: has the dot product, int8 is likely to pay")
    return Check(
        name="processor",
        state="note",
        finding=f"{name}: no int8 dot product (VNNI or asimddp), so int8 may be no faster than float",
        remedy="Let compile measure: it ships float where int8 does not pay.",
    )


def _threads(machine: Machine) -> Check:
    finding = (
        f"{machine.n_physical_cores} cores, {machine.n_logical_cores} threads, {machine.memory_bytes / 1e9:.1f} GB"
    )
    limits = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    if limits:
        set_to = ", ".join(f"{name}={os.environ[name]}" for name in limits)
        return Check(name="cores", state="note", finding=f"{finding}; {set_to} is set", remedy="--threads decides.")
    return Check(name="cores", state="ok", finding=finding)


def _cache() -> Check:
    root = cache_root()
    existing = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if not os.access(existing, os.W_OK):
        return Check(
            name="cache",
            state="missing",
            finding=f"{root} cannot be written",
            remedy="Set EDGEVLM_CACHE to a folder that can.",
        )
    finding = f"{root}, {free / 1e9:.1f} GB free"
    if free < _LOW_DISK_BYTES:
        return Check(name="cache", state="note", finding=finding, remedy="Free some space: edgevlm cache clear")
    return Check(name="cache", state="ok", finding=finding)


def _data() -> Check:
    targets, recipes = data_names("targets"), data_names("calibration")
    if not targets or not recipes:
        return Check(
            name="data files",
            state="broken",
            finding="targets/ or calibration/ is missing",
            remedy="Reinstall edgevlm.",
        )
    return Check(name="data files", state="ok", finding=f"{len(targets)} targets, {len(recipes)} calibration recipes")


def _emulator() -> Check:
    from edgevlm.devices.emulator import emulator_state  # not where devices are not asked for

    try:
        return Check(name="ARM emulator", state="ok", finding=emulator_state())
    except MissingToolError as error:
        return Check(name="ARM emulator", state="note", finding=error.message, remedy=error.hint)


def _ssh() -> Check:
    program = shutil.which("ssh")
    if program is None:
        finding = "ssh is not installed: no --device ssh://USER@HOST"
        return Check(name="devices", state="note", finding=finding, remedy="Install OpenSSH.")
    return Check(name="devices", state="ok", finding=f"reached by {program}")


def is_healthy(checks: tuple[Check, ...]) -> bool:
    return all(check.state != "broken" for check in checks)
