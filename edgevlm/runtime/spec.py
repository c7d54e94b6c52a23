"""The values that the compile side and the runtime share: what stands in a bundle's manifest.

Everything here is frozen, read strictly (unknown fields are errors) and writes back to the same text.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SCHEMA_VERSION = 1

T = TypeVar("T")


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every value: frozen, keyword-only, strict."""


def to_json(value: object) -> bytes:
    """Indented JSON with sorted-by-definition fields; the same value always gives the same bytes."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def from_json(data: bytes, kind: type[T]) -> T:
    """Read ``kind`` from JSON.

    Raises: msgspec.ValidationError / msgspec.DecodeError with the path of the offending field.
    """
    return msgspec.json.decode(data, type=kind)


# --- graphs -----------------------------------------------------------------------------------------------


class TensorSpec(Spec, frozen=True, kw_only=True):
    """A graph's input or output. A dimension is a number, or a name where it is free (``"batch"``)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class SessionOptions(Spec, frozen=True, kw_only=True):
    """How a backend opens a graph.

    Args:
        n_threads: intra-op threads; 0 leaves it to the backend (all cores).
        graph_level: optimisation that the backend applies when it loads the graph.
        entries: the backend's own settings, by its own names.
    """

    n_threads: int = 0
    graph_level: Literal["none", "basic", "extended", "all"] = "all"
    entries: dict[str, str] = {}


class Component(Spec, frozen=True, kw_only=True):
    """One graph of a bundle.

    Args:
        name: ``model``, ``image_encoder``, ``text_encoder``, ...
        file: the graph, relative to the bundle.
        files: every file of the graph, ``file`` first, then external data.
        precision: a short name such as ``fp32`` or ``int8-static``.
    """

    name: str
    backend: str
    file: str
    files: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str
    session: SessionOptions = SessionOptions()


# --- processing -------------------------------------------------------------------------------------------


class Resize(Spec, tag="resize", tag_field="op", frozen=True, kw_only=True):
    """To ``height`` × ``width``, or so that the shorter edge is ``shortest_edge`` (the other keeps the aspect).

    Args: longest_edge: of the longer edge instead, the other rounded to the nearest pixel as SAM does.
    """

    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bilinear"
    height: int | None = None
    width: int | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None


class CenterCrop(Spec, tag="center_crop", tag_field="op", frozen=True, kw_only=True):
    """The middle ``height`` × ``width``, padded with zeros where the picture is smaller."""

    height: int
    width: int


class Letterbox(Spec, tag="letterbox", tag_field="op", frozen=True, kw_only=True):
    """As large as fits ``height`` × ``width`` with the aspect kept; what is left over is of the grey ``fill``.

    Args:
        place: where the picture stands in it.
        fill: 0 to 255; 114 is what the YOLO family is trained with.
    """

    height: int
    width: int
    place: Literal["top_left", "center"] = "top_left"
    fill: int = 114
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bilinear"


class Rescale(Spec, tag="rescale", tag_field="op", frozen=True, kw_only=True):
    """Pixel values times ``factor`` (plus ``offset``)."""

    factor: float
    offset: float = 0.0


class Normalize(Spec, tag="normalize", tag_field="op", frozen=True, kw_only=True):
    """(value - mean) / std, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class FlipChannels(Spec, tag="flip_channels", tag_field="op", frozen=True, kw_only=True):
    """RGB to BGR."""


class Pad(Spec, tag="pad", tag_field="op", frozen=True, kw_only=True):
    """To ``height`` × ``width`` with zeros below and to the right; the last step, so zeros of the graph's input."""

    height: int
    width: int


ImageStep = Resize | CenterCrop | Letterbox | Rescale | Normalize | FlipChannels | Pad


class ImageProcessing(Spec, frozen=True, kw_only=True):
    """From a decoded RGB picture to the graph's input, float32 ``[3, height, width]``, as steps in order."""

    VERSION: ClassVar[int] = 2  # 1 had neither ``pad`` nor ``longest_edge``

    version: int = VERSION
    input_name: str = "pixel_values"
    height: int
    width: int
    steps: tuple[ImageStep, ...]


