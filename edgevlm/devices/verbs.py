"""Verbs on a device: the same values as here, with the device's own environment in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgevlm.devices import Device
from edgevlm.errors import BundleError, UsageError
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
    """``edgevlm.benchmark``, but on the device, once every bundle was verified there.

    Raises: UsageError: the device is emulated, so that its times mean nothing. BundleError: a bundle answers otherwise
        there. EdgeVLMError: as ``Device.run``.
    """
    from edgevlm.measure.bundles import BundleBenchmark

    if device.is_emulated:
        raise UsageError(
            f"{device.name} is emulated: how long it takes says nothing of the device.",
            hint="Verify there, and benchmark on the device itself.",
        )
    for bundle in bundles:
        if not (found := verify_on(device, bundle)):
            raise BundleError(
                f"'{bundle}' does not answer as it should on {device.name}, so nothing was timed: {found.reasons[0]}",
                hint="Run `edgevlm verify` with the same --device to see every golden picture.",
            )
    options: list[str | Path] = [*bundles[1:], "-v"]
    if n_threads is not None:
        options += ["--threads", str(n_threads)]
    if n_rounds is not None:
        options += ["--rounds", str(n_rounds)]
    return from_json(device.run("benchmark", bundles[0], options), BundleBenchmark)
