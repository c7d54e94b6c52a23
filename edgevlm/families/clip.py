"""CLIP: an image tower and a text tower that meet in one space, scored by a softmax over the texts.

Paper: Learning Transferable Visual Models From Natural Language Supervision, arXiv:2103.00020 (MIT).
Code: Transformers' ``CLIPModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from edgevlm.families import (
    FEATURES,
    ZERO_SHOT,
    Architecture,
    Checkpoint,
    Family,
    TextFacts,
    image_input,
    size_kwargs,
    text_inputs,
)
from edgevlm.model import Graph
from edgevlm.runtime.spec import ImageProcessing, Scoring


class Clip(Family):
    architectures: ClassVar[Mapping[str, Architecture]] = {
        "CLIPModel": Architecture(tasks=(ZERO_SHOT, FEATURES), sizes="interpolated"),
    }
    # Transformers leaves out of the nested configurations what equals its defaults; these are they.
    text_defaults: ClassVar[Mapping[str, int]] = {"max_position_embeddings": 77}
    vision_defaults: ClassVar[Mapping[str, int]] = {"image_size": 224, "patch_size": 32}

    def vision_config(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        return {**self.vision_defaults, **checkpoint.config.get("vision_config", {})}

    def text(self, checkpoint: Checkpoint) -> TextFacts:
        config = {**self.text_defaults, **checkpoint.config.get("text_config", {})}
        # The tower is causal and read at the end token: what stands behind it, padding, is never seen; so no mask, and
        # no need of padding.
        return TextFacts(
            max_length=config["max_position_embeddings"], pad_token_id=config.get("pad_token_id"), is_length_free=True
        )

    def graphs(self, checkpoint: Checkpoint, task: str, image: ImageProcessing) -> tuple[Graph, ...]:
        name = "model" if task == FEATURES else "image_encoder"
        image_graph = Graph(name=name, inputs=(image_input(image),), outputs=("image_embeds",))
        if task == FEATURES:
            return (image_graph,)
        texts = text_inputs(self.text(checkpoint))
        return (image_graph, Graph(name="text_encoder", inputs=texts, outputs=("text_embeds",)))

    def call(self, module: Any, graph: str, *inputs: Any) -> tuple[Any, ...]:
        if graph == "text_encoder":
            return (module.get_text_features(input_ids=inputs[0]).pooler_output,)
        (pixel_values,) = inputs
        kwargs = size_kwargs(module.config.vision_config, pixel_values)
        return (module.get_image_features(pixel_values=pixel_values, **kwargs).pooler_output,)

    def scoring(self, module: Any) -> Scoring:
        return Scoring(scale=float(module.logit_scale.detach().exp()), activation="softmax")
