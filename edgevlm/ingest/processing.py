"""A Hugging Face image processor's JSON as our own declarative steps; every key is understood or refused.

What each class does and which defaults it has is what Transformers 5 does (``image_processing_pil_*.py``, the PIL
backend); a test compares every class of the table with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgevlm.errors import ModelError, did_you_mean
from edgevlm.ingest.weights import read_json
from edgevlm.runtime.spec import (
    CenterCrop,
    FlipChannels,
    ImageProcessing,
    ImageStep,
    Normalize,
    Pad,
    Rescale,
    Resize,
    Spec,
)

Color = tuple[float, float, float]
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

_HALF: Color = (0.5, 0.5, 0.5)
_IMAGENET_MEAN: Color = (0.485, 0.456, 0.406)
_IMAGENET_STD: Color = (0.229, 0.224, 0.225)
_CLIP_MEAN: Color = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Color = (0.26862954, 0.26130258, 0.27577711)

# Pillow's numbers of its filters.
_RESAMPLES: Mapping[int, Resample] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}


class Processor(Spec, frozen=True, kw_only=True):
    """An image processor class of Transformers: its defaults, and the rule by which it resizes.

    Args:
        is_square: a size that is one number means both edges, else the shorter one.
        enlarge: how the size becomes the size to resize to, before the crop: as it is; ConvNeXT's and PoolFormer's
            ``crop_pct``; LeViT's 256/224.
        pad: the size is that of the longer edge, and the picture is padded to this many pixels in height and width.
    """

    size: dict[str, int]
    crop: int | None = None
    is_square: bool = True
    does_crop: bool = False
    resample: int = 3
    mean: Color = _HALF
    std: Color = _HALF
    normalizes: bool = True
    flips: bool = False
    enlarge: Literal["none", "convnext", "poolformer", "levit"] = "none"
    crop_pct: float | None = None
    has_include_top: bool = False
    pad: int | None = None


_CLIP = Processor(
    size={"shortest_edge": 224}, crop=224, does_crop=True, is_square=False, mean=_CLIP_MEAN, std=_CLIP_STD
)
_MOBILENET = Processor(size={"shortest_edge": 256}, crop=224, does_crop=True, is_square=False, resample=2)

PROCESSORS: Mapping[str, Processor] = {
    "BeitImageProcessor": Processor(size={"height": 224, "width": 224}, crop=224),
    "BitImageProcessor": _CLIP,
    "CLIPImageProcessor": _CLIP,
    "ConvNextImageProcessor": Processor(
        size={"shortest_edge": 384}, is_square=False, enlarge="convnext", crop_pct=224 / 256
    ),
    "DeiTImageProcessor": Processor(size={"height": 256, "width": 256}, crop=224, does_crop=True),
    "EfficientNetImageProcessor": Processor(size={"height": 346, "width": 346}, crop=289, has_include_top=True),
    "LevitImageProcessor": Processor(
        size={"shortest_edge": 224},
        crop=224,
        does_crop=True,
        is_square=False,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        enlarge="levit",
    ),
    "MobileNetV1ImageProcessor": _MOBILENET,
    "MobileNetV2ImageProcessor": _MOBILENET,
    "MobileViTImageProcessor": Processor(
        size={"shortest_edge": 224},
        crop=256,
        does_crop=True,
        is_square=False,
        normalizes=False,
        flips=True,
    ),
    "PoolFormerImageProcessor": Processor(
        size={"shortest_edge": 224},
        crop=224,
        does_crop=True,
        is_square=False,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        enlarge="poolformer",
        crop_pct=0.9,
    ),
    "PvtImageProcessor": Processor(size={"height": 224, "width": 224}, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    "SamImageProcessor": Processor(
        size={"longest_edge": 1024}, resample=2, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, pad=1024
    ),
    "SiglipImageProcessor": Processor(size={"height": 224, "width": 224}, is_square=False),
    "ViTImageProcessor": Processor(size={"height": 224, "width": 224}, resample=2),
}

# The class that Transformers takes for a model type whose processor does not name one.
_BY_MODEL_TYPE: Mapping[str, str] = {
    "beit": "BeitImageProcessor",
    "bit": "BitImageProcessor",
    "clip": "CLIPImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "convnext": "ConvNextImageProcessor",
    "convnextv2": "ConvNextImageProcessor",
    "deit": "DeiTImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "efficientnet": "EfficientNetImageProcessor",
    "focalnet": "BitImageProcessor",
    "levit": "LevitImageProcessor",
    "mobilenet_v1": "MobileNetV1ImageProcessor",
    "mobilenet_v2": "MobileNetV2ImageProcessor",
    "mobilevit": "MobileViTImageProcessor",
    "mobilevitv2": "MobileViTImageProcessor",
    "poolformer": "PoolFormerImageProcessor",
    "pvt_v2": "PvtImageProcessor",
    "regnet": "ConvNextImageProcessor",
    "resnet": "ConvNextImageProcessor",
    "sam": "SamImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "swiftformer": "ViTImageProcessor",
    "swin": "ViTImageProcessor",
    "swinv2": "ViTImageProcessor",
    "vit": "ViTImageProcessor",
}

_UNDERSTOOD = frozenset(
    [
        "do_resize",
        "size",
        "resample",
        "do_center_crop",
        "crop_size",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
        "do_flip_channel_order",
        "crop_pct",
        "rescale_offset",
        "include_top",
        "use_square_size",
    ]
)
# Keys that say nothing about the pixels of an RGB picture: names, tensor layouts, the labels of segmentation.
_WITHOUT_EFFECT = frozenset(
    [
        "image_processor_type",
        "feature_extractor_type",
        "processor_class",
        "do_convert_rgb",
        "do_reduce_labels",
        "reduce_labels",
        "data_format",
        "input_data_format",
        "return_tensors",
        "device",
        "disable_grouping",
        "default_to_square",
        "backend",
        "auto_map",
        "_valid_processor_keys",
        "_processor_class",
        "transformers_version",
        "pad_size",
        "mask_size",
        "mask_pad_size",
        "image_seq_length",
    ]
)


def read_image_processing(folder: Path, *, model_type: str, image_size: int | None) -> ImageProcessing:
    """The preprocessing of a Hugging Face folder.

    Raises: ModelError: there is none, or it asks for something that is not understood.
    """
    combined, plain = folder / "processor_config.json", folder / "preprocessor_config.json"
    nested = read_json(combined).get("image_processor") if combined.is_file() else None
    if isinstance(nested, dict):
        return image_processing(nested, model_type=model_type, image_size=image_size, where=str(combined))
    if plain.is_file():
        return image_processing(read_json(plain), model_type=model_type, image_size=image_size, where=str(plain))
    raise ModelError(
        f"'{folder}' has no preprocessor_config.json, so nobody knows how a picture becomes the model's input.",
        hint="Save the image processor beside the model: AutoImageProcessor.from_pretrained(...).save_pretrained(...).",
    )


def image_processing(
    config: Mapping[str, Any], *, model_type: str, image_size: int | None, where: str
) -> ImageProcessing:
    """An image processor's JSON as steps.

    Args:
        image_size: scale resizing and crop in proportion, so that pictures come out this high and wide.
    Raises: ModelError: a key, a value or the class is not understood; it is named.
    """
    processor = _processor_of(config, model_type, where)
    _refuse_unknown(config, processor, where)
    values = {key: value for key, value in config.items() if value is not None}
    steps: list[ImageStep] = []
    if values.get("do_resize", True):
        steps += _resize_steps(values, processor, where)
    if values.get("do_center_crop", processor.does_crop):
        steps.append(_crop_of(values, processor, where))
    padding = _pad_of(values, processor, where)
    height, width = _final_size([*steps, *padding], where)
    steps += _value_steps(values, processor, where)
    made = ImageProcessing(height=height, width=width, steps=(*steps, *padding))
    return made if image_size is None else at_size(made, image_size)


def at_size(image: ImageProcessing, image_size: int) -> ImageProcessing:
    """The same with resizing and crop scaled in proportion, so that pictures come out this high and wide."""
    steps = tuple(_scaled(step, image_size / image.height, image_size / image.width) for step in image.steps)
    return msgspec.structs.replace(image, height=image_size, width=image_size, steps=steps)


def image_processor_json(image: ImageProcessing) -> tuple[dict[str, Any], ImageProcessing]:
    """What ``preprocessor_config.json`` says of ``image``, and the steps that it is read as: those, or their equal.

    Whatever is done to values becomes one rescaling and at most one normalization; a channel order other than RGB only
    stays where nothing is normalized, since no class does both and what sees the pictures is yet to be trained.

    Raises: ModelError: no image processor of Transformers does these steps.
    """
    shapes = [step for step in image.steps if not isinstance(step, Rescale | Normalize | FlipChannels)]
    described: dict[str, Any] = {"do_convert_rgb": True, "do_resize": False, "do_center_crop": False}
    numbers = {name: number for number, name in _RESAMPLES.items()}
    match shapes:
        case [Resize() as resize, CenterCrop() as crop]:
            described |= _resize_json(resize, numbers) | _crop_json(crop)
        case [Resize() as resize]:
            described |= _resize_json(resize, numbers)
        case [CenterCrop() as crop]:
            described |= _crop_json(crop)
        case [Resize(longest_edge=int()) as resize, Pad() as pad]:
            described |= _resize_json(resize, numbers) | {"image_processor_type": "SamImageProcessor", "do_pad": True}
            described["pad_size"] = {"height": pad.height, "width": pad.width}
        case _:
            raise ModelError(
                f"no image processor of Transformers does {', '.join(str(s.__struct_config__.tag) for s in shapes)}.",
                hint="Use a model whose pictures are resized and then, if at all, cropped.",
            )
    values = _plain_values([step for step in image.steps if step not in shapes])
    described["do_rescale"] = False
    described["do_normalize"] = False
    described.setdefault("image_processor_type", "CLIPImageProcessor")
    for step in values:
        match step:
            case Rescale():
                described |= {"do_rescale": True, "rescale_factor": step.factor}
            case Normalize():
                described |= {"do_normalize": True, "image_mean": list(step.mean), "image_std": list(step.std)}
            case FlipChannels() if isinstance(shapes[-1], Pad):
                raise ModelError(
                    "no image processor of Transformers both pads and turns the channels around.",
                    hint="Use a model that takes RGB.",
                )
            case FlipChannels():
                described |= {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True}
    padding = [step for step in shapes if isinstance(step, Pad)]
    return described, msgspec.structs.replace(image, steps=(*shapes[: len(shapes) - len(padding)], *values, *padding))


def _resize_json(step: Resize, numbers: Mapping[Resample, int]) -> dict[str, Any]:
    edges = {"shortest_edge": step.shortest_edge, "longest_edge": step.longest_edge}
    by_edge = {name: edge for name, edge in edges.items() if edge is not None}
    size: dict[str, int | None] = {**by_edge} or {"height": step.height, "width": step.width}
    return {"do_resize": True, "size": size, "resample": numbers[step.resample]}


def _crop_json(step: CenterCrop) -> dict[str, Any]:
    return {"do_center_crop": True, "crop_size": {"height": step.height, "width": step.width}}


def _plain_values(steps: list[ImageStep]) -> list[ImageStep]:
    """Steps on values as an image processor of Transformers does them: those themselves where it can, else folded."""
    match steps:
        case [] | [Rescale(offset=0.0)] | [Rescale(offset=0.0), Normalize() | FlipChannels()] | [Normalize()]:
            return steps
    # value * factor + offset by channel; the colours stay where they are while flips are counted.
    factor, offset, is_flipped = [1.0] * 3, [0.0] * 3, False
    for step in steps:
        match step:
            case Rescale():
                factor = [each * step.factor for each in factor]
                offset = [each * step.factor + step.offset for each in offset]
            case Normalize():
                mean, std = step.mean[::-1] if is_flipped else step.mean, step.std[::-1] if is_flipped else step.std
                factor = [each / s for each, s in zip(factor, std, strict=True)]
                offset = [(each - m) / s for each, m, s in zip(offset, mean, std, strict=True)]
            case FlipChannels():
                is_flipped = not is_flipped
    # (value / 255 - mean) / std is the same line.
    deviation = [1 / (255 * each) for each in factor]
    middle = [-each * s for each, s in zip(offset, deviation, strict=True)]
    return [Rescale(factor=1 / 255), Normalize(mean=tuple(middle), std=tuple(deviation))]


def _processor_of(config: Mapping[str, Any], model_type: str, where: str) -> Processor:
    named = config.get("image_processor_type") or config.get("feature_extractor_type")
    if named is None:
        named = _BY_MODEL_TYPE.get(model_type)
    if named is None:
        raise ModelError(
            f"'{where}' does not say which image processor it is for, and model type '{model_type}' has no usual one.",
            hint="Add the key 'image_processor_type'.",
        )
    name = str(named).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in PROCESSORS:
        raise ModelError(
            f"'{where}' is for '{named}', which edgevlm does not know.",
            hint=f"Use a checkpoint whose image processor is one of: {', '.join(PROCESSORS)}.",
        )
    return PROCESSORS[name]


def _refuse_unknown(config: Mapping[str, Any], processor: Processor, where: str) -> None:
    is_fine = {
        "do_pad": not config.get("do_pad") or processor.pad is not None,
        "crop_pct": processor.crop_pct is not None,
        "rescale_offset": not config.get("rescale_offset") or processor.has_include_top,
        "include_top": not config.get("include_top") or processor.has_include_top,
        "do_flip_channel_order": not config.get("do_flip_channel_order") or processor.flips,
    }
    for key, value in config.items():
        if value is None or key in _WITHOUT_EFFECT or is_fine.get(key, key in _UNDERSTOOD):
            continue
        known = key in _UNDERSTOOD or key in is_fine
        raise ModelError(
            f"'{where}' asks for {key} = {value!r}, which edgevlm does not understand.",
            hint="Use a checkpoint without it." if known else did_you_mean(key, _UNDERSTOOD),
        )


def _resize_steps(values: Mapping[str, Any], processor: Processor, where: str) -> list[ImageStep]:
    resample = _resample_of(values.get("resample", processor.resample), where)
    if processor.pad is not None:
        size = _size_dict(values.get("size", processor.size), names={"longest_edge"}, where=where, key="size")
        return [Resize(longest_edge=size["longest_edge"], resample=resample)]
    size = _size_dict(values.get("size", processor.size), is_square=processor.is_square, where=where, key="size")
    if values.get("use_square_size"):
        size = {"height": size["shortest_edge"], "width": size["shortest_edge"]} if "shortest_edge" in size else size
    shortest = size.get("shortest_edge")
    crop_pct = float(values.get("crop_pct", processor.crop_pct or 1.0))
    match processor.enlarge:
        case "convnext":
            if shortest is None:
                raise ModelError(
                    f"'{where}' has size = {size}, and ConvNextImageProcessor wants a shortest_edge.",
                    hint="Write the size as {'shortest_edge': n}.",
                )
            if shortest >= 384:  # from here on ConvNeXT stretches and does not crop
                return [Resize(height=shortest, width=shortest, resample=resample)]
            crop = CenterCrop(height=shortest, width=shortest)
            return [Resize(shortest_edge=int(shortest / crop_pct), resample=resample), crop]
        case "poolformer":
            if shortest is None and size["height"] != size["width"]:
                size = {key: int(value / crop_pct) for key, value in size.items()}
            else:
                size = {"shortest_edge": int((shortest or size["height"]) / crop_pct)}
        case "levit" if shortest is not None:
            size = {"shortest_edge": int(256 / 224 * shortest)}
    return [Resize(resample=resample, **size)]


def _crop_of(values: Mapping[str, Any], processor: Processor, where: str) -> CenterCrop:
    asked = values.get("crop_size", processor.crop)
    if asked is None:
        raise ModelError(f"'{where}' has do_center_crop and no crop_size.", hint="Add the key 'crop_size'.")
    size = _size_dict(asked, is_square=True, where=where, key="crop_size")
    if "height" not in size:
        raise ModelError(
            f"'{where}' has crop_size = {asked}, where height and width are expected.",
            hint="Write it as {'height': n, 'width': n}.",
        )
    return CenterCrop(height=size["height"], width=size["width"])


def _pad_of(values: Mapping[str, Any], processor: Processor, where: str) -> list[ImageStep]:
    if processor.pad is None or not values.get("do_pad", True):
        return []
    size = _size_dict(values.get("pad_size", processor.pad), is_square=True, where=where, key="pad_size")
    return [Pad(height=size["height"], width=size["width"])]


def _value_steps(values: Mapping[str, Any], processor: Processor, where: str) -> list[ImageStep]:
    steps: list[ImageStep] = []
    if values.get("do_rescale", True):
        offset = -1.0 if values.get("rescale_offset", False) else 0.0
        steps.append(Rescale(factor=float(values.get("rescale_factor", 1 / 255)), offset=offset))
    mean = _color(values.get("image_mean", processor.mean), where, "image_mean")
    std = _color(values.get("image_std", processor.std), where, "image_std")
    if processor.normalizes and values.get("do_normalize", True):
        steps.append(Normalize(mean=mean, std=std))
    if processor.has_include_top and values.get("include_top", True):
        # EfficientNet's classifier was trained on pictures divided by the deviation a second time.
        steps.append(Normalize(mean=(0.0, 0.0, 0.0), std=std))
    if processor.flips and values.get("do_flip_channel_order", True):
        steps.append(FlipChannels())
    return steps


def _size_dict(
    value: Any, *, is_square: bool = False, where: str, key: str, names: set[str] | None = None
) -> dict[str, int]:
    """A size by the names of its edges; ``names`` where nothing else will do, else a height and width or an edge."""
    if names is not None and isinstance(value, int):
        value = dict.fromkeys(names, value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = {"height": value, "width": value} if is_square else {"shortest_edge": value}
    elif isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    known = [names] if names else [{"height", "width"}, {"shortest_edge"}]
    if not isinstance(value, dict) or set(value) not in known:
        forms = " or ".join("{" + ", ".join(f"'{name}': n" for name in sorted(each)) + "}" for each in known)
        raise ModelError(
            f"'{where}' has {key} = {value}, which edgevlm does not understand.", hint=f"Write it as {forms}."
        )
    size = {name: int(number) for name, number in value.items() if isinstance(number, int | float)}
    if len(size) != len(value) or min(size.values()) < 1:
        raise ModelError(f"'{where}' has {key} = {value}, and sizes are at least 1.", hint="Write pixels.")
    return size


def _resample_of(value: Any, where: str) -> Resample:
    if not isinstance(value, int) or value not in _RESAMPLES:
        raise ModelError(
            f"'{where}' has resample = {value!r}, which is no filter of Pillow's.",
            hint=f"Use one of: {', '.join(f'{number} ({name})' for number, name in _RESAMPLES.items())}.",
        )
    return _RESAMPLES[value]


def _color(value: Any, where: str, key: str) -> Color:
    numbers = [value] * 3 if isinstance(value, int | float) else list(value)
    if len(numbers) != 3 or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        raise ModelError(f"'{where}' has {key} = {value}, where three numbers are expected.", hint="Give one each.")
    return (float(numbers[0]), float(numbers[1]), float(numbers[2]))


def _final_size(steps: list[ImageStep], where: str) -> tuple[int, int]:
    last = steps[-1] if steps else None
    if isinstance(last, CenterCrop | Pad):
        return last.height, last.width
    if isinstance(last, Resize) and last.height is not None and last.width is not None:
        return last.height, last.width
    raise ModelError(
        f"After '{where}' pictures have different sizes, and a compiled graph takes one.",
        hint="Set do_resize with a height and width, or do_center_crop with a crop_size.",
    )


def _scaled(step: ImageStep, of_height: float, of_width: float) -> ImageStep:
    match step:
        case Resize(shortest_edge=int(edge)):
            return Resize(shortest_edge=round(edge * min(of_height, of_width)), resample=step.resample)
        case Resize(height=int(height), width=int(width)):
            return Resize(height=round(height * of_height), width=round(width * of_width), resample=step.resample)
        case Resize(longest_edge=int(edge)):
            return Resize(longest_edge=round(edge * min(of_height, of_width)), resample=step.resample)
        case CenterCrop():
            return CenterCrop(height=round(step.height * of_height), width=round(step.width * of_width))
        case Pad():
            return Pad(height=round(step.height * of_height), width=round(step.width * of_width))
    return step
