"""Bundles on emulated ARM processors: the same answers as where they were made, by other kernels.

The emulator lies in the user's own cache, so that only the first run on a machine fetches it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

import edgevlm
from edgevlm.bundle.write import write_bundle
from edgevlm.cli.main import exit_code_of
from edgevlm.data import shapes
from edgevlm.devices import open_device
from edgevlm.devices.emulated import verify_emulated
from edgevlm.devices.emulator import prepare_counting_qemu
from edgevlm.devices.instructions import Instructions, count_instructions
from edgevlm.errors import EdgeVLMError, MissingToolError
from edgevlm.progress import silent
from edgevlm.runtime.bundle import Bundle, named_files, open_bundle
from edgevlm.runtime.cache import cache_root
from edgevlm.runtime.spec import Component, Manifest, to_json
from edgevlm.target import read_target, target_names
from tests.absent import absent
from tests.conftest import ASSETS
from tests.fast import FAST

pytestmark = pytest.mark.slow

CPUS = ("cortex-a53", "cortex-a76")
BOARD_CPUS = sorted({cpu for name in target_names() if (cpu := read_target(name).emulated_as)})

# Float kernels of another processor add in another order. Measured: 7.4e-7 of the largest output for the demo model,
# 1.1e-6 for MobileNetV2. int8 kernels add integers, in any order to the same sum.
FLOAT_BOUND = 1e-5


@pytest.fixture(scope="module")
def counting(emulator):
    try:
        return prepare_counting_qemu(silent)
    except MissingToolError as error:
        absent("emulator", error.message)


def write_part(whole: Bundle, manifest: Manifest, out: Path) -> Path:
    """A bundle of what ``manifest`` names of another bundle's files."""
    files = {path: whole.file(path) for path in named_files(manifest)}
    write_bundle(out, msgspec.structs.replace(manifest, files=()), files)
    return out


@pytest.fixture(scope="module")
def board(tmp_path_factory) -> Path:
    """The built-in model for a Raspberry Pi 5, in all forms that a board chooses from."""
    pytest.importorskip("openvino", reason="makes half of the forms")
    folder = tmp_path_factory.mktemp("board")
    shapes.write_folder(folder / "pictures", n=60, seed=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(folder / "cache"))
        compiled = edgevlm.compile(
            "demo", target="raspberry-pi-5", eval_data=folder / "pictures", max_drop=0.5,
            **{**FAST, "backends": ("onnxruntime", "openvino")}, output=folder / "out",
        )  # fmt: skip
    return Path(compiled.bundle)


@pytest.fixture(scope="module")
def bundles(board, tmp_path_factory) -> dict[str, Path]:
    """The built-in model in float, and in int8 with either sign of activations: unsigned as x86 multiplies them."""
    folder = tmp_path_factory.mktemp("demo")
    shapes.write_folder(folder / "pictures", n=60, seed=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(folder / "cache"))
        compiled = edgevlm.compile(
            "demo", eval_data=folder / "pictures", precision="int8-static", max_drop=0.5, **FAST, output=folder / "u8s8"
        )
    whole = open_bundle(board)
    signed = next(form for form in whole.manifest.forms if form.name.startswith("int8-static"))
    forms = {"fp32": whole.manifest.forms[0], "s8s8": signed}
    taken = {name: write_part(whole, whole.in_form(form).manifest, folder / name) for name, form in forms.items()}
    return {"u8s8": Path(compiled.bundle), **taken}


@pytest.fixture(scope="module")
def counted(counting, bundles) -> Callable[[str, str], Instructions]:
    """Counts of a bundle, by its name, on a processor; each is taken once."""
    return functools.cache(lambda name, cpu: count_instructions(bundles[name], cpu))


