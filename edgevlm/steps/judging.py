"""How much accuracy a candidate loses, by the very code that the device runs."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from edgevlm.data.data_set import DataSet
from edgevlm.evaluation.evaluation import Drop, Evaluation, compare_evaluations, evaluate
from edgevlm.extras import tool_versions
from edgevlm.job import Work
from edgevlm.lowering import load_lowering
from edgevlm.lowering.onnxruntime import NO_SPINNING
from edgevlm.progress import StepProgress
from edgevlm.runtime.backends import BACKENDS, Session, load_backend
from edgevlm.runtime.machine import describe_machine
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import Scoring, SessionOptions
from edgevlm.search.spec import Variant
from edgevlm.steps.inputs import processing_folder, processing_of
from edgevlm.steps.remembered import Memory, RememberedSession
from edgevlm.steps.variants import file_digest
from edgevlm.store import code_digest, read_spec, write_spec


def open_pipeline(
    work: Work,
    variants: tuple[Variant, ...],
    search: Path,
    processing: Path,
    *,
    sessions: Mapping[str, Session] | None = None,
) -> Pipeline:
    """The runtime's pipeline over a candidate's graphs, which lie in the folder ``search``.

    Args: sessions: by graph, instead of opening them.
    """
    return Pipeline.from_parts(
        task=work.job.model.task,
        processing=processing_of(work),
        sessions=sessions or {v.graph: _open(v, search) for v in variants},
        labels=work.job.request.labels or work.job.model.labels,
        scoring=scoring_of(work),
        folder=processing,
    )


def _open(variant: Variant, search: Path) -> Session:
    """By its own backend, or by the one that stands for it here."""
    lowering = load_lowering(variant.backend)
    entries = {**variant.session.entries, **lowering.judged_with.entries}
    session = msgspec.structs.replace(variant.session, entries=entries)
    return load_backend(lowering.judged_by).open(search / variant.file, session)


def scoring_of(work: Work) -> Scoring | None:
    """How two towers' embeddings become scores; None for a model of one tower."""
    for source in ("fold", "export:text_encoder"):
        if source in work.inputs:
            return read_spec(work.inputs[source] / "scoring.json", Scoring)
    return None


class Judge:
    """Compares candidates with float on one split; each comparison is a result in the store."""

    def __init__(self, work: Work, data: DataSet, float_variants: tuple[Variant, ...], search: Path) -> None:
        self._work = work
        self._data = data
        self._float = float_variants
        self._search = search
        self._folder = processing_folder(work.job, work.inputs.get("fold"))
        self._memory = Memory()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def drop(self, variants: tuple[Variant, ...]) -> Drop:
        """From the float model, on the same pictures.

        Raises: EdgeVLMError: a graph cannot be run, or gives what is no number.
        """
        parts = {
            "candidate": self._identity(variants),
            "float": self._identity(self._float),
            "data": self._data.digest,
            "processing": msgspec.to_builtins(self._work.job.model.processing),
            "labels": list(self._work.job.request.labels or self._work.job.model.labels or self._data.class_names),
            "scoring": msgspec.to_builtins(scoring_of(self._work)),
            "batch": self._batch,
            # int8 kernels without VNNI saturate, so the same graph can answer differently on another processor.
            "isa": list(describe_machine().isa),
            "tools": tool_versions(*BACKENDS, "numpy", "pillow", "tokenizers", "pycocotools", "scikit-learn"),
            "code": code_digest(),
        }

        def make(out: Path) -> None:
            is_float = variants == self._float
            candidate = self._reference if is_float else self._evaluate(variants, self._reference)
            write_spec(out / "drop.json", compare_evaluations(candidate, self._reference))

        return read_spec(self._work.store.fetch("judge", parts, make).path / "drop.json", Drop)

    @cached_property
    def _reference(self) -> Evaluation:
        return self._evaluate(self._float, None)

    @property
    def _batch(self) -> int:
        return self._work.job.request.batch or 1

    def _evaluate(self, variants: tuple[Variant, ...], reference: Evaluation | None) -> Evaluation:
        name = "+".join(sorted({variant.name for variant in variants}))

        def count(done: int, n: int) -> None:
            self._work.progress(
                StepProgress(
                    name=self._work.step.name, fraction=done / n, detail=f"judging {name}: {done}/{n} pictures"
                )
            )

        folder = Path(self._folder.name)
        sessions = self._remembered(variants) if len(variants) > 1 else None
        pipeline = open_pipeline(self._work, variants, self._search, folder, sessions=sessions)
        kept = self._work.store.root.parent / "pixels"
        return evaluate(pipeline, self._data, reference=reference, batch=self._batch, folder=kept, count=count)

    def _remembered(self, variants: tuple[Variant, ...]) -> dict[str, Session]:
        """Of CLIP ViT-B/32 on 1,000 labels, each tower takes some ten seconds, and there are up to a dozen pairs."""
        identities = self._identity(variants)
        return {
            v.graph: RememberedSession(
                json.dumps(identities[v.graph], sort_keys=True), functools.partial(_open, v, self._search), self._memory
            )
            for v in variants
        }

    def _identity(self, variants: tuple[Variant, ...]) -> Mapping[str, Any]:
        return {
            v.graph: {"backend": v.backend, "file": file_digest(self._search / v.file), "session": decisive(v.session)}
            for v in variants
        }


def decisive(session: SessionOptions) -> Mapping[str, Any]:
    """What of a session's settings can change an answer: how threads wait for work cannot."""
    told = {name: value for name, value in session.entries.items() if name != NO_SPINNING}
    found: Mapping[str, Any] = msgspec.to_builtins(msgspec.structs.replace(session, entries=told))
    return found
