from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgevlm.errors import BundleError, DataError
from edgevlm.runtime.image import check_image_processing, decode_image, preprocess
from edgevlm.runtime.spec import CenterCrop, FlipChannels, ImageProcessing, ImageStep, Normalize, Rescale, Resize

STANDARD = Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
IMAGENET = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLIP = Normalize(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
BYTE = Rescale(factor=1 / 255)


def square(n: int) -> CenterCrop:
    return CenterCrop(height=n, width=n)


def noise(height: int, width: int, *, seed: int = 0) -> Image.Image:
    """Smooth in places and rough in others, as pictures are."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (max(height // 9, 1), max(width // 9, 1), 3), dtype=np.uint8))
    fine = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(np.array(coarse.resize((width, height))) + fine, 0, 255).astype(np.uint8))


# --- decoding ---------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_without_transparency_convert_as_pillow_does(mode: str):
    image = noise(20, 30).convert(mode)
    assert np.array_equal(decode_image(image), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_over_white(mode: str):
    clear = Image.new("RGBA", (4, 4), (10, 200, 30, 0)).convert(mode)
    assert np.array_equal(decode_image(clear), np.full((4, 4, 3), 255))
    opaque = Image.new("RGBA", (4, 4), (10, 10, 10, 255)).convert(mode)
    assert np.array_equal(decode_image(opaque), np.full((4, 4, 3), 10))


def test_a_transparent_palette_colour_is_laid_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    assert np.array(decode_image(encoded(image, transparency=0))).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_16_bit_grey_keeps_its_upper_bits():
    values = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    grey = decode_image(encoded(Image.fromarray(values)))
    assert np.array(grey)[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int):
    image = noise(16, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode_image(encoded(image, exif=exif))
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # orientation to Pillow's Transpose
    expected = image.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else image
    assert np.array_equal(turned, expected)
    opened = Image.open(io.BytesIO(encoded(image, exif=exif)))
    assert np.array_equal(decode_image(opened), expected)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_arrays_of_bytes_are_pictures(shape: tuple[int, ...]):
    array = np.full(shape, 255, dtype=np.uint8)
    assert np.array_equal(decode_image(array), np.full((5, 7, 3), 255))


def test_the_callers_image_is_left_alone():
    image = noise(16, 24).convert("RGBA")
    before = image.tobytes()
    decode_image(image).putpixel((0, 0), (1, 2, 3))
    assert (image.mode, image.tobytes()) == ("RGBA", before)


@pytest.mark.parametrize(
    ("array", "words", "hint"),
    [
        (np.zeros((5, 7, 3), np.float32), "float32", "uint8"),
        (np.zeros((3, 5, 7), np.uint8), "(3, 5, 7)", "transpose"),
        (np.zeros((5, 7, 2), np.uint8), "(5, 7, 2)", "[H, W, 3]"),
        (np.zeros((1, 5, 7, 3), np.uint8), "(1, 5, 7, 3)", "[H, W, 3]"),
        (np.zeros((0, 7, 3), np.uint8), "(0, 7, 3)", "[H, W, 3]"),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray, words: str, hint: str):
    with pytest.raises(DataError) as raised:
        decode_image(array)
    assert words in raised.value.message
    assert hint in raised.value.hint


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path):
    whole = {
        "a.png": encoded(noise(64, 64)),
        "a.jpg": encoded(noise(64, 64), "JPEG"),
        "a.gif": encoded(noise(9, 9), "GIF"),
    }
    bad = {
        "absent.png": None,
        "empty.png": b"",
        "text.png": b"hello, I am not a picture",
        "nul.jpg": bytes(500),
        **{f"half-{name}": data[: len(data) // 2] for name, data in whole.items()},
        **{f"tiny-{name}": data[:20] for name, data in whole.items()},
        "flipped.png": whole["a.png"][:60] + bytes(40) + whole["a.png"][100:],
    }
    for name, data in bad.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError) as raised:
            decode_image(tmp_path / name)
        assert name in raised.value.message
        assert raised.value.hint
        assert "\n" not in raised.value.message
        if data is not None:
            with pytest.raises(DataError):
                decode_image(data)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder"):
        decode_image(tmp_path / "folder")
    with pytest.raises(DataError, match="came as int"):
        decode_image(3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the PIL image is truncated"):
        decode_image(Image.open(io.BytesIO(whole["a.jpg"][:-900])))
    with pytest.raises(DataError, match="float pixels"):
        decode_image(Image.new("F", (3, 3)))


def test_a_picture_of_one_row_does_not_fill_the_memory():
    processing = ImageProcessing(height=224, width=224, steps=(Resize(shortest_edge=224), square(224)))
    with pytest.raises(DataError, match="so narrow that it becomes 22400000 × 224"):
        preprocess(Image.new("RGB", (100_000, 1)), processing)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch):
    data = encoded(noise(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    with pytest.raises(DataError, match="claims to have more than"):
        decode_image(data)


# --- preprocessing ----------------------------------------------------------------------------------------


def processing(size: int, *steps: ImageStep) -> ImageProcessing:
    return ImageProcessing(height=size, width=size, steps=steps)


def reference(image: Image.Image, steps: tuple[ImageStep, ...]) -> np.ndarray:
    """The steps one after the other in plain numpy; what ``preprocess`` is a fast form of."""
    pixels: np.ndarray = np.array(image)
    for step in steps:
        if isinstance(step, Resize):
            h, w = pixels.shape[:2]
            if step.shortest_edge is not None:
                scaled = int(step.shortest_edge * max(h, w) / min(h, w))
                new = (step.shortest_edge, scaled) if h <= w else (scaled, step.shortest_edge)
                new = (scaled, step.shortest_edge) if w <= h else new
            else:
                new = (step.height, step.width)
            pixels = np.array(
                Image.fromarray(pixels).resize(new[::-1], getattr(Image.Resampling, step.resample.upper()))
            )
        elif isinstance(step, CenterCrop):
            h, w = pixels.shape[:2]
            top, left = (h - step.height) // 2, (w - step.width) // 2
            out = np.zeros((step.height, step.width, 3), pixels.dtype)
            rows, columns = np.arange(step.height) + top, np.arange(step.width) + left
            is_in = ((rows >= 0) & (rows < h))[:, None] & ((columns >= 0) & (columns < w))[None]
            out[is_in] = pixels[np.clip(rows, 0, h - 1)][:, np.clip(columns, 0, w - 1)][is_in]
            pixels = out
        elif isinstance(step, Rescale):
            pixels = (pixels.astype(np.float64) * step.factor).astype(np.float32) + np.float32(step.offset)
        elif isinstance(step, Normalize):
            pixels = pixels.astype(np.float32)
            pixels = (pixels - np.array(step.mean, np.float32)) / np.array(step.std, np.float32)
        else:
            pixels = pixels[:, :, ::-1]
    return pixels.astype(np.float32).transpose(2, 0, 1)


CASES = {
    "mobilenet": processing(224, Resize(shortest_edge=256), square(224), BYTE, STANDARD),
    "vit": processing(224, Resize(height=224, width=224), BYTE, STANDARD),
    "clip": processing(224, Resize(shortest_edge=224, resample="bicubic"), square(224), BYTE, CLIP),
    "odd crop": processing(33, Resize(shortest_edge=40, resample="lanczos"), square(33), BYTE, IMAGENET),
    "padded": processing(300, square(300), BYTE, IMAGENET),
    "flipped after": processing(64, Resize(height=64, width=64, resample="box"), BYTE, IMAGENET, FlipChannels()),
    "flipped before": processing(64, Resize(height=64, width=64, resample="hamming"), FlipChannels(), BYTE, IMAGENET),
    "crop after rescale": processing(256, Resize(shortest_edge=224), BYTE, square(256), FlipChannels()),
    "efficientnet": processing(
        64, Resize(height=64, width=64, resample="nearest"), Rescale(factor=1 / 127.5, offset=-1)
    ),
    "bytes": processing(32, Resize(height=32, width=32)),
    "normalize only": processing(32, Resize(height=32, width=32), IMAGENET),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [(375, 500), (500, 333), (224, 224), (31, 97), (97, 31), (1, 1)])
def test_the_fast_form_equals_the_plain_one_to_the_bit(name: str, size: tuple[int, int]):
    check_image_processing(CASES[name])
    image = noise(*size)
    given = preprocess(image, CASES[name])
    assert given.dtype == np.float32
    assert given.flags.c_contiguous
    assert given.shape == (3, CASES[name].height, CASES[name].width)
    assert np.array_equal(given, reference(image, CASES[name].steps))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (processing(224, Resize(shortest_edge=224)), "end at None × None, not 224 × 224"),
        (processing(224, Resize(height=224, width=200)), "end at 224 × 200"),
        (processing(224), "end at None"),
        (processing(8, BYTE, Resize(height=8, width=8)), "'resize' stands after"),
        (processing(8, STANDARD, square(8)), "'center_crop' stands after"),
        (processing(8, Rescale(factor=1.0, offset=1.0), square(8)), "'center_crop' stands after"),
        (processing(8, Resize(height=8)), "no size above 0"),
        (processing(8, Resize(shortest_edge=0), square(8)), "no size above 0"),
        (processing(8, Resize(shortest_edge=9, height=8), square(8)), "an edge and a size"),
        (processing(0, square(0)), "no size above 0"),
        (processing(8, square(8), Normalize(mean=(0.5,), std=(0.5,))), "3 means"),
        (processing(8, square(8), Normalize(mean=(0.5,) * 3, std=(0.5, 0.0, 0.5))), "not above 0"),
    ],
)
def test_steps_that_cannot_be_done_are_refused(spec: ImageProcessing, words: str):
    with pytest.raises(BundleError) as raised:
        check_image_processing(spec)
    assert words in raised.value.message


# --- parity with Transformers -----------------------------------------------------------------------------

HUGGING_FACE = {
    "mobilenet_v2:MobileNetV2": ({}, CASES["mobilenet"]),
    "mobilenet_v1:MobileNetV1": ({}, CASES["mobilenet"]),
    "clip:CLIP": ({}, CASES["clip"]),
    "vit:ViT": ({}, CASES["vit"]),
    "deit:DeiT": ({}, processing(224, Resize(height=256, width=256, resample="bicubic"), square(224), BYTE, IMAGENET)),
    "siglip:Siglip": ({}, processing(224, Resize(height=224, width=224, resample="bicubic"), BYTE, STANDARD)),
    "mobilevit:MobileViT": (
        {"size": {"shortest_edge": 288}},
        processing(256, Resize(shortest_edge=288, resample="bicubic"), BYTE, square(256), FlipChannels()),
    ),
    "mobilevit:MobileViT ": (
        {"size": {"shortest_edge": 200}},
        processing(256, Resize(shortest_edge=200, resample="bicubic"), BYTE, square(256), FlipChannels()),
    ),
    "convnext:ConvNext": (
        {"size": {"shortest_edge": 224}},
        processing(224, Resize(shortest_edge=256, resample="bicubic"), square(224), BYTE, STANDARD),
    ),
    "convnext:ConvNext ": (
        {"size": {"shortest_edge": 384}},
        processing(384, Resize(height=384, width=384, resample="bicubic"), BYTE, STANDARD),
    ),
    "efficientnet:EfficientNet": (
        {"rescale_offset": True, "rescale_factor": 1 / 127.5, "do_normalize": False, "include_top": False},
        processing(346, Resize(height=346, width=346, resample="bicubic"), Rescale(factor=1 / 127.5, offset=-1)),
    ),
}


def hugging_face_pixels(name: str, options: dict, image: Image.Image) -> np.ndarray:
    import importlib

    family, _, title = name.strip().partition(":")
    module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    processor = getattr(module, f"{title}ImageProcessorPil")(**options)
    return processor(image, return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_parity_with_transformers(name: str):
    pytest.importorskip("transformers", reason="transformers is not installed")
    options, spec = HUGGING_FACE[name]
    defaults = {"deit:DeiT": {"image_mean": list(IMAGENET.mean), "image_std": list(IMAGENET.std)}}.get(name, {})
    check_image_processing(spec)
    for index, size in enumerate([(375, 500), (500, 333), (80, 97)]):
        image = noise(*size, seed=index)
        expected = hugging_face_pixels(name, {**defaults, **options}, image)
        given = preprocess(decode_image(image), spec)
        assert np.array_equal(given, expected), np.abs(given - expected).max()


def test_parity_with_transformers_on_photographs(shared_assets: Path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    files = sorted((shared_assets / "data/imagenet-sample").rglob("*.JPEG"))[:12]
    assert len(files) == 12
    for file in files:
        image = decode_image(file)
        for name in ("mobilenet_v2:MobileNetV2", "clip:CLIP"):
            options, spec = HUGGING_FACE[name]
            assert np.array_equal(preprocess(image, spec), hugging_face_pixels(name, options, image)), file
