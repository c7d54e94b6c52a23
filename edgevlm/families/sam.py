"""SAM: an image encoder that sees the picture once, and a mask decoder that points and boxes are put to.

Paper: Segment Anything, arXiv:2304.02643 (Apache-2.0). Code: Transformers' ``SamModel``. ``TinyVitSam`` is the same
with TinyViT for its encoder, as in MobileSAM (arXiv:2306.14289); see ``tiny_vit``.

The decoder's graph holds the prompt encoder, and the embedding of the image's places as a constant. It gives all of the
decoder's masks: the single one first, then the three suggestions, of which Transformers gives either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from edgevlm.families import MASKS, Architecture, Checkpoint, Family, image_input
from edgevlm.model import Graph, Model
from edgevlm.runtime.spec import ImageProcessing, TensorSpec
from edgevlm.runtime.tasks.mask_generation import IMAGE_ENCODER, MASK_DECODER

_NO_POINT = -1


class Sam(Family):
    architectures: ClassVar[Mapping[str, Architecture]] = {
        "SamModel": Architecture(tasks=(MASKS,), sizes="fixed"),
        "TinyVitSam": Architecture(tasks=(MASKS,), sizes="fixed"),
    }
    # Transformers leaves out of the nested configurations what equals its defaults; these are they.
    vision_defaults: ClassVar[Mapping[str, int]] = {"image_size": 1024, "patch_size": 16, "output_channels": 256}

    def vision_config(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        return {**self.vision_defaults, **checkpoint.config.get("vision_config", {})}

    def graphs(self, checkpoint: Checkpoint, task: str, image: ImageProcessing) -> tuple[Graph, ...]:
        config = self.vision_config(checkpoint)
        side = config["image_size"] // config["patch_size"]
        embeds = TensorSpec(
            name="image_embeds", dtype="float32", shape=("batch", config["output_channels"], side, side)
        )
        points = TensorSpec(name="input_points", dtype="float32", shape=("batch", "prompts", "points", 2))
        labels = TensorSpec(name="input_labels", dtype="int64", shape=("batch", "prompts", "points"))
        return (
            Graph(name=IMAGE_ENCODER, inputs=(image_input(image),), outputs=("image_embeds",)),
            Graph(name=MASK_DECODER, inputs=(embeds, points, labels), outputs=("pred_masks", "iou_scores")),
        )

    def options(self, checkpoint: Checkpoint) -> dict[str, Any]:
        is_ours = checkpoint.architecture == "TinyVitSam"
        return {"class": "edgevlm.families.tiny_vit:TinyVitSam"} if is_ours else {}

    def load(self, model: Model) -> Any:
        return with_places(super().load(model))

    def call(self, module: Any, graph: str, *inputs: Any) -> tuple[Any, ...]:
        if graph == IMAGE_ENCODER:
            return (module.vision_encoder(inputs[0]).last_hidden_state,)
        return masks(module, *inputs)


def with_places(module: Any) -> Any:
    """The module with the embedding of the image's places as a buffer, so that no graph computes it."""
    places = module.get_image_wide_positional_embeddings().detach()
    module.register_buffer("image_places", places, persistent=False)
    return module


def _places(module: Any) -> Any:
    """As they were folded in, or of a module in training anew."""
    return module.image_places if hasattr(module, "image_places") else module.get_image_wide_positional_embeddings()


def masks(module: Any, image_embeds: Any, input_points: Any, input_labels: Any) -> tuple[Any, Any]:
    """All masks that the decoder has for each prompt, and how well it expects them to fit.

    Shapes: image_embeds [n, d, h, w], input_points [n, prompts, points, 2], input_labels int64 [n, prompts, points] ->
        pred_masks [n, prompts, 4, 4h, 4w], iou_scores [n, prompts, 4].
    Source: Transformers' ``SamPromptEncoder`` and ``SamMaskDecoder``, which cuts off the first or the other masks.
    """
    import torch

    decoder = module.mask_decoder
    n, n_prompts = input_points.shape[:2]
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = tokens.expand(n, n_prompts, *tokens.shape)
    tokens = torch.cat([tokens, _prompt_embeds(module.prompt_encoder, input_points, input_labels)], dim=2)
    seen = image_embeds + module.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    # Each picture once for each of its prompts, which the transformer holds in its batch.
    seen = seen[:, None].expand(-1, n_prompts, -1, -1, -1).flatten(0, 1)
    places = _places(module).expand(seen.shape[0], -1, -1, -1)
    tokens, keys = decoder.transformer(
        point_embeddings=tokens, image_embeddings=seen, image_positional_embeddings=places, attention_similarity=None
    )
    enlarged = keys.transpose(2, 3).reshape(seen.shape)
    enlarged = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(enlarged)))
    enlarged = decoder.activation(decoder.upscale_conv2(enlarged))
    heads = decoder.output_hypernetworks_mlps
    kernels = torch.stack([head(tokens[:, :, 1 + i]) for i, head in enumerate(heads)], dim=2)
    height, width = enlarged.shape[-2:]
    found = kernels @ enlarged.reshape(n, n_prompts, -1, height * width)
    return found.reshape(n, n_prompts, -1, height, width), decoder.iou_prediction_head(tokens[:, :, 0])


def decode(module: Any, image_embeds: Any, prompts: Mapping[str, Any]) -> dict[str, Any]:
    """``pred_masks`` and ``iou_scores``, all of them, of prompts as Transformers has them; with gradient.

    Shapes: of ``prompts``, at least points or boxes: input_points [n, prompts, points, 2], input_labels
        [n, prompts, points] (1 where left out), input_boxes [n, prompts, 4]; in pixels of the graph's input.
    """
    pred_masks, iou_scores = masks(module, image_embeds, *_as_points(prompts))
    return {"pred_masks": pred_masks, "iou_scores": iou_scores}


def _as_points(prompts: Mapping[str, Any]) -> tuple[Any, Any]:
    """Points and their labels, then a box's corners, or what stands for no box."""
    import torch

    points, boxes = prompts.get("input_points"), prompts.get("input_boxes")
    given = points if points is not None else boxes
    assert given is not None, "a prompt has points or a box"
    n, n_prompts = given.shape[:2]
    ends, kinds = torch.zeros(n, n_prompts, 1, 2, device=given.device), [_NO_POINT]
    if boxes is not None:
        ends, kinds = boxes.reshape(n, n_prompts, 2, 2), [2, 3]
    end_labels = torch.tensor(kinds, device=given.device).expand(n, n_prompts, -1)
    if points is None:
        return ends, end_labels
    labels = prompts.get("input_labels")
    labels = torch.ones_like(points[..., 0], dtype=torch.int64) if labels is None else labels
    return torch.cat([points, ends.to(points.dtype)], dim=2), torch.cat([labels, end_labels.to(labels.dtype)], dim=2)


def _prompt_embeds(encoder: Any, points: Any, labels: Any) -> Any:
    import torch

    shares = (points + 0.5) / encoder.input_image_size  # the middle of a pixel
    kinds = labels[..., None]
    embeds = torch.where(kinds == _NO_POINT, encoder.not_a_point_embed.weight, encoder.shared_embedding(shares))
    for label, embedding in enumerate(encoder.point_embed):
        embeds = torch.where(kinds == label, embeds + embedding.weight, embeds)
    return embeds
