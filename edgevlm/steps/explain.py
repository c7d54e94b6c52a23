"""Why the winner is as fast as it is, and the float model beside it: operators, findings, the measured roofline.

Nothing is chosen by it, so its result is stored even where the machine was too busy for the best rates; it says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import msgspec

from edgevlm.errors import EdgeVLMError
from edgevlm.export import Exported
from edgevlm.job import Work as Asked
from edgevlm.measure.explanation import Explained, Explanation, place_under_roof, time_by_kind
from edgevlm.measure.findings import find_causes
from edgevlm.measure.operators import PROFILERS, profile_graph
from edgevlm.measure.peak import Peak, measure_peak
from edgevlm.measure.work import Work, work_of_graph
from edgevlm.plan import TEXT_ENCODER
from edgevlm.progress import Note, StepProgress
from edgevlm.runtime.spec import Array
from edgevlm.search.choose import FLOAT
from edgevlm.search.spec import SearchResult, Variant
from edgevlm.steps.confirm import Confirmation
from edgevlm.steps.inputs import at_batch, graph_inputs, processing_of
from edgevlm.store import Store, read_spec, write_spec

# Long enough for five runs of a graph of 200 ms; a graph of 1 ms gets its fifty runs in a twentieth of it.
_BLOCK_MS = 1000.0
# The store keeps no rates of a busy machine, and the next target of the same process would wait seconds for others.
_RATES_KEPT_S = 600.0
_rates: dict[tuple[str, int], tuple[float, Peak]] = {}


def run(asked: Asked) -> None:
    """``explanation.json``. What cannot be profiled is said there; a compile does not fail by it."""
    found = read_spec(asked.inputs["search"] / "search.json", SearchResult)
    winner = read_spec(asked.inputs["confirm"] / "confirmation.json", Confirmation).winner
    variants = found.variants_of(winner)
    references = found.variants_of(FLOAT) if winner != FLOAT else ()
    inputs = {v.graph: _as_timed(asked, v.graph) for v in variants}
    notes: list[str] = []
    work = _work(asked, inputs, notes)
    peaks = _peaks(asked, (*variants, *references), notes)

    def explained(each: tuple[Variant, ...]) -> tuple[Explained, ...]:
        return tuple(_explain(asked, v, found, inputs[v.graph], work.get(v.graph), peaks) for v in each)

    explanation = Explanation(
        work=work,
        winner=explained(variants),
        reference=explained(references),
        peaks=tuple(peaks.values()),
        notes=tuple(notes),
    )
    for note in notes:
        asked.progress(Note(note))
    write_spec(asked.out / "explanation.json", explanation)


def _as_timed(asked: Asked, graph: str) -> dict[str, Array]:
    """What the graph was timed with: as many pictures as a call takes, or one text at its own length."""
    n = 1 if graph == TEXT_ENCODER else asked.job.request.batch or 1
    text = processing_of(asked).text
    return at_batch(graph_inputs(asked.job, graph, asked.job.splits.select, n, text=text), n)


def _work(asked: Asked, inputs: Mapping[str, Mapping[str, Array]], notes: list[str]) -> dict[str, Work]:
    """By graph, counted on what was exported: every form of a graph does the same work."""
    found = {}
    for graph, feeds in inputs.items():
        folder = asked.inputs[f"export:{graph}"]
        file = folder / read_spec(folder / "exported.json", Exported).file
        try:
            found[graph] = work_of_graph(file, {name: value.shape for name, value in feeds.items()})
        except Exception as error:  # onnx's shape inference raises its own classes
            notes.append(f"The work of {graph} could not be counted: {error}")
    return found


def _peaks(asked: Asked, variants: tuple[Variant, ...], notes: list[str]) -> dict[tuple[str, int], Peak]:
    peaks: dict[tuple[str, int], Peak] = {}
    for variant in variants:
        key = (variant.backend, variant.session.n_threads)
        if key in peaks or variant.backend not in PROFILERS:
            continue
        asked.progress(StepProgress(asked.step.name, None, f"the best rates of {variant.backend} on this machine"))
        try:
            peaks[key] = best_rates(*key, asked.store)
        except EdgeVLMError as error:
            notes.append(error.message)
    return peaks


def best_rates(backend: str, n_threads: int, store: Store) -> Peak:
    """As ``measure_peak``, or what this process found within ten minutes."""
    measured_at, peak = _rates.get((backend, n_threads), (-math.inf, None))
    if peak is None or time.monotonic() - measured_at > _RATES_KEPT_S:
        peak = measure_peak(backend=backend, n_threads=n_threads, store=store)
        _rates[backend, n_threads] = (time.monotonic(), peak)
    return peak


def _explain(
    asked: Asked,
    variant: Variant,
    found: SearchResult,
    inputs: Mapping[str, Array],
    work: Work | None,
    peaks: Mapping[tuple[str, int], Peak],
) -> Explained:
    asked.progress(StepProgress(asked.step.name, None, f"{variant.name} of {variant.graph}"))
    bare = Explained(graph=variant.graph, name=variant.name, backend=variant.backend, profile=None)
    try:
        profile = profile_graph(
            asked.inputs["search"] / variant.file,
            backend=variant.backend,
            inputs=inputs,
            session=variant.session,
            block_ms=_BLOCK_MS,
        )
    except EdgeVLMError as error:
        return msgspec.structs.replace(bare, failure=error.message)
    peak = peaks.get((variant.backend, variant.session.n_threads))
    roofline = None
    if work and peak:
        latency_ms = _measured_ms(found, variant) or profile.latency_ms
        roofline = place_under_roof(profile, work, peak, latency_ms=latency_ms)
    return msgspec.structs.replace(
        bare,
        profile=profile,
        by_kind_ms=time_by_kind(profile),
        findings=find_causes(profile),
        roofline=roofline,
    )


def _measured_ms(found: SearchResult, variant: Variant) -> float | None:
    """The median of the turns, which says more than the profiler's process."""
    if not any(t.graph == variant.graph and t.comparison.has(variant.name) for t in found.timings):
        return None
    measured = found.measurement(variant)
    return measured.percentile_ms(50) if measured.turns_ms else None
