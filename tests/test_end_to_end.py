"""The whole way, really run: a model goes in, a bundle comes out, and the bundle answers."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

import edgevlm
from edgevlm.cache import why
from edgevlm.compiler import ACTIONS, compile_job, prepare
from edgevlm.data import shapes
from edgevlm.errors import GateError, UsageError
from edgevlm.measure.protocol import QUICK
from edgevlm.plan import TEXT_ENCODER
from edgevlm.report.facts import cautions
from edgevlm.report.spec import Report
from edgevlm.runtime.spec import from_json
from tests import colours
from tests.fast import FAST, FAST_OPTIONS

DEMO_MODEL = Path(shapes.__file__).parent / "demo_model"
PICTURE = shapes.picture(0, seed=5)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory, demo_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(shutil.copytree(demo_cache, tmp_path_factory.mktemp("cache") / "copy")))
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pictures"
    shapes.write_folder(folder, n=160, seed=5)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory, pictures):
    output = tmp_path_factory.mktemp("out") / "demo"
    return edgevlm.compile("demo", eval_data=pictures, **FAST, output=output)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The built-in model as somebody's own checkpoint."""
    folder = tmp_path_factory.mktemp("models") / "shapes-clip"
    shutil.copytree(DEMO_MODEL, folder)
    return folder


# --- what a compile makes ---------------------------------------------------------------------------------


def test_the_bundle_verifies_and_answers(demo):
    assert edgevlm.verify(demo.bundle)
    assert edgevlm.run(demo.bundle, PICTURE.image).top.label == PICTURE.label
    assert edgevlm.inspect(demo.bundle) == demo.manifest


def test_the_text_tower_is_folded_away(demo):
    names = {component.name for component in demo.manifest.components}
    assert names == {"image_encoder"}
    assert demo.manifest.labels == shapes.class_names()
    embeddings = np.load(demo.bundle / demo.manifest.scoring.label_embeddings, allow_pickle=False)
    assert embeddings.shape[0] == len(shapes.class_names())
    with pytest.raises(UsageError, match="not one of the 64 labels"):
        edgevlm.run(demo.bundle, PICTURE.image, labels=("a purple cow",))


def test_folded_labels_score_as_the_text_tower_does(demo):
    import torch
    import transformers

    model = transformers.VisionTextDualEncoderModel.from_pretrained(DEMO_MODEL).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    template = demo.manifest.processing.text or shapes.PROMPT_TEMPLATE
    texts = [str(template).format(label=label) for label in demo.manifest.labels]
    with torch.inference_mode():
        tokens = tokenizer(texts, padding="max_length", max_length=model.config.text_config.max_position_embeddings,
                           truncation=True, return_tensors="pt")  # fmt: skip
        expected = model.get_text_features(input_ids=tokens["input_ids"]).pooler_output.numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = np.load(demo.bundle / demo.manifest.scoring.label_embeddings, allow_pickle=False)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_report_says_what_the_manifest_says(demo):
    report = from_json((demo.bundle / "report" / "report.json").read_bytes(), Report)
    assert report == demo.report
    assert report.accuracy == demo.manifest.accuracy
    assert report.accuracy.value > 0.9
    assert report.accuracy.n == report.data.n_report
    assert {row.status for row in report.candidates} >= {"winner"}
    assert report.data.n_calibrate + report.data.n_select + report.data.n_report == 160
    for name in ("report.html", "report.md"):
        assert report.winner in (demo.bundle / "report" / name).read_text(encoding="utf-8")
    taken = (*report.screenings, *report.comparisons)
    assert {each.subject for comparison in taken for each in comparison.measurements} == {
        row.name for row in report.candidates
    }
    finalists = {each.subject for each in report.comparisons[0].measurements}
    assert "fp32" in finalists
    # What was only screened ships where every finalist was refused afterwards: for accuracy, or for its time.
    refused = {row.name for row in report.candidates if row.status not in ("winner", "inside budgets")}
    assert report.winner in finalists or {name.split("@")[0] for name in finalists} <= refused
    assert all(each.turns_ms for each in report.comparisons[0].measurements if each.failure is None)


