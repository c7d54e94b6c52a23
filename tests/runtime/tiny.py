"""Bundles of a few hundred bytes, for tests: graphs of three nodes, a tokenizer of six words."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgevlm.bundle.golden import make_golden
from edgevlm.bundle.write import write_bundle
from edgevlm.runtime.backends import Session
from edgevlm.runtime.backends.onnxruntime import OnnxRuntime
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import (
    SCHEMA_VERSION,
    CenterCrop,
    Component,
    Golden,
    ImageProcessing,
    Manifest,
    Normalize,
    Processing,
    Provenance,
    Requires,
    Rescale,
    Resize,
    Scoring,
    SessionOptions,
    TensorSpec,
    TextProcessing,
)

SIZE = 8
WORDS = ("[PAD]", "[UNK]", "a", "red", "green", "blue")
LABELS = ("red", "green", "blue")
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64

IMAGE = ImageProcessing(
    height=SIZE,
    width=SIZE,
    steps=(
        Resize(shortest_edge=10),
        CenterCrop(height=SIZE, width=SIZE),
        Rescale(factor=1 / 255),
        Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    ),
)
TEXT = TextProcessing(
    tokenizer="processing/tokenizer.json",
    input_names=("input_ids", "attention_mask"),
    max_length=4,
    pad_token_id=0,
    prompt_template="a {}",
)


def picture(colour: str = "red", size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A plain colour with some structure in it, so that resizing has something to do."""
    pixels = np.array(Image.new("RGB", size, colour))
    pixels[::3, ::2] //= 2
    return Image.fromarray(pixels)


def image_graph(output: str = "logits", *, batch: int | str = "batch", n_out: int = 3) -> bytes:
    """The mean colour, scaled: logits[i] is how much of channel i there is."""
    weight = 4 * np.eye(3, n_out, dtype=np.float32)
    return _model(
        [
            helper.make_node("GlobalAveragePool", ["pixel_values"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], [output]),
        ],
        inputs={"pixel_values": (FLOAT, [batch, 3, SIZE, SIZE])},
        outputs={output: (FLOAT, [batch, n_out])},
        constants={"weight": weight},
    )


def feature_graph(output: str, shape: tuple[int, ...]) -> bytes:
    """pixel_values reshaped to [n, *shape], so that a test can say what the mean of it must be."""
    return _model(
        [helper.make_node("Reshape", ["pixel_values", "shape"], [output])],
        inputs={"pixel_values": (FLOAT, ["batch", 3, SIZE, SIZE])},
        outputs={output: (FLOAT, ["batch", *shape])},
        constants={"shape": np.array([-1, *shape], dtype=np.int64)},
    )


def text_graph(length: int | str = 4) -> bytes:
    """A colour word's channel: "red" lies on the first axis, whatever stands beside it."""
    table = np.zeros((len(WORDS), 3), dtype=np.float32)
    table[3:] = np.eye(3)
    return _model(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["words"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
            helper.make_node("Mul", ["words", "column"], ["masked"]),
            helper.make_node("ReduceSum", ["masked", "axis"], ["text_embeds"], keepdims=0),
        ],
        inputs={"input_ids": (INT64, ["batch", length]), "attention_mask": (INT64, ["batch", length])},
        outputs={"text_embeds": (FLOAT, ["batch", 3])},
        constants={"table": table, "last": np.array([2]), "axis": np.array([1])},
    )


def _model(nodes, *, inputs, outputs, constants) -> bytes:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def tokenizer_json() -> bytes:
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(WORDS)}, "unk_token": "[UNK]"},
        }
    ).encode()


def npy(array: np.ndarray) -> bytes:
    written = io.BytesIO()
    np.save(written, array)
    return written.getvalue()


def open_graph(graph: bytes, folder: Path, name: str = "graph.onnx") -> Session:
    (folder / name).write_bytes(graph)
    return OnnxRuntime().open(folder / name, SessionOptions(n_threads=1))


