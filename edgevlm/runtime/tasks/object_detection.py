"""Things of the classes that the model was trained on, each with a box in the picture's own pixels.

Component ``model``: pixel_values -> detections, or logits and pred_boxes. ``Processing.detection`` says which, and how
boxes follow from them.

Source: YOLOX, arXiv:2107.08430; DETR, arXiv:2005.12872.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from edgevlm.errors import BundleError
from edgevlm.runtime.classes import need_finite, softmax
from edgevlm.runtime.image import Size, place_picture
from edgevlm.runtime.session import output_of, run_rows
from edgevlm.runtime.spec import (
    Array,
    DetectionDecoding,
    GridDecoding,
    ImageProcessing,
    Processing,
    QueryDecoding,
    Scoring,
    Spec,
)
from edgevlm.runtime.tasks import (
    Need,
    Parts,
    Result,
    check_needs,
    check_whole_picture,
    class_labels,
    refuse_labels,
)

SAME_IOU = 0.9
"""Boxes that overlap so much are the same answer; at COCO's strictest step, 0.95, rounding parts small ones."""

# exp of more is wider than any picture, and products of it would no longer be numbers.
_MAX_LOG_SIZE = 20.0


class Detection(Spec, frozen=True, kw_only=True):
    """One thing.

    Units: ``box`` is (left, top, right, bottom) in pixels of the upright picture, ``score`` a probability.
    """

    label: str
    index: int
    score: float
    box: tuple[float, float, float, float]


class Detections(Spec, frozen=True, kw_only=True):
    """Everything that was found in a picture of ``height`` × ``width``, likeliest first.

    Args:
        score_threshold: nothing is named whose score is not above it.
    """

    objects: tuple[Detection, ...]
    score_threshold: float
    height: int
    width: int

    def to_text(self) -> str:
        if not self.objects:
            return f"nothing above {100 * self.score_threshold:g} %"
        width = max(len(each.label) for each in self.objects)
        return "\n".join(
            f"{100 * each.score:6.2f} %  {each.label:<{width}}  "
            f"x {each.box[0]:.0f} to {each.box[2]:.0f}, y {each.box[1]:.0f} to {each.box[3]:.0f}"
            for each in self.objects
        )

    def is_same_answer(self, other: Any, *, tolerance: float) -> bool:
        """The same things at the same places: every box has one of its class in ``other`` that it overlaps by 0.9.

        A box without one counts as a tie where its score is within ``tolerance`` of the threshold.
        """
        return not (_unmatched(self, other, tolerance) or _unmatched(other, self, tolerance))

    def n_matched(self, other: Detections) -> int:
        """Boxes that have one of their class in ``other`` with an overlap of 0.9, each used once."""
        return int((match_boxes(self, other) >= 0).sum())


def match_boxes(mine: Detections, theirs: Detections) -> Array:
    """For each of my boxes, likeliest first, the index of their box that is the same; -1 where there is none."""
    found = np.full(len(mine.objects), -1)
    if not mine.objects or not theirs.objects:
        return found
    classes = [np.array([each.index for each in side.objects]) for side in (mine, theirs)]
    boxes = [np.array([each.box for each in side.objects]) for side in (mine, theirs)]
    overlaps = box_iou(boxes[0][:, None], boxes[1][None])
    overlaps[(classes[0][:, None] != classes[1][None]) | (overlaps < SAME_IOU)] = 0
    for i, row in enumerate(overlaps):
        best = int(row.argmax())
        if row[best] > 0:
            found[i] = best
            overlaps[:, best] = 0
    return found


def _unmatched(mine: Detections, theirs: Detections, tolerance: float) -> bool:
    matches = match_boxes(mine, theirs)
    alone = [each for each, match in zip(mine.objects, matches, strict=True) if match < 0]
    return any(each.score > theirs.score_threshold + tolerance for each in alone)


