"""The plan is a value: the same model, target and wishes give the same steps everywhere, and nothing is done for it.

``python -m tests.test_plan`` writes the golden plans anew; read the difference before committing it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edgevlm.compiler import ACTIONS
from edgevlm.model import Graph, Model, Source
from edgevlm.plan import Budgets, DataDigests, Request, Step, plan, plan_text
from edgevlm.quantization.calibration import CalibrationRecipe
from edgevlm.runtime.spec import (
    ImageProcessing,
    Normalize,
    Processing,
    Rescale,
    Resize,
    TensorSpec,
    TextProcessing,
)
from edgevlm.target import Target

GOLDEN = Path(__file__).parent / "golden" / "plans"

TARGET = Target(name="board", description="A board that does not exist", arch="aarch64", activation_sign="s8", opset=18)
IMAGE = ImageProcessing(
    height=64,
    width=64,
    steps=(Resize(height=64, width=64), Rescale(factor=1 / 255), Normalize(mean=(0.5,) * 3, std=(0.5,) * 3)),
)
TEXT = TextProcessing(
    tokenizer="processing/tokenizer.json", input_names=("input_ids", "attention_mask"), max_length=16, pad_token_id=0
)
DATA = DataDigests(
    source="pictures",
    calibrate="c" * 64,
    select="5" * 64,
    report="e" * 64,
    n_calibrate=20,
    n_select=40,
    n_report=40,
    has_labels=True,
    is_synthetic=False,
)
RECIPE = CalibrationRecipe(
    name="ours", methods=("minmax",), n_samples=20, seed=0, source="the pictures", licence="theirs"
)
REQUEST = Request(n_threads=4, backends=("onnxruntime",), calibration=RECIPE)
PIXELS = TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, 64, 64))
TOKENS = tuple(TensorSpec(name=name, dtype="int64", shape=("batch", 16)) for name in TEXT.input_names)


def model(task: str, family: str, graphs: tuple[Graph, ...], *, labels: tuple[str, ...] = ()) -> Model:
    return Model(
        name="net",
        task=task,
        family=family,
        graphs=graphs,
        processing=Processing(image=IMAGE, text=TEXT if len(graphs) > 1 else None),
        source=Source(
            kind="hugging_face",
            location="/somewhere/net",
            asked="somebody/net",
            digest="d" * 64,
            weights_sha256="f" * 64,
            licence="apache-2.0",
        ),
        labels=labels,
    )


CLASSIFIER = model(
    "image-classification",
    "image_classifier",
    (Graph(name="model", inputs=(PIXELS,), outputs=("logits",)),),
    labels=("cat", "dog"),
)
TOWERS = model(
    "zero-shot-image-classification",
    "clip",
    (
        Graph(name="image_encoder", inputs=(PIXELS,), outputs=("image_embeds",)),
        Graph(name="text_encoder", inputs=TOKENS, outputs=("text_embeds",)),
    ),
)
FEATURES = model(
    "image-feature-extraction", "clip", (Graph(name="image_encoder", inputs=(PIXELS,), outputs=("image_embeds",)),)
)


def asked(**changes: object) -> Request:
    return msgspec.structs.replace(REQUEST, **changes)


PLANS = {
    "classifier": plan(CLASSIFIER, TARGET, REQUEST, DATA),
    "classifier-float-only": plan(
        CLASSIFIER, TARGET, asked(precision="fp32", budgets=Budgets(max_latency_ms=5.0, max_size_mb=2.5)), DATA
    ),
    "features-free-batch": plan(FEATURES, TARGET, asked(batch=None), DATA),
    "two-towers": plan(TOWERS, TARGET, REQUEST, DATA),
    "two-towers-folded": plan(TOWERS, TARGET, asked(labels=("a cat", "a dog"), batch=4), DATA),
    "not-at-hand": plan(TOWERS, TARGET, asked(is_measured=False, text_length=8, counted_on="cortex-a76"), DATA),
}


def golden_text(steps: tuple[Step, ...]) -> str:
    """The plan as `--dry-run` prints it, then each step's whole value."""
    values = [msgspec.json.format(msgspec.json.encode(step), indent=2).decode() for step in steps]
    return "\n\n".join([plan_text(steps), *values]) + "\n"


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_the_golden_one(name):
    assert golden_text(PLANS[name]) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_no_golden_plan_is_left_over():
    assert {file.stem for file in GOLDEN.iterdir()} == set(PLANS)


