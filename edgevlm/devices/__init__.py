"""Where a bundle can be verified, timed and tuned beside this machine. One file per kind of device, one line here.

A device runs edgevlm's own verbs with a base install and hands back what they print as JSON, so that a figure from a
device is the very value that the verb gives here.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from edgevlm.errors import UsageError, did_you_mean
from edgevlm.progress import Progress, silent

# The scheme of an address -> "module:function" that takes the address and opens the device.
DEVICES: dict[str, str] = {
    "emulated": "edgevlm.devices.emulated:open_emulated",
    "ssh": "edgevlm.devices.ssh:open_ssh",
}


class Device(Protocol):
    """A place that runs edgevlm's verbs."""

    @property
    def name(self) -> str:
        """For people, such as ``cortex-a76 (emulated)``."""
        ...

    @property
    def is_emulated(self) -> bool:
        """Whether its answers are the device's but its times are not."""
        ...

    def run(self, verb: str, bundle: Path, options: Sequence[str | Path] = (), *, output: Path | None = None) -> bytes:
        """What ``edgevlm verb BUNDLE OPTIONS --json`` prints there.

        Args:    options: a ``Path`` among them is one more bundle, which is taken there too.
                 output: where here to put what the verb writes there to its ``--output``: a new folder.
        Raises:  EdgeVLMError: as the verb raised it there, with its exit code; or the device cannot be reached, is
                 lost on the way, is full, or lacks something, which is then named.
        """
        ...


def open_device(address: str, *, progress: Progress = silent) -> AbstractContextManager[Device]:
    """The device at ``address``, such as ``ssh://user@host`` or ``emulated://cortex-a76``, for the block's time.

    Raises: UsageError: no such kind of device. MissingToolError: what it takes is not installed here.
    """
    scheme = address.partition("://")[0]
    if scheme not in DEVICES:
        raise UsageError(f"'{address}' is no device.", hint=did_you_mean(scheme, DEVICES) + " Such as ssh://user@host.")
    module, _, attribute = DEVICES[scheme].partition(":")
    opened: AbstractContextManager[Device] = getattr(importlib.import_module(module), attribute)(address, progress)
    return opened
