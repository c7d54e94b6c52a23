"""Engines: built here where TensorRT for RTX is, else on the device from what the bundle holds."""

from __future__ import annotations

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
from edgevlm.building import build
from edgevlm.bundle.write import write_bundle
from edgevlm.cli.main import exit_code_of
from edgevlm.data import shapes
from edgevlm.errors import MissingToolError, ModelError, UsageError
from edgevlm.runtime.backends import tensorrt, trtexec
from edgevlm.runtime.bundle import open_bundle
from edgevlm.runtime.engine import BuildSettings, read_card
from edgevlm.runtime.engine_layers import read_layers
from edgevlm.runtime.verify import NO_ENGINE
from tests.fast import FAST
from tests.runtime.backends.tensorrt_stand_in import FakeCuda, FakeTensorRt
from tests.runtime.backends.trtexec_stand_in import calls_of, save_trtexec


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory, demo_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(shutil.copytree(demo_cache, tmp_path_factory.mktemp("cache") / "copy")))
        yield


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    shapes.write_folder(folder, n=120, seed=5)
    rest = {name: value for name, value in FAST.items() if name != "backends"}
    return {**rest, "eval_data": folder, "max_drop": 0.1}


@pytest.fixture(scope="module")
def without(tmp_path_factory, asked) -> Path:
    """For an RTX 40, made where TensorRT for RTX is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tensorrt.MODULES, "tensorrt-rtx", "no_such_module")
        output = tmp_path_factory.mktemp("without") / "bundle"
        edgevlm.compile("demo", target="rtx-40", output=output, **asked)
    return output


@pytest.fixture(scope="module")
def jetson(tmp_path_factory, asked) -> Path:
    output = tmp_path_factory.mktemp("jetson") / "bundle"
    edgevlm.compile("demo", target="jetson-orin-nano", output=output, **asked)
    return output


def hide_tensorrt(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setitem(tensorrt.MODULES, "tensorrt", "no_such_module")
    patch.setattr(trtexec, "PLACES", (str(folder / "nothing"),))
    patch.setenv("PATH", "/usr/bin:/bin")


def put_trtexec(patch: pytest.MonkeyPatch, folder: Path, **plays) -> Path:
    program = save_trtexec(folder / "bin", **plays)
    patch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return program


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine with neither TensorRT's Python module nor trtexec."""
    hide_tensorrt(monkeypatch, tmp_path)


@pytest.fixture
def use(nowhere, monkeypatch, tmp_path):
    """A machine with trtexec alone, a stand-in."""

    def use(**plays) -> Path:
        return put_trtexec(monkeypatch, tmp_path, **plays)

    return use


def test_what_cannot_be_built_here_is_said_and_float_still_runs(without):
    manifest = edgevlm.inspect(without)
    engines = [form for form in manifest.forms if form.build]
    assert {form.status for form in engines} == {"needs device build"}
    assert {form.components[0].precision for form in engines} >= {"fp32", "fp16", "int8-static"}
    assert manifest.forms[0].components[0].backend == "onnxruntime"
    assert edgevlm.run(without, shapes.picture(0, seed=5).image).top.label == shapes.picture(0, seed=5).label


def test_a_jetson_gets_settings_and_a_script_for_its_own_tools(jetson):
    form = next(form for form in edgevlm.inspect(jetson).forms if form.build)
    folder = (jetson / form.components[0].file).parent
    script = (folder / "build.sh.txt").read_text()
    assert script.startswith("#!/bin/sh")
    assert "--stronglyTyped" in script
    assert f"--onnx={Path(form.components[0].file).name}" in script
    assert (folder / "build.json").is_file()
    assert form.requires.backends == {"tensorrt": "10.3"}


def test_nothing_is_built_where_tensorrt_is_not(jetson, tmp_path, capsys, nowhere):
    with pytest.raises(MissingToolError, match="And there is no trtexec, which would do alone") as caught:
        build(jetson, output=tmp_path / "out")
    assert "python3-libnvinfer" in caught.value.hint and "libnvinfer-bin" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert exit_code_of(["build", str(jetson), "-o", str(tmp_path / "out"), "-q"]) == 3
    assert "hint" in capsys.readouterr().err


