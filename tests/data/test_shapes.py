"""The built-in data set: pinned pixels, and truths that hold for every picture."""

from __future__ import annotations

import csv
import doctest
import hashlib
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgevlm.data import shapes
from edgevlm.data.shapes import (
    COLORS,
    HELD_OUT_PAIRS,
    MAX_OBJECTS,
    PAIRS,
    SHAPES,
    Picture,
    Pictures,
    class_names,
    picture,
    shuffle_pixels,
    write_folder,
)

scenes = st.builds(
    picture,
    st.integers(0, 10**9),
    seed=st.integers(0, 2**63),
    size=st.sampled_from((32, 47, 64, 96)),
    n_objects=st.integers(1, MAX_OBJECTS),
)


@pytest.mark.parametrize(
    ("index", "seed", "size", "n_objects", "sha256"),
    [
        (0, 0, 64, 1, "c3172653416e559e53d71ddbb23222d4de477ee9eaae799438faf3b4e79f55fa"),
        (1, 0, 64, 1, "502de61c4a474f3963e0773ca3293dc69624421ff16edd41947d1ce4e59e763c"),
        (2, 7, 32, 3, "9092b79856b369d4f042837b9db9126ed94891369593104ac625f62a90b0766d"),
        (123456, 2**40, 224, (2, 8), "0fd8e9ebe7809c3708bba09c79a245a09936e79d8ecf3db0d87dd94f081b9950"),
        (5, 3, 97, 8, "6a1d033d8fedeccefd9a9bcbe197e78d3588a37a6be0e46053b1ffc1e4e37524"),
        (9, 1, 512, 1, "5d4b5d6db31502701b60c05585894f5c91b1ae5ed8c7db55bdd450dfefd9041d"),
    ],
)
def test_pixels_are_pinned(index, seed, size, n_objects, sha256):
    shown = picture(index, seed=seed, size=size, n_objects=n_objects)
    digest = hashlib.sha256(shown.image.tobytes())
    for thing in shown.objects:
        digest.update(thing.label.encode() + np.packbits(thing.mask).tobytes())
    assert digest.hexdigest() == sha256


def test_generator_is_splitmix64():
    # The first three outputs for the state 0, as the reference implementation prints them.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    one_by_one, at_once = shapes._Draws(0, 0), shapes._Draws(0, 0)
    one_by_one._state = at_once._state = 0
    assert [one_by_one.below(2**64) for _ in expected] == expected
    assert at_once.words(3).tolist() == expected
    assert one_by_one.below(1000) == at_once.below(1000)


def test_neighbouring_keys_share_no_picture():
    images = {picture(i, seed=seed).image.tobytes() for seed in range(12) for i in range(12)}
    assert len(images) == 144


def test_no_pair_is_held_out_twice_and_none_is_missing():
    assert len(COLORS) == len(SHAPES) == len(HELD_OUT_PAIRS) == 8
    assert {color for color, _ in HELD_OUT_PAIRS} == set(COLORS)
    assert {shape for _, shape in HELD_OUT_PAIRS} == set(SHAPES)
    assert len(set(PAIRS)) == 64
    assert set(class_names()) == set(class_names("seen")) | set(class_names("held_out"))
    assert not set(class_names("seen")) & set(class_names("held_out"))


@pytest.mark.parametrize("pairs", ["all", "seen", "held_out"])
def test_pictures_show_every_pair_they_may_and_no_other(pairs):
    split = Pictures(n=600, seed=5, size=32, pairs=pairs)
    assert {shown.label for shown in split} == set(class_names(pairs))
    crowded = Pictures(n=60, seed=5, size=32, pairs=pairs, n_objects=MAX_OBJECTS)
    assert {thing.label for shown in crowded for thing in shown.objects} <= set(class_names(pairs))


def test_a_split_is_a_sequence_of_its_pictures():
    split = Pictures(n=5, seed=2, size=32)
    assert len(split) == len(list(split)) == 5
    assert np.array_equal(split[-1].image, picture(4, seed=2, size=32).image)
    assert [shown.label for shown in split[1:4]] == [shown.label for shown in split][1:4]
    with pytest.raises(IndexError):
        split[5]


@given(scenes)
@settings(max_examples=60, deadline=None)
def test_boxes_are_tight_and_masks_disjoint(shown: Picture):
    size = len(shown.image)
    assert shown.image.shape == (size, size, 3)
    assert shown.image.dtype == np.uint8
    for thing in shown.objects:
        x0, y0, x1, y1 = thing.box
        assert 0 <= x0 < x1 <= size
        assert 0 <= y0 < y1 <= size
        assert thing.mask.shape == (size, size)
        inside = thing.mask[y0:y1, x0:x1]
        assert inside.sum() == thing.mask.sum()
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
    for one, other in combinations(shown.objects, 2):
        assert not (one.mask & other.mask).any()


@given(scenes)
@settings(max_examples=60, deadline=None)
def test_the_pixels_under_a_mask_have_the_colour_named(shown: Picture):
    palette = np.array([shapes._RGB[color] for color in COLORS])
    for thing in shown.objects:
        mean = shown.image[thing.mask].mean(axis=0)
        # By hue, since an object may be lit brighter or darker than its palette entry.
        distances = np.linalg.norm(palette / palette.sum(1, keepdims=True) - mean / mean.sum(), axis=1)
        assert thing.color in np.array(COLORS)[np.argsort(distances)[:2]]
        assert shown.image[thing.mask].std(axis=0).max() < 12