class TextProcessing(Spec, frozen=True, kw_only=True):
    """From a text to token ids.

    Args:
        tokenizer: a ``tokenizers`` JSON file, relative to the bundle.
        input_names: which of ``input_ids`` and ``attention_mask`` the text graph takes.
        max_length: longer texts are cut here.
        padding: shorter ones are padded with ``pad_token_id`` to ``max_length``, or only to the longest text of a call:
            then the graph's length is free, and what it gives was proven not to depend on the padding.
        prompt_template: how a label becomes a sentence; ``{}`` stands for the label.
    """

    VERSION: ClassVar[int] = 2  # 1 had no ``padding``: always to ``max_length``

    version: int = VERSION
    tokenizer: str
    input_names: tuple[str, ...]
    max_length: int
    pad_token_id: int
    padding: Literal["max_length", "longest"] = "max_length"
    prompt_template: str = "a photo of a {}"


class GridDecoding(Spec, tag="grid", tag_field="kind", frozen=True, kw_only=True):
    """Boxes from the cells of grids, one grid a stride: ``detections`` [n, cells, 5 + classes].

    A row is dx, dy, log w, log h, objectness, then a score for each class; the last two kinds are probabilities. The
    centre is (dx + column, dy + row) · stride, the size exp(log w, log h) · stride, the score objectness · class
    score. Rows stand in the order of ``strides``, each grid row by row. (YOLOX, arXiv:2107.08430.)

    Args:
        strides: pixels of the graph's input between two cells.
        score_threshold: boxes are named whose score is above it.
        nms_iou: of two boxes of a class that overlap more, the less likely goes.
        max_detections: boxes of a picture at most, likeliest first.
    """

    VERSION: ClassVar[int] = 1

    version: int = VERSION
    strides: tuple[int, ...] = (8, 16, 32)
    score_threshold: float = 0.25
    nms_iou: float = 0.65
    max_detections: int = 100


class QueryDecoding(Spec, tag="queries", tag_field="kind", frozen=True, kw_only=True):
    """Boxes from queries: ``logits`` [n, queries, classes] and ``pred_boxes`` [n, queries, 4].

    A box is cx, cy, w, h as shares of the graph's input. No box needs suppressing: the model was trained to find each
    thing once. (DETR, arXiv:2005.12872.)

    Args:
        activation: ``softmax`` over the classes and a last one for "nothing", which names each query's likeliest class;
            or ``sigmoid`` of each class, as in RT-DETR (arXiv:2304.08069).
        score_threshold, max_detections: as for a grid.
    """

    VERSION: ClassVar[int] = 1

    version: int = VERSION
    activation: Literal["softmax", "sigmoid"] = "softmax"
    score_threshold: float = 0.5
    max_detections: int = 100


DetectionDecoding = GridDecoding | QueryDecoding


class Prompt(Spec, frozen=True, kw_only=True):
    """One thing in a picture, shown by points, by a box around it, or by both.

    Args:
        labels: of each point: 1 lies on the thing, 0 beside it.
        box: (left, top, right, bottom).
        is_ambiguous: it may mean a part, a whole or what that belongs to, so the likeliest of the model's three
            suggestions is taken; else its single one. Null: so is one point without a box.
    Units: pixels of the picture as it came; a whole number is the middle of a pixel, as in SAM.
    """

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[Literal[0, 1], ...] = ()
    box: tuple[float, float, float, float] | None = None
    is_ambiguous: bool | None = None


class Processing(Spec, frozen=True, kw_only=True):
    image: ImageProcessing
    text: TextProcessing | None = None
    detection: DetectionDecoding | None = None


class Scoring(Spec, frozen=True, kw_only=True):
    """How a two-tower model turns a picture and labels into scores.

    logits = scale * cos(image, text) + bias, then ``softmax`` over the labels or ``sigmoid`` for each
    (CLIP, arXiv:2103.00020; SigLIP, arXiv:2303.15343).

    Args:
        label_embeddings: a float32 ``[n_labels, d]`` ``.npy`` of unit rows, relative to the bundle; with it the
            bundle needs no text graph.
    """

    scale: float
    bias: float = 0.0
    activation: Literal["softmax", "sigmoid"] = "softmax"
    label_embeddings: str | None = None


# --- what was measured ------------------------------------------------------------------------------------


