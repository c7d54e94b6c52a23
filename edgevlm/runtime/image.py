"""From a picture in any form to a graph's input.

The results equal those of Transformers' PIL image processors bit for bit; ``tests/runtime/test_image.py`` compares.
"""

from __future__ import annotations

import functools
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from edgevlm.errors import BundleError, DataError
from edgevlm.runtime.spec import (
    Array,
    CenterCrop,
    FlipChannels,
    ImageProcessing,
    ImageStep,
    Letterbox,
    Normalize,
    Pad,
    Rescale,
    Resize,
)

Size = tuple[int, int]
"""(height, width) in pixels."""

ImageSource = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | Array

# A picture of one row is resized to a thousand times its size, which the guard against bombs does not see.
_MOST_PIXELS = 1 << 27

_ACCEPTED = "a path, bytes, an open binary file, a PIL image or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
_CONVERT = "Convert the file to PNG or JPEG."


def decode_image(source: ImageSource) -> Image.Image:
    """The picture in RGB, upright; never the object that was passed.

    An EXIF orientation is applied, transparency is laid over white, the first frame of several is taken, 16-bit grey
    keeps its upper 8 bits.

    Raises: DataError: not a picture, truncated, or so large that Pillow takes it for a decompression bomb.
    """
    if isinstance(source, Image.Image):
        return _rgb(source, "the PIL image", is_callers=True)
    if isinstance(source, np.ndarray):
        return _rgb(_image_from_array(source), "the array")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), "the bytes")
    if isinstance(source, (str, os.PathLike)):
        return _decode_file(Path(source))
    if hasattr(source, "read"):
        return _decode(source, f"'{getattr(source, 'name', 'the open file')}'")
    raise DataError(f"A picture came as {type(source).__name__}.", hint=f"Pass {_ACCEPTED}.")


def _decode_file(file: Path) -> Image.Image:
    try:
        with file.open("rb") as opened:
            return _decode(opened, f"'{file}'")
    except FileNotFoundError as error:
        raise DataError(f"There is no picture '{file}'.", hint="Check the path.") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DataError(
            f"The picture '{file}' cannot be read: {reason}.", hint="Name a file that you may read."
        ) from error


def _decode(opened: IO[bytes], name: str) -> Image.Image:
    try:
        image = Image.open(opened)
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{name} claims to have more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000} million pixels.",
            hint="Scale the picture down; one this large may be made to exhaust memory.",
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not a picture that Pillow knows.", hint=_CONVERT) from error
    except Exception as error:  # Pillow's readers raise whatever a broken header makes them
        raise DataError(f"{name} cannot be read as a picture: {_words(error)}.", hint=_CONVERT) from error
    return _rgb(image, name)


def _rgb(image: Image.Image, name: str, *, is_callers: bool = False) -> Image.Image:
    try:
        if is_callers:
            image = ImageOps.exif_transpose(image)
        else:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            # Pillow would clip 16-bit values at 255, which turns nearly every such picture white.
            return Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode == "F":
            raise DataError(
                f"{name} has float pixels, whose range is not known.", hint="Save it with 8 bits a channel."
            )
        if "A" in image.getbands() or "transparency" in image.info:
            # Transformers' convert_to_rgb lays transparency over white too; what lies under it is arbitrary.
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # decoding happens only here, and decoders raise whatever a broken body makes them
        raise DataError(
            f"{name} is truncated or damaged: {_words(error)}.", hint="Fetch or save the picture again."
        ) from error


def _image_from_array(array: Array) -> Image.Image:
    if array.dtype != np.uint8:
        raise DataError(f"A picture came as an array of {array.dtype}.", hint="Convert it to uint8, 0 to 255.")
    has_channels_last = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if not (array.ndim == 2 or has_channels_last) or 0 in array.shape:
        is_channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        hint = "Move the channels last: array.transpose(1, 2, 0)." if is_channels_first else f"Pass {_ACCEPTED}."
        raise DataError(f"A picture came as an array of shape {array.shape}.", hint=hint)
    return Image.fromarray(array[:, :, 0] if has_channels_last and array.shape[2] == 1 else array)


