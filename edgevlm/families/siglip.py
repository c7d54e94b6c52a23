"""SigLIP: two towers like CLIP's, each text scored for itself by a sigmoid.

Papers: Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343 (Apache-2.0); the fixed-resolution checkpoints
of SigLIP 2, arXiv:2502.14786, have the same layout.
Code: Transformers' ``SiglipModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from edgevlm.families import FEATURES, ZERO_SHOT, Architecture, Checkpoint, TextFacts
from edgevlm.families.clip import Clip
from edgevlm.runtime.spec import Scoring

# The size of the vocabulary that came with canonical texts. SigLIP 2 has Gemma's, and keeps punctuation.
_CANONICAL_VOCABULARY = 32_000


class Siglip(Clip):
    architectures: ClassVar[Mapping[str, Architecture]] = {
        "SiglipModel": Architecture(tasks=(ZERO_SHOT, FEATURES), sizes="interpolated"),
    }
    text_defaults: ClassVar[Mapping[str, int]] = {"max_position_embeddings": 64}
    vision_defaults: ClassVar[Mapping[str, int]] = {"image_size": 224, "patch_size": 16}

    def text(self, checkpoint: Checkpoint) -> TextFacts:
        # It is read at the last place, a padded one for most texts, and every place sees all others.
        facts = msgspec.structs.replace(super().text(checkpoint), is_length_free=False)
        n_tokens = checkpoint.config.get("text_config", {}).get("vocab_size", _CANONICAL_VOCABULARY)
        if n_tokens != _CANONICAL_VOCABULARY:
            return facts
        # Transformers' SiglipTokenizer does this in Python, where a tokenizer.json may have lost it.
        return msgspec.structs.replace(
            facts,
            same_tokens=("A photo,  of a CAT!", "a photo of a cat"),
            same_because="lowers the case of a text and drops its punctuation",
        )

    def scoring(self, module: Any) -> Scoring:
        scale, bias = module.logit_scale.detach().exp(), module.logit_bias.detach()
        return Scoring(scale=float(scale), bias=float(bias), activation="sigmoid")
