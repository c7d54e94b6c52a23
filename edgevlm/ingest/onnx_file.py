"""An ONNX file with a card: its header is read and checked; its weights are only hashed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgevlm.errors import MissingToolError, ModelError, UsageError, did_you_mean
from edgevlm.families import CLASSIFY, DETECT, SEGMENT
from edgevlm.families.loading import first_line
from edgevlm.ingest.asked import Asked
from edgevlm.ingest.card import (
    Card,
    card_labels,
    card_outputs,
    card_processing,
    find_card,
    read_card,
    whole_processing,
)
from edgevlm.ingest.hugging_face import digest_of
from edgevlm.ingest.weights import combined_sha256, licence_of, sha256_of
from edgevlm.model import Graph, Model, Source
from edgevlm.runtime.spec import QueryDecoding, TensorSpec


def read_onnx_file(asked: Asked) -> Model:
    """A model from an ONNX file and its card.

    Raises: ModelError: the file is broken, too new or not an image model. UsageError: the card is wrong.
    """
    path = Path(asked.name)
    if not path.is_file():
        raise UsageError(f"There is no file '{path}'.", hint=asked.nearest() or "Check the path.")
    proto = load_header(path)
    card_file = find_card(path, asked.card)
    card = read_card(card_file)
    if asked.task not in (None, card.task):
        raise UsageError(
            f"'{card_file}' says that '{path.name}' does {card.task}, not {asked.task}.",
            hint=f"Use --task {card.task}.",
        )
    input_name, size = _image_input(proto, card, path)
    image = card_processing(card, where=path.name, graph_size=size, image_size=asked.image_size)
    outputs = _outputs(proto, card, path)
    labels = labels_of(asked, card, card_file, _n_classes(proto, card, outputs))
    pixel_values = TensorSpec(name=image.input_name, dtype="float32", shape=("batch", 3, image.height, image.width))
    graphs = (
        Graph(
            name="model",
            inputs=(pixel_values,),
            outputs=tuple(outputs),
        ),
    )
    options = {"inputs": {image.input_name: input_name}, "outputs": outputs}
    files = (path, *external_files(proto, path))
    weights_sha256 = combined_sha256([sha256_of(file) for file in files])
    processing = whole_processing(card, card_file, image)
    source = Source(
        kind=asked.kind,
        location=str(path.resolve()),
        asked=asked.name,
        digest=digest_of([weights_sha256], card.task, graphs, processing, options, labels),
        weights_sha256=weights_sha256,
        licence=card.licence or licence_of(path.parent),
        options=options,
    )
    return Model(
        name=card.name or path.stem,
        task=card.task,
        family="",
        graphs=graphs,
        processing=processing,
        source=source,
        labels=labels,
    )


def labels_of(asked: Asked, card: Card, card_file: Path, n_classes: int | None) -> tuple[str, ...]:
    """The class names, checked against the number of logits where it is known.

    Raises: UsageError: they are not as many.
    """
    if asked.labels and card.task not in (CLASSIFY, DETECT, SEGMENT):
        raise UsageError(f"Labels were given, and {card.task} has none.", hint="Leave --labels out.")
    labels = asked.labels or card_labels(card, card_file)
    if labels and n_classes is not None and len(labels) != n_classes:
        raise UsageError(
            f"There are {len(labels)} labels for '{asked.name}', which has {n_classes} classes.",
            hint="Give one label for each class, in the order of the logits.",
        )
    return labels


def load_header(path: Path) -> Any:
    """The ONNX file without its external data, its versions and operators checked.

    Raises: ModelError: it is no ONNX file, is too new for the installed onnx, or has an operator nobody knows.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingToolError(
            "onnx is not installed, and compiling an ONNX file needs it.", hint="Run: pip install 'edgevlm[compile]'"
        ) from error
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own error, whose class has no stable home
        raise ModelError(
            f"'{path}' is not a whole ONNX file: {first_line(error)}.", hint="Get the file again."
        ) from error
    if not proto.graph.node or not proto.graph.output:
        raise ModelError(f"'{path}' is not a whole ONNX file: its graph is empty.", hint="Get the file again.")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"'{path}' has ONNX IR version {proto.ir_version}, and the installed onnx {onnx.__version__} reads up to "
            f"{onnx.IR_VERSION}.",
            hint="Save it with an older ir_version, or update onnx and onnxruntime.",
        )
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    newest = onnx.defs.onnx_opset_version()
    if opsets.get("", 1) > newest:
        raise ModelError(
            f"'{path}' has opset {opsets['']}, and the installed onnx {onnx.__version__} knows up to {newest}.",
            hint=f"Export it with opset {newest} or lower.",
        )
    functions = {(function.domain, function.name) for function in proto.functions}
    for node in proto.graph.node:
        is_standard = node.domain in ("", "ai.onnx")
        if is_standard and not onnx.defs.has(node.op_type) and (node.domain, node.op_type) not in functions:
            raise ModelError(
                f"'{path}' has the operator '{node.op_type}' (node '{node.name}'), which ONNX does not have.",
                hint="Export the model again without custom operators.",
            )
    for file in external_files(proto, path):
        if not file.is_file():
            raise ModelError(
                f"'{path}' keeps weights in '{file.name}', which is not beside it.", hint="Put the two side by side."
            )
    return proto


