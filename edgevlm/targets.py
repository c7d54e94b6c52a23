"""The verbs of `edgevlm targets`: list, show, detect, validate."""

from __future__ import annotations

from pathlib import Path

from edgevlm.errors import StoreError, UsageError
from edgevlm.runtime.machine import describe_machine
from edgevlm.target import Target, host_target, load_target, pick_backends, read_target, target_names, target_text

__all__ = ["detect", "list", "show", "validate"]


def list() -> tuple[Target, ...]:
    """The built-in targets, as they are written."""
    return tuple(read_target(name) for name in target_names())


def show(name_or_path: str) -> Target:
    """A target with the host's facts filled in."""
    return load_target(name_or_path)


def detect(output: Path | None = None) -> Target:
    """This machine as a target; written to ``output`` (a ``.toml`` that does not exist yet) where one is given.

    Raises: UsageError: the path is not a new TOML file. StoreError: it cannot be written.
    """
    machine = describe_machine()
    name = output.stem if output else "detected"
    target = host_target(machine, name=name, description=f"{machine.name}, detected by edgevlm")
    if output is not None:
        if output.suffix != ".toml":
            raise UsageError(f"'{output}' is no name for a target file.", hint=f"Call it {output.stem}.toml.")
        if output.exists():
            raise UsageError(f"'{output}' exists already.", hint="Choose another name, or remove it first.")
        try:
            output.write_text(target_text(target), encoding="utf-8")
        except OSError as error:
            raise StoreError(
                f"'{output}' cannot be written: {error.strerror}.", hint="Choose another folder."
            ) from error
    return target


def validate(path: str) -> Target:
    """Read a target file and check that what it names exists.

    Raises: UsageError: what is wrong with it, and where.
    """
    target = load_target(path)
    pick_backends(target, ())
    return target
