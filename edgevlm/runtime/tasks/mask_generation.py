"""The thing that points or a box show, cut out: a mask for each prompt.

Component ``image_encoder``: pixel_values -> image_embeds, once a picture. Component ``mask_decoder``: image_embeds,
input_points [n, prompts, points, 2] in pixels of the graph's input, input_labels [n, prompts, points] -> pred_masks
[n, prompts, masks, height, width], above 0 inside the thing, and iou_scores [n, prompts, masks], how well the model
thinks that each mask fits. The first mask is the single one, the others are three suggestions.

Labels are SAM's own: 1 a point on the thing, 0 one beside it, 2 and 3 the corners of a box, -1 no point. So one graph
takes points and boxes, and a prompt without a box ends with a -1, as SAM was trained.

Source: Segment Anything, arXiv:2304.02643.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from edgevlm.errors import DataError, UsageError
from edgevlm.runtime.classes import need_finite
from edgevlm.runtime.image import Placement, Size, place_picture
from edgevlm.runtime.prompts import check_prompt
from edgevlm.runtime.session import run_rows
from edgevlm.runtime.spec import Array, ImageProcessing, Processing, Prompt, Scoring, Spec
from edgevlm.runtime.tasks import Need, Parts, Result, check_needs, check_whole_picture

IMAGE_ENCODER, MASK_DECODER = "image_encoder", "mask_decoder"

_BOX_CORNERS = (2, 3)
_NO_POINT = -1
MOST_PROMPTS = 16
"""In a call of the decoder, which holds the image's embeddings once for each: SAM's take 4 MB."""


class Mask(Spec, frozen=True, kw_only=True):
    """What one prompt showed.

    Args:
        score: the overlap (intersection over union) with the thing that the model expects of its own mask.
        box: the tightest around it, (left, top, right, bottom) in whole pixels; null where it is empty.
        n_pixels: inside it.
        runs: row by row, how many pixels are outside, then inside, then outside again, ...
    """

    score: float
    box: tuple[int, int, int, int] | None
    n_pixels: int
    runs: str


class Masks(Spec, frozen=True, kw_only=True):
    """A mask of a picture of ``height`` × ``width`` for each prompt, in their order."""

    height: int
    width: int
    masks: tuple[Mask, ...]

    def to_arrays(self) -> Array:
        """The masks, bool [prompts, height, width].

        Raises: DataError: runs are no mask of this size.
        """
        arrays = np.zeros((len(self.masks), self.height, self.width), dtype=bool)
        for mask, array in zip(self.masks, arrays, strict=True):
            try:
                lengths = np.array(mask.runs.split(" "), dtype=np.int64)
                array[:] = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(array.shape)
            except ValueError as error:
                raise DataError(
                    f"The runs of a mask do not make {self.height} × {self.width} pixels.", hint="Ask again."
                ) from error
        return arrays

    def to_text(self) -> str:
        n = self.height * self.width
        return "\n".join(
            f"{i}  {_where(mask.box)}, {mask.n_pixels / n:.2%} of the picture, expected IoU {mask.score:.3f}"
            for i, mask in enumerate(self.masks)
        )

    def is_same_answer(self, other: Any, *, tolerance: float) -> bool:
        """The same masks at all pixels but a share of ``tolerance``, or others that were expected to fit as well."""
        if (self.height, self.width, len(self.masks)) != (other.height, other.width, len(other.masks)):
            return False
        differ = (self.to_arrays() != other.to_arrays()).mean(axis=(1, 2))
        pairs = zip(differ, self.masks, other.masks, strict=True)
        return all(d <= tolerance or (0 < abs(a.score - b.score) <= tolerance) for d, a, b in pairs)

    def overlaps(self, other: Masks) -> Array:
        """Intersection over union of each mask with the other's; 1 where both are empty.

        Shapes: [prompts].
        """
        return mask_iou(self.to_arrays(), other.to_arrays())


def mask_iou(mine: Array, theirs: Array) -> Array:
    """Intersection over union of masks one by one; 1 where both are empty.

    Shapes: both bool [n, height, width] -> float64 [n].
    """
    both = (mine & theirs).sum(axis=(1, 2)).astype(np.float64)
    either = (mine | theirs).sum(axis=(1, 2))
    overlaps: Array = np.divide(both, either, out=np.ones(len(both)), where=either > 0)
    return overlaps


def _where(box: tuple[int, int, int, int] | None) -> str:
    return "nothing" if box is None else f"x {box[0]} to {box[2]}, y {box[1]} to {box[3]}"


class MaskGeneration:
    needs: ClassVar[tuple[Need, ...]] = (
        Need(component=IMAGE_ENCODER, inputs=("pixel_values",), outputs=("image_embeds",)),
        Need(
            component=MASK_DECODER,
            inputs=("image_embeds", "input_points", "input_labels"),
            outputs=("pred_masks",),
        ),
    )
    result_type: ClassVar[type[Result]] = Masks

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    @classmethod
    def check(cls, components: frozenset[str], processing: Processing, scoring: Scoring | None) -> None:
        check_needs(cls.needs, components)
        check_whole_picture(processing.image)

    def outputs(self, pixel_values: Array) -> dict[str, Array]:
        return run_rows(self._parts.sessions[IMAGE_ENCODER], {self._parts.processing.image.input_name: pixel_values})

    def results(
        self,
        outputs: Mapping[str, Array],
        *,
        labels: tuple[str, ...] | None,
        top_k: int | None,
        sizes: Sequence[Size] | None,
    ) -> tuple[Masks, ...]:
        raise UsageError(
            "Nothing says which thing in the picture is meant.",
            hint="Give a point on it (--point x,y) or a box around it (--box left,top,right,bottom).",
        )

    def prompted_results(
        self, outputs: Mapping[str, Array], *, prompts: Sequence[Sequence[Prompt]], sizes: Sequence[Size] | None
    ) -> tuple[Masks, ...]:
        image = self._parts.processing.image
        embeds = need_finite(outputs["image_embeds"], "image_embeds")
        own: Sequence[Size | None] = [None] * len(embeds) if sizes is None else sizes
        rows = zip(embeds, prompts, own, strict=True)
        return tuple(self._masks(row[None], asked, size, image) for row, asked, size in rows)

    def _masks(self, embeds: Array, prompts: Sequence[Prompt], size: Size | None, image: ImageProcessing) -> Masks:
        height, width = size or (image.height, image.width)
        masks: dict[int, Mask] = {}
        for rows in _calls(prompts):
            asked = [prompts[i] for i in rows]
            found = run_rows(
                self._parts.sessions[MASK_DECODER], {"image_embeds": embeds, **decoder_prompts([asked], [size], image)}
            )
            scores = need_finite(found["iou_scores"][0], "iou_scores")
            for i, prompt, logits, score in zip(rows, asked, found["pred_masks"][0], scores, strict=True):
                best = _choose(prompt, score)
                inside = full_size(need_finite(logits[best], "pred_masks"), size, image) > 0
                masks[i] = _mask(inside, float(score[best]))
        return Masks(height=height, width=width, masks=tuple(masks[i] for i in range(len(prompts))))


def decoder_prompts(
    prompts: Sequence[Sequence[Prompt]], sizes: Sequence[Size | None], image: ImageProcessing
) -> dict[str, Array]:
    """What the decoder is fed beside the embeddings: ``input_points`` and ``input_labels``.

    Args:
        prompts: of each picture as many, all of the same kind: as many points, and all or none with a box.
        sizes: of the pictures that the prompts are in the pixels of; None means the graph's input.
    Raises: UsageError: a prompt shows nothing of its picture.
    """
    points, labels = [], []
    for asked, size in zip(prompts, sizes, strict=True):
        placed = Placement() if size is None else place_picture(size, image)
        for prompt in asked:
            check_prompt(prompt, size or (image.height, image.width))
        points.append([[_placed(x, y, placed) for x, y in _places(prompt)] for prompt in asked])
        labels.append([_labels(prompt) for prompt in asked])
    return {
        "input_points": np.array(points, dtype=np.float32),
        "input_labels": np.array(labels, dtype=np.int64),
    }


def _calls(prompts: Sequence[Prompt]) -> Iterable[list[int]]:
    """Which prompts go into one call: of one length, since padding would be seen, and not too many."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(_labels(prompt))].append(i)
    for rows in by_length.values():
        yield from (rows[start : start + MOST_PROMPTS] for start in range(0, len(rows), MOST_PROMPTS))