def activation_types(bundle: Path, components: Sequence[Component] = ()) -> set[str]:
    """The types that QuantizeLinear gives in a bundle's graphs, or in those of one of its forms."""
    import onnx

    found = set()
    for part in components or open_bundle(bundle).manifest.components:
        graph = onnx.load(bundle / part.file).graph
        constants = {each.name: each.data_type for each in graph.initializer}
        types = {constants[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}
        found |= {onnx.TensorProto.DataType.Name(kind) for kind in types}
    return found


def test_the_bundles_are_what_they_are_called(bundles):
    assert activation_types(bundles["fp32"]) == set()
    assert activation_types(bundles["u8s8"]) == {"UINT8"}
    assert activation_types(bundles["s8s8"]) == {"INT8"}


@pytest.mark.parametrize("cpu", CPUS)
def test_the_answers_are_those_of_the_machine_that_made_the_bundle(cpu, emulator, bundles):
    """Of a bundle for x86; those for boards are below."""
    found = verify_emulated(bundles["u8s8"], cpu)
    assert found, found.to_text()
    assert len(found.verification.cases) == 3 and not found.verification.is_same_machine
    for case in found.verification.cases:
        assert case.is_same_answer
        assert case.max_error == 0 or found.note, found.to_text()  # made without VNNI: said so


def test_an_answer_runs_from_the_raw_picture(emulator, bundles):
    picture = bundles["u8s8"] / "golden/0.png"
    with open_device("emulated://cortex-a53") as device:
        there = json.loads(device.run("run", bundles["u8s8"], [str(picture)]))
    here = edgevlm.run(bundles["u8s8"], picture)
    assert there["classes"][0]["label"] == here.top.label


@pytest.mark.parametrize("has_new_hash", [False, True])
def test_a_changed_golden_vector_fails(has_new_hash, emulator, bundles, tmp_path, capsys):
    changed = tmp_path / "changed"
    shutil.copytree(bundles["u8s8"], changed)
    manifest = open_bundle(changed).manifest
    path = next(iter(manifest.golden.cases[1].outputs.values()))
    array = np.load(changed / path)
    array.ravel()[3] += 0.2 * np.abs(array).max()
    written = io.BytesIO()
    np.save(written, array)
    (changed / path).write_bytes(written.getvalue())
    if not has_new_hash:
        with pytest.raises(EdgeVLMError, match="was changed: its sha256 is"):
            verify_emulated(changed, "cortex-a53")
        return
    sha256 = hashlib.sha256(written.getvalue()).hexdigest()
    files = tuple(
        msgspec.structs.replace(entry, sha256=sha256) if entry.path == path else entry for entry in manifest.files
    )
    (changed / "manifest.json").write_bytes(to_json(msgspec.structs.replace(manifest, files=files)))
    assert exit_code_of(["verify", str(changed), "--emulate", "cortex-a53"]) == 1
    shown = capsys.readouterr().out
    assert "'golden/1.png' is off by" in shown and "as it should" not in shown


@pytest.mark.parametrize("name", ["u8s8", "s8s8"])
def test_int8_runs_on_dot_products_where_there_are_any(name, counted):
    (old,), (new,) = (counted(name, cpu).graphs for cpu in CPUS)
    assert old.by_class["int8 dot product"] == 0 < new.by_class["int8 dot product"]
    assert old.by_class["integer SIMD multiply"] > new.by_class["integer SIMD multiply"]
    assert new.n_instructions < old.n_instructions


def test_float_runs_on_multiply_adds_and_on_no_dot_products(counted):
    (graph,) = counted("fp32", "cortex-a76").graphs
    assert graph.by_class["int8 dot product"] == 0
    assert graph.by_class["float32 multiply-add"] > graph.n_instructions / 3


def test_a_compile_counts_what_it_ships(counting, emulator, board, counted, tmp_path, monkeypatch):
    cache = board.parent / "cache"
    (cache / "emulators").symlink_to(cache_root() / "emulators")
    monkeypatch.setenv("EDGEVLM_CACHE", str(cache))
    compiled = edgevlm.compile(
        "demo", target="raspberry-pi-5", eval_data=board.parent / "pictures", max_drop=0.5, count_instructions=True,
        **{**FAST, "backends": ("onnxruntime", "openvino")}, output=tmp_path / "out",
    )  # fmt: skip
    assert [step.name for step in compiled.report.steps if not step.hit] == ["count"]
    found = compiled.report.instructions
    assert found is not None
    forms = {graph.form: graph for graph in found.graphs}
    assert {*forms, *found.left_out} == {form.name for form in compiled.manifest.forms}
    assert all(name.startswith("openvino") for name in found.left_out)
    signed = next(graph for name, graph in forms.items() if name.startswith("int8-static"))
    (alone,) = counted("s8s8", "cortex-a76").graphs
    assert signed.by_class["int8 dot product"] == alone.by_class["int8 dot product"]
    assert signed.n_instructions == pytest.approx(alone.n_instructions, rel=0.005)  # the emulator lies elsewhere here


def test_counts_are_the_same_each_time_wherever_they_are_taken(counted, bundles, tmp_path, monkeypatch):
    first = counted("u8s8", "cortex-a76")
    moved = tmp_path / "a-longer-path" / "bundle"
    shutil.copytree(bundles["u8s8"], moved)
    monkeypatch.setenv("EDGEVLM_CACHE", str(cache_root()))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("EDGEVLM_UNHEARD_OF", "1")
    monkeypatch.chdir(tmp_path)
    assert count_instructions(moved, "cortex-a76") == first
    assert sum(first.graphs[0].by_class.values()) == first.graphs[0].n_instructions


# --- bundles for boards, of several forms ----------------------------------------------------------------

# Measured, the worst of three pictures: 7.4e-7, 1.4e-3, 7.9e-7, 6.0e-7, 4.2e-2, 2.5e-3. What lies between int8 layers
# is float, scales that are found in the run are found from it, and OpenVINO's int8 kernels round elsewhere than on x86.
BOARD_BOUNDS = {
    "fp32": 1e-5, "int8-static": 0.01, "int8-dynamic": 0.01, "openvino-fp32": 1e-5, "openvino-int8": 0.1,
    "openvino-int8-dynamic": 0.01,
}  # fmt: skip
# OpenVINO 2026.4 does not open a MobileViT in int8 on a processor without dot products.
REFUSED = {"cortex-a53": {"openvino-int8"}}


@pytest.fixture(scope="module")
def without_openvino(board, tmp_path_factory) -> Path:
    whole = open_bundle(board)
    forms = tuple(form for form in whole.manifest.forms if not form.name.startswith("openvino"))
    manifest = msgspec.structs.replace(whole.manifest, forms=forms)
    return write_part(whole, manifest, tmp_path_factory.mktemp("board") / "onnxruntime")


@pytest.mark.parametrize("cpu", BOARD_CPUS)
def test_every_form_answers_on_every_processor_of_the_targets(cpu, emulator, board, without_openvino):
    """OpenVINO's forms, which take longest, on the two that docs/arm.md names for them."""
    has_openvino = cpu in CPUS
    bounds = {kind: bound for kind, bound in BOARD_BOUNDS.items() if has_openvino or not kind.startswith("openvino")}
    found = verify_emulated(board if has_openvino else without_openvino, cpu)
    assert found, found.to_text()
    assert found.verification.left_out.keys() == REFUSED.get(cpu, set()) and not found.verification.is_same_machine
    kinds = set()
    for case in found.verification.cases:
        kind = max((each for each in bounds if (case.form or "fp32").startswith(each)), key=len)
        kinds.add(kind)
        assert case.max_error <= bounds[kind] or found.note, found.to_text()
    assert kinds == bounds.keys() - REFUSED.get(cpu, set())


def test_what_a_form_may_be_off_follows_from_how_far_quantizing_moved_it(board):
    first, *others = open_bundle(board).manifest.forms
    of_float = [np.load(board / case.outputs["image_embeds"]) for case in first.golden.cases]
    for form in others:
        outputs = [np.load(board / case.outputs["image_embeds"]) for case in form.golden.cases]
        moved = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(outputs, of_float, strict=True))
        least = 1e-4 if form.name == "openvino-fp32" else 0.03
        assert form.golden.tolerance == pytest.approx(max(least, moved / 2), abs=1e-3), form.name
    assert max(form.golden.tolerance for form in others) > 0.1


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """CLIP ViT-B/32's image tower at its real size with random weights: float and S8S8, one golden picture each."""
    torch = pytest.importorskip("torch", reason="makes the model")
    transformers = pytest.importorskip("transformers", reason="makes the model")
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig())
    assert sum(each.numel() for each in model.parameters()) > 87e6
    model.save_pretrained(folder / "model")
    transformers.CLIPImageProcessor().save_pretrained(folder / "model")
    shapes.write_folder(folder / "pictures", n=20, seed=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(folder / "cache"))
        compiled = edgevlm.compile(
            str(folder / "model"), target="raspberry-pi-5", precision="int8-static", eval_data=folder / "pictures",
            max_drop=1.0, **FAST, output=folder / "whole",
        )  # fmt: skip
    shutil.rmtree(folder / "cache")  # some gigabytes
    whole = open_bundle(compiled.bundle)
    forms = tuple(
        msgspec.structs.replace(form, golden=msgspec.structs.replace(form.golden, cases=form.golden.cases[:1]))
        for form in whole.manifest.forms[:2]
    )
    manifest = msgspec.structs.replace(whole.manifest, golden=forms[0].golden, forms=forms)
    write_part(whole, manifest, folder / "small")
    shutil.rmtree(compiled.bundle)
    return folder / "small"


