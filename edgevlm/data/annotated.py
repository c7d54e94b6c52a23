"""Data sets with boxes or masks: a COCO JSON beside its pictures, or a folder of masks beside one of pictures."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from edgevlm.data.content import file_digests, header_size, is_picture, map_in_threads
from edgevlm.data.data_set import UNKNOWN, Annotation, Count, DataSet, Objects, Sample, Things
from edgevlm.data.labels import match_categories
from edgevlm.data.listing import SPLITS, note_of_split, pick_split
from edgevlm.data.other_tasks import kind_of_annotations
from edgevlm.errors import DataError
from edgevlm.extras import require_library
from edgevlm.runtime.image import Size
from edgevlm.runtime.spec import Array

DETECTION, SEGMENTATION, MASKS = "object-detection", "semantic-segmentation", "mask-generation"
ANNOTATED_TASKS = (DETECTION, SEGMENTATION, MASKS)
BACKGROUND = "background"

_OUTLINES = ("masks", "boxes and masks")
_KINDS = {DETECTION: ("boxes", "boxes and masks"), SEGMENTATION: _OUTLINES, MASKS: _OUTLINES}
_LIBRARIES = {DETECTION: ("pycocotools",), SEGMENTATION: ("pycocotools", "sklearn"), MASKS: ("pycocotools",)}
_TRIED = 20  # names that tell a JSON's folder of pictures, of which some may be missing
_PICTURE_FOLDERS = ("images", "jpegimages", "leftimg8bit", "imgs")
_MASK_FOLDERS = ("masks", "mask", "segmentationclass", "annotations", "labels")


def read_annotated(
    path: Path, *, labels: Sequence[str], task: str, cache: Path | None = None, count: Count | None = None
) -> DataSet | None:
    """The data set with its annotations; None where nothing is annotated in a way that the task can use.

    Args:   labels: the model's class names by index, which the data set's are matched with by name.
    Raises: DataError: something that is annotated is broken, missing or contradicts itself.
            MissingToolError: the library that judges such annotations is not installed.
    """
    if path.is_file():
        is_coco = path.suffix.lower() == ".json" and kind_of_annotations(path) in _KINDS[task]
        return _coco(path, labels, task, cache, count) if is_coco else None
    if not path.is_dir():
        return None
    file, notes = _coco_file(path, task)
    if file is not None:
        return _noted(_coco(file, labels, task, cache, count), notes)
    if task == SEGMENTATION and (found := _mask_folders(path)):
        pictures, masks, notes = found
        return _noted(_masked(path, pictures, masks, labels, cache, count), notes)
    parts = {folder: folder.name.lower() for folder in _folders(path)}
    if parts and set(parts.values()) <= set(SPLITS):
        split, (folder,) = pick_split(parts)
        inner = read_annotated(folder, labels=labels, task=task, cache=cache, count=count)
        others = [name for name in parts.values() if name != split]
        return None if inner is None else _noted(inner, note_of_split(path.name, split, others))
    return None


def _noted(data: DataSet, notes: tuple[str, ...]) -> DataSet:
    return replace(data, notes=notes + data.notes)


# --- COCO -------------------------------------------------------------------------------------------------


class _Image(msgspec.Struct):
    id: int | str
    file_name: str
    height: int | None = None
    width: int | None = None


class _Thing(msgspec.Struct):
    """An annotation; its outline stays undecoded until it is painted."""

    image_id: int | str
    category_id: int
    bbox: list[float] | None = None
    iscrowd: int = 0
    segmentation: msgspec.Raw = msgspec.Raw(b"null")


class _Category(msgspec.Struct):
    id: int
    name: str


class _Coco(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Thing]
    categories: list[_Category]


def _coco(file: Path, labels: Sequence[str], task: str, cache: Path | None, count: Count | None) -> DataSet:
    for library in _LIBRARIES[task]:
        require_library(library, f"Judging {task} by '{file.name}'")
    found = _read_coco(file)
    name_of = {category.id: category.name for category in found.categories}
    things: dict[int | str, list[_Thing]] = defaultdict(list)
    known = {image.id for image in found.images}
    for thing in found.annotations:
        if thing.category_id not in name_of:
            raise DataError(
                f"An annotation of '{file}' is of the category {thing.category_id}, which the file does not list.",
                hint="Add it to 'categories', or remove the annotation.",
            )
        if thing.image_id not in known:
            raise DataError(
                f"An annotation of '{file}' is of the image {thing.image_id}, which the file does not list.",
                hint="Add it to 'images', or remove the annotation.",
            )
        things[thing.image_id].append(thing)
    if task == MASKS:
        return _things_of_coco(file, found, things, cache, count)
    matched, strangers = match_categories(tuple(dict.fromkeys(name_of.values())), labels, source=f"'{file.name}'")
    class_of = {key: matched.get(name) for key, name in name_of.items()}
    files = _coco_pictures(file, [image.file_name for image in found.images])
    digests = file_digests(files, cache=cache, count=count)
    sizes = tuple(map_in_threads(header_size, files))
    for image, size in zip(found.images, sizes, strict=True):
        _check_size(image, size, file)
    annotate = _objects if task == DETECTION else functools.partial(_painting, background=background_of(labels))
    samples = tuple(
        Sample(
            name=image.file_name,
            label=None,
            digest=digest,
            read=picture.read_bytes,
            annotation=annotate(file, image, things[image.id], class_of, size),
        )
        for image, picture, digest, size in zip(found.images, files, digests, sizes, strict=True)
    )
    what = "objects" if task == DETECTION else "pixels"
    notes = (
        f"The {what} of {len(strangers)} categories of '{file.name}' that the model has no class for are left out: "
        f"{', '.join(strangers[:4])}{', …' if len(strangers) > 4 else ''}.",
    )
    return DataSet(name=_name_of(file), samples=samples, class_names=tuple(labels), notes=notes if strangers else ())


def _things_of_coco(
    file: Path, found: _Coco, things: Mapping[int | str, Sequence[_Thing]], cache: Path | None, count: Count | None
) -> DataSet:
    """Every picture that something is outlined in, whatever it is. A crowd is not one thing."""
    files = _coco_pictures(file, [image.file_name for image in found.images])
    digests = file_digests(files, cache=cache, count=count)
    sizes = tuple(map_in_threads(header_size, files))
    samples = []
    for image, picture, digest, size in zip(found.images, files, digests, sizes, strict=True):
        _check_size(image, size, file)
        outlines = [thing.segmentation for thing in things[image.id] if not thing.iscrowd]
        if outlines:
            name = f"'{image.file_name}' in '{file.name}'"
            contents = "\n".join([f"{size}", *(bytes(outline).decode() for outline in outlines)])
            annotation = Annotation(
                digest=hashlib.sha256(contents.encode()).hexdigest(),
                read=functools.partial(_outlined, outlines, size, name),
            )
            samples.append(
                Sample(name=image.file_name, label=None, digest=digest, read=picture.read_bytes, annotation=annotation)
            )
    n_bare = len(files) - len(samples)
    notes = (f"{n_bare} pictures of '{file.name}' have no outlined thing and are left out.",) if n_bare else ()
    return DataSet(name=_name_of(file), samples=tuple(samples), notes=notes)


def _outlined(outlines: Iterable[msgspec.Raw], size: Size, name: str) -> Things:
    return things_of([_inside(outline, size, name) for outline in outlines], size)


def things_of(masks: Iterable[Array], size: Size) -> Things:
    """Of bool masks; those without a pixel are no things."""
    seen = [mask for mask in masks if mask.any()]
    boxes = []
    for mask in seen:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return Things(
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4), masks=np.array(seen, dtype=bool).reshape(-1, *size)
    )


def _read_coco(file: Path) -> _Coco:
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Coco)
    except OSError as error:
        raise DataError(f"'{file}' cannot be read: {error.strerror}.", hint="Check its permissions.") from error
    except msgspec.ValidationError as error:
        raise DataError(f"'{file}' is no COCO annotation: {error}.", hint="Mend what is named.") from error
    except msgspec.DecodeError as error:
        raise DataError(f"'{file}' is not whole JSON: {error}.", hint="Get the file again.") from error


def _name_of(file: Path) -> str:
    folder = file.resolve().parent
    folder = folder.parent if folder.name.lower() == "annotations" else folder
    return f"{folder.name}/{file.stem}"


def _coco_pictures(file: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """Beside the JSON, in ``images``, or in the folder that the JSON is named for (``val2017``)."""
    if not names:
        raise DataError(f"'{file}' lists no images.", hint="Pass a data set with pictures.")
    roots = [file.parent, file.parent.parent] if file.parent.name.lower() == "annotations" else [file.parent]
    parts = file.stem.split("_")
    folders = [root / sub for root in roots for sub in ("", *_PICTURE_FOLDERS, *parts)]
    folders += [root / home / part for root in roots for home in _PICTURE_FOLDERS for part in parts]
    folder = max(folders, key=lambda folder: sum((folder / name).is_file() for name in names[:_TRIED]))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} pictures that '{file}' lists are not there; the first is '{missing[0]}'.",
            hint="Put the pictures into 'images' beside it.",
        )
    return tuple(folder / name for name in names)


def _check_size(image: _Image, size: Size, file: Path) -> None:
    stated = (image.height or size[0], image.width or size[1])
    if stated != size:
        raise DataError(
            f"'{image.file_name}' is {_pixels(size)}, but '{file.name}' says {_pixels(stated)}.",
            hint="Use the pictures that were annotated.",
        )


def _objects(
    file: Path, image: _Image, things: Sequence[_Thing], class_of: Mapping[int, int | None], _: Size
) -> Annotation:
    rows = []
    for thing in things:
        box = thing.bbox
        if box is None or len(box) != 4 or min(box[2:]) < 0 or not np.isfinite(box).all():
            raise DataError(
                f"An object of '{image.file_name}' in '{file.name}' has the box {box}.",
                hint="Give [left, top, width, height] in pixels.",
            )
        kind = class_of[thing.category_id]
        if kind is not None:
            rows.append((box[0], box[1], box[0] + box[2], box[1] + box[3], kind, bool(thing.iscrowd)))
    return objects_annotation(rows)


def objects_annotation(rows: Sequence[tuple[float, float, float, float, int, bool]]) -> Annotation:
    """Of (left, top, right, bottom, class, is_crowd) a thing."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    objects = Objects(boxes=table[:, :4], classes=table[:, 4].astype(np.int64), is_crowd=table[:, 5].astype(bool))
    return Annotation(digest=hashlib.sha256(json.dumps(rows).encode()).hexdigest(), read=lambda: objects)