def _labels(prompt: Prompt) -> tuple[int, ...]:
    return (*prompt.labels, *((_NO_POINT,) if prompt.box is None else _BOX_CORNERS))


def _places(prompt: Prompt) -> tuple[tuple[float, float], ...]:
    if prompt.box is None:
        return (*prompt.points, (0.0, 0.0))
    left, top, right, bottom = prompt.box
    return (*prompt.points, (left, top), (right, bottom))


def _placed(x: float, y: float, placed: Placement) -> tuple[float, float]:
    return x * placed.scale_x + placed.offset_x, y * placed.scale_y + placed.offset_y


def _choose(prompt: Prompt, scores: Array) -> int:
    """The single mask, or the likeliest of the suggestions."""
    is_ambiguous = prompt.is_ambiguous
    if is_ambiguous is None:
        is_ambiguous = len(prompt.points) == 1 and prompt.box is None
    return 1 + int(scores[1:].argmax()) if is_ambiguous and len(scores) > 1 else 0


def full_size(logits: Array, size: Size | None, image: ImageProcessing) -> Array:
    """A mask of the graph's at the picture's size: enlarged to the graph's input, cut to the picture, resized to it.

    Shapes: [.., height, width] -> float32 [.., *size].
    Source: Transformers' ``SamImageProcessor.post_process_masks``.
    """
    if size is None:
        return resize_bilinear(logits, (image.height, image.width))
    placed = place_picture(size, image)
    left, top = round(placed.offset_x), round(placed.offset_y)
    inner = (round(size[0] * placed.scale_y), round(size[1] * placed.scale_x))
    cut = resize_bilinear(logits, (image.height, image.width), top=top, left=left, inner=inner)
    return resize_bilinear(cut, size)


