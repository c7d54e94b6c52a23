"""A piece of hardware as a value: read from TOML, written back to the same text; `cpu` is the machine at hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edgevlm.data_files import data_folder, data_names, read_toml
from edgevlm.errors import MissingToolError, UsageError, did_you_mean
from edgevlm.runtime.backends import BACKENDS, install_command, load_backend
from edgevlm.runtime.machine import Machine, describe_machine
from edgevlm.runtime.spec import Spec

HOST = "host"
ARCHES = ("x86-64", "aarch64")

GPU_BACKENDS = frozenset({"tensorrt", "tensorrt-rtx"})

# Instruction sets that decide which int8 and float kernels ONNX Runtime's MLAS picks: with one more or one less,
# another candidate can be the fastest. Source: onnxruntime/core/mlas/lib/platform.cpp.
DECISIVE_ISA = frozenset({"avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "fp16"})

# Source: the wheels of openvino on PyPI.
_OPENVINO_ARCHES = ("x86-64", "aarch64")

# What only the other architecture has, by how its name begins.
_FOREIGN_ISA = {"aarch64": ("avx", "sse", "amx", "fma", "f16c"), "x86-64": ("asimd", "sve", "sme", "i8mm")}

Peak = Literal["float32_gmac_per_s", "bf16_gmac_per_s", "int8_gmac_per_s", "bandwidth_gb_per_s"]

# The IR that first holds each operator set. Source: the table in ONNX's docs/Versioning.md.
IR_OF_OPSET = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}


class Target(Spec, frozen=True, kw_only=True):
    """Facts about hardware, and the forms of a model that suit it.

    Args:
        name: as in ``--target``; a file's stem.
        arch: ``x86-64``, ``aarch64``; ``host`` is whatever edgevlm runs on.
        isa: instruction sets that the hardware has, by the names of Linux's ``/proc/cpuinfo``.
        n_cores: physical cores that inference may use; 0 where that differs from machine to machine.
        memory_bytes: 0 where that differs from machine to machine.
        backends: what may run a graph there, best guess first; measurement decides.
        precisions: what may be tried there; a backend leaves out what the instruction sets do not have.
        activation_sign: ``u8`` or ``s8``: the sign of int8 activations that its instructions want.
        opset: highest ONNX operator set that its runtime takes.
        onnx_ir: highest version of ONNX's file format that its runtime takes; 0 where nothing older than ours is there.
        runtimes: the version of each backend that is to be expected there, where that is not the newest.
        compute_capability: of its NVIDIA GPU, such as ``8.7``; empty where it has none.
        emulated_as: QEMU's name of its processor, where an emulator can stand in for it.
        peaks: the best rates that a backend reached there with all cores, as ``targets detect`` measures them.
        sources: where each fact comes from, by the fact's name.
    """

    name: str
    description: str
    arch: str
    isa: tuple[str, ...] = ()
    n_cores: int = 0
    memory_bytes: int = 0
    backends: tuple[str, ...] = ("onnxruntime",)
    precisions: tuple[Literal["fp32", "fp16", "bf16", "int8", "int4"], ...] = ("fp32", "fp16", "bf16", "int8", "int4")
    activation_sign: Literal["u8", "s8"] = "u8"
    opset: int = 20
    onnx_ir: int = 0
    runtimes: dict[str, str] = {}
    compute_capability: str = ""
    emulated_as: str = ""
    peaks: dict[Peak, Annotated[float, msgspec.Meta(gt=0)]] = {}
    sources: dict[str, str] = {}

    def __post_init__(self) -> None:
        for backend in self.backends:
            if backend not in BACKENDS:
                raise ValueError(f"backends: there is no '{backend}' ({', '.join(BACKENDS)})")
        if "fp32" not in self.precisions:
            raise ValueError("precisions: 'fp32' must be among them, it is what every candidate is compared with")
        if not 17 <= self.opset <= 23:
            raise ValueError(f"opset: {self.opset} is not between 17 and 23")
        if self.n_cores < 0 or self.memory_bytes < 0:
            raise ValueError("n_cores and memory_bytes cannot be negative")
        self._check_agrees_with_itself()

    def _check_agrees_with_itself(self) -> None:
        foreign = [word for word in self.isa if word.startswith(_FOREIGN_ISA.get(self.arch, ()))]
        if foreign:
            raise ValueError(f"isa: no {self.arch} has {', '.join(foreign)}")
        if strangers := sorted(set(self.runtimes) - set(self.backends)):
            raise ValueError(f"runtimes: {', '.join(strangers)} is not among the backends")
        if self.onnx_ir and self.onnx_ir < IR_OF_OPSET[self.opset]:
            raise ValueError(
                f"onnx_ir: opset {self.opset} needs {IR_OF_OPSET[self.opset]} at least, this says {self.onnx_ir}"
            )
        if self.compute_capability and not re.fullmatch(r"\d{1,2}\.\d", self.compute_capability):
            raise ValueError(f"compute_capability: '{self.compute_capability}' is not like 8.7")
        if any(is_gpu(backend) for backend in self.backends) and not self.compute_capability:
            raise ValueError("compute_capability: its backends need a GPU, and it names none")
        if any(is_gpu(backend) for backend in self.backends) and self.activation_sign == "u8":
            raise ValueError("activation_sign: TensorRT takes signed bytes alone, so it must be 's8'")
        if self.emulated_as and self.arch != "aarch64":
            raise ValueError(f"emulated_as: aarch64 processors alone are emulated, and this is {self.arch}")


def load_target(name_or_path: str) -> Target:
    """The target called so, or the one that a TOML file describes; ``host`` facts are filled in.

    Raises: UsageError: there is no such target, or its file is wrong.
    """
    return resolved(read_target(name_or_path), describe_machine())


def read_target(name_or_path: str) -> Target:
    """The target as it is written, ``host`` not filled in."""
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        path = Path(name_or_path)
    elif name_or_path in target_names():
        path = data_folder("targets") / f"{name_or_path}.toml"
    else:
        raise UsageError(
            f"There is no target '{name_or_path}'.",
            hint=did_you_mean(name_or_path, target_names())
            + " `edgevlm targets list` shows them; a path to a TOML works too.",
        )
    target = read_toml(path, Target, what="target file")
    if target.name != path.stem:
        raise UsageError(
            f"The target file '{path}' calls itself '{target.name}', but its file name says '{path.stem}'.",
            hint=f'Set name = "{path.stem}" or rename the file.',
        )
    _check_arch(target, path)
    return target


def _check_arch(target: Target, path: Path) -> None:
    """That a file's architecture is known, and that nothing is said which `resolved` would not heed."""
    known = {*ARCHES, describe_machine().arch, HOST}  # a machine of another architecture may describe itself
    if target.arch not in known:
        raise UsageError(
            f"The target file '{path}' is for '{target.arch}', which is no architecture that is known.",
            hint=did_you_mean(target.arch, known),
        )
    if target.arch != HOST:
        return
    plain = Target(name=target.name, description=target.description, arch=HOST, sources=target.sources)
    if told := [name for name in target.__struct_fields__ if getattr(target, name) != getattr(plain, name)]:
        raise UsageError(
            f"The target file '{path}' says {', '.join(told)}, but with arch = '{HOST}' the machine says that.",
            hint="Leave it out, or change what `edgevlm targets detect -o FILE` writes.",
        )


