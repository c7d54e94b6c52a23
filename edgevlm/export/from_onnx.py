"""An ONNX file as a graph of ours: renamed, freed or fixed in its batch, and cleaned."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.errors import EdgeVLMError, ModelError
from edgevlm.export.program import BATCH, Asked, Exported, clean, open_graph, proven, save
from edgevlm.families.loading import first_line
from edgevlm.model import Graph, Model
from edgevlm.proof import Difference, first_difference
from edgevlm.runtime.spec import Array, TensorSpec

# Quantizing per channel needs opset 13 (DequantizeLinear's axis); older graphs are brought to ``opset``.
OLDEST_OPSET = 13


class OnnxSource:
    """The ONNX file as it came, with the task's names for its input and outputs, at any batch."""

    def __init__(self, model: Model) -> None:
        options = model.source.options
        (self._graph,) = model.graphs
        ((self._ours, self._theirs),) = options["inputs"].items()
        self._outputs: dict[str, str] = options["outputs"]
        self._folder = tempfile.TemporaryDirectory(prefix="edgevlm-")  # outlives the session, which may map its files
        self._location = Path(model.source.location)
        self._session = open_graph(_with_outputs(self._location, self._outputs, Path(self._folder.name)))
        first = self._session.inputs[0].shape[0]
        self.fixed_batch = first if isinstance(first, int) else None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        by_name = {spec.name: spec for spec in self._session.outputs}
        return tuple(
            TensorSpec(name=ours, dtype=by_name[theirs].dtype, shape=(BATCH, *by_name[theirs].shape[1:]))
            for ours, theirs in self._outputs.items()
        )

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        pictures = feeds[self._ours]
        n = len(pictures)
        step = self.fixed_batch or n
        runs = []
        for start in range(0, n, step):
            index = np.arange(start, start + step) % n  # a fixed batch is filled up from the front
            runs.append(self._session.run({self._theirs: pictures[index]}))
        return {ours: np.concatenate([values[theirs] for values in runs])[:n] for ours, theirs in self._outputs.items()}

    def values(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every value of the graph by its name there; none where the file is made for another batch."""
        pictures = feeds[self._ours]
        if self.fixed_batch not in (None, len(pictures)):
            return {}
        import onnx

        proto = onnx.load(self._location, load_external_data=False)
        every = {name: name for node in proto.graph.node for name in node.output if name}
        with tempfile.TemporaryDirectory(prefix="edgevlm-") as folder:
            session = open_graph(_with_outputs(self._location, every, Path(folder)), is_plain=True)
            return session.run({self._theirs: pictures})


def _with_outputs(path: Path, outputs: Mapping[str, str], folder: Path) -> Path:
    """The file itself, or a copy that also gives tensors from inside the graph."""
    import onnx_ir as ir

    program = ir.load(path)
    if set(outputs.values()) <= {value.name for value in program.graph.outputs}:
        return path
    by_name = {value.name: value for node in program.graph for value in node.outputs}
    program.graph.outputs[:] = [by_name[name] for name in outputs.values()]
    copy = folder / "source.onnx"
    save(program, copy)
    return copy


def export_onnx(asked: Asked) -> Exported:
    """The file's graph with the task's names and the batch that is asked for.

    Raises: ModelError: it is made for another batch, holds what is no number, or is not equal to its source.
    """
    model, file = asked.model, asked.file
    asked.say("reading the ONNX file")
    reference = OnnxSource(model)
    program = _renamed(model, asked.graph, asked.batch, asked.opset)
    clean(program)
    save(program, file)

    def locate(feeds: Mapping[str, Array]) -> Difference | None:
        return first_difference(file, feeds, reference.values(feeds), tolerance=asked.tolerance)

    try:
        return proven(asked, program, reference, route="onnx", locate=locate)
    except EdgeVLMError as error:
        if reference.fixed_batch in (None, asked.batch):
            raise
        raise ModelError(
            f"'{model.source.asked}' is made for batch {reference.fixed_batch} and does not run at another: "
            f"{first_line(error)}",
            hint=f"Pass --batch {reference.fixed_batch}.",
        ) from error


def _renamed(model: Model, graph: Graph, batch: int | None, opset: int) -> Any:
    """The source's graph with the task's names, only the outputs that the task wants, and the batch asked for."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    program = ir.load(model.source.location)
    _refuse_not_numbers(program, model)
    program = _modern(program, opset)
    common.RemoveInitializersFromInputsPass()(program)
    ours_of = {theirs: ours for ours, theirs in model.source.options["outputs"].items()}
    ours_of |= {theirs: ours for ours, theirs in model.source.options["inputs"].items()}
    values = {value.name: value for value in program.graph.inputs}
    values |= {value.name: value for node in program.graph for value in node.outputs}
    program.graph.outputs[:] = [values[theirs] for theirs in model.source.options["outputs"].values()]
    for name in set(ours_of.values()) & set(values) - set(ours_of):
        values[name].name = f"{name}_inside"
    for theirs, ours in ours_of.items():
        values[theirs].name = ours
    common.RemoveUnusedNodesPass()(program)
    (pixel_values,) = program.graph.inputs
    pixel_values.shape = ir.Shape([BATCH if batch is None else batch, *graph.inputs[0].shape[1:]])
    for node in program.graph:
        for value in node.outputs:
            value.shape = None  # may hold the old batch; inferred again from the input
    common.ShapeInferencePass(strict_mode=False)(program)
    for value in program.graph.outputs:
        if value.shape is not None and len(value.shape):  # inference gives up where a shape is computed
            value.shape = ir.Shape([BATCH if batch is None else batch, *value.shape[1:]])
    return program


def _modern(program: Any, opset: int) -> Any:
    if program.opset_imports.get("", OLDEST_OPSET) >= OLDEST_OPSET:
        return program
    import onnx
    import onnx_ir as ir

    return ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(program), opset))


def _refuse_not_numbers(program: Any, model: Model) -> None:
    for name, value in program.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point():
            continue
        # Infinity is what masks are made of, so only the absence of a number is an error wherever it stands.
        n_bad = int(np.isnan(tensor.numpy().astype(np.float32)).sum())
        if n_bad:
            raise ModelError(
                f"The weight '{name}' of '{model.source.asked}' holds {n_bad} values that are NaN.",
                hint="Use a checkpoint from before the training diverged.",
            )
