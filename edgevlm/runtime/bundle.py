"""Reading a bundle: nothing in it is believed before it is checked.

MUST rules: every file but ``manifest.json`` is listed with its size and sha256; there is no other file and no symbolic
link; paths are plain and relative; sizes are checked before reading; nothing is code or a pickle. ``open_bundle``
checks names and sizes, ``Bundle.file`` the contents of what is used, ``edgevlm.runtime.verify`` everything.
"""

from __future__ import annotations

import functools
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import msgspec

from edgevlm.errors import BundleError, MissingToolError, UsageError
from edgevlm.runtime.backends import install_command, load_backend
from edgevlm.runtime.external_data import external_locations
from edgevlm.runtime.hashes import sha256_of
from edgevlm.runtime.image import check_image_processing
from edgevlm.runtime.machine import Machine, describe_machine
from edgevlm.runtime.spec import (
    SCHEMA_VERSION,
    BundleForm,
    Component,
    FileEntry,
    Manifest,
    from_json,
)
from edgevlm.runtime.tasks import Need, load_task
from edgevlm.runtime.text import check_text_processing

MANIFEST = "manifest.json"
ARCHIVE_SUFFIX = ".evlm"

# ImageNet-21k's labels are about 1 MB; what is larger than this is no manifest.
MAX_MANIFEST_BYTES = 16 << 20

# What may lie in a bundle: graphs, their weights, data and documents. Nothing that a machine would execute or unpickle.
_SUFFIXES = frozenset({
    ".onnx", ".ort", ".data", ".xml", ".bin", ".engine", ".npy", ".safetensors", ".json", ".jsonl", ".toml", ".txt",
    ".model", ".png", ".html", ".md", ".csv", ".sig", ".pem",
})  # fmt: skip
_BARE_NAMES = frozenset({"LICENSE", "LICENCE", "NOTICE"})

# File managers leave these behind; they are no part of the bundle and are never read.
_CLUTTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", ".directory", "__MACOSX", ".Spotlight-V100", ".Trashes"})

_AGAIN = "Fetch the bundle again, or compile the model again."


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle whose manifest, names and sizes were checked.

    Args:
        origin: what was opened: a folder or an archive.
        root: the folder that holds the files.
    """

    origin: Path
    root: Path
    manifest: Manifest
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    @functools.cached_property
    def entries(self) -> dict[str, FileEntry]:
        return {entry.path: entry for entry in self.manifest.files}

    def file(self, path: str) -> Path:
        """The local path of a file, once its contents are what the manifest says; of a graph, those of its weights too.

        Raises: BundleError: they are not, or the graph names a file that the manifest does not list.
        """
        local = self.root / path
        if path not in self._checked:
            entry = self.entries[path]
            _check_size(local, entry)
            with _readable(local) as opened:
                digest = sha256_of(opened)
            if digest != entry.sha256:
                is_cached = self.root != self.origin
                hint = f"Delete the folder '{self.root}'; it is unpacked anew." if is_cached else _AGAIN
                raise BundleError(
                    f"'{path}' was changed: its sha256 is {digest[:12]}…, the manifest says {entry.sha256[:12]}….",
                    hint=hint,
                )
            self._checked.add(path)
            if path in self._graphs or path.endswith(".onnx"):
                self._check_weights(path)
        return local

    @functools.cached_property
    def _graphs(self) -> frozenset[str]:
        """What ONNX Runtime or OpenVINO opens, which look at what a file holds, not only at its name."""
        parts = [*self.manifest.components, *(part for form in self.manifest.forms for part in form.components)]
        return frozenset(part.file for part in parts if part.backend in ("onnxruntime", "openvino"))

    def _check_weights(self, graph: str) -> None:
        folder = graph.rpartition("/")[0]
        for location in sorted(external_locations(self.root / graph)):
            path = f"{folder}/{location}" if folder else location
            if path not in self.entries:
                raise BundleError(
                    f"'{graph}' has weights in {location[:100]!r}, which {MANIFEST} does not list.", hint=_AGAIN
                )
            self.file(path)

    def in_form(self, form: BundleForm) -> Bundle:
        """The bundle as if ``form``, which is one of its own, were all that it held."""
        manifest = msgspec.structs.replace(
            self.manifest,
            components=form.components,
            requires=form.requires,
            golden=form.golden,
            accuracy=form.accuracy,
            forms=(),
        )
        return Bundle(origin=self.origin, root=self.root, manifest=manifest, _checked=self._checked)

    def check_requires(self) -> None:
        """Refuse a machine that cannot run the bundle.

        Raises: MissingToolError: with what is missing.
        """
        check_requires(self.manifest, describe_machine())

    def warnings(self) -> tuple[str, ...]:
        """What a user should know before relying on the bundle here, a sentence each."""
        latency, here = self.manifest.latency, describe_machine().name
        if latency is None or latency.machine == here:
            return ()
        return (f"'{self.manifest.name}' was measured on {latency.machine}; how fast it is on {here} is not known.",)


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open a folder or an ``.evlm`` archive, which is unpacked once into the cache.

    Raises: BundleError: there is none, or it breaks a rule. StoreError: the cache cannot be written.
    """
    origin = Path(path)
    if origin.is_dir():
        return _open_folder(origin, origin)
    if not origin.exists():
        raise BundleError(f"There is no bundle '{origin}'.", hint="Name a folder or an .evlm file that compile wrote.")
    from edgevlm.runtime.archive import unpack  # a folder needs none of it

    root = unpack(origin)
    try:
        return _open_folder(root, origin)
    except BundleError:  # what was unpacked earlier has been damaged since; the archive is still whole
        shutil.rmtree(root)
        return _open_folder(unpack(origin), origin)


