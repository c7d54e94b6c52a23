"""An emulated ARM processor as a device: its answers are the processor's own, its times are nobody's."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgevlm.devices.emulator import Emulator, prepare_emulator, prepare_openvino
from edgevlm.devices.errors import error_from
from edgevlm.errors import MissingToolError, UsageError, did_you_mean
from edgevlm.progress import Note, Progress, StepProgress, silent
from edgevlm.runtime.bundle import Bundle, open_bundle
from edgevlm.runtime.machine import EMULATED
from edgevlm.runtime.spec import Manifest, Spec, from_json
from edgevlm.runtime.verify import Verification

# QEMU's names -> a computer that has such a processor.
CPUS: dict[str, str] = {
    "cortex-a53": "Raspberry Pi 3",
    "cortex-a55": "the small cores of many phones",
    "cortex-a72": "Raspberry Pi 4",
    "cortex-a76": "Raspberry Pi 5",
    "cortex-a710": "phones since 2022",
    "neoverse-n1": "arm64 servers",
    "neoverse-v1": "arm64 servers with SVE",
    "neoverse-n2": "arm64 servers with SVE2",
}
DEFAULT_CPU = "cortex-a76"

BACKENDS = ("onnxruntime", "openvino")
"""What has arm64 wheels to emulate."""


class EmulatedVerification(Spec, frozen=True, kw_only=True):
    """What ``verify`` found on an emulated processor; falsy when something is wrong.

    Args: note: why outputs may differ more than they would from another machine's; empty where nothing is known.
    """

    device: str
    verification: Verification
    note: str = ""

    def __bool__(self) -> bool:
        return bool(self.verification)

    def to_text(self) -> str:
        """For people, without a line feed at the end."""
        found = self.verification
        lines = [f"On {self.device}: the answers of its own kernels. Nothing here says how fast it is."]
        lines.append(f"{found.n_files} files, {found.n_bytes / 1e6:.1f} MB: every sha256 is what the manifest says.")
        for case in found.cases:
            answer = "same answer" if case.is_same_answer else "another answer"
            error = "outputs equal to the bit" if case.max_error == 0 else f"largest error {case.max_error:.2g}"
            form = f"{case.form}, " if case.form else ""
            lines.append(f"{form}{case.picture}: {answer}, {error} ({case.tolerance:.2g} allowed)")
        lines += [f"{form}: not run: {why}" for form, why in found.left_out.items()]
        lines += [self.note] if self.note else []
        return "\n".join([*lines, *(found.reasons or (f"'{found.name}' answers on {self.device} as it should.",))])


@dataclass(frozen=True, kw_only=True)
class EmulatedDevice:
    """Runs edgevlm's verbs on an emulated processor.

    Args: source: a folder that holds edgevlm's source and nothing else.
    """

    cpu: str
    emulator: Emulator
    source: Path
    progress: Progress

    @property
    def name(self) -> str:
        return f"{self.cpu} (emulated)"

    @property
    def is_emulated(self) -> bool:
        return True

    def run(self, verb: str, bundle: Path, options: Sequence[str | Path] = (), *, output: Path | None = None) -> bytes:
        opened = open_bundle(bundle)
        check_can_emulate(opened)
        device = replace(self, emulator=with_backends(self.emulator, opened, self.progress))
        words = [str(option.absolute() if isinstance(option, Path) else option) for option in options]
        written = ("--output", str(output.absolute())) if output is not None else ()
        return device.run_module("edgevlm", verb, str(bundle.absolute()), *words, *written, "--json")

    def run_module(self, module: str, *arguments: str) -> bytes:
        """What ``python -m module arguments`` prints there; its standard error is told as progress.

        Raises: EdgeVLMError: it ended with an error, which is raised as it was there.
        """
        command = [str(self.emulator.python), "-m", module, *arguments]
        environment = {**self.emulator.environment(self.cpu, self.source), EMULATED: self.cpu}
        said: list[str] = []
        with tempfile.TemporaryFile() as printed:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.PIPE, text=True
            )
            with process:
                try:
                    assert process.stderr is not None
                    for line in process.stderr:
                        said.append(line.rstrip())
                        self.progress(StepProgress(self.name, None, line.rstrip()))
                except BaseException:
                    process.kill()
                    raise
            printed.seek(0)
            answer = printed.read()
        if process.returncode == 0 or (process.returncode == 1 and answer.strip()):  # `verify` prints what is wrong
            return answer
        raise error_from(process.returncode, "\n".join(said), self.name)


def vnni_note(manifest: Manifest) -> str:
    """What golden vectors of int8 graphs owe to an x86 processor without VNNI: nothing where they were not made there.

    Source: MLAS adds pairs of products in 16 bits there, which saturate; measured 1.2 % on MobileNetV1.
    """
    made_on = manifest.golden.made_on
    has_int8 = any("int8" in part.precision for part in manifest.components)
    if not has_int8 or made_on.get("arch") != "x86-64" or "vnni" in made_on.get("isa", ""):
        return ""
    return (
        f"The golden vectors were made on {made_on.get('cpu', 'a processor')}, which has no VNNI: its int8 sums "
        "saturate at 16 bits, an ARM processor's do not."
    )


@contextlib.contextmanager
def open_emulated(address: str, progress: Progress = silent) -> Iterator[EmulatedDevice]:
    """The processor that ``address`` names, such as ``emulated://cortex-a76``.

    Raises: UsageError: no such processor. MissingToolError: the emulator cannot be set up here, and why.
    """
    cpu = check_cpu(address.partition("://")[2] or DEFAULT_CPU)
    emulator = prepare_emulator(progress)
    with tempfile.TemporaryDirectory(prefix="edgevlm-") as folder:
        source = link_source(Path(folder) / "source")
        yield EmulatedDevice(cpu=cpu, emulator=emulator, source=source, progress=progress)


def verify_emulated(
    path: str | os.PathLike[str], cpu: str | None = None, *, progress: Progress = silent
) -> EmulatedVerification:
    """Check a bundle's files and replay its golden vectors on an emulated ARM processor.

    Args:    cpu: by QEMU's name, such as ``cortex-a53``; the one of the bundle's target where left out.
    Raises:  UsageError: no such processor. BundleError: the bundle breaks a rule. MissingToolError: it is not for ARM,
             or the emulator cannot be set up here.
    """
    bundle = open_bundle(path)
    check_can_emulate(bundle)
    with open_emulated(f"emulated://{cpu or cpu_for(bundle)}", progress) as device:
        verification = from_json(device.run("verify", Path(path)), Verification)
        note = vnni_note(bundle.manifest) if any(case.max_error > 0 for case in verification.cases) else ""
        return EmulatedVerification(device=device.name, verification=verification, note=note)


def check_cpu(cpu: str) -> str:
    """Raises: UsageError: QEMU's processor of that name is not among those that edgevlm was tried on."""
    if cpu not in CPUS:
        raise UsageError(f"'{cpu}' is no processor that can be emulated.", hint=did_you_mean(cpu, CPUS))
    return cpu