def test_what_ships_never_lost_to_float(demo):
    winner = next(row for row in demo.report.candidates if row.status == "winner")
    assert winner.name == "fp32" or (winner.ratio_high < 1 and winner.drop <= 0.01)


def test_the_splits_share_no_picture(pictures, tmp_path):
    splits = prepare("demo", eval_data=pictures, output=tmp_path / "out").splits
    parts = [{sample.digest for sample in part.samples} for part in (splits.calibrate, splits.select, splits.report)]
    assert all(parts)
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_nothing_of_this_machine_is_in_the_bundle(demo, pictures):
    for file in demo.bundle.rglob("*"):
        if file.is_file() and file.suffix in (".onnx", ".json", ".npy"):
            data = file.read_bytes().replace(str(pictures).encode(), b"")  # the command that the user typed
            assert str(Path.home()).encode() + b"/" not in data, file
            assert str(Path(edgevlm.__file__).parent).encode() not in data, file


def test_an_archive_holds_the_same(pictures, tmp_path):
    # Float, so that no noise of the machine decides which candidate ships.
    asked = {"eval_data": pictures, "precision": "fp32", **FAST}
    folder = edgevlm.compile("demo", output=tmp_path / "demo", **asked)
    packed = edgevlm.compile("demo", output=tmp_path / "demo.evlm", **asked)
    ours = {entry for entry in packed.manifest.files if not entry.path.startswith("report/")}
    assert ours == {entry for entry in folder.manifest.files if not entry.path.startswith("report/")}
    assert edgevlm.run(packed.bundle, PICTURE.image) == edgevlm.run(folder.bundle, PICTURE.image)


def test_without_labels_both_towers_ship_and_any_label_can_be_asked(checkpoint, pictures, tmp_path):
    made = edgevlm.compile(str(checkpoint), eval_data=pictures, **FAST, precision="fp32", output=tmp_path / "out")
    assert {component.name for component in made.manifest.components} == {"image_encoder", TEXT_ENCODER}
    assert edgevlm.verify(made.bundle)
    color, shape = PICTURE.label.split()
    other = next(name for name in shapes.COLORS if name != color)
    answer = edgevlm.run(made.bundle, PICTURE.image, labels=(f"{other} {shape}", PICTURE.label))
    assert answer.top.label == PICTURE.label
    assert made.report.accuracy.value > 0.9


@pytest.mark.slow
def test_a_text_tower_that_nothing_judges_stays_float(checkpoint, pictures, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, picture in enumerate(sorted(pictures.rglob("*.png"))[:60]):
        shutil.copy(picture, flat / f"{i}.png")
    made = edgevlm.compile(str(checkpoint), eval_data=flat, **FAST, output=tmp_path / "out")
    assert {c.name: c.precision for c in made.manifest.components}[TEXT_ENCODER] == "fp32"
    assert any("text tower stays float" in warning for warning in made.report.warnings)


@pytest.mark.slow
def test_the_image_tower_alone_gives_features(checkpoint, pictures, tmp_path):
    made = edgevlm.compile(
        str(checkpoint),
        task="image-feature-extraction",
        eval_data=pictures,
        **FAST,
        precision="fp32",
        output=tmp_path / "out",
    )
    (component,) = made.manifest.components
    assert component.outputs[0].name == "image_embeds"
    assert edgevlm.run(made.bundle, PICTURE.image).to_array().ndim == 1
    assert edgevlm.verify(made.bundle)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "precision"), [(4, "fp32"), (None, "int8-static")])
def test_other_batches(pictures, tmp_path, batch, precision):
    asked = {**FAST, "eval_data": pictures, "precision": precision, "max_drop": 0.2}
    made = edgevlm.compile("demo", **asked, batch=batch, output=tmp_path / "out")
    assert made.manifest.latency.batch == (batch or 1)
    assert made.manifest.components[0].inputs[0].shape[0] == (batch or "batch")
    assert edgevlm.run(made.bundle, PICTURE.image).top.label == PICTURE.label
    assert edgevlm.verify(made.bundle)


