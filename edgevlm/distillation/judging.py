"""How good a student is on pictures that training never saw, and how good its teacher. Needs torch at import."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgevlm.distillation.lessons import Lessons, on_device
from edgevlm.distillation.step import Batch, Outputs

RIGHT = "top-1 accuracy"
AS_TEACHER = "top-1 as the teacher"
COSINE = "cosine with the teacher"
LOSS = "loss"

_PICTURES_IN_A_CALL = 64

Score = Callable[[Outputs, Outputs, Batch], Tensor]
"""From the student's outputs, the teacher's and the batch to a number for each picture."""


class RunsBatches(Protocol):
    """As much of a kind of student as judging needs."""

    def outputs(self, module: nn.Module, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]: ...


class Judge:
    """Judges a student on held-out pictures, each process its own share of them.

    By the labels where there are any, else by how far the student answers as the teacher does; where neither can be
    compared, by the loss.

    Args:
        metric, needs: as ``choose_metric`` says.
        loss: of a batch, by the student as it stands.
    """

    def __init__(
        self,
        kind: RunsBatches,
        held_out: Lessons,
        *,
        metric: str,
        needs: frozenset[str],
        loss: Callable[[Batch, Outputs], Tensor],
    ) -> None:
        self.metric, self.needs = metric, needs
        self.is_higher_better = self.metric != LOSS
        self._kind = kind
        self._held_out = held_out
        self._loss = loss

    def __call__(self, student: nn.Module, accelerator: Any) -> float:
        """The metric, over all processes' shares."""
        was_training = student.training
        student.eval()
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            texts = self._class_embeds(student, accelerator.device)
            for batch, teacher in self._batches(accelerator):
                if self.metric == LOSS:
                    scores = self._loss(batch, teacher).expand(len(batch.pixel_values))
                else:
                    outputs = self._kind.outputs(student, batch, self.needs)
                    scores = self._scores(outputs, teacher, batch, texts)
                total += torch.tensor([scores.double().sum().item(), len(scores)], dtype=torch.float64)
        student.train(was_training)
        summed = accelerator.reduce(total.float().to(accelerator.device), "sum")
        return float(summed[0] / summed[1])

    def of_teacher(self) -> float | None:
        """The teacher's own; None where it is no more than 1 by definition, or a loss."""
        if self.metric != RIGHT:
            return None
        held_out = self._held_out
        n = len(held_out.pictures.data)
        stored = held_out.stored
        texts = stored.texts().get("text_embeds")
        right = 0
        for start in range(0, n, _PICTURES_IN_A_CALL):
            rows = range(start, min(start + _PICTURES_IN_A_CALL, n))
            outputs = {name: torch.from_numpy(value) for name, value in stored.rows(rows).items()}
            labels = torch.from_numpy(held_out.pictures.labels[list(rows)])
            if "logits" in self.needs:
                best = outputs["logits"].argmax(1)
            else:
                assert texts is not None and held_out.texts is not None
                classes = torch.from_numpy(texts[: held_out.texts.n_classes])
                best = _nearest(outputs["image_embeds"], classes)
            right += int((best == labels).sum())
        return right / n

    def _scores(self, outputs: Outputs, teacher: Outputs, batch: Batch, texts: Tensor | None) -> Tensor:
        if self.metric == COSINE:
            mine, theirs = outputs["image_embeds"].flatten(1), teacher["image_embeds"].flatten(1)
            return functional.cosine_similarity(mine, theirs)
        best = outputs["logits"].argmax(1) if texts is None else _nearest(outputs["image_embeds"], texts)
        expected = teacher["logits"].argmax(1) if self.metric == AS_TEACHER else batch.labels
        assert expected is not None
        return (best == expected).float()

    def _class_embeds(self, student: nn.Module, device: torch.device) -> Tensor | None:
        if self.metric != RIGHT or "logits" in self.needs:
            return None
        texts = self._held_out.class_texts()
        assert texts is not None, "the metric was chosen by it"
        return self._kind.outputs(student, on_device(texts, {}, device)[0], frozenset({"text_embeds"}))["text_embeds"]

    def _batches(self, accelerator: Any) -> Iterator[tuple[Batch, Outputs]]:
        n = len(self._held_out.pictures.data)
        mine = range(n)[accelerator.process_index :: accelerator.num_processes]
        for start in range(0, len(mine), _PICTURES_IN_A_CALL):
            yield on_device(*self._held_out.batch(mine[start : start + _PICTURES_IN_A_CALL]), accelerator.device)


def choose_metric(
    student: Mapping[str, tuple[int, ...]],
    teacher: Mapping[str, tuple[int, ...]],
    *,
    is_labelled: bool,
    has_class_texts: bool,
) -> tuple[str, frozenset[str]]:
    """The metric, and the outputs for pictures that it needs of both.

    Args: student, teacher: the shape of one row by output.
    """
    if len(student.get("logits", ())) == 1 and student["logits"] == teacher.get("logits"):
        return (RIGHT if is_labelled else AS_TEACHER), frozenset({"logits"})
    if is_labelled and has_class_texts and "text_embeds" in student and "text_embeds" in teacher:
        return RIGHT, frozenset({"image_embeds"})
    if "image_embeds" in student and student["image_embeds"] == teacher.get("image_embeds"):
        return COSINE, frozenset({"image_embeds"})
    return LOSS, frozenset()


def _nearest(pictures: Tensor, texts: Tensor) -> Tensor:
    return (functional.normalize(pictures, dim=-1) @ functional.normalize(texts, dim=-1).T).argmax(1)
