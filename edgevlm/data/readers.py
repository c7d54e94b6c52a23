"""Read the layouts that data sets come in: folders by class, a CSV, a Hugging Face data set, the built-in shapes."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgevlm.data.annotated import (
    ANNOTATED_TASKS,
    DETECTION,
    MASKS,
    background_of,
    objects_annotation,
    read_annotated,
    things_of,
)
from edgevlm.data.content import UnreadableError, is_picture
from edgevlm.data.data_set import Annotation, Count, DataSet, Objects, Sample, Things
from edgevlm.data.labels import FoundLabel, match_labels, own_classes
from edgevlm.data.listing import SPLITS, Files, Listing, note_of_split, pick_split
from edgevlm.data.other_tasks import ANNOTATION_SUFFIXES, kind_of_annotations, kind_of_folder, refuse
from edgevlm.data.tables import CAPTIONS, TABLE_SUFFIXES, Table, captions_of, labels_of, pictures_of, read_table
from edgevlm.errors import DataError, UsageError, did_you_mean
from edgevlm.runtime.spec import Array

SHAPES = "shapes"

_PICTURE_FOLDERS = frozenset({"images", "imgs", "img", "pictures", "photos", "jpegimages"})
_ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".rar", ".7z"})
_SHAPES_SEED = 20_000
"""Of no training or test picture of the built-in model."""
SHAPES_TRAINING_SEED = 30_000
"""Of pictures to fine-tune on: none that a compile calibrates, selects or reports on."""
_NAMED = 3
"""Of unreadable pictures, so many are named."""
_SHAPES_OBJECTS = (1, 4)
"""Where boxes or masks are asked for."""


def read_data_set(
    source: str | os.PathLike[str],
    *,
    labels: Sequence[str] = (),
    task: str,
    cache: Path | None = None,
    count: Count | None = None,
    n_shapes: int = 500,
    shapes_size: int = 64,
    shapes_seed: int = _SHAPES_SEED,
    unreadable_share: float = 0.0,
    takes_captions: bool = False,
) -> DataSet:
    """Read a data set in any of the layouts that ``docs/data.md`` describes.

    Args:
        source: a folder, a CSV or TSV, an Arrow or Parquet file, or ``shapes``.
        labels: the model's class names by index, which the data set's are matched with by name; where empty, a task
            without fixed classes takes the data set's own.
        cache: a folder that keeps the pictures' digests, so that an unchanged data set is not read twice.
        n_shapes, shapes_size: how many generated pictures, and their side in pixels, as near as the generator can.
        shapes_seed: which pictures are generated.
        unreadable_share: so many of the pictures, and at least one, may be unreadable and are then left out, with a
            note; 0 leaves out none. To measure on what is left would be to measure something else; to train is not.
        takes_captions: a table of captions without labels is what is asked for.
    Raises:  DataError: the data set is missing, empty, of another task, unreadable, or its classes do not match.
             MissingToolError: it is a Hugging Face data set and pyarrow is not installed.
    """
    if os.fspath(source) == SHAPES:
        return _shapes(labels, task=task, n=n_shapes, size=shapes_size, seed=shapes_seed)
    path = Path(source).expanduser()
    if task in ANNOTATED_TASKS:
        annotated = read_annotated(path, labels=labels, task=task, cache=cache, count=count)
        if annotated is not None:
            return annotated
    listing = _list(path, task=task)
    if listing.captions_alone and not takes_captions:
        raise refuse(listing.captions_alone, CAPTIONS, task=task, pictures=None)
    listing, digests = _digests_of(listing, unreadable_share, cache=cache, count=count)
    class_names, indices = _classes_of(listing, labels, task=task)
    return DataSet(
        name=listing.name,
        samples=tuple(
            Sample(name=name, label=index, digest=digest, read=listing.pictures.reader(i), caption=caption)
            for i, (name, index, digest, caption) in enumerate(
                zip(listing.names, indices, digests, listing.captions or ("",) * len(digests), strict=True)
            )
        ),
        class_names=class_names,
        notes=listing.notes,
    )


def _digests_of(
    listing: Listing, unreadable_share: float, *, cache: Path | None, count: Count | None
) -> tuple[Listing, tuple[str, ...]]:
    """The pictures' digests, and the listing without those that may be left out."""
    try:
        return listing, listing.pictures.digests(cache=cache, count=count)
    except UnreadableError as error:
        found, n = error.found, len(listing.names)
        kept = listing.without(frozenset(name for name, _ in found)) if unreadable_share else None
        if kept is None:
            raise
        first = "; ".join(f"'{name}': {problem}" for name, problem in found[:_NAMED])
        n_most = max(1, int(unreadable_share * n))
        if len(found) > n_most:
            raise DataError(
                f"{len(found)} of {n} pictures cannot be read, and at most {n_most} may be left out: {first}.",
                hint="Replace these files or remove them.",
            ) from error
        note = f"{len(found)} of {n} pictures cannot be read and were left out: {first}."
        kept = replace(kept, notes=(*kept.notes, note))
        return kept, kept.pictures.digests(cache=cache, count=None)