def component(name: str, graph: bytes) -> Component:
    inputs, outputs = onnx.load_from_string(graph).graph.input, onnx.load_from_string(graph).graph.output
    file = f"components/{name}.onnx"
    return Component(
        name=name,
        backend="onnxruntime",
        file=file,
        files=(file,),
        inputs=tuple(map(_tensor, inputs)),
        outputs=tuple(map(_tensor, outputs)),
        precision="fp32",
        session=SessionOptions(n_threads=1),
    )


def _tensor(value) -> TensorSpec:
    kind = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
    return TensorSpec(name=value.name, dtype={FLOAT: "float32", INT64: "int64"}[kind.elem_type], shape=shape)


def parts(task: str, *, batch: int | str = "batch", length: int | str = 4) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest without golden vectors, and the files that it names; ``length`` of a text, a name where it is free."""
    scoring, text, labels = None, None, LABELS
    files: dict[str, bytes] = {"LICENSE": b"Free to use.\n"}
    if task == "image-classification":
        graphs = {"model": image_graph(batch=batch)}
    elif task == "image-feature-extraction":
        graphs, labels = {"model": image_graph("image_embeds", batch=batch)}, ()
    elif task == "zero-shot-image-classification/folded":
        graphs = {"image_encoder": image_graph("image_embeds", batch=batch)}
        scoring = Scoring(scale=10.0, label_embeddings="processing/labels.npy")
        files["processing/labels.npy"] = npy(np.eye(3, dtype=np.float32))
    else:
        graphs = {"image_encoder": image_graph("image_embeds", batch=batch), "text_encoder": text_graph(length)}
        scoring, text, labels = Scoring(scale=10.0), TEXT, ()
        if isinstance(length, str):
            text = msgspec.structs.replace(TEXT, padding="longest")
        files["processing/tokenizer.json"] = tokenizer_json()
    files |= {f"components/{name}.onnx": graph for name, graph in graphs.items()}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name="tiny",
        task=task.partition("/")[0],
        target="cpu",
        selection="requested",
        selection_reason="A test asked for it.",
        batch=batch if isinstance(batch, int) else None,
        components=tuple(component(name, graph) for name, graph in graphs.items()),
        processing=Processing(image=IMAGE, text=text),
        labels=labels,
        scoring=scoring,
        accuracy=None,
        latency=None,
        requires=Requires(backends={"onnxruntime": "1.17"}, onnx_ir=8, opset=17),
        provenance=Provenance(
            source="tests", revision=None, weights_sha256="0" * 64, licence="apache-2.0", tools={"onnx": "1"}, recipe={}
        ),
        golden=Golden(cases=(), made_on={}, tolerance=1e-4),
        files=(),
    )
    return manifest, files


def make_bundle(
    destination: Path, task: str = "image-classification", *, batch: int | str = "batch", length: int | str = 4
) -> Path:
    """A whole bundle with two golden cases."""
    manifest, files = parts(task, batch=batch, length=length)
    scratch = destination.parent / f"{destination.name}-parts"
    for path, data in files.items():
        (scratch / path).parent.mkdir(parents=True, exist_ok=True)
        (scratch / path).write_bytes(data)
    pipeline = Pipeline.from_parts(
        task=manifest.task,
        processing=manifest.processing,
        sessions={c.name: OnnxRuntime().open(scratch / c.file, c.session) for c in manifest.components},
        labels=manifest.labels,
        scoring=manifest.scoring,
        folder=scratch,
    )
    asked = LABELS if manifest.scoring is not None and not manifest.labels else ()
    pictures = (picture("red"), picture("blue", (9, 31)))
    golden, made = make_golden(
        pipeline, pictures, components=manifest.components, tolerance=manifest.golden.tolerance, labels=asked
    )
    write_bundle(destination, msgspec.structs.replace(manifest, golden=golden), files | made)
    return destination
