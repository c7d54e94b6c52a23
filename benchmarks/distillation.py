"""What a teacher is worth to a small student: the same student with and without it, over several seeds.

    python -m benchmarks.distillation classifier --assets ../shared/assets
    python -m benchmarks.distillation two-towers --assets ../shared/assets

Each arm of a study trains the same student for the same steps on the same pictures; only what it learns from differs.
Students are judged on pictures that no arm trained on. A training that is stopped goes on where it was, and what is
finished is not made again, so that a study can take several sittings. Results go to ``results/distillation/``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

import edgevlm
from benchmarks.suite.environments import default_folder
from edgevlm.cli.progress import shown_progress
from edgevlm.data.data_set import DataSet
from edgevlm.data.readers import read_data_set
from edgevlm.distillation.distill import DISTILLATION_FILE, Distillation
from edgevlm.distillation.recipe import Recipe, Term, load_recipe
from edgevlm.distillation.teachers import Teacher, TorchTeacher, teacher_of
from edgevlm.ingest import read_model
from edgevlm.runtime.image import decode_image, preprocess
from edgevlm.runtime.spec import Array, Spec, from_json

RESULTS = Path(__file__).parent / "results" / "distillation"
N_SEEDS = 3
_PICTURES_IN_A_CALL = 8


class Arm(Spec, frozen=True, kw_only=True):
    """What a student learns from."""

    name: str
    recipe: Recipe


class Study(Spec, frozen=True, kw_only=True):
    """Arms that differ in nothing but the recipe.

    Args:
        data, unseen: to train on and to judge on, as ``read_data_set`` takes them.
        image_size: of the student's pictures; the teacher's where null.
    """

    key: str
    title: str
    teacher: str
    student: str
    data: str
    unseen: str
    image_size: int | None
    arms: tuple[Arm, ...]


class Run(Spec, frozen=True, kw_only=True):
    """A trained student, judged."""

    arm: str
    seed: int
    n_steps: int
    n_parameters: int
    metrics: dict[str, float]


class StudyResult(Spec, frozen=True, kw_only=True):
    """A study as far as it got.

    Args: teacher: its metrics on the same pictures.
    """

    schema_version: int = 1
    study: Study
    made_at: str
    n_unseen: int
    teacher: dict[str, float]
    teacher_n_parameters: int
    runs: tuple[Run, ...]
    versions: dict[str, str]


@click.command()
@click.argument("name", type=click.Choice(["classifier", "two-towers"]))
@click.option("--assets", type=click.Path(path_type=Path), default=Path("../shared/assets"), show_default=True)
@click.option("--seeds", default=N_SEEDS, show_default=True)
@click.option("--steps", type=int, help="Instead of the study's own: for a smoke test.")
@click.option("--work", type=click.Path(path_type=Path), help="Where students and checkpoints are kept.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(name: str, assets: Path, seeds: int, steps: int | None, work: Path | None, results: Path) -> None:
    """Run a study, or what is left of it."""
    work = (work or default_folder() / "distillation") / (name if steps is None else f"{name}-{steps}")
    work.mkdir(parents=True, exist_ok=True)
    study = STUDIES[name](assets, work, steps)
    teacher = TorchTeacher(read_model(study.teacher))
    unseen = read_data_set(study.unseen, labels=teacher.model.labels, task=teacher.model.task)
    expected = _answers(teacher, unseen)
    runs: list[Run] = []
    # One seed of every arm before the next: a study that is cut short still compares.
    for seed in range(seeds):
        for arm in study.arms:
            runs.append(_run(study, arm, seed, work, unseen, expected))
            _write(results, _result(study, runs, teacher, unseen, expected))
            click.echo(f"{arm.name}, seed {seed}: {_in_words(runs[-1].metrics)}")
    click.echo(table(from_json((results / f"{study.key}.json").read_bytes(), StudyResult)))


def _run(study: Study, arm: Arm, seed: int, work: Path, unseen: DataSet, expected: Mapping[str, Array]) -> Run:
    folder = work / f"{arm.name.replace(' ', '-')}-{seed}"
    if not (folder / DISTILLATION_FILE).is_file():
        with shown_progress() as progress:
            edgevlm.distill(
                study.teacher,
                student=study.student,
                data=study.data,
                eval_data=study.unseen,
                recipe=arm.recipe,
                seed=seed,
                image_size=study.image_size,
                output=folder,
                is_timed=False,
                progress=progress,
            )
    made = from_json((folder / DISTILLATION_FILE).read_bytes(), Distillation)
    student = teacher_of(read_model(str(folder)))
    return Run(
        arm=arm.name,
        seed=seed,
        n_steps=made.n_steps,
        n_parameters=made.n_parameters,
        metrics=_metrics(_answers(student, unseen), expected, unseen),
    )


def _result(
    study: Study, runs: Sequence[Run], teacher: TorchTeacher, unseen: DataSet, expected: Mapping[str, Array]
) -> StudyResult:
    from edgevlm.extras import tool_versions

    return StudyResult(
        study=study,
        made_at=time.strftime("%Y-%m-%d", time.gmtime()),
        n_unseen=len(unseen),
        teacher=_metrics(expected, expected, unseen),
        teacher_n_parameters=sum(p.numel() for p in teacher.module.parameters()),
        runs=tuple(runs),
        versions={**tool_versions("torch", "transformers", "numpy"), "edgevlm": edgevlm.__version__},
    )


# --- judging ----------------------------------------------------------------------------------------------


def _answers(model: Teacher, data: DataSet) -> dict[str, Array]:
    """Logits, or embeddings of pictures and of the class names, over all pictures in order."""
    image = model.processing.image
    found: dict[str, list[Array]] = {}
    for start in range(0, len(data), _PICTURES_IN_A_CALL):
        samples = data.samples[start : start + _PICTURES_IN_A_CALL]
        pixels = np.stack([preprocess(decode_image(sample.read()), image) for sample in samples])
        for key, value in model.outputs(pixels, frozenset({"logits", "image_embeds"})).items():
            found.setdefault(key, []).append(value)
    whole = {key: np.concatenate(values) for key, values in found.items()}
    text = model.processing.text
    if text is not None:
        prompts = [text.prompt_template.replace("{}", name) for name in data.class_names]
        whole |= model.text_outputs(prompts, frozenset({"text_embeds"}))
    return whole


def _metrics(answers: Mapping[str, Array], expected: Mapping[str, Array], data: DataSet) -> dict[str, float]:
    labels = np.array([-1 if sample.label is None else sample.label for sample in data.samples])
    scores, theirs = _scores(answers), _scores(expected)
    best, their_best = scores.argmax(1), theirs.argmax(1)
    found = {"top-1 as the teacher": float((best == their_best).mean())}
    if (labels >= 0).all():
        found["top-1"] = float((best == labels).mean())
    if "text_embeds" in answers:
        # Of a class's name to pictures: is one of its pictures among the nearest?
        ranked = np.argsort(-scores, axis=0, kind="stable")
        for k in (1, 5):
            hit = [bool((labels[ranked[:k, c]] == c).any()) for c in range(scores.shape[1]) if (labels == c).any()]
            found[f"recall@{k}"] = float(np.mean(hit))
    return found


def _scores(answers: Mapping[str, Array]) -> Array:
    if "logits" in answers:
        return answers["logits"]
    pictures, texts = (
        value / np.linalg.norm(value, axis=1, keepdims=True)
        for value in (answers["image_embeds"], answers["text_embeds"])
    )
    scores: Array = pictures @ texts.T
    return scores


# --- the studies ------------------------------------------------------------------------------------------


def _classifier(assets: Path, work: Path, steps: int | None) -> Study:
    """MobileNetV2 with ImageNet's weights teaches MobileViT-XXS on small photographs, whose labels it never sees."""
    settings: dict[str, Any] = {
        "n_steps": steps or 1600, "batch_size": 256, "n_variants": 4, "checkpoint_every": 100, "patience": 0,
        "learning_rate": 2e-3,
    }  # fmt: skip
    tiny = assets / "data" / "tiny-imagenet"
    return Study(
        key="classifier",
        title="MobileNetV2 (ImageNet) into MobileViT-XXS at 64×64, on 20,000 unlabelled photographs",
        teacher=str(assets / "models" / "mobilenet-v2-imagenet"),
        student="mobilevit-xxs",
        data=str(tiny / "train"),
        unseen=str(_by_class(tiny, work / "unseen")),
        image_size=64,
        arms=(
            Arm(name="distilled", recipe=_changed(load_recipe("logits"), **settings)),
            Arm(name="from scratch", recipe=_changed(load_recipe("labels"), **settings)),
        ),
    )


