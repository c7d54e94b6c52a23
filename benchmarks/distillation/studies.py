"""The studies: which teacher, which student, on what, and the arms that are compared."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

import edgevlm
from benchmarks.distillation.spec import Arm, Study
from edgevlm.cli.progress import shown_progress
from edgevlm.data.readers import read_data_set
from edgevlm.distillation.distill import DISTILLATION_FILE
from edgevlm.distillation.recipe import Recipe, Term, load_recipe
from edgevlm.families import ZERO_SHOT

Make = Callable[[Path, Path, int | None], Study]
"""From the assets, the study's folder and a number of steps for a smoke test to the study, with its teacher made."""


def classifier(assets: Path, work: Path, steps: int | None) -> Study:
    """MobileNetV2 with ImageNet's weights teaches MobileViT-XXS on small photographs, whose labels it never sees."""
    settings = _photographs(steps or 800)
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


def photographs(assets: Path, work: Path, steps: int | None) -> Study:
    """A locked MobileNetV2 with a text tower beside it teaches MobileViT-XXS with a small one."""
    from benchmarks.distillation.locked_teacher import N_STEPS, train_locked

    tiny = assets / "data" / "tiny-imagenet"
    train, unseen = (_named(tiny, split, work / f"{split}.csv") for split in ("train", "val"))
    data = read_data_set(train, labels=(), task=ZERO_SHOT)
    teacher = work / "teacher"
    train_locked(teacher, assets / "models" / "mobilenet-v2-imagenet", data, n_steps=steps or N_STEPS)
    settings = _photographs(steps or 480)
    scratch = Recipe(name="pairs", terms=(Term(objective="image-text-label-contrastive"),), **settings)
    return Study(
        key="photographs",
        title="Two towers around MobileNetV2 into MobileViT-XXS at 64×64, on 20,000 photographs of 200 classes",
        teacher=str(teacher),
        student="mobilevit-xxs",
        data=str(train),
        unseen=str(unseen),
        image_size=64,
        arms=(
            Arm(name="distilled", recipe=_changed(scratch, terms=(*scratch.terms, *_embeds(pictures=8, texts=8)))),
            Arm(name="from scratch", recipe=scratch),
        ),
    )


def two_towers(assets: Path, work: Path, steps: int | None) -> Study:
    """A MobileViT-S with a text tower, trained on the built-in shapes, teaches a MobileViT-XXS with the same one."""
    taught = Recipe(
        name="pairs",
        terms=(Term(objective="image-text-label-contrastive"),),
        n_steps=steps or 1200,
        batch_size=64,
        learning_rate=1e-3,
        augmentation="flip",
        n_variants=2,
        checkpoint_every=50,
    )
    teacher = work / "teacher"
    if not (teacher / DISTILLATION_FILE).is_file():
        with shown_progress() as progress:
            edgevlm.distill(
                "demo", student="mobilevit-s", data="shapes", recipe=taught, output=teacher, is_timed=False,
                progress=progress,
            )  # fmt: skip
    # Each arm at the better of two learning rates, 1e-3 and 3e-3.
    alone = _changed(taught, n_steps=steps or 600)
    distilled = _changed(alone, learning_rate=3e-3, terms=(*alone.terms, *_embeds(pictures=5)), inherits=True)
    return Study(
        key="two-towers",
        title="A two-tower MobileViT-S into MobileViT-XXS, on the built-in shapes",
        teacher=str(teacher),
        student="mobilevit-xxs",
        data="shapes",
        unseen="shapes",
        image_size=None,
        arms=(
            Arm(name="distilled", recipe=distilled),
            Arm(name="from scratch", recipe=alone),
        ),
    )


def sam(assets: Path, work: Path, steps: int | None) -> Study:
    """A SAM with half of ViT-S teaches TinyViT-5M: its encoder alone, then with prompts in the loop."""
    from benchmarks.distillation.sam_teacher import train_teacher

    teacher = work / "teacher"
    train_teacher(teacher, n_steps=steps or 1000)
    n_more = steps or 200
    alone = _changed(
        load_recipe("mobilesam"), n_steps=steps or 450, batch_size=16, n_accumulated=1, checkpoint_every=100
    )
    loop = _changed(load_recipe("edgesam"), n_steps=n_more, batch_size=16, n_accumulated=1, checkpoint_every=50)
    longer = _changed(alone, n_steps=n_more, learning_rate=loop.learning_rate, warmup_share=loop.warmup_share)
    return Study(
        key="sam",
        title="A SAM with half of ViT-S into TinyViT-5M at 128×128, on the built-in shapes",
        teacher=str(teacher),
        student="tinyvit-5m-sam",
        data="shapes",
        unseen="shapes",
        image_size=None,
        n_unseen=500,
        arms=(
            Arm(name="encoder alone", recipe=alone),
            Arm(name="then prompts in the loop", recipe=loop, after="encoder alone"),
            Arm(name="or encoder alone for longer", recipe=longer, after="encoder alone"),
        ),
    )


STUDIES: Mapping[str, Make] = {
    "classifier": classifier,
    "photographs": photographs,
    "two-towers": two_towers,
    "sam": sam,
}


def _photographs(n_steps: int) -> dict[str, Any]:
    """Both arms of a study on photographs; 20,000 of them are 156 steps."""
    return {
        "n_steps": n_steps, "batch_size": 128, "n_variants": 4, "checkpoint_every": 50, "patience": 0,
        "learning_rate": 2e-3, "weight_decay": 0.05, "average": 0.99, "augmentation": "crop-flip",
    }  # fmt: skip


def _embeds(*, pictures: float = 1.0, texts: float = 1.0) -> tuple[Term, Term]:
    """The teacher's vectors, by their cosines."""
    return (
        Term(objective="features", weight=pictures, options={"output": "image_embeds", "distance": "cosine"}),
        Term(objective="features", weight=texts, options={"output": "text_embeds", "distance": "cosine"}),
    )


def _changed(recipe: Recipe, **settings: Any) -> Recipe:
    return msgspec.structs.replace(recipe, **settings)


def _by_class(tiny: Path, folder: Path) -> Path:
    """Tiny ImageNet's judged pictures in a folder for each class, which is how its classes find the teacher's."""
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


def _named(tiny: Path, split: str, file: Path) -> Path:
    """A table of Tiny ImageNet's pictures with the first name of each one's class."""
    with (tiny / "words.csv").open(encoding="utf-8") as opened:
        words = {row["wnid"]: row["name"] for row in csv.DictReader(opened)}
    firsts = [name.split(",")[0] for name in words.values()]
    names = {wnid: name if firsts.count(name.split(",")[0]) > 1 else name.split(",")[0] for wnid, name in words.items()}
    with (tiny / f"{split}_labels.csv").open(encoding="utf-8") as opened:
        rows = [((tiny / split / row["file"]).resolve(), names[row["wnid"]]) for row in csv.DictReader(opened)]
    with file.open("w", newline="", encoding="utf-8") as written:
        csv.writer(written).writerows([("file", "label"), *rows])
    return file