class ObjectDetection:
    needs: ClassVar[tuple[Need, ...]] = (
        Need(component="model", inputs=("pixel_values",), outputs=("detections", "logits", "pred_boxes")),
    )
    result_type: ClassVar[type[Result]] = Detections

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    @classmethod
    def check(cls, components: frozenset[str], processing: Processing, scoring: Scoring | None) -> None:
        check_needs(cls.needs, components)
        check_whole_picture(processing.image)
        if processing.detection is None:
            raise BundleError(
                "An object-detection model needs its decoding, which says how boxes follow from its outputs.",
                hint="Add [detection] to the model's card.",
            )
        _check_decoding(processing.detection, processing.image)

    def outputs(self, pixel_values: Array) -> dict[str, Array]:
        return run_rows(self._parts.sessions["model"], {self._parts.processing.image.input_name: pixel_values})

    def results(
        self,
        outputs: Mapping[str, Array],
        *,
        labels: tuple[str, ...] | None,
        top_k: int | None,
        sizes: Sequence[Size] | None,
    ) -> tuple[Detections, ...]:
        refuse_labels(labels)
        image, decoding = self._parts.processing.image, self._parts.processing.detection
        assert decoding is not None, "check() saw to it"
        if isinstance(decoding, GridDecoding):
            boxes, scores = decode_grid(need_finite(output_of(outputs, "detections"), "detections"), decoding, image)
        else:
            boxes, scores = decode_queries(_both(outputs), decoding, image)
        names = class_labels(self._parts.labels, scores.shape[-1])
        most = decoding.max_detections if top_k is None else min(top_k, decoding.max_detections)
        sizes = sizes or ((image.height, image.width),) * len(boxes)
        return tuple(
            _answer(*picture, decoding=decoding, names=names, most=most, size=size, image=image)
            for *picture, size in zip(boxes, scores, sizes, strict=True)
        )


def decode_grid(rows: Array, decoding: GridDecoding, image: ImageProcessing) -> tuple[Array, Array]:
    """Boxes (left, top, right, bottom) in pixels of the graph's input, and each one's score for each class.

    Shapes: rows [n, cells, 5 + classes] -> [n, cells, 4], [n, cells, classes].
    """
    cells, strides = _cells(decoding.strides, image)
    if rows.ndim != 3 or rows.shape[1] != len(cells) or rows.shape[2] < 6:
        raise BundleError(
            f"The graph's detections have the shape {rows.shape}, but strides {', '.join(map(str, decoding.strides))} "
            f"give [n, {len(cells)}, 5 + classes].",
            hint="Mend 'strides' in the card's [detection].",
        )
    wide = rows.astype(np.float64)
    centres = (wide[..., :2] + cells) * strides
    halves = np.exp(np.minimum(wide[..., 2:4], _MAX_LOG_SIZE)) * strides / 2
    return np.concatenate([centres - halves, centres + halves], axis=-1), wide[..., 4:5] * wide[..., 5:]


def decode_queries(
    outputs: tuple[Array, Array], decoding: QueryDecoding, image: ImageProcessing
) -> tuple[Array, Array]:
    """As ``decode_grid``; with softmax only a query's likeliest class has a score above 0.

    Shapes: logits [n, queries, classes], boxes [n, queries, 4] -> [n, queries, 4], [n, queries, classes named].
    """
    logits, shares = outputs
    if logits.ndim != 3 or shares.shape != (*logits.shape[:2], 4):
        raise BundleError(
            f"The graph gives logits {logits.shape} and pred_boxes {shares.shape}, not [n, queries, classes] and "
            "[n, queries, 4].",
            hint="Mend [outputs] in the card.",
        )
    scale = np.array([image.width, image.height], dtype=np.float64)
    centres, halves = shares[..., :2] * scale, shares[..., 2:] * scale / 2
    boxes = np.concatenate([centres - halves, centres + halves], axis=-1)
    if decoding.activation == "sigmoid":
        return boxes, 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -700, 700)))  # exp(710) overflows
    scores = softmax(logits)[..., :-1]
    is_best = np.arange(scores.shape[-1]) == scores.argmax(axis=-1)[..., None]
    return boxes, np.where(is_best, scores, 0)


def suppress(boxes: Array, classes: Array, *, iou: float, most: int) -> Array:
    """Which boxes stay, likeliest first: of two of one class that overlap by more than ``iou`` the first.

    Args:    boxes, classes: likeliest first.
    Shapes:  boxes [n, 4], classes [n] -> indices, at most ``most``.
    """
    kept: list[int] = []
    left = np.arange(len(boxes))
    while len(left) and len(kept) < most:
        best, left = left[0], left[1:]
        kept.append(int(best))
        goes = (classes[left] == classes[best]) & (box_iou(boxes[best], boxes[left]) > iou)
        left = left[~goes]
    return np.array(kept, dtype=np.int64)