def external_files(proto: Any, path: Path) -> tuple[Path, ...]:
    """The files beside the graph that hold its weights."""
    names = {
        entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(
                f"'{path}' keeps weights in '{name}', outside its own folder.",
                hint="Save the model with its data beside it.",
            )
    return tuple(path.parent / name for name in sorted(names))


def _image_input(proto: Any, card: Card, path: Path) -> tuple[str, tuple[int | None, int | None]]:
    """The name of the graph's picture input, and the height and width that it fixes."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = {value.name: value for value in proto.graph.input if value.name not in weights}
    name = card.input.name or (next(iter(inputs)) if len(inputs) == 1 else None)
    if name is None:
        raise ModelError(
            f"'{path}' has the inputs {', '.join(inputs)}, and its card does not say which takes the picture.",
            hint="Add 'name' to the card's [input].",
        )
    if name not in inputs:
        raise ModelError(f"'{path}' has no input '{name}'.", hint=did_you_mean(name, inputs))
    if len(inputs) > 1:
        others = ", ".join(sorted(set(inputs) - {name}))
        raise ModelError(
            f"'{path}' takes more than a picture: {others}.", hint="Export it with the picture as its only input."
        )
    tensor = inputs[name].type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    if tensor.elem_type != 1 or len(dims) != 4 or dims[1] not in (3, None):
        raise ModelError(
            f"'{path}' has the input '{name}' of {_shape_text(tensor)}, not of float [batch, 3, height, width].",
            hint="Export it with channels first, RGB or BGR, and float32 input.",
        )
    return name, (dims[2], dims[3])


def _shape_text(tensor: Any) -> str:
    import onnx

    dims = [str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} [{', '.join(dims)}]"


def _outputs(proto: Any, card: Card, path: Path) -> dict[str, str]:
    """The task's names of the outputs -> the tensors of the graph that give them."""
    graph_outputs = [value.name for value in proto.graph.output]
    named = dict(card.outputs)
    if not named and set(card_outputs(card)) <= set(graph_outputs):
        named = {name: name for name in card_outputs(card)}
    if not named:
        if len(card_outputs(card)) > 1:
            raise ModelError(
                f"'{path}' has the outputs {', '.join(graph_outputs)}, and its card does not say which are "
                f"{' and '.join(card_outputs(card))}.",
                hint="Add them to the card's [outputs].",
            )
        if len(graph_outputs) > 1:
            raise ModelError(
                f"'{path}' has the outputs {', '.join(graph_outputs)}, and its card does not map them.",
                hint=f'Add [outputs] with {card_outputs(card)[0]} = "..." to the card.',
            )
        named = {card_outputs(card)[0]: graph_outputs[0]}
    producers = {name: node for node in proto.graph.node for name in node.output}
    for name in named.values():
        if name not in producers:
            raise ModelError(f"'{path}' has no tensor '{name}'.", hint=did_you_mean(name, graph_outputs))
    logits = producers.get(named.get("logits", ""))
    if logits is not None and logits.op_type == "ArgMax":
        raise ModelError(
            f"'{path}' gives classes: '{named['logits']}' comes out of an ArgMax, and the task wants logits.",
            hint=f'Add [outputs] with logits = "{logits.input[0]}" to the card: any tensor of the graph may be named.',
        )
    if logits is not None and logits.op_type == "Softmax" and card.task != SEGMENT:
        raise ModelError(
            f"'{path}' gives probabilities: '{named['logits']}' comes out of a Softmax, and the task wants logits.",
            hint=f'Add [outputs] with logits = "{logits.input[0]}" to the card: any tensor of the graph may be named.',
        )
    return {name: named[name] for name in card_outputs(card)}


def _n_classes(proto: Any, card: Card, outputs: dict[str, str]) -> int | None:
    """How many classes the graph tells apart, where its outputs' shapes say so."""
    # The output that counts classes, its number of dimensions, where the classes stand, and what is no class there.
    name, n_dims, axis, n_others = "logits", 2, 1, 0
    if card.task == SEGMENT:
        n_dims = 4
    elif isinstance(card.detection, QueryDecoding):
        n_dims, axis, n_others = 3, 2, int(card.detection.activation == "softmax")
    elif card.task == DETECT:
        name, n_dims, axis, n_others = "detections", 3, 2, 5
    for value in proto.graph.output:
        dims = value.type.tensor_type.shape.dim
        if value.name == outputs.get(name) and len(dims) == n_dims and dims[axis].HasField("dim_value"):
            return int(dims[axis].dim_value) - n_others
    return None
