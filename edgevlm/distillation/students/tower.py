"""What students around a published image tower share: a classifier, the tower alone, or two towers, by the task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgevlm.distillation.students import refuse_names, refuse_task
from edgevlm.distillation.students.layout import save_student, students_pictures
from edgevlm.errors import ModelError, UsageError
from edgevlm.families import CLASSIFY, FEATURES, ZERO_SHOT
from edgevlm.model import Model
from edgevlm.runtime.spec import ImageProcessing, Spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgevlm.distillation.step import Batch

_CLIP_HEAD_WIDTH = 64  # of every attention head in CLIP's text towers

_OUTPUTS: Mapping[str, frozenset[str]] = {
    CLASSIFY: frozenset({"logits", "image_features"}),
    FEATURES: frozenset({"image_embeds", "image_features"}),
    ZERO_SHOT: frozenset({"image_embeds", "image_features", "text_embeds", "text_features", "logit_scale"}),
}


class TextTower(Spec, frozen=True, kw_only=True):
    """The size of a CLIP text tower; a teacher's that is narrower or shallower sets the limit.

    Vocabulary, length and special tokens are the teacher's.
    """

    width: int
    n_layers: int


# As large as the text towers of TinyCLIP's "Text-3M" and "Text-19M" (arXiv:2309.12314). The larger is as wide as those
# of CLIP's ViT-B, so that their layers can be inherited. Neither costs a picture time: where the labels are known,
# their embeddings are computed once.
SMALL_TEXT = TextTower(width=256, n_layers=3)
LARGE_TEXT = TextTower(width=512, n_layers=6)


@dataclass(frozen=True, kw_only=True)
class TowerStudent:
    """An image tower of Transformers as a student.

    Args:
        transformers_name: what its classes there begin with.
        config: what is not the default of its configuration class.
        width: of its pooled features.
        text: the text tower beside it where the teacher has two.
    """

    name: str
    transformers_name: str
    config: Mapping[str, Any]
    width: int
    text: TextTower
    tasks: tuple[str, ...] = (CLASSIFY, FEATURES, ZERO_SHOT)

    def build(
        self, teacher: Model, *, image_size: int | None = None, seed: int = 0, n_classes: int | None = None
    ) -> nn.Module:
        """The untrained module for the teacher's task; see ``Student.build``."""
        from edgevlm.families.loading import import_torch, quiet

        refuse_task(self, teacher)
        torch = import_torch()
        image = self.processing(teacher, image_size)
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if teacher.task == ZERO_SHOT:
                module = self._two_towers(teacher, image)
            elif teacher.task == CLASSIFY:
                module = self._one_tower(image, "ForImageClassification", labels=_labels(teacher, n_classes))
            else:
                module = self._one_tower(image, "Model")
            start_afresh(module)
        built: nn.Module = module.eval()
        return built

    def outputs(self, module: nn.Module, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        """What ``module`` makes of ``batch``; see ``Student.outputs``."""
        made: Any = module
        if hasattr(made, "text_model"):
            refuse_names(self, names, _OUTPUTS[ZERO_SHOT])
            return _two_tower_outputs(made, batch, names)
        is_classifier = hasattr(made, "classifier")
        refuse_names(self, names, _OUTPUTS[CLASSIFY if is_classifier else FEATURES])
        found: dict[str, Tensor] = {}
        if not names:
            return found
        tower = made.base_model
        got = tower(pixel_values=batch.pixel_values)
        if is_classifier:
            dropout = getattr(made, "dropout", None)  # MobileViT has one before its last layer, MobileViTv2 none
            pooled = got.pooler_output if dropout is None else dropout(got.pooler_output)
            found["logits"] = made.classifier(pooled)
        else:
            found["image_embeds"] = got.pooler_output
        found["image_features"] = got.last_hidden_state
        return {name: found[name] for name in names}

    def processing(self, teacher: Model, image_size: int | None = None) -> ImageProcessing:
        """The teacher's own, at the student's size.

        Not the BGR without mean and deviation that MobileViT's checkpoints want: a student starts without weights, so
        nothing ties it to them, its first convolution takes up any other mean and deviation, and where the sizes are
        equal teacher and student see the very same pixels, prepared once.
        """
        return students_pictures(teacher, image_size)

    def save(self, module: nn.Module, folder: Path, teacher: Model) -> None:
        """Write a checkpoint; see ``Student.save``."""
        made: Any = module
        config = getattr(made.config, "vision_config", made.config)
        height, width = _height_and_width(config.image_size)
        image = students_pictures(teacher, None)
        if (image.height, image.width) != (height, width):
            image = students_pictures(teacher, height)
        save_student(module, folder, teacher, image)

    def _tower_config(self, image: ImageProcessing, **more: Any) -> Any:
        import transformers

        size = image.height if image.height == image.width else [image.height, image.width]
        return getattr(transformers, f"{self.transformers_name}Config")(**self.config, image_size=size, **more)

    def _one_tower(self, image: ImageProcessing, suffix: str, *, labels: tuple[str, ...] = ()) -> Any:
        import transformers

        named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        config = self._tower_config(image, **(named if labels else {}))
        return getattr(transformers, f"{self.transformers_name}{suffix}")._from_config(
            config, attn_implementation="eager"
        )

    def _two_towers(self, teacher: Model, image: ImageProcessing) -> Any:
        import transformers

        space = TeachersSpace.read(teacher)
        # ``VisionTextDualEncoderModel`` asks the image tower's configuration for the width of its pooled features.
        config = transformers.VisionTextDualEncoderConfig(
            vision_config=self._tower_config(image, hidden_size=self.width).to_dict(),
            text_config=text_config(self.text, space).to_dict(),
            projection_dim=space.projection_dim,
        )
        dual_encoder: Any = transformers.VisionTextDualEncoderModel
        return dual_encoder._from_config(config, attn_implementation="eager")


@dataclass(frozen=True, kw_only=True)
class TeachersSpace:
    """What a student's text tower takes over from its teacher."""

    projection_dim: int
    vocab_size: int
    length: int
    width: int
    mlp_width: int
    n_layers: int
    n_heads: int
    hidden_act: str
    start_token_id: int | None
    end_token_id: int
    pad_token_id: int

    @classmethod
    def read(cls, teacher: Model) -> TeachersSpace:
        """From the teacher's configuration and tokenizer; no weights are loaded.

        Raises: UsageError: it has no text tower. ModelError: its tokenizer marks no end of a text.
        """
        import transformers

        text = teacher.processing.text
        if text is None or not teacher.family:
            raise UsageError(
                f"'{teacher.name}' has no text tower to learn from.", hint="Use a teacher such as CLIP or SigLIP."
            )
        config = transformers.AutoConfig.from_pretrained(teacher.source.location, local_files_only=True)
        tower = config.text_config
        projection_dim = getattr(config, "projection_dim", None) or config.vision_config.hidden_size
        start, end = _special_tokens(teacher)
        return cls(
            projection_dim=projection_dim,
            vocab_size=tower.vocab_size,
            length=text.max_length,
            width=tower.hidden_size,
            mlp_width=tower.intermediate_size,
            n_layers=tower.num_hidden_layers,
            n_heads=tower.num_attention_heads,
            hidden_act=tower.hidden_act,
            start_token_id=start,
            end_token_id=end,
            pad_token_id=text.pad_token_id,
        )


def _special_tokens(teacher: Model) -> tuple[int | None, int]:
    """The tokens that the teacher's tokenizer puts before (where it does) and after every text.

    Raises: ModelError: none stands after a text, or CLIP's text tower could not find it.
    """
    from edgevlm.runtime.text import load_tokenizer, tokenize

    assert teacher.processing.text is not None
    text = msgspec.structs.replace(teacher.processing.text, padding="longest", input_names=("input_ids",))
    tokenizer = load_tokenizer(Path(teacher.tokenizer_file), text)
    # Alone, so that nothing is padded.
    rows = [tokenize([words], tokenizer, text)["input_ids"][0].tolist() for words in ("a", "photo of two", "")]
    ends, starts = {row[-1] for row in rows if row}, {row[0] for row in rows if row}
    if len(ends) != 1:
        raise ModelError(
            f"The tokenizer of '{teacher.name}' ends texts with no token of its own, and there a student's text tower "
            "is read.",
            hint="Add an end token to the post_processor in its tokenizer.json.",
        )
    (end,) = ends
    if end == 2:
        raise ModelError(
            f"The tokenizer of '{teacher.name}' ends texts with token 2, which Transformers' CLIPTextModel takes for a "
            "request to read the text at its highest token.",
            hint="Use a teacher whose tokenizer has another end token.",
        )
    start = starts.pop() if len(starts) == 1 and starts != {end} else None
    return start, end


def text_config(size: TextTower, space: TeachersSpace) -> Any:
    """Transformers' configuration of a student's text tower."""
    import transformers

    width = min(size.width, space.width)
    is_teachers = width == space.width
    return transformers.CLIPTextConfig(
        vocab_size=space.vocab_size,
        max_position_embeddings=space.length,
        hidden_size=width,
        intermediate_size=space.mlp_width if is_teachers else 4 * width,
        num_hidden_layers=min(size.n_layers, space.n_layers),
        num_attention_heads=space.n_heads if is_teachers else width // _CLIP_HEAD_WIDTH,
        hidden_act=space.hidden_act,
        projection_dim=space.projection_dim,
        bos_token_id=space.start_token_id,
        eos_token_id=space.end_token_id,
        pad_token_id=space.pad_token_id,
    )


def _two_tower_outputs(module: Any, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if names & {"image_embeds", "image_features"}:
        image = module.vision_model(pixel_values=batch.pixel_values)
        found["image_features"] = image.last_hidden_state
        found["image_embeds"] = module.visual_projection(image.pooler_output)
    if names & {"text_embeds", "text_features"}:
        if batch.input_ids is None:
            raise UsageError(
                "An objective asks for texts, and the data has none.", hint="Name a data set with captions or labels."
            )
        text = module.text_model(input_ids=batch.input_ids)
        found["text_features"] = text.last_hidden_state
        found["text_embeds"] = module.text_projection(text.pooler_output)
    if "logit_scale" in names:
        found["logit_scale"] = module.logit_scale.exp()
    return {name: found[name] for name in names}


def _labels(teacher: Model, n_classes: int | None) -> tuple[str, ...]:
    if teacher.labels:
        if n_classes not in (None, len(teacher.labels)):
            raise UsageError(
                f"{n_classes} classes were asked for, and '{teacher.name}' has {len(teacher.labels)}.",
                hint="Leave the number of classes to the teacher.",
            )
        return teacher.labels
    if n_classes is None:
        raise UsageError(
            f"'{teacher.name}' has no labels, so nobody knows how many classes a student of it has.",
            hint="Pass the teacher's labels.",
        )
    return tuple(f"LABEL_{i}" for i in range(n_classes))


def start_afresh(module: Any) -> None:
    """He's initialization for convolutions (arXiv:1502.01852), and batch norms that change nothing yet.

    Transformers draws both convolutions and MobileViT's batch norms' factors from a normal of deviation 0.02: what came
    out of an untrained XXS was then below 1e-42. By the number of inputs, not of outputs: a depthwise kernel has few.
    """
    import torch

    for part in module.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                torch.nn.init.zeros_(part.bias)
        elif isinstance(part, torch.nn.BatchNorm2d):
            part.reset_parameters()


def _height_and_width(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
