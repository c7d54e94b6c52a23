"""mIoU of what prompts gave, over all things of all pictures."""

from __future__ import annotations

import numpy as np
import pytest

from edgevlm.data.annotated import things_of
from edgevlm.data.data_set import Annotation
from edgevlm.evaluation.metrics import MASK_AGREEMENT, MIOU, MIOU_OF_BOXES, MIOU_OF_POINTS, PromptedMasks
from edgevlm.runtime.spec import Array
from edgevlm.runtime.tasks.mask_generation import Mask, Masks

WIDTH = 12


def strip(n: int) -> Array:
    """A mask of which the first ``n`` pixels are inside."""
    return (np.arange(WIDTH) < n)[None]


def truth(*lengths: int) -> Annotation:
    things = things_of([strip(n) for n in lengths], (1, WIDTH))
    return Annotation(digest="", read=lambda: things)


def answer(*lengths: int) -> Masks:
    masks = (Mask(score=0.5, box=None, n_pixels=n, runs=f"0 {n} {WIDTH - n}") for n in lengths)
    return Masks(height=1, width=WIDTH, masks=tuple(masks))


def rows(*values: object) -> Array:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def test_every_prompt_counts_alike_whichever_picture_it_is_of() -> None:
    labels = rows(truth(4), truth(6, 12))
    predictions = rows(answer(4, 2), answer(6, 3, 12, 6))  # by box, by point, of each thing
    judged = PromptedMasks().judge(predictions, labels=labels, reference=None)
    assert judged.metric == MIOU
    assert judged.pooled is not None
    assert judged.pooled.value == pytest.approx((1 + 0.5 + 1 + 0.5 + 1 + 0.5) / 6)
    assert judged.others == {MIOU_OF_BOXES: pytest.approx(1), MIOU_OF_POINTS: pytest.approx(0.5)}
    assert judged.scores.tolist() == pytest.approx([0.75, 0.75])
    twice_the_first = judged.pooled.values(np.array([[2.0, 0.0], [0.0, 0.0]]))
    assert twice_the_first[0] == pytest.approx(0.75)
    assert np.isnan(twice_the_first[1])


def test_the_float_models_masks_are_the_truth_where_there_is_none() -> None:
    mine, theirs = rows(answer(4, 12), answer(0)), rows(answer(8, 12), answer(0))
    judged = PromptedMasks().judge(mine, labels=None, reference=theirs)
    assert (judged.metric, judged.is_relative) == (MASK_AGREEMENT, True)
    assert judged.scores.tolist() == [0.75, 1.0]
    beside = PromptedMasks().judge(mine, labels=rows(truth(4), truth(3)), reference=theirs)
    assert beside.others[MASK_AGREEMENT] == pytest.approx(0.875)