def _open_folder(root: Path, origin: Path) -> Bundle:
    file = root / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise BundleError(
            f"'{origin}' is no bundle: it has no {MANIFEST}.", hint="Name a folder or an .evlm file that compile wrote."
        )
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST} of '{origin}' has more than {MAX_MANIFEST_BYTES >> 20} MiB.", hint=_AGAIN)
    with _readable(file) as opened:
        manifest = read_manifest(opened.read(MAX_MANIFEST_BYTES))
    _check_tree(root, manifest)
    return Bundle(origin=origin, root=root, manifest=manifest)


class _Versioned(msgspec.Struct, frozen=True):
    schema_version: int


def read_manifest(data: bytes) -> Manifest:
    """A manifest that keeps the rules.

    Raises: BundleError: it does not, or it is from a newer edgevlm.
    """
    try:
        version = from_json(data, _Versioned).schema_version
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"The bundle has schema version {version}, but this edgevlm reads up to {SCHEMA_VERSION}.",
                hint="Upgrade: pip install --upgrade edgevlm",
            )
        manifest = from_json(data, Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{MANIFEST} cannot be read: {error}.", hint=_AGAIN) from error
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest that breaks a rule; the writer asks this too.

    Raises: BundleError: with the first rule that is broken.
    """
    _need(manifest.schema_version == SCHEMA_VERSION, f"its schema version is {manifest.schema_version}")
    _check_entries(manifest.files)
    listed = {entry.path for entry in manifest.files}
    for path in named_files(manifest):
        _need(path in listed, f"'{path}' is used but not listed")
    _check_versions(manifest)
    check_image_processing(manifest.processing.image)
    if manifest.processing.text is not None:
        check_text_processing(manifest.processing.text)
    _check_forms(manifest)


def _check_entries(entries: tuple[FileEntry, ...]) -> None:
    seen: dict[str, str] = {}
    for entry in entries:
        check_path(entry.path)
        # File systems that ignore case would lay one over the other.
        twin = seen.setdefault(entry.path.casefold(), entry.path)
        _need(twin is entry.path, f"'{entry.path}' and '{twin}' are the same file")
        _need(entry.n_bytes >= 0, f"'{entry.path}' has {entry.n_bytes} bytes")
        _need(re.fullmatch("[0-9a-f]{64}", entry.sha256) is not None, f"'{entry.path}' has no sha256")


def check_path(path: str) -> None:
    """Refuse a path that could lead out of the bundle, or mean something else on another system, or name code.

    Raises: BundleError: with the path.
    """
    parts = path.split("/")
    is_plain = all(
        part not in ("", ".", "..") and part.isprintable() and not set(part) & set('\\:*?"<>|') and part[-1] not in ". "
        for part in parts
    )
    _need(is_plain and len(path) <= 240, f"the path {path!r} is not a plain relative one")
    _need(path.casefold() != MANIFEST, f"it lists {MANIFEST} itself")
    name = PurePosixPath(path)
    may_stand = name.suffix.lower() in _SUFFIXES or name.name in _BARE_NAMES
    _need(may_stand and not is_clutter(name.name), f"'{path}' is no kind of file that a bundle may hold")


def is_clutter(name: str) -> bool:
    """Whether a file of this name is ignored: file managers and archivers leave such behind."""
    return name in _CLUTTER or name.startswith("._")


def named_files(manifest: Manifest) -> Iterator[str]:
    """Every file that the manifest needs, by its path; some more than once."""
    forms: tuple[Manifest | BundleForm, ...] = (manifest, *manifest.forms)
    for form in forms:
        for component in form.components:
            yield from (component.file, *component.files)
        for case in form.golden.cases:
            yield from (case.picture, case.answer, *case.outputs.values())
    if manifest.processing.text is not None:
        yield manifest.processing.text.tokenizer
    if manifest.scoring is not None and manifest.scoring.label_embeddings is not None:
        yield manifest.scoring.label_embeddings


def _check_versions(manifest: Manifest) -> None:
    processings = {
        "image": manifest.processing.image,
        "text": manifest.processing.text,
        "detection": manifest.processing.detection,
    }
    for known, processing in processings.items():
        if processing is not None and processing.version > processing.VERSION:
            raise BundleError(
                f"The {known} processing has version {processing.version}, "
                f"but this edgevlm reads up to {processing.VERSION}.",
                hint="Upgrade: pip install --upgrade edgevlm",
            )


def _check_forms(manifest: Manifest) -> None:
    _check_components(manifest, manifest.components)
    for form in manifest.forms:
        _check_components(manifest, form.components)
    _need(len({form.name for form in manifest.forms}) == len(manifest.forms), "two forms have the same name")
    is_first = not manifest.forms or manifest.forms[0].components == manifest.components
    _need(is_first, "its first form is not its own")


def _check_components(manifest: Manifest, parts: tuple[Component, ...]) -> None:
    try:
        task = load_task(manifest.task)
        for component in parts:
            load_backend(component.backend)
    except UsageError as error:
        raise BundleError(error.message, hint="Upgrade: pip install --upgrade edgevlm") from error
    components = {component.name: component for component in parts}
    _need(len(components) == len(parts), "two components have the same name")
    task.check(frozenset(components), manifest.processing, manifest.scoring)
    for need in task.needs:
        if need.component in components:
            _check_fits(components[need.component], need, manifest)


def _check_fits(component: Component, need: Need, manifest: Manifest) -> None:
    text = manifest.processing.text
    is_text = "input_ids" in need.inputs
    image = {"pixel_values": manifest.processing.image.input_name}
    names = (text.input_names if text else ()) if is_text else need.inputs
    fed = {image.get(name, name) for name in names}
    taken = {tensor.name for tensor in component.inputs}
    _need(taken == fed, f"'{component.name}' takes {', '.join(sorted(taken))} but is fed {', '.join(sorted(fed))}")
    if is_text and text is not None and text.padding == "longest":
        lengths = {tensor.shape[1] for tensor in component.inputs if len(tensor.shape) > 1}
        is_free = not any(isinstance(length, int) for length in lengths)
        _need(is_free, f"'{component.name}' takes texts of one length, but they come at their own")
    given = {tensor.name for tensor in component.outputs}
    is_enough = len(given) == 1 or bool(given & set(need.outputs))
    _need(is_enough, f"'{component.name}' gives {', '.join(sorted(given))}, not {' or '.join(need.outputs)}")
    _need(component.file in component.files, f"'{component.file}' is not among the files of '{component.name}'")
    _need(component.session.n_threads >= 0, f"'{component.name}' has {component.session.n_threads} threads")


def _need(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise BundleError(f"{MANIFEST} breaks the bundle format: {otherwise}.", hint=_AGAIN)


def _check_tree(root: Path, manifest: Manifest) -> None:
    """Names and sizes of all files, without reading one."""
    expected = {entry.path: entry for entry in manifest.files}
    for path, entry in _walk(root, ""):
        if path == MANIFEST:
            continue
        if entry.is_symlink() or not entry.is_file(follow_symlinks=False):
            raise BundleError(f"'{path}' is a symbolic link or no regular file.", hint="Replace it by the file itself.")
        if path not in expected:
            raise BundleError(f"'{path}' is not listed in {MANIFEST}.", hint="Move it out of the bundle.")
        _check_size(root / path, expected.pop(path))
    if expected:
        raise BundleError(f"'{next(iter(expected))}' is missing from the bundle.", hint=_AGAIN)


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise BundleError(f"'{folder}' cannot be read: {error.strerror}.", hint="Make the folder readable.") from error
    for entry in entries:
        if is_clutter(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, entry


def _check_size(local: Path, entry: FileEntry) -> None:
    try:
        n_bytes = local.lstat().st_size
    except OSError as error:
        raise BundleError(f"'{entry.path}' is missing from the bundle.", hint=_AGAIN) from error
    if n_bytes != entry.n_bytes:
        state = "truncated" if n_bytes < entry.n_bytes else "changed"
        raise BundleError(
            f"'{entry.path}' is {state}: it has {n_bytes} bytes, the manifest says {entry.n_bytes}.", hint=_AGAIN
        )


def _readable(file: Path) -> io.BufferedReader:
    try:
        return file.open("rb")
    except OSError as error:
        raise BundleError(f"'{file}' cannot be read: {error.strerror}.", hint="Make the file readable.") from error


def check_requires(manifest: Manifest, machine: Machine) -> None:
    """Refuse a machine on which the bundle cannot run.

    Raises: MissingToolError: with what is missing.
    """
    requires = manifest.requires
    elsewhere = f"Run it on a machine for target '{manifest.target}', or compile the model for this one."
    if requires.arch is not None and requires.arch != machine.arch:
        raise MissingToolError(
            f"The bundle '{manifest.name}' is for {requires.arch}, but this machine is {machine.arch}.", hint=elsewhere
        )
    missing = sorted(set(requires.isa) - set(machine.isa))
    if missing and machine.is_isa_known:
        raise MissingToolError(
            f"The bundle '{manifest.name}' needs {', '.join(missing)}, which {machine.cpu} does not have.",
            hint=elsewhere,
        )
    for name, least in requires.backends.items():
        installed = load_backend(name).version()
        if installed is None:
            raise MissingToolError(
                f"The bundle needs {name}, which is not installed.", hint=f"Run: {install_command(name)}"
            )
        if release(installed) < release(least):
            raise MissingToolError(
                f"The bundle needs {name} {least} or newer, but {installed} is installed.",
                hint=f"Run: pip install --upgrade '{name}>={least}'",
            )


def release(version: str) -> tuple[int, ...]:
    """The numbers at the front of a version, for comparing.

    Example:
        >>> release("1.32.0rc1") < release("1.33")
        True
    """
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


def check_same_task(tasks: Mapping[str, str]) -> None:
    """That bundles can be compared.

    Args: tasks: by the bundle's name.
    Raises: UsageError: one is for another task than the first.
    """
    first, *others = tasks.items()
    for name, task in others:
        if task != first[1]:
            raise UsageError(
                f"'{name}' is for {task}, but '{first[0]}' is for {first[1]}.",
                hint="Compare bundles of the same task.",
            )