def test_a_bundle_without_such_forms_is_refused(without, tmp_path, asked):
    output = tmp_path / "cpu"
    edgevlm.compile("demo", target="cpu", output=output, backends=("onnxruntime",), precision="fp32", **asked)
    with pytest.raises(UsageError, match="needs an engine"):
        build(output, output=tmp_path / "out")


def test_engines_are_built_into_a_new_bundle(without, rtx, tmp_path, capsys):
    found = build(without, output=tmp_path / "built")
    assert all(not form.failure for form in found.forms)
    assert {form.built_by for form in found.forms} == {f"TensorRT for RTX {rtx.__version__}"}
    if tensorrt.TensorRtRtx().missing_device():
        assert all(form.unprofiled == form.unchecked != "" and not form.layers for form in found.forms)
        assert exit_code_of(["inspect", str(tmp_path / "built"), "--operators"]) == 0
        assert "tensorrt-rtx-fp16 image_encoder fp16 on tensorrt-rtx: not profiled: " in capsys.readouterr().out
    bundle = open_bundle(tmp_path / "built")
    for form in bundle.manifest.forms[1:]:
        assert form.status == "ready"
        assert form.components[0].file.endswith(".engine")
        card = read_card(bundle.file(form.components[0].file))
        assert card.compute_capabilities == ("8.9",)
    assert not [path for path in bundle.entries if path.endswith(".onnx") and "/tensorrt" in path]
    assert edgevlm.verify(tmp_path / "built")
    with pytest.raises(UsageError, match="needs an engine"):
        build(tmp_path / "built", output=tmp_path / "again")


# --- by trtexec alone -------------------------------------------------------------------------------------


def test_trtexec_alone_builds_checks_and_profiles(jetson, tmp_path, use, capsys):
    program = use()
    assert exit_code_of(["build", str(jetson), "-o", str(tmp_path / "built"), "-q"]) == 0
    said = capsys.readouterr().out
    bundle = open_bundle(tmp_path / "built")
    engines = bundle.manifest.forms[1:]
    assert [form.status for form in engines] == ["ready"] * len(engines) and len(engines) > 2
    for form in engines:
        assert f"{form.name}: built by trtexec of TensorRT 10.3.0.26, largest error" in said
        (part,) = form.components
        assert [Path(file).name for file in part.files] == [
            "image_encoder.engine", "image_encoder.engine.json", "image_encoder.engine-layers.json"
        ]  # fmt: skip
        engine = bundle.file(part.file)
        assert bundle.file(part.files[2]) and (layers := read_layers(engine))
        assert layers.device == "Orin" and layers.total_ms == 1.0
        card = read_card(engine)
        assert (card.version, card.compute_capabilities) == ("10.3.0.26", ("8.7",))
        assert [(spec.name, spec.dtype) for spec in card.inputs] == [(s.name, s.dtype) for s in part.inputs]
    assert "0.750 ms  75.0%" in said and "int8  Conv_0 + Relu_1" in said
    n_golden = len(engines[0].golden.cases)
    assert len(calls_of(program)) == len(engines) * (1 + n_golden + 1)
    assert not [path for path in bundle.entries if path.endswith(".onnx") and "/tensorrt" in path]


def test_a_timing_cache_is_kept_where_it_is_asked_for(jetson, tmp_path, use, monkeypatch):
    program = use()
    monkeypatch.chdir(tmp_path)
    assert exit_code_of(["build", str(jetson), "-o", "built", "--timing-cache", "gpu.cache", "-q"]) == 0
    builds = [call for call in calls_of(program) if any(each.startswith("--onnx") for each in call)]
    assert (tmp_path / "gpu.cache").read_bytes() == b"timed" * len(builds)
    assert builds and all(f"--timingCacheFile={tmp_path / 'gpu.cache'}" in call for call in builds)


