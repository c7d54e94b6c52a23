"""Engines: built here where TensorRT for RTX is, else on the device from what the bundle holds."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgevlm
from edgevlm.building import build
from edgevlm.cli.main import exit_code_of
from edgevlm.data import shapes
from edgevlm.errors import MissingToolError, UsageError
from edgevlm.runtime.backends import tensorrt
from edgevlm.runtime.bundle import open_bundle
from edgevlm.runtime.engine import read_card
from tests.fast import FAST


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


def test_nothing_is_built_where_tensorrt_is_not(jetson, tmp_path, capsys):
    if tensorrt.TensorRt().version() is not None:
        pytest.skip("TensorRT is here")
    with pytest.raises(MissingToolError):
        build(jetson, output=tmp_path / "out")
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