def _painting(
    file: Path,
    image: _Image,
    things: Sequence[_Thing],
    class_of: Mapping[int, int | None],
    size: Size,
    *,
    background: int,
) -> Annotation:
    def value(thing: _Thing) -> int:
        kind = class_of[thing.category_id]
        return UNKNOWN if kind is None else kind

    parts = [f"{value(thing)} {bytes(thing.segmentation).decode()}" for thing in things]
    digest = hashlib.sha256("\n".join([f"{size} {background}", *parts]).encode()).hexdigest()
    outlines = [(value(thing), thing.segmentation) for thing in things]
    name = f"'{image.file_name}' in '{file.name}'"
    return Annotation(digest=digest, read=functools.partial(_paint, outlines, size, background, name))


def _paint(outlines: Iterable[tuple[int, msgspec.Raw]], size: Size, background: int, name: str) -> Array:
    """The outlines in order, each over those before."""
    painted = np.full(size, background, dtype=np.uint8)
    for value, raw in outlines:
        painted[_inside(raw, size, name)] = value
    return painted


def _inside(raw: msgspec.Raw, size: Size, name: str) -> Array:
    """An outline as a mask, bool [*size]."""
    from pycocotools import mask as coco_mask

    try:
        outline: Any = msgspec.json.decode(raw)
        if isinstance(outline, dict) and isinstance(outline["counts"], str):
            encoded = outline
        elif isinstance(outline, dict):
            encoded = coco_mask.frPyObjects(outline, *size)
        else:
            encoded = coco_mask.merge(coco_mask.frPyObjects(outline, *size))
        inside: Array = coco_mask.decode(encoded).astype(bool)
        if inside.shape != tuple(size):
            raise ValueError(f"it is for {inside.shape[1]} × {inside.shape[0]} pixels")
    except Exception as error:  # pycocotools raises whatever a broken outline makes it
        raise DataError(
            f"An outline of {name} cannot be painted: {error}.", hint="Give polygons or COCO's run lengths."
        ) from error
    return inside


