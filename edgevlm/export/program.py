"""A graph on its way to a file: what is asked for, what an ONNX program is cleaned of, and the proof of the result."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.errors import BundleError, ModelError
from edgevlm.model import Graph, Model
from edgevlm.proof import TOLERANCE, Difference, prove_equal
from edgevlm.report.spec import Proof
from edgevlm.runtime.backends import Session, load_backend
from edgevlm.runtime.spec import Array, SessionOptions, Spec, TensorSpec

OPSET = 20
BATCH = "batch"

# A protobuf message must stay under 2 GiB; half of that leaves room for what a rewrite adds.
EXTERNAL_ABOVE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """An export that is asked for.

    Args:
        batch: pictures in a call; None leaves it free, and the graph is then proven at two sizes.
        samples: real inputs by name, along the first axis.
        file: where the graph is written; large weights lie beside it.
        say: hears what is being done, in words.
    """

    model: Model
    graph: Graph
    batch: int | None
    samples: Mapping[str, Array]
    file: Path
    opset: int = OPSET
    tolerance: float = TOLERANCE
    say: Callable[[str], None] = lambda _: None


class Exported(Spec, frozen=True, kw_only=True):
    """A graph on disk.

    Args:
        file: the graph, relative to the folder that it was written to.
        files: every file of the graph, ``file`` first, then external data.
        notes: what could not be had, a sentence each.
    """

    name: str
    file: str
    files: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    n_bytes: int
    proof: Proof
    notes: tuple[str, ...] = ()


def proven(
    asked: Asked,
    program: Any,
    reference: Session,
    *,
    route: str,
    locate: Callable[[Mapping[str, Array]], Difference | None],
) -> Exported:
    """The graph on disk, proven equal to ``reference``.

    Args: locate: the first node where the two part, for the message where they do.
    """
    asked.say("comparing it with the source")
    session = open_graph(asked.file)
    proof = prove_equal(
        session,
        reference,
        samples=asked.samples,
        # A free batch is proven at the smallest size and at one that was not traced.
        batches=(asked.batch,) if asked.batch else (1, 3),
        tolerance=asked.tolerance,
        component=asked.graph.name,
        route=route,
        n_nodes=sum(1 for _ in program.graph.all_nodes()),
        locate=locate,
    )
    files = [path for path in (asked.file, data_file(asked.file)) if path.is_file()]
    return Exported(
        name=asked.graph.name,
        file=asked.file.name,
        files=tuple(path.name for path in files),
        inputs=session.inputs,
        outputs=session.outputs,
        opset=program.opset_imports[""],
        n_bytes=sum(path.stat().st_size for path in files),
        proof=proof,
    )


def clean(program: Any) -> None:
    """Leave only what a graph computes: stack traces hold paths of this machine, and differ from run to run."""
    from onnx_ir.passes import common

    common.ClearMetadataAndDocStringPass()(program)
    for place in (program, program.graph):
        place.metadata_props.clear()
        place.doc_string = None
    for value in (*program.graph.inputs, *program.graph.outputs, *program.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for node in program.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None


def name_free(program: Any, graph: Graph) -> None:
    """Call the free dimensions as the graph does (``batch``); torch numbers them differently each time."""
    import onnx_ir as ir

    names = {
        str(size.value): str(name)
        for value, spec in zip(program.graph.inputs, graph.inputs, strict=True)
        for size, name in zip(value.shape, spec.shape, strict=True)
        if not isinstance(size, int)
    }
    if not names:
        return
    symbols = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")

    def renamed(text: str) -> str:
        return symbols.sub(lambda found: names[found[0]], text)

    values = [*program.graph.inputs, *(value for node in program.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                [d if isinstance(d, int) else renamed(d.value) if d.value else None for d in value.shape]
            )


def save(program: Any, file: Path) -> None:
    import onnx_ir as ir

    external = _external_data(program, file)
    if external is None:
        ir.external_data.load_to_model(program)  # the source may keep small weights beside it
    ir.save(program, file, external_data=external)


def _external_data(program: Any, file: Path) -> str | None:
    tensors = (value.const_value for value in program.graph.initializers.values())
    n_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return data_file(file).name if n_bytes > EXTERNAL_ABOVE_BYTES else None


def data_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.data")


def open_graph(file: Path, *, is_plain: bool = False) -> Session:
    """Open a graph; ``is_plain`` leaves every node as it is, so that all their outputs can be had."""
    try:
        return load_backend("onnxruntime").open(file, SessionOptions(graph_level="none" if is_plain else "all"))
    except BundleError as error:
        raise ModelError(error.message, hint="Use operators and an opset that this ONNX Runtime has.") from error
