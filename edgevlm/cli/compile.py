"""`edgevlm compile`."""

from __future__ import annotations

from pathlib import Path

import click

from edgevlm.cli.common import Output, labels_option, output_options
from edgevlm.plan import PRECISIONS

EXAMPLES = """\b
Examples:
  edgevlm compile demo --target cpu
  edgevlm compile ./mobilenet-v2 --target cpu --eval-data ./pictures -o mobilenet-cpu
  edgevlm compile openai/clip-vit-base-patch32 --target cpu --labels "a cat,a dog"
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
@click.option("-t", "--target", default="cpu", show_default=True, help="A target's name, or a path to a TOML file.")
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
@click.option("--allow-pickle", is_flag=True, help="Take weights from a pickle (it can run code).")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that a checkpoint brings along.")
@click.option("-o", "--output", "destination", type=click.Path(path_type=Path),
              help="A folder, or a file ending in .evlm; MODEL-TARGET if left out.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there already.")
@click.option("--dry-run", is_flag=True, help="Print the plan and do no work.")
@output_options
def compile_command(
    model: str,
    target: str,
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
    allow_pickle: bool,
    trust_remote_code: bool,
    destination: Path | None,
    overwrite: bool,
    dry_run: bool,
    output: Output,
) -> None:
    """Compile MODEL for a target: export, quantize, measure, choose, pack.

    MODEL is a Hugging Face folder or hub id, an ONNX file with a card, a PyTorch package.module:factory, or `demo`.
    What comes out is a bundle: measured against the float model on this machine, verified, and whole.
    """
    from edgevlm.compiler import compile_job, prepare

    job = prepare(
        model,
        target=target,
        task=task,
        labels=labels,
        revision=revision,
        card=card,
        calibration_data=calibration_data,
        eval_data=eval_data,
        max_drop=max_drop,
        max_latency_ms=max_latency_ms,
        max_size_mb=max_size_mb,
        precision=precision,
        threads=threads,
        batch=batch,
        image_size=image_size,
        backends=backends,
        calibration=calibration,
        search_minutes=search_minutes,
        keep_float=keep_float,
        quantized=quantized,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        output=destination,
        overwrite=overwrite,
        check_output=not dry_run,
    )
    if dry_run:
        from edgevlm.plan import plan_text

        output.value(job.steps, lambda: plan_text(job.steps))
        return
    with output.progress() as progress:
        compiled = compile_job(job, progress=progress)

    def text() -> str:
        from edgevlm.cli.tables import summary_text

        return summary_text(compiled.report, bundle=compiled.bundle).rstrip()

    output.value({"bundle": str(compiled.bundle), "report": compiled.report}, text)
