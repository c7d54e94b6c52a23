"""A corpus of hostile and broken bundles: each is refused with one sentence that names the file, and a hint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edgevlm.errors import BundleError, EdgeVLMError, MissingToolError
from edgevlm.runtime.bundle import check_path, check_requires, open_bundle, read_manifest, release
from edgevlm.runtime.machine import Machine, describe_machine
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import Requires, to_json
from edgevlm.runtime.verify import verify_bundle
from tests.runtime import tiny

BOTH = "zero-shot-image-classification/both towers"
FOLDED = "zero-shot-image-classification/folded"


def refused(path: Path, check: Callable[[Path], object] = open_bundle) -> BundleError:
    with pytest.raises(BundleError) as raised:
        check(path)
    assert raised.value.hint
    assert "\n" not in raised.value.message
    assert raised.value.exit_code == 1
    return raised.value


def edit(bundle: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def files_of(bundle: Path) -> list[str]:
    return sorted(str(file.relative_to(bundle)) for file in bundle.rglob("*") if file.is_file())


def test_a_whole_bundle_opens(bundle: Path):
    opened = open_bundle(bundle)
    assert {entry.path for entry in opened.manifest.files} | {"manifest.json"} == set(files_of(bundle))


@pytest.mark.parametrize("task", ["image-classification", FOLDED, BOTH])
@pytest.mark.parametrize("spoil", ["truncate", "empty", "flip", "grow", "delete"])
def test_each_file_spoilt_in_turn_is_named(tmp_path: Path, task: str, spoil: str):
    bundle = tiny.make_bundle(tmp_path / "bundle", task)
    for path in files_of(bundle):
        whole = (bundle / path).read_bytes()
        middle = len(whole) // 2
        spoilt = {
            "truncate": whole[:-1],
            "empty": b"",
            "flip": whole[:middle] + bytes([whole[middle] ^ 0x80]) + whole[middle + 1 :],
            "grow": whole + b"}",
            "delete": None,
        }[spoil]
        if spoilt is None:
            (bundle / path).unlink()
        else:
            (bundle / path).write_bytes(spoilt)
        if path == "manifest.json" and spoil == "truncate":
            spoilt = whole[:-3]  # the last byte is a line feed that nobody misses
            (bundle / path).write_bytes(spoilt)
        assert Path(path).name in refused(bundle, verify_bundle).message
        (bundle / path).write_bytes(whole)
    assert verify_bundle(bundle)


def test_loading_checks_what_it_opens(bundle: Path):
    graph = bundle / "components/model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    assert "'components/model.onnx' was changed" in refused(bundle, Pipeline.load).message


def test_a_file_that_no_backend_reads_is_refused(bundle: Path):
    junk = b"this is no graph"

    def change(manifest: dict) -> None:
        entry = next(e for e in manifest["files"] if e["path"] == "components/model.onnx")
        entry |= {"n_bytes": len(junk), "sha256": hashlib.sha256(junk).hexdigest()}

    edit(bundle, change)
    (bundle / "components/model.onnx").write_bytes(junk)
    assert "'model.onnx' is no ONNX graph" in refused(bundle, Pipeline.load).message


OUTSIDE = [
    "../../secret.data",
    "/etc/passwd",
    "components/../../secret.data",
    "./model.onnx",
    "model.onnx.data",
    "",
    "*/_ORT_MEM_ADDR_/*",
]  # the last is ONNX Runtime's own: the weights lie at an address in its memory


@pytest.mark.parametrize("location", OUTSIDE)
@pytest.mark.parametrize("name", ["model.onnx", "model.data", "model.xml"])
def test_a_graph_cannot_reach_out_of_the_bundle(tmp_path: Path, location: str, name: str):
    """Weights in an external file are looked for among the bundle's own, however the graph is called."""
    import onnx

    (tmp_path / "secret.data").write_bytes(bytes(36))
    model = onnx.load_from_string(tiny.image_graph())
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "36"}.items():
        weight.external_data.add(key=key, value=value)
    bundle = tiny.make_bundle(tmp_path / "bundle")
    data = model.SerializeToString()

    path = f"components/{name}"

    def change(manifest: dict) -> None:
        entry = next(e for e in manifest["files"] if e["path"] == "components/model.onnx")
        entry |= {"path": path, "n_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["components"][0] |= {"file": path, "files": [path]}

    edit(bundle, change)
    (bundle / "components/model.onnx").rename(bundle / path)
    (bundle / path).write_bytes(data)
    message = refused(bundle, Pipeline.load).message
    assert message == f"'{path}' has weights in {location!r}, which manifest.json does not list."
    assert refused(bundle, verify_bundle).message == message


def test_weights_beside_a_graph_are_checked_with_it(tmp_path: Path):
    """Even where the component does not count them among its files."""
    import onnx

    model = onnx.load_from_string(tiny.image_graph())
    weights = model.graph.initializer[0].raw_data
    onnx.external_data_helper.convert_model_to_external_data(model, location="model.onnx.data", size_threshold=0)
    onnx.save(model, tmp_path / "model.onnx")
    made = tiny.make_bundle(tmp_path / "bundle")
    files = {name: (tmp_path / name).read_bytes() for name in ("model.onnx", "model.onnx.data")}
    assert weights in files["model.onnx.data"]

    def change(manifest: dict) -> None:
        listed = [e for e in manifest["files"] if e["path"] != "components/model.onnx"]
        for name, data in files.items():
            (made / "components" / name).write_bytes(data)
            entry = {"path": f"components/{name}", "n_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            listed.append(entry)
        manifest["files"] = listed

    edit(made, change)
    assert verify_bundle(made)
    (made / "components/model.onnx.data").write_bytes(bytes(len(files["model.onnx.data"])))
    assert "'components/model.onnx.data' was changed" in refused(made, Pipeline.load).message


def test_a_file_too_many_is_refused(bundle: Path):
    for path in ("extra.txt", "components/run.py", ".hidden"):
        (bundle / path).write_text("x")
        assert f"'{path}' is not listed" in refused(bundle).message
        (bundle / path).unlink()


@pytest.mark.parametrize(
    "name", [".DS_Store", "Thumbs.db", "._manifest.json", "components/._model.onnx", "desktop.ini"]
)
def test_what_file_managers_leave_is_ignored(bundle: Path, name: str):
    (bundle / name).write_text("x")
    assert verify_bundle(bundle)


@pytest.mark.parametrize("path", ["components/model.onnx", "manifest.json"])
def test_a_symbolic_link_is_refused(bundle: Path, tmp_path: Path, path: str):
    (tmp_path / "elsewhere").write_bytes((bundle / path).read_bytes())
    (bundle / path).unlink()
    (bundle / path).symlink_to(tmp_path / "elsewhere")
    refused(bundle)


def test_a_linked_folder_is_refused(bundle: Path, tmp_path: Path):
    (bundle / "components").rename(tmp_path / "components")
    (bundle / "components").symlink_to(tmp_path / "components")
    assert "'components' is a symbolic link" in refused(bundle).message


def test_a_pipe_is_refused_without_reading_it(bundle: Path):
    (bundle / "components/model.onnx").unlink()
    os.mkfifo(bundle / "components/model.onnx")
    assert "'components/model.onnx'" in refused(bundle).message


HOSTILE_PATHS = [
    "/etc/passwd",
    "../outside.txt",
    "a/../../outside.txt",
    "a/./b.txt",
    "a//b.txt",
    "./a.txt",
    "a/",
    "",
    ".",
    "..",
    "a\\b.txt",
    "..\\outside.txt",
    "C:/x.txt",
    "c:x.txt",
    "a.txt:stream.txt",
    "a\0.txt",
    "a\n.txt",
    "a\u202e.txt",
    "trailing.txt.",
    "trailing.txt ",
    "dir /a.txt",
    "what?.txt",
    "x" * 300 + ".txt",
]
FORBIDDEN_KINDS = [
    "run.py",
    "lib.so",
    "lib.so.1",
    "x.dll",
    "model.pt",
    "model.pkl",
    "weights.bin.exe",
    "hook.sh",
    "program",
    ".DS_Store",
    "._a.txt",
    "manifest.json",
    "MANIFEST.JSON",
]


@pytest.mark.parametrize("path", HOSTILE_PATHS + FORBIDDEN_KINDS)
def test_a_hostile_path_is_refused(bundle: Path, path: str):
    with pytest.raises(BundleError):
        check_path(path)
    edit(bundle, lambda m: m["files"].append({"path": path, "sha256": "0" * 64, "n_bytes": 1}))
    assert "breaks the bundle format" in refused(bundle).message


MANIFEST_CHANGES: dict[str, tuple[Callable[[dict], object], str]] = {
    "newer schema": (lambda m: m.update(schema_version=2), "schema version 2"),
    "newer schema with new fields": (lambda m: m.update(schema_version=7, shiny=1), "schema version 7"),
    "older schema": (lambda m: m.update(schema_version=0), "schema version is 0"),
    "no schema": (lambda m: m.pop("schema_version"), "schema_version"),
    "unknown field": (lambda m: m.update(hook="rm -rf"), "hook"),
    "missing field": (lambda m: m.pop("labels"), "labels"),
    "wrong type": (lambda m: m.update(labels="cat"), "labels"),
    "unknown task": (lambda m: m.update(task="mind-reading"), "mind-reading"),
    "no component": (lambda m: m.update(components=[]), "needs the component 'model'"),
    "component twice": (lambda m: m["components"].append(m["components"][0]), "same name"),
    "unknown backend": (lambda m: m["components"][0].update(backend="os:system"), "os:system"),
    "unlisted graph": (lambda m: m["components"][0].update(file="components/b.onnx"), "components/b.onnx"),
    "graph out of bounds": (lambda m: m["components"][0].update(files=["../b.onnx"]), "../b.onnx"),
    "negative threads": (lambda m: m["components"][0]["session"].update(n_threads=-3), "-3 threads"),
    "other input": (lambda m: m["processing"]["image"].update(input_name="x"), "fed x"),
    "newer processing": (lambda m: m["processing"]["image"].update(version=9), "version 9"),
    "unknown step": (lambda m: m["processing"]["image"]["steps"].append({"op": "eval"}), "eval"),
    "size": (lambda m: m["processing"]["image"].update(height=9), "not 9 × 8"),
    "listed twice": (lambda m: m["files"].append(m["files"][0]), "same file"),
    "listed twice but for case": (
        lambda m: m["files"].append({**m["files"][1], "path": m["files"][1]["path"].upper().replace(".JSON", ".json")}),
        "same file",
    ),
    "short hash": (lambda m: m["files"][0].update(sha256="abc"), "sha256"),
    "negative size": (lambda m: m["files"][0].update(n_bytes=-1), "-1 bytes"),
    "huge size": (lambda m: m["files"][0].update(n_bytes=1 << 60), "truncated"),
    "unlisted golden": (lambda m: m["golden"]["cases"][0].update(answer="golden/none.json"), "golden/none.json"),
}


@pytest.mark.parametrize("name", MANIFEST_CHANGES)
def test_a_hostile_manifest_is_refused(bundle: Path, name: str):
    change, words = MANIFEST_CHANGES[name]
    edit(bundle, change)
    assert words in refused(bundle).message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"schema_version": 1}',
        b"[" * 100_000,
        b'{"schema_version": 1e999}',
        b"\0" * 99,
    ],
)
def test_a_manifest_that_is_none_is_refused(bundle: Path, data: bytes):
    (bundle / "manifest.json").write_bytes(data)
    assert "manifest.json" in refused(bundle).message


