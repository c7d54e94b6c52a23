"""The models of the suite: with trained weights from the assets, and with random weights at their real size."""

from __future__ import annotations

from edgevlm.runtime.spec import Spec


class Case(Spec, frozen=True, kw_only=True):
    """A model with its data.

    Args:
        key: names its files.
        model: a path below the assets; a key of ``random_weights.MODELS`` where ``is_random``; or TINY_VIT.
        card: a file of ``benchmarks/cards``, for an ONNX file.
        data: a path below the assets, or SHAPES.
        graph: which of its graphs is measured.
        n_tokens: how long the texts are, for a text tower.
        is_transformer: it holds attention.
    """

    key: str
    name: str
    model: str
    card: str | None = None
    data: str = "data/imagenet-sample"
    graph: str = "model"
    n_tokens: int | None = None
    is_random: bool = False
    is_transformer: bool = False


TINY_VIT = "tiny-vit-5m"
SHAPES = "shapes"
"""Generated pictures, which need no assets."""

CASES: tuple[Case, ...] = (
    Case(key="mobilenet-v2", name="MobileNetV2 (ImageNet, 224)", model="models/mobilenet-v2-imagenet"),
    Case(
        key="resnet-20",
        name="ResNet-20 (CIFAR-10, 32)",
        model="models/resnet20-cifar10.onnx",
        card="resnet20-cifar10.card.toml",
        data="data/cifar10-sample",
    ),
    Case(
        key="resnet-56",
        name="ResNet-56 (CIFAR-10, 32)",
        model="models/resnet56-cifar10.onnx",
        card="resnet56-cifar10.card.toml",
        data="data/cifar10-sample",
    ),
    Case(
        key="yolox-nano",
        name="YOLOX-nano (COCO, 416)",
        model="models/yolox-nano-coco.onnx",
        card="yolox-nano-coco.card.toml",
        data="data/coco128",
    ),
    Case(
        key="espnetv2-s2",
        name="ESPNetv2 s2.0 (VOC, 384)",
        model="models/espnetv2-s2.0-voc.onnx",
        card="espnetv2-voc.card.toml",
        data="data/coco128",
    ),
    Case(key="mobilevit-s", name="MobileViT-S (256)", model="mobilevit-s", is_random=True, is_transformer=True),
    Case(key="resnet-50", name="ResNet-50 (224)", model="resnet-50", is_random=True),
    Case(key="vit-b-16", name="ViT-B/16 (224)", model="vit-b-16", is_random=True, is_transformer=True),
    Case(
        key="clip-image",
        name="CLIP ViT-B/32, pictures (224)",
        model="clip-vit-b-32-image",
        is_random=True,
        is_transformer=True,
    ),
    Case(
        key="clip-text-77",
        name="CLIP ViT-B/32, texts of 77 tokens",
        model="clip-vit-b-32",
        graph="text_encoder",
        n_tokens=77,
        is_random=True,
        is_transformer=True,
    ),
    Case(
        key="clip-text-8",
        name="CLIP ViT-B/32, texts of 8 tokens",
        model="clip-vit-b-32",
        graph="text_encoder",
        n_tokens=8,
        is_random=True,
        is_transformer=True,
    ),
    Case(
        key="tiny-vit",
        name="TinyViT-5M (224)",
        model=TINY_VIT,
        card="tiny-vit.card.toml",
        is_random=True,
        is_transformer=True,
    ),
)

QUICK = Case(key="quick", name="a small ResNet (64)", model="tiny", data=SHAPES, is_random=True)
"""For a smoke test: seconds, no assets."""
