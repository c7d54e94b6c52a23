"""Teach a student by what its teacher said, stoppable at any step.

What a step does follows from its number alone: its pictures, their forms, its rate, what is drawn at random. So a
training that was killed and started again ends with the same weights. Needs torch at import.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgevlm.distillation.gathering import gather_rows
from edgevlm.distillation.judging import Judge, RunsBatches
from edgevlm.distillation.lessons import Lessons, on_device
from edgevlm.distillation.recipe import Recipe
from edgevlm.distillation.step import Batch, Outputs, Step
from edgevlm.errors import MissingToolError, ModelError, UsageError
from edgevlm.progress import Note, Progress, StepProgress, silent
from edgevlm.training.checkpoint import Checkpoint, write_tensors
from edgevlm.training.log import Log, Speed
from edgevlm.training.processes import PATIENCE, must_use_cpu
from edgevlm.training.schedule import batch_with_epochs, rate_at

if TYPE_CHECKING:
    from edgevlm.distillation.objectives.combined import Objectives

LOG_FILE = "training.jsonl"
_BEST_FILE = "best.safetensors"
_BETAS = (0.9, 0.999)

T = TypeVar("T")
Decode = Callable[[str, Tensor, Mapping[str, Tensor]], Outputs]


class Learner(nn.Module):
    """A student with its objectives: what one step computes, as one module, so that its gradients are averaged.

    Args: decode: as ``Step.decode``, for objectives with prompts.
    """

    def __init__(
        self, kind: RunsBatches, student: nn.Module, objectives: Objectives, *, decode: Decode | None = None
    ) -> None:
        super().__init__()
        self.kind = kind
        self.student = student
        self.objectives = objectives
        self.decode = decode

    def forward(
        self, batch: Batch, teacher: Outputs, gather: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Every term of the loss, unweighted."""

        needs = self.objectives.student_needs

        def run(other: Batch) -> dict[str, Tensor]:
            # The other tower would say the same again.
            has_other_texts = other.input_ids is not batch.input_ids
            names = frozenset(name for name in needs if name.startswith("text_") == has_other_texts)
            with _running_statistics_kept(self.student):
                return self.kind.outputs(self.student, other, names)

        step = Step(
            batch=batch,
            student=self.kind.outputs(self.student, batch, needs),
            teacher=teacher,
            run=run,
            gather=gather,
            generator=generator,
            decode=self.decode,
        )
        return dict(self.objectives(step))

    def loss(self, terms: Mapping[str, Tensor]) -> Tensor:
        weighed = [self.objectives.weights[name] * value for name, value in terms.items()]
        return torch.stack(weighed).sum()


