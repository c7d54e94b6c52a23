"""A model's graphs as ONNX files, each proven equal to its source on real inputs. The same graph gives the same bytes.

from_torch   PyTorch, through ``torch.onnx.export(dynamo=True)``
from_onnx    an ONNX file, which is renamed, freed or fixed in its batch, and cleaned
texts        what a text tower needs beside that
program      what both share: writing, cleaning, proving
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from edgevlm.errors import UsageError, did_you_mean
from edgevlm.export import from_torch
from edgevlm.export.from_onnx import OnnxSource, export_onnx
from edgevlm.export.from_torch import TorchSession, export_torch, proven_at_one
from edgevlm.export.program import OPSET, Asked, Exported, data_file
from edgevlm.export.texts import check_tokens, export_at_length, export_texts
from edgevlm.families import load_family
from edgevlm.families.loading import load_module
from edgevlm.model import Graph, Model
from edgevlm.plan import TEXT_ENCODER
from edgevlm.progress import Progress, StepProgress, silent
from edgevlm.proof import TOLERANCE
from edgevlm.runtime.backends import Session
from edgevlm.runtime.spec import Array, Scoring

__all__ = ["Exported", "export_graph", "graph_of", "open_source", "scoring_of", "traced_program"]


def export_graph(
    model: Model,
    graph_name: str,
    *,
    batch: int | None,
    out: Path,
    samples: Mapping[str, Array],
    opset: int = OPSET,
    tolerance: float = TOLERANCE,
    text_length: int | None = None,
    progress: Progress = silent,
) -> Exported:
    """Write ``<out>/<graph_name>.onnx`` and prove it equal to the model that it came from.

    Args:
        batch: pictures in a call; None leaves it free, and the graph is then proven at two sizes.
        samples: real inputs by name, along the first axis: pictures that went through the model's preprocessing, or
            token ids padded to the full length. Where the graph leaves the length of a text free, that is tried, proven
            and else given up, with a note.
        text_length: tokens of every text instead, where the proof says that padding changes nothing.
    Raises:
        ModelError: an operator has no ONNX form, weights or outputs are not numbers, the graph cannot have this
            batch, or it is not equal to its source; the first node where they part is named.
    """
    out.mkdir(parents=True, exist_ok=True)
    asked = Asked(
        model=model,
        graph=graph_of(model, graph_name),
        batch=batch,
        samples=samples,
        file=out / f"{graph_name}.onnx",
        opset=opset,
        tolerance=tolerance,
        say=partial(_say, progress, f"export:{graph_name}"),
    )
    try:
        return _export(asked, text_length if graph_name == TEXT_ENCODER else None, progress)
    except BaseException:
        for path in (asked.file, data_file(asked.file)):
            path.unlink(missing_ok=True)
        raise


def _export(asked: Asked, text_length: int | None, progress: Progress) -> Exported:
    model, graph = asked.model, asked.graph
    text = model.processing.text
    if text is not None and graph.name == TEXT_ENCODER:
        check_tokens(model, text)
    if not model.family:
        return export_onnx(asked)
    if all(isinstance(size, int) for spec in graph.inputs for size in spec.shape[1:]):
        made = export_torch(asked)
    elif text is None:
        made = proven_at_one(asked, export_torch(asked))
    else:
        made = export_texts(asked, text, progress=progress)
    return made if text_length is None else export_at_length(asked, made, text_length)


def open_source(model: Model, graph_name: str) -> Session:
    """The model as it came, in its own framework, behind the runtime's ``Session``: the reference of every proof."""
    graph = graph_of(model, graph_name)
    return TorchSession(model, graph) if model.family else OnnxSource(model)


def traced_program(model: Model, graph_name: str, samples: Mapping[str, Array], *, opset: int = OPSET) -> Any:
    """The traced PyTorch program behind an exported graph of free batch; the graph's values are named after its nodes.

    Returns: a ``torch.export.ExportedProgram``.
    Raises:  ModelError: the graph cannot be traced so.
    """
    return from_torch.traced_program(model, graph_of(model, graph_name), samples, opset=opset)


def scoring_of(model: Model) -> Scoring | None:
    """How the model's two towers become scores; None for a model of one tower."""
    return load_family(model.family).scoring(load_module(model)) if len(model.graphs) > 1 else None


def graph_of(model: Model, name: str) -> Graph:
    """The graph called ``name``."""
    found = next((graph for graph in model.graphs if graph.name == name), None)
    if found is None:
        names = [graph.name for graph in model.graphs]
        raise UsageError(f"'{model.name}' has no graph '{name}'.", hint=did_you_mean(name, names))
    return found


def _say(progress: Progress, step: str, detail: str) -> None:
    progress(StepProgress(name=step, detail=detail))
