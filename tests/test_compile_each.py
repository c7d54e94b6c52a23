"""One command, one export, a bundle for each kind of hardware: CPU at hand, ARM board, RTX card, Jetson."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgevlm
from edgevlm.compile_each import CompiledEach, compile_each
from edgevlm.data import shapes
from edgevlm.measure.protocol import QUICK
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.machine import describe_machine

TARGETS = ("cpu", "raspberry-pi-5", "rtx-40", "jetson-orin-nano")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(describe_machine().arch == "aarch64", reason="the boards would be at hand"),
]


@pytest.fixture(scope="module", params=["demo", "MobileNetV2"])
def compiled(request, tmp_path_factory) -> CompiledEach:
    folder = tmp_path_factory.mktemp("each")
    if request.param == "demo":
        model, data = "demo", folder / "pictures"
        shapes.write_folder(data, n=200, seed=5)
    else:
        model, data = request.getfixturevalue("mobilenet_and_pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(folder / "cache"))
        # A point of 32 pictures is less than one: three may differ.
        asked = {"eval_data": data, "max_drop": 0.1, "threads": 1, "search_minutes": 0, "protocol": QUICK}
        # The demo model has percentile's forms too; of the large graph they would take half of the time.
        if request.param == "MobileNetV2":
            asked["calibration"] = "quick"
        return compile_each(str(model), TARGETS, output=folder / "out", **asked)


def test_every_target_gets_a_bundle_from_one_export(compiled):
    assert [outcome.exit_code for outcome in compiled.outcomes] == [0] * len(TARGETS)
    for outcome in compiled.outcomes[1:]:
        exports = [step for step in outcome.report.steps if step.name.startswith("export:")]
        assert exports and all(step.hit for step in exports)


def test_only_what_was_timed_is_called_measured(compiled):
    manifests = {name: edgevlm.inspect(compiled.folder / name) for name in TARGETS}
    assert manifests["cpu"].selection in ("measured", "float-fallback") and manifests["cpu"].latency is not None
    for name in TARGETS[1:]:
        assert manifests[name].selection == "unmeasured" and manifests[name].latency is None
        assert manifests[name].forms[0].name == "fp32"


def test_each_form_is_as_its_hardware_wants_it(compiled):
    backends = {
        name: {part.backend for form in edgevlm.inspect(compiled.folder / name).forms for part in form.components}
        for name in TARGETS[1:]
    }
    assert "onnxruntime" in backends["raspberry-pi-5"] and not backends["raspberry-pi-5"] & {"tensorrt", "tensorrt-rtx"}
    assert "tensorrt-rtx" in backends["rtx-40"]
    assert "tensorrt" in backends["jetson-orin-nano"]
    jetson = {form.name: form for form in edgevlm.inspect(compiled.folder / "jetson-orin-nano").forms}
    waiting = [form for name, form in jetson.items() if name.startswith("tensorrt")]
    assert waiting and all(form.status == "needs device build" for form in waiting)
    rtx = [f for f in edgevlm.inspect(compiled.folder / "rtx-40").forms if f.name.startswith("tensorrt-rtx")]
    expected = "ready" if load_backend("tensorrt-rtx").version() else "needs device build"
    assert rtx and {form.status for form in rtx} == {expected}
    if expected == "ready":
        assert all(part.file.endswith(".engine") for form in rtx for part in form.components)


def test_what_can_be_verified_here_is(compiled):
    for name in TARGETS:
        assert edgevlm.verify(compiled.folder / name), name


def test_the_page_says_what_was_verified_where_and_what_was_not(compiled):
    rows = {row["target"]: row for row in json.loads((compiled.folder / "targets.json").read_text())["targets"]}
    assert list(rows) == list(TARGETS)
    assert "unmeasured" not in rows["cpu"]["status"]
    for name in TARGETS[1:]:
        assert "unmeasured" in rows[name]["status"]
        assert "nothing was timed" in rows[name]["unproven"]
        assert "golden vectors" in rows[name]["verified"]
    page = (compiled.folder / "targets.html").read_text(encoding="utf-8")
    assert all(f'href="{name}/report/report.html"' in page for name in TARGETS)
    for name in TARGETS:
        assert (Path(compiled.folder) / name / "report" / "report.html").is_file()
