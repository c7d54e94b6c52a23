"""Hashes of files. ``hashlib.file_digest`` is Python 3.11's, and JetPack 6 has 3.10."""

from __future__ import annotations

import hashlib
from typing import IO

_CHUNK_BYTES = 1 << 18


def sha256_of(opened: IO[bytes]) -> str:
    """The sha256 of what is left to read, in hexadecimal."""
    digest = hashlib.sha256()
    while chunk := opened.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
