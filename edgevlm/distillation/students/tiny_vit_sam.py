"""TinyViT-5M in the place of SAM's image encoder: MobileSAM.

Papers: Faster Segment Anything: Towards Lightweight SAM for Mobile Applications, arXiv:2306.14289 (Apache-2.0).
TinyViT: Fast Pretraining Distillation for Small Vision Transformers, arXiv:2207.10666 (MIT).
Code: ``edgevlm.families.tiny_vit``. The encoder has 5.07 million parameters and SAM's neck 0.67; the 6.06 that are
sometimes told count the classifier of ImageNet's classes, which does nothing here.

It starts with the teacher's prompt encoder and mask decoder, so that learning its image embeddings is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.distillation.students import refuse_names, refuse_task
from edgevlm.distillation.students.layout import save_student, students_pictures
from edgevlm.errors import UsageError
from edgevlm.families import MASKS
from edgevlm.model import Model
from edgevlm.runtime.spec import ImageProcessing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgevlm.distillation.step import Batch

_OUTPUTS = frozenset({"image_embeds", "image_features", "pred_masks", "iou_scores"})
_DECODED = frozenset({"pred_masks", "iou_scores"})
_STRIDE = 16  # of ``edgevlm.families.tiny_vit``, which needs torch


@dataclass(frozen=True, kw_only=True)
class TinyVitSamStudent:
    """Args: config: of the encoder, where it is not TinyViT-5M."""

    name: str
    config: Mapping[str, Any]
    tasks: tuple[str, ...] = (MASKS,)

    def build(
        self, teacher: Model, *, image_size: int | None = None, seed: int = 0, n_classes: int | None = None
    ) -> nn.Module:
        """The module, of which only the image encoder is untrained; see ``Student.build``.

        Raises: UsageError: the teacher is no SAM, or pictures are of no multiple of 16 pixels.
        """
        refuse_task(self, teacher)
        image = self.processing(teacher, image_size)
        from edgevlm.families.loading import import_torch, load_module, quiet

        torch = import_torch()
        from edgevlm.families import tiny_vit

        theirs = load_module(teacher)
        shared = {
            key: getattr(theirs.config, key).to_dict() for key in ("prompt_encoder_config", "mask_decoder_config")
        }
        # How large the picture is decides where a prompt lies, and no weight.
        places = {"patch_size": _STRIDE, "image_embedding_size": image.height // _STRIDE}
        shared["prompt_encoder_config"] |= {"image_size": image.height, **places}
        vision = theirs.config.vision_config
        encoder = {
            **self.config,
            "image_size": image.height,
            "output_channels": vision.output_channels,
            "num_pos_feats": vision.num_pos_feats,
            "scale": vision.scale,
        }
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = tiny_vit.TinyVitSamConfig(vision_config=encoder, **shared)
            module: Any = tiny_vit.TinyVitSam._from_config(config, attn_implementation="eager")
        for part in ("prompt_encoder", "mask_decoder", "shared_image_embedding"):
            getattr(module, part).load_state_dict(getattr(theirs, part).state_dict())
        built: nn.Module = module.eval()
        return built

    def outputs(self, module: nn.Module, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        """What ``module`` makes of ``batch``; see ``Student.outputs``.

        Prompts are as ``edgevlm.families.sam.decode`` takes them.

        Raises: UsageError: masks were asked for without prompts.
        """
        from edgevlm.families.sam import decode

        made: Any = module
        refuse_names(self, names, _OUTPUTS)
        found: dict[str, Tensor] = {}
        if not names:
            return found
        found["image_features"] = made.vision_encoder.features(batch.pixel_values)
        if names == {"image_features"}:
            return found
        found["image_embeds"] = made.vision_encoder.neck(found["image_features"].permute(0, 2, 3, 1))
        if names & _DECODED:
            if batch.prompts is None:
                raise UsageError(
                    f"'{self.name}' gives masks of what points and boxes show, and this batch has none.",
                    hint="Use data with outlines of things, or a recipe whose objectives compare image_embeds alone.",
                )
            found |= decode(made, found["image_embeds"], batch.prompts)
        return {name: found[name] for name in names}

    def processing(self, teacher: Model, image_size: int | None = None) -> ImageProcessing:
        """The teacher's own, at the student's size.

        Raises: UsageError: the size is no square of a multiple of 16 pixels.
        """
        image = students_pictures(teacher, image_size)
        if image.height != image.width or image.height % _STRIDE:
            raise UsageError(
                f"'{self.name}' was to see pictures of {image.height} × {image.width} pixels.",
                hint=f"Ask for an image size that is a multiple of {_STRIDE}.",
            )
        return image

    def save(self, module: nn.Module, folder: Path, teacher: Model) -> None:
        """Write a checkpoint; see ``Student.save``."""
        made: Any = module
        image = students_pictures(teacher, made.config.vision_config.image_size)
        save_student(module, folder, teacher, image)


TINY_VIT_5M = TinyVitSamStudent(name="tinyvit-5m-sam", config={})
