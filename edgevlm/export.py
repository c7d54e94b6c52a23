"""A model's graphs as ONNX files, each proven equal to its source on real inputs.

PyTorch goes through ``torch.onnx.export(dynamo=True)``, and through Transformers' own exporter where that fails; an
ONNX file is only renamed, freed or fixed in its batch, and cleaned. The same graph always gives the same bytes.
"""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgevlm.errors import BundleError, EdgeVLMError, ModelError, UsageError, did_you_mean
from edgevlm.families import load_family
from edgevlm.families.loading import first_line, import_torch, load_module, quiet
from edgevlm.model import Graph, Model
from edgevlm.plan import TEXT_ENCODER
from edgevlm.progress import Note, Progress, StepProgress, silent
from edgevlm.proof import TOLERANCE, Difference, first_difference, prove_equal, prove_lengths
from edgevlm.report.spec import Proof
from edgevlm.runtime.backends import Session, load_backend
from edgevlm.runtime.spec import Array, Scoring, SessionOptions, Spec, TensorSpec, TextProcessing
from edgevlm.runtime.text import load_tokenizer, tokenize

OPSET = 20
BATCH = "batch"

# A protobuf message must stay under 2 GiB; half of that leaves room for what a rewrite adds.
EXTERNAL_ABOVE_BYTES = 1 << 30
# Quantizing per channel needs opset 13 (DequantizeLinear's axis); older graphs are brought to ``opset``.
OLDEST_OPSET = 13


# Texts in which tokenizers differ: case, spaces, punctuation, digits, accents, ligatures, none at all, too many. The
# last two are the shortest and the longest that there can be.
_TEXTS = ("a photo of a cat", "A Photo,  of a CAT!", "don't: 1234 (x) ", "naïve ﬁné №5", "", "a photo of " * 50)
_WORD_COUNTS = (1, 2, 3, 5, 8, 13, 21, 34, 55)


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
    graph = graph_of(model, graph_name)
    say = partial(_say, progress, f"export:{graph_name}")
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{graph_name}.onnx"
    try:
        if model.processing.text is not None and graph_name == TEXT_ENCODER:
            _check_tokens(model, model.processing.text)
        if model.family:
            made = _export_family(model, graph, batch, file, samples, opset, tolerance, say, progress)
            if text_length is None or graph_name != TEXT_ENCODER:
                return made
            return _export_at_length(model, graph, made, text_length, batch, file, samples, opset, tolerance, say)
        return _export_onnx(model, graph, batch, file, samples, opset, tolerance, say)
    except BaseException:
        for path in (file, _data_file(file)):
            path.unlink(missing_ok=True)
        raise


def open_source(model: Model, graph_name: str) -> Session:
    """The model as it came, in its own framework, behind the runtime's ``Session``: the reference of every proof."""
    graph = graph_of(model, graph_name)
    return TorchSession(model, graph) if model.family else OnnxSource(model)


def traced_program(model: Model, graph_name: str, samples: Mapping[str, Array], *, opset: int = OPSET) -> Any:
    """The traced PyTorch program behind an exported graph of free batch; the graph's values are named after its nodes.

    Returns: a ``torch.export.ExportedProgram``.
    Raises:  ModelError: the graph cannot be traced so.
    """
    torch = import_torch()
    graph = graph_of(model, graph_name)
    index = np.arange(2) % len(next(iter(samples.values())))
    inputs = tuple(torch.from_numpy(np.ascontiguousarray(samples[spec.name][index])) for spec in graph.inputs)
    try:
        return _traced(model, graph, inputs, is_free=True, opset=opset).exported_program
    except EdgeVLMError:
        raise
    except Exception as error:  # the exporter passes on whatever tracing the model raises
        raise _refused(model, graph, error, is_free=True) from error


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


def _check_tokens(model: Model, text: TextProcessing) -> None:
    """Whether the device cuts texts as Transformers does, whose Python classes may do more than ``tokenizer.json``.

    Raises: ModelError: they differ; a text is named.
    """
    with quiet():
        import transformers

        try:
            theirs = transformers.AutoTokenizer.from_pretrained(model.source.location, local_files_only=True)
        except Exception:  # such as a missing sentencepiece; then nobody but tokenizer.json says how texts are cut
            return
        expected = theirs(list(_TEXTS), padding="max_length", truncation=True, max_length=text.max_length)["input_ids"]
    got = tokenize(_TEXTS, load_tokenizer(Path(model.tokenizer_file), text), text)["input_ids"].tolist()
    for sentence, ours, reference in zip(_TEXTS, got, expected, strict=True):
        if ours != reference:
            raise ModelError(
                f"The tokenizer.json of '{model.source.asked}' cuts '{sentence[:40]}' into other tokens than "
                f"Transformers' {type(theirs).__name__}.",
                hint="Write it anew with AutoTokenizer.from_pretrained(...).save_pretrained(...).",
            )


