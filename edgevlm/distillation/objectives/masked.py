"""Guess what is hidden: patches of a picture, tokens of a text."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.distillation.objectives.objective import Count, Head, Objective, Share, Sizes, draw
from edgevlm.distillation.step import Step
from edgevlm.errors import UsageError

# Of the hidden tokens so many become the mask token, and so many any other (Devlin et al. 2019, section 3.1); the same
# without a mask token (appendix C.2, table 8: 83.7 on MNLI against 84.2).
_SHARES = (0.8, 0.1)
_SHARES_UNMASKED = (0.0, 0.8)


class MaskedImage(Head):
    """Predict the pixels of hidden patches, by a linear map from the features before pooling.

    A patch is what a cell of the feature map stands for, or a square of such cells: with a stride of 32, one cell is
    SimMIM's best patch. Hidden pixels take the picture's mean colour.

    Args:
        ratio: of the patches that are hidden.
        cells: a patch is so many cells wide.
        detail: each cell predicts so many pixels across, of the picture made that small. SimMIM's results were alike
            for pictures of 192 pixels predicted at 12 to 192; 8 for a stride of 32 would be 48.

    Source: Xie et al. 2022 (SimMIM), arXiv:2111.09886, sections 3 and 4.1.
    """

    def __init__(self, sizes: Sizes, *, ratio: Share = 0.6, cells: Count = 1, detail: Count = 8) -> None:
        super().__init__()
        self.ratio, self.cells, self.detail = ratio, cells, detail
        channels, *self.size = sizes.student["image_features"]
        self.predict = nn.Sequential(
            nn.Conv2d(channels, 3 * detail**2, kernel_size=1),
            nn.PixelShuffle(detail),
        )

    def forward(self, step: Step) -> Tensor:
        pictures = step.batch.pixel_values.float()
        hidden = self.hidden_cells(step)
        mean = pictures.mean((2, 3), keepdim=True)
        mask = F.interpolate(hidden, size=pictures.shape[2:], mode="nearest")
        seen = (pictures * (1 - mask) + mean * mask).to(step.batch.pixel_values.dtype)
        features = step.run(replace(step.batch, pixel_values=seen))["image_features"]
        guess: Tensor = self.predict(features)
        target = F.adaptive_avg_pool2d(pictures, (guess.shape[2], guess.shape[3]))
        return masked_l1(guess, target, F.interpolate(hidden, size=guess.shape[2:], mode="nearest"))

    def hidden_cells(self, step: Step) -> Tensor:
        """1 where a cell is hidden; [n, 1, h, w]."""
        rows, columns = (-(-length // self.cells) for length in self.size)
        n_hidden = max(1, round(self.ratio * rows * columns))
        ranks = draw(step, len(step.batch.pixel_values), rows * columns).argsort(1).argsort(1)
        patches = (ranks < n_hidden).float().reshape(-1, 1, rows, columns)
        cells = patches.repeat_interleave(self.cells, dim=2).repeat_interleave(self.cells, dim=3)
        return cells[..., : self.size[0], : self.size[1]]


def masked_l1(guess: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The mean absolute difference where ``mask`` is 1; [n, 3, h, w] twice and [n, 1, h, w]."""
    return ((guess - target).abs() * mask).sum() / (mask.sum() * guess.shape[1])


class MaskedLanguage(Head):
    """Predict hidden tokens by a linear map from the features of a text.

    Of each text, ``ratio`` of the tokens are chosen, at least one; the first and the last, which mark its ends, never
    are. Of the chosen 80 % are replaced by the mask token, 10 % by any token, and 10 % stay as they are. Where the
    tokenizer has no mask token, as CLIP's, 80 % are replaced by any token, and 20 % stay.

    Source: Devlin et al. 2019 (BERT), arXiv:1810.04805.
    """

    def __init__(self, sizes: Sizes, *, ratio: Share = 0.15) -> None:
        super().__init__()
        if sizes.n_tokens is None:
            raise UsageError(
                "hiding tokens needs a tokenizer, and the student has none.",
                hint="Take a student with a text tower, or leave the term out of the recipe.",
            )
        self.ratio, self.n_tokens = ratio, sizes.n_tokens
        self.mask_token, self.shares = (sizes.mask_token or 0), _SHARES
        if sizes.mask_token is None:
            self.shares = _SHARES_UNMASKED
            self.note = "masked-language: the tokenizer has no mask token; hidden tokens become any other"
        self.predict = nn.Linear(sizes.student["text_features"][-1], sizes.n_tokens)

    def forward(self, step: Step) -> Tensor:
        tokens = step.batch.input_ids
        assert tokens is not None
        chosen = self.choose(step, tokens)
        features = step.run(replace(step.batch, input_ids=self.hide(step, tokens, chosen)))["text_features"]
        guess: Tensor = self.predict(features[chosen])
        # A text of two tokens hides nothing; a batch of such texts alone is worth 0.
        return F.cross_entropy(guess, tokens[chosen], reduction="sum") / chosen.sum().clamp(min=1)

    def choose(self, step: Step, tokens: Tensor) -> Tensor:
        """Which tokens are to be predicted; bool [m, length]."""
        mask = step.batch.attention_mask
        attended = torch.ones_like(tokens) if mask is None else mask
        # Padding may stand on either side.
        before, after = attended.cumsum(1), attended.flip(1).cumsum(1).flip(1)
        inside = (attended > 0) & (before > 1) & (after > 1)
        n_chosen = (inside.sum(1, keepdim=True) * self.ratio).round().clamp(min=1)
        ranks = draw(step, *tokens.shape).masked_fill(~inside, 2).argsort(1).argsort(1)
        return inside & (ranks < n_chosen)

    def hide(self, step: Step, tokens: Tensor, chosen: Tensor) -> Tensor:
        how, other = draw(step, *tokens.shape), draw(step, *tokens.shape)
        others = (other * self.n_tokens).to(tokens.dtype).clamp(max=self.n_tokens - 1)
        masked, changed = self.shares
        replaced = torch.where(how < masked + changed, others, tokens)
        replaced = torch.where(how < masked, self.mask_token, replaced)
        return torch.where(chosen, replaced, tokens)


IMAGE = Objective(
    compute=MaskedImage,
    student=("image_features",),
    n_axes=3,
    formula="mean of abs(W f(masked) - pixels) where they are hidden",
    source="SimMIM, arXiv:2111.09886",
)
LANGUAGE = Objective(
    compute=MaskedLanguage,
    student=("text_features",),
    batch=("input_ids",),
    n_axes=2,
    formula="CE(W f(masked), token) where it is hidden",
    source="BERT, arXiv:1810.04805",
)
