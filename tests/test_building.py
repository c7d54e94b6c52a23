"""Engines: built here where TensorRT for RTX is, else on the device from what the bundle holds."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgevlm
from edgevlm.building import build
from edgevlm.cli.main import exit_code_of
from edgevlm.data import shapes
from edgevlm.errors import MissingToolError, UsageError
from edgevlm.runtime.backends import tensorrt, trtexec
from edgevlm.runtime.bundle import open_bundle
from edgevlm.runtime.engine import read_card
from edgevlm.runtime.engine_layers import read_layers
from tests.fast import FAST
from tests.runtime.backends.trtexec_stand_in import calls_of, save_trtexec


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    shapes.write_folder(folder, n=120, seed=5)
    rest = {name: value for name, value in FAST.items() if name != "backends"}
    return {**rest, "eval_data": folder, "max_drop": 0.1, "calibration": "quick"}


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


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine with neither TensorRT's Python module nor trtexec."""
    monkeypatch.setitem(tensorrt.MODULES, "tensorrt", "no_such_module")
    monkeypatch.setattr(trtexec, "PLACES", (str(tmp_path / "nothing"),))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


@pytest.fixture
def use(nowhere, monkeypatch, tmp_path):
    """A machine with trtexec alone, a stand-in."""

    def use(**plays) -> Path:
        program = save_trtexec(tmp_path / "bin", **plays)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        return program

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


def test_engines_are_built_into_a_new_bundle(without, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    found = build(without, output=tmp_path / "built")
    assert all(not form.failure for form in found.forms)
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


def test_an_engine_that_answers_otherwise_is_left_out(jetson, tmp_path, use, capsys):
    use(adds=0.7)
    assert exit_code_of(["build", str(jetson), "-o", str(tmp_path / "built"), "-q"]) == 0
    said = capsys.readouterr().out
    assert "no engine: 'golden/0.png' is off by" in said and "built by" not in said
    bundle = open_bundle(tmp_path / "built")
    assert [form.name for form in bundle.manifest.forms] == ["fp32"]
    assert not [path for path in bundle.entries if "engine" in path]


def test_an_engine_that_gives_no_numbers_is_left_out(jetson, tmp_path, use):
    use(adds="nan")
    found = build(jetson, output=tmp_path / "built")
    assert all("is off by inf" in form.failure for form in found.forms)


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