def _two_towers(assets: Path, work: Path, steps: int | None) -> Study:
    """A MobileViT-S with a text tower, trained on the built-in shapes, teaches a MobileViT-XXS with the same one."""
    taught = Recipe(
        name="pairs",
        terms=(Term(objective="image-text-label-contrastive"),),
        n_steps=steps or 2400,
        batch_size=64,
        learning_rate=1e-3,
        augmentation="flip",
        n_variants=2,
    )
    teacher = work / "teacher"
    if not (teacher / DISTILLATION_FILE).is_file():
        with shown_progress() as progress:
            edgevlm.distill(
                "demo", student="mobilevit-s", data="shapes", recipe=taught, output=teacher, is_timed=False,
                progress=progress,
            )  # fmt: skip
    short = _changed(taught, n_steps=steps or 600)
    affinity = Recipe(
        **{**msgspec.structs.asdict(short), "name": "distilled"}
        | {
            "terms": (
                *short.terms,
                *(t for t in load_recipe("clip-affinity").terms if t.objective != "image-text-contrastive"),
            )
        }
    )
    return Study(
        key="two-towers",
        title="A two-tower MobileViT-S into MobileViT-XXS, on the built-in shapes",
        teacher=str(teacher),
        student="mobilevit-xxs",
        data="shapes",
        unseen="shapes",
        image_size=None,
        arms=(Arm(name="distilled", recipe=affinity), Arm(name="from scratch", recipe=short)),
    )


