from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm.data import shapes
from edgevlm.data.data_set import UNKNOWN, DataSet, Objects, Things
from edgevlm.data.readers import read_data_set
from edgevlm.data.splits import split
from edgevlm.errors import DataError, MissingToolError
from edgevlm.runtime.spec import Array
from tests.data.pictures import png, write, write_folders

DETECT, SEGMENT = "object-detection", "semantic-segmentation"
LABELS = ("cat", "dog", "bird")
VOC = ("background", "aeroplane, airplane", "dog")


def read(path: Path, task: str = DETECT, labels: tuple[str, ...] = LABELS) -> DataSet:
    return read_data_set(path, labels=labels, task=task)


def thing(image: int, category: int, box: list[float], **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "iscrowd": 0, "segmentation": [], **more}


CATEGORIES = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
THINGS = [thing(1, 18, [1, 2, 3, 4]), thing(1, 17, [0, 0, 8.5, 8]), thing(2, 17, [5, 5, 2, 2], iscrowd=1)]


def write_coco(
    root: Path, things: list[dict[str, Any]] = THINGS, *, n: int = 3, file: str = "instances.json", **changes: Any
) -> Path:
    """``n`` pictures of 16 × 16 with annotations."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 16, "height": 16} for i in range(1, n + 1)]
    for i in range(1, n + 1):
        write(root / "images" / f"{i}.png", png(seed=i))
    content = {"images": images, "annotations": things, "categories": CATEGORIES} | changes
    write(root / file, json.dumps(content).encode())
    return root


def objects(data: DataSet) -> list[Objects]:
    return [sample.annotation.read() for sample in data.samples if sample.annotation]


# --- boxes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["instances.json", "annotations/instances_val2017.json"])
def test_boxes_of_a_coco_file(tmp_path: Path, file: str) -> None:
    data = read(write_coco(tmp_path / "pets", file=file))
    assert (data.name, len(data), data.has_labels, data.notes) == (f"pets/{Path(file).stem}", 3, True, ())
    first, second, third = objects(data)
    assert first.boxes.tolist() == [[1, 2, 4, 6], [0, 0, 8.5, 8]]
    assert first.classes.tolist() == [1, 0], "categories are matched by name"
    assert second.is_crowd.tolist() == [True]
    assert third.boxes.shape == (0, 4), "nothing in it is also something to know"
    assert read(tmp_path / "pets" / file).digest == data.digest


def test_pictures_in_the_folder_that_the_file_is_named_for(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco", file="annotations/instances_val2017.json")
    (root / "images").rename(root / "val2017")
    assert len(read(root)) == 3


def test_the_held_out_file_is_used(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco", file="annotations/instances_train2017.json")
    write_coco(root, THINGS[:1], file="annotations/instances_val2017.json")
    data = read(root)
    assert data.name == "coco/instances_val2017"
    assert "'val' is used, train not" in data.notes[0]
    write_coco(root, THINGS[:1], file="annotations/other_val2017.json")
    with pytest.raises(DataError, match="several annotations"):
        read(root)


def test_the_digest_is_of_the_annotations_too(tmp_path: Path) -> None:
    one = read(write_coco(tmp_path / "one"))
    other = read(write_coco(tmp_path / "other", [thing(1, 18, [1, 2, 3, 5]), *THINGS[1:]]))
    assert one.digest != other.digest
    assert [a.digest for a in one.samples] == [b.digest for b in other.samples]
    assert one.digest == read(write_coco(tmp_path / "same")).digest


def test_categories_without_a_class_are_left_out_and_told(tmp_path: Path) -> None:
    more = [*CATEGORIES, {"id": 99, "name": "toaster"}]
    data = read(write_coco(tmp_path / "pets", [*THINGS, thing(3, 99, [0, 0, 1, 1])], categories=more))
    assert "1 categories" in data.notes[0] and "toaster" in data.notes[0]
    assert objects(data)[2].boxes.shape == (0, 4)


def test_three_splits_share_no_picture(tmp_path: Path) -> None:
    data = read(write_coco(tmp_path / "pets", n=25))
    parts = split(data, n_calibrate=5)
    digests = [{sample.digest for sample in part.samples} for part in (parts.calibrate, parts.select, parts.report)]
    assert [len(part) for part in digests] == [5, 10, 10]
    assert not (digests[0] & digests[1] or digests[1] & digests[2] or digests[0] & digests[2])
    assert parts.report.has_labels


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"annotations": [thing(1, 3, [0, 0, 1, 1])]}, "category 3, which the file does not list"),
        ({"annotations": [thing(9, 17, [0, 0, 1, 1])]}, "image 9, which the file does not list"),
        ({"annotations": [thing(1, 17, [0, 0, -1, 1])]}, r"has the box \[0.0, 0.0, -1.0, 1.0\]"),
        ({"annotations": [thing(1, 17, [0, 0, 1])]}, "has the box"),
        ({"categories": [{"id": 17, "name": "catt"}, {"id": 18, "name": "dog"}]}, "'catt' is nearest to 'cat'"),
        ({"categories": [{"id": 17, "name": "sofa"}, {"id": 18, "name": "tv"}]}, "2 of 2 categories .* match no class"),
        ({"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "2.png"}]}, "1 of 2 pictures .*'a.png'"),
        ({"images": [{"id": i, "file_name": "1.png", "width": 9} for i in (1, 2)]}, "says 9 pixels wide and 16 high"),
        ({"images": []}, "which the file does not list"),
        ({"categories": "cat"}, r"no COCO annotation: Expected `array`, got `str` - at `\$.categories`"),
    ],
)
def test_a_wrong_coco_file(tmp_path: Path, changes: Mapping[str, Any], words: str) -> None:
    root = write_coco(tmp_path / "pets", **changes)
    with pytest.raises(DataError, match=words) as caught:
        read(root / "instances.json")
    assert caught.value.hint


def test_a_broken_coco_file(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "pets")
    text = (root / "instances.json").read_text()
    (root / "instances.json").write_text(text[:-20])
    with pytest.raises(DataError, match="not whole JSON"):
        read(root)


def test_a_model_without_names_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="have no names"):
        read(write_coco(tmp_path / "pets"), labels=())


def test_pictures_alone_are_without_labels(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "pets", {"cat": 2, "dog": 2})
    for task in (DETECT, SEGMENT):
        data = read(root, task)
        assert (len(data), data.has_labels, data.class_names) == (4, False, LABELS)
    write(root / "labels" / "a.txt", b"0 0.5 0.5 0.1 0.1")
    write(root / "images" / "a.png", png())
    with pytest.raises(DataError, match=r"holds boxes .*object-detection needs boxes in a COCO JSON"):
        read(root)


def test_a_missing_library_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingToolError, match="pycocotools") as caught:
        read(write_coco(tmp_path / "pets"))
    assert "pip install 'edgevlm[evaluate]'" in caught.value.hint


# --- masks ------------------------------------------------------------------------------------------------


def mask(values: Array, mode: str = "L") -> bytes:
    image = Image.fromarray(values.astype(np.uint8))
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 255, 0] * 128)
    file = io.BytesIO()
    image.convert("RGB" if mode == "RGB" else image.mode).save(file, "PNG")
    return file.getvalue()


CLASSES = np.array([[0, 1], [2, UNKNOWN]]).repeat(8, axis=0).repeat(8, axis=1)


def write_masks(root: Path, *, mode: str = "L", values: Array = CLASSES, masks: str = "masks") -> Path:
    for name in ("a", "b"):
        write(root / "images" / f"{name}.jpg", png(seed=ord(name)))
        write(root / masks / f"{name}.png", mask(values, mode))
    return root


@pytest.mark.parametrize("mode", ["L", "P"])
@pytest.mark.parametrize("masks", ["masks", "SegmentationClass", "annotations"])
def test_masks_beside_pictures(tmp_path: Path, mode: str, masks: str) -> None:
    data = read(write_masks(tmp_path / "pets", mode=mode, masks=masks), SEGMENT)
    assert (data.name, len(data), data.has_labels, data.notes) == ("pets", 2, True, ())
    assert [np.array_equal(each, CLASSES) for each in objects(data)] == [True, True]


def test_pictures_without_masks_are_left_out_and_told(tmp_path: Path) -> None:
    root = write_masks(tmp_path / "pets")
    write(root / "images" / "c.jpg", png(seed=9))
    data = read(root, SEGMENT)
    assert len(data) == 2
    assert "1 pictures" in data.notes[0]


def test_masks_by_split(tmp_path: Path) -> None:
    write_masks(tmp_path / "pets" / "val")
    write_masks(tmp_path / "pets" / "train")
    assert "'val' is used" in read(tmp_path / "pets", SEGMENT).notes[0]
    for part in ("training", "validation"):
        for name in ("images", "annotations"):
            write(tmp_path / "ade" / name / part / "a.png", png() if name == "images" else mask(CLASSES))
    data = read(tmp_path / "ade", SEGMENT)
    assert len(data) == 1
    assert "'validation' is used" in data.notes[0]


def test_wrong_masks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has colours"):
        read(write_masks(tmp_path / "a", mode="RGB"), SEGMENT)
    with pytest.raises(DataError, match="8 pixels wide and 16 high, but its picture 16 pixels wide and 16 high"):
        read(write_masks(tmp_path / "b", values=CLASSES[:, :8]), SEGMENT)
    with pytest.raises(DataError, match="has the value 3, but the model's classes are 0 to 2"):
        read(write_masks(tmp_path / "c", values=CLASSES.clip(max=3)), SEGMENT)
    root = write_masks(tmp_path / "d")
    (root / "images" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 2 masks .*'b.png'"):
        read(root, SEGMENT)


def test_changed_masks_change_the_digest(tmp_path: Path) -> None:
    one = read(write_masks(tmp_path / "one"), SEGMENT)
    assert one.digest != read(write_masks(tmp_path / "other", values=CLASSES.clip(max=2)), SEGMENT).digest


# --- outlines ---------------------------------------------------------------------------------------------

AIR = [{"id": 5, "name": "airplane"}, {"id": 18, "name": "dog"}, {"id": 90, "name": "toothbrush"}]
LEFT, TOP = [[0, 0, 8, 0, 8, 16, 0, 16]], [[0, 0, 16, 0, 16, 4, 0, 4]]


def test_outlines_are_painted_in_their_order(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    runs = {"size": [16, 16], "counts": [0, 16, 240]}  # column by column: the first one
    things = [
        thing(1, 5, [0, 0, 8, 16], segmentation=LEFT),
        thing(1, 18, [0, 0, 16, 4], segmentation=TOP),
        thing(1, 90, [0, 0, 1, 16], segmentation=runs),
    ]
    data = read(write_coco(tmp_path / "air", things, n=2, categories=AIR), SEGMENT, VOC)
    expected = np.zeros((16, 16), int)
    expected[:, :8] = 1
    expected[:4] = 2
    expected[:, 0] = UNKNOWN
    painted, empty = objects(data)
    assert np.array_equal(painted, expected)
    assert not empty.any()
    assert "toothbrush" in data.notes[0]


def test_a_model_without_background_is_not_asked_about_it(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    things = [thing(1, 5, [0, 0, 8, 16], segmentation=LEFT)]
    data = read(write_coco(tmp_path / "air", things, n=1, categories=AIR), SEGMENT, ("airplane", "dog"))
    assert np.unique(objects(data)[0]).tolist() == [0, UNKNOWN]


def test_a_broken_outline(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    things = [thing(1, 18, [0, 0, 1, 1], segmentation=[[1, 2, "x"]])]
    data = read(write_coco(tmp_path / "air", things, n=1, categories=AIR), SEGMENT, VOC)
    with pytest.raises(DataError, match=r"outline of '1.png' .* cannot be painted"):
        objects(data)


# --- shapes -----------------------------------------------------------------------------------------------


def test_the_built_in_pictures_have_boxes_and_masks() -> None:
    names = shapes.class_names()
    data = read_data_set("shapes", labels=names, task=DETECT, n_shapes=6)
    assert data.has_labels
    for sample, found in zip(data.samples, objects(data), strict=True):
        pixels = sample.read()
        assert isinstance(pixels, np.ndarray)
        assert 1 <= len(found.boxes) <= 4
        assert (found.boxes >= 0).all() and (found.boxes <= pixels.shape[0]).all()
    labels = ("background", *names)
    masks = objects(read_data_set("shapes", labels=labels, task=SEGMENT, n_shapes=6))
    for mask_, found in zip(masks, objects(data), strict=True):
        assert set(np.unique(mask_)) == {0, *(found.classes + 1)}
        left, top, right, bottom = found.boxes[0].astype(int)
        inside = mask_[top:bottom, left:right] == found.classes[0] + 1
        assert inside.any(axis=0).all() and inside.any(axis=1).all(), "the box is tight"
    assert not read_data_set("shapes", labels=LABELS, task=DETECT, n_shapes=3).has_labels


@pytest.mark.assets
def test_real_boxes_and_outlines(assets: Path) -> None:
    labels = tuple(json.loads((assets / "models/yolox-nano-coco.json").read_text())["classes"])
    data = read_data_set(assets / "data/coco128", labels=labels, task=DETECT)
    assert (len(data), data.notes) == (64, ())
    assert sum(len(each.boxes) for each in objects(data)) == 544


# --- outlines of things -----------------------------------------------------------------------------------

PROMPTED = "mask-generation"
SQUARE = [[2, 3, 10, 3, 10, 9, 2, 9]]


def things(data: DataSet) -> list[Things]:
    return [sample.annotation.read() for sample in data.samples if sample.annotation]


def test_things_are_outlined_whatever_they_are(tmp_path: Path) -> None:
    outlined = [
        thing(1, 18, [2, 3, 8, 6], segmentation=SQUARE),
        thing(1, 17, [0, 0, 4, 4], segmentation={"size": [16, 16], "counts": [0, 16, 240]}),
        thing(2, 17, [0, 0, 4, 4], segmentation=SQUARE, iscrowd=1),
    ]
    data = read(write_coco(tmp_path / "pets", outlined), PROMPTED, ())
    assert data.notes == ("2 pictures of 'instances.json' have no outlined thing and are left out.",)
    assert data.has_labels
    (found,) = things(data)
    assert found.masks.shape == (2, 16, 16)
    assert found.boxes.tolist() == [[2, 3, 10, 9], [0, 0, 1, 16]]
    assert found.masks[0].sum() == 48


def test_an_outline_for_another_picture_is_refused(tmp_path: Path) -> None:
    outlined = [thing(1, 18, [0, 0, 4, 4], segmentation={"size": [8, 8], "counts": [0, 8, 56]})]
    data = read(write_coco(tmp_path / "pets", outlined), PROMPTED, ())
    with pytest.raises(DataError, match="8 × 8 pixels"):
        things(data)


def test_drawn_things_need_no_class_that_the_model_knows() -> None:
    data = read_data_set("shapes", labels=(), task=PROMPTED, n_shapes=3, shapes_size=48)
    assert data.has_labels
    for found, sample in zip(things(data), data.samples, strict=True):
        assert 1 <= len(found.masks) <= 4
        assert found.masks.shape[1:] == sample.read().shape[:2] == (48, 48)
        for (left, top, right, bottom), mask in zip(found.boxes.astype(int), found.masks, strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
