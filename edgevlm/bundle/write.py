"""Writing a bundle: whole or not at all, and the same bytes for the same contents."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import msgspec

from edgevlm.errors import StoreError, UsageError
from edgevlm.runtime.bundle import ARCHIVE_SUFFIX, MANIFEST, check_manifest, check_path, is_clutter, open_bundle
from edgevlm.runtime.machine import is_running
from edgevlm.runtime.spec import FileEntry, Manifest, from_json, to_json

_PARTIAL = ".partial"
_CHUNK_BYTES = 1 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip can tell


def write_bundle(
    destination: Path, manifest: Manifest, files: Mapping[str, Path | bytes], *, overwrite: bool = False
) -> Manifest:
    """Write a folder, or an archive where ``destination`` ends in ``.evlm``.

    Everything is written under a temporary name beside the destination, flushed to the disk and renamed. What stood
    there before is moved aside first and comes back if anything fails.

    Args:
        manifest: all but ``files``, which follows from what is written.
        files: contents, or where they lie, by path in the bundle.
        overwrite: replace a bundle that is there already. Anything that is no bundle is kept.
    Returns: the manifest as written.
    Raises:
        UsageError: something is there that may not be replaced. BundleError: the manifest breaks a rule.
        StoreError: the disk is full, read-only or out of bounds.
    """
    destination = _resolved(destination)
    check_destination(destination, overwrite=overwrite)
    for path in files:
        check_path(path)
    with _told(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{destination.name}.{os.getpid()}."
        scratch = Path(tempfile.mkdtemp(dir=destination.parent, prefix=prefix, suffix=_PARTIAL))
        try:
            fresh = scratch / "new"
            if destination.suffix == ARCHIVE_SUFFIX:
                whole = _write_archive(fresh, manifest, files)
            else:
                whole = _write_folder(fresh, manifest, files)
            _swap(fresh, destination, scratch / "old")
            _sweep(destination)
        finally:
            if destination.exists() or not (scratch / "old").exists():  # else the old bundle lies there alone
                shutil.rmtree(scratch, ignore_errors=True)
    return whole


def copy_bundle(source: Path, destination: Path, *, overwrite: bool = False) -> Manifest:
    """A bundle once more at another place, as a folder or an archive.

    Raises: BundleError: the source is no whole bundle. UsageError, StoreError: as ``write_bundle``.
    """
    bundle = open_bundle(source)
    files: dict[str, Path | bytes] = {path: bundle.file(path) for path in bundle.entries}
    return write_bundle(destination, bundle.manifest, files, overwrite=overwrite)


def check_destination(destination: Path, *, overwrite: bool) -> None:
    """Refuse a destination before any work is done for it.

    Raises: UsageError: something is there that may not be replaced. StoreError: nothing may be written there.
    """
    destination = _resolved(destination)
    with _told(destination):
        _check_writable(next(folder for folder in destination.parents if folder.exists()))
        is_free = not destination.exists() or (destination.is_dir() and not any(destination.iterdir()))
    if is_free:
        return
    if not overwrite:
        raise UsageError(f"'{destination}' exists already.", hint="Pass --overwrite, or another place with -o.")
    if (stranger := _stranger(destination)) is not None:
        raise UsageError(
            f"'{destination}' is not replaced: {stranger}.", hint="Move it away, or pass another place with -o."
        )


def _check_writable(folder: Path) -> None:
    number = None
    if not folder.is_dir():
        number = errno.ENOTDIR
    elif not os.access(folder, os.W_OK | os.X_OK):
        is_read_only = hasattr(os, "statvfs") and os.statvfs(folder).f_flag & os.ST_RDONLY
        number = errno.EROFS if is_read_only else errno.EACCES
    if number is not None:
        raise OSError(number, os.strerror(number), str(folder))


def _resolved(destination: Path) -> Path:
    """Through symbolic links, so that what a link points to is replaced and the link stays."""
    try:
        return destination.expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"'{destination}' leads nowhere: {error}.", hint="Pass another place with -o.") from error


class _Listing(msgspec.Struct, frozen=True):
    """As much of a manifest, of any schema version, as tells which files are a bundle's."""

    schema_version: int
    components: list[msgspec.Raw]
    files: list[_Listed]


class _Listed(msgspec.Struct, frozen=True):
    path: str


def _stranger(destination: Path) -> str | None:
    """Why ``destination`` is no bundle and nothing else, or None."""
    try:
        if destination.is_dir():
            data = (destination / MANIFEST).read_bytes()
            found = {str(file.relative_to(destination).as_posix()) for file in destination.rglob("*") if _counts(file)}
        else:
            with zipfile.ZipFile(destination) as opened:
                data = opened.read(MANIFEST)
                found = set(opened.namelist())
        listed = {entry.path for entry in from_json(data, _Listing).files}
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error, msgspec.MsgspecError):
        return "it is no bundle"
    others = found - listed - {MANIFEST}
    return f"it also holds '{min(others)}', which is no part of the bundle" if others else None


