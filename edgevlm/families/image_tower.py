"""Image towers: pixels in, one vector for the picture and, where the model has them, vectors for its parts out.

Each is its paper's model as Transformers has it, without a head; see ``image_classifier`` for the papers, and CLIP
arXiv:2103.00020, SigLIP arXiv:2303.15343 for the towers of two-tower models that were saved alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from edgevlm.errors import ModelError
from edgevlm.families import FEATURES, Architecture, Checkpoint, Family, image_input, size_kwargs
from edgevlm.model import Graph
from edgevlm.runtime.spec import ImageProcessing

SIZES: Mapping[str, Literal["fixed", "interpolated", "any"]] = {
    "BeitModel": "fixed",
    "BitModel": "any",
    "CLIPVisionModel": "interpolated",
    "CLIPVisionModelWithProjection": "interpolated",
    "ConvNextModel": "any",
    "ConvNextV2Model": "any",
    "DeiTModel": "interpolated",
    "Dinov2Model": "any",
    "Dinov2WithRegistersModel": "any",
    "EfficientNetModel": "any",
    "MobileNetV1Model": "any",
    "MobileNetV2Model": "any",
    "MobileViTModel": "any",
    "MobileViTV2Model": "any",
    "RegNetModel": "any",
    "ResNetModel": "any",
    "SiglipVisionModel": "interpolated",
    "SwinModel": "any",
    "Swinv2Model": "any",
    "ViTModel": "interpolated",
}

# Their pooler is a trained layer that many checkpoints (DINO's among them) were saved without; random weights in its
# place would be worse than none, so the class token, which is what such a checkpoint was trained to give, stands in.
_TRAINED_POOLERS = {"DeiTModel": "pooler.dense.weight", "ViTModel": "pooler.dense.weight"}


class ImageTower(Family):
    architectures: ClassVar[Mapping[str, Architecture]] = {
        name: Architecture(tasks=(FEATURES,), sizes=sizes) for name, sizes in SIZES.items()
    }

    def vision_config(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        config: Mapping[str, Any] = checkpoint.config.get("vision_config", checkpoint.config)
        return config

    def graphs(self, checkpoint: Checkpoint, task: str, image: ImageProcessing) -> tuple[Graph, ...]:
        is_projected = checkpoint.architecture == "CLIPVisionModelWithProjection"
        outputs = ("image_embeds",) if is_projected else ("pooler_output", "last_hidden_state")
        return (Graph(name="model", inputs=(image_input(image),), outputs=outputs),)

    def options(self, checkpoint: Checkpoint) -> dict[str, Any]:
        pooler = _TRAINED_POOLERS.get(checkpoint.architecture)
        if pooler is None or checkpoint.tensors is None or any(name.endswith(pooler) for name in checkpoint.tensors):
            return {}
        return {"load": {"add_pooling_layer": False}}

    def call(self, module: Any, graph: str, *inputs: Any) -> tuple[Any, ...]:
        (pixel_values,) = inputs
        config = getattr(module.config, "vision_config", module.config)
        is_interpolated = SIZES.get(type(module).__name__) == "interpolated"
        kwargs = size_kwargs(config, pixel_values) if is_interpolated else {}
        output = module(pixel_values=pixel_values, **kwargs)
        if getattr(output, "image_embeds", None) is not None:
            return (output.image_embeds,)
        pooled = output.pooler_output
        if pooled is None:
            if type(module).__name__ not in _TRAINED_POOLERS:
                raise ModelError(
                    f"This {type(module).__name__} gives no vector for the whole picture.",
                    hint="Use a checkpoint with a pooling head.",
                )
            pooled = output.last_hidden_state[:, 0]
        # Convolutional towers keep 1×1 maps behind their pooled features.
        return (pooled.flatten(1), output.last_hidden_state)
