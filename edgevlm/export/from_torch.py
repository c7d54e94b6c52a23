"""A graph of a PyTorch model as ONNX: by ``torch.onnx.export(dynamo=True)``, else by Transformers' own exporter."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec
import numpy as np

from edgevlm.errors import EdgeVLMError, ModelError
from edgevlm.export.program import BATCH, OPSET, Asked, Exported, clean, name_free, open_graph, proven, save
from edgevlm.families import load_family
from edgevlm.families.loading import first_line, import_torch, load_module, quiet
from edgevlm.model import Graph, Model
from edgevlm.proof import Difference, first_difference, prove_equal
from edgevlm.runtime.spec import Array, TensorSpec


class TorchSession:
    """A graph of a model in eager PyTorch."""

    def __init__(self, model: Model, graph: Graph) -> None:
        self._torch = import_torch()
        self._graph = graph
        self._call = partial(load_family(model.family).call, load_module(model), graph.name)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        values = self.run({spec.name: np.zeros(_shape(spec, 1), spec.dtype) for spec in self._graph.inputs})
        return tuple(
            TensorSpec(name=name, dtype=str(value.dtype), shape=(BATCH, *value.shape[1:]))
            for name, value in values.items()
        )

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        torch = self._torch
        # A copy: torch warns about arrays that may not be written to.
        inputs = [torch.tensor(feeds[spec.name]) for spec in self._graph.inputs]
        with torch.inference_mode():
            outputs = self._call(*inputs)
        return {name: value.numpy() for name, value in zip(self._graph.outputs, outputs, strict=True)}


def export_torch(asked: Asked) -> Exported:
    """The family's call of one graph, traced and translated, proven equal to PyTorch.

    Raises: ModelError: it cannot be traced, has an operator without an ONNX form, or is not equal.
    """
    model, graph, file, samples = asked.model, asked.graph, asked.file, asked.samples
    torch = import_torch()
    asked.say("loading the weights")
    reference = TorchSession(model, graph)
    # Traced at 2 where the batch is free: a 1 would be taken for a constant.
    n_traced = asked.batch or 2
    index = np.arange(n_traced) % len(next(iter(samples.values())))
    traced = {spec.name: _cut(samples[spec.name][index], spec) for spec in graph.inputs}
    inputs = tuple(torch.from_numpy(np.ascontiguousarray(value)) for value in traced.values())
    asked.say("tracing and translating to ONNX")
    program, values_of, route = _onnx_from_torch(model, graph, inputs, is_free=asked.batch is None, opset=asked.opset)
    clean(program)
    name_free(program, graph)
    save(program, file)

    def locate(feeds: Mapping[str, Array]) -> Difference | None:
        return None if values_of is None else first_difference(file, feeds, values_of(feeds), tolerance=asked.tolerance)

    return proven(asked, program, reference, route=route, locate=locate)


def proven_at_one(asked: Asked, made: Exported) -> Exported:
    """Where more than the batch is free, it may also be 1, which tracing takes for something else than a number."""
    ones = {
        spec.name: asked.samples[spec.name][
            tuple(slice(None) if i == 0 or isinstance(size, int) else slice(0, 1) for i, size in enumerate(spec.shape))
        ]
        for spec in asked.graph.inputs
    }
    proof = prove_equal(
        open_graph(asked.file),
        TorchSession(asked.model, asked.graph),
        samples=ones,
        batches=(asked.batch or 1,),
        tolerance=asked.tolerance,
        component=asked.graph.name,
        route=made.proof.route,
        n_nodes=made.proof.n_nodes,
        locate=lambda _: None,
    )
    worst = max(made.proof.max_relative_error, proof.max_relative_error)
    return msgspec.structs.replace(made, proof=msgspec.structs.replace(made.proof, max_relative_error=worst))


def traced_program(model: Model, graph: Graph, samples: Mapping[str, Array], *, opset: int = OPSET) -> Any:
    """The traced PyTorch program behind an exported graph of free batch; the graph's values are named after its nodes.

    Returns: a ``torch.export.ExportedProgram``.
    Raises:  ModelError: the graph cannot be traced so.
    """
    torch = import_torch()
    index = np.arange(2) % len(next(iter(samples.values())))
    inputs = tuple(torch.from_numpy(np.ascontiguousarray(samples[spec.name][index])) for spec in graph.inputs)
    try:
        return _traced(model, graph, inputs, is_free=True, opset=opset).exported_program
    except EdgeVLMError:
        raise
    except Exception as error:  # the exporter passes on whatever tracing the model raises
        raise _refused(model, graph, error, is_free=True) from error


def _onnx_from_torch(
    model: Model, graph: Graph, inputs: tuple[Any, ...], *, is_free: bool, opset: int
) -> tuple[Any, Callable[[Mapping[str, Array]], dict[str, Array]] | None, str]:
    """The ONNX program, a function that gives every value of the traced program by name, and how it was made."""
    torch = import_torch()
    dynamic = [_free_axes(spec, is_free=is_free) for spec in graph.inputs]
    names = [spec.name for spec in graph.inputs]
    torch.manual_seed(0)
    with quiet(), torch.no_grad():
        try:
            made = _traced(model, graph, inputs, is_free=is_free, opset=opset)
            return made.model, partial(_values_of, made.exported_program, graph), "torch.onnx.export(dynamo=True)"
        except EdgeVLMError:
            raise
        except Exception as error:  # the exporter passes on whatever tracing the model raises
            first_error = error
        try:
            exporters: Any = importlib.import_module("transformers.exporters")
            exported = exporters.OnnxExporter().export(
                _wrapper(model, graph, is_named=True),
                dict(zip(names, inputs, strict=True)),
                config=exporters.OnnxConfig(
                    opset_version=opset,
                    dynamic_shapes=dict(zip(names, dynamic, strict=True)) if any(dynamic) else None,
                ),
            )
            return exported.program, None, "transformers.exporters.OnnxExporter"
        except Exception:  # the second attempt's reason is about its own patches; the first one's is about the model
            raise _refused(model, graph, first_error, is_free) from first_error


def _free_axes(spec: TensorSpec, *, is_free: bool) -> dict[int, Any] | None:
    """The axes of an input that stay free: those with a name, but the batch only where it is asked to."""
    torch = import_torch()
    axes = [i for i, size in enumerate(spec.shape) if isinstance(size, str) and (i or is_free)]
    return dict.fromkeys(axes, torch.export.Dim.DYNAMIC) or None


def _cut(value: Array, spec: TensorSpec) -> Array:
    """To half its size wherever an axis behind the batch is free: its full size would be taken for a constant."""
    for axis, size in enumerate(spec.shape[1:], start=1):
        if isinstance(size, str):
            value = value.take(np.arange(max(1, value.shape[axis] // 2)), axis=axis)
    return value


def _traced(model: Model, graph: Graph, inputs: tuple[Any, ...], *, is_free: bool, opset: int) -> Any:
    """torch's ``ONNXProgram``."""
    torch = import_torch()
    dynamic = [_free_axes(spec, is_free=is_free) for spec in graph.inputs]
    torch.manual_seed(0)
    with quiet(), torch.no_grad():
        return torch.onnx.export(
            _wrapper(model, graph, is_named=False),
            inputs,
            dynamo=True,
            opset_version=opset,
            input_names=[spec.name for spec in graph.inputs],
            output_names=list(graph.outputs),
            dynamic_shapes=(tuple(dynamic),) if any(dynamic) else None,
            verbose=False,
        )