# --- from PyTorch -----------------------------------------------------------------------------------------


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


def _export_family(
    model: Model,
    graph: Graph,
    batch: int | None,
    file: Path,
    samples: Mapping[str, Array],
    opset: int,
    tolerance: float,
    say: Callable[[str], None],
    progress: Progress,
) -> Exported:
    """With texts at their own length where the family claims that they may be and the proof agrees."""
    text = model.processing.text
    is_fixed = all(isinstance(size, int) for spec in graph.inputs for size in spec.shape[1:])
    if text is None or is_fixed:
        made = _export_torch(model, graph, batch, file, samples, opset, tolerance, say)
        return made if is_fixed else _proven_at_one(model, graph, made, batch, file, samples, tolerance)
    try:
        made = _export_torch(model, graph, batch, file, samples, opset, tolerance, say)
        say("comparing texts at their own length with padded ones")
        texts, lengths = _texts_and_lengths(model, text)
        error = prove_lengths(
            _open(file), TorchSession(model, graph), texts=texts, lengths=lengths, tolerance=tolerance
        )
    except ModelError as refusal:
        note = f"Every text is padded to {text.max_length} tokens, which takes time: {refusal.message}"
        progress(Note(note))
        fixed = _with_length(graph, text.max_length)
        made = _export_torch(model, fixed, batch, file, samples, opset, tolerance, say)
        return msgspec.structs.replace(made, notes=(note,))
    proof = msgspec.structs.replace(made.proof, lengths=tuple(sorted(set(lengths))), length_error=error)
    return msgspec.structs.replace(made, proof=proof)


def _proven_at_one(
    model: Model,
    graph: Graph,
    made: Exported,
    batch: int | None,
    file: Path,
    samples: Mapping[str, Array],
    tolerance: float,
) -> Exported:
    """Where more than the batch is free, it may also be 1, which tracing takes for something else than a number."""
    ones = {
        spec.name: samples[spec.name][
            tuple(slice(None) if i == 0 or isinstance(size, int) else slice(0, 1) for i, size in enumerate(spec.shape))
        ]
        for spec in graph.inputs
    }
    proof = prove_equal(
        _open(file),
        TorchSession(model, graph),
        samples=ones,
        batches=(batch or 1,),
        tolerance=tolerance,
        component=graph.name,
        route=made.proof.route,
        n_nodes=made.proof.n_nodes,
        locate=lambda _: None,
    )
    worst = max(made.proof.max_relative_error, proof.max_relative_error)
    return msgspec.structs.replace(made, proof=msgspec.structs.replace(made.proof, max_relative_error=worst))


def _export_at_length(
    model: Model,
    graph: Graph,
    free: Exported,
    length: int,
    batch: int | None,
    file: Path,
    samples: Mapping[str, Array],
    opset: int,
    tolerance: float,
    say: Callable[[str], None],
) -> Exported:
    """At one length, which a backend can plan for; ``free`` was proven to give at any length what it gives padded."""
    if not free.proof.lengths:
        raise ModelError(
            f"The text tower of '{model.name}' cannot take {length} tokens: padding is part of what it sees.",
            hint="Leave --text-length out.",
        )
    cut = {name: value[:, :length] if value.ndim > 1 else value for name, value in samples.items()}
    made = _export_torch(model, _with_length(graph, length), batch, file, cut, opset, tolerance, say)
    note = (
        f"Every text has {length} tokens, as asked: longer ones are cut, and that padding changes nothing was proven "
        f"(largest relative error {free.proof.length_error or 0.0:.1e})."
    )
    return msgspec.structs.replace(made, notes=(note,))


def _with_length(graph: Graph, length: int) -> Graph:
    inputs = tuple(
        msgspec.structs.replace(spec, shape=(*spec.shape[:1], *(_fixed(size, length) for size in spec.shape[1:])))
        for spec in graph.inputs
    )
    return msgspec.structs.replace(graph, inputs=inputs)


def _fixed(size: int | str, length: int) -> int:
    return size if isinstance(size, int) else length


def _texts_and_lengths(model: Model, text: TextProcessing) -> tuple[dict[str, Array], list[int]]:
    """Padded token ids of texts from no word to too many, and how long each is unpadded."""
    words = ("a photo of " * text.max_length).split()
    texts = [*_TEXTS, *(" ".join(words[:n]) for n in _WORD_COUNTS if n < text.max_length)]
    padded = tokenize(texts, load_tokenizer(Path(model.tokenizer_file), text), text)
    own = msgspec.structs.replace(text, padding="longest")
    tokenizer = load_tokenizer(Path(model.tokenizer_file), own)
    lengths = [tokenize([each], tokenizer, own)["input_ids"].shape[1] for each in texts]
    return padded, lengths