def _words(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def preprocess(image: Image.Image, processing: ImageProcessing) -> Array:
    """Do the declared steps.

    Args:    image: RGB, as ``decode_image`` gives it.
    Shapes:  float32 [3, height, width], contiguous.
    Raises:  DataError: the picture is so narrow that its longer side becomes enormous.
    """
    for step in processing.steps:
        if isinstance(step, Resize):
            image = _resize(image, step)
        elif isinstance(step, CenterCrop):
            image = _center_crop(image, step)
        elif isinstance(step, Letterbox):
            image = _letterbox(image, step)
    # Every other step acts on each of the 256 possible values alone, so it is done on them and looked up.
    table, channels = _value_table(processing.steps)
    pixels = np.asarray(image)
    values = np.empty((3, *pixels.shape[:2]), np.float32)
    for row, channel, plane in zip(table, channels, values, strict=True):
        np.take(row, pixels[:, :, channel], out=plane, mode="clip")
    pad = processing.steps[-1] if processing.steps else None
    return _padded(values, pad) if isinstance(pad, Pad) else values


def _padded(values: Array, step: Pad) -> Array:
    padded = np.zeros((len(values), step.height, step.width), values.dtype)
    padded[:, : values.shape[1], : values.shape[2]] = values
    return padded


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a picture lies in the graph's input: input = picture · scale + offset, in pixels."""

    scale_x: float = 1.0
    scale_y: float = 1.0
    offset_x: float = 0.0
    offset_y: float = 0.0


def place_picture(size: Size, processing: ImageProcessing) -> Placement:
    """Where ``preprocess`` puts a picture of this size, to lead boxes and masks back to it."""
    placed = Placement()
    height, width = size
    for step in processing.steps:
        if isinstance(step, Resize):
            to_height, to_width = _resized_size((height, width), step)
            placed = _scaled(placed, to_width / width, to_height / height)
            height, width = to_height, to_width
        elif isinstance(step, CenterCrop):
            placed = _moved(placed, -((width - step.width) // 2), -((height - step.height) // 2))
            height, width = step.height, step.width
        elif isinstance(step, Letterbox):
            (to_height, to_width), (top, left) = _fitted((height, width), step)
            # The scale before its product is rounded down to pixels, as YOLOX leads its boxes back.
            scale = min(step.width / width, step.height / height)
            placed = _moved(_scaled(placed, scale, scale), left, top)
            height, width = step.height, step.width
    return placed


def _scaled(placed: Placement, x: float, y: float) -> Placement:
    return Placement(
        scale_x=placed.scale_x * x,
        scale_y=placed.scale_y * y,
        offset_x=placed.offset_x * x,
        offset_y=placed.offset_y * y,
    )


def _moved(placed: Placement, x: float, y: float) -> Placement:
    return replace(placed, offset_x=placed.offset_x + x, offset_y=placed.offset_y + y)


def size_of(image: Image.Image) -> Size:
    return image.height, image.width


def _resize(image: Image.Image, step: Resize) -> Image.Image:
    height, width = _resized_size(size_of(image), step)
    if height * width > _MOST_PIXELS:
        raise DataError(
            f"A picture of {image.width} × {image.height} pixels is so narrow that it becomes {width} × {height}.",
            hint="Crop it.",
        )
    return image.resize((width, height), Image.Resampling[step.resample.upper()])


def _resized_size(size: Size, step: Resize) -> Size:
    if step.longest_edge is not None:
        scale = step.longest_edge / max(size)
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))
    if step.shortest_edge is None:
        return step.height or 0, step.width or 0
    short, long = sorted(size)
    longer = int(step.shortest_edge * long / short)
    is_tall = size[1] <= size[0]
    return (longer, step.shortest_edge) if is_tall else (step.shortest_edge, longer)


def _letterbox(image: Image.Image, step: Letterbox) -> Image.Image:
    (height, width), (top, left) = _fitted(size_of(image), step)
    box = Image.new("RGB", (step.width, step.height), (step.fill,) * 3)
    box.paste(image.resize((width, height), Image.Resampling[step.resample.upper()]), (left, top))
    return box


def _fitted(size: Size, step: Letterbox) -> tuple[Size, Size]:
    """The size that fits, rounded down as YOLOX does, and (top, left) of where it stands."""
    height, width = size
    if step.width * height <= step.height * width:
        fitted = (max(1, height * step.width // width), step.width)
    else:
        fitted = (step.height, max(1, width * step.height // height))
    if step.place == "top_left":
        return fitted, (0, 0)
    return fitted, ((step.height - fitted[0]) // 2, (step.width - fitted[1]) // 2)


def _center_crop(image: Image.Image, step: CenterCrop) -> Image.Image:
    left, top = (image.width - step.width) // 2, (image.height - step.height) // 2
    return image.crop((left, top, left + step.width, top + step.height))  # Pillow fills what lies outside with zeros


@functools.lru_cache(maxsize=16)
def _value_table(steps: tuple[ImageStep, ...]) -> tuple[Array, tuple[int, ...]]:
    """What becomes of each pixel value, float32 [3, 256] by output channel, and which input channel feeds each.

    Source: transformers.image_transforms.rescale and normalize, which round to float32 after each step.
    """
    values: Array = np.tile(np.arange(256, dtype=np.float32), (3, 1))
    channels = (0, 1, 2)
    for step in steps:
        if isinstance(step, Rescale):
            values = (values.astype(np.float64) * step.factor).astype(np.float32) + np.float32(step.offset)
        elif isinstance(step, Normalize):
            mean, std = (np.array(v, dtype=np.float32)[:, None] for v in (step.mean, step.std))
            values = (values - mean) / std
        elif isinstance(step, FlipChannels):
            values, channels = values[::-1], channels[::-1]
    return np.ascontiguousarray(values), channels


def check_image_processing(processing: ImageProcessing) -> None:
    """Refuse steps that ``preprocess`` cannot do, or that do not end at the declared size.

    Raises: BundleError: with the step that is wrong.
    """
    size: tuple[int | None, int | None] = (None, None)
    largest: tuple[int, int] | None = None
    changes_values = moves_zero = False
    for i, step in enumerate(processing.steps):
        if isinstance(step, Resize):
            _need(not changes_values, "'resize' stands after a step that changes values")
            named = [edge for edge in (step.shortest_edge, step.longest_edge) if edge is not None]
            _need(not named or step.height is step.width is None, "'resize' has an edge and a size")
            _need(len(named) < 2, "'resize' has two edges")
            size = (step.height, step.width)
            edges = named or size
            _need(all(edge and edge > 0 for edge in edges), "'resize' has no size above 0")
            largest = None if step.longest_edge is None else (step.longest_edge, step.longest_edge)
        elif isinstance(step, CenterCrop):
            # The zeros that pad a small picture must pass unchanged through the steps before.
            _need(not moves_zero, "'center_crop' stands after a step that moves zero")
            size = (step.height, step.width)
            _need(min(size) > 0, "'center_crop' has no size above 0")
        elif isinstance(step, Letterbox):
            _need(not changes_values, "'letterbox' stands after a step that changes values")
            size = (step.height, step.width)
            _need(min(size) > 0, "'letterbox' has no size above 0")
            _need(0 <= step.fill <= 255, "'letterbox' is filled with a value that no pixel has")
        elif isinstance(step, Pad):
            _need(i == len(processing.steps) - 1, "'pad' is not the last step")
            before = largest or size
            size = (step.height, step.width)
            fits = all(was is not None and was <= now for was, now in zip(before, size, strict=True))
            _need(fits, "'pad' is smaller than the picture")
        elif isinstance(step, Rescale):
            changes_values, moves_zero = True, moves_zero or step.offset != 0
        elif isinstance(step, Normalize):
            changes_values = moves_zero = True
            _need(len(step.mean) == len(step.std) == 3, "'normalize' needs 3 means and 3 deviations")
            _need(all(deviation > 0 for deviation in step.std), "'normalize' has a deviation that is not above 0")
    expected = (processing.height, processing.width)
    _need(size == expected, f"the steps end at {size[0]} × {size[1]}, not {expected[0]} × {expected[1]}")


def _need(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise BundleError(
            f"The image processing cannot be done: {otherwise}.", hint="Mend the model's card or processor."
        )
