"""Verbs on a device: the same values as here, with the device's own environment in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgevlm.devices import Device
from edgevlm.errors import UsageError
from edgevlm.runtime.spec import from_json

if TYPE_CHECKING:
    from edgevlm.measure.bundles import BundleBenchmark
    from edgevlm.runtime.verify import Verification


def verify_on(device: Device, bundle: Path) -> Verification:
    """``edgevlm.verify``, but on the device.

    Raises: EdgeVLMError: as ``Device.run``.
    """
    from edgevlm.runtime.verify import Verification

    return from_json(device.run("verify", bundle), Verification)


def benchmark_on(
    device: Device, bundles: Sequence[Path], *, n_threads: int | None = None, n_rounds: int | None = None
) -> BundleBenchmark:
    """``edgevlm.benchmark``, but on the device.

    Raises: UsageError: the device is emulated, so that its times mean nothing. EdgeVLMError: as ``Device.run``.
    """
    from edgevlm.measure.bundles import BundleBenchmark

    if device.is_emulated:
        raise UsageError(
            f"{device.name} is emulated: how long it takes says nothing of the device.",
            hint="Verify there, and benchmark on the device itself.",
        )
    options: list[str | Path] = [*bundles[1:], "-v"]
    if n_threads is not None:
        options += ["--threads", str(n_threads)]
    if n_rounds is not None:
        options += ["--rounds", str(n_rounds)]
    return from_json(device.run("benchmark", bundles[0], options), BundleBenchmark)
