"""A rival's artifact, made in its own environment: ``python -m benchmarks.suite.making REQUEST`` there."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.suite.spec import Made, MakeRequest
from edgevlm.runtime.spec import from_json, to_json

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 1800
"""Enough for the slowest seen: NNCF on a ViT-B/16 takes four minutes on two busy cores."""


def environment_variables() -> dict[str, str]:
    """For a process of another interpreter: it finds this repository, and reports nothing home."""
    quiet = {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **quiet, "PYTHONPATH": str(REPOSITORY)}


def make(python: str, request: MakeRequest) -> Made:
    """What the maker wrote into ``request.out``; the same request again is a look-up, unless it failed."""
    out = Path(request.out)
    key = _key(request)
    record = out / "made.json"
    if record.is_file() and (out / "key").read_text() == key:
        return from_json(record.read_bytes(), Made)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "request.json").write_bytes(to_json(request))
    command = [python, "-P", "-m", "benchmarks.suite.making", str(out / "request.json")]
    with (out / "log.txt").open("wb") as log:
        try:
            code = subprocess.run(
                command, env=environment_variables(), cwd=out, stdout=log, stderr=log, timeout=TIMEOUT_S
            ).returncode
        except subprocess.TimeoutExpired:
            return Made(failure=f"It was not done after {TIMEOUT_S} s.")
    if code or not record.is_file():
        return Made(failure=last_words((out / "log.txt").read_text(errors="replace"), code))
    made = from_json(record.read_bytes(), Made)
    if made.failure is None:
        (out / "key").write_text(key)
    return made


def _key(request: MakeRequest) -> str:
    source = Path(request.source)
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    digest = hashlib.sha256(to_json(request))
    for file in (*files, Path(request.calibration)):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def last_words(log: str, code: int) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"Its process ended with status {code}."


def main(file: str) -> None:
    request = from_json(Path(file).read_bytes(), MakeRequest)
    module, _, function = request.maker.partition(":")
    made: Made = getattr(importlib.import_module(module), function)(request)
    (Path(request.out) / "made.json").write_bytes(to_json(made))


if __name__ == "__main__":
    main(sys.argv[1])