@contextlib.contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norms see these pictures and keep nothing of them: what the finished student meets is not masked."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a training ended.

    Args:
        n_steps: that were done, fewer where the student did not get better any more.
        metric: on the held-out pictures, of the weights that were kept; null where nothing was judged.
        best_step: after which these weights stood.
        loss: of the last step.
    """

    n_steps: int
    best_step: int
    metric: float | None
    loss: float


def new_accelerator(recipe: Recipe, folder: Path, *, cpu: bool = False) -> Any:
    """``accelerate.Accelerator`` for a recipe: precision, accumulation, and TensorBoard where it is installed.

    Raises: UsageError: the processes cannot share the batch, or the precision needs a GPU.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    mixed = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[recipe.precision]
    if recipe.precision == "fp16" and (cpu or not torch.cuda.is_available()):
        raise UsageError(
            "The recipe computes in fp16, and there is no GPU here.", hint="Pass --precision fp32, or bf16."
        )
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()  # one that an earlier training in this process left behind
    accelerator = Accelerator(
        cpu=cpu or must_use_cpu(),
        mixed_precision=mixed,
        gradient_accumulation_steps=recipe.n_accumulated,
        log_with="tensorboard" if has_tensorboard() else None,
        project_dir=str(folder),
        # A term may leave a tower out: its parameters then have no gradient to wait for.
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    n_parts = accelerator.num_processes * recipe.n_accumulated
    if recipe.batch_size % n_parts:
        raise UsageError(
            f"A batch of {recipe.batch_size} pictures cannot be shared evenly by {accelerator.num_processes} "
            f"process(es) with {recipe.n_accumulated} part(s) each.",
            hint=f"Pass a --batch-size that {n_parts} divides.",
        )
    return accelerator


def has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def train(
    learner: Learner,
    lessons: Lessons,
    recipe: Recipe,
    *,
    judge: Judge | None,
    folder: Path,
    identity: str,
    accelerator: Any,
    progress: Progress = silent,
) -> Trained:
    """Train ``learner.student`` in place; it ends with the weights that are to be kept, on the CPU.

    Args:
        judge: looks at the student at every checkpoint; None trains to the end and keeps the last weights.
        folder: takes ``checkpoint.safetensors`` and ``training.jsonl``; a training of the same ``identity`` that was
            stopped goes on from there.
        identity: digest of everything that decides the result.
        accelerator: as ``new_accelerator`` makes it; every process takes its share of each batch.
    Raises: ModelError: the loss is no number; the last good checkpoint is kept. DataError: a picture cannot be read.
    """
    torch.manual_seed(recipe.seed)
    average = {f"average.{name}": value.clone() for name, value in _floats(learner.student)} if recipe.average else {}
    optimizer = torch.optim.AdamW(_groups(learner, recipe.weight_decay), betas=_BETAS)
    checkpoint = Checkpoint(folder, identity, learner, optimizer, more=average)
    first = checkpoint.load()
    state = _State.from_facts(checkpoint.facts)
    model, optimizer = accelerator.prepare(learner, optimizer)
    for name, value in average.items():
        average[name] = value.to(accelerator.device)
    if accelerator.scaler is not None and (scaler := checkpoint.facts.get("scaler")):
        accelerator.scaler.load_state_dict(json.loads(scaler))
    if accelerator.log_with:
        accelerator.init_trackers("tensorboard")
    say = progress if accelerator.is_main_process else silent
    if first:
        say(Note(f"The training goes on after step {first} of {recipe.n_steps}."))
    elif checkpoint.note:
        say(Note(checkpoint.note))
    log = Log(folder / LOG_FILE, n_done=first, is_main=accelerator.is_main_process)
    speed = Speed()
    n_done = first
    with _Ahead(lambda step: _parts(step, lessons, recipe, accelerator), last=recipe.n_steps) as parts:
        while n_done < recipe.n_steps and not state.is_over(recipe.patience):
            step = n_done
            rate = rate_at(step, recipe, warmup_share=recipe.warmup_share)
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            terms = _do_step(step, parts(step), model, learner, optimizer, recipe, accelerator, checkpoint)
            n_done += 1
            if average:
                _move_average(learner.student, average, step, recipe.average)
            pictures_per_s = speed.add(recipe.batch_size)
            is_checked = n_done == recipe.n_steps or n_done % recipe.checkpoint_every == 0
            state.loss = terms.pop("loss")
            row: dict[str, Any] = {"step": step, "loss": state.loss, "terms": terms, "learning_rate": rate}
            if is_checked and judge is not None:
                with _standing_in(learner.student, average):
                    _agree(learner.student, accelerator)
                    state.judged(judge(learner.student, accelerator), n_done, is_higher_better=judge.is_higher_better)
                    if state.is_best and accelerator.is_main_process:
                        write_tensors(folder / _BEST_FILE, dict(_all(learner.student)), {"step": str(n_done)})
                row["metric"] = state.metric
            row |= {"pictures_per_s": pictures_per_s, "left_s": _left_s(n_done, recipe, pictures_per_s)}
            log.add(row)
            if accelerator.log_with:
                accelerator.log({name: value for name, value in row.items() if isinstance(value, float)}, step=step)
            say(StepProgress("train", n_done / recipe.n_steps, _words(row, n_done, recipe, state, judge)))
            if is_checked and accelerator.is_main_process:
                log.flush()
                scaler = accelerator.scaler
                checkpoint.save(
                    n_done,
                    state.to_facts() | ({"scaler": json.dumps(scaler.state_dict())} if scaler is not None else {}),
                )
    accelerator.wait_for_everyone()
    if accelerator.log_with:
        accelerator.end_training()
    learner.to("cpu")
    _keep_best(learner.student, average, folder, state, recipe)
    learner.student.eval()
    best_step = state.best_step if recipe.patience and judge is not None else n_done
    metric = (state.best if recipe.patience else state.metric) if judge is not None else None
    return Trained(n_steps=n_done, best_step=best_step, metric=metric, loss=state.loss)


# --- one step ----------------------------------------------------------------------------------------------


def _do_step(
    step: int,
    parts: list[tuple[Batch, Outputs]],
    model: nn.Module,
    learner: Learner,
    optimizer: Any,
    recipe: Recipe,
    accelerator: Any,
    checkpoint: Checkpoint,
) -> dict[str, float]:
    """Every term and ``loss``, the mean over parts and processes."""
    seen: dict[str, float] = {}
    for part, (batch, teacher) in enumerate(parts):
        seed = seed_of(recipe.seed, step, accelerator.process_index, part)
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        batch, teacher = on_device(batch, teacher, accelerator.device)
        with accelerator.accumulate(model):
            terms = model(batch, teacher, gather_of(accelerator), generator)
            loss = learner.loss(terms)
            told = torch.stack([loss.detach(), *(value.detach() for value in terms.values())]).float()
            values = accelerator.reduce(told, "mean").tolist()
            for name, value in zip(("loss", *terms), values, strict=True):
                if not math.isfinite(value):
                    raise _diverged(f"'{name}' is {value}", step, checkpoint)
                seen[name] = seen.get(name, 0.0) + value / len(parts)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(learner.parameters(), recipe.clip_norm)
                # With a scaler an overflow is no failure: the step is left out, and the scale is made smaller.
                if accelerator.scaler is None and not math.isfinite(float(norm)):
                    raise _diverged(f"the gradient's length is {float(norm)}", step, checkpoint)
            optimizer.step()
            optimizer.zero_grad()
    return seen


def _diverged(what: str, step: int, checkpoint: Checkpoint) -> ModelError:
    kept = f" The last good checkpoint is kept: '{checkpoint.file}'." if checkpoint.file.is_file() else ""
    return ModelError(
        f"Training diverged at step {step + 1}: {what}.{kept}",
        hint="Pass a smaller --learning-rate, or --precision fp32.",
    )


def _parts(step: int, lessons: Lessons, recipe: Recipe, accelerator: Any) -> list[tuple[Batch, Outputs]]:
    """This process's share of a step's batch, in as many parts as are accumulated."""
    pictures = lessons.pictures
    rows = [pictures.row_of(*each) for each in batch_with_epochs(step, len(pictures.data), recipe)]
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    size = len(mine) // recipe.n_accumulated
    return [lessons.batch(mine[start : start + size]) for start in range(0, len(mine), size)]


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence([number % (1 << 32) for number in numbers]).generate_state(1, np.uint64)[0] >> 1)


