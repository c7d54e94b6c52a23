"""Data sets listed in a table: CSV or TSV, one picture a row."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevlm.data.labels import FoundLabel
from edgevlm.errors import DataError

TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}

CAPTIONS = "captions"

_PICTURE_COLUMNS = ("file", "file_name", "filename", "path", "filepath", "file_path", "image", "image_path", "img")
_INDEX_COLUMNS = ("class_index", "label_index", "class_id", "label_id", "class_idx", "label_idx", "index", "target")
_NAME_COLUMNS = ("name", "class_name", "label_name", "category", "wnid", "synset")
# Either, by what stands in them.
_LABEL_COLUMNS = ("label", "class", "labels", "classes", "y")
_OTHER_TASKS = {
    "boxes": ("xmin", "x_min", "bbox", "x1", "left"),
    CAPTIONS: ("caption", "captions", "sentence", "comment"),
    "questions and answers": ("question", "questions"),
    "masks": ("mask", "mask_path", "segmentation", "encodedpixels"),
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that names pictures: its columns by purpose, and its rows."""

    file: Path
    picture: str
    index: str | None
    name: str | None
    rows: tuple[Mapping[str, str], ...]
    other_task: str | None
    caption: str | None = None


def read_table(file: Path) -> Table | None:
    """Read a CSV or TSV; None where no column names pictures."""
    try:
        # utf-8-sig: spreadsheets begin their files with a byte order mark.
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The table '{file}' cannot be read: {error}.", hint="Save it as UTF-8 text.") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=TABLE_SUFFIXES[file.suffix.lower()])
    columns = {str(column).strip().lower(): column for column in reader.fieldnames or ()}
    picture = _first(columns, _PICTURE_COLUMNS)
    if picture is None:
        return None
    rows = tuple(reader)
    index, name = _first(columns, _INDEX_COLUMNS), _first(columns, _NAME_COLUMNS)
    either = _first(columns, _LABEL_COLUMNS)
    if either is not None and all(_is_integer(row[either]) for row in rows):
        index = index or either
    elif either is not None:
        name = name or either
    other = next((task for task, names in _OTHER_TASKS.items() if _first(columns, names)), None)
    has_labels = index is not None or name is not None
    # A detection table has a class column as well, so boxes make it one whatever else it holds.
    is_other = other is not None and (not has_labels or other in ("boxes", "masks"))
    return Table(
        file=file,
        picture=picture,
        index=index,
        name=name,
        rows=rows,
        other_task=other if is_other else None,
        caption=_first(columns, _OTHER_TASKS[CAPTIONS]),
    )


def pictures_of(table: Table) -> tuple[Path, ...]:
    """The picture of each row, found beside the table, in ``images/``, or in the folder that the table is named for.

    Raises: DataError: some are not there; says how many and the first.
    """
    names = [_cell(table, row, table.picture, i) for i, row in enumerate(table.rows)]
    if not names:
        raise DataError(f"The table '{table.file}' has no rows.", hint="List one picture a row.")
    root = table.file.parent
    folders = [root, root / "images", root / table.file.stem, root / table.file.stem.partition("_")[0]]
    folder = next((folder for folder in folders if (folder / names[0]).is_file()), root)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} pictures that '{table.file}' lists are not there; the first is "
            f"'{missing[0]}'.",
            hint="Give paths relative to the table, or put the pictures into 'images' beside it.",
        )
    return tuple(folder / name for name in names)


def captions_of(table: Table) -> tuple[str, ...]:
    """What each row says of its picture in words; none where no column does."""
    if table.caption is None:
        return ()
    return tuple((row[table.caption] or "").strip() for row in table.rows)


def labels_of(table: Table) -> tuple[FoundLabel | None, ...]:
    """What each row says of its class."""
    if table.index is None and table.name is None:
        return (None,) * len(table.rows)
    return tuple(
        FoundLabel(
            name=None if table.name is None else _cell(table, row, table.name, i),
            index=None if table.index is None else _integer(table, row, table.index, i),
        )
        for i, row in enumerate(table.rows)
    )


def _cell(table: Table, row: Mapping[str, str], column: str, i: int) -> str:
    value = (row[column] or "").strip()
    if not value:
        raise DataError(
            f"Row {i + 2} of '{table.file}' has nothing in its column '{column}'.", hint="Fill it, or remove the row."
        )
    return value


def _integer(table: Table, row: Mapping[str, str], column: str, i: int) -> int:
    value = _cell(table, row, column, i)
    if not _is_integer(value):
        raise DataError(
            f"Row {i + 2} of '{table.file}' has '{value}' in its column '{column}', expected a whole number.",
            hint="Correct it, or call a column of names 'name'.",
        )
    return int(value)


def _is_integer(value: str | None) -> bool:
    return bool(value) and str(value).strip().removeprefix("-").isdecimal()


def _first(columns: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((columns[name] for name in names if name in columns), None)