@pytest.mark.parametrize(
    "precision",
    ["int8-static", "fp32", *(pytest.param(each, marks=pytest.mark.slow) for each in ("int8", "int8-dynamic"))],
)
def test_a_precision_that_is_insisted_on_ships(pictures, tmp_path, precision):
    made = edgevlm.compile(
        "demo",
        eval_data=pictures,
        **FAST,
        precision=precision,
        max_drop=0.2,
        output=tmp_path / "o",
    )
    assert made.manifest.components[0].precision.startswith(precision)
    assert made.manifest.selection == "requested"


def test_budgets_that_nothing_meets_name_the_nearest(pictures, tmp_path):
    with pytest.raises(GateError, match=r"where 0\.1 MB is allowed") as caught:
        edgevlm.compile("demo", eval_data=pictures, **FAST, max_size_mb=0.1, output=tmp_path / "out")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_a_size_budget_that_float_breaks_is_met_by_int8(pictures, tmp_path):
    made = edgevlm.compile("demo", eval_data=pictures, **FAST, max_size_mb=2, max_drop=0.1, output=tmp_path / "out")
    assert made.report.size_bytes <= 2e6
    assert made.report.winner != "fp32"


# --- the store --------------------------------------------------------------------------------------------


def hits(compiled):
    return {row.name: row.hit for row in compiled.report.steps}


def test_the_same_compile_again_is_a_look_up(pictures, tmp_path):
    asked = {"eval_data": pictures, "precision": "fp32", **FAST, "max_drop": 0.02}
    edgevlm.compile("demo", output=tmp_path / "first", **asked)
    again = edgevlm.compile("demo", output=tmp_path / "again", **asked)
    assert all(hits(again).values())
    assert "the same inputs" in why(again.bundle).steps[0].why


@pytest.mark.slow
def test_a_changed_weight_changes_everything(checkpoint, pictures, tmp_path):
    asked = {
        "eval_data": pictures,
        **FAST,
        "precision": "fp32",
        "labels": shapes.class_names(),
    }
    changed = tmp_path / "changed"
    shutil.copytree(checkpoint, changed)
    edgevlm.compile(str(changed), output=tmp_path / "first", **asked)
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (changed / "model.safetensors").write_bytes(bytes(weights))
    again = edgevlm.compile(str(changed), output=tmp_path / "second", **asked)
    assert not any(hits(again).values())
    assert "params.model" in why().steps[0].why


def test_a_changed_tool_or_code_is_a_miss_that_is_explained(tmp_path, monkeypatch):
    model, seen = colours.write_classifier(tmp_path / "colours.onnx"), colours.write_pictures(tmp_path / "pictures")
    asked = {"eval_data": seen, **FAST, "precision": "fp32"}
    edgevlm.compile(str(model), output=tmp_path / "first", **asked)
    assert all(hits(edgevlm.compile(str(model), output=tmp_path / "again", **asked)).values())
    monkeypatch.setattr("edgevlm.compiler.code_digest", lambda: "other code")
    job = prepare(str(model), output=tmp_path / "out", **asked)
    assert not any(hits(compile_job(job)).values())
    assert "code" in why().steps[0].why
    monkeypatch.setitem(ACTIONS, "export", msgspec.structs.replace(ACTIONS["export"], tools=("click",)))
    again = compile_job(dataclasses.replace(job, output=tmp_path / "out2"))
    assert not hits(again)["export:model"]
    assert "tools" in why().steps[0].why


