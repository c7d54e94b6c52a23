"""Two towers of any make that meet in one space, scored by a softmax over the texts; students of CLIP are saved so.

Papers: LiT: Zero-Shot Transfer with Locked-image text Tuning, arXiv:2111.07991, for towers that were trained apart;
those of the towers stand in ``image_classifier`` and ``clip``; BERT is arXiv:1810.04805.
Code: Transformers' ``VisionTextDualEncoderModel`` (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from edgevlm.errors import ModelError
from edgevlm.families import (
    FEATURES,
    ZERO_SHOT,
    Architecture,
    Checkpoint,
    Sizes,
    TextFacts,
    size_kwargs,
)
from edgevlm.families.clip import Clip

# The image towers by their model type, and the picture sizes that each takes.
VISION: Mapping[str, Sizes] = {
    "clip_vision_model": "interpolated",
    "mobilenet_v2": "any",
    "mobilevit": "any",
    "mobilevitv2": "any",
    "vit": "interpolated",
}
# What Transformers leaves out of a nested configuration where it equals the default.
_VISION_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "clip_vision_model": {"image_size": 224, "patch_size": 32},
    "vit": {"image_size": 224, "patch_size": 16},
}
_TEXT_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "bert": {"max_position_embeddings": 512, "pad_token_id": 0},
    "clip_text_model": {"max_position_embeddings": 77},
}


class DualEncoder(Clip):
    architectures: ClassVar[Mapping[str, Architecture]] = {
        "VisionTextDualEncoderModel": Architecture(tasks=(ZERO_SHOT, FEATURES), sizes="interpolated"),
    }

    def vision_config(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        config = checkpoint.config.get("vision_config", {})
        kind = _kind_of(checkpoint, "vision_config", VISION)
        return {**_VISION_DEFAULTS.get(kind, {}), **config}

    def sizes(self, checkpoint: Checkpoint) -> Sizes:
        return VISION[_kind_of(checkpoint, "vision_config", VISION)]

    def text(self, checkpoint: Checkpoint) -> TextFacts:
        kind = _kind_of(checkpoint, "text_config", _TEXT_DEFAULTS)
        config = {**_TEXT_DEFAULTS[kind], **checkpoint.config.get("text_config", {})}
        # CLIP's tower is causal and read at its end token, so it never sees padding; BERT is told by the mask.
        names = ("input_ids", "attention_mask") if kind == "bert" else ("input_ids",)
        return TextFacts(
            max_length=config["max_position_embeddings"],
            pad_token_id=config.get("pad_token_id"),
            input_names=names,
            is_length_free=True,
        )

    def call(self, module: Any, graph: str, *inputs: Any) -> tuple[Any, ...]:
        if graph == "text_encoder":
            names = ("input_ids", "attention_mask")[: len(inputs)]
            return (module.get_text_features(**dict(zip(names, inputs, strict=True))).pooler_output,)
        (pixel_values,) = inputs
        config = module.config.vision_config
        kwargs = size_kwargs(config, pixel_values) if VISION[config.model_type] == "interpolated" else {}
        return (module.get_image_features(pixel_values=pixel_values, **kwargs).pooler_output,)


def _kind_of(checkpoint: Checkpoint, key: str, known: Mapping[str, object]) -> str:
    kind = checkpoint.config.get(key, {}).get("model_type")
    if kind not in known:
        raise ModelError(
            f"'{checkpoint.folder}' has a tower of the type '{kind}' ({key}), which edgevlm does not know.",
            hint=f"Use a checkpoint whose {key} has a model_type of: {', '.join(known)}.",
        )
    return str(kind)