STUDIES: dict[str, Callable[[Path, Path, int | None], Study]] = {"classifier": _classifier, "two-towers": _two_towers}


def _changed(recipe: Recipe, **settings: Any) -> Recipe:
    return msgspec.structs.replace(recipe, **settings)


def _by_class(tiny: Path, folder: Path) -> Path:
    """Tiny ImageNet's judged pictures in a folder for each class, which is how its classes find the teacher's."""
    import csv

    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.part")
        with (tiny / "val_labels.csv").open(encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                place = unfinished / row["wnid"]
                place.mkdir(parents=True, exist_ok=True)
                (place / row["file"]).unlink(missing_ok=True)
                (place / row["file"]).symlink_to((tiny / "val" / row["file"]).resolve())
        unfinished.rename(folder)
    return folder


# --- what is written --------------------------------------------------------------------------------------


def table(result: StudyResult) -> str:
    """A row for each arm: the mean over seeds, and from the worst to the best of them."""
    names = list(result.teacher)
    lines = [
        f"| {result.study.title} | parameters | seeds | " + " | ".join(names) + " |",
        "|---" * (3 + len(names)) + "|",
        f"| teacher | {result.teacher_n_parameters / 1e6:.2f} M | | "
        + " | ".join(f"{result.teacher[name]:.3f}" for name in names)
        + " |",
    ]
    for arm in result.study.arms:
        runs = [run for run in result.runs if run.arm == arm.name]
        if not runs:
            continue
        cells = []
        for name in names:
            values = [run.metrics[name] for run in runs]
            cells.append(f"{statistics.fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]")
        size = f"{runs[0].n_parameters / 1e6:.2f} M"
        lines.append(f"| {arm.name}, {runs[0].n_steps} steps | {size} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _write(results: Path, result: StudyResult) -> None:
    results.mkdir(parents=True, exist_ok=True)
    # Where the pictures lie on this machine is nobody's business.
    study = msgspec.structs.replace(
        result.study,
        **{
            name: Path(getattr(result.study, name)).name
            if "/" in getattr(result.study, name)
            else getattr(result.study, name)
            for name in ("teacher", "data", "unseen")
        },
    )
    told = msgspec.structs.replace(result, study=study)
    text = json.dumps(msgspec.to_builtins(told), indent=1) + "\n"
    (results / f"{study.key}.json").write_text(text, encoding="utf-8")
    (results / f"{study.key}.md").write_text(table(told), encoding="utf-8")


def _in_words(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())


if __name__ == "__main__":
    main()