def _classes_of(
    listing: Listing, labels: Sequence[str], *, task: str
) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    found = [label for label in listing.labels if label is not None]
    if not found or task in ANNOTATED_TASKS:  # a picture's one class says nothing of where things are
        return tuple(labels), (None,) * len(listing.names)
    if not labels and task != "image-classification":
        return own_classes(found)
    indices = match_labels(found, labels, source=f"'{listing.name}'")
    if len(set(indices)) == 1:
        raise DataError(
            f"Every picture of '{listing.name}' is of one class, {found[0]}: accuracy on it would say nothing.",
            hint="Pass pictures of at least two classes, or the inner folder to use its pictures without labels.",
        )
    return tuple(labels), indices


def _list(path: Path, *, task: str) -> Listing:
    if not path.exists():
        raise DataError(
            f"There is no data set '{path}'.",
            hint=_similar(path) or f"Pass a folder of pictures, a CSV, a Hugging Face data set, or '{SHAPES}'.",
        )
    try:
        listing = _list_folder(path, task=task) if path.is_dir() else _list_file(path, task=task)
    except PermissionError as error:
        raise DataError(f"'{error.filename}' may not be read.", hint="Check its permissions.") from error
    if not listing.names:
        raise DataError(f"'{path}' holds no pictures.", hint="Pass a folder or a CSV of JPEG, PNG or similar files.")
    return listing


def _similar(path: Path) -> str:
    known = [SHAPES] if path.parent == Path() else []
    known += [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, known)
    return hint if hint.startswith("Did") else ""


def _list_file(path: Path, *, task: str) -> Listing:
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        table = read_table(path)
        if table is None:
            raise DataError(
                f"The table '{path}' has no column that names pictures.",
                hint="Call that column 'file', and the one of classes 'label' or 'class_index'.",
            )
        return _list_table(table, name=path.stem, task=task)
    if suffix in (".arrow", ".parquet"):
        from edgevlm.data.hugging_face import list_files

        return list_files((path,), name=path.stem, task=task)
    if suffix in ANNOTATION_SUFFIXES:
        kind = kind_of_annotations(path) or "JSON of no known layout"
        raise refuse(f"'{path}'", kind, task=task, pictures=None)
    if suffix in _ARCHIVES:
        raise DataError(f"'{path}' is an archive, expected a folder.", hint="Unpack it, and pass the folder.")
    if is_picture(path):
        raise DataError(f"'{path}' is one picture, expected a data set.", hint="Pass the folder that it lies in.")
    raise DataError(
        f"'{path}' is a '{suffix or 'nameless'}' file, expected a data set.",
        hint="Pass a folder of pictures, a CSV or TSV, or an Arrow or Parquet file.",
    )


