"""Two real classifiers on this CPU: what edgevlm ships, against ONNX Runtime in float and PyTorch in eager mode.

    python -m benchmarks.cpu_classification --assets ../shared/assets

For each model and thread count: compile it, check that the exported float graph decides every report picture as its
source does, then let the bundle's graph, the float graph and PyTorch take turns, each in its own process. Raw samples
go to `results/cpu_classification.json`, the table to `results/cpu_classification.md`, what the compile of the first
prints to `results/example.txt`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np

import edgevlm
from benchmarks.rivals import RESNET_56
from edgevlm.cli.tables import summary_text
from edgevlm.compiler import Compiled, compile_job, prepare
from edgevlm.errors import EdgeVLMError
from edgevlm.export import Exported, open_source
from edgevlm.job import Job
from edgevlm.measure.interleave import compare
from edgevlm.measure.protocol import extended
from edgevlm.measure.spec import Comparison, Protocol, Subject
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.image import decode_image, preprocess
from edgevlm.runtime.spec import Accuracy, SessionOptions, Spec, to_json
from edgevlm.steps.inputs import save_inputs

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BUNDLE, FLOAT, TORCH = "edgevlm", "onnxruntime float", "pytorch eager"


class Case(Spec, frozen=True, kw_only=True):
    """A model to compile, its data, and what PyTorch runs for it; paths relative to the assets."""

    name: str
    model: str
    data: str
    torch: str
    card: str | None = None


CASES = (
    Case(
        name="MobileNetV2 (ImageNet, 224)",
        model="models/mobilenet-v2-imagenet",
        data="data/imagenet-sample",
        torch="models/mobilenet-v2-imagenet",
    ),
    Case(
        name="ResNet-56 (CIFAR-10, 32)",
        model="models/resnet56-cifar10.onnx",
        data="data/cifar10-sample",
        torch=RESNET_56,
        card="cards/resnet56-cifar10.card.toml",
    ),
)


class Row(Spec, frozen=True, kw_only=True):
    """One model at one thread count.

    Args:
        n_decided_otherwise: report pictures whose top-1 differs between the exported float graph and its source.
        comparison: baseline is ONNX Runtime in float; ``torch_comparison`` has PyTorch as the baseline.
    """

    name: str
    n_threads: int
    winner: str
    size_bytes: int
    float_size_bytes: int
    accuracy: Accuracy
    n_report: int
    n_decided_otherwise: int
    comparison: Comparison
    torch_comparison: Comparison


class Result(Spec, frozen=True, kw_only=True):
    schema_version: int
    command: str
    made_at: str
    rows: tuple[Row, ...]


@click.command()
@click.option(
    "--assets", type=click.Path(path_type=Path, exists=True), default=Path("../shared/assets"), show_default=True
)
@click.option("--threads", type=int, multiple=True, default=(1, 2), show_default=True)
def main(assets: Path, threads: tuple[int, ...]) -> None:
    """Compile and measure; takes about ten minutes on two cores."""
    rows = []
    RESULTS.mkdir(exist_ok=True)
    for case in CASES:
        for n_threads in threads:
            click.echo(f"{case.name}, {n_threads} threads")
            rows.append(_row(case, assets, n_threads))
            click.echo(_line(rows[-1]))
    result = Result(
        schema_version=1,
        command="python -m benchmarks.cpu_classification",
        made_at=time.strftime("%Y-%m-%d", time.gmtime()),
        rows=tuple(rows),
    )
    (RESULTS / "cpu_classification.json").write_bytes(to_json(result))
    (RESULTS / "cpu_classification.md").write_text(table(result), encoding="utf-8")


def _row(case: Case, assets: Path, n_threads: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="edgevlm-benchmark-") as folder:
        job = prepare(
            str(assets / case.model),
            card=HERE / case.card if case.card else None,
            eval_data=assets / case.data,
            threads=n_threads,
            output=Path(folder) / "bundle",
        )
        compiled = compile_job(job)
        if case is CASES[0]:
            (RESULTS / "example.txt").write_text(summary_text(compiled.report), encoding="utf-8")
        exported = _export(job, Path(folder))
        first = job.splits.select.samples[0]
        pixels = preprocess(decode_image(first.read()), job.model.processing.image)[None]
        inputs = save_inputs(Path(folder) / "inputs.npz", {job.model.processing.image.input_name: pixels})
        torch = Path(case.torch) if case.torch == RESNET_56 else (assets / case.torch).resolve()
        subjects = _subjects(compiled, Path(folder) / exported.file, torch, inputs, n_threads)
        return Row(
            name=case.name,
            n_threads=n_threads,
            winner=compiled.report.winner,
            size_bytes=compiled.report.size_bytes,
            float_size_bytes=compiled.report.float_size_bytes,
            accuracy=_known(compiled.report.accuracy),
            n_report=job.data.n_report,
            n_decided_otherwise=_n_decided_otherwise(job, Path(folder) / exported.file),
            comparison=_compare(subjects, FLOAT),
            torch_comparison=_compare([each for each in subjects if each.name != FLOAT], TORCH),
        )


def _export(job: Job, folder: Path) -> Exported:
    """The float graph as compile exported it, written once more."""
    from edgevlm.export import export_graph
    from edgevlm.steps.inputs import graph_inputs

    samples = graph_inputs(job, "model", job.splits.calibrate, 5)
    return export_graph(job.model, "model", batch=1, out=folder, samples=samples, opset=job.target.opset)


def _subjects(compiled: Compiled, float_graph: Path, torch: Path, inputs: Path, n_threads: int) -> list[Subject]:
    (component,) = compiled.manifest.components
    return [
        Subject(
            name=BUNDLE,
            backend=component.backend,
            file=str(compiled.bundle / component.file),
            inputs=str(inputs),
            session=component.session,
        ),
        Subject(
            name=FLOAT,
            backend="onnxruntime",
            file=str(float_graph),
            inputs=str(inputs),
            session=SessionOptions(n_threads=n_threads),
        ),
        Subject(
            name=TORCH,
            backend="benchmarks.rivals:TorchEager",
            file=str(torch),
            inputs=str(inputs),
            session=SessionOptions(n_threads=n_threads),
        ),
    ]


def _compare(subjects: list[Subject], baseline: str) -> Comparison:
    protocol = Protocol(halve_at=(), n_rounds=40)
    comparison = compare(subjects, baseline=baseline, protocol=protocol)
    return comparison if comparison.is_valid else compare(subjects, baseline=baseline, protocol=extended(protocol))


def _n_decided_otherwise(job: Job, float_graph: Path) -> int:
    """Report pictures on which the float graph's top-1 is not that of the source in its own framework."""
    source = open_source(job.model, "model")
    session = load_backend("onnxruntime").open(float_graph, SessionOptions())
    image = job.model.processing.image
    n = 0
    for sample in job.splits.report.samples:
        feeds = {image.input_name: preprocess(decode_image(sample.read()), image)[None]}
        ours, theirs = (np.argmax(each.run(feeds)["logits"]) for each in (session, source))
        n += int(ours != theirs)
    return n


