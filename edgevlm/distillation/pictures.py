"""Training pictures, augmented the same way for teacher and student: drawn from (seed, picture, variant)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from edgevlm.data.content import map_in_threads
from edgevlm.data.data_set import DataSet
from edgevlm.errors import DataError
from edgevlm.runtime.image import decode_image, preprocess
from edgevlm.runtime.spec import Array, ImageProcessing

Augmentation = Literal["none", "flip", "crop-flip"]

AUGMENTATION_VERSION = 1
"""Part of what stored teacher outputs are of: a change of ``augment`` makes them outputs of other pictures."""

# Of DINO's global crops (arXiv:2104.14294): most of what the picture shows is still there. The aspects are Inception's
# (arXiv:1409.4842).
_CROP_SHARES = (0.4, 1.0)
_CROP_ASPECTS = (3 / 4, 4 / 3)
_CROP_TRIES = 10

# Preprocessed pictures are kept where they fit: reading photographs takes longer than a step of a small model.
_KEEP_BYTES = 1 << 30


def augment(image: Image.Image, kind: Augmentation, *, seed: int, index: int, variant: int) -> Image.Image:
    """Picture ``index`` in its form ``variant``; the same numbers give the same pixels.

    Args: image: RGB, as ``decode_image`` gives it.
    """
    if kind == "none":
        return image
    draws = np.random.default_rng((seed, index, variant))
    is_flipped = draws.random() < 0.5
    if kind == "crop-flip":
        image = image.crop(_crop(draws, image.width, image.height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped else image


def _crop(draws: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """A box of a random share and aspect; the whole picture where none fits."""
    for _ in range(_CROP_TRIES):
        area = width * height * draws.uniform(*_CROP_SHARES)
        aspect = np.exp(draws.uniform(*np.log(_CROP_ASPECTS)))
        w, h = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws.integers(width - w + 1)), int(draws.integers(height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height


class TrainingPictures:
    """A data set's pictures in all their variants. Row ``variant * len(data) + index`` is a picture in a form.

    Args:
        seed: of the augmentation.
    """

    def __init__(self, data: DataSet, *, augmentation: Augmentation, seed: int, n_variants: int) -> None:
        self.data = data
        self.augmentation = augmentation
        self.seed = seed
        # Without augmentation all forms of a picture are the picture.
        self.n_variants = 1 if augmentation == "none" else n_variants
        self.labels = np.array([-1 if sample.label is None else sample.label for sample in data.samples])
        self._kept: dict[tuple[int, ImageProcessing], Array] = {}

    @property
    def n_rows(self) -> int:
        return len(self.data) * self.n_variants

    @property
    def digest(self) -> str:
        """sha256 over the pictures' contents in their order, which rows are counted by."""
        return hashlib.sha256("\n".join(sample.digest for sample in self.data.samples).encode()).hexdigest()

    def row_of(self, index: int, epoch: int) -> int:
        """Later epochs see the variants again, in turns."""
        return epoch % self.n_variants * len(self.data) + index

    def pixels(self, rows: Sequence[int], image: ImageProcessing, *, is_kept: bool = False) -> Array:
        """Rows as a graph takes them.

        Args:    is_kept: remember them, where all rows fit into memory.
        Shapes:  float32 [len(rows), 3, height, width].
        Raises:  DataError: a picture cannot be used; it is named.
        """
        is_kept = is_kept and self.n_rows * 3 * image.height * image.width * 4 <= _KEEP_BYTES
        missing = [row for row in dict.fromkeys(rows) if (row, image) not in self._kept]
        made = dict(zip(missing, map_in_threads(lambda row: self._pixels(row, image), missing), strict=True))
        if is_kept:
            self._kept |= {(row, image): value for row, value in made.items()}
        return np.stack([made[row] if row in made else self._kept[row, image] for row in rows])

    def picture(self, row: int) -> Image.Image:
        """A picture in its form, before any preprocessing."""
        variant, index = divmod(row, len(self.data))
        decoded = decode_image(self.data.samples[index].read())
        return augment(decoded, self.augmentation, seed=self.seed, index=index, variant=variant)

    def _pixels(self, row: int, image: ImageProcessing) -> Array:
        sample = self.data.samples[row % len(self.data)]
        try:
            return preprocess(self.picture(row), image)
        except (DataError, OSError) as error:
            told = error.message if isinstance(error, DataError) else str(error)
            raise DataError(
                f"The picture '{sample.name}' cannot be used: {told.rstrip('.')}.", hint="Replace it or take it out."
            ) from error