def background_of(labels: Sequence[str]) -> int:
    """The class of what nothing is painted over: a model without one is not asked about such pixels."""
    names = [label.strip().casefold() for label in labels]
    return names.index(BACKGROUND) if BACKGROUND in names else UNKNOWN


def _coco_file(root: Path, task: str) -> tuple[Path | None, tuple[str, ...]]:
    """The JSON to use, and a note where there are several."""
    places = [root, *(folder for folder in _folders(root) if folder.name.lower() == "annotations")]
    files = [file for place in places for file in sorted(place.glob("*.json")) if file.name[0] != "."]
    fitting = [file for file in files if kind_of_annotations(file) in _KINDS[task]]
    if not fitting:
        return None, ()
    by_split = {file: _split_of(file) for file in fitting}
    split, chosen = pick_split(by_split)
    if len(chosen) > 1:
        names = ", ".join(f"'{file.name}'" for file in chosen)
        raise DataError(f"'{root}' has several annotations: {names}.", hint="Pass the file to use.")
    others = [name or "the rest" for file, name in by_split.items() if file != chosen[0]]
    return chosen[0], note_of_split(root.name, split, others)


def _split_of(file: Path) -> str:
    """``val`` of ``instances_val2017``."""
    words = [word.rstrip("0123456789") for word in file.stem.lower().replace("-", "_").split("_")]
    return next((word for word in words if word in SPLITS), "")


