"""An ``.evlm`` archive: a bundle's folder as a zip, unpacked once into a cache keyed by the archive's sha256."""

from __future__ import annotations

import hashlib
import shutil
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import IO

from edgevlm.errors import BundleError, StoreError
from edgevlm.runtime.bundle import MANIFEST, MAX_MANIFEST_BYTES, is_clutter, read_manifest
from edgevlm.runtime.cache import cache_root
from edgevlm.runtime.hashes import sha256_of
from edgevlm.runtime.spec import FileEntry

_AGAIN = "Fetch the bundle again, or compile the model again."

# Weights hardly compress and edgevlm stores them as they are: an archive that would grow more than this is a bomb.
_MAX_GROWTH = 4
_FREE_GROWTH_BYTES = 64 << 20


def unpack(archive: Path) -> Path:
    """The folder that holds the archive's files, every one checked when it was written.

    Raises: BundleError: the archive breaks a rule. StoreError: the cache cannot be written.
    """
    try:
        with archive.open("rb") as opened:
            home = cache_root() / "bundles" / sha256_of(opened)
    except OSError as error:
        raise BundleError(f"'{archive}' cannot be read: {error.strerror}.", hint="Name a readable file.") from error
    if home.is_dir():
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=home.parent, prefix=".partial-"))
    except OSError as error:
        raise _cannot_write(home.parent, error) from error
    try:
        _extract(archive, partial)
        try:
            partial.rename(home)
        except OSError as error:
            if not home.is_dir():  # else another process was faster, and what it unpacked is the same
                raise _cannot_write(home.parent, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return home


def _extract(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as opened:
            members = _members(opened)
            data = _read_start(opened, members, MANIFEST)
            manifest = read_manifest(data)
            _check_sizes(members, manifest.files, archive.stat().st_size)
            _write(folder / MANIFEST, data)
            for entry in manifest.files:
                with opened.open(members[entry.path]) as source:
                    _copy(source, folder / entry.path, entry)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise BundleError(f"'{archive}' is no whole .evlm archive: {error}.", hint=_AGAIN) from error


def _members(opened: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in opened.infolist():
        name = info.orig_filename
        if name.endswith("/") or any(is_clutter(part) for part in name.split("/")):
            continue
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG) or info.flag_bits & 0x1 or name in members:
            raise BundleError(f"The archive's '{name}' is a link, encrypted, or there twice.", hint=_AGAIN)
        # Others choose how much memory unpacking takes.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BundleError(f"The archive's '{name}' is not compressed by deflate.", hint=_AGAIN)
        members[name] = info
    return members


def _read_start(opened: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], name: str) -> bytes:
    if name not in members:
        raise BundleError(f"The archive has no {name} at its top.", hint="Pack the bundle's files, not its folder.")
    with opened.open(members[name]) as source:
        data = source.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"The archive's {name} has more than {MAX_MANIFEST_BYTES >> 20} MiB.", hint=_AGAIN)
    return data


def _check_sizes(members: dict[str, zipfile.ZipInfo], entries: tuple[FileEntry, ...], n_archive_bytes: int) -> None:
    sizes = {entry.path: entry.n_bytes for entry in entries}
    if unlisted := members.keys() - sizes.keys() - {MANIFEST}:
        raise BundleError(f"The archive's {min(unlisted)!r} is not listed in {MANIFEST}.", hint=_AGAIN)
    for path, n_bytes in sizes.items():
        if path not in members:
            raise BundleError(f"'{path}' is missing from the archive.", hint=_AGAIN)
        if members[path].file_size != n_bytes:
            raise BundleError(
                f"'{path}' has {members[path].file_size} bytes in the archive, the manifest says {n_bytes}.",
                hint=_AGAIN,
            )
    if sum(sizes.values()) > _MAX_GROWTH * n_archive_bytes + _FREE_GROWTH_BYTES:
        raise BundleError(
            f"The archive would grow from {n_archive_bytes} to {sum(sizes.values())} bytes.",
            hint="Unpack it by hand if you trust it.",
        )


def _copy(source: IO[bytes], target: Path, entry: FileEntry) -> None:
    digest, n_left = hashlib.sha256(), entry.n_bytes
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as written:
            while chunk := source.read(min(1 << 20, n_left + 1)):
                n_left -= len(chunk)
                if n_left < 0:
                    break
                digest.update(chunk)
                written.write(chunk)
    except OSError as error:
        raise _cannot_write(target.parent, error) from error
    if n_left != 0 or digest.hexdigest() != entry.sha256:
        raise BundleError(f"'{entry.path}' in the archive is truncated or was changed.", hint=_AGAIN)


def _write(target: Path, data: bytes) -> None:
    try:
        target.write_bytes(data)
    except OSError as error:
        raise _cannot_write(target.parent, error) from error


def _cannot_write(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"The archive cannot be unpacked into '{folder}': {(error.strerror or str(error)).lower()}.",
        hint="Free space there, or set EDGEVLM_CACHE to a folder that can be written.",
    )
