"""From process start to the first answer, with the base install: `python -m benchmarks.first_answer BUNDLE PICTURE`.

Makes a virtual environment with edgevlm's base dependencies alone, then runs `edgevlm run BUNDLE PICTURE` in it, each
time as a new process. Raw samples go to `results/first_answer.json`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from edgevlm.measure.environment import describe_environment
from edgevlm.measure.spec import Environment
from edgevlm.runtime.spec import Spec, to_json

HERE = Path(__file__).parent


class Result(Spec, frozen=True, kw_only=True):
    """Units: ``samples_s`` are wall seconds of the whole process; the first, with a cold disk cache, is left out."""

    schema_version: int
    command: str
    made_at: str
    bundle: str
    samples_s: tuple[float, ...]
    median_s: float
    packages: tuple[str, ...]
    environment: Environment


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("picture", type=click.Path(path_type=Path, exists=True))
@click.option("-n", "n_runs", default=20, show_default=True, type=click.IntRange(min=1))
def main(bundle: Path, picture: Path, n_runs: int) -> None:
    with tempfile.TemporaryDirectory(prefix="edgevlm-base-") as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", str(HERE.parent)], check=True)
        listed = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
        packages = tuple(line for line in listed.splitlines() if "@" not in line)
        samples = [_run(Path(folder) / "bin" / "edgevlm", bundle, picture) for _ in range(n_runs + 1)][1:]
    result = Result(
        schema_version=1,
        command="python -m benchmarks.first_answer BUNDLE PICTURE",
        made_at=time.strftime("%Y-%m-%d", time.gmtime()),
        bundle=bundle.name,
        samples_s=tuple(samples),
        median_s=float(np.median(samples)),
        packages=packages,
        environment=describe_environment(),
    )
    (HERE / "results" / "first_answer.json").write_bytes(to_json(result))
    click.echo(f"median {result.median_s:.3f} s, {min(samples):.3f} to {max(samples):.3f} s over {n_runs} runs")


def _run(program: Path, bundle: Path, picture: Path) -> float:
    started = time.perf_counter()
    subprocess.run([program, "run", str(bundle), str(picture)], check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
