"""Points and boxes as people write them, as prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgevlm.errors import UsageError
from edgevlm.runtime.image import Size
from edgevlm.runtime.spec import Prompt

Point = tuple[float, float] | tuple[float, float, float]
"""(x, y), with a 0 behind it where it lies beside the thing that is meant."""

Box = tuple[float, float, float, float]
"""(left, top, right, bottom)."""


def prompts_of(points: Sequence[Point] = (), boxes: Sequence[Box] = ()) -> tuple[Prompt, ...]:
    """All points show one thing together, every box one of its own; points beside one box say more of what is in it.

    Raises: UsageError: a point or box is none, or it is not clear which of several boxes the points belong to.
    """
    if points and len(boxes) > 1:
        raise UsageError(
            f"{len(points)} points were given with {len(boxes)} boxes, and nothing says which box they belong to.",
            hint="Ask with one box and its points at a time.",
        )
    if not points:
        return tuple(Prompt(box=_box(box)) for box in boxes)
    labels = tuple(_label(point) for point in points)
    places = tuple((float(point[0]), float(point[1])) for point in points)
    return (Prompt(points=places, labels=labels, box=_box(boxes[0]) if boxes else None),)  # type: ignore[arg-type]


def _label(point: Point) -> int:
    if len(point) not in (2, 3) or (len(point) == 3 and point[2] not in (0, 1)):
        raise UsageError(
            f"{tuple(point)} is no point.", hint="Give (x, y), or (x, y, 0) for one beside the thing that is meant."
        )
    return int(point[2]) if len(point) == 3 else 1


def _box(box: Box) -> Box:
    if len(box) != 4:
        raise UsageError(f"{tuple(box)} is no box.", hint="Give (left, top, right, bottom).")
    left, top, right, bottom = map(float, box)
    return left, top, right, bottom


def check_prompt(prompt: Prompt, size: Size) -> None:
    """Refuse a prompt that shows nothing of a picture of this size.

    Raises: UsageError: with what is wrong.
    """
    height, width = size
    numbers = [number for point in prompt.points for number in point] + list(prompt.box or ())
    if not numbers:
        raise UsageError("A prompt has neither points nor a box.", hint="Give it at least one point.")
    if len(prompt.labels) != len(prompt.points):
        raise UsageError(
            f"A prompt has {len(prompt.points)} points and {len(prompt.labels)} labels.",
            hint="Give one label for each point: 1 on the thing, 0 beside it.",
        )
    if not all(map(math.isfinite, numbers)):
        raise UsageError("A prompt holds what is no number.", hint="Give pixels.")
    outside = next((p for p in prompt.points if not (0 <= p[0] < width and 0 <= p[1] < height)), None)
    if outside is not None:
        raise UsageError(
            f"The point {outside[0]:g},{outside[1]:g} lies outside the picture, which is {width} pixels wide and "
            f"{height} high.",
            hint="Give x from the left and y from the top, in pixels of the picture.",
        )
    if prompt.box is not None:
        left, top, right, bottom = prompt.box
        if not (left < right and top < bottom and left < width and top < height and right > 0 and bottom > 0):
            raise UsageError(
                f"The box {left:g},{top:g},{right:g},{bottom:g} holds nothing of the picture, which is {width} pixels "
                f"wide and {height} high.",
                hint="Give left,top,right,bottom in pixels of the picture.",
            )
