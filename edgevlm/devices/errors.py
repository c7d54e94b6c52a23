"""The error that a verb ended with on a device, read from its exit code and what it wrote to standard error."""

from __future__ import annotations

import re

import click

from edgevlm.errors import EdgeVLMError, GateError, MissingToolError, UsageError

_KINDS: dict[int, type[EdgeVLMError]] = {2: UsageError, 3: MissingToolError, 4: GateError}


def error_from(code: int, said: str, device: str) -> EdgeVLMError:
    """As it was there; where the verb said none, what is known of its end.

    Args:    code: the exit code, or less than zero the signal that ended it.
    """
    said = click.unstyle(said)
    told = re.search(r"^error: (.*?)(?:^ hint: (.*))?\Z", said, re.MULTILINE | re.DOTALL)
    if told:
        message, hint = told[1].strip(), (told[2] or "").strip()
        return _KINDS.get(code, EdgeVLMError)(f"On {device}: {message}", hint=hint)
    if code == -9:
        message = f"{device} killed edgevlm: most likely its memory is full."
        return EdgeVLMError(message, hint="Close other programs there, or use a smaller model.")
    lines = said.strip().splitlines()
    end = f"signal {-code}" if code < 0 else f"exit code {code}"
    last = f" after '{lines[-1]}'" if lines else ""
    return EdgeVLMError(f"On {device} the process ended with {end}{last}.", hint="Run it again with --debug.")
