"""A batch as teacher and student saw it: pixels, labels, texts, and what the teacher said of them. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from edgevlm.data.data_set import DataSet
from edgevlm.distillation.pictures import TrainingPictures
from edgevlm.distillation.step import Batch, Outputs
from edgevlm.distillation.teacher_outputs import StoredOutputs
from edgevlm.errors import DataError
from edgevlm.model import Model
from edgevlm.runtime.image import Size, place_picture
from edgevlm.runtime.spec import Array, ImageProcessing
from edgevlm.runtime.text import load_tokenizer, tokenize


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """The distinct texts of a data set, cut into the teacher's tokens, which are the student's too.

    Args:
        of_picture: each picture's text.
        n_classes: so many texts, the first, are those of the classes in order; 0 where the pictures have no labels.
    Shapes: input_ids, attention_mask [n_texts, length], of_picture [n_pictures].
    """

    texts: tuple[str, ...]
    input_ids: Array
    attention_mask: Array
    of_picture: Array
    n_classes: int


def texts_of(model: Model, data: DataSet) -> Texts | None:
    """Each picture's caption where there are captions, else its class in the model's template; None without either.

    Raises: DataError: some pictures have a caption and others have none.
    """
    text = model.processing.text
    if text is None:
        return None
    is_labelled = bool(data.class_names) and all(sample.label is not None for sample in data.samples)
    classes = [text.prompt_template.replace("{}", name) for name in data.class_names] if is_labelled else []
    captions = [sample.caption for sample in data.samples]
    if any(captions):
        without = [sample.name for sample in data.samples if not sample.caption]
        if without:
            raise DataError(
                f"{len(without)} of the {len(data)} pictures of '{data.name}' have no caption; the first is "
                f"'{without[0]}'.",
                hint="Give them one, leave them out, or leave all captions out to train by class names.",
            )
        distinct = {caption: len(classes) + number for number, caption in enumerate(dict.fromkeys(captions))}
        of_picture = [distinct[caption] for caption in captions]
    elif is_labelled:
        distinct = {}
        of_picture = [sample.label or 0 for sample in data.samples]
    else:
        return None
    texts = (*classes, *distinct)
    return Texts(texts=texts, of_picture=np.array(of_picture), n_classes=len(classes), **tokenize_texts(model, texts))


def tokenize_texts(model: Model, texts: Sequence[str]) -> dict[str, Array]:
    """Token ids and mask, as the teacher's text tower takes them."""
    assert model.processing.text is not None, "a model with a text tower"
    both = msgspec.structs.replace(model.processing.text, input_names=("input_ids", "attention_mask"))
    return tokenize(texts, load_tokenizer(Path(model.tokenizer_file), both), both)


@dataclass(frozen=True, kw_only=True, eq=False)
class Lessons:
    """Pictures with what the teacher said of them.

    Args:
        image: how the student sees a picture.
        is_kept: preprocessed pictures stay in memory where they fit.
        n_prompts: so many points and boxes are asked about each picture, drawn from (seed, row).
    """

    pictures: TrainingPictures
    stored: StoredOutputs
    image: ImageProcessing
    texts: Texts | None = None
    is_kept: bool = True
    n_prompts: int = 0

    def batch(self, rows: Sequence[int]) -> tuple[Batch, Outputs]:
        """The rows of this process, and the teacher's outputs for them; on the CPU."""
        indices = [row % len(self.pictures.data) for row in rows]
        labels = self.pictures.labels[indices]
        teacher = {name: torch.from_numpy(value) for name, value in self.stored.rows(rows).items()}
        prompts, shown = self._prompts(rows) if self.n_prompts else (None, None)
        batch = Batch(
            pixel_values=torch.from_numpy(self.pictures.pixels(rows, self.image, is_kept=self.is_kept)),
            labels=torch.from_numpy(labels),  # -1 throughout where there are none: what learns from them is then 0
            prompts=prompts,
            shown=shown,
        )
        if self.texts is None:
            return batch, teacher
        distinct, index = np.unique(self.texts.of_picture[indices], return_inverse=True)
        teacher |= {name: torch.from_numpy(value[distinct]) for name, value in self.stored.texts().items()}
        with_texts = Batch(
            pixel_values=batch.pixel_values,
            labels=batch.labels,
            input_ids=torch.from_numpy(self.texts.input_ids[distinct]),
            attention_mask=torch.from_numpy(self.texts.attention_mask[distinct]),
            text_index=torch.from_numpy(index.reshape(-1)),
        )
        return with_texts, teacher

    def _prompts(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Of what is in each picture, where the data says it and the picture is whole, else of places in it.

        Shapes: input_points [n, n_prompts, 2, 2] in the student's pixels, input_labels int64 [n, n_prompts, 2]; and
            where the pictures lie, bool [n, height, width].
        """
        from edgevlm.data.prompts import prompts_of_place, prompts_of_sample
        from edgevlm.runtime.tasks.mask_generation import decoder_prompts

        asked, sizes = [], []
        for row in rows:
            shown = self.pictures.picture(row)
            size = (shown.height, shown.width)
            sample = self.pictures.data.samples[row % len(self.pictures.data)]
            is_whole = self.pictures.augmentation == "none"
            found = prompts_of_sample(sample, size) if is_whole else prompts_of_place(size)
            draws = np.random.default_rng((self.pictures.seed, row))
            asked.append([found[i] for i in draws.integers(len(found), size=self.n_prompts)])
            sizes.append(size)
        made = decoder_prompts(asked, sizes, self.image)
        return {name: torch.from_numpy(value) for name, value in made.items()}, _where_shown(sizes, self.image)

    def class_texts(self) -> Batch | None:
        """The texts of all classes as a batch with one picture; None where there are none."""
        if self.texts is None or not self.texts.n_classes:
            return None
        chosen = slice(0, self.texts.n_classes)
        return Batch(
            pixel_values=torch.from_numpy(self.pictures.pixels([0], self.image)),
            input_ids=torch.from_numpy(self.texts.input_ids[chosen]),
            attention_mask=torch.from_numpy(self.texts.attention_mask[chosen]),
        )


def _where_shown(sizes: Sequence[Size], image: ImageProcessing) -> Tensor:
    """Shapes: bool [len(sizes), height, width]."""
    shown = torch.zeros((len(sizes), image.height, image.width), dtype=torch.bool)
    for mask, size in zip(shown, sizes, strict=True):
        placed = place_picture(size, image)
        top, left = round(placed.offset_y), round(placed.offset_x)
        bottom, right = top + round(size[0] * placed.scale_y), left + round(size[1] * placed.scale_x)
        mask[max(top, 0) : bottom, max(left, 0) : right] = True
    return shown


def on_device(batch: Batch, outputs: Outputs, device: torch.device) -> tuple[Batch, Outputs]:
    def move(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device, non_blocking=True)

    moved = Batch(
        pixel_values=batch.pixel_values.to(device, non_blocking=True),
        labels=move(batch.labels),
        input_ids=move(batch.input_ids),
        attention_mask=move(batch.attention_mask),
        text_index=move(batch.text_index),
        prompts=None if batch.prompts is None else {name: value.to(device) for name, value in batch.prompts.items()},
        shown=move(batch.shown),
    )
    return moved, {name: value.to(device, non_blocking=True) for name, value in outputs.items()}
