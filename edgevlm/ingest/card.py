"""The card of a model that carries no configuration of its own: an ONNX file or a PyTorch module.

``docs/models.md`` describes the format; the classes below are its reference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from edgevlm.data_files import convert_table, read_toml
from edgevlm.errors import BundleError, ModelError, UsageError, did_you_mean
from edgevlm.families import CLASSIFY, DETECT, FEATURES, SEGMENT
from edgevlm.ingest.processing import Color, Resample
from edgevlm.runtime.spec import (
    CenterCrop,
    DetectionDecoding,
    FlipChannels,
    GridDecoding,
    ImageProcessing,
    ImageStep,
    Letterbox,
    Normalize,
    Processing,
    Rescale,
    Resize,
    Spec,
)
from edgevlm.runtime.tasks import TASKS, load_task

# What each task's graph gives, by Transformers' names, the usual one first.
OUTPUTS: dict[str, tuple[str, ...]] = {
    CLASSIFY: ("logits",),
    FEATURES: ("image_embeds", "pooler_output", "last_hidden_state"),
    DETECT: ("detections", "logits", "pred_boxes"),
    SEGMENT: ("logits",),
}
_QUERY_OUTPUTS = ("logits", "pred_boxes")


class CardInput(Spec, frozen=True, kw_only=True):
    """How a picture becomes the graph's input: resize, crop to ``height`` × ``width``, scale, normalise.

    Args:
        name: the graph's input; may be left out where it has one.
        height: of the input; may be left out where the graph fixes it.
        resize: ``stretch`` to ``resize_to`` × ``resize_to``, or bring the ``shortest_edge`` to ``resize_to``; or
            ``letterbox``, as large as fits the input with the aspect kept.
        resize_to: pixels; the input's own size where left out.
        place, fill: where a letterboxed picture stands, and the grey (0 to 255) of what is left over.
        scale: pixel values, 0 to 255, are multiplied by it.
        mean: of the scaled values, in the order of ``channel_order``; with ``std``.
    """

    name: str | None = None
    height: int | None = None
    width: int | None = None
    channel_order: Literal["rgb", "bgr"] = "rgb"
    resize: Literal["stretch", "shortest_edge", "letterbox"] = "stretch"
    resize_to: int | None = None
    place: Literal["top_left", "center"] | None = None
    fill: int | None = None
    resample: Resample = "bilinear"
    scale: float = 1 / 255
    mean: Color = (0.0, 0.0, 0.0)
    std: Color = (1.0, 1.0, 1.0)


class Card(Spec, frozen=True, kw_only=True):
    """What a model is for and how it is called.

    Args:
        labels: class names in the order of the logits, or a file beside the card with one a line; commas separate the
            names that data sets may have for one class.
        detection: how boxes follow from the outputs.
        outputs: the task's name of an output -> the graph's; may be left out where the graph has one output.
    """

    task: str
    input: CardInput = CardInput()
    name: str | None = None
    licence: str | None = None
    source: str | None = None
    labels: tuple[str, ...] | str = ()
    outputs: dict[str, str] = {}
    detection: DetectionDecoding | None = None


def find_card(beside: Path, card: Path | None) -> Path:
    """``card``, else ``<stem>.card.toml`` or ``<stem>.card.json`` beside the model.

    Raises: ModelError: there is none.
    """
    if card is not None:
        return card
    known = [beside.with_name(f"{beside.stem}.card.{kind}") for kind in ("toml", "json")]
    found = next((path for path in known if path.is_file()), None)
    if found is None:
        raise ModelError(
            f"'{beside}' has no card, so nobody knows its task and how a picture becomes its input.",
            hint=f"Write {known[0].name} beside it (see docs/models.md), or pass --card.",
        )
    return found


def read_card(path: Path) -> Card:
    """A card from TOML or JSON.

    Raises: UsageError: it cannot be read, a key is unknown, or a value is wrong.
    """
    if path.suffix == ".json":
        try:
            card = convert_table(json.loads(path.read_text(encoding="utf-8")), Card, where=f"card '{path}'")
        except OSError as error:
            raise UsageError(f"The card '{path}' cannot be read: {error.strerror}.", hint="Check the path.") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"The card '{path}' is not JSON: {error}.", hint="Mend the line that is named.") from error
    else:
        card = read_toml(path, Card, what="card")
    if card.task not in OUTPUTS:
        what = "needs a Hugging Face checkpoint" if card.task in TASKS else "is no task of edgevlm"
        raise UsageError(
            f"The card '{path}' names the task '{card.task}', which {what}.", hint=did_you_mean(card.task, OUTPUTS)
        )
    if (card.task == DETECT) != (card.detection is not None):
        raise UsageError(
            f"The card '{path}' is of {card.task} and has {'a' if card.detection else 'no'} [detection].",
            hint="Leave it out." if card.detection else 'Say how boxes follow: kind = "grid" or "queries".',
        )
    for name in card.outputs:
        if name not in _known_outputs(card):
            raise UsageError(
                f"The card '{path}' names the output '{name}', which {card.task} does not have.",
                hint=did_you_mean(name, _known_outputs(card)),
            )
    if _is_query(card) and 0 < len(card.outputs) < len(_QUERY_OUTPUTS):
        raise UsageError(
            f"The card '{path}' maps {', '.join(card.outputs)} alone.", hint="Map both logits and pred_boxes."
        )
    if card.input.resize != "letterbox" and (card.input.place or card.input.fill is not None):
        raise UsageError(
            f"The card '{path}' places and fills a picture that it resizes by '{card.input.resize}'.",
            hint='Add resize = "letterbox", or leave place and fill out.',
        )
    if any(value <= 0 for value in card.input.std):
        raise UsageError(f"The card '{path}' has std = {card.input.std}.", hint="Give three numbers above 0.")
    return card


def card_outputs(card: Card) -> tuple[str, ...]:
    """The task's names of the outputs, in the task's order."""
    if _is_query(card):
        return _QUERY_OUTPUTS
    known = _known_outputs(card)
    return tuple(name for name in known if name in card.outputs) or known[:1]


def _known_outputs(card: Card) -> tuple[str, ...]:
    if card.detection is None:
        return OUTPUTS[card.task]
    return _QUERY_OUTPUTS if _is_query(card) else ("detections",)


def _is_query(card: Card) -> bool:
    return card.detection is not None and not isinstance(card.detection, GridDecoding)


def whole_processing(card: Card, path: Path, image: ImageProcessing) -> Processing:
    """With what the task's answers need beside the picture.

    Raises: UsageError: the task cannot work with it.
    """
    processing = Processing(image=image, detection=card.detection)
    try:
        load_task(card.task).check(frozenset({"model"}), processing, None)
    except BundleError as error:
        raise UsageError(f"The card '{path}' is wrong: {error.message}", hint=error.hint) from error
    return processing


def card_labels(card: Card, path: Path) -> tuple[str, ...]:
    """The class names, from the card or the file that it names."""
    if not isinstance(card.labels, str):
        return card.labels
    file = path.parent / card.labels
    try:
        return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The labels '{file}' cannot be read: {error}.", hint="Mend 'labels' in the card.") from error


def card_processing(
    card: Card, *, where: str, graph_size: tuple[int | None, int | None], image_size: int | None
) -> ImageProcessing:
    """The card's steps.

    Args:
        graph_size: height and width that the graph fixes; None where it leaves them free.
        image_size: pictures of this size instead, where the graph leaves it free; resizing scales in proportion.
    Raises: ModelError: the size is unknown, or is not the graph's.
    """
    spec = card.input
    height = _size("height", spec.height, graph_size[0], where)
    width = _size("width", spec.width, graph_size[1], where)
    wanted = (height, width) if image_size is None else (image_size, image_size)
    for name, fixed, asked in zip(("height", "width"), graph_size, wanted, strict=True):
        if fixed is not None and fixed != asked:
            raise ModelError(
                f"'{where}' has an input of {name} {fixed}, and {asked} was asked for.",
                hint="Leave --image-size out: this graph is of one size.",
            )
    of_height, of_width = wanted[0] / height, wanted[1] / width
    steps: list[ImageStep] = []
    if spec.resize == "shortest_edge":
        edge = spec.resize_to or min(height, width)
        if edge < min(height, width):
            raise ModelError(
                f"'{where}' is resized to a shortest edge of {edge}, under its input's {height}×{width}.",
                hint="Raise resize_to in the card.",
            )
        steps.append(Resize(shortest_edge=round(edge * min(of_height, of_width)), resample=spec.resample))
    elif spec.resize == "letterbox":
        if spec.resize_to is not None:
            raise ModelError(
                f"The card of '{where}' letterboxes to {spec.resize_to} pixels.",
                hint="Leave resize_to out: a letterbox is as large as the input.",
            )
        fill = 114 if spec.fill is None else spec.fill
        if not 0 <= fill <= 255:
            raise ModelError(f"The card of '{where}' has fill = {fill}.", hint="Give a grey from 0 to 255.")
        steps.append(
            Letterbox(
                height=wanted[0], width=wanted[1], place=spec.place or "top_left", fill=fill, resample=spec.resample
            )
        )
    else:
        to_height, to_width = (spec.resize_to or height, spec.resize_to or width)
        steps.append(
            Resize(height=round(to_height * of_height), width=round(to_width * of_width), resample=spec.resample)
        )
    if spec.resize == "shortest_edge" or (spec.resize_to not in (None, height) or spec.resize_to not in (None, width)):
        steps.append(CenterCrop(height=wanted[0], width=wanted[1]))
    steps.append(Rescale(factor=spec.scale))
    if spec.channel_order == "bgr":
        steps.append(FlipChannels())
    if spec.mean != (0.0, 0.0, 0.0) or spec.std != (1.0, 1.0, 1.0):
        steps.append(Normalize(mean=spec.mean, std=spec.std))
    return ImageProcessing(height=wanted[0], width=wanted[1], steps=tuple(steps))


def _size(name: str, asked: int | None, fixed: int | None, where: str) -> int:
    size = asked if asked is not None else fixed
    if size is None:
        raise ModelError(
            f"'{where}' leaves the {name} of its input open, and so does its card.",
            hint=f"Add '{name}' to the card's [input].",
        )
    if size < 1:
        raise ModelError(f"The card of '{where}' has {name} = {size}.", hint="Give pixels, at least 1.")
    if fixed is not None and fixed != size:
        raise ModelError(
            f"'{where}' has an input of {name} {fixed}, and its card says {size}.", hint=f"Mend '{name}' in the card."
        )
    return size
