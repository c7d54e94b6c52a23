"""Golden vectors: pictures with the outputs and answers that they gave, so that a device can tell whether it agrees."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence

import numpy as np

from edgevlm.runtime.image import ImageSource, decode_image, size_of
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import Array, Component, Golden, GoldenCase, Prompt, to_json
from edgevlm.runtime.verify import golden_conditions, kept_part, relative_error

_MOST_NUMBERS = 1 << 18
"""Of an output that are kept: a megabyte."""


def make_golden(
    pipeline: Pipeline,
    pictures: Iterable[ImageSource],
    *,
    components: Sequence[Component],
    tolerance: float,
    labels: Sequence[str] = (),
    prompts: Sequence[tuple[Prompt, ...]] = (),
    form: str = "",
) -> tuple[Golden, dict[str, bytes]]:
    """Run the pipeline on each picture, one at a time as a device does.

    Args:
        pictures: generated or the user's own, never calibration data; they are stored as PNG, without loss.
        components: as the manifest lists them, with the session options that ``pipeline`` runs with.
        tolerance: how far another machine may be off; the largest |difference| over the largest |expected|.
        labels: what to ask about, where the pipeline takes labels and has none of its own.
        prompts: what each picture is asked about, where the pipeline takes points and boxes.
        form: sets the answers of one form apart from those of others, which have the pictures in common.
    Returns: what the manifest says of them, and the files by path in the bundle.
    """
    cases, files = [], {}
    for index, source in enumerate(pictures):
        asked = prompts[index] if prompts else ()
        case, made = _make_case(pipeline, source, tuple(labels), asked, form, str(index))
        cases.append(case)
        files.update(made)
    return Golden(cases=tuple(cases), made_on=golden_conditions(components), tolerance=tolerance), files


def how_far_apart(pipeline: Pipeline, other: Pipeline, pictures: Iterable[ImageSource]) -> float:
    """The largest |difference| over the largest |value of ``other``|, of the worst output and picture."""
    worst = 0.0
    for source in pictures:
        image = decode_image(source)
        ours, theirs = (each.outputs(each.preprocess(image)[None]) for each in (pipeline, other))
        worst = max(worst, *(relative_error(theirs[name], ours[name]) for name in theirs))
    return worst


def _make_case(
    pipeline: Pipeline,
    source: ImageSource,
    labels: tuple[str, ...],
    prompts: tuple[Prompt, ...],
    form: str,
    name: str,
) -> tuple[GoldenCase, dict[str, bytes]]:
    stem = "/".join(part for part in ("golden", form, name) if part)
    image = decode_image(source)
    outputs = pipeline.outputs(pipeline.preprocess(image)[None])
    asked = [prompts] if prompts else None
    answer = pipeline.results(outputs, labels=labels or None, sizes=[size_of(image)], prompts=asked)[0]
    paths = {name: f"{stem}.{name}.npy" for name in sorted(outputs)}
    png = io.BytesIO()
    image.save(png, "PNG")
    every = {name: step for name in paths if (step := _every(outputs[name])) > 1}
    case = GoldenCase(
        picture=f"golden/{name}.png",
        outputs=paths,
        answer=f"{stem}.json",
        labels=labels,
        prompts=prompts,
        every=every,
    )
    files = {case.picture: png.getvalue(), case.answer: to_json(answer)}
    return case, files | {path: _npy(kept_part(outputs[name], case, name)) for name, path in paths.items()}


def _every(output: Array) -> int:
    """The step that keeps an output small; one that visits every column, not the same few of each row."""
    step = -(-output.size // _MOST_NUMBERS)
    while math.gcd(step, output.shape[-1]) > 1:
        step += 1
    return step


def _npy(array: Array) -> bytes:
    written = io.BytesIO()
    np.save(written, array, allow_pickle=False)
    return written.getvalue()
