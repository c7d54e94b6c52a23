"""A student on disk, in Hugging Face's layout: everything that ``edgevlm.ingest`` reads of a checkpoint."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.errors import ModelError, StoreError, UsageError
from edgevlm.ingest.processing import at_size, image_processor_json
from edgevlm.model import Model
from edgevlm.runtime.spec import ImageProcessing

if TYPE_CHECKING:
    from torch import nn

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


def students_pictures(teacher: Model, image_size: int | None) -> ImageProcessing:
    """The teacher's preprocessing at another size, in the form in which it can be saved and read back.

    Raises: UsageError: Hugging Face's layout has no words for it, or the size is none.
    """
    if image_size is not None and image_size < 1:
        raise UsageError(f"An image size of {image_size} was asked for.", hint="Give pixels, such as --image-size 224.")
    image = teacher.processing.image
    if image_size is not None:
        image = at_size(image, image_size)
    try:
        return image_processor_json(image)[1]
    except ModelError as error:
        raise UsageError(
            f"A student cannot take over how '{teacher.name}' prepares pictures: {error.message}", hint=error.hint
        ) from error


def save_student(module: nn.Module, folder: Path, teacher: Model, image: ImageProcessing) -> None:
    """Write the checkpoint under a temporary name beside ``folder``, then rename it.

    Raises: StoreError: the folder cannot be written, or holds something else.
    """
    from edgevlm.families.loading import quiet

    if folder.exists() and not (folder / "config.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"'{folder}' is there and is no checkpoint.", hint="Name a folder that is not there yet.")
    saved: Any = module
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
            fresh = Path(name) / "student"
            with quiet():
                saved.save_pretrained(fresh)
            for file in fresh.glob("*.safetensors"):  # safetensors lets nobody but the owner read what it writes
                shutil.copymode(fresh / "config.json", file)
            described, _ = image_processor_json(image)
            text = json.dumps(described, indent=1) + "\n"
            (fresh / "preprocessor_config.json").write_text(text, encoding="utf-8")
            if teacher.processing.text is not None:
                _copy_tokenizer(teacher, fresh)
            with contextlib.suppress(FileNotFoundError):
                folder.rename(Path(name) / "before")  # goes with the temporary folder
            fresh.rename(folder)
    except OSError as error:
        raise StoreError(
            f"The student cannot be written to '{folder}': {error.strerror or error}.",
            hint="Name a folder that you may write to, on a disk with room.",
        ) from error


def _copy_tokenizer(teacher: Model, folder: Path) -> None:
    source = Path(teacher.tokenizer_file).parent
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
