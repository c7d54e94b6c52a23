"""SAM with ViT-B against TinyViT-5M in its place, at the published size: 1024 × 1024 pixels.

    python -m benchmarks.distillation.published_sam

Both are built from their configurations with random weights, which decide nothing about speed; both are compiled to
bundles of ONNX Runtime in float32, and timed in turns. Results go to ``results/distillation/published-sam.{json,md}``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from benchmarks.distillation import sam_teacher
from benchmarks.distillation.beside import show_beside
from benchmarks.suite.environments import default_folder
from edgevlm.data.data_set import DataSet
from edgevlm.data.readers import SHAPES, read_data_set
from edgevlm.data.splits import MIN_PICTURES
from edgevlm.distillation.students import load_student
from edgevlm.ingest import read_model
from edgevlm.measure.protocol import ALL_STAY, with_rounds

RESULTS = Path(__file__).parents[1] / "results" / "distillation"
SIZE = 1024
STUDENT = "tinyvit-5m-sam"


@click.command()
@click.option("--rounds", default=6, show_default=True)
@click.option("--threads", default=0, show_default=True, help="0 is all.")
@click.option("--precision", default="fp32", show_default=True, help="As `edgevlm compile` takes it.")
@click.option("--work", type=click.Path(path_type=Path), help="Where checkpoints and bundles are kept.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(rounds: int, threads: int, precision: str, work: Path | None, results: Path) -> None:
    """Make both, compile both, and let them take turns."""
    work = work or default_folder() / "distillation" / "published-sam"
    work.mkdir(parents=True, exist_ok=True)
    teacher, student = work / "sam-vit-b", work / "mobile-sam"
    if not teacher.is_dir():
        sam_teacher.save(_vit_b(), teacher, size=SIZE)
    if not student.is_dir():
        kind, model = load_student(STUDENT), read_model(str(teacher))
        kind.save(kind.build(model), student, model)
    told = show_beside(
        (teacher, student),
        work=work,
        results=results,
        name="published-sam",
        protocol=with_rounds(ALL_STAY, rounds),
        threads=threads,
        precision=precision,
        # A run of the teacher takes seconds: one form each, and no search.
        backends=("onnxruntime",),
        search_minutes=0,
        eval_data=_few(),
    )
    click.echo(told)


def _few() -> DataSet:
    """As few pictures as a compile judges by: with random weights there is nothing to judge."""
    return read_data_set(SHAPES, labels=(), task="mask-generation", n_shapes=MIN_PICTURES, shapes_size=256)


def _vit_b() -> Any:
    """The configuration of facebook/sam-vit-base, which is Transformers' default but for weights of a usual size."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.SamConfig(vision_config={"initializer_range": sam_teacher.INITIALIZER_RANGE})
    model: Any = transformers.SamModel._from_config(config, attn_implementation="eager")
    return model.eval()


if __name__ == "__main__":
    main()