@given(scenes)
@settings(max_examples=60, deadline=None)
def test_label_caption_and_questions_agree_with_the_objects(shown: Picture):
    labels = [thing.label for thing in shown.objects]
    assert shown.label == labels[0]
    assert len(set(labels)) == len(labels)
    assert re.findall("|".join(class_names()), shown.caption) == labels
    assert len(shown.questions) >= 4
    for question, answer in shown.questions:
        assert answer == _answer(question, shown), question


def _answer(question: str, shown: Picture) -> str:
    """Answer from the objects, by another road than the generator's."""
    colors, kinds = "|".join(COLORS), "|".join(SHAPES)
    things = shown.objects
    if question == "how many objects are there?":
        return str(len(things))
    if match := re.fullmatch(f"how many objects are a ({kinds})\\?", question):
        return str(Counter(thing.shape for thing in things)[match[1]])
    if match := re.fullmatch(f"is there an? ((?:{colors}) (?:{kinds}))\\?", question):
        return "yes" if any(thing.label == match[1] for thing in things) else "no"
    if match := re.fullmatch(f"what color is the ({kinds})\\?", question):
        (thing,) = (thing for thing in things if thing.shape == match[1])
        return thing.color
    if match := re.fullmatch(f"what shape is the ({colors}) object\\?", question):
        (thing,) = (thing for thing in things if thing.color == match[1])
        return thing.shape
    match = re.fullmatch(r"is the (\w+ \w+) left of the (\w+ \w+)\?", question)
    assert match, question
    one, other = (np.argwhere(thing.mask)[:, 1] for name in match.groups() for thing in things if thing.label == name)
    assert one.max() < other.min() or other.max() < one.min()
    return "yes" if one.mean() < other.mean() else "no"


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_differ_in_more_than_name(shape):
    place = (512, 512, 440)
    own = shapes._mask(shape, place, size=64, turn=(1024, 0))
    for other in set(SHAPES) - {shape}:
        theirs = shapes._mask(other, place, size=64, turn=(1024, 0))
        assert (own & theirs).sum() / (own | theirs).sum() < 0.85, other


@pytest.mark.parametrize("index", range(8))
def test_a_scene_is_the_same_at_every_size(index):
    small = picture(index, seed=4, size=64, n_objects=(1, 4))
    large = picture(index, seed=4, size=256, n_objects=(1, 4))
    assert small.caption == large.caption
    for one, other in zip(small.objects, large.objects, strict=True):
        # Two pixels of the small one: a thin tip may fall between its pixel centres.
        assert np.abs(4 * np.array(one.box) - np.array(other.box)).max() <= 8


def test_n_objects_covers_its_range():
    numbers = {len(shown.objects) for shown in Pictures(n=100, seed=1, size=32, n_objects=(2, 5))}
    assert numbers == {2, 3, 4, 5}


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_objects": 0},
        {"n_objects": MAX_OBJECTS + 1},
        {"n_objects": (3, 2)},
        {"size": 31},
        {"size": 4096},
        {"index": -1},
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        picture(**{"index": 0, "seed": 0, **arguments})


def test_shuffling_pixels_keeps_colours_and_shuffling_values_does_not():
    image = picture(0, seed=1).image
    moved = shuffle_pixels(image, seed=0, across_channels=False)
    mixed = shuffle_pixels(image, seed=0, across_channels=True)
    assert moved.shape == mixed.shape == image.shape
    assert _pixel_counts(moved) == _pixel_counts(image) != _pixel_counts(mixed)
    assert np.array_equal(np.sort(mixed, axis=None), np.sort(image, axis=None))
    assert (moved != image).any(axis=2).mean() > 0.5
    assert np.array_equal(moved, shuffle_pixels(image, seed=0, across_channels=False))
    assert not np.array_equal(moved, shuffle_pixels(image, seed=1, across_channels=False))


def _pixel_counts(image):
    return Counter(map(tuple, image.reshape(-1, 3).tolist()))


def test_write_folder_by_class(tmp_path: Path):
    write_folder(tmp_path / "out", n=12, seed=3, size=32)
    written = sorted((tmp_path / "out").rglob("*.png"), key=lambda path: path.name)
    split = Pictures(n=12, seed=3, size=32)
    assert [path.parent.name for path in written] == [shown.label for shown in split]
    with Image.open(written[4]) as image:
        assert np.array_equal(np.asarray(image), split[4].image)


def test_write_folder_with_a_table(tmp_path: Path):
    write_folder(tmp_path / "out", n=5, seed=3, size=32, n_objects=2, layout="csv")
    with (tmp_path / "out" / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    split = Pictures(n=5, seed=3, size=32, n_objects=2)
    assert [(row["label"], row["caption"]) for row in rows] == [(s.label, s.caption) for s in split]
    assert all((tmp_path / "out" / row["image"]).is_file() for row in rows)


def test_write_folder_overwrites_nothing_and_leaves_no_half(tmp_path: Path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there"):
        write_folder(tmp_path / "there", n=1, seed=0)
    with pytest.raises(ValueError, match="size"):
        write_folder(tmp_path / "new", n=1, seed=0, size=1)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_needs_numpy_only():
    code = (
        "import sys, edgevlm.data.shapes as s; s.picture(0, seed=0);"
        "print([m for m in ('torch', 'transformers', 'onnx', 'onnxruntime', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_documented_examples_run():
    results = doctest.testmod(shapes)
    assert results.attempted >= 5
    assert results.failed == 0
