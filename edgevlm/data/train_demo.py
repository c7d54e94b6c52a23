"""Train the demo model: a two-tower MobileViT-XXS small enough to commit, taught by a MobileViT-S.

    python -m edgevlm.data.train_demo --output DIR [--work DIR] [--steps N] [--student-steps N] [--seed S]

The teacher learns from ``edgevlm.data.shapes`` alone and never sees a picture or a text of a held-out
pair. Every batch is scored three ways, each a cross-entropy over texts: which colour and shape
("a red circle", over the pairs seen), which colour ("a red thing") and which shape ("a circle").
That is CLIP's image-to-text loss with equal captions taken as one, and the two partial captions
are what lets a pair that was never shown be recognised by its parts.

The student is made by ``edgevlm.distill`` with the recipe ``demo_recipe.toml``: it takes over the
teacher's text tower, and its image tower learns the teacher's vectors, again of pairs seen only.

What is measured of both, always over all the class names at once, by top-1:

- ``seen`` and ``held_out``: new pictures of pairs that training showed, and never showed.
- ``values_shuffled``: all H*W*C values permuted. Neither shape nor hue is left, so the label must
  be at chance, 1 in 64.
- ``pixels_shuffled``: whole pixels moved. Shape is lost and must be at chance, 1 in 8; the colour
  histogram stays, so the colour, and with it the label, may beat chance. Both are recorded.

Sources: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
2021 (CLIP); Romero et al., "FitNets", 2015; the code and the weights are ours, Apache-2.0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    MobileViTConfig,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

import edgevlm
from edgevlm.cli.progress import shown_progress
from edgevlm.data.shapes import (
    COLORS,
    PROMPT_TEMPLATE,
    SHAPES,
    Bytes,
    Picture,
    Pictures,
    class_names,
    shuffle_pixels,
    write_folder,
)
from edgevlm.distillation.recipe import load_recipe
from edgevlm.distillation.students.mobilevit import XXS as STUDENT
from edgevlm.distillation.students.mobilevit import S as TEACHER
from edgevlm.distillation.students.tower import start_afresh
from edgevlm.families.loading import quiet

DEMO_MODEL: Final = Path(__file__).parent / "demo_model"
RECIPE: Final = Path(__file__).parent / "demo_recipe.toml"
SIZE: Final = 64
WIDTH: Final = 64
"""Of the space that both towers share, and of the text tower."""
N_STEPS: Final = 1500
BATCH_SIZE: Final = 64
LEARNING_RATE: Final = 1e-3
N_WARMUP_STEPS: Final = 80
WEIGHT_DECAY: Final = 0.05
MAX_LOGIT_SCALE: Final = math.log(100)
"""CLIP's own bound."""
N_EVALUATED: Final = 1000
N_PICTURES: Final = 40_000
"""What the student learns from; their seed is the training's and this many more."""
TEXT_LENGTH: Final = 16
LOGGED_EVERY: Final = 50
LOG_FILE: Final = "training_log.json"

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