def gather_of(accelerator: Any) -> Callable[[Tensor], Tensor]:
    """Every process's rows of a tensor, with gradient."""
    return gather_rows if accelerator.num_processes > 1 else lambda value: value


class _Ahead(Generic[T]):
    """Makes the next step's batch while this one is learned."""

    def __init__(self, make: Callable[[int], T], *, last: int) -> None:
        self._make = make
        self._last = last
        self._pool = ThreadPoolExecutor(1)
        self._next: dict[int, Future[T]] = {}

    def __enter__(self) -> Callable[[int], T]:
        return self._get

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _get(self, step: int) -> T:
        future = self._next.pop(step, None)
        made = future.result() if future is not None else self._make(step)
        if step + 1 < self._last:
            self._next[step + 1] = self._pool.submit(self._make, step + 1)
        return made


# --- weights -----------------------------------------------------------------------------------------------


def _groups(learner: Learner, weight_decay: float) -> list[dict[str, Any]]:
    """Norms, biases and scales are not drawn to zero."""
    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    return [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": weight_decay},
        {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
    ]


def _all(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers, each once: tied ones have one name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _agree(student: nn.Module, accelerator: Any) -> None:
    """All processes judge the first one's student: batch norms follow each process's own pictures."""
    if accelerator.num_processes > 1:
        for _, value in _all(student):
            torch.distributed.broadcast(value.data, src=0)


def _floats(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, value.detach()) for name, value in _all(module) if value.is_floating_point())


@torch.no_grad()
def _move_average(student: nn.Module, average: dict[str, Tensor], step: int, decay: float) -> None:
    # Early on the average would be mostly of the start; TensorFlow's ExponentialMovingAverage warms up so.
    decay = min(decay, (1 + step) / (10 + step))
    for name, value in _floats(student):
        average[f"average.{name}"].lerp_(value, 1 - decay)


@contextlib.contextmanager
def _standing_in(student: nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """The student has the averaged weights while the block runs."""
    own = {name: value.clone() for name, value in _floats(student)} if average else {}
    _put(student, {name: average[f"average.{name}"] for name in own})
    try:
        yield
    finally:
        _put(student, own)


@torch.no_grad()
def _put(student: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    if tensors:
        for name, value in _all(student):
            if name in tensors:
                value.copy_(tensors[name])


def _keep_best(student: nn.Module, average: Mapping[str, Tensor], folder: Path, state: _State, recipe: Recipe) -> None:
    if recipe.patience and state.best_step and (folder / _BEST_FILE).is_file():
        from safetensors.torch import load_file

        _put(student, load_file(folder / _BEST_FILE))
    else:
        _put(student, {name.removeprefix("average."): value for name, value in average.items()})


# --- what is known so far ----------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _State:
    """How the student was judged so far; goes into the checkpoint."""

    metric: float | None = None
    best: float | None = None
    best_step: int = 0
    n_without: int = 0
    loss: float = math.nan
    is_best: bool = field(default=False)

    def judged(self, metric: float, step: int, *, is_higher_better: bool) -> None:
        self.metric = metric
        self.is_best = self.best is None or (metric > self.best if is_higher_better else metric < self.best)
        if self.is_best:
            self.best, self.best_step, self.n_without = metric, step, 0
        else:
            self.n_without += 1

    def is_over(self, patience: int) -> bool:
        return bool(patience) and self.n_without >= patience

    def to_facts(self) -> dict[str, str]:
        known = {"metric": self.metric, "best": self.best, "best_step": self.best_step, "n_without": self.n_without}
        return {"state": json.dumps({**known, "loss": self.loss})}

    @classmethod
    def from_facts(cls, facts: Mapping[str, str]) -> _State:
        return cls(**json.loads(facts["state"])) if "state" in facts else cls()


def _left_s(n_done: int, recipe: Recipe, pictures_per_s: float) -> float:
    return (recipe.n_steps - n_done) * recipe.batch_size / max(pictures_per_s, 1e-9)


def _words(row: Mapping[str, Any], n_done: int, recipe: Recipe, state: _State, judge: Judge | None) -> str:
    judged = f", {judge.metric} {state.metric:.3f}" if judge is not None and state.metric is not None else ""
    return (
        f"step {n_done}/{recipe.n_steps}, loss {row['loss']:.3f}{judged}, {row['pictures_per_s']:.0f} pictures/s, "
        f"about {row['left_s']:.0f} s left"
    )


def require_accelerate() -> None:
    """Raises: MissingToolError: accelerate is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise MissingToolError(
            "Training needs accelerate, which is not installed here.", hint="Run: pip install 'edgevlm[distill]'"
        )
