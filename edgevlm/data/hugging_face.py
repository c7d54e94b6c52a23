"""Data sets that Hugging Face ``datasets`` wrote: ``save_to_disk`` folders (Arrow) and Parquet files.

Read with pyarrow alone: the files are plain Arrow or Parquet, with the features in the schema's metadata.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.data.content import Problem, Stat, digest_of, kept_digests, map_in_threads, stat_of, unreadable
from edgevlm.data.data_set import Count
from edgevlm.data.labels import FoundLabel
from edgevlm.data.listing import Listing, note_of_split, pick_split
from edgevlm.data.other_tasks import refuse
from edgevlm.errors import DataError, MissingToolError

_PICTURE_COLUMNS = ("image", "img", "picture")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "class_name", "category")
_OTHER_TASKS = {
    "boxes": ("objects", "bbox", "bboxes", "boxes"),
    "masks": ("mask", "masks", "annotation", "segmentation", "segmentation_mask"),
    "questions and answers": ("question", "questions"),
    "captions": ("caption", "captions", "sentences", "text"),
}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Pictures that lie in the rows of Arrow or Parquet files."""

    files: tuple[Path, ...]
    column: str
    n_rows: tuple[int, ...]

    def digests(self, *, cache: Path | None, count: Count | None) -> tuple[str, ...]:
        def digest_all(unknown: Sequence[Path]) -> Iterable[tuple[str, ...]]:
            return [self._digests_of(file, count=count) for file in unknown]

        return tuple(digest for digests in kept_digests(self.files, digest_all, cache=cache) for digest in digests)

    def reader(self, i: int) -> Callable[[], bytes]:
        for file, n in zip(self.files, self.n_rows, strict=True):
            if i < n:
                return functools.partial(_picture, file, self.column, i)
            i -= n
        raise IndexError(i)

    def _digests_of(self, file: Path, *, count: Count | None) -> tuple[str, ...]:
        n = self.n_rows[self.files.index(file)]
        digests = list(map_in_threads(lambda i: digest_of(_picture(file, self.column, i)), range(n), count=count))
        broken: list[Problem] = [(f"{file}, row {i}", problem) for i, (_, problem) in enumerate(digests) if problem]
        if broken:
            raise unreadable(broken, n=n)
        return tuple(digest for digest, _ in digests)