def teacher_config(tokenizer: PreTrainedTokenizerFast) -> VisionTextDualEncoderConfig:
    """Describe the teacher's towers."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # ``VisionTextDualEncoderModel`` asks the image tower's configuration for the width of its pooled features.
    vision = MobileViTConfig(**TEACHER.config, image_size=SIZE).to_dict() | {"hidden_size": TEACHER.width}
    return VisionTextDualEncoderConfig(vision_config=vision, text_config=text.to_dict(), projection_dim=WIDTH)


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
    model: VisionTextDualEncoderModel,
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


def evaluate_demo(
    model: VisionTextDualEncoderModel, tokenizer: PreTrainedTokenizerFast, *, seed: int, n: int
) -> dict[str, Accuracy]:
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


def train(*, n_steps: int, seed: int) -> tuple[VisionTextDualEncoderModel, tuple[dict[str, float], ...]]:
    """Train the teacher from scratch, with its losses; the same seed on the same machine gives the same weights."""
    torch.manual_seed(seed)
    tokenizer = demo_tokenizer()
    dual_encoder: Any = VisionTextDualEncoderModel
    model: VisionTextDualEncoderModel = dual_encoder._from_config(
        teacher_config(tokenizer), attn_implementation="eager"
    )
    start_afresh(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate_at(i, n_steps=n_steps))
    stream = Pictures(n=n_steps * BATCH_SIZE, seed=seed, size=SIZE, pairs="seen")
    history = []
    began_s = time.monotonic()
    for step in range(n_steps):
        batch = stream[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        losses = losses_of(model, tokenizer, batch, template=TEMPLATES[step % len(TEMPLATES)])
        optimizer.zero_grad()
        total: Any = torch.stack(list(losses.values())).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        if step % LOGGED_EVERY == 0 or step == n_steps - 1:
            row = {name: round(loss.item(), 4) for name, loss in losses.items()}
            history.append({"step": step, **row})
            _say(f"teacher: step {step}/{n_steps} {time.monotonic() - began_s:.0f} s {row}")
    return model.train(False), tuple(history)


def losses_of(
    model: VisionTextDualEncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    batch: Sequence[Picture],
    *,
    template: str,
) -> dict[str, Tensor]:
    """Three losses over texts, and one over how texts compose."""
    labels = class_names("seen")
    things = tuple(f"{color} thing" for color in COLORS)
    texts = [template.format(label=name) for name in (*labels, *things, *SHAPES)]
    image = _image_embeds(model, pixel_values(shown.image for shown in batch))
    text = _text_embeds(model, tokenizer, texts)
    scores = model.logit_scale.exp() * image @ text.T
    kinds = [len(labels), len(things), len(SHAPES)]
    by_label, by_color, by_shape = torch.split(scores, kinds, dim=1)
    of_labels, of_colors, of_shapes = torch.split(text, kinds)
    pairs = [name.split() for name in labels]
    parts = (
        of_colors[[COLORS.index(color) for color, _ in pairs]] + of_shapes[[SHAPES.index(shape) for _, shape in pairs]]
    )
    return {
        "label": _cross_entropy(by_label, [labels.index(shown.label) for shown in batch]),
        "color": _cross_entropy(by_color, [COLORS.index(shown.objects[0].color) for shown in batch]),
        "shape": _cross_entropy(by_shape, [SHAPES.index(shown.objects[0].shape) for shown in batch]),
        # A text means the sum of its parts, so that a pair never named has a meaning too.
        "parts": (1 - functional.cosine_similarity(of_labels, parts)).mean(),
    }


def make_teacher(folder: Path, *, n_steps: int, seed: int) -> None:
    """A checkpoint with its ``training_log.json``, which is there only when whole."""
    began_s = time.monotonic()
    model, history = train(n_steps=n_steps, seed=seed)
    training_s = time.monotonic() - began_s
    with _appearing_whole(folder) as unfinished:
        with quiet():
            model.save_pretrained(unfinished)
        # A new one: a tokenizer that has padded once writes its padding into tokenizer.json.
        demo_tokenizer().save_pretrained(unfinished)
        _write_json(unfinished / "preprocessor_config.json", preprocessing())
        _write_json(
            unfinished / LOG_FILE,
            {
                "n_steps": n_steps,
                "batch_size": BATCH_SIZE,
                **_facts(model, seed=seed, training_s=training_s),
                "losses": history,
            },
        )


def make_student(folder: Path, teacher: Path, *, n_steps: int | None, seed: int) -> None:
    """Distil ``teacher``, which ``make_teacher`` made; a distillation that was stopped goes on."""
    pictures = folder.with_name("pictures")
    if not pictures.is_dir():
        write_folder(pictures, n=N_PICTURES, seed=seed + N_PICTURES, size=SIZE, pairs="seen", layout="csv")
    distilled = folder.with_name("distilled")
    began_s = time.monotonic()
    with shown_progress() as progress:
        made = edgevlm.distill(
            str(teacher),
            student=STUDENT.name,
            data=pictures / "labels.csv",
            recipe=str(RECIPE),
            steps=n_steps,
            seed=seed,
            output=distilled,
            overwrite=True,
            is_timed=False,
            progress=progress,
        ).distillation
    training_s = time.monotonic() - began_s
    model = VisionTextDualEncoderModel.from_pretrained(distilled).train(False)
    lines = (distilled / "training.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    logged = [row for row in steps if row["step"] % LOGGED_EVERY == 0 or row is steps[-1]]
    of_teacher = json.loads((teacher / LOG_FILE).read_text(encoding="utf-8"))
    log = {
        "command": f"python -m edgevlm.data.train_demo --output DIR --steps {of_teacher['n_steps']} "
        f"--student-steps {made.n_steps} --seed {seed}",
        "recipe": RECIPE.name,
        "n_pictures": made.n_training_pictures,
        "n_steps": made.n_steps,
        "batch_size": made.recipe.batch_size,
        **_facts(model, seed=seed, training_s=training_s),
        "losses": [{"step": row["step"], "loss": round(row["loss"], 4)} for row in logged],
        "teacher": of_teacher,
    }
    with _appearing_whole(folder) as unfinished:
        unfinished.mkdir()
        for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
            shutil.copyfile(distilled / name, unfinished / name)
        demo_tokenizer().save_pretrained(unfinished)
        _write_json(unfinished / LOG_FILE, log)
        (unfinished / "README.md").write_text(_card(log), encoding="utf-8")


def _facts(model: VisionTextDualEncoderModel, *, seed: int, training_s: float) -> dict[str, Any]:
    # Any other seed is a split that training never saw.
    accuracies = evaluate_demo(model, demo_tokenizer(), seed=seed + 1, n=N_EVALUATED)
    return {
        "seed": seed,
        "n_parameters": sum(each.numel() for each in model.parameters()),
        "training_s": round(training_s),
        "n_threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("numpy", "tokenizers", "torch", "transformers")},
        "evaluation_seed": seed + 1,
        "accuracies": {name: asdict(accuracy) for name, accuracy in accuracies.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both, measure both, and write the student with its log; ``--output`` appears only when whole."""
    parser = argparse.ArgumentParser(prog="python -m edgevlm.data.train_demo")
    parser.add_argument("--output", type=Path, required=True, help="a folder to make")
    parser.add_argument("--work", type=Path, help="where teacher and pictures are kept; OUTPUT.work if left out")
    parser.add_argument("--steps", type=int, default=N_STEPS, help="of the teacher")
    parser.add_argument("--student-steps", type=int, default=load_recipe(str(RECIPE)).n_steps)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.output.exists():
        parser.error(f"{options.output} exists; name a new folder")
    work = (options.work or options.output.with_name(f"{options.output.name}.work")) / f"seed-{options.seed}"
    teacher = work / f"teacher-{options.steps}"
    if not teacher.is_dir():
        make_teacher(teacher, n_steps=options.steps, seed=options.seed)
    student = work / f"student-{options.steps}-{options.student_steps}"
    if not student.is_dir():
        make_student(student, teacher, n_steps=options.student_steps, seed=options.seed)
    with _appearing_whole(options.output) as unfinished:
        shutil.copytree(student, unfinished)
    _say((student / "README.md").read_text(encoding="utf-8"))


