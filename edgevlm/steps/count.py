"""Instructions of each form that ships, counted on the emulated processor of a target that is not at hand."""

from __future__ import annotations

import tempfile
from pathlib import Path

from edgevlm.bundle.write import write_bundle
from edgevlm.devices.instructions import count_instructions
from edgevlm.job import Work
from edgevlm.runtime.spec import Manifest
from edgevlm.steps.finish import COUNTS, made_files
from edgevlm.store import read_spec, write_spec


def run(work: Work) -> None:
    """``instructions.json``."""
    made = work.inputs["bundle"]
    with tempfile.TemporaryDirectory(prefix="edgevlm-") as folder:
        bundle = Path(folder) / "bundle"
        write_bundle(bundle, read_spec(made / "manifest.json", Manifest), made_files(made))
        counted = count_instructions(bundle, work.step.params["cpu"], progress=work.progress)
    write_spec(work.out / COUNTS, counted)