def test_an_engine_that_answers_otherwise_is_left_out(jetson, tmp_path, use, capsys):
    use(adds=0.7)
    assert exit_code_of(["build", str(jetson), "-o", str(tmp_path / "built"), "-q"]) == 1
    said = capsys.readouterr().out
    assert "no engine: 'golden/0.png' is off by" in said and "built by" not in said
    bundle = open_bundle(tmp_path / "built")
    assert [form.name for form in bundle.manifest.forms] == ["fp32"]
    assert not [path for path in bundle.entries if "engine" in path]


def test_an_engine_that_gives_no_numbers_is_left_out(jetson, tmp_path, use):
    use(adds="nan")
    found = build(jetson, output=tmp_path / "built")
    assert all("holds NaN or infinity" in form.failure and not form.built_by for form in found.forms)


def test_an_engine_whose_layers_cannot_be_read_is_built_all_the_same(jetson, tmp_path, use, capsys):
    use(layers=[])
    assert exit_code_of(["build", str(jetson), "-o", str(tmp_path / "built"), "-q"]) == 0
    assert "not profiled: What trtexec of TensorRT 10.3.0.26 wrote of 'image_encoder.engine'" in capsys.readouterr().out
    bundle = open_bundle(tmp_path / "built")
    assert bundle.manifest.forms[1].status == "ready" and not [path for path in bundle.entries if "layers" in path]


@pytest.mark.parametrize(
    ("plays", "code", "words"),
    [
        ({"banner": "[RT 3]"}, 3, "does not say which TensorRT it is of"),
        ({"banner": "[TensorRT v100200]"}, 3, "needs TensorRT 10.3 or newer, and '"),
        ({"gpu": ""}, 3, "no CUDA-capable device is detected."),
        ({"fails": "node"}, 1, "node '/head/fold' (Col2Im): "),
        ({"fails": "build"}, 1, "Could not find any implementation for node"),
        ({"fails": "disk"}, 1, "Saving engine to file failed."),
    ],
)
def test_what_trtexec_cannot_build_is_one_sentence_a_hint_and_a_code(plays, code, words, jetson, tmp_path, use, capsys):
    use(**plays)
    assert exit_code_of(["build", str(jetson), "-o", str(tmp_path / "built"), "-q"]) == code
    error, hint = capsys.readouterr().err.splitlines()
    assert words in error and hint.startswith(" hint: ")
    assert not (tmp_path / "built").exists()


# --- by the Python module, and what is built by either ----------------------------------------------------


@pytest.fixture
def module(monkeypatch):
    """A stand-in for TensorRT's Python module and its GPU; what it builds, the stand-in for trtexec builds."""

    def module(**options) -> FakeTensorRt:
        cuda = FakeCuda()
        trt = FakeTensorRt(cuda, **options)
        monkeypatch.setattr(tensorrt, "_import_cuda", lambda: cuda)
        monkeypatch.setattr(tensorrt, "import_tensorrt", lambda backend: trt)
        return trt

    return module


def test_the_module_builds_checks_and_profiles_where_it_is(jetson, tmp_path, use, module, monkeypatch):
    program = use()
    tool = trtexec.find_trtexec()

    caches = set()

    def serialize(graph: Path, out: Path, *, settings: BuildSettings, timing_cache: Path) -> None:
        caches.add(timing_cache)
        tool.build(graph.absolute(), out, settings=settings)

    monkeypatch.setattr("edgevlm.building.serialize_engine", serialize)
    module()
    found = build(jetson, output=tmp_path / "built")
    for form in found.forms:
        assert (form.built_by, form.failure, form.unchecked, form.unprofiled) == ("TensorRT 10.3.0", "", "", "")
        assert form.max_error < 1e-3 and form.layers["image_encoder"].measured_by == "TensorRT 10.3.0"
    assert not [call for call in calls_of(program) if any(each.startswith("--loadEngine") for each in call)]
    assert len(caches) == 1  # what one form's build timed serves the next