class Accuracy(Spec, frozen=True, kw_only=True):
    """The metric on the report split, and the paired drop from the float model with its 95 % interval.

    Units: ``value``, ``reference`` and ``drop`` are fractions (0.01 is one point). drop = reference - value.
    Args:
        others: further metrics by name, among them how far the answers are float's.
    """

    metric: str
    value: float
    reference: float
    drop: float
    drop_low: float
    drop_high: float
    n: int
    data: str
    has_labels: bool
    others: dict[str, float] = {}


class Latency(Spec, frozen=True, kw_only=True):
    """Model latency (preprocessing excluded) at the bundle's batch size, and its ratio to the float graph.

    ``ratio`` is time ÷ float's time, measured interleaved; below 1 is faster. Null where this *is* the float graph.
    """

    p50_ms: float
    p90_ms: float
    p99_ms: float
    n: int
    n_threads: int
    batch: int
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    machine: str


class Requires(Spec, frozen=True, kw_only=True):
    """What a machine must have to run the bundle; it is refused elsewhere."""

    arch: str | None = None
    isa: tuple[str, ...] = ()
    backends: dict[str, str] = {}
    onnx_ir: int | None = None
    opset: int | None = None


class Provenance(Spec, frozen=True, kw_only=True):
    source: str
    revision: str | None
    weights_sha256: str
    licence: str | None
    tools: dict[str, str]
    recipe: dict[str, Any]


class GoldenCase(Spec, frozen=True, kw_only=True):
    """A picture, the raw outputs that it gave and the final answer, all relative to the bundle.

    Args:
        outputs: an output's name to its ``.npy``.
        answer: JSON as the task writes it.
        labels: what the picture was asked about, where the bundle takes labels and has none of its own.
        prompts: the same, where it takes points and boxes.
        every: of an output named here only every so many-th number is kept, from the first, as a flat array: whole, the
            scores of every pixel would outweigh the model.
    """

    picture: str
    outputs: dict[str, str]
    answer: str
    labels: tuple[str, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    every: dict[str, int] = {}


class Golden(Spec, frozen=True, kw_only=True):
    """The golden vectors and where they were made: bit-equal there, within ``tolerance`` elsewhere.

    ``tolerance`` is the largest |difference| over the largest |expected|.
    """

    cases: tuple[GoldenCase, ...]
    made_on: dict[str, str]
    tolerance: float


class BundleForm(Spec, frozen=True, kw_only=True):
    """One form of the model in a bundle for hardware that was not at hand.

    Args:
        name: ``fp32``, or what the form was made by.
        status: ``needs device build`` where the file is a graph that an engine has to be built from on the device.
        why_not_built: where it was not built with the bundle; a sentence.
        accuracy: judged where the bundle was made, by the backend ``judged_by``.
        build: how that engine is built, or was, as ``edgevlm.runtime.engine.BuildSettings``.
    """

    name: str
    components: tuple[Component, ...]
    requires: Requires
    golden: Golden
    accuracy: Accuracy
    judged_by: str
    status: Literal["ready", "needs device build"] = "ready"
    why_not_built: str = ""
    build: dict[str, Any] = {}
    recipe: dict[str, Any]


class FileEntry(Spec, frozen=True, kw_only=True):
    path: str
    sha256: str
    n_bytes: int


class Manifest(Spec, frozen=True, kw_only=True):
    """``manifest.json``.

    Args:
        forms: what ``edgevlm tune`` chooses from on the device, where nothing could be timed; the first is the bundle's
            own: the float model.
        files: every other file of the bundle.
    """

    schema_version: int
    name: str
    task: str
    target: str
    selection: Literal["measured", "float-fallback", "unmeasured", "requested"]
    selection_reason: str
    batch: int | None
    components: tuple[Component, ...]
    processing: Processing
    labels: tuple[str, ...]
    scoring: Scoring | None
    accuracy: Accuracy | None
    latency: Latency | None
    requires: Requires
    provenance: Provenance
    golden: Golden
    files: tuple[FileEntry, ...]
    forms: tuple[BundleForm, ...] = ()


def dtype_of(spec: TensorSpec) -> np.dtype[Any]:
    return np.dtype(spec.dtype)
