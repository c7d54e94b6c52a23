"""`edgevlm compile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm.cli.common import Output, labels_option, output_options
from edgevlm.plan import PRECISIONS, plan_text

if TYPE_CHECKING:
    from edgevlm.compile_each import CompiledEach

EXAMPLES = """\b
Examples:
  edgevlm compile demo --target cpu
  edgevlm compile ./mobilenet-v2 --target cpu --eval-data ./pictures -o mobilenet-cpu
  edgevlm compile openai/clip-vit-base-patch32 --target cpu --labels "a cat,a dog"
  edgevlm compile demo --target cpu --target raspberry-pi-5 --target rtx-40 -o demo-targets
  edgevlm compile resnet.onnx --card resnet.card.toml --target ./board.toml --dry-run
"""


def _batch(_context: click.Context, _parameter: click.Parameter, value: str) -> int | None:
    if value == "free":
        return None
    if not value.isdigit() or int(value) < 1:
        raise click.BadParameter(f"'{value}' is neither a number above 0 nor 'free'")
    return int(value)


def _names(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if value else ()


@click.command("compile", epilog=EXAMPLES)
@click.argument("model")
@click.option("-t", "--target", "targets", multiple=True, default=("cpu",), show_default=True,
              help="A target's name, or a path to a TOML file; several give a bundle each.")  # fmt: skip
@click.option("--task", help="Where the model does not say it: a Hugging Face task name.")
@click.option("--labels", callback=labels_option, help="Class names: a file with one a line, or a,b,c. "
              "A two-tower model keeps only their embeddings and leaves its text tower behind.")  # fmt: skip
@click.option("--revision", help="Branch, tag or commit of a hub checkpoint.")
@click.option("--card", type=click.Path(path_type=Path), help="Card of an ONNX file or a PyTorch module.")
@click.option("--calibration-data", metavar="DATA", help="Pictures to calibrate on; part of --eval-data if left out.")
@click.option("--eval-data", metavar="DATA", help="Pictures to judge on: folders by class, a CSV, a datasets folder.")
@click.option("--max-drop", type=click.FloatRange(0, 1), default=0.01, show_default=True,
              help="Accuracy that may be lost, as a fraction (0.01 is one point).")  # fmt: skip
@click.option("--max-latency-ms", type=click.FloatRange(0, min_open=True), help="Median latency of the graph at most.")
@click.option("--max-size-mb", type=click.FloatRange(0, min_open=True), help="Megabytes of the graphs at most.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True,
              help="auto lets measurement decide; others insist.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; the target's cores if left out.")
@click.option("--batch", callback=_batch, default="1", show_default=True, help="Pictures in a call, or 'free'.")
@click.option("--image-size", type=click.IntRange(min=1), help="Height and width instead of the model's own.")
@click.option("--backends", callback=_names, help="Only these, such as onnxruntime.")
@click.option("--calibration", default="default", show_default=True, help="A calibration recipe's name or path.")
@click.option("--search-minutes", type=click.FloatRange(min=0), default=4, show_default=True,
              help="For mixed precision and tuning, after every form was timed; 0 leaves them out.")  # fmt: skip
@click.option("--keep-float", callback=_names, help="Patterns of nodes that stay in float, such as '*attn*'.")
@click.option("--quantized", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Ready-made graphs, GRAPH.onnx each, that compete as candidates.")  # fmt: skip
@click.option(
    "--min-shapes", metavar="SIZES", help="Smallest sizes of TensorRT's engines, such as pixel_values:1x3x224x224."
)
@click.option("--opt-shapes", metavar="SIZES", help="The sizes that they are tuned for.")
@click.option("--max-shapes", metavar="SIZES", help="The largest sizes.")
@click.option(
    "--text-length", type=int, metavar="TOKENS", help="Cut and pad every text to so many, where all are short."
)
@click.option("--count-instructions", is_flag=True, help="Put into the report which instructions a run takes, counted "
              "on the emulated processor of an ARM target; counts, not times.")  # fmt: skip
@click.option("--allow-pickle", is_flag=True, help="Take weights from a pickle (it can run code).")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that a checkpoint brings along.")
@click.option("-o", "--output", "destination", type=click.Path(path_type=Path),
              help="A folder, or a file ending in .evlm; MODEL-TARGET if left out.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there already.")
@click.option("--dry-run", is_flag=True, help="Print the plan and do no work.")
@output_options
def compile_command(
    model: str,
    targets: tuple[str, ...],
    task: str | None,
    labels: tuple[str, ...],
    revision: str | None,
    card: Path | None,
    calibration_data: str | None,
    eval_data: str | None,
    max_drop: float,
    max_latency_ms: float | None,
    max_size_mb: float | None,
    precision: str,
    threads: int | None,
    batch: int | None,
    image_size: int | None,
    backends: tuple[str, ...],
    calibration: str,
    search_minutes: float,
    keep_float: tuple[str, ...],
    quantized: Path | None,
    min_shapes: str | None,
    opt_shapes: str | None,
    max_shapes: str | None,
    text_length: int | None,
    count_instructions: bool,
    allow_pickle: bool,
    trust_remote_code: bool,
    destination: Path | None,
    overwrite: bool,
    dry_run: bool,
    output: Output,
) -> int:
    """Compile MODEL for a target: export, quantize, measure, choose, pack.

    MODEL is a Hugging Face folder or hub id, an ONNX file with a card, a PyTorch package.module:factory, or `demo`.
    What comes out is a bundle: measured against the float model on this machine, verified, and whole.
    """
    from edgevlm.compiler import compile_job, prepare
    from edgevlm.runtime.engine import ranges_from_text

    asked: dict[str, Any] = {
        "task": task,
        "labels": labels,
        "revision": revision,
        "card": card,
        "calibration_data": calibration_data,
        "eval_data": eval_data,
        "max_drop": max_drop,
        "max_latency_ms": max_latency_ms,
        "max_size_mb": max_size_mb,
        "precision": precision,
        "threads": threads,
        "batch": batch,
        "image_size": image_size,
        "backends": backends,
        "calibration": calibration,
        "search_minutes": search_minutes,
        "keep_float": keep_float,
        "quantized": quantized,
        "shapes": ranges_from_text(min_shapes, opt_shapes, max_shapes),
        "text_length": text_length,
        "count_instructions": count_instructions,
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
        "overwrite": overwrite,
    }
    if len(targets) > 1 and not dry_run:
        return _compile_each(model, targets, destination, asked, output)
    if len(targets) > 1:
        jobs = {target: prepare(model, target=target, check_output=False, **asked) for target in targets}
        steps = {target: job.steps for target, job in jobs.items()}
        output.value(steps, lambda: "\n\n".join(f"{name}:\n{plan_text(each)}" for name, each in steps.items()))
        return 0
    job = prepare(model, target=targets[0], output=destination, check_output=not dry_run, **asked)
    if dry_run:
        output.value(job.steps, lambda: plan_text(job.steps))
        return 0
    with output.progress() as progress:
        compiled = compile_job(job, progress=progress)

    def text() -> str:
        from edgevlm.cli.tables import summary_text

        return summary_text(compiled.report, bundle=compiled.bundle).rstrip()

    output.value({"bundle": str(compiled.bundle), "report": compiled.report}, text)
    return 0


def _compile_each(
    model: str, targets: tuple[str, ...], folder: Path | None, asked: dict[str, Any], output: Output
) -> int:
    from edgevlm.compile_each import compile_each

    with output.progress() as progress:
        done = compile_each(model, targets, output=folder, progress=progress, **asked)
    output.value(done.overview, lambda: _overview_text(done))
    return next((outcome.exit_code for outcome in done.outcomes if outcome.exit_code), 0)


def _overview_text(done: CompiledEach) -> str:
    """A block for each target: the page has the table, which is too wide for a terminal."""
    from edgevlm.cli.tables import block_text
    from edgevlm.report.overview import HEADER

    blocks = [
        block_text(row.target, list(zip(HEADER[1:], row.cells()[1:], strict=True))) for row in done.overview.targets
    ]
    return "\n\n".join([*blocks, f"Overview  {done.folder / 'targets.html'}"])
