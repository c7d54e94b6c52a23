"""What a teacher is worth to a small student, study by study.

    python -m benchmarks.distillation classifier --assets ../shared/assets
    python -m benchmarks.distillation photographs --assets ../shared/assets
    python -m benchmarks.distillation two-towers
    python -m benchmarks.distillation sam

``--beside`` then takes teacher and best student through ``edgevlm compile``, and shows both bundles side by side.

Each arm of a study trains the same student on the same pictures; only what it learns from differs. Students are judged
on pictures that no arm trained on. A training that is stopped goes on where it was, and what is finished is not made
again, so that a study can take several sittings. Results go to ``results/distillation/``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

import edgevlm
from benchmarks.distillation.beside import show_beside
from benchmarks.distillation.judging import Answers, answers_of, judge
from benchmarks.distillation.spec import Arm, Run, Study, StudyResult
from benchmarks.distillation.studies import STUDIES
from benchmarks.distillation.table import table
from benchmarks.suite.environments import default_folder
from edgevlm.cli.progress import shown_progress
from edgevlm.data.data_set import DataSet
from edgevlm.data.readers import read_data_set
from edgevlm.distillation.distill import DISTILLATION_FILE, Distillation
from edgevlm.distillation.recipe import Recipe
from edgevlm.distillation.students import load_student
from edgevlm.distillation.students.facts import StudentBesideTeacher, describe_student
from edgevlm.distillation.teachers import TorchTeacher, teacher_of
from edgevlm.extras import tool_versions
from edgevlm.families import MASKS
from edgevlm.ingest import read_model
from edgevlm.runtime.machine import describe_machine
from edgevlm.runtime.spec import from_json

RESULTS = Path(__file__).parents[1] / "results" / "distillation"
N_SEEDS = 3
_LARGEST_SHAPE = 256


@click.command()
@click.argument("name", type=click.Choice(list(STUDIES)))
@click.option("--assets", type=click.Path(path_type=Path), default=Path("../shared/assets"), show_default=True)
@click.option("--seeds", default=N_SEEDS, show_default=True)
@click.option("--steps", type=int, help="Instead of the study's own: for a smoke test.")
@click.option("--work", type=click.Path(path_type=Path), help="Where students and checkpoints are kept.")
@click.option("--results", type=click.Path(path_type=Path), help="Where they are written; those of --steps in WORK.")
@click.option("--retime", is_flag=True, help="Time teacher and untrained student again, on a quiet machine.")
@click.option("--beside", is_flag=True, help="Compile teacher and best student too, and show them side by side.")
def main(
    name: str,
    assets: Path,
    seeds: int,
    steps: int | None,
    work: Path | None,
    results: Path | None,
    retime: bool,
    beside: bool,
) -> None:
    """Run a study, or what is left of it."""
    work = (work or default_folder() / "distillation") / (name if steps is None else f"{name}-{steps}")
    work.mkdir(parents=True, exist_ok=True)
    results = results or (RESULTS if steps is None else work)
    study = STUDIES[name](assets, work, steps)
    teacher = TorchTeacher(read_model(study.teacher))
    image = teacher.processing.image
    unseen = read_data_set(
        study.unseen,
        labels=teacher.model.labels,
        task=teacher.model.task,
        n_shapes=study.n_unseen,
        shapes_size=min(_LARGEST_SHAPE, max(image.height, image.width)),
    )
    expected = {} if teacher.model.task == MASKS else answers_of(teacher, unseen)
    of_teacher = judge(teacher, unseen, expected)
    click.echo(f"teacher: {_in_words(of_teacher)}")
    earlier = _earlier(results / f"{study.key}.json", study, teacher)
    facts, timed_on = (earlier.facts, earlier.machine) if earlier else (None, "")
    runs = {(run.arm, run.seed): run for run in (earlier.runs if earlier else ())}
    # One seed of every arm before the next: a study that is cut short still compares.
    for seed in range(seeds):
        for arm in study.arms:
            if (arm.name, seed) not in runs:
                runs[arm.name, seed] = _run(study, arm, seed, work, unseen, expected)
                _write(results, _result(study, list(runs.values()), facts, teacher, len(unseen), of_teacher, timed_on))
            click.echo(f"{arm.name}, seed {seed}: {_in_words(runs[arm.name, seed].metrics)}")
    if facts is None or retime:
        timed_on = describe_machine().name
        with shown_progress() as progress:
            facts = describe_student(
                load_student(study.student), teacher.model, image_size=study.image_size, progress=progress
            )
    result = _result(study, list(runs.values()), facts, teacher, len(unseen), of_teacher, timed_on)
    _write(results, result)
    click.echo(table(result))
    if beside:
        best = max(runs.values(), key=lambda run: next(iter(run.metrics.values())))
        checkpoints = (Path(study.teacher), _folder(work, best.arm, best.seed))
        told = show_beside(
            checkpoints,
            work=work,
            results=results,
            name=f"{name}-side-by-side",
            judged_on=study.unseen,
            eval_data=study.unseen,
        )
        click.echo(told)


def _earlier(file: Path, study: Study, teacher: TorchTeacher) -> StudyResult | None:
    """What an earlier sitting found, maybe on another machine; None where it was another study, or another teacher."""
    if not file.is_file():
        return None
    found = from_json(file.read_bytes(), StudyResult)
    return found if found.study == _told(study) and found.teacher_digest == teacher.digest else None


def _run(study: Study, arm: Arm, seed: int, work: Path, unseen: DataSet, expected: Answers) -> Run:
    folder = _folder(work, arm.name, seed)
    before = _folder(work, arm.after, seed) if arm.after else None
    recipe = msgspec.structs.replace(arm.recipe, seed=seed)
    if not _is_made(folder, recipe, read_model(study.teacher).source.digest):
        with shown_progress() as progress:
            edgevlm.distill(
                study.teacher,
                student=study.student if before is None else before,
                data=study.data,
                eval_data=study.unseen,
                recipe=arm.recipe,
                seed=seed,
                image_size=study.image_size,
                output=folder,
                overwrite=True,
                is_timed=False,
                progress=progress,
            )
    made = _distillation(folder)
    return Run(
        arm=arm.name,
        seed=seed,
        n_steps=made.n_steps + (_distillation(before).n_steps if before else 0),
        n_parameters=made.n_parameters,
        n_bytes=_weights(folder),
        metrics=judge(teacher_of(read_model(str(folder))), unseen, expected),
    )


def _is_made(folder: Path, recipe: Recipe, teacher_digest: str) -> bool:
    if not (folder / DISTILLATION_FILE).is_file():
        return False
    made = _distillation(folder)
    return (made.recipe, made.teacher_digest) == (recipe, teacher_digest)


def _folder(work: Path, arm: str, seed: int) -> Path:
    return work / f"{arm.replace(' ', '-')}-{seed}"


def _distillation(folder: Path) -> Distillation:
    return from_json((folder / DISTILLATION_FILE).read_bytes(), Distillation)


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _result(
    study: Study,
    runs: Sequence[Run],
    facts: StudentBesideTeacher | None,
    teacher: TorchTeacher,
    n_unseen: int,
    of_teacher: dict[str, float],
    timed_on: str,
) -> StudyResult:
    return StudyResult(
        study=study,
        made_at=time.strftime("%Y-%m-%d", time.gmtime()),
        n_unseen=n_unseen,
        teacher=of_teacher,
        teacher_digest=teacher.digest,
        teacher_n_parameters=sum(p.numel() for p in teacher.module.parameters()),
        teacher_n_bytes=_weights(Path(study.teacher)),
        facts=facts,
        machine=timed_on,
        runs=tuple(runs),
        versions={**tool_versions("torch", "transformers", "numpy"), "edgevlm": edgevlm.__version__},
    )


def _write(results: Path, result: StudyResult) -> None:
    results.mkdir(parents=True, exist_ok=True)
    told = msgspec.structs.replace(result, study=_told(result.study))
    text = json.dumps(msgspec.to_builtins(told), indent=1) + "\n"
    (results / f"{told.study.key}.json").write_text(text, encoding="utf-8")
    (results / f"{told.study.key}.md").write_text(table(told), encoding="utf-8")


def _told(study: Study) -> Study:
    """The study without the places where things lie on this machine."""
    return msgspec.structs.replace(
        study, **{name: Path(getattr(study, name)).name for name in ("teacher", "data", "unseen")}
    )


def _in_words(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())


if __name__ == "__main__":
    main()
