"""Train the demo model: a two-tower model small enough to commit, in the CLIP layout.

    python -m edgevlm.data.train_demo --output DIR [--steps N] [--seed S]

It learns from ``edgevlm.data.shapes`` alone and never sees a picture or a text of a held-out
pair. Every batch is scored three ways, each a cross-entropy over texts: which colour and shape
("a red circle", over the pairs seen), which colour ("a red thing") and which shape ("a circle").
That is CLIP's image-to-text loss with equal captions taken as one, and the two partial captions
are what lets a pair that was never shown be recognised by its parts.

What is measured, always over all the class names at once, by top-1:

- ``seen`` and ``held_out``: new pictures of pairs that training showed, and never showed.
- ``values_shuffled``: all H*W*C values permuted. Neither shape nor hue is left, so the label must
  be at chance, 1 in 64.
- ``pixels_shuffled``: whole pixels moved. Shape is lost and must be at chance, 1 in 8; the colour
  histogram stays, so the colour, and with it the label, may beat chance. Both are recorded.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
2021 (CLIP); the code and the weights are ours, Apache-2.0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from edgevlm.data.shapes import (
    COLORS,
    PROMPT_TEMPLATE,
    SHAPES,
    Bytes,
    Mask,
    Picture,
    Pictures,
    class_names,
    shuffle_pixels,
)

DEMO_MODEL: Final = Path(__file__).parent / "demo_model"
SIZE: Final = 64
PATCH_SIZE: Final = 8
WIDTH: Final = 96
N_STEPS: Final = 2400
BATCH_SIZE: Final = 64
LEARNING_RATE: Final = 1e-3
N_WARMUP_STEPS: Final = 60
WEIGHT_DECAY: Final = 0.05
CENTRED_SHARE: Final = 0.2
"""The share of the steps over which objects wander from the middle to where they were drawn."""
MAX_LOGIT_SCALE: Final = math.log(100)
"""CLIP's own bound."""
N_EVALUATED: Final = 1000
TEXT_LENGTH: Final = 16

TEMPLATES: Final = (
    PROMPT_TEMPLATE,
    "a {label}",
    "the {label}",
    "{label}",
    "a picture of a {label}",
    "an image of a {label}",
    "a drawing of one {label}",
    "there is a {label}",
)
START, PAD, UNKNOWN, END = "<start>", "<pad>", "<unknown>", "<end>"


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Top-1 over all class names: of the label, and of its colour and its shape taken alone."""

    n: int
    label: float
    color: float
    shape: float


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """Make the word-level tokenizer; its words are those of the templates and the labels."""
    words = {word for text in (*TEMPLATES, *COLORS, *SHAPES, "thing") for word in text.split()}
    words.discard("{label}")
    # END has the highest id, and not 2: old CLIP code pools where the id is highest, new code where
    # it equals ``eos_token_id``, and takes an ``eos_token_id`` of 2 as a request for the old way.
    vocabulary = {word: i for i, word in enumerate((PAD, START, UNKNOWN, *sorted(words), END))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=TEXT_LENGTH,
    )


def demo_config(tokenizer: PreTrainedTokenizerFast) -> CLIPConfig:
    """Describe both towers."""
    return CLIPConfig(
        projection_dim=64,
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "image_size": SIZE,
            "patch_size": PATCH_SIZE,
            "projection_dim": 64,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": TEXT_LENGTH,
            "projection_dim": 64,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )


def preprocessing() -> dict[str, Any]:
    """Describe the preprocessing as CLIP's image processor reads it."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def pixel_values(images: Iterable[Bytes]) -> Tensor:
    """Preprocess pictures that have the model's size already.

    Shapes: each image [64, 64, 3] -> [n, 3, 64, 64], -1 to 1.
    """
    stacked = torch.from_numpy(np.stack(list(images)))
    return stacked.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def zero_shot_accuracy(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    images: Sequence[Bytes],
    labels: Sequence[str],
) -> Accuracy:
    """Score pictures against all the class names, each put into ``PROMPT_TEMPLATE``."""
    names = class_names()
    prompts = [PROMPT_TEMPLATE.format(label=name) for name in names]
    with torch.inference_mode():
        text = _text_embeds(model, tokenizer, prompts)
        best = torch.cat(
            [
                (_image_embeds(model, pixel_values(images[i : i + 250])) @ text.T).argmax(dim=1)
                for i in range(0, len(images), 250)
            ]
        )
    pairs = [(names[i].split(), label.split()) for i, label in zip(best.tolist(), labels, strict=True)]
    n = len(pairs)
    return Accuracy(
        n=n,
        label=sum(found == true for found, true in pairs) / n,
        color=sum(found[0] == true[0] for found, true in pairs) / n,
        shape=sum(found[1] == true[1] for found, true in pairs) / n,
    )


