"""A model before any heavy library is loaded: task, graphs to be, processing, provenance."""

from __future__ import annotations

from typing import Any

from edgevlm.runtime.spec import Processing, Spec, TensorSpec


class Graph(Spec, frozen=True, kw_only=True):
    """A graph to be exported. Dimensions: a number, or a name where it is free (``"batch"``).

    Args:
        name: ``model``, ``image_encoder``, ``text_encoder``, ...
        outputs: names in order; their shapes are known after export.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]


class Source(Spec, frozen=True, kw_only=True):
    """Where a model comes from, and how its weights are loaded when (and only when) they are needed.

    Args:
        kind: a name in ``edgevlm.ingest.KINDS``.
        location: the local directory, ONNX file or ``package.module:factory`` that holds the weights.
        asked: what the user wrote.
        digest: sha256 over the contents (weights, config, processing, tokenizer), never over names.
    """

    kind: str
    location: str
    asked: str
    revision: str | None = None
    digest: str
    weights_sha256: str
    licence: str | None = None
    options: dict[str, Any] = {}


class Model(Spec, frozen=True, kw_only=True):
    """What is to be compiled.

    Args:
        name: short, for people and file names.
        family: a name in ``edgevlm.families.FAMILIES``; empty for an ONNX file, which needs no export.
        tokenizer_file: local path of a ``tokenizers`` JSON; empty where the task takes no text.
        labels: class names by index; empty where there are none.
    """

    name: str
    task: str
    family: str
    graphs: tuple[Graph, ...]
    processing: Processing
    source: Source
    labels: tuple[str, ...] = ()
    tokenizer_file: str = ""
    warnings: tuple[str, ...] = ()
