"""Recognise data sets of tasks that edgevlm does not judge, to say in one sentence what they are."""

from __future__ import annotations

import re
from pathlib import Path

from edgevlm.data.content import is_picture
from edgevlm.errors import DataError

ANNOTATION_SUFFIXES = (".json", ".jsonl")

# Official annotation files reach hundreds of megabytes; their keys show at either end.
_SNIFFED_BYTES = 1 << 16
_KEYS = (
    ("keypoints", ("keypoints",)),
    ("boxes and masks", ("bbox", "segmentation")),
    ("boxes", ("bbox", "boxes", "bboxes", "objects")),
    ("masks", ("segmentation", "segments_info", "mask")),
    ("captions", ("caption", "captions", "sentences")),
    ("questions and answers", ("question", "questions")),
)
_MASK_FOLDERS = frozenset(
    {"masks", "mask", "segmentationclass", "segmentationobject", "annotations", "gtfine", "labels"}
)
_PICTURE_FOLDERS = frozenset({"images", "jpegimages", "leftimg8bit", "imgs"})
_ONE_CLASS = (
    "pictures with one class each: folders by class, a CSV with columns file and label, or a Hugging Face data set "
    "with an Image and a ClassLabel column"
)
_NEEDED = {
    "mask-generation": "outlines of things in a COCO JSON beside the pictures",
    "object-detection": "boxes in a COCO JSON beside the pictures",
    "semantic-segmentation": "masks as PNG files in a folder beside that of the pictures, or polygons in a COCO JSON",
}


def refuse(what: str, kind: str, *, task: str, pictures: Path | None) -> DataError:
    """The error for a data set of another task.

    Args:
        pictures: the folder to use without labels, where there is one.
    """
    return DataError(
        f"{what} holds {kind}, but {task} needs {_NEEDED.get(task, _ONE_CLASS)}.",
        hint=f"Pass '{pictures}' to judge by agreement with the float model, without labels."
        if pictures
        else "Pass a data set of one of these layouts, or a folder of pictures without labels.",
    )


def kind_of_annotations(file: Path) -> str | None:
    """What a JSON file annotates, by its keys: ``boxes``, ``captions``, ...; None where it is something else."""
    with file.open("rb") as opened:
        head = opened.read(_SNIFFED_BYTES)
        opened.seek(max(len(head), file.stat().st_size - _SNIFFED_BYTES))
        text = head + opened.read()
    keys = {key.decode() for key in re.findall(rb'"([a-z_]{4,20})"\s*:', text)}
    for kind, needed in _KEYS:
        if set(needed) <= keys if kind == "boxes and masks" else keys & set(needed):
            return kind
    return None


def kind_of_folder(root: Path) -> tuple[str, Path | None] | None:
    """What a folder annotates beside its pictures, and where the pictures are; None where it annotates nothing."""
    folders = {folder.name.lower(): folder for folder in root.iterdir() if folder.is_dir()}
    home = next((folder for name, folder in folders.items() if name in _PICTURE_FOLDERS), None)
    beside = [root, *(folders[name] for name in ("annotations", "labels") if name in folders)]
    pictures = home or (root if any(is_picture(file) for file in root.iterdir()) else None)
    for folder in beside:
        for file in sorted(folder.iterdir()):
            kind = kind_of_annotations(file) if file.is_file() and file.suffix.lower() in ANNOTATION_SUFFIXES else None
            if kind is None and folder != root and file.suffix.lower() in (".xml", ".txt"):
                kind = "boxes"  # Pascal VOC, YOLO
            if kind:
                return f"{kind} ('{file.relative_to(root)}')", pictures
    for name, folder in folders.items():
        if name in _MASK_FOLDERS and home and any(is_picture(file) for file in folder.rglob("*")):
            return f"masks ('{folder.name}')", home
    return None
