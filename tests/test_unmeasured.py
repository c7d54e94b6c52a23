"""Targets that are not at hand: several forms in a bundle, none of them timed, and the device chooses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import onnx
import pytest

import edgevlm
from edgevlm.cli.main import exit_code_of
from edgevlm.compile_each import CompiledEach, compile_each
from edgevlm.compiler import prepare
from edgevlm.data import shapes
from edgevlm.errors import BundleError, GateError, MissingToolError, RefusedGraphError, StoreError, UsageError
from edgevlm.measure.counts import CLASSES, GraphInstructions, Instructions
from edgevlm.measure.protocol import QUICK
from edgevlm.report.spec import Report
from edgevlm.runtime.bundle import open_bundle
from edgevlm.runtime.machine import EMULATED, describe_machine
from edgevlm.runtime.spec import from_json
from edgevlm.steps import count as count_step
from edgevlm.tuning import Tuned, tune
from tests.fast import FAST

OLD_BOARD = """
name = "old-board"
description = "A board with an old runtime"
arch = "aarch64"
isa = ["asimd"]
n_cores = 1
backends = ["onnxruntime"]
precisions = ["fp32", "int8", "int4"]
activation_sign = "s8"
onnx_ir = 9

[runtimes]
onnxruntime = "1.15"
"""

pytestmark = pytest.mark.skipif(describe_machine().arch == "aarch64", reason="the boards would be at hand")


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
def both(tmp_path_factory, pictures) -> CompiledEach:
    folder = tmp_path_factory.mktemp("both")
    (folder / "old-board.toml").write_text(OLD_BOARD)
    targets = ["raspberry-pi-5", str(folder / "old-board.toml")]
    # One point of 54 pictures is half a picture: one may differ.
    # A dot in its name does not make it a file.
    return compile_each("demo", targets, eval_data=pictures, max_drop=0.04, **FAST, output=folder / "out-1.0")


@pytest.fixture(scope="module")
def board(both) -> Path:
    return both.folder / "raspberry-pi-5"


@pytest.fixture(scope="module")
def tuned(board, tmp_path_factory) -> Tuned:
    return tune(board, output=tmp_path_factory.mktemp("tuned") / "bundle", protocol=QUICK)


# --- the bundle -------------------------------------------------------------------------------------------


def test_float_comes_first_and_nothing_is_claimed_of_its_speed(board):
    manifest = edgevlm.inspect(board)
    assert manifest.selection == "unmeasured"
    assert "aarch64" in manifest.selection_reason
    assert manifest.latency is None
    names = [form.name for form in manifest.forms]
    assert names[0] == "fp32"
    assert any(name.startswith("int8-static") for name in names)
    assert manifest.components == manifest.forms[0].components
    report = from_json((board / "report" / "report.json").read_bytes(), Report)
    assert report.comparisons == ()
    assert all(row.p50_ms is None for row in report.candidates)
    assert "not timed" not in (board / "report" / "report.html").read_text()
    assert all("nothing was timed" in " ".join(form.unproven) for form in report.forms)


def test_a_static_form_multiplies_signed_by_signed_as_arm_does(board):
    manifest = edgevlm.inspect(board)
    form = next(each for each in manifest.forms if each.name.startswith("int8-static"))
    graph = onnx.load(board / form.components[0].file).graph
    points = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"}
    types = {tensor.data_type for tensor in graph.initializer if tensor.name in points}
    assert types == {onnx.TensorProto.INT8}


def test_every_form_verifies_and_one_that_was_changed_does_not(board, tmp_path):
    found = edgevlm.verify(board)
    assert found
    assert {case.form for case in found.cases} == {"", *(f.name for f in edgevlm.inspect(board).forms[1:])}
    broken = Path(shutil.copytree(board, tmp_path / "broken"))
    form = edgevlm.inspect(board).forms[1]
    (broken / form.components[0].file).write_bytes(b"no graph")
    with pytest.raises(BundleError):
        edgevlm.verify(broken)


def test_a_form_that_its_backend_refuses_here_leaves_the_others(board, monkeypatch):
    """Not a broken file, whose hash would tell: a graph that this processor has no kernels for."""
    import onnxruntime

    session, refused = onnxruntime.InferenceSession, edgevlm.inspect(board).forms[1]

    def open_others(file, *arguments, **options):
        if Path(file) == board / refused.components[0].file:
            raise RuntimeError("no kernel")
        return session(file, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_others)
    found = edgevlm.verify(board)
    assert found and found.left_out.keys() == {refused.name}
    assert "no kernel" in found.left_out[refused.name]
    assert refused.name not in {case.form for case in found.cases}
    refused = edgevlm.inspect(board).forms[0]
    with pytest.raises(RefusedGraphError, match="no kernel"):
        edgevlm.verify(board)


def test_instructions_are_counted_once_and_stand_in_the_report(board, pictures, tmp_path, monkeypatch):
    """Which processor counts, and how, is tried where there is an emulator."""
    asked = []

    def count(path, cpu, *, progress):
        asked.append(cpu)
        by_class = {**dict.fromkeys(CLASSES, 0), "int8 dot product": 17_600_000}
        graphs = tuple(
            GraphInstructions(
                form=form.name, graph="image_encoder", precision="fp32", n_instructions=17_600_000, by_class=by_class
            )
            for form in open_bundle(path).manifest.forms
        )
        return Instructions(name="demo", cpu=cpu, tools={"onnxruntime": "1.32.0"}, graphs=graphs)

    monkeypatch.setattr(count_step, "count_instructions", count)
    for name in ("first", "second"):
        compiled = edgevlm.compile(
            "demo", target="raspberry-pi-5", eval_data=pictures, max_drop=0.04, **FAST, count_instructions=True,
            output=tmp_path / name,
        )  # fmt: skip
    assert asked == ["cortex-a76"]
    assert all(step.hit for step in compiled.report.steps)
    assert "--count-instructions" in compiled.report.reproduce
    counted = compiled.report.instructions
    assert counted is not None
    assert [graph.form for graph in counted.graphs] == [form.name for form in edgevlm.inspect(board).forms]
    for suffix in ("md", "html"):
        shown = (tmp_path / "second" / "report" / f"report.{suffix}").read_text()
        assert "17.6" in shown and "no times" in shown
    assert edgevlm.verify(tmp_path / "second")


def test_instructions_that_cannot_be_counted_are_said_to_be_so(pictures, tmp_path, monkeypatch):
    asked = {"eval_data": pictures, "count_instructions": True, "output": tmp_path / "out"}
    job = prepare("demo", target="arm64-android", **asked)
    assert "No instructions were counted for arm64-android: cortex-a710 is emulated, but not counted." in job.notes
    assert "count" not in {step.name for step in job.steps}
    assert any(
        "x86-64-avx2: it is not emulated" in note for note in prepare("demo", target="x86-64-avx2", **asked).notes
    )
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(MissingToolError, match="needs no-such-compiler"):
        prepare("demo", target="raspberry-pi-5", **asked)


def test_an_old_runtime_gets_only_what_it_reads(both):
    manifest = edgevlm.inspect(both.folder / "old-board")
    assert manifest.requires.onnx_ir == 9
    assert manifest.requires.backends == {"onnxruntime": "1.15"}
    assert all(form.requires.onnx_ir == 9 for form in manifest.forms)


def test_both_come_from_one_export(both):
    report = both.outcomes[1].report
    assert report is not None
    exports = [step for step in report.steps if step.name.startswith("export:")]
    assert exports
    assert all(step.hit for step in exports)


def test_the_overview_says_what_was_verified_and_what_was_not(both):
    rows = {row["target"]: row for row in json.loads((both.folder / "targets.json").read_text())["targets"]}
    assert set(rows) == {"raspberry-pi-5", "old-board"}
    assert "unmeasured" in rows["raspberry-pi-5"]["status"]
    assert "golden vectors" in rows["raspberry-pi-5"]["verified"]
    assert "nothing was timed" in rows["old-board"]["unproven"]
    page = (both.folder / "targets.html").read_text()
    assert 'href="raspberry-pi-5/report/report.html"' in page


@pytest.mark.parametrize("precision", ["int8", "auto"])
def test_a_target_that_fails_leaves_the_others(precision, pictures, tmp_path):
    (tmp_path / "tiny-board.toml").write_text(OLD_BOARD.replace("old-board", "tiny-board").replace('"1.15"', '"1.2"'))
    asked = {**FAST, "precision": precision, "eval_data": pictures, "max_drop": 0.04}
    done = compile_each("demo", [str(tmp_path / "tiny-board.toml"), "raspberry-pi-3"], output=tmp_path / "out", **asked)
    assert [outcome.exit_code for outcome in done.outcomes] == [GateError.exit_code, 0]
    assert "1.2" in done.overview.targets[0].verified
    assert (tmp_path / "out" / "raspberry-pi-3" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("targets", "words"),
    [(["raspberry-pi-5", "raspberry-pi-5"], "named twice"), (["raspberry-pi-5", "raspberry-pie"], "no target")],
)
def test_wrong_targets_are_refused_before_any_work(targets, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        compile_each("demo", targets, output=tmp_path / "out", **FAST)
    assert not (tmp_path / "out").exists()


def test_a_size_that_no_form_keeps_is_refused(pictures, tmp_path):
    asked = {**FAST, "eval_data": pictures, "max_drop": 0.04, "max_size_mb": 0.01}
    with pytest.raises(GateError, match=r"float is .* MB where 0.01 MB is allowed"):
        edgevlm.compile("demo", target="raspberry-pi-5", **asked, output=tmp_path / "out")


@pytest.mark.slow
def test_a_form_that_loses_too_much_on_the_report_split_does_not_ship(pictures, demo_cache, tmp_path, monkeypatch):
    """It is judged twice; only the second time it falls."""
    from edgevlm.steps.judging import Judge

    real = Judge.drop

    def drop(self, variants):
        found = real(self, variants)
        is_report = self._data is self._work.job.splits.report
        return msgspec.structs.replace(found, value=0.9) if is_report and variants[0].name.startswith("int8") else found

    monkeypatch.setattr(Judge, "drop", drop)
    monkeypatch.setenv("EDGEVLM_CACHE", str(shutil.copytree(demo_cache, tmp_path / "cache")))
    asked = {**FAST, "eval_data": pictures, "max_drop": 0.04}
    made = edgevlm.compile("demo", target="raspberry-pi-5", **asked, output=tmp_path / "out")
    assert not [form.name for form in made.manifest.forms if form.name.startswith("int8")]
    rows = {row.name: row for row in made.report.candidates}
    fallen = [row.status for name, row in rows.items() if name.startswith("int8") and "report split" in row.reason]
    assert set(fallen) == {"over a budget"}
    assert not any("slightly too good" in warning for warning in made.report.warnings)
    with pytest.raises(GateError, match="On the report split every candidate loses"):
        edgevlm.compile("demo", target="raspberry-pi-5", precision="int8", **asked, output=tmp_path / "int8")


def test_a_latency_budget_waits_for_the_device(tmp_path):
    with pytest.raises(UsageError) as caught:
        edgevlm.compile("demo", target="raspberry-pi-5", max_latency_ms=5, output=tmp_path / "out")
    assert "edgevlm tune" in caught.value.hint


# --- tuning -----------------------------------------------------------------------------------------------


def test_the_chosen_form_alone_is_left(tuned, board):
    bundle = open_bundle(tuned.bundle)
    assert bundle.manifest.forms == ()
    assert bundle.manifest.selection == tuned.selection in ("measured", "float-fallback")
    chosen = next(form for form in edgevlm.inspect(board).forms if form.name == tuned.chosen)
    assert bundle.manifest.components == chosen.components
    assert bundle.manifest.accuracy == chosen.accuracy
    assert bundle.manifest.latency is not None
    assert bundle.manifest.latency.n >= 18
    assert edgevlm.verify(tuned.bundle)
    graphs = [path for path in bundle.entries if path.endswith(".onnx")]
    assert len(graphs) == 1
    assert edgevlm.run(tuned.bundle, shapes.picture(0, seed=5).image).top.label == shapes.picture(0, seed=5).label


def test_what_was_measured_stands_in_the_chosen_bundle(tuned):
    kept = from_json((Path(tuned.bundle) / "report" / "tuning.json").read_bytes(), Tuned)
    assert msgspec.structs.replace(kept, bundle=tuned.bundle) == tuned
    report = from_json((Path(tuned.bundle) / "report" / "report.json").read_bytes(), Report)
    assert report.winner == tuned.chosen
    assert report.comparisons == tuple(timing.comparison for timing in tuned.timings)
    assert all(form.p50_ms is not None for form in tuned.forms)


def test_a_form_that_answers_otherwise_here_never_ships(board, tmp_path, monkeypatch):
    from edgevlm.runtime import verify

    real = verify.relative_error
    monkeypatch.setattr(verify, "relative_error", lambda expected, actual: real(expected, actual) + 1.0)
    with pytest.raises(BundleError, match="Not even the float form"):
        tune(board, output=tmp_path / "none", protocol=QUICK)
    calls = []

    def wrong_after_float(expected, actual):
        calls.append(None)
        return real(expected, actual) + (1.0 if len(calls) > 3 else 0.0)

    monkeypatch.setattr(verify, "relative_error", wrong_after_float)
    found = tune(board, output=tmp_path / "float", protocol=QUICK)
    assert found.chosen == "fp32"
    assert {form.status for form in found.forms[1:]} == {"failed"}


def test_times_under_an_emulator_are_nobodys(board, tmp_path, monkeypatch):
    monkeypatch.setenv(EMULATED, "cortex-a76")
    found = tune(board, output=tmp_path / "bundle", protocol=QUICK)
    assert found.selection == "unmeasured"
    assert "cortex-a76" in found.reason
    manifest = edgevlm.inspect(tmp_path / "bundle")
    assert manifest.latency is None
    assert manifest.forms == ()
    assert "emulation of cortex-a76" in (tmp_path / "bundle" / "report" / "report.md").read_text()


def test_tune_says_what_is_wrong(tuned, board, tmp_path, capsys):
    with pytest.raises(UsageError, match="one form alone"):
        tune(tuned.bundle, output=tmp_path / "again")
    with pytest.raises(UsageError, match="exists already"):
        tune(board, output=tuned.bundle)
    with pytest.raises(GateError, match="No candidate"):
        tune(board, output=tmp_path / "none", max_latency_ms=1e-6, protocol=QUICK)
    assert not (tmp_path / "none").exists()
    assert exit_code_of(["tune", str(board), "-o", str(tmp_path / "x"), "--device", "telnet://board"]) == 2
    assert "telnet" in capsys.readouterr().err
    file = tmp_path / "a-file"
    file.write_text("")
    with pytest.raises(StoreError):
        tune(board, output=file / "below")


@pytest.mark.slow
def test_tune_tells_people_what_it_chose(board, tmp_path, capsys):
    assert exit_code_of(["tune", str(board), "-o", str(tmp_path / "out"), "--rounds", "6", "-q"]) == 0
    printed = capsys.readouterr().out
    assert "ships" in printed
    assert "golden error" in printed
    assert str(tmp_path / "out") in printed
