"""What a picture is asked about follows from its things alone."""

from __future__ import annotations

import numpy as np
import pytest

from edgevlm.data.annotated import things_of
from edgevlm.data.prompts import deepest_point, prompts_of_place, prompts_of_things
from edgevlm.data.shapes import Pictures
from edgevlm.runtime.prompts import check_prompt


@pytest.mark.parametrize(
    ("rows", "point"),
    [
        (["#"], (0, 0)),
        (["....", ".##.", ".##."], (1, 2)),
        (["#####", "#####", "#####", "#...."], (2, 1)),
        (["#######", "#.....#", "#.....#", "#######"], (0, 2)),
        (["##.......", "##..#####", "....#####", "....#####"], (6, 2)),
    ],
)
def test_the_deepest_point_is_farthest_from_every_edge(rows: list[str], point: tuple[int, int]) -> None:
    mask = np.array([[cell == "#" for cell in row] for row in rows])
    x, y = deepest_point(mask)
    assert mask[int(y), int(x)]
    assert (x, y) == point


def test_each_thing_is_asked_about_twice() -> None:
    for picture in Pictures(n=20, seed=4, n_objects=(1, 4)):
        things = things_of([thing.mask for thing in picture.objects], (64, 64))
        prompts = prompts_of_things(things)
        assert len(prompts) == 2 * len(picture.objects)
        for thing, box, point in zip(picture.objects, prompts[::2], prompts[1::2], strict=True):
            assert box.box == thing.box
            assert not box.points
            ((x, y),) = point.points
            assert thing.mask[int(y), int(x)]


def test_places_lie_in_the_picture() -> None:
    for size in ((1, 1), (7, 300)):
        prompts = prompts_of_place(size)
        assert len(prompts) == 10
        for prompt in prompts:
            check_prompt(prompt, size)
