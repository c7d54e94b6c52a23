"""How many instructions an inference takes on an emulated ARM processor, by class: which kernels run, never how fast.

One thread, one graph, in QEMU with a plugin that counts (tools/qemu-plugin). The same bundle on the same versions gives
the same counts, to the instruction.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edgevlm.devices.counted_runs import EMPTY, RUN, SHOW, CountRequest
from edgevlm.devices.debian import run_tool
from edgevlm.devices.emulated import check_can_emulate, cpu_for, link_source
from edgevlm.devices.emulator import (
    COUNTING_QEMU,
    CountingQemu,
    Emulator,
    prepare_counting_qemu,
    prepare_emulator,
    prepared,
    wanted_versions,
)
from edgevlm.devices.errors import error_from
from edgevlm.errors import EdgeVLMError, MissingToolError, UsageError, did_you_mean
from edgevlm.measure.bundles import golden_inputs
from edgevlm.measure.counts import CLASSES, GraphInstructions, Instructions
from edgevlm.progress import Progress, StepFinished, StepStarted, silent
from edgevlm.runtime.bundle import Bundle, open_bundle
from edgevlm.runtime.spec import Component, to_json

CPUS = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1")
"""Those of edgevlm's that the QEMU which counts has."""

SOURCE_VARIABLE = "EDGEVLM_QEMU_PLUGIN"

_COUNTED_BACKEND = "onnxruntime"
_GET_COMPILER = "Install gcc, or set CC."

_COUNTED_RUNS = ("-m", "edgevlm.devices.counted_runs", "request.json")

# The first run packs weights and the second still allocates; from the third on the arithmetic is the same.
_N_WARMUP, _N_RUNS = 2, 3


def count_instructions(
    path: str | os.PathLike[str], cpu: str | None = None, *, progress: Progress = silent
) -> Instructions:
    """Count the instructions of one run of each of a bundle's graphs, in each of its forms, on its first golden
    picture.

    Args:    cpu: by QEMU's name, such as ``cortex-a53``; the one of the bundle's target where left out.
    Raises:  UsageError: instructions of that processor cannot be counted. MissingToolError: the bundle is not for ARM,
             or the emulator, its plugin or a C compiler is not here. BundleError: the bundle breaks a rule.
    """
    bundle = open_bundle(path)
    manifest = bundle.manifest
    forms = {form.name: bundle.in_form(form) for form in manifest.forms} or {"": bundle}
    left_out = {name: why for name, form in forms.items() if (why := _why_not_counted(form))}
    counted = {name: form for name, form in forms.items() if name not in left_out}
    check_can_emulate(next(iter(counted.values()), bundle), backends=(_COUNTED_BACKEND,))
    cpu = cpu or cpu_for(bundle)
    check_can_count(cpu)
    emulator, qemu = prepare_emulator(progress), prepare_counting_qemu(progress)
    plugin = _compile_plugin(find_plugin_source(), progress)
    graphs = []
    processor = _Processor(cpu=cpu, emulator=emulator, qemu=qemu, plugin=plugin)
    for name, form in counted.items():
        for part in form.manifest.components:
            started = time.monotonic()
            step = f"count {name} {part.name}" if name else f"count {part.name}"
            progress(StepStarted(step, f"on an emulated {cpu}"))
            by_class = processor.count(form, part)
            progress(StepFinished(step, time.monotonic() - started))
            graphs.append(
                GraphInstructions(
                    form=name,
                    graph=part.name,
                    precision=part.precision,
                    n_instructions=sum(by_class.values()),
                    by_class=by_class,
                )
            )
    tools = {"qemu": COUNTING_QEMU, "onnxruntime": wanted_versions().get("onnxruntime", "")}
    return Instructions(name=manifest.name, cpu=cpu, tools=tools, graphs=tuple(graphs), left_out=left_out)


def _why_not_counted(bundle: Bundle) -> str:
    others = sorted({part.backend for part in bundle.manifest.components} - {_COUNTED_BACKEND})
    return f"{' and '.join(others)}'s kernels are made as a graph is opened, and are not counted" if others else ""


def check_can_count(cpu: str) -> None:
    """Raises: UsageError: instructions of that processor cannot be counted. MissingToolError: the plugin is not here,
    or nothing that compiles it.
    """
    if cpu not in CPUS:
        raise UsageError(f"Instructions of '{cpu}' cannot be counted.", hint=did_you_mean(cpu, CPUS))
    find_plugin_source()
    if shutil.which(_compiler()) is None:
        raise MissingToolError(f"Counting instructions needs {_compiler()}, which is not there.", hint=_GET_COMPILER)


