"""Fine-tune a fake-quantized program on pictures, stoppable at any step.

What a step does follows from its number alone: which pictures, which rate, what is frozen. So a training that was
killed and started again ends with the same weights. Needs torch at import.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgevlm.data.content import map_in_threads
from edgevlm.data.data_set import DataSet
from edgevlm.errors import DataError, ModelError
from edgevlm.progress import Note, Progress, StepProgress, silent
from edgevlm.quantization.fake_graph import FakeQuantized, trainable
from edgevlm.quantization.fine_tuning import Training
from edgevlm.quantization.teaching import Lesson, Texts
from edgevlm.runtime.image import decode_image, preprocess
from edgevlm.runtime.spec import Array, ImageProcessing
from edgevlm.training.checkpoint import Checkpoint
from edgevlm.training.log import Log, Speed
from edgevlm.training.schedule import batch_of, rate_at

# Preprocessed pictures are kept where they fit: reading photographs takes longer than a step of a small model.
_KEEP_BYTES = 1 << 30
_BETAS = (0.9, 0.999)


class Pictures:
    """The training pictures as the graph takes them, kept in memory where they fit."""

    def __init__(self, data: DataSet, image: ImageProcessing) -> None:
        self.labels = torch.tensor([-1 if sample.label is None else sample.label for sample in data.samples])
        self._data = data
        self._image = image
        self._kept: dict[int, Array] = {}
        self._keeps = len(data) * 3 * image.height * image.width * 4 <= _KEEP_BYTES

    def __len__(self) -> int:
        return len(self._data)

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Shapes: [len(indices), 3, height, width]."""
        missing = [index for index in dict.fromkeys(indices) if index not in self._kept]
        made = dict(zip(missing, map_in_threads(self._read, missing), strict=True))
        if self._keeps:
            self._kept |= made
        return torch.from_numpy(np.stack([made[i] if i in made else self._kept[i] for i in indices]))

    def _read(self, index: int) -> Array:
        sample = self._data.samples[index]
        try:
            return preprocess(decode_image(sample.read()), self._image)
        except (DataError, OSError) as error:
            told = error.message if isinstance(error, DataError) else str(error)
            raise DataError(f"The picture '{sample.name}' cannot be used: {told.rstrip('.')}.") from error


def train(
    student: FakeQuantized,
    lesson: Lesson,
    data: DataSet,
    image: ImageProcessing,
    training: Training,
    *,
    texts: Texts | None,
    is_classifier: bool,
    folder: Path,
    identity: str,
    accelerator: Any,
    progress: Progress = silent,
) -> None:
    """Train ``student`` in place.

    Args:
        lesson: what the student is to answer.
        texts: of a two-tower model whose labels are known.
        is_classifier: the first output is logits.
        folder: takes ``checkpoint.safetensors`` and ``training.jsonl``; a training of the same ``identity`` that was
            stopped goes on from there.
        identity: digest of everything that decides the result.
        accelerator: ``accelerate.Accelerator``; every process takes its part of each batch.
    Raises: ModelError: the loss is no number. DataError: a picture cannot be read.
    """
    torch.manual_seed(training.seed)
    pictures = Pictures(data, image)
    loss_of = Loss(training, texts=texts, their_texts=lesson.texts or texts, is_classifier=is_classifier)
    parameters = trainable(student.module)
    optimizer = torch.optim.AdamW(list(parameters.values()), betas=_BETAS, weight_decay=training.weight_decay)
    checkpoint = Checkpoint(folder, identity, student.module, optimizer)
    first = checkpoint.load()
    if checkpoint.note:
        progress(Note(checkpoint.note))
    module, optimizer = accelerator.prepare(student.module, optimizer)
    module.train()
    log = Log(folder / "training.jsonl", n_done=first, is_main=accelerator.is_main_process)
    speed = Speed()
    for step in range(first, training.n_steps):
        student.observe(step < training.observe_share * training.n_steps)
        student.adapt(step < training.adapt_share * training.n_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, training)
        mine = batch_of(step, len(pictures), training)[accelerator.process_index :: accelerator.num_processes]
        pixels = pictures.rows(mine).to(accelerator.device)
        labels = pictures.labels[mine].to(accelerator.device)
        loss, n_right = loss_of(module(pixels)[0], lesson.answers(mine, pixels), labels)
        told = torch.stack([loss.detach(), loss.new_tensor(n_right / len(mine))])
        value, share_right = accelerator.reduce(told, "mean").tolist()
        if not math.isfinite(value):
            raise ModelError(
                f"Training diverged: the loss is {value} at step {step}.", hint="Pass a smaller --learning-rate."
            )
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters.values(), training.clip_norm)
        optimizer.step()
        row = {
            "step": step,
            "loss": value,
            "metric": share_right,
            "learning_rate": rate_at(step, training),
            "pictures_per_s": speed.add(training.batch_size),
        }
        log.add(row)
        progress(
            StepProgress(
                name="train",
                fraction=(step + 1) / training.n_steps,
                detail=f"step {step + 1}/{training.n_steps}, loss {value:.3f}, {loss_of.metric} "
                f"{row['metric']:.1%}, {row['pictures_per_s']:.0f} pictures/s",
            )
        )
        is_last = step + 1 == training.n_steps
        if accelerator.is_main_process and (is_last or (step + 1) % training.checkpoint_every == 0):
            log.flush()
            checkpoint.save(step + 1)
    accelerator.wait_for_everyone()
    student.observe(False)
    student.adapt(False)
    student.module.eval()


class Loss:
    """Cross entropy by labels where there are any, and distance from the teacher, weighed by ``distill_share``.

    Args: their_texts: what the teacher's vectors are compared with; the student's own texts where left out.
    """

    def __init__(
        self, training: Training, *, texts: Texts | None, is_classifier: bool, their_texts: Texts | None = None
    ) -> None:
        self.metric = "right" if training.has_labels else "as the teacher"
        self._their_texts = their_texts or texts
        self._training = training
        self._texts = texts
        self._is_classifier = is_classifier

    def __call__(self, got: Tensor, expected: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """The loss, and how many pictures are right (without labels: answered as the teacher answers)."""
        if not self._is_classifier and self._texts is None:
            return self._of_vectors(got, expected)
        scores, theirs = self._scores(got, self._texts), self._scores(expected, self._their_texts)
        best = theirs.argmax(1)
        distance = functional.kl_div(
            functional.log_softmax(scores, 1), functional.log_softmax(theirs, 1), reduction="batchmean", log_target=True
        )
        if not self._training.has_labels:
            return distance, int((scores.argmax(1) == best).sum())
        share = self._training.distill_share
        loss = share * distance + (1 - share) * functional.cross_entropy(scores, labels)
        return loss, int((scores.argmax(1) == labels).sum())

    def _scores(self, outputs: Tensor, texts: Texts | None) -> Tensor:
        if texts is None:
            return outputs
        embeddings = texts.embeddings.to(outputs.device)
        return texts.scale * functional.normalize(outputs, dim=-1) @ embeddings.T + texts.bias

    def _of_vectors(self, got: Tensor, expected: Tensor) -> tuple[Tensor, int]:
        """Squared distance of the directions; a picture counts as answered alike within a cosine of 0.99."""
        cosine = functional.cosine_similarity(got.flatten(1), expected.flatten(1))
        return 2 * (1 - cosine).mean(), int((cosine > 0.99).sum())
