"""Errors that a user can cause: each says what, where and how to mend it, and owns its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgeVLMError(Exception):
    """A failure with one sentence that says what went wrong and one that says how to mend it.

    Args:
        message: where, what, what was got and what was expected; one sentence.
        hint: one imperative sentence.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class UsageError(EdgeVLMError):
    """What was asked for cannot be asked for."""

    exit_code = 2


class MissingToolError(EdgeVLMError):
    """The target's tool, library or device is not on this machine."""

    exit_code = 3


class GateError(EdgeVLMError):
    """No candidate, not even the float model, is inside the accuracy, latency or size budget."""

    exit_code = 4


class ModelError(EdgeVLMError):
    """The model cannot be read, exported, proven equal or quantized."""


class DataError(EdgeVLMError):
    """A picture, a label or a data set cannot be used."""


class BundleError(EdgeVLMError):
    """A bundle breaks a MUST of the format, was changed, or cannot run on this machine."""


class RefusedGraphError(BundleError):
    """A backend that is installed does not open a graph here."""


class ForeignEngineError(BundleError):
    """An engine is for another GPU, or of another version, than this machine has."""


class StoreError(EdgeVLMError):
    """A folder cannot be written or read: full, read-only, taken."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The hint for a word that nothing is called: the nearest known words, else all of them.

    Example:
        >>> did_you_mean("image-clasification", ["image-classification", "mask-generation"])
        "Did you mean 'image-classification'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=2, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(name) for name in near)}?"
    return f"Use one of: {', '.join(names)}." if names else ""