def target_names() -> tuple[str, ...]:
    return data_names("targets")


def resolved(target: Target, machine: Machine) -> Target:
    """``target`` with the machine's facts where it says ``host``."""
    if target.arch != HOST:
        return target
    return host_target(machine, name=target.name, description=target.description)


def host_target(machine: Machine, *, name: str, description: str = "") -> Target:
    """The machine at hand as a target."""
    return Target(
        name=name,
        description=description or machine.name,
        arch=machine.arch,
        isa=machine.isa,
        n_cores=machine.n_physical_cores,
        memory_bytes=machine.memory_bytes,
        backends=("onnxruntime", "openvino") if machine.arch in _OPENVINO_ARCHES else ("onnxruntime",),
        # ARM's dot product multiplies signed by signed; x86's VNNI (and the 16-bit pairs before it) unsigned by signed.
        activation_sign="s8" if machine.arch == "aarch64" else "u8",
        sources={"arch, isa, n_cores, memory_bytes": f"read from the machine ({machine.os})"},
    )


def target_text(target: Target) -> str:
    """The TOML of a target; `read_target` of it gives the target back."""
    values = {key: getattr(target, key) for key in target.__struct_fields__}
    lines = [f"{key} = {_toml_value(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, table in values.items():
        if isinstance(table, dict):
            lines += ["", f"[{key}]"]
            lines += [f"{_toml_value(name)} = {_toml_value(value)}" for name, value in table.items()]
    return "\n".join(lines) + "\n"


def why_not_at_hand(target: Target, machine: Machine) -> str:
    """Why times that are taken here would not hold for the target; empty where they would."""
    if target.arch != machine.arch:
        return f"it is {target.arch}, this machine is {machine.arch}"
    if any(is_gpu(backend) for backend in target.backends):
        gpu = f"a GPU of compute capability {target.compute_capability}"
        return f"it has {gpu}, and forms for GPUs are timed by `edgevlm tune` alone"
    if not machine.is_isa_known:
        return ""
    missing = sorted(set(target.isa) - set(machine.isa))
    surplus = sorted((set(machine.isa) - set(target.isa)) & DECISIVE_ISA)
    if missing or surplus:
        difference = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(surplus)} besides"
        return f"it is another kind of CPU than this machine, which {difference}"
    return ""


def is_gpu(backend: str) -> bool:
    return backend in GPU_BACKENDS


def pick_backends(target: Target, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The backends to try: the target's own that are installed, or exactly those asked for.

    Raises: UsageError, MissingToolError: a backend that was asked for does not exist, suit the target, or is missing.
    """
    for name in asked:
        backend = load_backend(name)
        if name not in target.backends:
            raise UsageError(
                f"Target '{target.name}' does not run {name}.", hint=f"Use one of: {', '.join(target.backends)}."
            )
        if backend.version() is None and not is_gpu(name):
            raise MissingToolError(f"The backend '{name}' is not installed.", hint=f"Run: {install_command(name)}")
    # What runs on a GPU is made without its library.
    usable = (name for name in target.backends if is_gpu(name) or load_backend(name).version() is not None)
    found = asked or tuple(usable)
    if not found:
        raise MissingToolError(
            f"None of the backends of target '{target.name}' is installed: {', '.join(target.backends)}.",
            hint=f"Run: {install_command(target.backends[0])}",
        )
    return found


def missing_backends(target: Target) -> dict[str, str]:
    """The target's backends that are not installed here or do not load, each with the command that installs it."""
    return {name: install_command(name) for name in target.backends if load_backend(name).version() is None}


def _toml_value(value: object) -> str:
    if isinstance(value, str):
        # A TOML basic string takes JSON's escapes, and wants one more character escaped than JSON does.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    return str(value)
