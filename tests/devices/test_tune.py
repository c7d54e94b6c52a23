"""The device chooses: ``edgevlm tune`` over ssh and under emulation, from several forms to the bundle of one."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

import edgevlm
from edgevlm.bundle.write import write_bundle
from edgevlm.cli.main import exit_code_of
from edgevlm.data import shapes
from edgevlm.report.spec import Report
from edgevlm.runtime.bundle import named_files, open_bundle
from edgevlm.runtime.spec import from_json
from tests.devices.server import Server
from tests.fast import FAST

pytestmark = pytest.mark.slow

REPORT = "report/report.json"


@pytest.fixture(scope="module")
def board(tmp_path_factory) -> Path:
    """The built-in model for a Raspberry Pi 5, in float and in int8."""
    folder = tmp_path_factory.mktemp("board")
    shapes.write_folder(folder / "pictures", n=60, seed=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(folder / "cache"))
        compiled = edgevlm.compile(
            "demo",
            target="raspberry-pi-5",
            eval_data=folder / "pictures",
            max_drop=0.5,
            **FAST,
            output=folder / "whole",
        )
    whole = open_bundle(compiled.bundle)
    int8 = next(form for form in whole.manifest.forms if form.name.startswith("int8-static"))
    few = msgspec.structs.replace(whole.manifest, forms=(whole.manifest.forms[0], int8), files=())
    write_bundle(folder / "board", few, {path: whole.file(path) for path in (*named_files(few), REPORT)})
    return folder / "board"


def chosen_at(device: str, board: Path, out: Path, capsys) -> tuple[dict, Report]:
    """What ``edgevlm tune`` says, and the report in the bundle that it wrote."""
    asked = ["tune", str(board), "--device", device, "--rounds", "6", "-o", str(out), "-q", "--json"]
    assert exit_code_of(asked) == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    assert told["bundle"] == str(out)
    assert edgevlm.inspect(out).forms == ()
    assert told["chosen"] in {form.name for form in edgevlm.inspect(board).forms}
    return told, from_json((out / REPORT).read_bytes(), Report)


def test_over_ssh_the_device_times_its_forms(server: Server, board: Path, tmp_path: Path, capsys):
    told, report = chosen_at(server.address(), board, tmp_path / "tuned", capsys)
    manifest = edgevlm.inspect(tmp_path / "tuned")
    assert manifest.selection == told["selection"] in ("measured", "float-fallback")
    assert manifest.latency is not None and report.winner == told["chosen"]
    assert all(form["p50_ms"] > 0 for form in told["forms"])
    assert edgevlm.verify(tmp_path / "tuned")


def test_under_emulation_times_are_not_the_devices(emulator, board: Path, tmp_path: Path, capsys):
    told, report = chosen_at("emulated://cortex-a76", board, tmp_path / "tuned", capsys)
    assert told["emulated_cpu"] == "cortex-a76"
    environment = told["environment"]
    assert (environment["arch"], environment["machine"]) == ("aarch64", "Cortex-A76")
    assert "asimddp" in environment["isa"]
    # Each form was timed in a process of its own, which the emulated one started.
    assert all(form["p50_ms"] > 0 for form in told["forms"])
    manifest = edgevlm.inspect(tmp_path / "tuned")
    assert manifest.selection == "unmeasured" and "not the device's" in manifest.selection_reason
    assert manifest.latency is None and report.latency is None
