"""Image classifiers: pixels in, one logit for each class out.

Each is its paper's model as Transformers has it (``AutoModelForImageClassification``): ViT arXiv:2010.11929, DeiT
arXiv:2012.12877, BEiT arXiv:2106.08254, Swin arXiv:2103.14030, ConvNeXt arXiv:2201.03545, ResNet arXiv:1512.03385,
RegNet arXiv:2003.13678, BiT arXiv:1912.11370, MobileNetV1 arXiv:1704.04861, MobileNetV2 arXiv:1801.04381, MobileViT
arXiv:2110.02178 and arXiv:2206.02680, EfficientNet arXiv:1905.11946, DINOv2 arXiv:2304.07193, PoolFormer
arXiv:2111.11418, LeViT arXiv:2104.01136, PVT v2 arXiv:2106.13797, FocalNet arXiv:2203.11926, SwiftFormer
arXiv:2303.15446.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from edgevlm.families import CLASSIFY, Architecture, Checkpoint, Family, image_input, size_kwargs
from edgevlm.model import Graph
from edgevlm.runtime.spec import ImageProcessing

SIZES: Mapping[str, Literal["fixed", "interpolated", "any"]] = {
    "BeitForImageClassification": "fixed",
    "BitForImageClassification": "any",
    "CLIPForImageClassification": "fixed",
    "ConvNextForImageClassification": "any",
    "ConvNextV2ForImageClassification": "any",
    "DeiTForImageClassification": "interpolated",
    "DeiTForImageClassificationWithTeacher": "interpolated",
    "Dinov2ForImageClassification": "any",
    "Dinov2WithRegistersForImageClassification": "any",
    "EfficientNetForImageClassification": "any",
    "FocalNetForImageClassification": "any",
    "LevitForImageClassification": "fixed",
    "LevitForImageClassificationWithTeacher": "fixed",
    "MobileNetV1ForImageClassification": "any",
    "MobileNetV2ForImageClassification": "any",
    "MobileViTForImageClassification": "any",
    "MobileViTV2ForImageClassification": "any",
    "PoolFormerForImageClassification": "any",
    "PvtV2ForImageClassification": "any",
    "RegNetForImageClassification": "any",
    "ResNetForImageClassification": "any",
    "SiglipForImageClassification": "interpolated",
    "SwiftFormerForImageClassification": "any",
    "SwinForImageClassification": "any",
    "Swinv2ForImageClassification": "any",
    "ViTForImageClassification": "interpolated",
}


class ImageClassifier(Family):
    architectures: ClassVar[Mapping[str, Architecture]] = {
        name: Architecture(tasks=(CLASSIFY,), sizes=sizes) for name, sizes in SIZES.items()
    }

    def vision_config(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        config: Mapping[str, Any] = checkpoint.config.get("vision_config", checkpoint.config)
        return config

    def graphs(self, checkpoint: Checkpoint, task: str, image: ImageProcessing) -> tuple[Graph, ...]:
        return (Graph(name="model", inputs=(image_input(image),), outputs=("logits",)),)

    def call(self, module: Any, graph: str, *inputs: Any) -> tuple[Any, ...]:
        (pixel_values,) = inputs
        config = getattr(module.config, "vision_config", module.config)
        is_interpolated = SIZES.get(type(module).__name__) == "interpolated"
        kwargs = size_kwargs(config, pixel_values) if is_interpolated else {}
        return (module(pixel_values=pixel_values, **kwargs).logits,)
