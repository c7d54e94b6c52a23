"""`edgevlm quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevlm.cli.common import Output, labels_option, output_options

if TYPE_CHECKING:
    from edgevlm.quantization.qat import QuantizedModel

EXAMPLES = """\b
Examples:
  edgevlm quantize ./mobilenet-v2 --qat --data ./pictures -o mobilenet-qat
  edgevlm quantize demo --qat --data shapes --weight-bits 4 -o demo-qat
  edgevlm quantize ./student --qat --teacher ./vit --data ./pictures
  torchrun --nproc-per-node 4 -m edgevlm quantize ./vit --qat --data ./pictures
"""


@click.command("quantize", epilog=EXAMPLES)
@click.argument("model")
@click.option("--qat", is_flag=True, help="Fine-tune the model for its int8 form (quantization-aware training).")
@click.option("--data", metavar="DATA", help="Pictures to train on: folders by class, a CSV, shapes, ...")
@click.option("--eval-data", metavar="DATA", help="Pictures to judge on; 30 % of --data, held out, if left out.")
@click.option("-t", "--target", default="cpu", show_default=True, help="A target's name, or a path to a TOML file.")
@click.option("--task", help="Where the model does not say it: a Hugging Face task name.")
@click.option("--labels", callback=labels_option, help="Class names: a file with one a line, or a,b,c.")
@click.option("--revision", help="Branch, tag or commit of a hub checkpoint.")
@click.option("--card", type=click.Path(path_type=Path), help="Card of a PyTorch module.")
@click.option("--image-size", type=click.IntRange(min=1), help="Height and width instead of the model's own.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that a checkpoint brings along.")
@click.option("--scheme", help="core, all, linear or conv; the most promising if left out.")
@click.option("--weights", default="per-channel", show_default=True, help="per-channel or per-tensor.")
@click.option("--weight-bits", type=int, default=8, show_default=True,
              help="Fewer give int8 weights of fewer levels, no smaller and no faster.")  # fmt: skip
@click.option("--steps", "n_steps", type=click.IntRange(min=1), default=400, show_default=True, help="Steps to train.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True,
              help="Pictures in a step, over all processes.")  # fmt: skip
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=3e-4, show_default=True,
              help="At its highest.")  # fmt: skip
@click.option("--distill-share", type=click.FloatRange(0, 1), default=0.5, show_default=True,
              help="Weight of the teacher's answers, or the float model's; the labels have the rest.")  # fmt: skip
@click.option("--teacher", metavar="MODEL", help="Learn this larger model's answers instead of the float model's.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides the order of the pictures."
)
@click.option("--max-drop", type=click.FloatRange(0, 1), default=0.01, show_default=True,
              help="Accuracy that the bundle may lose, as a fraction.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the bundle.")
@click.option("--no-bundle", is_flag=True, help="Leave the compile out.")
@click.option("-o", "--output", "destination", type=click.Path(path_type=Path), help="A folder; MODEL-qat if left out.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run made.")
@output_options
def quantize_command(
    model: str,
    qat: bool,
    data: str | None,
    eval_data: str | None,
    target: str,
    task: str | None,
    labels: tuple[str, ...],
    revision: str | None,
    card: Path | None,
    image_size: int | None,
    trust_remote_code: bool,
    scheme: str | None,
    weights: str,
    weight_bits: int,
    n_steps: int,
    batch_size: int,
    learning_rate: float,
    distill_share: float,
    teacher: str | None,
    seed: int,
    max_drop: float,
    threads: int | None,
    no_bundle: bool,
    destination: Path | None,
    overwrite: bool,
    output: Output,
) -> None:
    """Fine-tune MODEL for its int8 form where quantizing it after training costs too much accuracy.

    What comes out is a folder: the fine-tuned weights in the model's own layout, the quantized graph, proven to answer
    as the trained model, and a bundle in which that graph ships if it beats float within the budget.
    A run that was stopped goes on when it is started again.
    """
    from edgevlm.quantization.fine_tuning import Training
    from edgevlm.quantization.qat import quantize_model

    with output.progress() as progress:
        made = quantize_model(
            model,
            qat=qat,
            data=data,
            eval_data=eval_data,
            target=target,
            task=task,
            labels=labels,
            revision=revision,
            card=card,
            image_size=image_size,
            trust_remote_code=trust_remote_code,
            scheme=scheme,
            weights=weights,
            weight_bits=weight_bits,
            training=Training(
                n_steps=n_steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                distill_share=distill_share,
                seed=seed,
            ),
            teacher=teacher,
            max_drop=max_drop,
            threads=threads,
            is_bundled=not no_bundle,
            output=destination,
            overwrite=overwrite,
            progress=progress,
        )
    report = made.compiled.report if made.compiled else None
    value = {"folder": str(made.folder), "quantization": made.quantization, "report": report}
    output.value(value, lambda: quantized_text(made))


def quantized_text(made: QuantizedModel) -> str:
    """For people: how far each form falls behind float, the proof, and what the bundle ships."""
    found = made.quantization
    lines = [f"{found.trained.metric} on {found.trained.n} pictures that training never saw ({found.held_out_data}):"]
    lines.append(f"  float                     {found.trained.reference:.2%}")
    rows = {
        "quantized after training": found.post_training,
        "fine-tuned and quantized": found.trained,
        "fine-tuned, not quantized": found.tuned_float,
    }
    for name, drop in rows.items():
        interval = f"95 % interval {drop.low * 100:+.2f} to {drop.high * 100:+.2f}"
        lines.append(f"  {name:<25} {drop.candidate:.2%}  drop {drop.value * 100:+.2f} points ({interval})")
    proof = found.proof
    lines.append(
        f"the exported graph answers as the trained model on {proof.agreement:.2%} of {proof.n} pictures "
        f"({proof.exported:.2%} and {proof.trained:.2%})"
    )
    lines.append(f"runs: {found.fusion.describe()}; weights: {found.weights}")
    if made.compiled is not None:
        lines += [f"bundle: {made.compiled.bundle}", made.compiled.report.verdict]
    lines.append(f"folder: {made.folder}")
    return "\n".join(lines)