def resize_bilinear(values: Array, size: Size, *, top: int = 0, left: int = 0, inner: Size | None = None) -> Array:
    """As ``torch.nn.functional.interpolate`` does, without smoothing where it gets smaller; or a part of the result.

    Args:   inner: (height, width) of the part of ``size`` that is wanted, from ``top`` and ``left`` on.
    Shapes: [.., height, width] -> float32 [.., *(inner or size)].
    """
    height, width = inner or size
    values = values.astype(np.float32, copy=False)
    above, below, share = _neighbours(values.shape[-2], size[0], top, height)
    values = values[..., above, :] * (1 - share[:, None]) + values[..., below, :] * share[:, None]
    before, behind, share = _neighbours(values.shape[-1], size[1], left, width)
    resized: Array = values[..., before] * (1 - share) + values[..., behind] * share
    return resized


def _neighbours(n: int, n_resized: int, start: int, n_wanted: int) -> tuple[Array, Array, Array]:
    """For each place on a line the two old places that it lies between, and how near it is to the second."""
    middles = np.arange(start, start + n_wanted, dtype=np.float32) + np.float32(0.5)
    places = np.maximum(middles * np.float32(n / n_resized) - np.float32(0.5), np.float32(0))
    first = np.minimum(places.astype(np.int64), n - 1)
    return first, np.minimum(first + 1, n - 1), (places - first).astype(np.float32)


def _mask(inside: Array, score: float) -> Mask:
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    box = None
    if len(rows):
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    flat = inside.ravel()
    changes = np.flatnonzero(np.concatenate([[flat[0]], flat[1:] != flat[:-1]]))
    lengths = np.diff(np.concatenate([[0], changes, [len(flat)]]))
    return Mask(score=score, box=box, n_pixels=int(flat.sum()), runs=" ".join(map(str, lengths.tolist())))
