"""Architectures at their real size with seeded random weights, for models whose weights are not at hand.

Latency does not depend on what the weights are. Fidelity does: batch norms take their statistics from pictures, so that
activations have the sizes that they have in a trained network, neither vanishing nor exploding.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.runtime.image import decode_image
from edgevlm.runtime.spec import Array, Spec

N_SETTLING = 32


class RandomModel(Spec, frozen=True, kw_only=True):
    """A class of Transformers with its configuration (defaults where nothing is said), and its image processor.

    Args:
        size: of the pictures; the processor's defaults where 0.
    """

    architecture: str
    config_class: str
    config: dict[str, Any] = {}
    processor: str
    size: int = 0
    has_text: bool = False


MODELS: dict[str, RandomModel] = {
    # Transformers' defaults are MobileViT-S, ResNet-50, CLIP ViT-B/32 and ViT-B/16.
    "mobilevit-s": RandomModel(
        architecture="MobileViTModel", config_class="MobileViTConfig", processor="MobileViTImageProcessor"
    ),
    "resnet-50": RandomModel(
        architecture="ResNetModel", config_class="ResNetConfig", processor="ViTImageProcessor", size=224
    ),
    "vit-b-16": RandomModel(architecture="ViTModel", config_class="ViTConfig", processor="ViTImageProcessor", size=224),
    "clip-vit-b-32-image": RandomModel(
        architecture="CLIPVisionModelWithProjection", config_class="CLIPVisionConfig", processor="CLIPImageProcessor"
    ),
    "clip-vit-b-32": RandomModel(
        architecture="CLIPModel", config_class="CLIPConfig", processor="CLIPImageProcessor", has_text=True
    ),
    "tiny": RandomModel(
        architecture="ResNetModel",
        config_class="ResNetConfig",
        config={"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
        processor="ViTImageProcessor",
        size=64,
    ),
}


def write_checkpoint(key: str, out: Path, *, pictures: Sequence[Path], merges: Path | None = None) -> None:
    """A Transformers folder, unless it is there already.

    Args:
        pictures: whose statistics batch norms take.
        merges: CLIP's byte-pair merges, for a model with a text tower.
    """
    if (out / "config.json").is_file():
        return
    import torch
    import transformers

    wanted = MODELS[key]
    torch.manual_seed(0)
    config = getattr(transformers, wanted.config_class)(**wanted.config)
    model = getattr(transformers, wanted.architecture)(config)
    size = wanted.size or getattr(getattr(config, "vision_config", config), "image_size", 224)
    settle(model, pixels(pictures[:N_SETTLING], size), input_name="pixel_values")
    processor = getattr(transformers, wanted.processor)
    options = {"size": {"height": wanted.size, "width": wanted.size}} if wanted.size else {}
    processor(**options).save_pretrained(out)
    if wanted.has_text:
        assert merges is not None, "a text tower needs its merges"
        _tokenizer(merges).save_pretrained(out)
    # Last: what is there is whole.
    model.eval().save_pretrained(out)


def pixels(pictures: Sequence[Path], size: int) -> Array:
    """Shapes: float32 [n, 3, size, size], -1 to 1."""
    resized = [decode_image(picture).resize((size, size)) for picture in pictures]
    return np.stack([np.asarray(each, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1 for each in resized])


def settle(model: Any, pixel_values: Array, *, input_name: str | None = None) -> None:
    """Give every batch norm the mean and variance that it sees."""
    import torch

    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean of what it sees
        model.train()
        rows = torch.from_numpy(pixel_values)
        with torch.no_grad():
            model(**{input_name: rows}) if input_name else model(rows)
        for norm in norms:
            norm.momentum = 0.1
    model.eval()


def _tokenizer(merges: Path) -> Any:
    """CLIP's, from the merges that OpenAI published. Source: openai/CLIP, ``simple_tokenizer.py``."""
    import transformers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    with gzip.open(merges, "rt", encoding="utf-8") as opened:
        rules = opened.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(rule.split()) for rule in rules)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[tuple(rule.split()) for rule in rules])