def box_iou(one: Array, other: Array) -> Array:
    """Intersection over union of (left, top, right, bottom), broadcast; 0 of two empty boxes.

    Shapes: [..., 4], [..., 4] -> [...].
    """
    size = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    shared = np.clip(size, 0, None).prod(axis=-1)
    union = _area(one) + _area(other) - shared
    overlap: Array = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlap


def _area(boxes: Array) -> Array:
    area: Array = np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(axis=-1)
    return area


def _answer(
    boxes: Array,
    scores: Array,
    *,
    decoding: DetectionDecoding,
    names: Sequence[str],
    most: int,
    size: Size,
    image: ImageProcessing,
) -> Detections:
    rows, classes = np.nonzero(scores > decoding.score_threshold)
    order = np.argsort(-scores[rows, classes], kind="stable")
    inside = _led_back(boxes, size, image)
    order = order[_area(inside[rows[order]]) > 0]  # what was found in the filling of a letterbox is not in the picture
    rows, classes = rows[order], classes[order]
    if isinstance(decoding, GridDecoding):
        kept = suppress(boxes[rows], classes, iou=decoding.nms_iou, most=most)
        rows, classes = rows[kept], classes[kept]
    rows, classes = rows[:most], classes[:most]
    found = zip(classes.tolist(), scores[rows, classes].tolist(), inside[rows].tolist(), strict=True)
    return Detections(
        objects=tuple(Detection(label=names[k], index=k, score=score, box=tuple(box)) for k, score, box in found),
        score_threshold=decoding.score_threshold,
        height=size[0],
        width=size[1],
    )


def _led_back(boxes: Array, size: Size, image: ImageProcessing) -> Array:
    """From the graph's input to the picture, and no further than its edges."""
    placed = place_picture(size, image)
    offset = np.array([placed.offset_x, placed.offset_y] * 2)
    scale = np.array([placed.scale_x, placed.scale_y] * 2)
    ends = np.array([size[1], size[0]] * 2)
    inside: Array = np.clip((boxes - offset) / scale, 0, ends)
    return inside


def _cells(strides: tuple[int, ...], image: ImageProcessing) -> tuple[Array, Array]:
    """(column, row) of every cell, and its stride: [cells, 2], [cells, 1]."""
    cells, steps = [], []
    for stride in strides:
        rows, columns = np.mgrid[: image.height // stride, : image.width // stride]
        cells.append(np.stack([columns.ravel(), rows.ravel()], axis=1))
        steps.append(np.full((rows.size, 1), stride))
    return np.concatenate(cells), np.concatenate(steps)


def _both(outputs: Mapping[str, Array]) -> tuple[Array, Array]:
    if missing := {"logits", "pred_boxes"} - outputs.keys():
        raise BundleError(f"The graph gives no {min(missing)}.", hint="Name both outputs in the card's [outputs].")
    return need_finite(outputs["logits"], "logits"), need_finite(outputs["pred_boxes"], "pred_boxes")


def _check_decoding(decoding: DetectionDecoding, image: ImageProcessing) -> None:
    if isinstance(decoding, GridDecoding):
        strides = decoding.strides
        is_even = all(stride > 0 and image.height % stride == image.width % stride == 0 for stride in strides)
        _need(
            bool(strides) and is_even, f"strides of {list(strides)} do not divide {image.height} × {image.width} pixels"
        )
        _need(0 < decoding.nms_iou <= 1, f"nms_iou is {decoding.nms_iou}, not above 0 and at most 1")
    _need(
        0 <= decoding.score_threshold < 1, f"score_threshold is {decoding.score_threshold}, not at least 0 and below 1"
    )
    _need(decoding.max_detections > 0, f"max_detections is {decoding.max_detections}, not above 0")


def _need(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise BundleError(f"The boxes cannot be decoded: {otherwise}.", hint="Mend [detection] in the model's card.")
