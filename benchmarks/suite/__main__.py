"""edgevlm's choice against everything else that a user could run: ``python -m benchmarks.suite``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from benchmarks.suite.cases import CASES, QUICK
from benchmarks.suite.environments import CURRENT, InstallError, default_folder, interpreter, names
from benchmarks.suite.rivals import rivals_named
from benchmarks.suite.running import run_case
from benchmarks.suite.spec import CaseResult
from benchmarks.suite.table import details, summary
from edgevlm.cli.tables import summary_text
from edgevlm.errors import EdgeVLMError
from edgevlm.measure.protocol import QUICK as QUICK_PROTOCOL
from edgevlm.measure.spec import Protocol
from edgevlm.report.spec import Report
from edgevlm.runtime.machine import describe_machine
from edgevlm.runtime.spec import from_json

RESULTS = Path(__file__).parents[1] / "results"

# torch.compile builds a model in its first run, which takes minutes for the largest on a busy machine.
TIMEOUT_S = 900.0
SCREENING = Protocol(n_rounds=8, min_rounds=8, halve_at=(), budget_s=600.0, timeout_s=TIMEOUT_S)


@click.command()
@click.option("--assets", type=click.Path(path_type=Path), default=Path("../shared/assets"), show_default=True)
@click.option("--models", multiple=True, type=click.Choice([case.key for case in CASES]), help="These only.")
@click.option("--rivals", multiple=True, help="Those whose names hold this; ONNX Runtime float always runs.")
@click.option("--threads", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--rounds", default=60, show_default=True, help="Of the long comparison, at most.")
@click.option("--environments", type=click.Path(path_type=Path), help="Where the rivals' environments are kept.")
@click.option("--work", type=click.Path(path_type=Path), help="Where artifacts are kept; beside the environments.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="Where results are written; beside the others, those of --quick in WORK.",
)
@click.option("--again", is_flag=True, help="Measure anew what has a result.")
@click.option("--only-environments", is_flag=True, help="Make the environments and stop.")
@click.option("--only-table", is_flag=True, help="Write the tables from the results that there are.")
@click.option("--quick", is_flag=True, help="A smoke test: a tiny model, two rivals, this interpreter, few rounds.")
def main(
    assets: Path,
    models: Sequence[str],
    rivals: Sequence[str],
    threads: Sequence[int],
    rounds: int,
    environments: Path | None,
    work: Path | None,
    results: Path | None,
    again: bool,
    only_environments: bool,
    only_table: bool,
    quick: bool,
) -> None:
    """Make every rival, judge it, and let it take turns with edgevlm's winner, model by model.

    Each processor has results of its own: what is accurate and fast on one need not be on another.

    A model that has a result for a number of threads is left out, so that a run which was stopped goes on. Take a quiet
    machine: the whole suite needs some hours on two cores.
    """
    environments = environments or (Path(CURRENT) if quick else default_folder())
    kept = work or default_folder() / "work"
    if only_environments:
        _make_environments(environments)
        return
    cases = (QUICK,) if quick else tuple(case for case in CASES if not models or case.key in models)
    results = results or (kept / "results" if quick else RESULTS)
    folder = results / "suite" / slug(describe_machine().name)
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for case in cases:
        known = _known(folder / f"{case.key}.json")
        measured = {found.n_threads for found in known.threads} if known and not again else set()
        missing = [n for n in threads if n not in measured]
        if only_table or not missing:
            continue
        try:
            result = run_case(
                case,
                rivals_named(("static", "dynamic"), environment="onnxruntime") if quick else rivals_named(rivals),
                assets=assets if assets.is_dir() else None,
                work=kept,
                environments=environments,
                threads=missing,
                screening=QUICK_PROTOCOL if quick else SCREENING,
                final=QUICK_PROTOCOL if quick else _final(rounds),
                compile_protocol=QUICK_PROTOCOL if quick else None,
                say=lambda text: click.echo(text, err=True),
            )
        except EdgeVLMError as error:
            click.echo(f"{case.name}: {error.message} {error.hint}", err=True)
            failed.append(case.key)
            continue
        result = _joined(known, result)
        _write(folder / f"{case.key}.json", msgspec.json.encode(result) + b"\n")
        click.echo(summary([result]))
    _write_tables(results)
    if not quick:
        _write_example(kept, results)
    if failed:
        raise click.ClickException(f"No result for: {', '.join(failed)}.")


def _known(file: Path) -> CaseResult | None:
    return from_json(file.read_bytes(), CaseResult) if file.is_file() else None


def _joined(known: CaseResult | None, new: CaseResult) -> CaseResult:
    """The new one, with the numbers of threads that it was not asked for."""
    if known is None:
        return new
    fresh = {found.n_threads for found in new.threads}
    both = [*new.threads, *(found for found in known.threads if found.n_threads not in fresh)]
    return msgspec.structs.replace(new, threads=tuple(sorted(both, key=lambda found: found.n_threads)))


def _final(rounds: int) -> Protocol:
    return Protocol(
        n_rounds=rounds,
        min_rounds=min(30, rounds),
        stop_half_width=0.01,
        halve_at=(),
        budget_s=600.0,
        timeout_s=TIMEOUT_S,
    )


def _make_environments(folder: Path) -> None:
    for name in names():
        try:
            click.echo(f"{name}: {interpreter(name, folder)}")
        except InstallError as error:
            click.echo(f"{name}: {error}", err=True)


def slug(name: str) -> str:
    """A processor's name as a folder's: "Intel(R) Xeon(R) Processor" gives intel-xeon-processor."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def _write_tables(results: Path) -> None:
    """`suite.md`, every rival of every model, and `suite-summary.md`, which the README shows."""
    order = [case.key for case in (QUICK, *CASES)]
    machines = []
    for folder in sorted(each for each in (results / "suite").iterdir() if each.is_dir()):
        known = [file for file in folder.glob("*.json") if file.stem in order]
        files = sorted(known, key=lambda file: order.index(file.stem))
        if files:
            machines.append([from_json(file.read_bytes(), CaseResult) for file in files])
    if machines:
        _write(results / "suite.md", "\n".join(map(details, machines)).encode())
        _write(results / "suite-summary.md", "\n".join(map(summary, machines)).encode())


def _write_example(work: Path, results: Path) -> None:
    """What the compile of the first model with one thread printed, which the README shows."""
    report = work / CASES[0].key / "bundle-1" / "report" / "report.json"
    if report.is_file():
        _write(results / "example.txt", summary_text(from_json(report.read_bytes(), Report)).encode())


def _write(file: Path, content: bytes) -> None:
    """Whole or not at all: a run that is stopped goes on from what is whole."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(file)


if __name__ == "__main__":
    main()
