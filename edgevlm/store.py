"""Results of steps, addressed by everything that they depend on.

A key is the sha256 of its *parts*: the step's parameters, its inputs' contents, the versions of the tools and the
digest of edgevlm's own code. The parts lie beside the result, so that ``cache why`` can say which of them changed.
A result is made under a temporary name and renamed when it is whole: nothing that was interrupted is ever found.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from edgevlm.errors import StoreError
from edgevlm.runtime.cache import cache_root
from edgevlm.runtime.machine import is_running
from edgevlm.runtime.spec import Spec, from_json, to_json

T = TypeVar("T")

__all__ = [
    "Entry",
    "Store",
    "Stored",
    "cache_root",
    "code_digest",
    "differing",
    "key_of",
    "read_spec",
    "storing",
    "write_spec",
]

_PARTS = "parts.json"
# What is kept beside the results and is quickly made again. What teachers said took hours, and stays.
_BESIDE = ("pixels", "digests")
_UNWRITABLE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
)


class Entry(Spec, frozen=True, kw_only=True):
    """A result: where its files lie, whether it was looked up, how long it took to make *now*, and why it was made."""

    path: Path
    key: str
    hit: bool
    wall_s: float
    why: str


class Stored(Spec, frozen=True, kw_only=True):
    """A line of ``cache list``."""

    action: str
    key: str
    n_bytes: int
    made_at: float
    path: str


def n_bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Store:
    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or cache_root()) / "store"
        self._unkept: list[Path] = []

    def fetch(
        self,
        action: str,
        parts: Mapping[str, Any],
        make: Callable[[Path], object],
        *,
        keep: Callable[[Path], bool] = lambda _: True,
    ) -> Entry:
        """The result of ``action`` for ``parts``: looked up, or made by ``make(folder)``.

        Args:
            keep: asked once the result is made; where it says no, the result serves this process and is not stored.
        Raises: StoreError: the cache folder cannot be written.
        """
        key = key_of(action, parts)
        home = self.root / action / key
        if (home / _PARTS).is_file():
            with contextlib.suppress(OSError):
                os.utime(home / _PARTS)
            return Entry(path=home, key=key, hit=True, wall_s=0.0, why="the same inputs, parameters, tools and code")
        why = self._why_missing(action, parts)
        started = time.monotonic()
        with storing(self.root):
            self._sweep(action)
            draft = self.root / action / f"tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            draft.mkdir(parents=True)
        try:
            with storing(self.root):
                make(draft)
                (draft / _PARTS).write_text(_canonical(parts), encoding="utf-8")
                if not keep(draft):
                    self._unkept.append(draft)
                    home = draft
                else:
                    _settle(draft, home)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return Entry(path=home, key=key, hit=False, wall_s=time.monotonic() - started, why=why)

    def is_kept(self, entry: Entry) -> bool:
        """Whether a result is stored, or serves this process alone."""
        return entry.path not in self._unkept

    def forget_unkept(self) -> None:
        """Remove the results that were not to be kept. Call when nobody reads them any more."""
        while self._unkept:
            shutil.rmtree(self._unkept.pop(), ignore_errors=True)

    def entries(self) -> Iterator[Stored]:
        """Every stored result, newest first."""
        found = []
        for parts in self.root.glob(f"*/*/{_PARTS}"):
            home = parts.parent
            if home.name.startswith("tmp-"):
                continue
            found.append(
                Stored(
                    action=home.parent.name,
                    key=home.name,
                    n_bytes=n_bytes_of(home),
                    made_at=home.stat().st_mtime,
                    path=str(home),
                )
            )
        yield from sorted(found, key=lambda entry: -entry.made_at)

    def clear(self) -> int:
        """Remove every result, and the pictures and digests beside them; returns the bytes that it freed."""
        folders = [self.root, *(self.root.parent / name for name in _BESIDE)]
        freed = sum(n_bytes_of(folder) for folder in folders)
        with storing(self.root):
            for folder in folders:
                if folder.exists():
                    shutil.rmtree(folder)
        return freed

    def parts_of(self, action: str, key: str) -> dict[str, Any] | None:
        """What a stored result depends on."""
        try:
            parts: dict[str, Any] = json.loads((self.root / action / key / _PARTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return parts

    def _why_missing(self, action: str, parts: Mapping[str, Any]) -> str:
        wanted = json.loads(_canonical(parts))
        nearest: list[str] | None = None
        for file in (self.root / action).glob(f"*/{_PARTS}"):
            try:
                other = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            changed = differing(wanted, other)
            if nearest is None or len(changed) < len(nearest):
                nearest = changed
        if nearest is None:
            return "never made before"
        return f"changed since the nearest earlier result: {', '.join(nearest)}"

    def _sweep(self, action: str) -> None:
        """Remove drafts that processes which no longer live left behind."""
        for draft in (self.root / action).glob("tmp-*"):
            with contextlib.suppress(ValueError, IndexError):
                if not is_running(int(draft.name.split("-")[1])):
                    shutil.rmtree(draft, ignore_errors=True)


def key_of(action: str, parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{action}\n{_canonical(parts)}".encode()).hexdigest()


def differing(left: Any, right: Any, path: str = "") -> list[str]:
    """The dotted names of the parts in which two part tables differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        names: list[str] = []
        for name in sorted(left.keys() | right.keys()):
            below = f"{path}.{name}" if path else name
            if name not in left or name not in right:
                names.append(below)
            else:
                names.extend(differing(left[name], right[name], below))
        return names
    return [] if left == right else [path]


@functools.cache
def code_digest() -> str:
    """sha256 over edgevlm's own Python and template files: a change of the code is a change of every key."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent
    for file in sorted(package.rglob("*")):
        if file.suffix in (".py", ".j2") and file.is_file():
            digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@contextlib.contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Say in one sentence what a full, read-only or forbidden disk means."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise StoreError(
            f"'{error.filename or folder}' cannot be written: {os.strerror(error.errno or 0)}.",
            hint="Free some space with `edgevlm cache clear`, or set EDGEVLM_CACHE to a folder that can be written.",
        ) from error


def write_spec(path: Path, value: object) -> None:
    path.write_bytes(to_json(value))


def read_spec(path: Path, kind: type[T]) -> T:
    return from_json(path.read_bytes(), kind)


def _canonical(parts: Mapping[str, Any]) -> str:
    return json.dumps(parts, sort_keys=True, indent=1, ensure_ascii=False)


def _settle(draft: Path, home: Path) -> None:
    try:
        draft.rename(home)
    except OSError:
        if not (home / _PARTS).is_file():
            raise
        shutil.rmtree(draft, ignore_errors=True)  # another process made the same result first