def test_a_module_that_is_too_old_is_refused(jetson, tmp_path, nowhere, module, capsys):
    module().__version__ = "10.2.0"
    assert exit_code_of(["build", str(jetson), "-o", str(tmp_path / "built"), "-q"]) == 3
    assert "needs TensorRT 10.3 or newer, and its Python module is of 10.2.0." in capsys.readouterr().err
    assert not (tmp_path / "built").exists()


@pytest.fixture(scope="module")
def built(jetson, tmp_path_factory) -> Path:
    """What a machine with trtexec alone makes of it; tests only read it."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        hide_tensorrt(patch, folder)
        put_trtexec(patch, folder)
        build(jetson, output=folder / "built")
    return folder / "built"


@pytest.fixture(scope="module")
def alone(built, tmp_path_factory) -> Path:
    """A bundle of one engine, as `edgevlm tune` leaves it; tests only read it."""
    folder = tmp_path_factory.mktemp("alone")
    bundle = open_bundle(built)
    manifest = bundle.in_form(bundle.manifest.forms[2]).manifest
    files = {path: bundle.file(path) for path in bundle.entries}
    write_bundle(folder / "alone", msgspec.structs.replace(manifest, files=()), files)
    return folder / "alone"


@pytest.fixture
def picture(tmp_path) -> str:
    Image.fromarray(shapes.picture(0, seed=5).image).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def test_what_trtexec_built_runs_and_verifies_by_the_module(alone, built, picture, module, capsys):
    module()
    assert exit_code_of(["run", str(alone), picture]) == 0
    assert shapes.picture(0, seed=5).label in capsys.readouterr().out
    assert exit_code_of(["verify", str(built)]) == 0
    said = capsys.readouterr().out
    assert "tensorrt-int8" in said and "not run here" not in said


def test_layers_are_told_without_tensorrt_and_travel_with_the_engine(built, alone, nowhere, capsys):
    assert exit_code_of(["inspect", str(alone), "--operators"]) == 0
    said = capsys.readouterr().out
    assert "on Orin, by trtexec of TensorRT 10.3.0.26: 3 layers, 1.00 ms in all" in said
    assert "Conv_0 + Relu_1  CaskConvolution  int8" in said
    assert exit_code_of(["inspect", str(built), "--operators", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["form"] for row in rows if "form" in row] == [f.name for f in open_bundle(built).manifest.forms[1:]]


@pytest.mark.slow
def test_layers_that_nobody_timed_are_timed_where_the_engine_runs(jetson, tmp_path, use, module, capsys):
    use(layers=[])
    build(jetson, output=tmp_path / "built")
    assert exit_code_of(["inspect", str(tmp_path / "built"), "--operators"]) == 0
    assert "tensorrt-fp16 image_encoder fp16 on tensorrt: not profiled: TensorRT is not installed" in (
        capsys.readouterr().out
    )
    module()
    assert exit_code_of(["inspect", str(tmp_path / "built"), "--operators"]) == 0
    assert "on GPU of compute capability 8.7, by TensorRT 10.3.0: 2 layers" in capsys.readouterr().out


def test_graphs_that_wait_for_the_device_say_so(jetson, capsys):
    assert exit_code_of(["inspect", str(jetson), "--operators"]) == 0
    assert "not profiled: It is no engine yet: TensorRT builds an engine on the GPU" in capsys.readouterr().out
    assert exit_code_of(["inspect", str(jetson)]) == 0
    assert "needs device build: TensorRT builds an engine on the GPU" in " ".join(capsys.readouterr().out.split())


def test_a_form_that_waits_for_its_engine_is_left_out_where_tensorrt_is(jetson, tmp_path, module, capsys):
    module()
    assert exit_code_of(["verify", str(jetson)]) == 0
    assert f"tensorrt-fp16: not run here: {NO_ENGINE}" in capsys.readouterr().out
    assert exit_code_of(["tune", str(jetson), "-o", str(tmp_path / "tuned"), "--rounds", "6", "-q", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["chosen"] == "fp32"
    assert {form["reason"] for form in tuned["forms"] if form["name"] != "fp32"} == {NO_ENGINE}


# --- engines that are not for this machine ----------------------------------------------------------------


@pytest.mark.parametrize("verb", ["run", "verify"])
@pytest.mark.parametrize(
    ("version", "gpu", "words"),
    [
        (
            "11.0.0",
            "8.7",
            "by tensorrt 10.3.0.26, and this is 11.0.0: engines open in their own version alone.",
        ),
        ("10.3.0", "8.9", "was built for GPUs of compute capability 8.7, and this one has 8.9."),
    ],
    ids=["another version", "another GPU"],
)
def test_a_strangers_engine_is_one_sentence_and_a_hint(verb, version, gpu, words, alone, picture, module, capsys):
    trt = module()
    trt.__version__, trt.cuda.compute_capability = version, gpu
    assert exit_code_of([verb, str(alone), *([picture] if verb == "run" else [])]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert words in error and hint == " hint: Build the engine anew on this machine, from its graph."


def test_tune_leaves_strangers_out_and_says_why(built, tmp_path, module, capsys):
    module().cuda.compute_capability = "8.9"
    assert exit_code_of(["tune", str(built), "-o", str(tmp_path / "tuned"), "--rounds", "6", "-q", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["chosen"] == "fp32"
    reasons = [form["reason"] for form in tuned["forms"] if form["name"] != "fp32"]
    assert reasons and all("compute capability 8.7, and this one has 8.9." in reason for reason in reasons)


@pytest.mark.parametrize(("verb", "code"), [("run", 3), ("verify", 3)])
def test_without_tensorrt_an_engine_alone_is_unavailable(verb, code, alone, picture, nowhere, capsys):
    assert exit_code_of([verb, str(alone), *([picture] if verb == "run" else [])]) == code
    error, hint = capsys.readouterr().err.splitlines()
    assert "needs tensorrt, which is not installed" in error and "edgevlm[tensorrt]" in hint


def test_more_pictures_at_once_than_the_engine_takes_are_refused(alone, module):
    module()
    pipeline = edgevlm.Pipeline.load(alone)
    pixels = np.repeat(pipeline.preprocess(shapes.picture(0, seed=5).image)[None], 2, axis=0)
    session = pipeline.sessions["image_encoder"]
    with pytest.raises(
        ModelError, match="'pixel_values' is 2×3×64×64, and the engine was built for 1×3×64×64"
    ) as caught:
        session.run({"pixel_values": pixels})
    assert caught.value.hint and caught.value.exit_code == 1


# --- without TensorRT for RTX -----------------------------------------------------------------------------

WITHOUT_RTX = "import sys; sys.modules['tensorrt_rtx'] = None; from edgevlm.cli.main import main; main(sys.argv[1:])"


def without_rtx(*arguments: str) -> str:
    ran = subprocess.run([sys.executable, "-c", WITHOUT_RTX, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return " ".join(ran.stdout.split())


def test_a_target_says_why_its_backend_is_unavailable():
    said = without_rtx("targets", "show", "rtx-40")
    assert "# tensorrt-rtx: unavailable: TensorRT for RTX is not installed, or does not load: " in said
    assert "pip install 'edgevlm[tensorrt-rtx]'" in said
    assert "onnxruntime: unavailable" not in said


def test_a_bundle_made_without_it_says_why_and_everything_else_works(without, picture):
    manifest = edgevlm.inspect(without)
    for form in manifest.forms[1:]:
        assert form.status == "needs device build"
        assert form.why_not_built.startswith("TensorRT for RTX is not installed, or does not load: ")
    report = (without / "report" / "report.md").read_text(encoding="utf-8")
    assert "forms ship as graphs that" in report and "on the device: TensorRT for RTX is not installed" in report
    assert "needs device build: TensorRT for RTX is not installed" in without_rtx("inspect", str(without))
    assert shapes.picture(0, seed=5).label in without_rtx("run", str(without), picture)
    assert "fp16: not run here: " in without_rtx("verify", str(without))
