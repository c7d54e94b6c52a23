"""A virtual environment for each tool, made from the pinned requirements beside this file and kept outside the repo."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent
CURRENT = "current"
"""Instead of a folder: everything runs in the interpreter that runs the suite."""


def default_folder() -> Path:
    return Path.home() / ".cache" / "edgevlm-benchmarks"


class InstallError(Exception):
    """An environment could not be made: one sentence."""


def interpreter(name: str, folder: Path) -> str:
    """The Python of the environment called ``name``, made where it is missing or its requirements have changed.

    ``<name>.txt`` is installed as usual, ``<name>.no-deps.txt`` after it without dependencies.

    Raises: InstallError: pip could not install it; its last line.
    """
    if str(folder) == CURRENT:
        return sys.executable
    home = folder / name
    python = home / "bin" / "python"
    stamp = home / "requirements.sha256"
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in _files(name))).hexdigest()
    if python.is_file() and stamp.is_file() and stamp.read_text() == digest:
        return str(python)
    home.parent.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.log").open("wb") as log:
        _run([sys.executable, "-m", "venv", "--clear", str(home)], log)
        for file in _files(name):
            options = ["--no-deps"] if file.name.endswith(".no-deps.txt") else []
            _run([str(python), "-m", "pip", "install", "--quiet", *options, "--requirement", str(file)], log)
    stamp.write_text(digest)
    return str(python)


def names() -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in HERE.glob("*.txt") if not file.name.endswith(".no-deps.txt")))


def _files(name: str) -> list[Path]:
    return [file for file in (HERE / f"{name}.txt", HERE / f"{name}.no-deps.txt") if file.is_file()]


def _run(command: list[str], log: IO[bytes]) -> None:
    done = subprocess.run(command, stdout=log, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise InstallError(f"{' '.join(command[1:4])} failed: {lines[-1] if lines else done.returncode}")