def test_a_clip_answers_as_where_it_was_made(emulator, clip):
    """int8 codes are no more the same everywhere: what lies between them (softmax, norms) is float."""
    float_form, int8_form = open_bundle(clip).manifest.forms
    assert (clip / float_form.components[0].file).stat().st_size > 350e6
    assert activation_types(clip, int8_form.components) == {"INT8"}
    found = verify_emulated(clip, "cortex-a76")
    assert found, found.to_text()
    of_float, of_int8 = found.verification.cases
    assert of_float.is_same_answer and of_float.max_error <= FLOAT_BOUND, found.to_text()
    # Measured: 1.9e-2. Random weights make it the hardest case: nothing in the picture stands out.
    assert of_int8.is_same_answer and of_int8.max_error <= 0.03, found.to_text()


@pytest.mark.parametrize("cpu", CPUS)
def test_mobilenet_answers_the_same(cpu, emulator, mobilenet):
    found = verify_emulated(mobilenet, cpu)
    assert found, found.to_text()
    # Trained weights: the same bytes. Of random ones a shortcut's sum, added in float, falls so near half a code that
    # it is rounded the other way, and convolutions spread that. Measured: 3.0e-3.
    bound = 0.0 if ASSETS.is_dir() else 0.01
    assert all(case.max_error <= bound for case in found.verification.cases) or found.note, found.to_text()


@pytest.fixture(scope="module")
def mobilenet(mobilenet_and_pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    model, pictures = mobilenet_and_pictures
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(folder / "cache"))
        compiled = edgevlm.compile(
            str(model), eval_data=pictures, precision="int8-static", max_drop=0.5, **FAST, output=folder / "out",
        )  # fmt: skip
    return Path(compiled.bundle)
