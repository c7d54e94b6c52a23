"""Augmentation follows from (seed, picture, variant) alone."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edgevlm.data.data_set import DataSet, Sample
from edgevlm.distillation.pictures import TrainingPictures, augment
from edgevlm.errors import DataError
from edgevlm.runtime.spec import ImageProcessing, Rescale, Resize

IMAGE = ImageProcessing(height=8, width=8, steps=(Resize(height=8, width=8), Rescale(factor=1 / 255)))


def gradient(height: int = 24, width: int = 32) -> Image.Image:
    """No two pixels of a row or column are alike, so that a crop tells where it was cut."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows * 10, columns * 7, rows * 3 + columns], axis=2).astype(np.uint8))


def shown(kind: str, **numbers: int) -> bytes:
    return augment(gradient(), kind, **{"seed": 0, "index": 0, "variant": 0, **numbers}).tobytes()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["flip", "crop-flip"])
def test_equal_numbers_give_equal_pixels_and_each_number_counts(kind: str) -> None:
    assert shown(kind) == shown(kind)
    for number in ("seed", "index", "variant"):
        assert len({shown(kind, **{number: value}) for value in range(12)}) > 1, number


def test_without_augmentation_the_picture_stays() -> None:
    assert shown("none", variant=3) == gradient().tobytes()


def test_a_flip_is_the_picture_or_its_mirror_image() -> None:
    mirrored = gradient().transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    assert {shown("flip", index=i) for i in range(20)} == {gradient().tobytes(), mirrored}


def test_crops_keep_most_of_the_picture() -> None:
    sizes = [augment(gradient(), "crop-flip", seed=0, index=i, variant=0).size for i in range(50)]
    shares = [w * h / (24 * 32) for w, h in sizes]
    assert min(shares) > 0.35 and max(shares) <= 1 and len(set(sizes)) > 20


def pictures(**options: object) -> TrainingPictures:
    samples = tuple(
        Sample(name=str(i), label=None, digest=str(i), read=lambda i=i: np.asarray(gradient()) + np.uint8(i))
        for i in range(4)
    )
    given = {"augmentation": "crop-flip", "seed": 0, "n_variants": 3, **options}
    return TrainingPictures(DataSet(name="four", samples=samples), **given)  # type: ignore[arg-type]


def test_rows_count_pictures_then_variants() -> None:
    made = pictures()
    assert made.n_rows == 12
    assert [made.row_of(2, epoch) for epoch in range(4)] == [2, 6, 10, 2]
    assert pictures(augmentation="none").n_rows == 4
    whole = made.pixels(range(12), IMAGE)
    assert whole.shape == (12, 3, 8, 8) and whole.dtype == np.float32
    np.testing.assert_array_equal(made.pixels([6], IMAGE)[0], whole[6])
    assert not np.array_equal(whole[2], whole[6])


def test_kept_pictures_are_the_same() -> None:
    made = pictures()
    first = made.pixels([1, 5], IMAGE, is_kept=True)
    np.testing.assert_array_equal(made.pixels([1, 5], IMAGE, is_kept=True), first)
    assert len(made._kept) == 2


def test_the_digest_knows_the_order() -> None:
    made = pictures()
    turned = TrainingPictures(made.data.only(made.data.samples[::-1]), augmentation="none", seed=0, n_variants=1)
    assert turned.digest != made.digest


def test_a_picture_that_cannot_be_used_is_named() -> None:
    bad = Sample(name="torn.jpg", label=None, digest="x", read=lambda: b"no picture")
    made = TrainingPictures(DataSet(name="bad", samples=(bad,)), augmentation="none", seed=0, n_variants=1)
    with pytest.raises(DataError, match=r"torn\.jpg"):
        made.pixels([0], IMAGE)