def evaluate_demo(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, *, seed: int, n: int) -> dict[str, Accuracy]:
    """Measure the four accuracies that the module's docstring defines, on the split ``seed``."""
    seen, held_out, every = (
        Pictures(n=n, seed=seed, size=SIZE, pairs=pairs)[:] for pairs in ("seen", "held_out", "all")
    )
    measured = {
        "seen": ([shown.image for shown in seen], seen),
        "held_out": ([shown.image for shown in held_out], held_out),
        "values_shuffled": (_shuffled(every, across_channels=True), every),
        "pixels_shuffled": (_shuffled(every, across_channels=False), every),
    }
    return {
        name: zero_shot_accuracy(model, tokenizer, images=images, labels=[shown.label for shown in pictures])
        for name, (images, pictures) in measured.items()
    }


def train(*, n_steps: int, seed: int) -> tuple[CLIPModel, PreTrainedTokenizerFast, tuple[dict[str, float], ...]]:
    """Train from scratch; the same seed on the same machine gives the same weights."""
    torch.manual_seed(seed)
    tokenizer = demo_tokenizer()
    model = _initial_model(demo_config(tokenizer))
    loss_of = DemoLoss(model, tokenizer).train()
    optimizer = torch.optim.AdamW(loss_of.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate_at(i, n_steps=n_steps))
    stream = Pictures(n=n_steps * BATCH_SIZE, seed=seed, size=SIZE, pairs="seen")
    history = []
    began_s = time.monotonic()
    for step in range(n_steps):
        pull = max(0.0, 1 - step / (CENTRED_SHARE * n_steps))
        drawn = stream[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        batch = [_towards_middle(shown, pull=pull) for shown in drawn]
        losses = loss_of(batch, template=TEMPLATES[step % len(TEMPLATES)])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(loss_of.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        if step % 50 == 0 or step == n_steps - 1:
            row = {name: round(loss.item(), 4) for name, loss in losses.items()}
            history.append({"step": step, **row})
            _say(f"step {step}/{n_steps} {time.monotonic() - began_s:.0f} s {row}")
    return model.train(False), tokenizer, tuple(history)


class DemoLoss(torch.nn.Module):
    """The training losses: three over texts, one over how texts compose, two over patches.

    The two over patches (which pixels are the object's, which shape the object has) go through
    heads that are thrown away. Without them and the centring, 200 batches of 192 pictures taught
    colours to near perfection and nothing of shapes.
    """

    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.mask_head = torch.nn.Linear(WIDTH, PATCH_SIZE * PATCH_SIZE)
        self.shape_head = torch.nn.Linear(WIDTH, len(SHAPES))

    def forward(self, batch: Sequence[Example], *, template: str) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            seen = self.model.vision_model(pixel_values=pixel_values(example.image for example in batch))
            image = self.model.visual_projection(seen.pooler_output)
        image = functional.normalize(image.float(), dim=-1)
        return {
            **self._text_losses(image, batch, template=template),
            **self._patch_losses(seen.last_hidden_state[:, 1:].float(), batch),
        }

    def _text_losses(self, image: Tensor, batch: Sequence[Example], *, template: str) -> dict[str, Tensor]:
        labels = class_names("seen")
        things = tuple(f"{color} thing" for color in COLORS)
        texts = [template.format(label=name) for name in (*labels, *things, *SHAPES)]
        text = _text_embeds(self.model, self.tokenizer, texts)
        scores = self.model.logit_scale.exp() * image @ text.T
        kinds = [len(labels), len(things), len(SHAPES)]
        by_label, by_color, by_shape = torch.split(scores, kinds, dim=1)
        of_labels, of_colors, of_shapes = torch.split(text, kinds)
        pairs = [name.split() for name in labels]
        parts = (
            of_colors[[COLORS.index(color) for color, _ in pairs]]
            + of_shapes[[SHAPES.index(shape) for _, shape in pairs]]
        )
        return {
            "label": _cross_entropy(by_label, [labels.index(e.label) for e in batch]),
            "color": _cross_entropy(by_color, [COLORS.index(e.color) for e in batch]),
            "shape": _cross_entropy(by_shape, [SHAPES.index(e.shape) for e in batch]),
            # A text means the sum of its parts, so that a pair never named has a meaning too.
            "parts": (1 - functional.cosine_similarity(of_labels, parts)).mean(),
        }

    def _patch_losses(self, patches: Tensor, batch: Sequence[Example]) -> dict[str, Tensor]:
        patches = functional.layer_norm(patches, (WIDTH,))
        masks = torch.from_numpy(np.stack([example.mask for example in batch])).float()
        masks = functional.unfold(masks[:, None], PATCH_SIZE, stride=PATCH_SIZE).mT
        is_on_object = masks.any(dim=2)
        shapes = torch.tensor([SHAPES.index(example.shape) for example in batch])
        shapes = shapes[:, None].expand(is_on_object.shape)
        return {
            "mask": 2 * functional.binary_cross_entropy_with_logits(self.mask_head(patches), masks),
            "patch_shape": functional.cross_entropy(self.shape_head(patches[is_on_object]), shapes[is_on_object]),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """A single-object picture as training shows it."""

    image: Bytes
    mask: Mask
    color: str
    shape: str

    @property
    def label(self) -> str:
        return f"{self.color} {self.shape}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and write the model with its log; ``--output`` appears only when whole."""
    parser = argparse.ArgumentParser(prog="python -m edgevlm.data.train_demo")
    parser.add_argument("--output", type=Path, required=True, help="a folder to make")
    parser.add_argument("--steps", type=int, default=N_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.output.exists():
        parser.error(f"{options.output} exists; name a new folder")
    began_s = time.monotonic()
    model, tokenizer, history = train(n_steps=options.steps, seed=options.seed)
    training_s = time.monotonic() - began_s
    # Any other seed is a split that training never saw.
    accuracies = evaluate_demo(model, tokenizer, seed=options.seed + 1, n=N_EVALUATED)
    log = {
        "command": f"python -m edgevlm.data.train_demo --output DIR --steps {options.steps} --seed {options.seed}",
        "seed": options.seed,
        "n_steps": options.steps,
        "batch_size": BATCH_SIZE,
        "training_s": round(training_s),
        "n_threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("numpy", "tokenizers", "torch", "transformers")},
        "evaluation_seed": options.seed + 1,
        "accuracies": {name: asdict(accuracy) for name, accuracy in accuracies.items()},
        "losses": history,
    }
    write_model(options.output, model=model, log=log)
    _say(json.dumps(log["accuracies"], indent=1))


def write_model(path: Path, *, model: CLIPModel, log: Mapping[str, Any]) -> None:
    """Write the checkpoint, its preprocessing, its log and its card, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        model.save_pretrained(unfinished)
        # A new one: a tokenizer that has padded once writes its padding into tokenizer.json.
        demo_tokenizer().save_pretrained(unfinished)
        _write_json(unfinished / "preprocessor_config.json", preprocessing())
        _write_json(unfinished / "training_log.json", log)
        (unfinished / "README.md").write_text(_card(log), encoding="utf-8")
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a script's own progress


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _card(log: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"| {name} | {row['n']} | {row['label']:.1%} | {row['color']:.1%} | {row['shape']:.1%} |"
        for name, row in log["accuracies"].items()
    )
    return f"""---
license: apache-2.0
pipeline_tag: zero-shot-image-classification
---
# edgevlm demo model

A two-tower model in the CLIP layout that names coloured shapes in 64x64 pictures, small enough to
try every command on. Trained from scratch on generated pictures (`edgevlm.data.shapes`), so no
third party's data or weights are in it. It is of no use on photographs.

Made by `{log["command"]}`. Prompts: `{PROMPT_TEMPLATE}`.

Top-1 over all {len(class_names())} class names, on pictures of a seed that training did not use:

| pictures | n | label | colour | shape |
|---|---|---|---|---|
{rows}

`held_out` pictures show colour-shape pairs that training never showed or named. `values_shuffled`
permutes every value of a picture, `pixels_shuffled` moves whole pixels, which keeps the colours.
"""


def _initial_model(config: CLIPConfig) -> CLIPModel:
    """Start from positions a ViT need not learn, and patches at a scale it can."""
    model = CLIPModel(config)
    # In bfloat16 on a CPU the fused kernel is the slow one: 160 ms against 250 ms for this image
    # tower, forward and back over 64 pictures on one core.
    model.set_attn_implementation("eager")
    embeddings = model.vision_model.embeddings
    with torch.no_grad():
        embeddings.position_embedding.weight[1:] = 0.5 * _grid_positions(SIZE // PATCH_SIZE)
        embeddings.patch_embedding.weight.normal_(0, (3 * PATCH_SIZE * PATCH_SIZE) ** -0.5)
    return model


def _grid_positions(n_across: int) -> Tensor:
    """Sines and cosines of x and y, as in "Better plain ViT baselines", Beyer et al., 2022."""
    frequencies = 100.0 ** -(torch.arange(WIDTH // 4) / (WIDTH // 4))
    y, x = torch.meshgrid(torch.arange(n_across), torch.arange(n_across), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (x, y)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def _towards_middle(shown: Picture, *, pull: float) -> Example:
    """Roll a picture so that its object lies nearer the middle: all the way at a pull of 1."""
    thing = shown.objects[0]
    x0, y0, x1, y1 = thing.box
    shift = tuple(round((SIZE - low - high) / 2 * pull) for low, high in ((y0, y1), (x0, x1)))
    return Example(
        image=np.roll(shown.image, shift, axis=(0, 1)),
        mask=np.roll(thing.mask, shift, axis=(0, 1)),
        color=thing.color,
        shape=thing.shape,
    )


def _cross_entropy(scores: Tensor, targets: Sequence[int]) -> Tensor:
    return functional.cross_entropy(scores, torch.tensor(targets))


def _image_embeds(model: CLIPModel, pixels: Tensor) -> Tensor:
    seen = model.vision_model(pixel_values=pixels)
    return functional.normalize(model.visual_projection(seen.pooler_output), dim=-1)


def _text_embeds(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
    read = model.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return functional.normalize(model.text_projection(read.pooler_output), dim=-1)


def _shuffled(pictures: Sequence[Picture], *, across_channels: bool) -> list[Bytes]:
    return [shuffle_pixels(shown.image, seed=i, across_channels=across_channels) for i, shown in enumerate(pictures)]


def _rate_at(step: int, *, n_steps: int) -> float:
    """Warm up, then fall along a half cosine to nothing."""
    return min(1.0, (step + 1) / N_WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / n_steps))


if __name__ == "__main__":
    main()
