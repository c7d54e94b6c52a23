"""The forms of a graph that are worth trying, made through the store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgevlm.errors import EdgeVLMError, MissingToolError, ModelError, StoreError
from edgevlm.export import Exported
from edgevlm.extras import tool_versions
from edgevlm.job import Job, Work, place
from edgevlm.plan import TEXT_ENCODER
from edgevlm.progress import Event, Progress, StepProgress
from edgevlm.quantization.calibration import collect_ranges
from edgevlm.quantization.graphs import schemes_of_graph
from edgevlm.quantization.post_training import Quantized, prepare, quantize
from edgevlm.quantization.schemes import Calibration, Scheme
from edgevlm.runtime.spec import Array, SessionOptions
from edgevlm.search.choose import FLOAT
from edgevlm.search.spec import Variant
from edgevlm.steps.inputs import at_batch, graph_inputs
from edgevlm.store import code_digest, read_spec, write_spec

ORT = "onnxruntime"
VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
_TOOLS = ("onnx", "onnxruntime", "numpy", "pillow", "tokenizers")


def make_variants(work: Work) -> tuple[Variant, ...]:
    """Float and, where it is asked for, every quantized form of every graph; files lie below ``work.out``.

    A form that the quantizer refuses is a variant with a ``failure``, never the end of the compile.
    """
    return tuple(variant for graph in work.step.params["graphs"] for variant in _graph_variants(work, graph))


def is_text_judged(job: Job) -> bool:
    """Whether the metric asks about texts at all: without any labels it sees the picture's vector alone."""
    return bool(job.request.labels) or job.data.has_labels


def _graph_variants(work: Work, graph: str) -> Iterator[Variant]:
    folder = work.inputs[f"export:{graph}"]
    exported = read_spec(folder / "exported.json", Exported)
    session = SessionOptions(n_threads=work.step.params["n_threads"])
    for backend in work.step.params["backends"]:
        files = {f"graphs/{graph}/{FLOAT}/{name}": folder / name for name in exported.files}
        yield _placed(work, files, graph=graph, name=FLOAT, precision=FLOAT, backend=backend, session=session)
    wanted = work.step.params["precision"]
    if wanted == FLOAT or "int8" not in work.step.params["precisions"]:
        return
    if graph == TEXT_ENCODER and not is_text_judged(work.job):
        return
    source = folder / exported.file
    try:
        prepared = _prepared(work, graph, source)
    except ModelError as error:
        yield Variant(graph=graph, name="int8", precision="int8", backend=ORT, failure=error.message)
        return
    for scheme in _schemes(work, prepared, wanted):
        work.progress(StepProgress(name=work.step.name, detail=f"{graph}: quantizing {scheme.name}"))
        try:
            made = _quantized(work, graph, prepared, scheme)
        except (MissingToolError, StoreError):
            raise
        except EdgeVLMError as error:
            yield Variant(graph=graph, name=scheme.name, precision=scheme.precision, backend=ORT, failure=error.message)
            continue
        quantized = read_spec(made / "quantized.json", Quantized)
        files = {f"graphs/{graph}/{scheme.name}/{name}": made / name for name in quantized.files}
        yield _placed(
            work,
            files,
            graph=graph,
            name=scheme.name,
            precision=scheme.precision,
            backend=ORT,
            session=session,
            recipe=scheme.describe() | {"runs": quantized.fusion.describe()},
        )


def _schemes(work: Work, prepared: Path, wanted: str) -> tuple[Scheme, ...]:
    target = work.job.target
    schemes = schemes_of_graph(
        prepared,
        activation_sign=target.activation_sign,
        methods=work.job.recipe.methods,
        # Pairs of 8-bit products overflow the 16 bits that x86 without VNNI adds them up in.
        reduce_range=target.arch == "x86-64" and not set(target.isa) & VNNI,
    )
    return tuple(s for s in schemes if wanted in ("auto", "int8") or wanted == f"int8-{s.method}")


def _prepared(work: Work, graph: str, source: Path) -> Path:
    def make(out: Path) -> None:
        prepare(source, out / _file_name(graph))

    parts = {**_trial_parts(source), "name": graph}
    return work.store.fetch("prepare", parts, make).path / _file_name(graph)


def _file_name(graph: str) -> str:
    """The graph's own: external data is called after it, and the graphs of a bundle share a folder."""
    return f"{graph}.onnx"


def _quantized(work: Work, graph: str, prepared: Path, scheme: Scheme) -> Path:
    """The folder of the quantized graph, looked up or made."""
    parts = {**_trial_parts(prepared), "name": graph}
    ranges: Path | None = None
    if scheme.calibration is not None:
        ranges = _ranges(work, graph, prepared, scheme.calibration)
        parts["ranges"] = file_digest(ranges)

    def make(out: Path) -> None:
        write_spec(out / "quantized.json", quantize(prepared, scheme, ranges=ranges, out=out / _file_name(graph)))

    return work.store.fetch("quantize", {**parts, "scheme": msgspec.to_builtins(scheme)}, make).path


def _ranges(work: Work, graph: str, prepared: Path, method: Calibration) -> Path:
    """Activation ranges, collected once for every scheme that uses the method."""
    parts = _trial_parts(prepared) | {
        "method": method,
        "calibrate": work.step.params["calibrate"],
        "n_samples": work.job.recipe.n_samples,
        "processing": msgspec.to_builtins(work.job.model.processing),
        "labels": list(work.job.request.labels),
    }

    def make(out: Path) -> None:
        collect_ranges(prepared, _calibration_feeds(work, graph), method, out / "ranges.json", _renamed(work))

    return work.store.fetch("ranges", parts, make).path / "ranges.json"


def _trial_parts(graph: Path) -> dict[str, Any]:
    return {"graph": file_digest(graph), "tools": tool_versions(*_TOOLS), "code": code_digest()}


def _renamed(work: Work) -> Progress:
    """Progress of a part of this step, told in the step's name."""

    def say(event: Event) -> None:
        if isinstance(event, StepProgress):
            work.progress(StepProgress(name=work.step.name, fraction=event.fraction, detail=event.detail))

    return say


def _calibration_feeds(work: Work, graph: str) -> Iterator[dict[str, Array]]:
    """One call at a time, at the batch that the graph takes."""
    inputs = graph_inputs(work.job, graph, work.job.splits.calibrate, work.job.recipe.n_samples)
    batch = 1 if graph == TEXT_ENCODER else work.step.params["batch"] or 1
    n = len(next(iter(inputs.values())))
    for start in range(0, n, batch):
        yield at_batch(_rows(inputs, start, start + batch), batch)


def _rows(inputs: Mapping[str, Array], start: int, end: int) -> dict[str, Array]:
    return {name: value[start:end] for name, value in inputs.items()}


def _placed(
    work: Work,
    files: Mapping[str, Path],
    *,
    graph: str,
    name: str,
    precision: str,
    backend: str,
    session: SessionOptions,
    recipe: Mapping[str, str] | None = None,
) -> Variant:
    for path, source in files.items():
        place(source, work.out / path)
    return Variant(
        graph=graph,
        name=name,
        precision=precision,
        backend=backend,
        file=next(iter(files)),
        files=tuple(files),
        n_bytes=sum(source.stat().st_size for source in files.values()),
        session=session,
        recipe=dict(recipe or {}),
    )


def file_digest(file: Path) -> str:
    """sha256 of a graph's file and its external data, where it has any: other weights change nothing but the latter."""
    whole = hashlib.sha256()
    for path in (file, file.with_name(f"{file.name}.data")):
        if path.is_file():
            with path.open("rb") as opened:
                whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()
