"""Every image processor class that edgevlm knows gives the pixels that Transformers' own gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm.errors import ModelError
from edgevlm.ingest.processing import PROCESSORS, at_size, image_processing, image_processor_json
from edgevlm.runtime.image import check_image_processing, preprocess
from edgevlm.runtime.spec import (
    CenterCrop,
    FlipChannels,
    ImageProcessing,
    ImageStep,
    Letterbox,
    Normalize,
    Rescale,
    Resize,
)

PICTURE_SIZES = ((301, 200), (97, 180))

VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in PROCESSORS),
    ("BeitImageProcessor", {"do_center_crop": True, "size": 256}),
    ("BitImageProcessor", {"size": {"shortest_edge": 256}, "resample": 2}),
    ("CLIPImageProcessor", {"size": 64, "crop_size": 56}),
    ("CLIPImageProcessor", {"size": 64, "crop_size": 64, "use_square_size": False, "do_convert_rgb": True}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": {"height": 64, "width": 48}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}, "crop_pct": 0.95}),
    ("ConvNextImageProcessor", {"size": 224, "crop_pct": 0.9}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    ("DeiTImageProcessor", {"size": 248, "do_rescale": False}),
    ("EfficientNetImageProcessor", {"rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False}),
    ("EfficientNetImageProcessor", {"do_center_crop": True, "include_top": True, "resample": 0}),
    ("LevitImageProcessor", {"size": {"height": 240, "width": 240}}),
    ("MobileNetV2ImageProcessor", {"size": {"shortest_edge": 292}, "crop_size": {"height": 224, "width": 200}}),
    ("MobileNetV2ImageProcessor", {"do_normalize": False}),
    ("MobileViTImageProcessor", {"size": {"shortest_edge": 288}, "resample": 2}),
    ("MobileViTImageProcessor", {"do_flip_channel_order": False}),
    ("PoolFormerImageProcessor", {"crop_pct": 0.95}),
    ("PoolFormerImageProcessor", {"size": {"height": 224, "width": 224}}),
    ("SiglipImageProcessor", {"size": {"height": 256, "width": 224}, "image_mean": 0.4, "image_std": [0.3, 0.2, 0.1]}),
    ("ViTImageProcessor", {"size": 48, "resample": 3}),
    ("ViTImageProcessor", {"size": [40, 56], "resample": 1}),
    ("ViTImageProcessor", {"do_resize": False, "do_center_crop": True, "crop_size": 64}),
)


def processing_of(config: dict[str, Any], **kwargs: Any) -> ImageProcessing:
    options = {"model_type": "", "image_size": None, "where": "preprocessor_config.json", **kwargs}
    return image_processing(config, **options)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in PICTURE_SIZES]


@pytest.mark.parametrize(("name", "config"), VARIANTS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(VARIANTS)])
def test_pixels_equal_transformers(name: str, config: dict[str, Any]):
    import transformers

    processing = processing_of({"image_processor_type": name, **config})
    check_image_processing(processing)
    theirs = getattr(transformers, f"{name}Pil")(**config)
    for picture in pictures():
        expected = theirs(picture, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(preprocess(picture, processing), expected.astype(np.float32))


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_transformers_saves_is_understood(name: str):
    import transformers

    saved = getattr(transformers, f"{name}Pil")().to_dict()
    assert processing_of(saved) == processing_of({"image_processor_type": name})


def test_old_and_fast_class_names_mean_the_same():
    new = processing_of({"image_processor_type": "ConvNextImageProcessor"})
    assert processing_of({"feature_extractor_type": "ConvNextFeatureExtractor"}) == new
    assert processing_of({"image_processor_type": "ConvNextImageProcessorFast"}) == new
    assert processing_of({"size": {"shortest_edge": 384}}, model_type="resnet") == new


def test_another_size_scales_resize_and_crop_in_proportion():
    config = {"image_processor_type": "MobileNetV2ImageProcessor"}
    assert processing_of(config, image_size=112).steps[:2] == (
        Resize(shortest_edge=128),
        CenterCrop(height=112, width=112),
    )
    square = processing_of({"image_processor_type": "ViTImageProcessor"}, image_size=384)
    assert (square.height, square.width) == (384, 384)
    assert square.steps[0] == Resize(height=384, width=384)


def test_steps_stand_in_the_order_in_which_they_are_done():
    mobilevit = processing_of({"image_processor_type": "MobileViTImageProcessor"})
    assert [type(step) for step in mobilevit.steps] == [Resize, CenterCrop, Rescale, FlipChannels]
    efficientnet = processing_of({"image_processor_type": "EfficientNetImageProcessor"})
    assert [type(step) for step in efficientnet.steps] == [Resize, Rescale, Normalize, Normalize]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_pad": True}, "asks for do_pad = True"),
        ({"crop_pct": 0.9}, "asks for crop_pct = 0.9"),
        ({"do_flip_channel_order": True}, "asks for do_flip_channel_order"),
        ({"rescale_offset": True}, "asks for rescale_offset"),
        ({"include_top": True}, "asks for include_top"),
        ({"image_maen": [0.5, 0.5, 0.5]}, "asks for image_maen"),
        ({"do_thumbnail": True}, "asks for do_thumbnail"),
        ({"size": {"longest_edge": 224}}, "has size = {'longest_edge': 224}"),
        ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "which edgevlm does not understand"),
        ({"size": {"shortest_edge": 224}}, "pictures have different sizes"),
        ({"size": {"height": 0, "width": 4}}, "sizes are at least 1"),
        ({"size": {"height": "a", "width": 4}}, "sizes are at least 1"),
        ({"do_resize": False}, "pictures have different sizes"),
        ({"resample": 9}, "resample = 9"),
        ({"resample": [2]}, "resample = [2]"),
        ({"image_mean": [0.5]}, "image_mean = [0.5]"),
        ({"image_std": "half"}, "image_std = half"),
        ({"image_processor_type": "DonutImageProcessor"}, "is for 'DonutImageProcessor'"),
        ({"do_center_crop": True}, "do_center_crop and no crop_size"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 4}}, "height and width are expected"),
    ],
)
def test_what_is_not_understood_is_named(config: dict[str, Any], message: str):
    with pytest.raises(ModelError) as caught:
        processing_of({"image_processor_type": "ViTImageProcessor", **config})
    assert message in caught.value.message
    assert caught.value.hint


def test_a_misspelt_key_gets_the_nearest():
    with pytest.raises(ModelError) as caught:
        processing_of({"image_processor_type": "ViTImageProcessor", "image_maen": 0.5})
    assert caught.value.hint == "Did you mean 'image_mean' or 'image_std'?"


def test_convnext_wants_a_shortest_edge_and_an_unknown_type_a_name():
    with pytest.raises(ModelError, match="wants a shortest_edge"):
        processing_of({"image_processor_type": "ConvNextImageProcessor", "size": {"height": 224, "width": 224}})
    with pytest.raises(ModelError, match="does not say which image processor"):
        processing_of({}, model_type="donut-swin")


# --- back to JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "config"), VARIANTS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(VARIANTS)])
def test_what_is_written_is_read_as_the_same(name: str, config: dict[str, Any]):
    processing = processing_of({"image_processor_type": name, **config})
    written, read = image_processor_json(processing)
    assert processing_of(written) == read
    if not name.startswith("EfficientNet"):  # whose values take a step more, or an offset
        assert read == processing
    for picture in pictures():
        assert np.allclose(preprocess(picture, read), preprocess(picture, processing), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [64, 100])
def test_transformers_reads_what_is_written(size: int):
    import transformers

    for name in ("DeiTImageProcessor", "EfficientNetImageProcessor", "MobileViTImageProcessor", "SiglipImageProcessor"):
        written, read = image_processor_json(at_size(processing_of({"image_processor_type": name}), size))
        assert (read.height, read.width) == (size, size)
        theirs = getattr(transformers, f"{written['image_processor_type']}Pil")(**written)
        for picture in pictures():
            expected = theirs(picture, return_tensors="np")["pixel_values"][0]
            assert np.array_equal(preprocess(picture, read), expected.astype(np.float32))


def test_values_in_another_channel_order_become_those_in_rgb():
    """As a card of an ONNX file has it: BGR with a mean and deviation in that order."""
    shape = (Resize(height=32, width=32),)
    colours = Normalize(mean=(0.406, 0.456, 0.485), std=(0.225, 0.224, 0.229))
    orders: list[tuple[ImageStep, ...]] = [
        (Rescale(factor=1 / 255), FlipChannels(), colours),
        (FlipChannels(), Rescale(factor=1 / 255), colours),
    ]
    for steps in orders:
        bgr = ImageProcessing(height=32, width=32, steps=(*shape, *steps))
        written, read = image_processor_json(bgr)
        assert written["image_mean"] == pytest.approx([0.485, 0.456, 0.406])
        assert written["image_std"] == pytest.approx([0.229, 0.224, 0.225])
        (picture, _) = pictures()
        assert np.allclose(preprocess(picture, read), preprocess(picture, bgr)[::-1], rtol=0, atol=1e-5)


def test_steps_that_no_class_does_are_named():
    image = ImageProcessing(height=8, width=8, steps=(Letterbox(height=8, width=8), Rescale(factor=1 / 255)))
    with pytest.raises(ModelError, match="does letterbox"):
        image_processor_json(image)
