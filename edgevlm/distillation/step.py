"""What an objective sees in one step of a training. Needs torch at import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Outputs = Mapping[str, Tensor]
"""By name, as graphs name them: ``logits`` [n, classes], ``image_embeds`` [n, d] or [n, d, h, w], ``text_embeds``
[m, d], ``image_features`` [n, d, h, w] before pooling, ``text_features`` [m, length, d], ``pred_masks``, ..."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What this process has of a step's batch.

    Args:
        pixel_values: as the student takes them.
        labels: of each picture; -1 where unknown; null where the data set has none.
        input_ids, attention_mask: the batch's distinct texts, where it has texts.
        text_index: which text belongs to each picture.
        prompts: points, boxes and masks of the task mask-generation, named as Transformers does: ``input_points``
            [n, p, k, 2] in pixels of ``pixel_values``, ``input_labels`` [n, p, k], ``input_boxes`` [n, p, 4].
        shown: where ``pixel_values`` hold the picture and not what it was filled up with; null: everywhere.

    Shapes: pixel_values [n, 3, height, width], labels int64 [n], input_ids int64 [m, length], text_index int64 [n],
        shown bool [n, height, width].
    """

    pixel_values: Tensor
    labels: Tensor | None = None
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    text_index: Tensor | None = None
    prompts: Mapping[str, Tensor] | None = None
    shown: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """A batch, and what teacher and student made of it.

    Args:
        teacher: without gradient; live, or as it was stored.
        run: the student over the batch with other pictures or other texts, for objectives that mask or alter what it
            sees; gives the outputs for these.
        decode: a mask decoder of SAM's, the student's or the teacher's ("student", "teacher"), over image embeddings
            and prompts; for objectives with prompts alone.
        gather: every process's rows of a tensor, with gradient; the tensor itself where there is one process. What is
            computed from them must be the same in every process.
        generator: seeded by the recipe's seed, the step and the process.
    """

    batch: Batch
    student: Outputs
    teacher: Outputs
    run: Callable[[Batch], Outputs]
    gather: Callable[[Tensor], Tensor]
    generator: torch.Generator
    decode: Callable[[str, Tensor, Mapping[str, Tensor]], Outputs] | None = None
