"""`edgevlm verify`."""

from __future__ import annotations

from pathlib import Path

import click

from edgevlm.cli.common import Output, device_option, output_options


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@device_option
@output_options
def verify_command(bundle: Path, device: str | None, output: Output) -> int:
    """Check every file's hash and replay the golden vectors on this machine or a device, from picture to answer.

    \b
    Examples:
      edgevlm verify mobilenet-cpu/
      edgevlm verify mobilenet-cpu/ --device ssh://user@host
    """
    if device is not None:
        from edgevlm.devices import open_device
        from edgevlm.devices.verbs import verify_on

        with output.progress() as progress, open_device(device, progress=progress) as opened:
            verification = verify_on(opened, bundle)
            where = opened.name
        output.value(verification, lambda: f"on {where}:\n{verification.to_text()}")
        return 0 if verification else 1
    from edgevlm.runtime.verify import verify_bundle

    verification = verify_bundle(bundle)
    output.value(verification, verification.to_text)
    return 0 if verification else 1
