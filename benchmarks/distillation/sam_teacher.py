"""A small SAM for the study of masks, trained on the built-in shapes with points and boxes as prompts.

    python -m benchmarks.distillation sam

Its image encoder has six layers of ViT-S (11 million parameters), on pictures of 128 × 128 pixels. A prompt is a box or
one point. The loss is SAM's: 20 × focal + dice, and the squared error of the overlap that the model expects of each
mask. A shape has no parts, so that all four masks are held to the thing: held to the best of three alone, they learned
one shape each and no prompt. SAM's encoder comes from a pre-training; here a head that is thrown away says of each
pixel whether it is a thing's, which is quicker.
Source: Segment Anything, arXiv:2304.02643.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgevlm.data.readers import SHAPES, SHAPES_TRAINING_SEED, read_data_set
from edgevlm.distillation.objectives.prompts import dice
from edgevlm.families.loading import quiet
from edgevlm.families.sam import masks as masks_of
from edgevlm.runtime.image import decode_image, preprocess
from edgevlm.runtime.spec import Prompt
from edgevlm.runtime.tasks.mask_generation import decoder_prompts
from edgevlm.training.checkpoint import Checkpoint, identity_of
from edgevlm.training.memory import keep_memory
from edgevlm.training.schedule import rate_at

SIZE = 128
SEED = 0
BATCH_SIZE = 16
N_PROMPTS = 4
LEARNING_RATE = 8e-4
WEIGHT_DECAY = 0.1
CHECKPOINT_EVERY = 50
INITIALIZER_RANGE = 0.02
"""Of the image encoder; Transformers' default for SAM, 1e-10, is for weights that are loaded, and learns nothing."""
_PATCH = 16
_POINT_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class _Rates:
    n_steps: int
    learning_rate: float = LEARNING_RATE


def config(*, size: int = SIZE, width: int = 384, n_layers: int = 6, n_heads: int = 6, decoder: int = 128) -> Any:
    """SAM's architecture; every layer looks at the whole of so small a picture."""
    import transformers

    grid = size // _PATCH
    return transformers.SamConfig(
        vision_config={
            "hidden_size": width,
            "num_hidden_layers": n_layers,
            "num_attention_heads": n_heads,
            "mlp_dim": 4 * width,
            "image_size": size,
            "patch_size": _PATCH,
            "output_channels": decoder,
            "num_pos_feats": decoder // 2,
            "window_size": 0,
            "global_attn_indexes": list(range(n_layers)),
            "initializer_range": INITIALIZER_RANGE,
        },
        prompt_encoder_config={
            "hidden_size": decoder, "image_size": size, "patch_size": _PATCH, "image_embedding_size": grid,
        },
        mask_decoder_config={"hidden_size": decoder, "mlp_dim": 4 * decoder, "iou_head_hidden_dim": decoder},
    )  # fmt: skip


def save(module: Any, folder: Path, *, size: int = SIZE) -> None:
    """In Hugging Face's layout, with the preprocessing; the folder appears whole."""
    import transformers

    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with quiet():
        module.save_pretrained(unfinished)
    transformers.SamImageProcessorPil(
        size={"longest_edge": size}, pad_size={"height": size, "width": size}
    ).save_pretrained(unfinished)
    unfinished.rename(folder)


def train_teacher(folder: Path, *, n_steps: int, say: Any = print) -> None:
    """Make ``folder``, or go on where an earlier run was stopped; nothing where it is finished."""
    if folder.is_dir():
        return
    import transformers

    from edgevlm.ingest import read_model

    keep_memory()
    torch.manual_seed(SEED)
    module: Any = transformers.SamModel._from_config(config(), attn_implementation="eager")
    _start_afresh(module)
    learner = torch.nn.ModuleDict(
        {"sam": module, "things": torch.nn.Linear(module.config.vision_config.hidden_size, _PATCH * _PATCH)}
    )
    state = folder.with_name(f"{folder.name}.training")
    untrained = state / "untrained"
    state.mkdir(parents=True, exist_ok=True)
    if not untrained.is_dir():
        save(module, untrained)
    image = read_model(str(untrained)).processing.image
    data = read_data_set(
        SHAPES, labels=(), task="mask-generation", shapes_size=SIZE, shapes_seed=SHAPES_TRAINING_SEED + 1,
        n_shapes=n_steps * BATCH_SIZE,
    )  # fmt: skip
    decayed = [each for each in learner.parameters() if each.ndim > 1]
    others = [each for each in learner.parameters() if each.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}], lr=LEARNING_RATE
    )
    checkpoint = Checkpoint(state, identity_of("sam-teacher", n_steps, str(torch.__version__)), learner, optimizer)
    start = checkpoint.load()
    log = state / "training.jsonl"
    module.train()
    for step in range(start, n_steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, _Rates(n_steps=n_steps), warmup_share=0.1)
        samples = data.samples[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        losses = _losses(learner, samples, image, np.random.default_rng((SEED, step)))
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == n_steps:
            row = {"step": step + 1, **{name: round(value.item(), 4) for name, value in losses.items()}}
            with log.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(row) + "\n")
            checkpoint.save(step + 1)
            say(f"teacher: {row}")
    module.eval()
    save(module, folder)
    shutil.copyfile(log, folder / "training.jsonl")
    shutil.rmtree(state)


