"""The model families of Transformers that edgevlm knows: one file per family, one line here.

A family says, from a checkpoint's JSON alone, which graphs a model becomes; torch is imported only to load and call it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from edgevlm.errors import ModelError
from edgevlm.model import Graph, Model
from edgevlm.runtime.spec import ImageProcessing, Scoring, Spec, TensorSpec

FAMILIES: dict[str, str] = {
    "image_classifier": "edgevlm.families.image_classifier:ImageClassifier",
    "image_tower": "edgevlm.families.image_tower:ImageTower",
    "clip": "edgevlm.families.clip:Clip",
    "sam": "edgevlm.families.sam:Sam",
    "siglip": "edgevlm.families.siglip:Siglip",
    "dual_encoder": "edgevlm.families.dual_encoder:DualEncoder",
    "torch_module": "edgevlm.families.torch_module:TorchModule",
}

CLASSIFY = "image-classification"
ZERO_SHOT = "zero-shot-image-classification"
FEATURES = "image-feature-extraction"
DETECT = "object-detection"
SEGMENT = "semantic-segmentation"
MASKS = "mask-generation"


Sizes = Literal["fixed", "interpolated", "any"]


class Architecture(Spec, frozen=True, kw_only=True):
    """What a class of Transformers can be compiled to.

    Args:
        tasks: the first is the one that its name promises.
        sizes: which picture sizes its weights allow: the configured one, others by interpolating the position
            embeddings (accuracy suffers), or any.
    """

    tasks: tuple[str, ...]
    sizes: Sizes


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A Hugging Face folder as far as its JSON tells.

    Args:
        tensors: names of the weights; None where only a pickle knows them.
    """

    folder: Path
    config: Mapping[str, Any]
    architecture: str
    tensors: frozenset[str] | None


class TextFacts(Spec, frozen=True, kw_only=True):
    """What a text tower takes: token ids cut or padded to ``max_length``.

    Args:
        is_length_free: padding should not change what the tower gives, so that a text can go in at its own length.
            This is a claim: the export proves it, or leaves the length fixed.
        same_tokens: two texts that the tokenizer must not tell apart; null where there is nothing to ask.
        same_because: what it does to a text, for the sentence that says that it does not.
    """

    max_length: int
    pad_token_id: int | None = None
    input_names: tuple[str, ...] = ("input_ids",)
    is_length_free: bool = False
    same_tokens: tuple[str, str] | None = None
    same_because: str = ""


class Family:
    """What all families share; a family overrides what is different."""

    architectures: ClassVar[Mapping[str, Architecture]] = {}

    def graphs(self, checkpoint: Checkpoint, task: str, image: ImageProcessing) -> tuple[Graph, ...]:
        """The graphs that ``task`` needs, in the order in which they run."""
        raise NotImplementedError

    def text(self, checkpoint: Checkpoint) -> TextFacts | None:
        return None

    def vision_config(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        """The part of the configuration that describes the image tower."""
        return checkpoint.config

    def sizes(self, checkpoint: Checkpoint) -> Sizes:
        """Which picture sizes the weights allow."""
        return self.architectures[checkpoint.architecture].sizes

    def options(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What loading must know beside the configuration."""
        return {}

    def load(self, model: Model) -> Any:
        """The ``torch.nn.Module`` with its weights, float32, eager attention, in evaluation mode."""
        from edgevlm.families.loading import load_checkpoint

        return load_checkpoint(model)

    def call(self, module: Any, graph: str, *inputs: Any) -> tuple[Any, ...]:
        """The outputs of ``graph``, in its order."""
        raise NotImplementedError

    def scoring(self, module: Any) -> Scoring | None:
        """How the embeddings of two towers become scores; None where there is one tower."""
        return None


def load_family(name: str) -> Family:
    """The family called ``name`` in ``FAMILIES``."""
    module, _, attribute = FAMILIES[name].partition(":")
    family: Family = getattr(importlib.import_module(module), attribute)()
    return family


def family_of(architecture: str) -> str | None:
    """The name of the family that knows the Transformers class ``architecture``."""
    return next((name for name in FAMILIES if architecture in load_family(name).architectures), None)


def text_inputs(facts: TextFacts) -> tuple[TensorSpec, ...]:
    length = "sequence" if facts.is_length_free else facts.max_length
    return tuple(TensorSpec(name=name, dtype="int64", shape=("batch", length)) for name in facts.input_names)


def image_input(image: ImageProcessing) -> TensorSpec:
    return TensorSpec(name=image.input_name, dtype="float32", shape=("batch", 3, image.height, image.width))


def check_size(family: Family, checkpoint: Checkpoint, image: ImageProcessing, *, is_asked: bool) -> None:
    """Whether the weights allow the size that the preprocessing makes.

    Args:
        is_asked: the size was asked for with ``image_size``, so interpolating is what the user wants.
    Raises: ModelError: they do not.
    """
    sizes = family.sizes(checkpoint)
    config = family.vision_config(checkpoint)
    trained = config.get("image_size")
    if sizes == "any" or trained is None:
        return
    height, width = (trained, trained) if isinstance(trained, int) else (int(trained[0]), int(trained[1]))
    got = (image.height, image.width)
    if got == (height, width):
        return
    where = f"{checkpoint.architecture} takes {height}×{width} pictures, and {got[0]}×{got[1]} "
    if not is_asked:
        raise ModelError(f"{where}is what its preprocessing makes.", hint=f"Pass --image-size {height}.")
    if sizes == "fixed":
        raise ModelError(f"{where}was asked for.", hint=f"Leave --image-size out, or pass {height}.")
    patch = config.get("patch_size")
    if isinstance(patch, int) and (got[0] % patch or got[1] % patch):
        raise ModelError(f"{where}was asked for.", hint=f"Ask for a multiple of its patch size, {patch}.")


def size_kwargs(vision_config: Any, pixel_values: Any) -> dict[str, bool]:
    """Interpolate the position embeddings exactly where the picture is not of the size that they were trained for."""
    trained = vision_config.image_size
    height, width = (trained, trained) if isinstance(trained, int) else trained
    is_other = tuple(pixel_values.shape[-2:]) != (height, width)
    return {"interpolate_pos_encoding": True} if is_other else {}