def _export_torch(
    model: Model,
    graph: Graph,
    batch: int | None,
    file: Path,
    samples: Mapping[str, Array],
    opset: int,
    tolerance: float,
    say: Callable[[str], None],
) -> Exported:
    torch = import_torch()
    say("loading the weights")
    reference = TorchSession(model, graph)
    # Traced at 2 where the batch is free: a 1 would be taken for a constant.
    n_traced = batch or 2
    index = np.arange(n_traced) % len(next(iter(samples.values())))
    traced = {spec.name: _cut(samples[spec.name][index], spec) for spec in graph.inputs}
    inputs = tuple(torch.from_numpy(np.ascontiguousarray(value)) for value in traced.values())
    say("tracing and translating to ONNX")
    program, values_of, route = _onnx_from_torch(model, graph, inputs, is_free=batch is None, opset=opset)
    _clean(program)
    _name_free(program, graph)
    _save(program, file)

    def locate(feeds: Mapping[str, Array]) -> Difference | None:
        return None if values_of is None else first_difference(file, feeds, values_of(feeds), tolerance=tolerance)

    return _proven(graph, program, file, reference, samples, batch, tolerance, route, locate, say)


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


# --- from an ONNX file ------------------------------------------------------------------------------------


class OnnxSource:
    """The ONNX file as it came, with the task's names for its input and outputs, at any batch."""

    def __init__(self, model: Model) -> None:
        options = model.source.options
        (self._graph,) = model.graphs
        ((self._ours, self._theirs),) = options["inputs"].items()
        self._outputs: dict[str, str] = options["outputs"]
        self._folder = tempfile.TemporaryDirectory(prefix="edgevlm-")  # outlives the session, which may map its files
        self._location = Path(model.source.location)
        self._session = _open(_with_outputs(self._location, self._outputs, Path(self._folder.name)))
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
            session = _open(_with_outputs(self._location, every, Path(folder)), is_plain=True)
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
    _save(program, copy)
    return copy


def _export_onnx(
    model: Model,
    graph: Graph,
    batch: int | None,
    file: Path,
    samples: Mapping[str, Array],
    opset: int,
    tolerance: float,
    say: Callable[[str], None],
) -> Exported:
    say("reading the ONNX file")
    reference = OnnxSource(model)
    program = _renamed(model, graph, batch, opset)
    _clean(program)
    _save(program, file)

    def locate(feeds: Mapping[str, Array]) -> Difference | None:
        return first_difference(file, feeds, reference.values(feeds), tolerance=tolerance)

    try:
        return _proven(graph, program, file, reference, samples, batch, tolerance, "onnx", locate, say)
    except EdgeVLMError as error:
        if reference.fixed_batch in (None, batch):
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


# --- both -------------------------------------------------------------------------------------------------


def _proven(
    graph: Graph,
    program: Any,
    file: Path,
    reference: Session,
    samples: Mapping[str, Array],
    batch: int | None,
    tolerance: float,
    route: str,
    locate: Callable[[Mapping[str, Array]], Difference | None],
    say: Callable[[str], None],
) -> Exported:
    say("comparing it with the source")
    session = _open(file)
    proof = prove_equal(
        session,
        reference,
        samples=samples,
        # A free batch is proven at the smallest size and at one that was not traced.
        batches=(batch,) if batch else (1, 3),
        tolerance=tolerance,
        component=graph.name,
        route=route,
        n_nodes=sum(1 for _ in program.graph.all_nodes()),
        locate=locate,
    )
    files = [path for path in (file, _data_file(file)) if path.is_file()]
    return Exported(
        name=graph.name,
        file=file.name,
        files=tuple(path.name for path in files),
        inputs=session.inputs,
        outputs=session.outputs,
        opset=program.opset_imports[""],
        n_bytes=sum(path.stat().st_size for path in files),
        proof=proof,
    )


def _clean(program: Any) -> None:
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


def _name_free(program: Any, graph: Graph) -> None:
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


def _save(program: Any, file: Path) -> None:
    import onnx_ir as ir

    external = _external_data(program, file)
    if external is None:
        ir.external_data.load_to_model(program)  # the source may keep small weights beside it
    ir.save(program, file, external_data=external)


def _external_data(program: Any, file: Path) -> str | None:
    tensors = (value.const_value for value in program.graph.initializers.values())
    n_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return _data_file(file).name if n_bytes > EXTERNAL_ABOVE_BYTES else None


def _data_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.data")


def _open(file: Path, *, is_plain: bool = False) -> Session:
    """Open a graph; ``is_plain`` leaves every node as it is, so that all their outputs can be had."""
    try:
        return load_backend("onnxruntime").open(file, SessionOptions(graph_level="none" if is_plain else "all"))
    except BundleError as error:
        raise ModelError(error.message, hint="Use operators and an opset that this ONNX Runtime has.") from error


def _shape(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else batch for dim in spec.shape)


def _say(progress: Progress, step: str, detail: str) -> None:
    progress(StepProgress(name=step, detail=detail))