def test_a_huge_manifest_is_refused_before_it_is_read(bundle: Path):
    with (bundle / "manifest.json").open("r+b") as opened:
        opened.truncate(1 << 40)
    assert "more than 16 MiB" in refused(bundle).message


def test_a_deep_manifest_is_refused(bundle: Path):
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(
        text.replace('"recipe": {}', '"recipe": {"a": ' + "[" * 10**5 + "]" * 10**5 + "}")
    )
    refused(bundle)


def test_pickles_are_never_loaded(tmp_path: Path):
    import pickle

    for path, check in {
        "processing/labels.npy": lambda p: Pipeline.load(p)(tiny.picture()),
        "golden/0.image_embeds.npy": verify_bundle,
    }.items():
        bundle = tiny.make_bundle(tmp_path / path.replace("/", "-"), FOLDED)
        data = pickle.dumps({"cmd": print})

        def change(manifest: dict, path: str = path, data: bytes = data) -> None:
            entry = next(e for e in manifest["files"] if e["path"] == path)
            entry |= {"n_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        edit(bundle, change)
        (bundle / path).write_bytes(data)
        assert f"'{path}' is not a numpy array" in refused(bundle, check).message


def test_what_is_no_bundle_is_refused(tmp_path: Path):
    assert "There is no bundle" in refused(tmp_path / "absent").message
    assert "has no manifest.json" in refused(tmp_path).message


def test_a_zero_shot_bundle_without_any_text_is_refused(tmp_path: Path):
    bundle = tiny.make_bundle(tmp_path / "bundle", FOLDED)
    edit(bundle, lambda m: m["scoring"].update(label_embeddings=None))
    assert "neither" in refused(bundle).message
    edit(bundle, lambda m: m.update(scoring=None))
    assert "needs its scoring" in refused(bundle).message


def test_a_bundle_measured_elsewhere_warns(bundle: Path):
    assert open_bundle(bundle).warnings() == ()
    numbers = dict.fromkeys(("p50_ms", "p90_ms", "p99_ms", "n", "n_threads", "batch"), 1)
    latency = numbers | dict.fromkeys(("ratio", "ratio_low", "ratio_high"))
    edit(bundle, lambda m: m.update(latency={**latency, "machine": "A board"}))
    assert "was measured on A board" in open_bundle(bundle).warnings()[0]
    edit(bundle, lambda m: m.update(latency={**latency, "machine": describe_machine().name}))
    assert open_bundle(bundle).warnings() == ()


# --- requirements -----------------------------------------------------------------------------------------

HERE = Machine(
    arch="x86-64",
    isa=("avx2", "avx512_vnni"),
    is_isa_known=True,
    cpu="Test CPU",
    board="",
    n_physical_cores=2,
    n_logical_cores=4,
    memory_bytes=1 << 30,
    os="Linux",
)


@pytest.mark.parametrize(
    ("requires", "words"),
    [
        (Requires(arch="aarch64"), "is for aarch64, but this machine is x86-64"),
        (Requires(isa=("avx2", "amx_int8")), "needs amx_int8, which Test CPU does not have"),
        (Requires(backends={"onnxruntime": "999.1"}), "needs onnxruntime 999.1 or newer"),
    ],
)
def test_a_machine_that_cannot_run_it_is_told_why(requires: Requires, words: str):
    manifest, _ = tiny.parts("image-classification")
    with pytest.raises(MissingToolError) as raised:
        check_requires(msgspec.structs.replace(manifest, requires=requires), HERE)
    assert words in raised.value.message
    assert raised.value.hint
    assert raised.value.exit_code == 3


def test_a_backend_that_is_not_installed_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edgevlm.runtime.backends.onnxruntime.OnnxRuntime.version", lambda self: None)
    with pytest.raises(MissingToolError, match="onnxruntime, which is not installed") as raised:
        Pipeline.load(bundle)
    assert "pip install onnxruntime" in raised.value.hint


def test_a_machine_that_has_it_all_may_run_it():
    manifest, _ = tiny.parts("image-classification")
    requires = Requires(arch="x86-64", isa=("avx2",), backends={"onnxruntime": "1.17"})
    check_requires(msgspec.structs.replace(manifest, requires=requires), HERE)


def test_an_unknown_instruction_set_refuses_nothing():
    manifest, _ = tiny.parts("image-classification")
    silent = msgspec.structs.replace(HERE, isa=(), is_isa_known=False)
    check_requires(msgspec.structs.replace(manifest, requires=Requires(isa=("amx_int8",))), silent)


@pytest.mark.parametrize(("older", "newer"), [("1.9", "1.10"), ("1.32", "1.32.0"), ("1.32.0rc1", "1.32.1"), ("", "0")])
def test_versions_compare_by_number(older: str, newer: str):
    assert release(older) < release(newer)


def test_a_manifest_reads_back(bundle: Path):
    manifest = read_manifest((bundle / "manifest.json").read_bytes())
    assert read_manifest(to_json(manifest)) == manifest


def test_every_refusal_is_ours(bundle: Path):
    """A flipped byte anywhere in the manifest gives our error or a manifest that keeps the rules."""
    whole = (bundle / "manifest.json").read_bytes()
    for i in range(0, len(whole), 7):
        spoilt = whole[:i] + bytes([whole[i] ^ (1 + i % 255)]) + whole[i + 1 :]
        try:
            read_manifest(spoilt)
        except EdgeVLMError as error:
            assert error.hint


# --- texts ------------------------------------------------------------------------------------------------


def test_a_bundle_from_before_texts_had_their_own_length(tmp_path: Path):
    bundle = tiny.make_bundle(tmp_path / "old", "zero-shot-image-classification")
    answer = Pipeline.load(bundle)(tiny.picture(), labels=("red", "blue"))

    def change(manifest: dict) -> None:
        text = manifest["processing"]["text"]
        del text["padding"]
        text["version"] = 1

    edit(bundle, change)
    assert open_bundle(bundle).manifest.processing.text == msgspec.structs.replace(tiny.TEXT, version=1)
    assert Pipeline.load(bundle)(tiny.picture(), labels=("red", "blue")) == answer


def test_unpadded_texts_for_a_graph_of_fixed_length_are_refused(tmp_path: Path):
    bundle = tiny.make_bundle(tmp_path / "bundle", "zero-shot-image-classification")
    edit(bundle, lambda manifest: manifest["processing"]["text"].update(padding="longest"))
    assert "'text_encoder' takes texts of one length" in refused(bundle).message


def test_unpadded_texts_for_a_graph_of_free_length(tmp_path: Path):
    padded = tiny.make_bundle(tmp_path / "padded", "zero-shot-image-classification")
    own = tiny.make_bundle(tmp_path / "own", "zero-shot-image-classification", length="sequence")
    assert open_bundle(own).manifest.processing.text == msgspec.structs.replace(tiny.TEXT, padding="longest")
    assert verify_bundle(own)
    answers = [Pipeline.load(each)(tiny.picture(), labels=("red", "a blue")) for each in (padded, own)]
    assert answers[0] == answers[1]