def _list_table(table: Table, *, name: str, task: str, notes: tuple[str, ...] = ()) -> Listing:
    if table.other_task not in (None, CAPTIONS):
        raise refuse(f"The table '{table.file}'", table.other_task, task=task, pictures=None)
    files = pictures_of(table)
    names = tuple(row[table.picture].strip() for row in table.rows)
    return Listing(
        name=name,
        names=names,
        labels=labels_of(table),
        pictures=Files(files=files),
        notes=notes,
        captions=captions_of(table),
        captions_alone=f"The table '{table.file}'" if table.other_task else "",
    )


def _list_folder(root: Path, *, task: str, name: str = "") -> Listing:
    name = name or _name_of(root)
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        from edgevlm.data.hugging_face import list_saved

        return list_saved(root, name=name, task=task)
    parquet = sorted((*root.glob("*.parquet"), *root.glob("data/*.parquet")))
    if parquet:
        from edgevlm.data.hugging_face import list_files

        by_split = {file: file.stem.partition("-")[0] for file in parquet}
        split, files = pick_split(by_split)
        notes = note_of_split(name, split, sorted(set(by_split.values()) - {split}))
        return replace(list_files(files, name=f"{name}/{split}", task=task), notes=notes)
    table, notes = _table_of(root)
    if table:
        return _list_table(table, name=name, task=task, notes=notes)
    other = kind_of_folder(root)
    if other:
        raise refuse(f"'{root}'", other[0], task=task, pictures=other[1])
    return _list_pictures(root, name=name, task=task)


def _name_of(root: Path) -> str:
    """A folder's name; with its parent's where it only says which part it is."""
    root = root.resolve()
    is_part = root.name.lower() in SPLITS or root.name.lower() in _PICTURE_FOLDERS
    return f"{root.parent.name}/{root.name}" if is_part else root.name


def _list_pictures(root: Path, *, name: str, task: str) -> Listing:
    """Folders by split, folders by class, or a flat folder."""
    flat = sorted(file for file in root.iterdir() if is_picture(file) and file.is_file())
    inside = {folder: files for folder in sorted(root.iterdir()) if (files := _pictures_inside(folder))}
    if flat and inside:
        raise DataError(
            f"'{root}' holds {len(flat)} pictures beside {len(inside)} folders of pictures: its layout is not clear.",
            hint="Move the loose pictures into the folders of their classes, or pass one folder.",
        )
    if not inside:
        return Listing(
            name=name,
            names=tuple(file.name for file in flat),
            labels=(None,) * len(flat),
            pictures=Files(files=tuple(flat)),
        )
    by_split = {folder: folder.name.lower() for folder in inside}
    if set(by_split.values()) <= set(SPLITS):
        split, (folder,) = pick_split(by_split)
        listing = _list_folder(folder, task=task, name=f"{name}/{folder.name}")
        notes = note_of_split(name, split, [other for other in by_split.values() if other != split])
        return replace(listing, notes=notes + listing.notes)
    if len(inside) == 1 and (only := next(iter(inside))).name.lower() in _PICTURE_FOLDERS:
        return _list_folder(only, task=task, name=name)
    files = tuple(file for pictures in inside.values() for file in pictures)
    return Listing(
        name=name,
        names=tuple(file.relative_to(root).as_posix() for file in files),
        labels=tuple(FoundLabel(name=folder.name) for folder, pictures in inside.items() for _ in pictures),
        pictures=Files(files=files),
    )


def _pictures_inside(folder: Path) -> tuple[Path, ...]:
    """A class folder's pictures, however deep (Tiny ImageNet has ``n01443537/images/``)."""
    if folder.name.startswith((".", "__")) or not folder.is_dir():
        return ()

    def walk() -> Iterator[Path]:
        for parent, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith((".", "__"))]
            yield from (file for file in (Path(parent, name) for name in files) if is_picture(file))

    return tuple(sorted(walk()))