def _known(accuracy: Accuracy | None) -> Accuracy:
    if accuracy is None:
        raise EdgeVLMError("The compile reported no accuracy.")
    return accuracy


def table(result: Result) -> str:
    """The figures at one thread as Markdown; a ratio above 1 says how many times faster edgevlm's choice is.

    With several threads, work beside the measurement cannot be taken out of the times (docs/measuring.md); those rows
    stay in the JSON file with their verdicts.
    """
    rows = [row for row in result.rows if row.n_threads == 1] or list(result.rows)
    lines = [
        "| model | threads | ships | p50 ms | × ONNX Runtime float | × PyTorch eager | top-1 (float) "
        "| drop, points | MB (float) |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
        "",
        f"{result.rows[0].comparison.environment.machine}, {result.made_at}, edgevlm {edgevlm.__version__}, "
        + ", ".join(f"{k} {v}" for k, v in result.rows[0].comparison.environment.tools.items() if k != "edgevlm")
        + f". Brackets are 95 % intervals. Made by `{result.command}`; raw samples in the JSON file beside this one.",
    ]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    accuracy = row.accuracy
    return (
        f"| {row.name} | {row.n_threads} | {row.winner} | {row.comparison.measurement(BUNDLE).percentile_ms(50):.2f} "
        f"| {_speed(row.comparison)} | {_speed(row.torch_comparison)} "
        f"| {accuracy.value:.1%} ({accuracy.reference:.1%}) "
        f"| {100 * accuracy.drop:.2f} [{100 * accuracy.drop_low:.2f}, {100 * accuracy.drop_high:.2f}] "
        f"| {row.size_bytes / 1e6:.1f} ({row.float_size_bytes / 1e6:.1f}) |"
    )


def _speed(comparison: Comparison) -> str:
    ratio = comparison.ratio(BUNDLE)
    if ratio is None:
        return "–"
    doubt = "" if ratio.is_valid else " (not valid)"
    return f"{1 / ratio.value:.2f} [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]{doubt}"


if __name__ == "__main__":
    main()