def test_an_invalid_measurement_is_not_stored(pictures, tmp_path, monkeypatch):
    import edgevlm.steps.timing as timing

    def invalid(subjects, **options):
        found = compare(subjects, **options)
        ratios = tuple(
            msgspec.structs.replace(ratio, is_valid=False, reasons=("the machine was busy",)) for ratio in found.ratios
        )
        return msgspec.structs.replace(found, ratios=ratios, is_valid=False, reasons=("the machine was busy",))

    compare = timing.compare
    monkeypatch.setattr(timing, "compare", invalid)
    asked = {"eval_data": pictures, **FAST, "protocol": msgspec.structs.replace(QUICK, seed=9)}
    made = edgevlm.compile("demo", output=tmp_path / "first", **asked)
    assert made.manifest.selection == "float-fallback"
    (told,) = [each for each in cautions(made.report) if "the machine was busy" in each]
    assert "not valid: the machine was busy" in told
    assert made.report.comparisons[0].was_extended
    monkeypatch.setattr(timing, "compare", compare)
    again = edgevlm.compile("demo", output=tmp_path / "second", **asked)
    assert not hits(again)["search"]
    assert not hits(again)["bundle"]


# --- other sources ----------------------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8),
    ).eval()
"""
CARD = """
task = "image-classification"
labels = ["a", "b", "c", "d", "e", "f", "g", "h"]
[input]
height = 32
width = 32
"""


def test_a_module_and_an_onnx_file_of_it_decide_alike(tmp_path, monkeypatch):
    import torch

    (tmp_path / "my_models.py").write_text(MODULE)
    (tmp_path / "my.card.toml").write_text(CARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"card": tmp_path / "my.card.toml", **FAST, "precision": "fp32"}
    from_module = edgevlm.compile("my_models:make", output=tmp_path / "module", **options)
    import my_models

    torch.onnx.export(my_models.make(), (torch.zeros(1, 3, 32, 32),), tmp_path / "my.onnx", dynamo=True)
    from_onnx = edgevlm.compile(str(tmp_path / "my.onnx"), output=tmp_path / "onnx", **options)
    picture = Image.fromarray(PICTURE.image)
    ours, theirs = (edgevlm.run(made.bundle, picture) for made in (from_module, from_onnx))
    assert [each.label for each in ours.classes] == [each.label for each in theirs.classes]
    assert from_onnx.report.proofs[0].max_relative_error < 1e-5


@pytest.mark.slow
def test_real_mobilenet_keeps_its_accuracy(assets, tmp_path):
    made = edgevlm.compile(
        str(assets / "models" / "mobilenet-v2-imagenet"),
        eval_data=assets / "data" / "imagenet-sample",
        **FAST | {"calibration": "default"},  # 100 pictures to calibrate on and 100 to select by leave 200 of 400
        precision="int8-static",
        output=tmp_path / "out",
    )
    assert made.report.accuracy.n == 200
    assert made.report.accuracy.drop <= 0.01
    assert made.report.accuracy.reference == pytest.approx(0.9, abs=0.03)


# --- through the command line -----------------------------------------------------------------------------


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "edgevlm", *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_a_dry_run_prints_the_plan_and_does_nothing(pictures, tmp_path):
    probe = (
        "import sys; from edgevlm.cli.main import exit_code_of; "
        f"code = exit_code_of(['compile', 'demo', '--eval-data', {str(pictures)!r}, '--dry-run']); "
        "print(code, sorted({'torch', 'onnx', 'transformers', 'onnxruntime.quantization'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "export:image_encoder" in done.stdout
    assert not list(tmp_path.iterdir())


def test_json_is_one_value_and_progress_goes_elsewhere(pictures, tmp_path):
    done = command(
        "compile",
        "demo",
        "--eval-data",
        pictures,
        "--precision",
        "fp32",
        *FAST_OPTIONS,
        "-o",
        tmp_path / "out",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"]["winner"] == "fp32"
    assert "export:image_encoder" in done.stderr
    assert "\x1b" not in done.stderr
    quiet = command(
        "compile",
        "demo",
        "--eval-data",
        pictures,
        "--precision",
        "fp32",
        *FAST_OPTIONS,
        "-o",
        tmp_path / "out2",
        "-q",
    )
    assert quiet.stderr == ""
    bundle, picture = tmp_path / "out", next((pictures / "red circle").iterdir())
    verbs = (
        ("run", bundle, picture),
        ("inspect", bundle),
        ("verify", bundle),
        ("evaluate", bundle, "--data", pictures),
        ("benchmark", bundle, "--rounds", 6),
    )
    for verb in verbs:
        done = command(*verb, "--json")
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)
