"""Which text belongs to which picture of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgevlm.distillation.step import Outputs, Step

# The multiplier of Knuth's 64-bit linear congruential generator (MMIX), as a signed number.
_MULTIPLIER = 6364136223846793005


def paired_embeds(step: Step, outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Picture and text of each pair, at unit length: [n, d] and [n, d] of this process."""
    texts = outputs["text_embeds"][text_of_picture(step)]
    return F.normalize(outputs["image_embeds"], dim=-1), F.normalize(texts, dim=-1)


def text_of_picture(step: Step) -> Tensor:
    """The row of each picture's text among the batch's distinct texts; int64 [n]."""
    pictures = step.batch.pixel_values
    if step.batch.text_index is not None:
        return step.batch.text_index
    return torch.arange(len(pictures), device=pictures.device)


def text_keys(step: Step) -> Tensor:
    """A number for each picture's text, the same for the same tokens, however far each process padded; int64 [n]."""
    tokens = step.batch.input_ids
    assert tokens is not None
    mask = torch.ones_like(tokens) if step.batch.attention_mask is None else step.batch.attention_mask
    keys = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    for place in range(tokens.shape[1]):
        # Wraps around at 64 bits, which is a hash; padding changes nothing.
        keys = torch.where(mask[:, place] > 0, keys * _MULTIPLIER + tokens[:, place] + 1, keys)
    return keys[text_of_picture(step)]
