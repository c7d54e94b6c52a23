"""Steps of a training made by hand: small random batches and what two models would have made of them."""

from __future__ import annotations

import torch

from edgevlm.distillation.objectives import make_objectives
from edgevlm.distillation.recipe import Term
from edgevlm.distillation.step import Batch, Step

N, CLASSES, WIDTH, LENGTH, TOKENS, MASK = 6, 5, 8, 7, 40, 39

SIZES = {
    "logits": (CLASSES,),
    "image_embeds": (WIDTH,),
    "text_embeds": (WIDTH,),
    "image_features": (4, 3, 3),
    "text_features": (LENGTH, WIDTH),
}
DENSE = {"logits": (CLASSES, 4, 6)}
SAM = {"image_embeds": (4, 3, 3)}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(sizes, *, n=N, seed=0):
    made = {name: random(n, *size, seed=seed + place) for place, (name, size) in enumerate(sizes.items())}
    return {name: value.requires_grad_(seed == 0) for name, value in made.items()}


def tokens(n=N, length=LENGTH, seed=0):
    return torch.randint(1, MASK - 1, (n, length), generator=torch.Generator().manual_seed(seed))


def make_step(
    student=None, teacher=None, *, sizes=SIZES, n=N, seed=5, run=None, gather=lambda rows: rows, decode=None, **batch
):
    """A step whose student and teacher gave what is given, or random outputs of ``sizes``."""
    fields = {
        "pixel_values": random(n, 3, 12, 12, seed=7),
        "labels": torch.arange(n) % CLASSES,
        "input_ids": tokens(n),
        "attention_mask": torch.ones(n, LENGTH, dtype=torch.int64),
        "text_index": torch.arange(n),
        **batch,
    }
    student = outputs(sizes, n=n) if student is None else student
    return Step(
        batch=Batch(**fields),
        student=student,
        teacher=outputs(sizes, n=n, seed=100) if teacher is None else teacher,
        run=run or (lambda other: student),
        gather=gather,
        generator=torch.Generator().manual_seed(seed),
        decode=decode,
    )


def objectives_of(*names, student=SIZES, teacher=None, n_tokens=TOKENS, mask_token=MASK, **options):
    """The objectives called so, all with the same options."""
    terms = tuple(Term(objective=name, options=options) for name in names)
    torch.manual_seed(3)
    return make_objectives(terms, student, student if teacher is None else teacher, n_tokens, mask_token)


def value_of(name, step, **more):
    """The one value of one objective."""
    (value,) = objectives_of(name, **more)(step).values()
    return value