def list_saved(root: Path, *, name: str, task: str) -> Listing:
    """List a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    if (root / "dataset_dict.json").is_file():
        splits = [str(split) for split in _json(root / "dataset_dict.json")["splits"]]
        split, _ = pick_split({split: split for split in splits})
        listing = list_saved(root / split, name=f"{name}/{split}", task=task)
        return replace(listing, notes=note_of_split(name, split, [other for other in splits if other != split]))
    names = [str(entry["filename"]) for entry in _json(root / "state.json")["_data_files"]]
    return list_files(tuple(root / file for file in names), name=name, task=task)


def list_files(files: tuple[Path, ...], *, name: str, task: str) -> Listing:
    """List Arrow or Parquet files of one schema."""
    schemas = [_schema(file) for file in files]
    if not schemas:
        raise DataError(f"'{name}' holds no data files.", hint="Save the data set again.")
    features = _features(schemas[0])
    picture, label = _picture_column(features), _label_column(features)
    other = next((kind for kind, columns in _OTHER_TASKS.items() if set(columns) & set(features)), None)
    if picture is None or (label is None and other):
        what = other if picture else f"no pictures (its columns are {', '.join(features)})"
        raise refuse(f"'{name}'", str(what), task=task, pictures=None)
    columns = [_column(file, label) for file in files] if label else []
    labels = tuple(value for column in columns for value in column.to_pylist())
    n_rows = tuple(_n_rows(file) for file in files)
    return Listing(
        name=name,
        names=tuple(f"{file.name}, row {i}" for file, n in zip(files, n_rows, strict=True) for i in range(n)),
        labels=_labels(labels, features[label], source=name) if label else (None,) * sum(n_rows),
        pictures=Rows(files=files, column=picture, n_rows=n_rows),
    )


def _labels(values: Sequence[Any], feature: dict[str, Any], *, source: str) -> tuple[FoundLabel | None, ...]:
    # Unlabelled test sets write -1, or nothing.
    missing = [value is None or value == -1 for value in values]
    if all(missing):
        return (None,) * len(values)
    if any(missing):
        raise DataError(f"{sum(missing)} of {len(values)} rows of '{source}' have no label.", hint="Remove them.")
    if any(isinstance(value, list) for value in values):
        raise DataError(f"'{source}' has several labels a row, expected one.", hint="Keep one label a picture.")
    names = feature.get("names")
    if names and not all(0 <= value < len(names) for value in values):
        raise DataError(f"'{source}' has a label that is none of its {len(names)} classes.", hint="Save it again.")
    if names:
        return tuple(FoundLabel(name=str(names[value]), index=value, index_is_own=True) for value in values)
    return tuple(FoundLabel(index=v) if isinstance(v, int) else FoundLabel(name=str(v)) for v in values)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Column -> its feature as ``datasets`` describes it, or as its Arrow type shows where another tool wrote it."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    features: dict[str, dict[str, Any]] = {}
    for field in schema:
        kind = str(field.type)
        is_picture = kind.startswith("struct<bytes: ") or (kind.endswith("binary") and field.name in _PICTURE_COLUMNS)
        described = written.get(field.name)
        features[field.name] = described if isinstance(described, dict) else {"_type": "Image" if is_picture else kind}
    return features


def _picture_column(features: dict[str, dict[str, Any]]) -> str | None:
    pictures = [name for name, feature in features.items() if feature.get("_type") == "Image"]
    return next((name for name in (*_PICTURE_COLUMNS, *pictures) if name in pictures), None)


def _label_column(features: dict[str, dict[str, Any]]) -> str | None:
    classes = {name: len(f.get("names", ())) for name, f in features.items() if f.get("_type") == "ClassLabel"}
    usual = [name for name in _LABEL_COLUMNS if name in (classes or features)]
    # CIFAR-100 has coarse and fine labels: the finer ones are what models know.
    return usual[0] if usual else max(classes, key=lambda name: classes[name], default=None)


def _picture(file: Path, column: str, i: int) -> bytes:
    value = _column(file, column)[i].as_py()
    picture = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(picture, bytes):
        raise DataError(
            f"Row {i} of '{file}' names a picture but does not hold it.",
            hint="Save the data set with save_to_disk or to_parquet, which put the pictures into it.",
        )
    return picture


def _column(file: Path, column: str) -> Any:
    return _column_at(file, column, stat_of(file))


@functools.lru_cache(maxsize=32)
def _column_at(file: Path, column: str, _stat: Stat) -> Any:
    """A column; of an Arrow file it stays on the disk until a row is read."""
    if file.suffix == ".parquet":
        return _pyarrow("pyarrow.parquet").read_table(file, columns=[column]).column(column)
    return _arrow(file).read_all().column(column)


def _schema(file: Path) -> Any:
    parquet = _pyarrow("pyarrow.parquet") if file.suffix == ".parquet" else None
    stat_of(file)
    try:
        return parquet.read_schema(file) if parquet else _arrow(file).schema
    except (OSError, _pyarrow("pyarrow").ArrowException) as error:
        raise DataError(f"'{file}' cannot be read: {error}.", hint="Save the data set again.") from error


def _n_rows(file: Path) -> int:
    if file.suffix == ".parquet":
        return int(_pyarrow("pyarrow.parquet").read_metadata(file).num_rows)
    return int(_arrow(file).read_all().num_rows)


def _arrow(file: Path) -> Any:
    pa = _pyarrow("pyarrow")
    source = pa.memory_map(str(file))
    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source)  # what Arrow calls a file; datasets writes streams


def _pyarrow(module: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise MissingToolError(
            "A Hugging Face data set is read with pyarrow, which is not installed.",
            hint="Run: pip install 'edgevlm[compile]', or pip install pyarrow.",
        ) from error


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"'{file}' cannot be read: {error}.", hint="Save the data set again.") from error
    return value if isinstance(value, dict) else {}
