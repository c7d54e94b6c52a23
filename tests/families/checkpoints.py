"""Checkpoints of every architecture that edgevlm knows, as small as they can be, with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIZE = 32
LARGE = 64  # for those that halve the picture five times and then cut it into windows


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Args:
    family: the file under ``edgevlm/families`` that knows it.
    config: of the Transformers configuration class ``config_class``.
    """

    architecture: str
    family: str
    config_class: str
    processor: str
    config: dict[str, Any] = field(default_factory=dict)
    size: int = SIZE

    def __str__(self) -> str:
        return self.architecture


_TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_PATCHES = {**_TOWER, "image_size": SIZE, "patch_size": 8}
_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
_CONV = {"num_channels": 3, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "image_size": SIZE}
_SWIN = {"image_size": SIZE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
_MOBILENET = {"depth_multiplier": 0.25, "image_size": LARGE, "min_depth": 4}
_MOBILEVIT = {
    "image_size": LARGE,
    "hidden_sizes": [16, 16, 16],
    "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 16],
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
_MOBILEVIT2 = {
    "image_size": LARGE,
    "width_multiplier": 0.25,
    "n_attn_blocks": [1, 1, 1],
    "base_attn_unit_dims": [8, 8, 8],
}
_EFFICIENTNET = {"image_size": LARGE, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128}
_BIT = {"num_channels": 3, **_STAGES, "num_groups": 4}
_DINO = {**{k: v for k, v in _PATCHES.items() if k != "intermediate_size"}, "mlp_ratio": 2}
_TEXT = {**_TOWER, "vocab_size": 64, "max_position_embeddings": 8, "projection_dim": 16, "pad_token_id": 0}
_TWO_TOWERS = {
    "projection_dim": 16,
    "vision_config": {**_PATCHES, "projection_dim": 16},
    "text_config": {**_TEXT, "bos_token_id": 1, "eos_token_id": 3},
}
_CAUSAL_TEXT = {**_TEXT, "model_type": "clip_text_model", "bos_token_id": 1, "eos_token_id": 3}
_DUAL_ENCODER = {
    "projection_dim": 16,
    "vision_config": {**_MOBILEVIT, "model_type": "mobilevit", "hidden_size": 16},
    "text_config": _CAUSAL_TEXT,
}
_FOCALNET = {"image_size": SIZE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1]}
_FOCALNET |= {"focal_windows": [3, 3], "hidden_sizes": [8, 16]}
_POOLFORMER = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
_LEVIT = {
    "image_size": LARGE,
    "hidden_sizes": [16, 32, 48],
    "num_attention_heads": [1, 2, 3],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
    "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 4, 4, 2, 2]],
}
_PVT2 = {
    "image_size": SIZE,
    "hidden_sizes": [8, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
}
_SWIFTFORMER = {"image_size": SIZE, "embed_dims": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}


def _classifier(name: str, config_class: str, processor: str, config: dict[str, Any], size: int = SIZE) -> Tiny:
    return Tiny(
        architecture=f"{name}",
        family="image_classifier",
        config_class=config_class,
        processor=processor,
        config={**config, "num_labels": 5},
        size=size,
    )


def _tower(name: str, config_class: str, processor: str, config: dict[str, Any], size: int = SIZE) -> Tiny:
    return Tiny(
        architecture=name,
        family="image_tower",
        config_class=config_class,
        processor=processor,
        config=config,
        size=size,
    )


_SAM = {
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": LARGE,
        "patch_size": 8,
        "window_size": 3,
        "global_attn_indexes": [1],
        "output_channels": 16,
        "num_pos_feats": 8,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": LARGE, "patch_size": 8, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
}

_TINY_SAM = {
    **_SAM,
    "vision_config": {
        "image_size": LARGE,
        "embed_dims": [8, 16, 16, 32],
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 4],
        "window_sizes": [3, 3, 3, 3],
        "output_channels": 16,
        "num_pos_feats": 8,
        "scale": 16,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": LARGE, "mask_input_channels": 4},
}

VIT, CONVNEXT, BIT = "ViTImageProcessor", "ConvNextImageProcessor", "BitImageProcessor"
CLIP, SIGLIP = "CLIPImageProcessor", "SiglipImageProcessor"
MOBILENET1, MOBILENET2 = "MobileNetV1ImageProcessor", "MobileNetV2ImageProcessor"

CHECKPOINTS = (
    _classifier("BeitForImageClassification", "BeitConfig", "BeitImageProcessor", _PATCHES),
    _classifier("BitForImageClassification", "BitConfig", BIT, _BIT),
    _classifier("CLIPForImageClassification", "CLIPConfig", CLIP, _TWO_TOWERS),
    _classifier("ConvNextForImageClassification", "ConvNextConfig", CONVNEXT, _CONV),
    _classifier("ConvNextV2ForImageClassification", "ConvNextV2Config", CONVNEXT, _CONV),
    _classifier("DeiTForImageClassification", "DeiTConfig", "DeiTImageProcessor", _PATCHES),
    _classifier("DeiTForImageClassificationWithTeacher", "DeiTConfig", "DeiTImageProcessor", _PATCHES),
    _classifier("Dinov2ForImageClassification", "Dinov2Config", BIT, _DINO),
    _classifier("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", BIT, _DINO),
    _classifier(
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        "EfficientNetImageProcessor",
        _EFFICIENTNET,
        LARGE,
    ),
    _classifier("FocalNetForImageClassification", "FocalNetConfig", BIT, _FOCALNET),
    _classifier("LevitForImageClassification", "LevitConfig", "LevitImageProcessor", _LEVIT, LARGE),
    _classifier("LevitForImageClassificationWithTeacher", "LevitConfig", "LevitImageProcessor", _LEVIT, LARGE),
    _classifier("MobileNetV1ForImageClassification", "MobileNetV1Config", MOBILENET1, _MOBILENET, LARGE),
    _classifier("MobileNetV2ForImageClassification", "MobileNetV2Config", MOBILENET2, _MOBILENET, LARGE),
    _classifier("MobileViTForImageClassification", "MobileViTConfig", "MobileViTImageProcessor", _MOBILEVIT, LARGE),
    _classifier(
        "MobileViTV2ForImageClassification", "MobileViTV2Config", "MobileViTImageProcessor", _MOBILEVIT2, LARGE
    ),
    _classifier("PoolFormerForImageClassification", "PoolFormerConfig", "PoolFormerImageProcessor", _POOLFORMER),
    _classifier("PvtV2ForImageClassification", "PvtV2Config", "PvtImageProcessor", _PVT2),
    _classifier("RegNetForImageClassification", "RegNetConfig", CONVNEXT, {**_STAGES, "groups_width": 8}),
    _classifier("ResNetForImageClassification", "ResNetConfig", CONVNEXT, _STAGES),
    _classifier("SiglipForImageClassification", "SiglipConfig", SIGLIP, _TWO_TOWERS),
    _classifier("SwiftFormerForImageClassification", "SwiftFormerConfig", VIT, _SWIFTFORMER),
    _classifier("SwinForImageClassification", "SwinConfig", VIT, _SWIN),
    _classifier("Swinv2ForImageClassification", "Swinv2Config", VIT, _SWIN),
    _classifier("ViTForImageClassification", "ViTConfig", VIT, _PATCHES),
    _tower("BeitModel", "BeitConfig", "BeitImageProcessor", _PATCHES),
    _tower("BitModel", "BitConfig", BIT, _BIT),
    _tower("CLIPVisionModel", "CLIPVisionConfig", CLIP, _PATCHES),
    _tower("CLIPVisionModelWithProjection", "CLIPVisionConfig", CLIP, {**_PATCHES, "projection_dim": 16}),
    _tower("ConvNextModel", "ConvNextConfig", CONVNEXT, _CONV),
    _tower("ConvNextV2Model", "ConvNextV2Config", CONVNEXT, _CONV),
    _tower("DeiTModel", "DeiTConfig", "DeiTImageProcessor", _PATCHES),
    _tower("Dinov2Model", "Dinov2Config", BIT, _DINO),
    _tower("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", BIT, _DINO),
    _tower("EfficientNetModel", "EfficientNetConfig", "EfficientNetImageProcessor", _EFFICIENTNET, LARGE),
    _tower("MobileNetV1Model", "MobileNetV1Config", MOBILENET1, _MOBILENET, LARGE),
    _tower("MobileNetV2Model", "MobileNetV2Config", MOBILENET2, _MOBILENET, LARGE),
    _tower("MobileViTModel", "MobileViTConfig", "MobileViTImageProcessor", _MOBILEVIT, LARGE),
    _tower("MobileViTV2Model", "MobileViTV2Config", "MobileViTImageProcessor", _MOBILEVIT2, LARGE),
    _tower("RegNetModel", "RegNetConfig", CONVNEXT, {**_STAGES, "groups_width": 8}),
    _tower("ResNetModel", "ResNetConfig", CONVNEXT, _STAGES),
    _tower("SiglipVisionModel", "SiglipVisionConfig", SIGLIP, _PATCHES),
    _tower("SwinModel", "SwinConfig", VIT, _SWIN),
    _tower("Swinv2Model", "Swinv2Config", VIT, _SWIN),
    _tower("ViTModel", "ViTConfig", VIT, _PATCHES),
    Tiny(architecture="CLIPModel", family="clip", config_class="CLIPConfig", processor=CLIP, config=_TWO_TOWERS),
    Tiny(
        architecture="VisionTextDualEncoderModel",
        family="dual_encoder",
        config_class="VisionTextDualEncoderConfig",
        processor="MobileViTImageProcessor",
        config=_DUAL_ENCODER,
        size=LARGE,
    ),
    Tiny(
        architecture="TinyVitSam",
        family="sam",
        config_class="TinyVitSamConfig",
        processor="SamImageProcessor",
        config=_TINY_SAM,
        size=LARGE,
    ),
    Tiny(
        architecture="SamModel",
        family="sam",
        config_class="SamConfig",
        processor="SamImageProcessor",
        config=_SAM,
        size=LARGE,
    ),
    Tiny(
        architecture="SiglipModel", family="siglip", config_class="SiglipConfig", processor=SIGLIP, config=_TWO_TOWERS
    ),
)


def checkpoint(architecture: str) -> Tiny:
    return next(tiny for tiny in CHECKPOINTS if tiny.architecture == architecture)


def write_checkpoint(architecture: str, folder: Path, **changes: Any) -> Path:
    """Save a tiny model with random weights, its image processor and, for two towers, a tokenizer.

    Args:
        changes: of the configuration.
    """
    import torch
    import transformers

    tiny = checkpoint(architecture)
    torch.manual_seed(7)
    if architecture.startswith("TinyVit"):
        import edgevlm.families.tiny_vit as classes
    else:
        classes = transformers
    config = getattr(classes, tiny.config_class)(**{**tiny.config, **changes})
    model = getattr(classes, architecture)(config).eval()
    _enliven(model, tiny.size)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    processor = getattr(transformers, f"{tiny.processor}Pil")
    sizes: dict[str, Any] = {"crop_size": {"height": tiny.size, "width": tiny.size}}
    is_square = "height" in processor.size
    if "longest_edge" in processor.size:
        sizes = {"size": {"longest_edge": tiny.size}, "pad_size": {"height": tiny.size, "width": tiny.size}}
        processor(**sizes).save_pretrained(folder)
        return folder
    sizes["size"] = {"height": tiny.size, "width": tiny.size} if is_square else {"shortest_edge": tiny.size}
    processor(**sizes).save_pretrained(folder)
    if tiny.family in ("clip", "siglip", "dual_encoder"):
        write_tokenizer(folder)
    return folder


def _enliven(model: Any, size: int) -> None:
    """Give a fresh model activations of an ordinary size: the usual ones are so near zero that a wrong graph passes."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter)
        norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = None  # take the statistics of the one batch that follows
            norm.train()
        if norms:
            getattr(model, "get_image_features", model)(pixel_values=torch.randn(8, 3, size, size))
    model.eval()


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<start>", "<unknown>", "<end>", "a", "photo", "of", "cat", "dog", "red", "blue"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<start>", unk_token="<unknown>"
    ).save_pretrained(folder)
