"""Files that go to a device together: edgevlm itself, or a bundle. A tree is found again by the hash of its listing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import edgevlm
from edgevlm.data_files import data_folder
from edgevlm.runtime.bundle import MANIFEST, Bundle
from edgevlm.runtime.spec import Spec

# What of the package a verb needs on a device: its code and its tables, not the demo model's weights.
_SUFFIXES = (".css", ".j2", ".py", ".toml", ".txt", ".typed")
_DATA_FOLDERS = ("targets", "calibration")


class TreeFile(Spec, frozen=True, kw_only=True):
    """``path`` is where it goes, ``local`` where it is."""

    path: str
    n_bytes: int
    sha256: str
    local: str


class Tree(Spec, frozen=True, kw_only=True):
    """Args: kind: ``runtime`` or ``bundles``: the folder that it goes into."""

    kind: str
    what: str
    files: tuple[TreeFile, ...]

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps(self.listing()).encode()).hexdigest()

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)

    def listing(self) -> list[tuple[str, int, str]]:
        return [(file.path, file.n_bytes, file.sha256) for file in self.files]


def runtime_tree() -> Tree:
    """edgevlm as it runs here, with the data folders where the wheel has them."""
    package = Path(edgevlm.__file__).parent
    places = {file.relative_to(package): file for file in package.rglob("*") if file.suffix in _SUFFIXES}
    for name in _DATA_FOLDERS:
        places |= {Path("_data", name, file.name): file for file in data_folder(name).glob("*.toml")}
    named = {f"edgevlm/{path.as_posix()}": file for path, file in places.items()}
    files = tuple(_file(path, named[path]) for path in sorted(named))
    return Tree(kind="runtime", what="edgevlm", files=files)


def bundle_tree(bundle: Bundle) -> Tree:
    """A bundle's files, every one checked here first.

    Raises: BundleError: one is not what the manifest says.
    """
    manifest = _file(MANIFEST, bundle.root / MANIFEST)
    entries = bundle.manifest.files
    files = (
        TreeFile(path=entry.path, n_bytes=entry.n_bytes, sha256=entry.sha256, local=str(bundle.file(entry.path)))
        for entry in entries
    )
    return Tree(kind="bundles", what=f"'{bundle.origin}'", files=(manifest, *files))


def _file(path: str, local: Path) -> TreeFile:
    content = local.read_bytes()
    return TreeFile(path=path, n_bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), local=str(local))
