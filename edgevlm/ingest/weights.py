"""What the files of a model hold, read without any framework: contents hashed, safetensors headers checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgevlm.errors import ModelError


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combined_sha256(parts: Iterable[str | bytes]) -> str:
    """One digest for several, in order; for a single hexadecimal digest, that digest itself."""
    parts = tuple(parts)
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises: ModelError: the file cannot be read, is not JSON or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}.", hint="Check the file's permissions.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"'{path}' is not JSON: {error}.", hint="Download or save the checkpoint again.") from error
    if not isinstance(value, dict):
        raise ModelError(
            f"'{path}' holds a {type(value).__name__} where an object is expected.",
            hint="Download or save the checkpoint again.",
        )
    return value


def weight_files(folder: Path, *, allow_pickle: bool) -> tuple[tuple[Path, ...], bool]:
    """The files that hold the weights of a Hugging Face folder, and whether they are pickles.

    Raises: ModelError: there are none, a shard is missing, or there are only pickles and ``allow_pickle`` is not set.
    """
    for stem, suffix, is_pickle in (("model", ".safetensors", False), ("pytorch_model", ".bin", True)):
        files = _files_of(folder, f"{stem}{suffix}")
        if files and is_pickle and not allow_pickle:
            raise ModelError(
                f"'{folder}' has its weights only as a pickle ('{files[0].name}'), which can run code when it is read.",
                hint="Convert it to safetensors, or pass --allow-pickle if you trust where it comes from.",
            )
        if files:
            return files, is_pickle
    raise ModelError(
        f"'{folder}' holds no weights: neither model.safetensors nor model.safetensors.index.json.",
        hint="Save the model with save_pretrained, or pass --allow-pickle if its weights are in a pickle only.",
    )


def _files_of(folder: Path, name: str) -> tuple[Path, ...]:
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        return (folder / name,)
    if not index.is_file():
        return ()
    shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ModelError(
                f"'{index}' names the shard '{shard}', which is not beside it.", hint="Download the checkpoint again."
            )
    return tuple(folder / shard for shard in shards)


def tensor_names(files: Iterable[Path]) -> frozenset[str]:
    """The names in safetensors files, whose headers are checked against the files' sizes.

    Raises: ModelError: a file is cut short or is not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                names.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"'{path}' ({path.stat().st_size} bytes) is not a whole safetensors file: {error}.",
                hint="Download the checkpoint again.",
            ) from error
    return frozenset(names)


def licence_of(folder: Path) -> str | None:
    """The licence that the README's front matter names, else the name of a licence file beside the model."""
    readme = folder / "README.md"
    if readme.is_file():
        head = readme.read_text(encoding="utf-8", errors="replace").split("---")
        lines = head[1].splitlines() if len(head) > 2 and not head[0].strip() else []
        found = [line.partition(":")[2].strip(" '\"") for line in lines if line.startswith("license:")]
        if found and found[0]:
            return found[0]
    files = sorted(path.name for path in folder.iterdir() if path.stem.upper() in ("LICENSE", "LICENCE"))
    return f"see {files[0]}" if files else None