@dataclass(frozen=True, kw_only=True)
class _Processor:
    cpu: str
    emulator: Emulator
    qemu: CountingQemu
    plugin: Path

    def count(self, bundle: Bundle, part: Component) -> dict[str, int]:
        for file in part.files:
            bundle.file(file)
        # What the process sees of paths and variables always has the same length, and nothing of the user's: it lies
        # in memory before what is counted, and moves it.
        with tempfile.TemporaryDirectory(prefix=".count-", dir=self.emulator.root.parent) as name:
            folder = Path(name)
            (folder / "bundle").symlink_to(bundle.root.absolute())
            (folder / "count.so").symlink_to(self.plugin)
            environment = self._environment(link_source(folder / "source"))
            _write_request(bundle, part, folder)
            self._write_system(folder / "sysroot", environment)
            command = [
                *self.qemu.command(), "-cpu", self.cpu, "-L", str(folder / "sysroot"), "-seed", "1",
                "-plugin", "./count.so,out=counts.txt",
                str(self.emulator.interpreter), *_COUNTED_RUNS,
            ]  # fmt: skip
            done = subprocess.run(
                command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            if done.returncode != 0:
                raise error_from(done.returncode, done.stderr, f"{self.cpu} (emulated)")
            return counts_in((folder / "counts.txt").read_text())

    def _environment(self, source: Path) -> dict[str, str]:
        every = self.emulator.environment(self.cpu, source)
        ours = {name: value for name, value in every.items() if name.startswith(("PYTHON", "LANG", "ORT"))}
        return {**ours, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}

    def _write_system(self, root: Path, environment: Mapping[str, str]) -> None:
        """The arm64 system, with a /proc/cpuinfo: the QEMU that counts would show this machine's, of which ONNX
        Runtime dies. What the other QEMU shows for the processor is copied.

        That process does what the counted one does before the runs, which then always finds bytecode: making it leaves
        the memory in another state, and runs differ by some hundred instructions.
        """
        (root / "proc").mkdir(parents=True)
        for entry in self.emulator.sysroot.iterdir():
            (root / entry.name).symlink_to(entry)
        variables = {**environment, "QEMU_CPU": self.cpu, "QEMU_LD_PREFIX": str(self.emulator.sysroot)}
        command = ["env", "-i", *(f"{name}={value}" for name, value in variables.items())]
        command += ["PATH=" + os.environ.get("PATH", os.defpath), str(self.emulator.python)]
        command += [*_COUNTED_RUNS, SHOW]
        hint = "See what `edgevlm verify --emulate` says of the bundle."
        shown = run_tool(command, what="opening the graph", hint=hint, cwd=root.parent)
        (root / "proc/cpuinfo").write_text(shown)


def counts_in(text: str) -> dict[str, int]:
    """The last run's counts, less what marking costs, from what the plugin wrote.

    Raises: EdgeVLMError: the runs are not there.
    """
    found: dict[int, list[int]] = {}
    for line in text.splitlines():
        label, *counts = map(int, line.split())
        found[label] = counts
    if not {EMPTY, RUN} <= found.keys() or any(len(counts) != len(CLASSES) for counts in found.values()):
        raise EdgeVLMError("The plugin for QEMU did not count the runs.", hint="Report this with the bundle.")
    return {name: run - empty for name, run, empty in zip(CLASSES, found[RUN], found[EMPTY], strict=True)}


def find_plugin_source() -> Path:
    """The plugin's C source, which is under QEMU's licence and no part of the installed package.

    Raises: MissingToolError: this is no checkout of edgevlm, and the user names no file.
    """
    asked = os.environ.get(SOURCE_VARIABLE)
    file = Path(asked) if asked else Path(__file__).resolve().parents[2] / "tools/qemu-plugin/count_instructions.c"
    if not file.is_file():
        raise MissingToolError(
            f"Counting instructions needs '{file}', which is not there.",
            hint=f"Take tools/qemu-plugin from edgevlm's repository and name its file in {SOURCE_VARIABLE}.",
        )
    return file


def _compiler() -> str:
    return os.environ.get("CC") or "gcc"


def _compile_plugin(source: Path, progress: Progress) -> Path:
    compiler = _compiler()
    command = [compiler, "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-x", "c", str(source), "-o"]

    def make(folder: Path) -> None:
        run_tool([*command, str(folder / "count.so")], what="compiling the plugin", hint=_GET_COMPILER)

    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    parts = {"source": digest, "compiler": compiler, "machine": platform.machine()}
    return prepared("plugin", parts, make, needs=f"a plugin, compiled with {compiler}", progress=progress) / "count.so"


def _write_request(bundle: Bundle, part: Component, folder: Path) -> None:
    inputs = {}
    for index, (name, value) in enumerate(golden_inputs(bundle, part).items()):
        inputs[name] = f"input{index}.npy"
        np.save(folder / inputs[name], value, allow_pickle=False)
    request = CountRequest(
        file=f"bundle/{part.file}",
        backend=part.backend,
        session=msgspec.structs.replace(part.session, n_threads=1),
        inputs=inputs,
        n_warmup=_N_WARMUP,
        n_runs=_N_RUNS,
    )
    (folder / "request.json").write_bytes(to_json(request))