def _wrapper(model: Model, graph: Graph, *, is_named: bool) -> Any:
    """The family's call as a module: positional in and a tuple out, or by name in and a dict out."""
    torch = import_torch()
    module = load_module(model)
    call = load_family(model.family).call

    class Positional(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.module = module
            self.config = getattr(module, "config", None)

        def forward(self, *inputs: Any) -> tuple[Any, ...]:
            return call(self.module, graph.name, *inputs)

    class Named(Positional):
        def forward(self, **inputs: Any) -> dict[str, Any]:  # type: ignore[override]
            outputs = call(self.module, graph.name, *(inputs[spec.name] for spec in graph.inputs))
            return dict(zip(graph.outputs, outputs, strict=True))

    return (Named() if is_named else Positional()).eval()


def _values_of(program: Any, graph: Graph, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Every value of the traced program by name; the exporter names ONNX values after them."""
    torch = import_torch()
    given = iter(torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in graph.inputs)
    weights = {**program.constants, **program.state_dict}
    values: dict[str, Array] = {}

    class Recorder(torch.fx.Interpreter):  # type: ignore[misc, name-defined]
        def run_node(self, n: Any) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                values[n.name] = value.detach().numpy()
            return value

    kinds = torch.export.graph_signature.InputKind
    flat = [
        next(given) if spec.kind == kinds.USER_INPUT else weights[spec.target]
        for spec in program.graph_signature.input_specs
    ]
    with torch.inference_mode():
        Recorder(program.graph_module).run(*flat)
    return values


def _refused(model: Model, graph: Graph, error: BaseException, is_free: bool) -> ModelError:
    """The exporter's refusal in one sentence: the operator that has no ONNX form, else its own first words."""
    messages = []
    cause: BaseException | None = error
    while cause is not None:
        messages.append(str(cause))
        cause = cause.__cause__
    found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", "\n".join(messages))
    if found:
        return ModelError(
            f"'{model.source.asked}' uses the operator '{found[1]}' ({graph.name}), which has no ONNX form.",
            hint="Replace it in the model by operators that ONNX has.",
        )
    told = next((first_line(Exception(text)) for text in reversed(messages) if text.strip()), type(error).__name__)
    return ModelError(
        f"The graph '{graph.name}' of '{model.source.asked}' cannot be traced: {told}",
        hint="Pass --batch 1, which fixes the batch." if is_free else "Report the model and this message.",
    )


def _shape(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else batch for dim in spec.shape)