def cpu_for(bundle: Bundle) -> str:
    """The processor that the bundle's target names, else a Cortex-A76."""
    from edgevlm.target import read_target

    try:
        target = read_target(bundle.manifest.target)
    except UsageError:  # made for a target of the user's own, or of a newer edgevlm
        return DEFAULT_CPU
    return check_cpu(target.emulated_as or DEFAULT_CPU)


def check_can_emulate(bundle: Bundle, *, backends: Sequence[str] = BACKENDS) -> None:
    """Raises: MissingToolError: the bundle is for another architecture, or needs another backend than ``backends``."""
    manifest = bundle.manifest
    if manifest.requires.arch not in (None, "aarch64"):
        raise MissingToolError(
            f"The bundle '{manifest.name}' is for {manifest.requires.arch}, which no ARM processor can run.",
            hint="Compile the model for an ARM target, such as a Raspberry Pi.",
        )
    if others := sorted({part.backend for part in manifest.components} - set(backends)):
        raise MissingToolError(
            f"The bundle '{manifest.name}' needs {', '.join(others)}, which is not emulated here.",
            hint=f"Compile it with --backends {','.join(backends)}.",
        )


def with_backends(emulator: Emulator, bundle: Bundle, progress: Progress) -> Emulator:
    """The emulator with OpenVINO too, where the bundle or one of its forms needs it.

    Where it cannot be had, forms that need it are left out, as on a device without it.

    Raises: MissingToolError: it cannot be had, and the bundle itself needs it.
    """
    manifest = bundle.manifest
    is_needed = any(part.backend == "openvino" for part in manifest.components)
    is_used = any(part.backend == "openvino" for form in manifest.forms for part in form.components)
    if not (is_needed or is_used):
        return emulator
    try:
        return replace(emulator, libraries=(prepare_openvino(progress),))
    except MissingToolError as error:
        if is_needed:
            raise
        progress(Note(error.message))
        return emulator


def link_source(folder: Path) -> Path:
    """Make ``folder``, where Python finds edgevlm and none of the libraries that lie beside it for this machine."""
    found = importlib.util.find_spec("edgevlm")
    assert found is not None and found.origin is not None
    folder.mkdir()
    (folder / "edgevlm").symlink_to(Path(found.origin).resolve().parent)
    return folder
