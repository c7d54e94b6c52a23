"""Export a graph and prove it equal to its source."""

from __future__ import annotations

from edgevlm.export import export_graph, scoring_of
from edgevlm.job import Work
from edgevlm.plan import TEXT_ENCODER
from edgevlm.steps.inputs import proof_inputs
from edgevlm.store import write_spec

# Real inputs for the proof. One would do for a wrong graph; some more catch branches and rare values.
N_PROOF_INPUTS = 5


def run(work: Work) -> None:
    """``exported.json`` and the graph; beside a text tower also ``scoring.json``."""
    params = work.step.params
    graph = params["graph"]
    exported = export_graph(
        work.job.model,
        graph,
        batch=params["batch"],
        out=work.out,
        samples=proof_inputs(work.job, graph, work.job.splits.calibrate, N_PROOF_INPUTS),
        opset=params["opset"],
        text_length=params.get("text_length"),
        progress=work.progress,
    )
    write_spec(work.out / "exported.json", exported)
    if graph == TEXT_ENCODER:
        write_spec(work.out / "scoring.json", scoring_of(work.job.model))