def _counts(file: Path) -> bool:
    return (file.is_symlink() or not file.is_dir()) and not is_clutter(file.name)


def _write_folder(folder: Path, manifest: Manifest, files: Mapping[str, Path | bytes]) -> Manifest:
    folder.mkdir()
    entries = []
    for path in sorted(files):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as written:
            entries.append(_copy(path, files[path], written))
            _flush(written)
    whole = _completed(manifest, entries)
    with (folder / MANIFEST).open("xb") as written:
        written.write(to_json(whole))
        _flush(written)
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _flush_folder(inner)
    return whole


def _write_archive(file: Path, manifest: Manifest, files: Mapping[str, Path | bytes]) -> Manifest:
    """Nothing is compressed: weights hardly shrink, and two builds of zlib may give different bytes."""
    # The manifest stands first, so that a reader sees what it will get, and only the contents tell what it says.
    whole = _completed(manifest, [_entry(path, files[path]) for path in sorted(files)])
    with file.open("xb") as written:
        with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as opened:
            opened.writestr(_member(MANIFEST, len(to_json(whole))), to_json(whole))
            for entry in whole.files:
                with opened.open(_member(entry.path, entry.n_bytes), "w") as member:
                    if _copy(entry.path, files[entry.path], member) != entry:
                        raise StoreError(f"'{entry.path}' changed while it was packed.", hint="Write the bundle again.")
        _flush(written)
    return whole


def _member(path: str, n_bytes: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(path, _EPOCH)
    info.external_attr = 0o100644 << 16
    info.create_system = 3  # Unix, whatever this is written on
    info.file_size = n_bytes
    return info


def _completed(manifest: Manifest, entries: list[FileEntry]) -> Manifest:
    whole = msgspec.structs.replace(manifest, files=tuple(entries))
    check_manifest(whole)
    return whole


def _copy(path: str, source: Path | bytes, target: IO[bytes]) -> FileEntry:
    digest, n_bytes = hashlib.sha256(), 0
    for chunk in _chunks(source):
        target.write(chunk)
        digest.update(chunk)
        n_bytes += len(chunk)
    return FileEntry(path=path, sha256=digest.hexdigest(), n_bytes=n_bytes)


def _entry(path: str, source: Path | bytes) -> FileEntry:
    digest, n_bytes = hashlib.sha256(), 0
    for chunk in _chunks(source):
        digest.update(chunk)
        n_bytes += len(chunk)
    return FileEntry(path=path, sha256=digest.hexdigest(), n_bytes=n_bytes)


def _chunks(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            yield chunk


def _swap(fresh: Path, destination: Path, aside: Path) -> None:
    """Put ``fresh`` in the destination's place; what was there goes ``aside``, and comes back on failure."""
    if destination.exists() and destination.is_dir():
        destination.rename(aside)
        try:
            fresh.rename(destination)
        except BaseException:
            aside.rename(destination)
            raise
    else:
        fresh.replace(destination)
    _flush_folder(destination.parent)


def _sweep(destination: Path) -> None:
    """Remove what processes left beside the destination that were killed while they wrote it."""
    for stale in destination.parent.glob(f".{glob.escape(destination.name)}.*{_PARTIAL}"):
        pid = stale.name.removeprefix(f".{destination.name}.").partition(".")[0]
        if pid.isdigit() and not is_running(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)


def _flush(written: IO[bytes]) -> None:
    written.flush()
    os.fsync(written.fileno())


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Windows and some network file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_HINTS = {
    errno.ENOSPC: "Free some space, or pass a place on another disk with -o.",
    errno.EDQUOT: "Free some of your quota, or pass a place on another disk with -o.",
    errno.EROFS: "Pass a place that can be written with -o.",
    errno.EACCES: "Pass a place that you may write to with -o.",
    errno.EPERM: "Pass a place that you may write to with -o.",
    errno.ENOTDIR: "Pass a place below a folder with -o.",
    errno.ENAMETOOLONG: "Pass a shorter name with -o.",
}


@contextlib.contextmanager
def _told(destination: Path) -> Iterator[None]:
    """Turn what the operating system says into one sentence."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"The bundle cannot be written to '{destination}': {(error.strerror or str(error)).lower()}.",
            hint=_HINTS.get(error.errno or 0, "Pass another place with -o."),
        ) from error
