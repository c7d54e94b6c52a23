"""Bad input: one clear sentence and a hint, the right exit code, no traceback, nothing lost."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

import edgevlm
from edgevlm.cli.main import exit_code_of
from edgevlm.data import shapes
from edgevlm.runtime.machine import describe_machine
from tests.fast import FAST, FAST_OPTIONS

DEMO_MODEL = Path(shapes.__file__).parent / "demo_model"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory, demo_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(shutil.copytree(demo_cache, tmp_path_factory.mktemp("cache") / "copy")))
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pictures"
    shapes.write_folder(folder, n=100, seed=6)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, pictures):
    output = tmp_path_factory.mktemp("out") / "demo"
    return edgevlm.compile("demo", eval_data=pictures, precision="fp32", **FAST, output=output).bundle


def test_float_that_cannot_be_timed_is_one_sentence(pictures, demo_cache, tmp_path, monkeypatch, capsys):
    from edgevlm.steps import timing

    real = timing.compare

    def without_float(*args, **more):
        found = real(*args, **more)
        failed = [replace(m, failure="it ran out of memory.") if m.subject == "fp32" else m for m in found.measurements]
        return replace(found, measurements=tuple(failed), is_valid=False)

    monkeypatch.setattr(timing, "compare", without_float)
    monkeypatch.setenv("EDGEVLM_CACHE", str(shutil.copytree(demo_cache, tmp_path / "cache")))
    asked = ("compile", "demo", "--eval-data", pictures, "--precision", "fp32", *FAST_OPTIONS, "-o", tmp_path / "out")
    refused(capsys, [*asked, "-q"], code=1, words="cannot be timed here: it ran out of memory")


@pytest.fixture
def bundle(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def refused(capsys, arguments, *, code, words):
    """Run the command line; it must end with ``code`` and one sentence that holds ``words``."""
    assert exit_code_of([str(argument) for argument in arguments]) == code
    told = capsys.readouterr()
    errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, told.err
    assert words.lower() in told.err.lower()
    assert " hint: " in told.err
    assert "Traceback" not in told.err
    assert told.out == ""


def compile_demo(*more):
    return ["compile", "demo", *more]


# --- words that nothing is called by ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["compile", "dmeo"], 1, "dmeo"),
        (["compile", "./no/such/model"], 2, "no/such/model"),
        (compile_demo("--target", "cpuu"), 2, "Did you mean 'cpu'?"),
        (compile_demo("--task", "image-clasification"), 2, "Did you mean 'image-classification'"),
        (compile_demo("--task", "image-classification"), 2, "task"),
        (compile_demo("--precision", "int9"), 2, "int8"),
        (compile_demo("--backends", "onnxruntimes"), 2, "Did you mean 'onnxruntime'?"),
        (compile_demo("--calibration", "defualt"), 2, "Did you mean 'default'?"),
        (compile_demo("--eval-data", "no-such-folder"), 1, "no-such-folder"),
        (compile_demo("--labels", "a,b,a"), 2, "'a'"),
        (compile_demo("--batch", "0"), 2, "batch"),
        (["run", "no-such-bundle", "x.png"], 1, "no-such-bundle"),
        (["evaluate", "no-such-bundle", "--data", "shapes"], 1, "no-such-bundle"),
        (["benchmark", "no-such-bundle"], 1, "no-such-bundle"),
        (["verify", "no-such-bundle"], 1, "no-such-bundle"),
    ],
)
def test_unknown_words(capsys, arguments, code, words):
    refused(capsys, arguments, code=code, words=words)


# --- models -----------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "checkpoint"))


def test_weights_that_are_no_numbers_are_named(capsys, checkpoint, pictures):
    from safetensors.numpy import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = np.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused(capsys, ["compile", checkpoint, "--eval-data", pictures, "-q"], code=1, words="visual_projection.weight")


def test_truncated_weights(capsys, checkpoint, pictures):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(capsys, ["compile", checkpoint, "--eval-data", pictures, "-q"], code=1, words="model.safetensors")


def test_an_operator_that_nothing_runs(capsys, tmp_path):
    import onnx
    from onnx import helper

    value = [helper.make_tensor_value_info(n, 1, [1, 3, 32, 32]) for n in ("pixels",)]
    output = [helper.make_tensor_value_info("logits", 1, [1, 3, 32, 32])]
    node = helper.make_node("Teleport", ["pixels"], ["logits"], domain="my.own")
    graph = helper.make_graph([node], "g", value, output)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.own", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "odd.onnx")
    (tmp_path / "odd.card.toml").write_text('task = "image-classification"\nlabels = ["a", "b", "c"]\n')
    refused(capsys, ["compile", tmp_path / "odd.onnx", "-q"], code=1, words="Teleport")


# --- data -------------------------------------------------------------------------------------------------


def test_data_that_cannot_be_used(capsys, tmp_path, pictures):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(capsys, compile_demo("--eval-data", empty), code=1, words="no pictures")
    mislabelled = Path(shutil.copytree(pictures, tmp_path / "mislabelled"))
    (mislabelled / "red circle").rename(mislabelled / "red circus")
    refused(capsys, compile_demo("--eval-data", mislabelled), code=1, words="red circus")
    broken = Path(shutil.copytree(pictures, tmp_path / "broken"))
    next((broken / "red circle").iterdir()).write_bytes(b"not a picture")
    refused(capsys, compile_demo("--eval-data", broken, "-q"), code=1, words="red circle")
    detection = tmp_path / "coco"
    (detection / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(detection / "images" / "0.png")
    boxes = {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}],
             "categories": [{"id": 1, "name": "cat"}]}  # fmt: skip
    (detection / "instances.json").write_text(json.dumps(boxes))
    refused(capsys, compile_demo("--eval-data", detection), code=1, words="holds boxes")


def test_a_picture_that_cannot_be_read(capsys, made, tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"nothing")
    refused(capsys, ["run", made, tmp_path / "x.jpg"], code=1, words="x.jpg")


# --- bundles ----------------------------------------------------------------------------------------------


def test_every_file_of_a_bundle_is_guarded(capsys, made, tmp_path):
    for file in sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file()):
        changed = Path(shutil.copytree(made, tmp_path / "changed"))
        data = bytearray((changed / file).read_bytes())
        data[len(data) // 2] ^= 1
        (changed / file).write_bytes(bytes(data))
        if file.name != "manifest.json":  # a changed manifest is found by what it says, in tests/runtime
            refused(capsys, ["verify", changed], code=1, words=file.name)
        (changed / file).write_bytes(bytes(data[: len(data) // 2]))
        refused(capsys, ["verify", changed], code=1, words=file.name)
        shutil.rmtree(changed)


def edited(bundle, **changes):
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_bytes())
    for name, value in changes.items():
        manifest[name] = {**manifest[name], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(manifest))
    return bundle


def test_a_bundle_for_other_hardware_or_from_the_future(capsys, bundle):
    picture = bundle / "golden" / "0.png"
    other = "aarch64" if describe_machine().arch == "x86-64" else "x86-64"
    refused(capsys, ["run", edited(bundle, requires={"arch": other}), picture], code=3, words=other)
    edited(bundle, requires={"arch": None, "isa": ["amx_from_mars"]})
    refused(capsys, ["run", bundle, picture], code=3, words="amx_from_mars")
    edited(bundle, requires={"isa": [], "backends": {"onnxruntime": "99.0"}})
    refused(capsys, ["run", bundle, picture], code=3, words="99.0")
    refused(capsys, ["run", edited(bundle, schema_version=99), picture], code=1, words="99")


def test_a_latency_budget_for_another_machine(capsys, tmp_path):
    other = "aarch64" if describe_machine().arch == "x86-64" else "x86-64"
    (tmp_path / "board.toml").write_text(f'name = "board"\ndescription = "a board"\narch = "{other}"\n')
    asked = compile_demo("--target", tmp_path / "board.toml", "--max-latency-ms", "5")
    refused(capsys, asked, code=2, words=f"it is {other}")


def test_shapes_and_lengths_that_the_model_does_not_have(capsys, tmp_path):
    shapes = ["-t", "rtx-40", "-o", tmp_path / "out"]
    refused(capsys, compile_demo(*shapes, "--max-shapes", "pixels:8x3x64x64"), code=2, words="called 'pixels'")
    refused(capsys, compile_demo(*shapes, "--max-shapes", "pixel_values:8x3x64x64"), code=2, words="cannot be")
    refused(capsys, compile_demo(*shapes, "--max-shapes", "pixel_values"), code=2, words="no name with sizes")
    wrong = ["--min-shapes", "pixel_values:4x3x64x64", "--max-shapes", "pixel_values:2x3x64x64"]
    refused(capsys, compile_demo(*shapes, *wrong), code=2, words="fit together")
    refused(capsys, compile_demo(*shapes, "--text-length", "1"), code=2, words="between 2 and")


# --- places -----------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_refused_before_any_work(capsys, pictures, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    asked = compile_demo("--eval-data", pictures, "-o", tmp_path / "out")
    refused(capsys, asked, code=2, words="exists already")
    refused(capsys, [*asked, "--overwrite"], code=2, words="no bundle")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_an_output_that_cannot_be_written(capsys, pictures, tmp_path):
    (tmp_path / "file").write_text("")
    asked = compile_demo(
        "--eval-data", pictures, "--precision", "fp32", *FAST_OPTIONS, "-q", "-o", tmp_path / "file" / "out"
    )
    refused(capsys, asked, code=1, words="cannot be written")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_leaves_nothing(capsys, pictures, tmp_path, monkeypatch, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path / "out"))

    monkeypatch.setattr("edgevlm.bundle.write._copy", fail)
    asked = compile_demo("--eval-data", pictures, "--precision", "fp32", *FAST_OPTIONS, "-q", "-o", tmp_path / "out")
    refused(capsys, asked, code=1, words=os.strerror(number).lower())
    assert list(tmp_path.iterdir()) == []


def test_a_full_cache_is_told(capsys, pictures, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("edgevlm.steps.export.write_spec", fail)
    asked = compile_demo("--eval-data", pictures, "-q", "-o", tmp_path / "out")
    refused(capsys, asked, code=1, words="cache clear")
    assert not (tmp_path / "out").exists()


# --- stopped ----------------------------------------------------------------------------------------------


def processes_of(session):
    """Everything that a process started with ``start_new_session`` has left."""
    found = subprocess.run(["pgrep", "-s", str(session)], capture_output=True, text=True)
    return set(found.stdout.split())


def test_a_stopped_compile_leaves_no_half_and_goes_on(pictures, demo_cache, tmp_path):
    shutil.copytree(demo_cache, tmp_path / "cache")
    environment = os.environ | {"EDGEVLM_CACHE": str(tmp_path / "cache")}
    asked = ["compile", "demo", "--eval-data", pictures, "-o", tmp_path / "out", "-v", *FAST_OPTIONS]
    command = [sys.executable, "-m", "edgevlm", *asked, "--precision", "int8-dynamic"]
    for how, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        for line in process.stderr:
            if line.startswith("search: image_encoder: screening, round"):
                break
        os.kill(process.pid, how) if how == signal.SIGKILL else os.killpg(process.pid, how)
        told = process.stderr.read()
        assert process.wait(timeout=30) == code
        assert "Traceback" not in told
        assert not (tmp_path / "out").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]
        deadline = time.monotonic() + 20
        while processes_of(process.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not processes_of(process.pid)
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr


# --- a base install ---------------------------------------------------------------------------------------


def test_compiling_on_a_base_install_names_the_command(tmp_path):
    blocked = (
        "import sys, importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name in ('torch', 'onnx', 'transformers') else find(name, *a); "
        "from edgevlm.cli.main import main; main(['compile', 'demo'])"
    )
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 3
    assert "pip install 'edgevlm[compile]'" in done.stderr
    assert "Traceback" not in done.stderr
