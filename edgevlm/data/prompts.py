"""What a picture is asked about when a model that takes points and boxes is judged, calibrated or timed."""

from __future__ import annotations

import numpy as np

from edgevlm.data.data_set import Sample, Things
from edgevlm.runtime.image import Size
from edgevlm.runtime.spec import Array, Prompt

_GRID = (0.25, 0.5, 0.75)


def prompts_of_sample(sample: Sample, size: Size) -> tuple[Prompt, ...]:
    """Of its things where it has any, else of places in it."""
    things = sample.annotation.read() if sample.annotation else None
    found = prompts_of_things(things) if isinstance(things, Things) else ()
    return found or prompts_of_place(size)


def prompts_of_things(things: Things) -> tuple[Prompt, ...]:
    """Two prompts for each thing, one after the other: the box around it, and the point deepest inside it."""
    prompts = []
    for box, mask in zip(things.boxes.tolist(), things.masks, strict=True):
        prompts.append(Prompt(box=(box[0], box[1], box[2], box[3])))
        prompts.append(Prompt(points=(deepest_point(mask),), labels=(1,)))
    return tuple(prompts)


def prompts_of_place(size: Size) -> tuple[Prompt, ...]:
    """Where nobody knows what there is: the box around the middle, and points on a grid of 3 × 3."""
    height, width = size
    middle = Prompt(box=(width * _GRID[0], height * _GRID[0], width * _GRID[2], height * _GRID[2]))
    points = [(width * x, height * y) for y in _GRID for x in _GRID]
    return (middle, *(Prompt(points=(point,), labels=(1,)) for point in points))


def deepest_point(mask: Array) -> tuple[float, float]:
    """The (x, y) of a pixel that is as far from the mask's edge as any, by king's moves; the middle one of several.

    Shapes: bool [height, width], True somewhere.
    Example:
        >>> deepest_point(np.ones((5, 9), dtype=bool))
        (4.0, 2.0)
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    left_over = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    while (smaller := _eroded(left_over)).any():
        left_over = smaller
    found = np.argwhere(left_over)
    y, x = found[len(found) // 2]
    return float(left + x), float(top + y)


def _eroded(mask: Array) -> Array:
    padded = np.pad(mask, 1)
    rows = padded[:-2] & padded[1:-1] & padded[2:]
    eroded: Array = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return eroded
