"""`edgevlm verify`."""

from __future__ import annotations

from pathlib import Path

import click

from edgevlm.cli.common import Output, short_output_options


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@short_output_options
def verify_command(bundle: Path, output: Output) -> int:
    """Check every file's hash and replay the golden vectors on this machine, from picture to answer.

    \b
    Example:
      edgevlm verify mobilenet-cpu/
    """
    from edgevlm.runtime.verify import verify_bundle

    verification = verify_bundle(bundle)
    output.value(verification, verification.to_text)
    return 0 if verification else 1