@pytest.mark.parametrize("name", PLANS)
def test_a_step_needs_only_what_stands_before_it(name):
    seen: set[str] = set()
    for step in PLANS[name]:
        assert set(step.needs) <= seen
        assert step.name not in seen
        assert step.action in ACTIONS
        seen.add(step.name)


def params(steps: tuple[Step, ...], name: str) -> dict[str, object]:
    return next(step.params for step in steps if step.name == name)


def changed_steps(before: tuple[Step, ...], after: tuple[Step, ...]) -> set[str]:
    """The steps whose own parameters differ, or that are in one plan alone."""
    left, right = ({step.name: step.params for step in steps} for steps in (before, after))
    return {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"precision": "int8"}, {"search"}),
        ({"batch": 4}, {"export:model", "search"}),
        ({"n_threads": 1}, {"search"}),
        ({"budgets": Budgets(max_drop=0.02)}, {"search", "confirm"}),
        ({"calibration": msgspec.structs.replace(RECIPE, methods=("entropy",))}, {"search"}),
        ({"protocol": msgspec.structs.replace(REQUEST.protocol, seed=1)}, {"search"}),
        ({"labels": ("a cat", "a dog")}, set()),  # of a classifier nothing is folded
    ],
)
def test_a_wish_changes_the_steps_that_it_decides(changes, expected):
    assert changed_steps(PLANS["classifier"], plan(CLASSIFIER, TARGET, asked(**changes), DATA)) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": "other"}, {"bundle"}),
        ({"opset": 19}, {"export:model"}),
        ({"activation_sign": "u8"}, {"search"}),
        ({"precisions": ("fp32",)}, {"search"}),
        ({"isa": ("asimd", "asimddp")}, {"search"}),
    ],
)
def test_a_target_changes_the_steps_that_it_decides(changes, expected):
    target = msgspec.structs.replace(TARGET, **changes)
    assert changed_steps(PLANS["classifier"], plan(CLASSIFIER, target, REQUEST, DATA)) == expected


@pytest.mark.parametrize(
    ("split", "expected"), [("calibrate", {"search"}), ("select", {"search"}), ("report", {"confirm"})]
)
def test_pictures_change_the_step_that_sees_them(split, expected):
    data = msgspec.structs.replace(DATA, **{split: "0" * 64})
    assert changed_steps(PLANS["classifier"], plan(CLASSIFIER, TARGET, REQUEST, data)) == expected


def test_class_names_that_are_asked_about_decide_the_search():
    data = msgspec.structs.replace(DATA, class_names=("tabby", "siamese"))
    assert changed_steps(PLANS["two-towers"], plan(TOWERS, TARGET, REQUEST, data)) == {"search"}


def test_where_a_model_comes_from_is_part_of_what_the_bundle_says_of_it():
    source = msgspec.structs.replace(CLASSIFIER.source, revision="v2")
    other = msgspec.structs.replace(CLASSIFIER, source=source)
    assert changed_steps(PLANS["classifier"], plan(other, TARGET, REQUEST, DATA)) == {"bundle"}


def test_labels_leave_the_text_tower_behind():
    assert params(PLANS["two-towers"], "search")["graphs"] == ["image_encoder", "text_encoder"]
    assert params(PLANS["two-towers-folded"], "search")["graphs"] == ["image_encoder"]
    assert params(PLANS["two-towers-folded"], "export:text_encoder")["batch"] is None, "as many texts as labels"


def test_planning_loads_no_library_that_does_the_work():
    probe = (
        "import sys; import edgevlm.plan; "
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


if __name__ == "__main__":
    for plan_name, plan_steps in PLANS.items():
        (GOLDEN / f"{plan_name}.txt").write_text(golden_text(plan_steps), encoding="utf-8")
