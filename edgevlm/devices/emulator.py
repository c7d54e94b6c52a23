"""An ARM computer in a folder: QEMU's user mode, an arm64 Python, and edgevlm's own base dependencies for it.

Made once from package registries, as the user and without touching the system, and kept in edgevlm's cache. QEMU runs
arm64 programs as ordinary processes of this machine: they see its files, its network and its user.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgevlm.devices.debian import Suite, debian_mirror, host_architecture, run_tool, unavailable
from edgevlm.progress import Note, Progress, StepFinished, StepProgress, StepStarted
from edgevlm.store import cache_root, storing

SUITE, QEMU, PYTHON = "trixie", "10.0", "3.13"
"""The first suite of Debian whose QEMU gives each emulated processor its own /proc/cpuinfo (8.2 and newer do)."""

COUNTING_SUITE, COUNTING_QEMU = "bookworm", "7.2"
"""The last suite whose QEMU loads plugins: newer ones link it statically, which leaves them out."""

# What edgevlm needs to run a bundle, and what ONNX Runtime needs. tokenizers also asks for huggingface_hub, which only
# downloading a tokenizer takes.
DISTRIBUTIONS = (
    "onnxruntime", "numpy", "pillow", "tokenizers", "msgspec", "click", "flatbuffers", "packaging", "protobuf",
)  # fmt: skip

# A wheel for an older C library runs with a newer one; pip must be told each (PEP 600). Debian 13 has 2.41.
_PLATFORMS = ("manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 42)))

_PACKAGES = ("python3.13-minimal:arm64", "libpython3.13-stdlib:arm64", "libstdc++6:arm64")

# ``-0`` has Python take this script for itself, so that what it starts as `sys.executable` is emulated as well.
_PYTHON_SCRIPT = """\
#!/bin/sh
here=$(dirname "$0")
exec "$here/qemu-aarch64" -0 "$0" "$here/sysroot/usr/bin/python{python}" "$@"
"""

_SMOKE_TEST = "import ctypes, click, msgspec, numpy, onnxruntime, PIL.Image, tokenizers; print(onnxruntime.__version__)"

_REPORT = "Report this: what edgevlm expects of Debian's packages no longer holds."

STEP = "set up the emulator"
_EMULATOR = "arm64"  # its name on the shelf


@dataclass(frozen=True, kw_only=True)
class Emulator:
    """A folder that holds QEMU, the arm64 system and edgevlm's dependencies.

    Args: libraries: folders with more of them.
    """

    root: Path
    libraries: tuple[Path, ...] = ()

    @property
    def python(self) -> Path:
        """A script that is an arm64 Python to whoever starts it."""
        return self.root / "python"

    @property
    def interpreter(self) -> Path:
        """What ``python`` starts QEMU with."""
        return self.sysroot / f"usr/bin/python{PYTHON}"

    @property
    def sysroot(self) -> Path:
        return self.root / "sysroot"

    def environment(self, cpu: str, source: Path) -> dict[str, str]:
        """The variables of an emulated process: few of this machine's, lest its libraries' paths get there.

        Args: source: a folder that holds the package ``edgevlm`` and nothing else that Python could import.
        """
        kept = ("HOME", "USER", "TMPDIR", "TZ", "EDGEVLM_CACHE", "XDG_CACHE_HOME", "OMP_NUM_THREADS")
        return {
            **{name: os.environ[name] for name in kept if name in os.environ},
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "NO_COLOR": "1",
            # ONNX Runtime reports home from a thread of its own otherwise, which works while others are counted.
            "ORT_DISABLE_TELEMETRY": "1",
            "QEMU_CPU": cpu,
            "QEMU_LD_PREFIX": str(self.sysroot),
            "PYTHONHOME": str(self.sysroot / "usr"),
            "PYTHONPATH": os.pathsep.join(map(str, (source, self.root / "site", *self.libraries))),
            "PYTHONNOUSERSITE": "1",
            "PYTHONSAFEPATH": "1",  # the folder that the user stands in may hold this machine's libraries
            "PYTHONPYCACHEPREFIX": str(self.root / "bytecode"),
        }


@dataclass(frozen=True, kw_only=True)
class CountingQemu:
    """A folder that holds a QEMU which loads plugins, with the libraries that it is linked with."""

    root: Path

    def command(self) -> list[str]:
        """QEMU, started by the loader that came with it: this machine's may be another."""
        (loader,) = self.root.glob("usr/lib/*-linux-gnu/ld-linux*.so.*")
        return [str(loader), "--library-path", str(loader.parent), str(self.root / "usr/bin/qemu-aarch64")]


