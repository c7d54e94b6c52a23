"""What a teacher says of each training picture, computed once, stored in shards, read by any number of students.

A folder holds ``index.json``, shards of rows, and the texts' rows:

    shard-00000.safetensors ...   row by row, float16; the likeliest logits alone where ``top_k`` says so
    texts.safetensors             one row a text
    index.json                    written last: what the outputs are of, and the sha256 of every file

A shard appears whole, with its sha256 beside it, so that a run that was killed goes on with the next one. Any number of
processes may compute shards of one folder. Sources: TinyViT, arXiv:2207.10666; MobileCLIP, arXiv:2311.17049.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edgevlm.distillation.exported_teacher import Ask, quick_outputs
from edgevlm.distillation.pictures import AUGMENTATION_VERSION, Augmentation, TrainingPictures
from edgevlm.distillation.teachers import Teacher, check_outputs, need_finite_outputs
from edgevlm.errors import ModelError, StoreError
from edgevlm.progress import Progress, StepProgress, silent
from edgevlm.runtime.hashes import sha256_of
from edgevlm.runtime.spec import Array, Spec, from_json, to_json
from edgevlm.store import cache_root, key_of, storing

INDEX = "index.json"
TEXTS = "texts.safetensors"

_SHARD_BYTES = 32 << 20  # lost at most when a run is killed, and hashed as a whole
_MOST_ROWS = 8192
# MobileNetV2 on one core took 41 ms a picture in calls of 8, and 81 in calls of 32: glibc gives large blocks back to
# the system after each layer, and they are cleared again for the next.
_PICTURES_IN_A_CALL = 8
_TEXTS_IN_A_CALL = 32
_TEXT_OUTPUTS = ("text_embeds", "text_features")


class OutputsOf(Spec, frozen=True, kw_only=True):
    """What stored outputs are of: another teacher, picture, crop or text has other outputs.

    Args:
        teacher: its digest: weights, configuration, processing, tokenizer.
        data: digest of the pictures in their order.
        texts: digest of the texts in their order; empty where there are none.
        names: of the outputs, sorted.
    """

    teacher: str
    data: str
    texts: str = ""
    augmentation: Augmentation
    augmentation_version: int = AUGMENTATION_VERSION
    seed: int
    n_variants: int
    top_k: int = 0
    names: tuple[str, ...]

    @property
    def key(self) -> str:
        return key_of("teacher-outputs", msgspec.to_builtins(self))


class ShardFile(Spec, frozen=True, kw_only=True):
    file: str
    sha256: str
    n_bytes: int
    first: int
    n_rows: int


class Index(Spec, frozen=True, kw_only=True):
    """``index.json``.

    Args:
        teacher_name, data_name: for people.
        n_rows: pictures times variants.
        tensors: what a row holds, such as ``logits.values``.
        texts: the file of the texts' rows; null where there are none.
    """

    schema_version: Literal[1] = 1
    of: OutputsOf
    teacher_name: str
    data_name: str
    n_pictures: int
    n_rows: int
    tensors: tuple[str, ...]
    shards: tuple[ShardFile, ...]
    texts: ShardFile | None = None


def describe_outputs(
    teacher: Teacher, pictures: TrainingPictures, names: frozenset[str], *, top_k: int = 0, texts: Sequence[str] = ()
) -> OutputsOf:
    """What the outputs would be of. Raises: UsageError: the teacher does not give them."""
    check_outputs(teacher, names)
    return OutputsOf(
        teacher=teacher.digest,
        data=pictures.digest,
        texts=key_of("texts", {"texts": list(texts)}) if texts and names & {*_TEXT_OUTPUTS} else "",
        augmentation=pictures.augmentation,
        seed=pictures.seed,
        n_variants=pictures.n_variants,
        top_k=top_k if "logits" in names else 0,
        names=tuple(sorted(names)),
    )


def place_of(of: OutputsOf) -> Path:
    """Where outputs lie that no folder was named for."""
    return cache_root() / "teacher-outputs" / of.key


def compute_outputs(
    teacher: Teacher,
    pictures: TrainingPictures,
    of: OutputsOf,
    folder: Path,
    *,
    texts: Sequence[str] = (),
    process: int = 0,
    n_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
    rows_in_shard: int | None = None,
    progress: Progress = silent,
) -> None:
    """Fill ``folder``, or see that it holds these outputs already.

    Args:
        process, n_processes: each computes every so many-th shard; the first writes the index.
        wait: returns when all processes have called it.
    Raises: StoreError: the folder holds other outputs, or cannot be written. ModelError: an output is not a number.
    """
    is_there = (folder / INDEX).is_file()
    if is_there:
        check_index(read_index(folder), of, folder)
    picture_names = frozenset(of.names) - {*_TEXT_OUTPUTS}
    sizes = teacher.sizes()
    width = sum(_row_bytes(name, sizes[name], of.top_k) for name in picture_names)
    n_rows = pictures.n_rows if picture_names else 0
    step = rows_in_shard or max(1, min(_MOST_ROWS, _SHARD_BYTES // max(width, 1)))
    starts = range(0, n_rows, step)
    with storing(folder):
        if process == 0 and not is_there:
            _prepare_draft(folder, of, step)
        wait()
        # Another run of the same may have finished meanwhile; whoever sees that still meets the others where they wait.
        is_there = is_there or (folder / INDEX).is_file()
        mine = list(enumerate(starts))[process::n_processes]
        left = [(n, first) for n, first in mine if not is_there and _finished(folder / _name(n)) is None]
        with quick_outputs(
            teacher, pictures, picture_names if left else frozenset(), n_rows=n_rows, progress=progress
        ) as ask:
            started, n_made = time.monotonic(), 0
            for number, first in left:
                count = min(step, n_rows - first)
                tensors = _rows(teacher, ask, pictures, range(first, first + count), picture_names, of.top_k)
                _write_shard(folder / _name(number), tensors)
                n_made += count
                speed = n_made / max(time.monotonic() - started, 1e-9)
                done = (first + count) / max(n_rows, 1)
                progress(StepProgress("teach", done, f"{first + count}/{n_rows} rows, {speed:.0f} pictures/s"))
        if process == 0 and not is_there and of.texts and _finished(folder / TEXTS) is None:
            _write_shard(folder / TEXTS, _text_rows(teacher, texts, frozenset(of.names) & {*_TEXT_OUTPUTS}))
        wait()
        if process == 0 and not (folder / INDEX).is_file():
            _write_index(teacher, pictures, of, folder, starts, n_rows, n_texts=len(texts))
        wait()


class StoredOutputs:
    """Rows of a folder, memory-mapped: what is not asked for is not read.

    Args:
        is_verified: every file's sha256 was checked already, by another process on this machine.
        was_read: which rows this process has read.
    Raises: StoreError: the folder holds outputs of something else, or a file is not what the index says.
    """

    def __init__(self, folder: Path, of: OutputsOf, *, is_verified: bool = False) -> None:
        self.folder = folder
        self.index = read_index(folder)
        check_index(self.index, of, folder)
        for shard in (*self.index.shards, *filter(None, (self.index.texts,))):
            _check_shard(folder, shard, is_verified=is_verified)
        self.was_read = np.zeros(self.index.n_rows, dtype=bool)
        self._rows_in_shard = self.index.shards[0].n_rows if self.index.shards else 1
        self._opened: dict[str, Any] = {}
        self._texts: dict[str, Array] | None = None

    def rows(self, rows: Sequence[int]) -> dict[str, Array]:
        """Empty where the teacher was asked nothing about pictures.

        Shapes: by name as in the index, [len(rows), ...]; float32, indices int64.
        """
        if not self.index.shards:
            return {}
        self.was_read[list(rows)] = True
        found: dict[str, list[Array]] = {name: [] for name in self.index.tensors}
        for row in rows:
            number, at = divmod(row, self._rows_in_shard)
            for name, values in found.items():
                values.append(self._open(self.index.shards[number].file).get_slice(name)[at : at + 1])
        return {name: _widened(np.concatenate(values)) for name, values in found.items()}

    def texts(self) -> dict[str, Array]:
        """Every text's row. Shapes: text_embeds [n_texts, d]."""
        if self._texts is None:
            self._texts = {}
            if self.index.texts is not None:
                opened = self._open(self.index.texts.file)
                self._texts = {name: _widened(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
        return self._texts

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            import safetensors

            # Open as long as this lives; what is read is mapped, not loaded.
            opened: Any = safetensors.safe_open(self.folder / file, framework="numpy")
            self._opened[file] = opened.__enter__()
        return self._opened[file]


def read_index(folder: Path) -> Index:
    """Raises: StoreError: it is not whole."""
    try:
        return from_json((folder / INDEX).read_bytes(), Index)
    except (OSError, msgspec.MsgspecError) as error:
        raise StoreError(
            f"'{folder / INDEX}' is not the index of stored teacher outputs: {error}.",
            hint="Remove the folder; the same command then computes them anew.",
        ) from error


_WORDS = {
    "teacher": "another teacher",
    "data": "other pictures",
    "texts": "other texts",
    "augmentation": "another augmentation",
    "augmentation_version": "the augmentation of another version of edgevlm",
    "seed": "another seed",
    "n_variants": "another number of variants",
    "top_k": "another number of logits",
    "names": "other outputs",
}


def check_index(index: Index, of: OutputsOf, folder: Path) -> None:
    """Raises: StoreError: the outputs are of something else than what is asked for."""
    for name, words in _WORDS.items():
        theirs, ours = getattr(index.of, name), getattr(of, name)
        if theirs != ours:
            raise StoreError(
                f"'{folder}' holds the teacher outputs of {words} ({_short(theirs)}, where {_short(ours)} is asked "
                "for).",
                hint="Name another folder with --teacher-outputs, or remove this one.",
            )


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return " and ".join(map(str, value))
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 20 else str(value) or "none"


# --- making ------------------------------------------------------------------------------------------------


def _row_bytes(name: str, size: tuple[int, ...], top_k: int) -> int:
    if name == "logits" and 0 < top_k < size[0]:
        return top_k * 6 + 4
    return 2 * int(np.prod(size))


def _rows(
    teacher: Teacher, ask: Ask, pictures: TrainingPictures, rows: range, names: frozenset[str], top_k: int
) -> dict[str, Array]:
    parts: dict[str, list[Array]] = {}
    for start in range(0, len(rows), _PICTURES_IN_A_CALL):
        pixels = pictures.pixels(rows[start : start + _PICTURES_IN_A_CALL], teacher.processing.image)
        found = ask(pixels, names)
        need_finite_outputs(teacher, found)
        if top_k and top_k < found.get("logits", np.empty((1, 0))).shape[1]:
            found |= sparse_logits(found.pop("logits"), top_k)
        for name, value in found.items():
            parts.setdefault(name, []).append(_narrowed(name, value))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _text_rows(teacher: Teacher, texts: Sequence[str], names: frozenset[str]) -> dict[str, Array]:
    parts: dict[str, list[Array]] = {}
    for start in range(0, len(texts), _TEXTS_IN_A_CALL):
        found = teacher.text_outputs(texts[start : start + _TEXTS_IN_A_CALL], names)
        need_finite_outputs(teacher, found)
        for name, value in found.items():
            parts.setdefault(name, []).append(_narrowed(name, value))
    return {name: np.concatenate(values) for name, values in parts.items()}


def sparse_logits(logits: Array, top_k: int) -> dict[str, Array]:
    """The largest few logits, largest first, and the log-sum-exp of all others.

    Shapes: logits [n, classes] -> logits.values and logits.indices [n, top_k], logits.rest [n].
    """
    order = np.argsort(-logits, axis=1, kind="stable")
    chosen, others = order[:, :top_k], np.take_along_axis(logits, order[:, top_k:], axis=1).astype(np.float64)
    largest = others.max(axis=1)
    rest = largest + np.log(np.exp(others - largest[:, None]).sum(axis=1))
    return {
        "logits.values": np.take_along_axis(logits, chosen, axis=1),
        "logits.indices": chosen.astype(np.int32),
        "logits.rest": rest.astype(np.float32),
    }


def _narrowed(name: str, value: Array) -> Array:
    if name in ("logits.indices", "logits.rest"):
        return value
    with np.errstate(over="ignore"):
        narrow = value.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise ModelError(
            f"The teacher's '{name}' reaches {np.abs(value).max():.0f}, which half precision does not hold (65504).",
            hint="Use a teacher whose outputs are smaller.",
        )
    return narrow


def _widened(value: Array) -> Array:
    return value.astype(np.int64 if np.issubdtype(value.dtype, np.integer) else np.float32)


def _name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _digest_file(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _write_shard(file: Path, tensors: Mapping[str, Array]) -> None:
    """The shard, then its digest: a shard without one is written anew."""
    from safetensors.numpy import save

    # Not ``save_file``, whose files nobody else may read: outputs are shared.
    data = save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    _write_whole(file, data)
    _write_whole(_digest_file(file), hashlib.sha256(data).hexdigest().encode())


def _write_whole(file: Path, data: bytes) -> None:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _finished(file: Path) -> str | None:
    """The sha256 of a shard that an earlier run finished; None where it has to be made."""
    try:
        sha256 = _digest_file(file).read_text(encoding="ascii")
        with file.open("rb") as opened:
            return sha256 if sha256_of(opened) == sha256 else None
    except OSError:
        return None


def _prepare_draft(folder: Path, of: OutputsOf, step: int) -> None:
    """Shards of an earlier run are taken over where they are of the same outputs, cut the same way."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "draft.json"
    wanted = {"of": of.key, "rows_in_shard": step}
    if file.is_file():
        with contextlib.suppress(ValueError):
            if json.loads(file.read_text(encoding="utf-8")) == wanted:
                return
        for stale in folder.glob("*.sha256"):
            stale.unlink()
    elif strangers := sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")):
        raise StoreError(
            f"'{folder}' holds something else than teacher outputs, such as '{strangers[0]}'.",
            hint="Name a folder that is empty or not there yet.",
        )
    _write_whole(file, json.dumps(wanted).encode())


def _write_index(
    teacher: Teacher,
    pictures: TrainingPictures,
    of: OutputsOf,
    folder: Path,
    starts: range,
    n_rows: int,
    *,
    n_texts: int,
) -> None:
    def entry(name: str, first: int, count: int) -> ShardFile:
        file = folder / name
        try:
            sha256 = _digest_file(file).read_text(encoding="ascii")
        except FileNotFoundError:  # another run of the same was done first, and tidied up
            with file.open("rb") as opened:
                sha256 = sha256_of(opened)
        return ShardFile(file=name, sha256=sha256, n_bytes=file.stat().st_size, first=first, n_rows=count)

    shards = tuple(entry(_name(number), first, min(starts.step, n_rows - first)) for number, first in enumerate(starts))
    tensors: tuple[str, ...] = ()
    if shards:
        from safetensors import safe_open

        with safe_open(folder / shards[0].file, framework="numpy") as opened:
            tensors = tuple(sorted(opened.keys()))
    index = Index(
        of=of,
        teacher_name=teacher.model.name,
        data_name=pictures.data.name,
        n_pictures=len(pictures.data),
        n_rows=n_rows,
        tensors=tensors,
        shards=shards,
        texts=entry(TEXTS, 0, n_texts) if of.texts else None,
    )
    _write_whole(folder / INDEX, to_json(index))
    for file in (*folder.glob("*.sha256"), folder / "draft.json"):
        file.unlink(missing_ok=True)


def _check_shard(folder: Path, shard: ShardFile, *, is_verified: bool) -> None:
    file = folder / shard.file
    try:
        n_bytes = file.stat().st_size
        if n_bytes == shard.n_bytes and is_verified:
            return
        with file.open("rb") as opened:
            if n_bytes == shard.n_bytes and sha256_of(opened) == shard.sha256:
                return
        problem = (
            f"has {n_bytes} bytes, where {shard.n_bytes} were written"
            if n_bytes != shard.n_bytes
            else "was changed: its sha256 is another than the index says"
        )
    except OSError as error:
        problem = f"cannot be read: {(error.strerror or str(error)).lower()}"
    raise StoreError(
        f"The stored teacher outputs '{file}' cannot be used: it {problem}.",
        hint=f"Remove '{folder}'; the same command then computes them anew.",
    )
