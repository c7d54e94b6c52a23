"""Pictures as the graph takes them, preprocessed once for all candidates."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import numpy as np

import edgevlm.runtime.image
from edgevlm.data.content import header_size, map_in_threads
from edgevlm.data.data_set import Count, DataSet, Sample
from edgevlm.errors import DataError
from edgevlm.runtime.image import Size
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import Array, to_json

_SLICE = 64
_MAX_SHARE = 0.25
"""Of the free disk: a convenience must not fill it."""


def pixel_slices(
    pipeline: Pipeline, data: DataSet, *, folder: Path | None = None, count: Count | None = None
) -> Iterator[Array]:
    """The pictures in order, some at a time.

    Args:
        folder: keeps the arrays as one memory-mapped ``.npy`` for the next pipeline with the same preprocessing.
    Shapes: float32 [at most 64, 3, height, width].
    Raises: DataError: a picture cannot be read, or has changed since its data set was read.
    """
    file = folder / f"pixels-{_key(pipeline, data)}.npy" if folder else None
    if file and file.is_file():
        kept = np.load(file, mmap_mode="r", allow_pickle=False)
        for start in range(0, len(kept), _SLICE):
            yield kept[start : start + _SLICE]
            if count:
                count(min(start + _SLICE, len(kept)), len(kept))
        return
    made = _preprocess(pipeline, data, count=count)
    image = pipeline.processing.image
    yield from _keep(made, file, shape=(len(data), 3, image.height, image.width)) if file else made


def picture_sizes(data: DataSet, *, folder: Path | None = None) -> list[Size]:
    """(height, width) of each upright picture, in order.

    Args: folder: keeps them for the next pipeline, since generated pictures are drawn for it.
    """
    parts = [Path(edgevlm.runtime.image.__file__).read_bytes(), *(each.digest.encode() for each in data.samples)]
    file = folder / f"sizes-{_digest(parts)}.npy" if folder else None
    if file and file.is_file():
        kept = np.load(file, allow_pickle=False)
    else:
        kept = np.array(list(map_in_threads(_size, data.samples)), dtype=np.int64)
        if file:
            with contextlib.suppress(OSError):
                unfinished = file.with_name(f".{file.name}.{os.getpid()}.npy")
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(unfinished, kept, allow_pickle=False)
                unfinished.replace(file)
    return [(int(height), int(width)) for height, width in kept]


def _size(sample: Sample) -> Size:
    picture = sample.read()
    if isinstance(picture, bytes):
        return header_size(io.BytesIO(picture))
    return picture.shape[0], picture.shape[1]


def _preprocess(pipeline: Pipeline, data: DataSet, *, count: Count | None) -> Iterator[Array]:
    rows = []
    for row in map_in_threads(lambda sample: _pixels(pipeline, sample), data.samples, count=count):
        rows.append(row)
        if len(rows) == _SLICE:
            yield np.stack(rows)
            rows = []
    if rows:
        yield np.stack(rows)


def _pixels(pipeline: Pipeline, sample: Sample) -> Array:
    try:
        picture = sample.read()
        # What is kept is found by the digest, so it must be the digest of what is kept.
        if isinstance(picture, bytes) and hashlib.sha256(picture).hexdigest() != sample.digest:
            raise DataError("it has changed since the data set was read")
        return pipeline.preprocess(picture)
    except (DataError, OSError) as error:
        problem = error.message if isinstance(error, DataError) else error.strerror or str(error)
        raise DataError(
            f"The picture '{sample.name}' cannot be used: {problem.rstrip('.')}.",
            hint="Run it again on a data set that stays as it is.",
        ) from error


def _keep(slices: Iterator[Array], file: Path, *, shape: tuple[int, ...]) -> Iterator[Array]:
    """Pass the slices on, and write them to ``file`` on the way: whole, or not at all where the disk is full."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    output = _open(unfinished, shape)
    try:
        for pixels in slices:
            output = output and _append(output, pixels)
            yield pixels
        if output:
            with contextlib.suppress(OSError):
                output.close()
                unfinished.replace(file)
    finally:
        with contextlib.suppress(OSError):
            if output:
                output.close()
            unfinished.unlink()


def _open(file: Path, shape: tuple[int, ...]) -> BinaryIO | None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if 4 * math.prod(shape) > _MAX_SHARE * shutil.disk_usage(file.parent).free:
            return None
        output = file.open("wb")
        np.lib.format.write_array_header_1_0(output, {"descr": "<f4", "fortran_order": False, "shape": shape})
    except OSError:
        return None
    return output


def _append(output: BinaryIO, pixels: Array) -> BinaryIO | None:
    # Written, not memory-mapped: a disk that fills up is an error here, and would kill the process there.
    try:
        output.write(np.ascontiguousarray(pixels, dtype="<f4").data)
    except OSError:
        output.close()
        return None
    return output


def _key(pipeline: Pipeline, data: DataSet) -> str:
    """Of everything that decides the pixels: the pictures in order, the steps, and the code that takes them."""
    code = Path(edgevlm.runtime.image.__file__).read_bytes()
    parts = [to_json(pipeline.processing.image), code, version("pillow").encode(), version("numpy").encode()]
    parts += [sample.digest.encode() for sample in data.samples]
    return _digest(parts)


def _digest(parts: list[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
