"""`edgevlm verify`."""

from __future__ import annotations

from pathlib import Path

import click

from edgevlm.cli.common import Output, device_option, output_options

_OF_TARGET = "as the target says"


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@device_option
@click.option(
    "--emulate",
    "cpu",
    is_flag=False,
    flag_value=_OF_TARGET,
    metavar="[CPU]",
    help="Replay them on an emulated ARM processor, such as cortex-a76; the target's own unless told.",
)
@output_options
def verify_command(bundle: Path, device: str | None, cpu: str | None, output: Output) -> int:
    """Check every file's hash and replay the golden vectors on this machine or a device, from picture to answer.

    With --emulate: on the kernels of an ARM processor, under QEMU, which is set up on first use.

    \b
    Examples:
      edgevlm verify mobilenet-cpu/
      edgevlm verify mobilenet-cpu/ --device ssh://user@host
      edgevlm verify mobilenet-cpu/ --emulate
      edgevlm verify mobilenet-cpu/ --emulate cortex-a53
    """
    if device is not None and cpu is not None:
        raise click.UsageError("--device and --emulate name two places; give one.")
    if cpu is not None:
        from edgevlm.devices.emulated import verify_emulated

        with output.progress() as progress:
            emulated = verify_emulated(bundle, None if cpu == _OF_TARGET else cpu, progress=progress)
        output.value(emulated, emulated.to_text)
        return 0 if emulated else 1
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