def prepare_emulator(progress: Progress) -> Emulator:
    """The emulator, made now if it never was.

    Raises: MissingToolError: it cannot be made here, and why. StoreError: the cache cannot be written.
    """
    versions = wanted_versions()
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if name in ("onnxruntime", "numpy"))
    root = prepared(
        _EMULATOR,
        _parts(versions),
        lambda folder: _make_emulator(folder, versions, progress),
        needs=f"QEMU {QEMU}, Python {PYTHON} for arm64, {told}: 140 MB from Debian's and pip's package sources",
        progress=progress,
    )
    return Emulator(root=root)


def emulator_state() -> str:
    """Whether it is set up, without doing anything.

    Raises: MissingToolError: it is not, and this machine lacks what that takes.
    """
    if _home(_EMULATOR, _parts(wanted_versions())).is_dir():
        return f"QEMU {QEMU} with an arm64 Python {PYTHON} is set up"
    _check_linux()
    host_architecture()
    return f"not set up yet; the first use takes QEMU {QEMU} from {debian_mirror()}"


def _parts(versions: Mapping[str, str]) -> dict[str, str]:
    return {"suite": SUITE, "python": PYTHON, "qemu": QEMU, **versions}


def prepare_openvino(progress: Progress) -> Path:
    """A folder with the OpenVINO that is installed here, for arm64. Raises: as ``prepare_emulator``."""
    try:
        version = importlib.metadata.version("openvino").partition("+")[0]
    except importlib.metadata.PackageNotFoundError as error:
        raise unavailable("OpenVINO is not installed here", "Run: pip install 'edgevlm[openvino]'") from error
    return prepared(
        "openvino",
        {"python": PYTHON, "openvino": version},
        lambda folder: _install_wheels(folder, ["openvino"], {"openvino": version}),
        needs=f"OpenVINO {version} for arm64: 30 MB from pip's package source",
        progress=progress,
    )


def prepare_counting_qemu(progress: Progress) -> CountingQemu:
    """A QEMU that counts, made now if it never was. Raises: as ``prepare_emulator``."""
    root = prepared(
        "counting",
        {"suite": COUNTING_SUITE, "qemu": COUNTING_QEMU},
        lambda folder: _make_counting_qemu(folder, progress),
        needs=f"QEMU {COUNTING_QEMU} with its libraries: 30 MB from Debian's package sources",
        progress=progress,
    )
    return CountingQemu(root=root)


def wanted_versions() -> dict[str, str]:
    """The versions installed here: what computes in the emulator must differ by the processor alone."""
    found = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name).partition("+")[0]
    return found


def prepared(
    name: str, parts: Mapping[str, str], make: Callable[[Path], None], *, needs: str, progress: Progress
) -> Path:
    """The folder that ``make`` fills, for these versions: looked up, or made while no other process makes one.

    It has its final name once it is whole; what a killed process left is removed by the next.

    Args: needs: what it takes, for the user, who is told before anything is fetched.
    """
    home = _home(name, parts)
    shelf = home.parent
    if home.is_dir():
        return home
    _check_linux()
    with storing(shelf):
        shelf.mkdir(parents=True, exist_ok=True)
        with _locked(shelf / ".lock", progress):
            if not home.is_dir():
                _make(home, make, needs=needs, progress=progress)
    return home


def _home(name: str, parts: Mapping[str, str]) -> Path:
    key = hashlib.sha256("\n".join(f"{part}={version}" for part, version in sorted(parts.items())).encode())
    return cache_root() / "emulators" / f"{name}-{key.hexdigest()[:16]}"


def _check_linux() -> None:
    if not sys.platform.startswith("linux"):
        raise unavailable("QEMU's user mode is for Linux", "Emulate on a Linux machine.")


