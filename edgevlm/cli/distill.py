"""`edgevlm distill`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevlm.cli.common import Output, labels_option, output_options

if TYPE_CHECKING:
    from edgevlm.distillation.distill import Distilled

EXAMPLES = """\b
Examples:
  edgevlm distill --teacher ./vit --student mobilevit-xxs --data ./pictures -o student
  edgevlm distill --teacher demo --student mobilevit-xxs --data shapes --recipe clip-affinity --steps 500
  torchrun --nproc-per-node 4 -m edgevlm distill --teacher ./clip --student mobilevitv2-1.0 --data ./pictures
"""


@click.command("distill", epilog=EXAMPLES)
@click.option("--teacher", required=True, metavar="MODEL", help="The large model: a checkpoint, an ONNX file, ...")
@click.option(
    "--student",
    required=True,
    metavar="NAME",
    help="The small model, such as mobilevit-xxs, or a folder that this made.",
)
@click.option("--data", metavar="DATA", help="Pictures to train on: folders by class, unlabelled, a CSV, shapes, ...")
@click.option("--eval-data", metavar="DATA", help="Pictures to judge on; 10 % of --data, held out, if left out.")
@click.option("--recipe", help="A recipe's name, or a path to a TOML file; by the teacher's task if left out.")
@click.option("--task", help="Where the teacher does not say it: a Hugging Face task name.")
@click.option("--labels", callback=labels_option, help="Class names: a file with one a line, or a,b,c.")
@click.option("--revision", help="Branch, tag or commit of a hub checkpoint.")
@click.option("--card", type=click.Path(path_type=Path), help="Card of an ONNX file or a PyTorch module.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that a checkpoint brings along.")
@click.option("--image-size", type=click.IntRange(min=1), help="Height and width of the student's pictures.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps to train, instead of the recipe's.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Pictures in a step, over all processes.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="At its highest.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="What the student computes in.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="Decides the student's first weights and the pictures' order.",
)
@click.option("--teacher-outputs", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Where the teacher's outputs lie, or are to lie; the cache folder if left out.")  # fmt: skip
@click.option("--no-latency", is_flag=True, help="Do not count and time student and teacher before training.")
@click.option("-o", "--output", "destination", type=click.Path(path_type=Path),
              help="A folder; TEACHER-STUDENT if left out.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run made.")
@output_options
def distill_command(
    teacher: str,
    student: str,
    data: str | None,
    eval_data: str | None,
    recipe: str | None,
    task: str | None,
    labels: tuple[str, ...],
    revision: str | None,
    card: Path | None,
    trust_remote_code: bool,
    image_size: int | None,
    steps: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    precision: str | None,
    seed: int | None,
    teacher_outputs: Path | None,
    no_latency: bool,
    destination: Path | None,
    overwrite: bool,
    output: Output,
) -> None:
    """Teach a small model what a large one knows.

    The teacher is asked once about every picture, and what it said is kept for further students. What comes out is a
    checkpoint in Hugging Face's layout, ready for `edgevlm compile`.
    A run that was stopped goes on when it is started again.
    """
    from edgevlm.distillation.distill import distill

    with output.progress() as progress:
        made = distill(
            teacher,
            student=student,
            data=data,
            eval_data=eval_data,
            recipe=recipe,
            task=task,
            labels=labels,
            revision=revision,
            card=card,
            trust_remote_code=trust_remote_code,
            image_size=image_size,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            precision=precision,
            seed=seed,
            teacher_outputs=teacher_outputs,
            is_timed=not no_latency,
            output=destination,
            overwrite=overwrite,
            progress=progress,
        )
    output.value({"folder": str(made.folder), "distillation": made.distillation}, lambda: distilled_text(made))


def distilled_text(made: Distilled) -> str:
    """For people: how good the student is beside its teacher, how large, and what to do with it."""
    found = made.distillation
    lines = [f"{found.metric} on {found.n_held_out_pictures} pictures that training never saw ({found.held_out_data}):"]
    rows = {f"student {found.student}": found.student_metric, f"teacher {found.teacher}": found.teacher_metric}
    lines += [f"  {name}  {value:.4f}" for name, value in rows.items() if value is not None]
    lines.append(
        f"{found.n_steps} steps of {found.recipe.batch_size} pictures, the weights of step {found.best_step}; "
        f"{found.n_parameters / 1e6:.2f} million parameters"
    )
    n_judged = math.ceil(found.n_steps / found.recipe.checkpoint_every)
    if found.recipe.patience and n_judged > 1:
        lines.append(f"the best of {n_judged} checkpoints by these pictures, so it may be a little less good on others")
    lines += [f"note: {note}" for note in found.notes]
    lines.append(f"folder: {made.folder}; next: edgevlm compile {made.folder}")
    return "\n".join(lines)