def _start_afresh(module: Any) -> None:
    """As SAM's own code starts what is not the ViT: places by waves of deviation 1, layers by PyTorch's defaults.

    Transformers' deviation is half the encoder's width, by which neighbouring places have nothing in common.
    """
    for place in (module.shared_image_embedding, module.prompt_encoder.shared_embedding):
        torch.nn.init.normal_(place.positional_embedding)
    for part in (module.vision_encoder.neck, module.mask_decoder):
        for layer in part.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                layer.reset_parameters()


def _losses(learner: Any, samples: Any, image: Any, draws: np.random.Generator) -> dict[str, Tensor]:
    """Focal, dice and expected overlap of a batch, where each prompt asks for the thing that it shows; and things."""
    module = learner["sam"]
    pixels, asked, targets, is_thing = [], [], [], []
    for sample in samples:
        shown = sample.read()
        things = sample.annotation.read()
        chosen = draws.integers(len(things.masks), size=N_PROMPTS)
        points = draws.random(N_PROMPTS) < _POINT_SHARE
        asked.append([_prompt(things, i, draws, is_point=bool(p)) for i, p in zip(chosen, points, strict=True)])
        targets.append(things.masks[chosen])
        is_thing.append(things.masks.any(0))
        pixels.append(preprocess(decode_image(shown), image))
    prompts = decoder_prompts(asked, [(SIZE, SIZE)] * len(samples), image)
    target = torch.from_numpy(np.stack(targets)).float()
    seen = module.vision_encoder(torch.from_numpy(np.stack(pixels)), output_hidden_states=True)
    masks, expected = masks_of(
        module,
        seen.last_hidden_state,
        torch.from_numpy(prompts["input_points"]),
        torch.from_numpy(prompts["input_labels"]),
    )
    n, k, c = masks.shape[:3]
    masks = F.interpolate(masks.flatten(0, 1), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    masks = masks.reshape(n, k, c, SIZE, SIZE)
    wanted = target[:, :, None].expand_as(masks)
    with torch.no_grad():
        inside, truth = masks > 0, wanted > 0
        iou = (inside & truth).sum((-1, -2)) / (inside | truth).sum((-1, -2)).clamp(min=1)
    return {
        "focal": 20 * _focal(masks, wanted).mean(),
        "dice": dice(masks, wanted).mean(),
        "overlap": F.mse_loss(expected, iou),
        "things": _things(learner["things"], seen.hidden_states[-1], np.stack(is_thing)),
    }


def _things(head: Any, tokens: Tensor, is_thing: np.ndarray) -> Tensor:
    """Cross-entropy of each pixel, by its patch's token.

    Shapes: tokens [n, h, w, d], is_thing [n, h * patch, w * patch]
    """
    said = head(F.layer_norm(tokens, tokens.shape[-1:]))
    patches = F.unfold(torch.from_numpy(is_thing).float()[:, None], _PATCH, stride=_PATCH).mT
    return F.binary_cross_entropy_with_logits(said.flatten(1, 2), patches)


def _focal(masks: Tensor, target: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """[n, k, c] means over pixels; source: arXiv:1708.02002."""
    cross = F.binary_cross_entropy_with_logits(masks, target, reduction="none")
    share = masks.sigmoid()
    right = share * target + (1 - share) * (1 - target)
    weight = alpha * target + (1 - alpha) * (1 - target)
    return (weight * (1 - right) ** gamma * cross).mean((-1, -2))


def _prompt(things: Any, index: int, draws: np.random.Generator, *, is_point: bool) -> Prompt:
    if is_point:
        places = np.argwhere(things.masks[index])
        y, x = places[draws.integers(len(places))]
        return Prompt(points=((float(x), float(y)),), labels=(1,))
    left, top, right, bottom = (float(each) for each in things.boxes[index])
    return Prompt(box=(left, top, right, bottom))
