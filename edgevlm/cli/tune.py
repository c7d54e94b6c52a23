"""`edgevlm tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevlm.cli.common import Output, beside, device_option, output_options

if TYPE_CHECKING:
    from edgevlm.tuning import Tuned


@click.command("tune")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", "destination", type=click.Path(path_type=Path),
              help="A folder, or a file ending in .evlm; BUNDLE-tuned if left out.")  # fmt: skip
@device_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; as compiled if left out.")
@click.option("--max-drop", type=click.FloatRange(0, 1), help="A narrower accuracy budget than at the compile.")
@click.option("--max-latency-ms", type=click.FloatRange(0, min_open=True), help="Median latency of the graphs at most.")
@click.option("--rounds", type=click.IntRange(min=6), help="Turns that each form takes at most; 40 if left out.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there already.")
@output_options
def tune_command(
    bundle: Path,
    destination: Path | None,
    device: str | None,
    threads: int | None,
    max_drop: float | None,
    max_latency_ms: float | None,
    rounds: int | None,
    overwrite: bool,
    output: Output,
) -> None:
    """Verify and time every form of BUNDLE on the device, and write the bundle of the best.

    A bundle for hardware that was not at hand holds several forms, float first, and says nothing of their speed.

    \b
    Examples:
      edgevlm tune mobilenet-raspberry-pi-5/
      edgevlm tune mobilenet-raspberry-pi-5/ --device ssh://pi@raspberrypi.local -o mobilenet-pi
    """
    from edgevlm.measure.protocol import ALL_STAY, with_rounds
    from edgevlm.tuning import tune, tune_on

    place = destination or beside(bundle, "tuned")
    with output.progress() as progress:
        if device is not None:
            options = {"threads": threads, "max-drop": max_drop, "max-latency-ms": max_latency_ms, "rounds": rounds}
            found = tune_on(device, bundle, output=place, options=options, overwrite=overwrite, progress=progress)
        else:
            found = tune(
                bundle,
                output=place,
                n_threads=threads,
                max_drop=max_drop,
                max_latency_ms=max_latency_ms,
                protocol=with_rounds(ALL_STAY, rounds) if rounds else ALL_STAY,
                overwrite=overwrite,
                progress=progress,
            )
    output.value(found, lambda: tuned_text(found))


def tuned_text(found: Tuned) -> str:
    """What was chosen and why, a line for each form, and where it lies."""
    from edgevlm.cli.tables import table_text
    from edgevlm.report import facts, notation

    rows = [
        (
            form.name,
            f"{facts.SIGNS[form.status]} {form.status}",
            notation.ms(form.p50_ms),
            facts.ratio_text(form),
            notation.MISSING if form.max_error is None else notation.error(form.max_error),
        )
        for form in found.forms
    ]
    table = table_text(("form", "verdict", "p50 ms", "÷ float", "golden error"), rows, right=(2, 3, 4))
    whose = f", under emulation of {found.emulated_cpu}: not the device's times" if found.emulated_cpu else ""
    failures = [f"{form.name} failed: {form.reason}" for form in found.forms if form.status == "failed"]
    lines = [f"{found.chosen} ships: {found.reason}.", "", table, *failures]
    return "\n".join([*lines, "", f"on {found.environment.machine}{whose}", f"Bundle  {found.bundle}"])