def _table_of(root: Path) -> tuple[Table | None, tuple[str, ...]]:
    """The table that lists a folder's pictures, and a note where there were several."""
    files = sorted(file for file in root.iterdir() if file.suffix.lower() in TABLE_SUFFIXES and file.name[0] != ".")
    tables = {file: table for file in files if (table := read_table(file))}
    if not tables:
        return None, ()
    by_split = {file: next((part for part in _words(file.stem) if part in SPLITS), "") for file in tables}
    if len(tables) > 1:
        tables = {file: table for file, table in tables.items() if by_split[file]} or tables
        _, chosen = pick_split({file: by_split[file] for file in tables})
    else:
        chosen = tuple(tables)
    if len(chosen) > 1:
        names = ", ".join(f"'{file.name}'" for file in chosen)
        raise DataError(f"'{root}' has several tables of pictures: {names}.", hint="Pass the one to use.")
    others = ", ".join(f"'{file.name}'" for file in tables if file != chosen[0])
    notes = (f"'{root.name}' has several tables: '{chosen[0].name}' is used, {others} is not.",) if others else ()
    return tables[chosen[0]], notes


def _words(name: str) -> list[str]:
    return name.lower().replace("-", "_").split("_")


def _shapes(labels: Sequence[str], *, task: str, n: int, size: int, seed: int) -> DataSet:
    """Generated pictures, labelled where the model knows their classes."""
    from edgevlm.data import shapes

    if n < 1:
        raise UsageError(f"{n} generated pictures were asked for, expected at least 1.")
    size = min(max(size, shapes.MIN_SIZE), shapes.MAX_SIZE)  # the model's own preprocessing does the rest
    own = shapes.class_names()
    is_known = set(own) <= set(labels)
    class_names = tuple(labels) if labels else own
    is_annotated = task in ANNOTATED_TASKS
    has_truth = is_annotated and (is_known or task == MASKS)  # masks of things need no classes
    n_objects = _SHAPES_OBJECTS if is_annotated else 1
    # The pixels follow from the generator and these numbers, so there is no need to draw them to tell them apart.
    generator = hashlib.sha256(Path(shapes.__file__).read_bytes()).hexdigest()
    drawn = f"{generator} {seed}" + (f" {n_objects}" if is_annotated else "")

    def label(i: int) -> int | None:
        if is_annotated or not (is_known or (not labels and task != "image-classification")):
            return None
        return class_names.index(shapes.picture(i, seed=seed, size=shapes.MIN_SIZE).label)

    samples = tuple(
        Sample(
            name=f"{SHAPES}/{i}",
            label=label(i),
            digest=hashlib.sha256(f"{drawn} {i} {size}".encode()).hexdigest(),
            read=functools.partial(_draw, i, size, seed, n_objects),
            annotation=_annotation(i, size, seed, class_names, task) if has_truth else None,
        )
        for i in range(n)
    )
    return DataSet(
        name=f"{SHAPES} (generated)",
        samples=samples,
        class_names=() if task == MASKS else class_names,
        notes=("The pictures are generated: accuracy on them says little about photographs.",),
        is_synthetic=True,
    )


def _draw(i: int, size: int, seed: int, n_objects: int | tuple[int, int]) -> Array:
    from edgevlm.data import shapes

    return shapes.picture(i, seed=seed, size=size, n_objects=n_objects).image


def _annotation(i: int, size: int, seed: int, class_names: tuple[str, ...], task: str) -> Annotation:
    """Read when it is asked for: it takes as long as drawing the picture."""
    digest = hashlib.sha256(f"{task} {seed} {i} {size} {class_names}".encode()).hexdigest()
    return Annotation(digest=digest, read=functools.partial(_annotate, i, size, seed, class_names, task))


def _annotate(i: int, size: int, seed: int, class_names: tuple[str, ...], task: str) -> Objects | Things | Array:
    from edgevlm.data import shapes

    things = shapes.picture(i, seed=seed, size=size, n_objects=_SHAPES_OBJECTS).objects
    if task == MASKS:
        return things_of([thing.mask for thing in things], (size, size))
    if task == DETECTION:
        objects: Objects = objects_annotation(
            [(*thing.box, class_names.index(thing.label), False) for thing in things]
        ).read()
        return objects
    mask: Array = np.full((size, size), background_of(class_names), dtype=np.uint8)
    for thing in things:
        mask[thing.mask] = class_names.index(thing.label)
    return mask
