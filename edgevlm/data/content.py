"""What pictures hold: their digests, and whether they can be read.

Reading and decoding every picture of a large data set takes seconds, so the results are kept by the file's size,
times and inode, the way git keeps its index.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import IO, TypeVar

import msgspec
from PIL import Image, UnidentifiedImageError

from edgevlm.data.data_set import Count
from edgevlm.errors import DataError
from edgevlm.runtime.image import Size

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".avif"}
)

# A file written this shortly before it was hashed may be written again within the clock's tick ("racy git").
_SETTLED_NS = 2_000_000_000

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
"""EXIF's orientations that swap height and width."""

T = TypeVar("T")
R = TypeVar("R")
Stat = tuple[int, int, int, int]
Problem = tuple[str, str]
"""A picture's name, and why it cannot be read."""


class _Known(msgspec.Struct, frozen=True):
    """A file's state when it was read, and the sha256 of each picture that it holds."""

    stat: Stat
    digests: tuple[str, ...]


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name; hidden files (``.DS_Store``, ``._photo.jpg``) are not."""
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")


def map_in_threads(function: Callable[[T], R], items: Sequence[T], *, count: Count | None = None) -> Iterable[R]:
    """``map`` over a thread pool, in order; hashing and decoding both leave Python's lock alone."""
    n_threads = min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(n_threads) as pool:
        # In slices: the pool would start on every item at once, and hold each result until it is asked for.
        step = 4 * n_threads
        for start in range(0, len(items), step):
            yield from pool.map(function, items[start : start + step])
            if count:
                count(min(start + step, len(items)), len(items))


def digest_of(picture: bytes) -> tuple[str, str | None]:
    """A picture's sha256, and why it cannot be decoded to its last line; None where it can."""
    sha256 = hashlib.sha256(picture).hexdigest()
    if not picture:
        return sha256, "it is empty"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the runtime, too, reads up to twice Pillow's limit
            with Image.open(BytesIO(picture)) as image:
                # JPEG only: an eighth of the size still parses every byte, in a fraction of the time.
                image.draft(None, (1, 1))
                image.load()
    except UnidentifiedImageError:
        return sha256, "it is not a picture that Pillow knows"
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them
        return sha256, str(error) or type(error).__name__
    return sha256, None


def header_size(picture: Path | IO[bytes]) -> Size:
    """(height, width) of the upright picture, from its header."""
    with Image.open(picture) as image:
        width, height = image.size
        is_turned = image.getexif().get(_ORIENTATION) in _TURNED
    return (width, height) if is_turned else (height, width)


def file_digests(files: Sequence[Path], *, cache: Path | None, count: Count | None = None) -> tuple[str, ...]:
    """The sha256 of every file, each of which is proven to be a readable picture.

    Args:
        cache: a folder that keeps results between calls.
    Raises:  DataError: some cannot be read; says how many and the first.
    """
    found: list[Problem] = []

    def digest(file: Path) -> tuple[str, ...]:
        try:
            sha256, problem = digest_of(file.read_bytes())
        except OSError as error:
            sha256, problem = "", error.strerror or str(error)
        if problem:
            found.append((str(file), problem))
        return (sha256,)

    def digest_all(unknown: Sequence[Path]) -> Iterable[tuple[str, ...]]:
        yield from map_in_threads(digest, unknown, count=count)
        if found:
            raise unreadable(found, n=len(files))

    return tuple(digest for (digest,) in kept_digests(files, digest_all, cache=cache))


def kept_digests(
    files: Sequence[Path], digest_all: Callable[[Sequence[Path]], Iterable[tuple[str, ...]]], *, cache: Path | None
) -> tuple[tuple[str, ...], ...]:
    """The digests of the pictures in each file: looked up where the file has not changed, else by ``digest_all``."""
    stats = {file: stat_of(file) for file in files}
    store = _store(files, cache)
    known = _load(store)
    unknown = [file for file in stats if (was := known.get(str(file))) is None or was.stat != stats[file]]
    began_ns = time.time_ns()
    made = {
        str(file): _Known(stats[file], digests) for file, digests in zip(unknown, digest_all(unknown), strict=True)
    } if unknown else {}  # fmt: skip
    settled = {name: new for name, new in made.items() if max(new.stat[1], new.stat[2]) < began_ns - _SETTLED_NS}
    if settled and store:
        _save(store, known | settled)
    known |= made
    return tuple(known[str(file)].digests for file in files)


class UnreadableError(DataError):
    """Pictures that cannot be decoded: each one's name, and why."""

    def __init__(self, message: str, *, hint: str, found: Sequence[Problem]) -> None:
        super().__init__(message, hint=hint)
        self.found = tuple(sorted(found))


def unreadable(found: Sequence[Problem], *, n: int) -> UnreadableError:
    """The error for pictures that cannot be decoded."""
    name, problem = min(found)
    return UnreadableError(
        f"{len(found)} of {n} pictures cannot be read; the first is '{name}': {problem}.",
        hint="Replace the file or remove it; leaving pictures out silently would change what is measured.",
        found=found,
    )


def stat_of(file: Path) -> Stat:
    """What changes when a file does. The times of its contents and of its inode: ``cp -p`` fakes only the first."""
    try:
        found = file.stat()
    except OSError as error:
        raise DataError(
            f"'{file}' cannot be read: {error.strerror}.", hint="Check that it is there and may be read."
        ) from error
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _store(files: Sequence[Path], cache: Path | None) -> Path | None:
    """One file for each set of folders, so that two data sets do not write the same one."""
    if cache is None:
        return None
    folders = sorted(str(folder.resolve()) for folder in {file.parent for file in files})
    return cache / f"digests-{hashlib.sha256(chr(0).join(folders).encode()).hexdigest()[:32]}.json"


def _load(store: Path | None) -> dict[str, _Known]:
    if store is None:
        return {}
    try:
        return msgspec.json.decode(store.read_bytes(), type=dict[str, _Known])
    except (OSError, msgspec.MsgspecError):
        return {}  # lost or damaged: the pictures are read again


def _save(store: Path, known: dict[str, _Known]) -> None:
    unfinished = store.with_name(f".{store.name}.{os.getpid()}")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(msgspec.json.encode(known))
        unfinished.replace(store)
    except OSError:  # a full or read-only disk costs time, not the result
        with contextlib.suppress(OSError):
            unfinished.unlink()
