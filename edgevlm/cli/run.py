"""`edgevlm run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevlm.cli.common import Output, labels_option, short_output_options
from edgevlm.errors import DataError, UsageError

if TYPE_CHECKING:
    from edgevlm.runtime.prompts import Box, Point
    from edgevlm.runtime.tasks import Result


def _points(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[Point, ...]:
    points: list[Point] = []
    for value in values:
        numbers = _numbers(value, "x,y, or x,y,0 for a point beside the thing", (2, 3))
        points.append((numbers[0], numbers[1]) if len(numbers) == 2 else (numbers[0], numbers[1], numbers[2]))
    return tuple(points)


def _boxes(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[Box, ...]:
    boxes = []
    for value in values:
        left, top, right, bottom = _numbers(value, "left,top,right,bottom", (4,))
        boxes.append((left, top, right, bottom))
    return tuple(boxes)


def _numbers(value: str, form: str, lengths: tuple[int, ...]) -> list[float]:
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in lengths:
        raise UsageError(f"'{value}' are not the numbers that were expected.", hint=f"Write {form}.")
    return numbers


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("pictures", nargs=-1, required=True, metavar="PICTURE...")
@click.option("--labels", callback=labels_option, help="Labels to choose from: a file with one a line, or a,b,c.")
@click.option("--top", "top_k", type=click.IntRange(min=1), help="Answers to show: 5 classes or every box if left out.")
@click.option(
    "--point", "points", multiple=True, callback=_points, metavar="X,Y", help="On the thing to cut out; X,Y,0: beside."
)
@click.option(
    "--box", "boxes", multiple=True, callback=_boxes, metavar="X0,Y0,X1,Y1", help="Around one thing to cut out."
)
@click.option("--masks", type=click.Path(path_type=Path), help="A folder to write masks to, as PNG.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; as compiled where left out.")
@short_output_options
def run_command(
    bundle: Path,
    pictures: tuple[str, ...],
    labels: tuple[str, ...],
    top_k: int | None,
    points: tuple[Point, ...],
    boxes: tuple[Box, ...],
    masks: Path | None,
    threads: int | None,
    output: Output,
) -> None:
    """Answer for pictures with a bundle. Needs no PyTorch.

    \b
    Examples:
      edgevlm run mobilenet-cpu/ picture.jpg
      edgevlm run clip-cpu/ *.jpg --labels "a cat,a dog" --json
      edgevlm run sam-cpu/ picture.jpg --point 320,200 --masks masks/
    """
    from edgevlm.runtime.pipeline import Pipeline

    pipeline = Pipeline.load(bundle, n_threads=threads)
    results = {
        name: pipeline(name, labels=labels or None, top_k=top_k, points=points, boxes=boxes) for name in pictures
    }
    if masks is not None:
        _write_masks(results, masks)

    def text() -> str:
        if len(results) == 1:
            return next(iter(results.values())).to_text()
        return "\n\n".join(f"{name}\n{result.to_text()}" for name, result in results.items())

    output.value(results if len(results) > 1 else next(iter(results.values())), text)


def _write_masks(results: dict[str, Result], folder: Path) -> None:
    """``<picture>-<prompt>.png``: white inside, black outside."""
    from PIL import Image

    from edgevlm.runtime.tasks.mask_generation import Masks

    stems = [Path(name).stem for name in results]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise UsageError(f"Two pictures are called '{twice[0]}', and so would be their masks.", hint="Run them apart.")
    for stem, result in zip(stems, results.values(), strict=True):
        if not isinstance(result, Masks):
            raise UsageError("This model gives no masks of things.", hint="Leave --masks out.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for i, inside in enumerate(result.to_arrays()):
                Image.fromarray(inside).save(folder / f"{stem}-{i}.png")
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"The masks cannot be written to '{folder}': {reason}.", hint="Name a folder.") from error
