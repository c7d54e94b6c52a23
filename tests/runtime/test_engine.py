"""Engines as data: what a card refuses, and the command lines and the script that build one elsewhere."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import msgspec
import pytest

from edgevlm.errors import BundleError
from edgevlm.runtime.engine import (
    AskedRange,
    BuildSettings,
    EngineCard,
    ShapeRange,
    build_script,
    card_file,
    graph_digest,
    read_card,
    trtexec_command,
    trtexec_line,
    write_card,
)
from edgevlm.runtime.spec import TensorSpec, from_json, to_json

RANGE = ShapeRange(min=(1, 3, 224, 224), opt=(4, 3, 224, 224), max=(8, 3, 224, 224))
SETTINGS = BuildSettings(backend="tensorrt", shapes={"pixel_values": RANGE}, workspace_bytes=3 << 30)
CARD = EngineCard(
    version="10.3.0",
    compute_capabilities=("8.7",),
    graph_sha256="ab" * 32,
    settings=SETTINGS,
    inputs=(TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, 224, 224)),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 1000)),),
)


@pytest.mark.parametrize(
    ("shape", "is_held"),
    [((1, 3, 224, 224), True), ((8, 3, 224, 224), True), ((9, 3, 224, 224), False), ((3, 224, 224), False)],
)
def test_a_range_holds_what_lies_between_its_ends(shape, is_held):
    assert RANGE.holds(shape) is is_held


@pytest.mark.parametrize(
    "sizes",
    [{"min": (1, 3), "opt": (1,), "max": (1, 3)}, {"min": (2,), "opt": (1,), "max": (3,)}],
    ids=["other ranks", "falling"],
)
def test_a_range_that_is_none_is_refused(sizes):
    with pytest.raises(ValueError, match="sizes"):
        ShapeRange(**sizes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimization_level": 6},
        {"workspace_bytes": -1},
        {"compute_capabilities": ["sm_86"]},
        {"shapes": {"x": {"min": [0], "opt": [1], "max": [1]}}},
        {"fp16": True},
    ],
)
def test_settings_are_read_strictly(wrong):
    data = {"backend": "tensorrt", **wrong}
    with pytest.raises(msgspec.ValidationError):
        from_json(msgspec.json.encode(data), BuildSettings)


@pytest.mark.parametrize("sizes", [{}, {"min": (2,), "max": (1,)}, {"opt": (1, 3), "max": (8,)}])
def test_asked_for_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="sizes"):
        AskedRange(**sizes)


def test_settings_and_cards_write_back_to_the_same_text():
    assert from_json(to_json(SETTINGS), BuildSettings) == SETTINGS
    assert to_json(from_json(to_json(CARD), EngineCard)) == to_json(CARD)


# --- cards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "version", "gpu", "words"),
    [
        ("tensorrt", "10.3.0", "8.7", None),
        ("tensorrt", "10.3.0", None, None),
        ("tensorrt", "10.7.0", "8.7", "by tensorrt 10.3.0, and this is 10.7.0"),
        ("tensorrt-rtx", "10.3.0", "8.7", "for tensorrt, and this is tensorrt-rtx"),
        ("tensorrt", "10.3.0", "8.9", "for GPUs of compute capability 8.7, and this one has 8.9"),
    ],
)
def test_a_card_refuses_strangers(backend, version, gpu, words):
    refusal = CARD.refusal(backend, version, gpu)
    assert refusal is None if words is None else words in refusal


@pytest.mark.parametrize(("gpu", "is_taken"), [("8.0", True), ("12.0", True), ("7.5", False)])
def test_an_engine_for_ampere_and_newer_runs_there(gpu, is_taken):
    settings = msgspec.structs.replace(SETTINGS, hardware_compatibility="ampere+")
    card = msgspec.structs.replace(CARD, settings=settings)
    assert (card.refusal("tensorrt", "10.3.0", gpu) is None) is is_taken


def test_an_engine_is_known_by_version_gpu_graph_and_settings():
    others = [
        {"version": "10.3.1"},
        {"compute_capabilities": ("8.9",)},
        {"graph_sha256": "cd" * 32},
        {"settings": msgspec.structs.replace(SETTINGS, optimization_level=5)},
    ]
    keys = {CARD.key, *(msgspec.structs.replace(CARD, **other).key for other in others)}
    assert len(keys) == 5
    assert msgspec.structs.replace(CARD, outputs=()).key == CARD.key


def test_a_card_lies_beside_its_engine(tmp_path: Path):
    engine = tmp_path / "model.engine"
    assert write_card(engine, CARD) == card_file(engine) == tmp_path / "model.engine.json"
    assert read_card(engine) == CARD


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no 'model.engine.json'"),
        (b"{", "cannot be read"),
        (b"{}", "cannot be read"),
        (to_json(msgspec.structs.replace(CARD, schema_version=2)), "of version 2"),
    ],
)
def test_a_card_that_cannot_be_read_is_a_broken_bundle(text, words, tmp_path: Path):
    if text is not None:
        (tmp_path / "model.engine.json").write_bytes(text)
    with pytest.raises(BundleError, match=words) as caught:
        read_card(tmp_path / "model.engine")
    assert caught.value.hint


def test_a_graph_is_known_by_its_weights_too(tmp_path: Path):
    graph = tmp_path / "model.onnx"
    graph.write_bytes(b"graph")
    alone = graph_digest(graph)
    (tmp_path / "model.onnx.data").write_bytes(b"weights")
    assert graph_digest(graph) != alone


# --- the command line -------------------------------------------------------------------------------------


def test_the_lines_of_10_and_11_differ_by_the_flag_that_11_needs_no_more():
    old = trtexec_command("m.onnx", "m.engine", SETTINGS, major=10)
    new = trtexec_command("m.onnx", "m.engine", SETTINGS, major=11)
    assert set(old) - set(new) == {"--stronglyTyped"} and not set(new) - set(old)
    assert new == (
        "trtexec",
        "--onnx=m.onnx",
        "--saveEngine=m.engine",
        "--skipInference",
        "--profilingVerbosity=detailed",
        "--builderOptimizationLevel=3",
        "--memPoolSize=workspace:3072M",
        "--minShapes=pixel_values:1x3x224x224",
        "--optShapes=pixel_values:4x3x224x224",
        "--maxShapes=pixel_values:8x3x224x224",
    )
    # Removed in 11, and weakly typed in 10: precision is the graph's.
    assert not {"--fp16", "--int8", "--best", "--calib"} & {flag.partition("=")[0] for flag in (*old, *new)}


def test_names_are_quoted_for_trtexec_and_for_the_shell():
    settings = BuildSettings(
        backend="tensorrt", shapes={"in:0": RANGE, "ids": ShapeRange(min=(1,), opt=(1,), max=(2,))}
    )
    line = trtexec_line("my model.onnx", "m.engine", settings, major=11)
    assert "--onnx=my model.onnx" in shlex.split(line)
    assert "--maxShapes='in:0':8x3x224x224,ids:2" in shlex.split(line)


def test_compatibility_is_asked_for_by_trtexecs_own_word():
    settings = BuildSettings(backend="tensorrt", hardware_compatibility="same-compute-capability")
    assert "--hardwareCompatibilityLevel=sameComputeCapability" in trtexec_command("a", "b", settings, major=10)
    assert "--hardwareCompatibilityLevel" not in trtexec_line("a", "b", SETTINGS, major=10)


@pytest.mark.parametrize("major", [10, 11])
def test_the_script_runs_the_line_of_the_trtexec_that_it_finds(major, tmp_path: Path):
    fake = tmp_path / "bin" / "trtexec"
    fake.parent.mkdir()
    help_text = "  --stronglyTyped    Create a strongly typed network." if major == 10 else "  --onnx=<file>"
    fake.write_text(
        f'#!/bin/sh\nif [ "$1" = --help ]; then echo "{help_text}"; exit; fi\nprintf "%s\\n" trtexec "$@"\n'
    )
    fake.chmod(0o755)
    script = tmp_path / "build.sh"
    script.write_text(build_script("my model.onnx", "m.engine", SETTINGS))
    environment = {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
    ran = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=True, env=environment)
    wanted = trtexec_command("my model.onnx", "m.engine", SETTINGS, major=major)
    assert sorted(ran.stdout.splitlines()) == sorted(wanted)


def test_without_trtexec_the_script_says_so(tmp_path: Path):
    if Path("/usr/src/tensorrt/bin/trtexec").exists():
        pytest.skip("TensorRT is installed here")
    script = tmp_path / "build.sh"
    script.write_text(build_script("m.onnx", "m.engine", SETTINGS))
    environment = {"PATH": "/usr/bin:/bin"}
    ran = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 3 and "install TensorRT" in ran.stderr