@contextlib.contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A path beside ``folder`` to write to, which becomes ``folder`` at the end or goes away."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a script's own progress


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _card(log: Mapping[str, Any]) -> str:
    teacher = log["teacher"]
    rows = "\n".join(
        f"| {name} | {row['n']} | {row['label']:.1%} | {row['color']:.1%} | {row['shape']:.1%} "
        f"| {teacher['accuracies'][name]['label']:.1%} |"
        for name, row in log["accuracies"].items()
    )
    return f"""---
license: apache-2.0
pipeline_tag: zero-shot-image-classification
---
# edgevlm demo model

Two towers, a MobileViT-XXS and CLIP's for texts, that name coloured shapes in 64x64 pictures: small
enough to try every command on. Its teacher, a MobileViT-S of {teacher["n_parameters"]:,} parameters where
this has {log["n_parameters"]:,}, was trained from scratch on generated pictures (`edgevlm.data.shapes`), so
no third party's data or weights are in it. It is of no use on photographs.

Made by `{log["command"]}`. Prompts: `{PROMPT_TEMPLATE}`.

Top-1 over all {len(class_names())} class names, on pictures of a seed that training did not use:

| pictures | n | label | colour | shape | teacher's label |
|---|---|---|---|---|---|
{rows}

`held_out` pictures show colour-shape pairs that neither training showed or named. `values_shuffled`
permutes every value of a picture, `pixels_shuffled` moves whole pixels, which keeps the colours.
"""


def _cross_entropy(scores: Tensor, targets: Sequence[int]) -> Tensor:
    return functional.cross_entropy(scores, torch.tensor(targets))


def _image_embeds(model: VisionTextDualEncoderModel, pixels: Tensor) -> Tensor:
    seen = model.vision_model(pixel_values=pixels)
    return functional.normalize(model.visual_projection(seen.pooler_output), dim=-1)


def _text_embeds(model: VisionTextDualEncoderModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
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
