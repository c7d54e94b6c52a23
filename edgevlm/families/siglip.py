"""SigLIP: two towers like CLIP's, each text scored for itself by a sigmoid.

Papers: Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343 (Apache-2.0); the fixed-resolution checkpoints
of SigLIP 2, arXiv:2502.14786, have the same layout.
Code: Transformers' ``SiglipModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from edgevlm.families import FEATURES, ZERO_SHOT, Architecture
from edgevlm.families.clip import Clip
from edgevlm.runtime.spec import Scoring


class Siglip(Clip):
    architectures: ClassVar[Mapping[str, Architecture]] = {
        "SiglipModel": Architecture(tasks=(ZERO_SHOT, FEATURES), sizes="interpolated"),
    }
    text_defaults: ClassVar[Mapping[str, int]] = {"max_position_embeddings": 64}
    vision_defaults: ClassVar[Mapping[str, int]] = {"image_size": 224, "patch_size": 16}

    def scoring(self, module: Any) -> Scoring:
        scale, bias = module.logit_scale.detach().exp(), module.logit_bias.detach()
        return Scoring(scale=float(scale), bias=float(bias), activation="sigmoid")
