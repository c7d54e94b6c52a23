"""Where models come from. Reading one is light: JSON, headers and hashes; no torch, no transformers.

(The exception is a PyTorch module, which has to be made to be known.)
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from edgevlm.errors import DataError, UsageError, did_you_mean
from edgevlm.ingest.asked import Asked
from edgevlm.model import Model
from edgevlm.runtime.tasks import TASKS

KINDS: dict[str, str] = {
    "demo": "edgevlm.ingest.demo:read_demo",
    "onnx_file": "edgevlm.ingest.onnx_file:read_onnx_file",
    "torch_module": "edgevlm.ingest.torch_module:read_torch_module",
    "hugging_face": "edgevlm.ingest.hugging_face:read_hugging_face",
}


def read_model(
    asked: str,
    *,
    task: str | None = None,
    card: Path | str | None = None,
    revision: str | None = None,
    labels: Sequence[str] = (),
    image_size: int | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """What ``asked`` is: ``demo``, an ONNX file, ``package.module:factory``, a Hugging Face folder or hub id.

    Args:
        card: the card of an ONNX file or a PyTorch module, where it does not lie beside it.
        labels: class names in order of the logits, or the labels of a zero-shot task.
        image_size: pictures of this height and width instead of the checkpoint's own.
        allow_pickle: take weights from a pickle where there is no safetensors.
        trust_remote_code: run the code that a checkpoint brings along.
    Raises:
        UsageError: there is no such model or task, or they do not fit.
        ModelError: the model cannot be read.
    """
    if task is not None and task not in TASKS:
        raise UsageError(f"There is no task '{task}'.", hint=did_you_mean(task, TASKS))
    if image_size is not None and image_size < 1:
        raise UsageError(f"An image size of {image_size} was asked for.", hint="Give pixels, such as --image-size 224.")
    kind = kind_of(asked)
    if card is not None and kind not in ("onnx_file", "torch_module"):
        raise UsageError(f"A card was given, and '{asked}' says for itself what it is.", hint="Leave --card out.")
    module, _, attribute = KINDS[kind].partition(":")
    read: Callable[[Asked], Model] = getattr(importlib.import_module(module), attribute)
    return read(
        Asked(
            name=asked,
            kind=kind,
            task=task,
            card=None if card is None else Path(card),
            revision=revision,
            labels=tuple(labels),
            image_size=image_size,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )
    )


def kind_of(asked: str) -> str:
    """The name in ``KINDS`` of what ``asked`` must be; a checkpoint's folder is never taken for something else.

    Raises: UsageError: it can be nothing.
    """
    from edgevlm.ingest.hugging_face import HUB_ID

    path = Path(asked)
    # A bundle that was written to ./demo is no model and must not hide the built-in one.
    if asked == "demo" and not (path / "config.json").is_file():
        return "demo"
    if path.is_dir():
        return "hugging_face"
    if path.suffix == ".onnx":
        return "onnx_file"
    module, colon, factory = asked.partition(":")
    if colon and factory.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return "torch_module"
    if path.is_file():
        raise UsageError(
            f"'{asked}' is a file, but not an ONNX file.", hint="Pass an .onnx file, or the folder of a checkpoint."
        )
    if HUB_ID.fullmatch(asked) and not path.is_absolute():
        return "hugging_face"
    hint = Asked(name=asked, kind="").nearest()
    raise UsageError(f"There is no model '{asked}'.", hint=hint or "Pass a folder, an .onnx file, a hub id or 'demo'.")


def read_labels(text: str) -> tuple[str, ...]:
    """Labels as they are written on a command line: a file with one a line, or names with commas between them.

    Raises: DataError: the file cannot be read. UsageError: there are none, or one stands twice.
    """
    path = Path(text)
    if os.path.isfile(text):  # noqa: PTH113 - a path raises where many names are longer than a file's may be
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"The labels '{path}' cannot be read: {error}.", hint="Write UTF-8, a label a line."
            ) from error
    else:
        lines = text.split(",")
    labels = tuple(line.strip() for line in lines if line.strip())
    if not labels:
        raise UsageError(f"'{text}' holds no labels.", hint="Write names with commas between them, or pass a file.")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UsageError(f"The label '{twice[0]}' stands more than once.", hint="Name each label once.")
    return labels
