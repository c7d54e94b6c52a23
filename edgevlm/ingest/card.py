"""The card of a model that carries no configuration of its own: an ONNX file or a PyTorch module.

``docs/models.md`` describes the format; the classes below are its reference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from edgevlm.data_files import convert_table, read_toml
from edgevlm.errors import ModelError, UsageError, did_you_mean
from edgevlm.families import CLASSIFY, FEATURES
from edgevlm.ingest.processing import Color, Resample
from edgevlm.runtime.spec import (
    CenterCrop,
    FlipChannels,
    ImageProcessing,
    ImageStep,
    Normalize,
    Rescale,
    Resize,
    Spec,
)
from edgevlm.runtime.tasks import TASKS

# What each task's graph gives, by Transformers' names, the usual one first.
OUTPUTS: dict[str, tuple[str, ...]] = {
    CLASSIFY: ("logits",),
    FEATURES: ("image_embeds", "pooler_output", "last_hidden_state"),
}


class CardInput(Spec, frozen=True, kw_only=True):
    """How a picture becomes the graph's input: resize, crop to ``height`` × ``width``, scale, normalise.

    Args:
        name: the graph's input; may be left out where it has one.
        height: of the input; may be left out where the graph fixes it.
        resize: ``stretch`` to ``resize_to`` × ``resize_to``, or bring the ``shortest_edge`` to ``resize_to``.
        resize_to: pixels; the input's own size where left out.
        scale: pixel values, 0 to 255, are multiplied by it.
        mean: of the scaled values, in the order of ``channel_order``; with ``std``.
    """

    name: str | None = None
    height: int | None = None
    width: int | None = None
    channel_order: Literal["rgb", "bgr"] = "rgb"
    resize: Literal["stretch", "shortest_edge"] = "stretch"
    resize_to: int | None = None
    resample: Resample = "bilinear"
    scale: float = 1 / 255
    mean: Color = (0.0, 0.0, 0.0)
    std: Color = (1.0, 1.0, 1.0)


class Card(Spec, frozen=True, kw_only=True):
    """What a model is for and how it is called.

    Args:
        labels: class names in the order of the logits, or a file beside the card with one a line.
        outputs: the task's name of an output -> the graph's; may be left out where the graph has one output.
    """

    task: str
    input: CardInput = CardInput()
    name: str | None = None
    licence: str | None = None
    source: str | None = None
    labels: tuple[str, ...] | str = ()
    outputs: dict[str, str] = {}


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
    for name in card.outputs:
        if name not in OUTPUTS[card.task]:
            raise UsageError(
                f"The card '{path}' names the output '{name}', which {card.task} does not have.",
                hint=did_you_mean(name, OUTPUTS[card.task]),
            )
    if any(value <= 0 for value in card.input.std):
        raise UsageError(f"The card '{path}' has std = {card.input.std}.", hint="Give three numbers above 0.")
    return card


def card_outputs(card: Card) -> tuple[str, ...]:
    """The task's names of the outputs, in the task's order."""
    return tuple(name for name in OUTPUTS[card.task] if name in card.outputs) or OUTPUTS[card.task][:1]


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
