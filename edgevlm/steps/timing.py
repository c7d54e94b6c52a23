"""Time forms of a graph against each other, in turns, on a real input; looked up where that was done before."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from edgevlm.errors import ModelError
from edgevlm.job import Work
from edgevlm.measure.environment import describe_environment, fingerprint
from edgevlm.measure.interleave import compare
from edgevlm.measure.protocol import extended
from edgevlm.measure.spec import Comparison, Protocol, Subject
from edgevlm.plan import TEXT_ENCODER
from edgevlm.progress import Note, StepProgress
from edgevlm.search.choose import FLOAT
from edgevlm.search.spec import Variant
from edgevlm.steps.inputs import at_batch, graph_inputs, processing_of, prompts, save_inputs
from edgevlm.steps.variants import file_digest
from edgevlm.store import code_digest, read_spec, write_spec


def time_variants(
    work: Work, graph: str, variants: Iterable[Variant], *, protocol: Protocol, extend: bool, what: str = ""
) -> Comparison:
    """The graph's variants against ``fp32``, which is among them. Variants with a failure are left out.

    Args:
        extend: measure once more and longer where the result is not valid, and store only what is.
        what: what is being done, for people.
    Raises: ModelError: not even float runs, with which all are compared.
    """
    data = work.job.splits.select
    batch = 1 if graph == TEXT_ENCODER else work.step.params["batch"] or 1
    processing = processing_of(work)
    runnable = [variant for variant in variants if variant.failure is None]

    def say(text: str, done: int, n: int) -> None:
        detail = f"{graph}: {what}{text}"
        work.progress(StepProgress(name=work.step.name, fraction=done / n if n else None, detail=detail))

    def make(out: Path) -> None:
        feeds = graph_inputs(work.job, graph, data, batch, text=processing.text)
        inputs = save_inputs(out / "inputs.npz", at_batch(feeds, batch))
        subjects = [
            Subject(name=v.name, backend=v.backend, file=str(work.out / v.file), inputs=str(inputs), session=v.session)
            for v in runnable
        ]
        comparison = compare(subjects, baseline=FLOAT, protocol=protocol, progress=say)
        if extend and not comparison.is_valid:
            work.progress(Note(f"{graph}: measuring again, and longer: {'; '.join(comparison.reasons)}"))
            again = compare(subjects, baseline=FLOAT, protocol=extended(protocol), progress=say)
            comparison = msgspec.structs.replace(again, was_extended=True)
        write_spec(out / "comparison.json", comparison)
        inputs.unlink()

    parts = {
        "subjects": {
            v.name: {
                "backend": v.backend,
                "file": file_digest(work.out / v.file),
                "session": msgspec.to_builtins(v.session),
            }
            for v in runnable
        },
        "input": data.samples[0].digest if data.samples else "",
        **({"texts": list(prompts(work.job, data)[:batch])} if graph == TEXT_ENCODER else {}),
        "batch": batch,
        "processing": msgspec.to_builtins(processing),
        "protocol": msgspec.to_builtins(protocol),
        "extend": extend,
        "machine": fingerprint(describe_environment()),
        "code": code_digest(),
    }

    def keep(out: Path) -> bool:
        found = _comparison(out)
        return found.measurement(FLOAT).failure is None and (found.is_valid or not extend)

    comparison = _comparison(work.store.fetch("measure", parts, make, keep=keep).path)
    if why := comparison.measurement(FLOAT).failure:
        raise ModelError(
            f"The float graph '{graph}' cannot be timed here: {why}",
            hint="Take a smaller --image-size or --batch, or a machine with more memory.",
        )
    return comparison


def _comparison(folder: Path) -> Comparison:
    return read_spec(folder / "comparison.json", Comparison)