# --- masks ------------------------------------------------------------------------------------------------


def _mask_folders(root: Path) -> tuple[Path, Path, tuple[str, ...]] | None:
    """The folders of pictures and of masks, and a note where both have several splits."""
    folders = {folder.name.lower(): folder for folder in _folders(root)}
    pictures = next((folders[name] for name in _PICTURE_FOLDERS if name in folders), None)
    masks = next((folders[name] for name in _MASK_FOLDERS if name in folders and _has_masks(folders[name])), None)
    if pictures is None or masks is None:
        return None
    parts = {folder.name: folder.name.lower() for folder in _folders(masks)}
    if not parts or not set(parts.values()) <= set(SPLITS):
        return pictures, masks, ()
    split, (name,) = pick_split(parts)
    others = [other for other in parts.values() if other != split]
    return pictures / name, masks / name, note_of_split(root.name, split, others)


def _has_masks(folder: Path) -> bool:
    return any(is_picture(file) for file in folder.rglob("*"))


def _masked(
    root: Path, pictures: Path, masks: Path, labels: Sequence[str], cache: Path | None, count: Count | None
) -> DataSet:
    require_library("sklearn", f"Judging {SEGMENTATION} by masks")
    found = {file.stem: file for file in sorted(pictures.iterdir()) if is_picture(file)} if pictures.is_dir() else {}
    truths = {file.stem: file for file in sorted(masks.iterdir()) if is_picture(file)}
    missing = [file.name for stem, file in truths.items() if stem not in found]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(truths)} masks of '{masks}' have no picture in '{pictures.name}'; the first is "
            f"'{missing[0]}'.",
            hint="Put each picture there under its mask's name.",
        )
    files = [found[stem] for stem in truths]
    digests = file_digests(files, cache=cache, count=count)
    mask_digests = file_digests(list(truths.values()), cache=cache, count=count)
    sizes = map_in_threads(header_size, files)
    pairs = zip(truths.values(), sizes, strict=True)
    readers = [functools.partial(_read_mask, mask, size, len(labels)) for mask, size in pairs]
    for _ in map_in_threads(_call, readers):  # a wrong mask is an error now, not after the measurements
        pass
    n_bare = len(found) - len(truths)
    return DataSet(
        name=root.resolve().name,
        samples=tuple(
            Sample(
                name=file.name,
                label=None,
                digest=digest,
                read=file.read_bytes,
                annotation=Annotation(digest=mask_digest, read=reader),
            )
            for file, digest, mask_digest, reader in zip(files, digests, mask_digests, readers, strict=True)
        ),
        class_names=tuple(labels),
        notes=(f"{n_bare} pictures of '{root.name}' have no mask and are left out.",) if n_bare else (),
    )


def _call(read: Callable[[], Array]) -> None:
    read()


def _read_mask(file: Path, size: Size, n_classes: int) -> Array:
    """Palette indices or grey values.

    Raises: DataError: it has colours, another size than its picture, or values that are no class.
    """
    with Image.open(file) as image:
        mode = image.mode
        values = np.asarray(image)
    if values.ndim != 2:
        raise DataError(
            f"The mask '{file}' has colours ({mode}), expected a class index for each pixel.",
            hint="Save it with a palette or in grey.",
        )
    if values.shape != size:
        raise DataError(
            f"The mask '{file}' is {_pixels(values.shape)}, but its picture {_pixels(size)}.",
            hint="Save the mask at the picture's size.",
        )
    wrong = np.unique(values[(values >= (n_classes or UNKNOWN)) & (values != UNKNOWN)])
    if len(wrong):
        raise DataError(
            f"The mask '{file}' has the value {wrong[0]}, but the model's classes are 0 to {n_classes - 1}, and "
            f"{UNKNOWN} leaves a pixel out.",
            hint="Number the classes as the model does.",
        )
    return values.astype(np.uint8)


def _pixels(size: Sequence[int]) -> str:
    return f"{size[1]} pixels wide and {size[0]} high"


def _folders(root: Path) -> list[Path]:
    return sorted(folder for folder in root.iterdir() if folder.is_dir() and folder.name[0] not in "._")