def _make(home: Path, make: Callable[[Path], None], *, needs: str, progress: Progress) -> None:
    for left in home.parent.glob(".partial-*"):  # whoever made it no longer holds the lock
        shutil.rmtree(left)
    progress(StepStarted(STEP, needs))
    progress(Note(f"Setting up the emulator once: {needs}. It is kept in '{home.parent}'."))
    started = time.monotonic()
    partial = Path(tempfile.mkdtemp(dir=home.parent, prefix=".partial-"))
    try:
        make(partial)
        partial.rename(home)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress(StepFinished(STEP, time.monotonic() - started))


@contextlib.contextmanager
def _locked(file: Path, progress: Progress) -> Iterator[None]:
    """Alone on this machine while the block runs; the system opens the lock again when a process dies."""
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(Note("Another process is setting up the emulator; waiting for it."))
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _make_emulator(folder: Path, versions: Mapping[str, str], progress: Progress) -> None:
    def tell(detail: str, fraction: float) -> None:
        progress(StepProgress(STEP, fraction, detail))

    tell(f"reading the package lists of Debian's {SUITE}", 0.0)
    host = host_architecture()
    suite = Suite(SUITE, architectures=tuple(dict.fromkeys(("arm64", host))), root=folder / "apt")
    tell(f"fetching Python {PYTHON} for arm64", 0.1)
    sysroot = _empty_system(folder / "sysroot")
    suite.fetch(*_PACKAGES)
    suite.unpack(sysroot)
    tell(f"fetching QEMU {QEMU}", 0.3)
    suite.fetch_alone(f"qemu-user:{host}")
    suite.unpack(folder, only=["./usr/bin/qemu-aarch64"])
    (folder / "usr/bin/qemu-aarch64").rename(folder / "qemu-aarch64")
    shutil.rmtree(folder / "usr")
    shutil.rmtree(folder / "apt")
    tell(f"fetching ONNX Runtime {versions.get('onnxruntime', '')} for arm64", 0.6)
    _install_wheels(folder / "site", DISTRIBUTIONS, versions)
    emulator = Emulator(root=folder)
    emulator.python.write_text(_PYTHON_SCRIPT.format(python=PYTHON))
    emulator.python.chmod(0o755)
    tell("trying it", 0.9)
    _check_qemu([str(folder / "qemu-aarch64")], SUITE, QEMU)
    _try(emulator)


def _empty_system(root: Path) -> Path:
    """Debian's packages expect these links to be there."""
    for name in ("lib", "bin", "sbin"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    return root


def _install_wheels(folder: Path, names: Iterable[str], versions: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--python-version", PYTHON, "--implementation", "cp"]
    command += [f"--platform={platform}" for platform in _PLATFORMS]
    command += ["--target", str(folder)]
    command += [f"{name}=={versions[name]}" if name in versions else name for name in names]
    hint = "See that `python -m pip` works and reaches a package index with these versions for arm64."
    run_tool(command, what="pip install for arm64", hint=hint)


def _try(emulator: Emulator) -> None:
    command = [str(emulator.python), "-B", "-c", _SMOKE_TEST]
    environment = emulator.environment("cortex-a76", emulator.root / "site")
    variables = [f"{name}={value}" for name, value in environment.items()]
    run_tool(["env", "-i", *variables, *command], what="starting the emulated Python", hint=_REPORT)


def _make_counting_qemu(folder: Path, progress: Progress) -> None:
    progress(StepProgress(STEP, 0.0, f"reading the package lists of Debian's {COUNTING_SUITE}"))
    host = host_architecture()
    suite = Suite(COUNTING_SUITE, architectures=(host,), root=folder / "apt")
    progress(StepProgress(STEP, 0.3, f"fetching QEMU {COUNTING_QEMU}"))
    _empty_system(folder)
    suite.fetch(f"qemu-user:{host}")
    suite.unpack(folder)
    shutil.rmtree(folder / "apt")
    _check_qemu(CountingQemu(root=folder).command(), COUNTING_SUITE, COUNTING_QEMU)


def _check_qemu(command: list[str], suite: str, version: str) -> None:
    told = run_tool([*command, "--version"], what="starting QEMU", hint=_REPORT).partition("\n")[0]
    if f"version {version}." not in told:
        raise unavailable(f"{suite} should have QEMU {version}, but has '{told}'", _REPORT)
