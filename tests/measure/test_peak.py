"""The best rates: figures that can be, kept where they are valid. No figure is asserted against a clock."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from edgevlm.errors import ModelError
from edgevlm.measure import peak as peak_module
from edgevlm.measure.explanation import main_precision, place_under_roof, time_by_kind
from edgevlm.measure.load import CpuTimes
from edgevlm.measure.operators import profile_graph
from edgevlm.measure.peak import PROBES, Peak, PeakRequest, Rate, measure_here, measure_peak, probes_for, save_probe
from edgevlm.measure.work import work_of_graph
from edgevlm.runtime.backends.onnxruntime import OnnxRuntime
from edgevlm.runtime.machine import describe_machine
from edgevlm.runtime.spec import SessionOptions
from edgevlm.steps import explain
from edgevlm.store import Store
from tests.measure import graphs

PEAK = Peak(
    backend="onnxruntime", version="1", n_threads=1, bandwidth_gb_per_s=10.0, disagreement=0.01, is_valid=True,
    machine="m", rates=(Rate(precision="float32", gmac_per_s=50.0, probe="p", by_probe={"p": 50.0}),
                        Rate(precision="int8", gmac_per_s=200.0, probe="p", by_probe={"p": 200.0})),
)  # fmt: skip


def test_every_probe_computes_what_it_is_counted_as(tmp_path: Path):
    for probe in PROBES:
        for precision in ("float32", "int8"):
            save_probe(probe, precision, tmp_path / "probe.onnx")
            session = OnnxRuntime().open(tmp_path / "probe.onnx", SessionOptions(n_threads=1))
            (shape,) = (each.shape for each in session.inputs)
            assert work_of_graph(tmp_path / "probe.onnx", {"x": shape}).macs == probe.macs  # type: ignore[dict-item]
    assert [probe.macs for probe in probes_for(2)] == [p.macs * (2 if p.op == "MatMul" else 1) for p in PROBES]


def test_int8_probes_run_in_int8(tmp_path: Path):
    for i, probe in enumerate(PROBES):
        save_probe(probe, "int8", tmp_path / f"{i}.onnx")
        found = profile_graph(tmp_path / f"{i}.onnx", session=SessionOptions(n_threads=1), block_ms=1)
        assert main_precision(found) == "int8"
        assert not any(row.precision == "float32" and row.macs for row in found.rows)


def test_the_peak_of_this_machine_is_measured(tmp_path: Path):
    found = measure_peak(n_threads=1, store=Store(tmp_path), probe_ms=1.0)
    assert (found.backend, found.n_threads) == ("onnxruntime", 1)
    assert {rate.precision for rate in found.rates} == {"float32", "int8"}
    for rate in found.rates:
        assert rate.gmac_per_s == rate.by_probe[rate.probe] == max(rate.by_probe.values())
        assert 0.01 < rate.gmac_per_s < 100_000
    assert 0.05 < found.bandwidth_gb_per_s < 10_000
    assert found.rate("bf16") is None


def test_openvino_has_rates_of_its_own(tmp_path: Path):
    pytest.importorskip("openvino", reason="OpenVINO is an extra of its own")
    found = measure_peak(backend="openvino", n_threads=1, store=Store(tmp_path), probe_ms=1.0)
    has_bf16 = bool({"avx512_bf16", "amx_bf16", "bf16"} & set(describe_machine().isa))
    assert [rate.precision for rate in found.rates] == ["float32", *(["bf16"] if has_bf16 else []), "int8"]
    for i, probe in enumerate(PROBES):
        save_probe(probe, "int8", tmp_path / f"{i}.onnx")
        profile = profile_graph(
            tmp_path / f"{i}.onnx", backend="openvino", session=SessionOptions(n_threads=1), block_ms=1
        )
        assert main_precision(profile) == "int8", probe.name


def test_a_valid_peak_is_looked_up_and_another_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[bool] = []

    def measured(_function: object, request: PeakRequest, **_options: object) -> Peak:
        calls.append(True)
        return msgspec.structs.replace(PEAK, n_threads=request.n_threads, is_valid=request.n_threads == 1)

    monkeypatch.setattr(peak_module, "call_apart", measured)
    for n_threads, n_calls in ((1, 1), (1, 1), (2, 2), (2, 3)):
        assert measure_peak(n_threads=n_threads, store=Store(tmp_path)).n_threads == n_threads
        assert len(calls) == n_calls


def test_passes_are_repeated_until_two_agree(monkeypatch: pytest.MonkeyPatch):
    rates = iter([50.0, 90.0, 92.0, *([10.0, 20.0, 40.0, 80.0, 160.0, 320.0])])
    monkeypatch.setattr(peak_module, "_rates", lambda *_: {"p": next(rates)})
    monkeypatch.setattr(peak_module, "triad_gb_per_s", lambda *_, **__: 10.0)
    found = measure_here(PeakRequest(backend="onnxruntime", n_threads=1))
    assert found.rate("float32") == Rate(precision="float32", gmac_per_s=92.0, probe="p", by_probe={"p": 92.0})
    assert found.rate("int8") == Rate(precision="int8", gmac_per_s=320.0, probe="p", by_probe={"p": 320.0})
    assert found.disagreement == pytest.approx(0.5)
    assert not found.is_valid


@pytest.mark.parametrize(("n_threads", "load", "is_valid"), [(1, 0.9, True), (2, 0.9, False), (2, 0.1, True)])
def test_several_threads_need_a_machine_of_their_own(monkeypatch: pytest.MonkeyPatch, n_threads, load, is_valid):
    monkeypatch.setattr(peak_module, "_rates", lambda *_: {"p": 50.0})
    monkeypatch.setattr(peak_module, "triad_gb_per_s", lambda *_, **__: 10.0)
    times = CpuTimes(used_s=1.0, stolen_s=0.0, all_s=2.0)
    monkeypatch.setattr(peak_module, "read_cpu_times", lambda: times)
    monkeypatch.setattr(peak_module, "share_of_others", lambda *_, **__: load)
    found = measure_here(PeakRequest(backend="onnxruntime", n_threads=n_threads))
    assert (found.is_valid, found.other_load) == (is_valid, load)


def test_a_backend_without_probes_is_told(tmp_path: Path):
    with pytest.raises(ModelError, match="There is no probe for 'nothing'"):
        measure_peak(backend="nothing", n_threads=1, store=Store(tmp_path))


# --- under the roof ---------------------------------------------------------------------------------------


def test_the_fraction_is_of_the_precision_in_which_most_is_multiplied(tmp_path: Path):
    file = graphs.save_fused(tmp_path / "g.onnx")
    found = profile_graph(file, session=SessionOptions(n_threads=1), block_ms=1)
    work = work_of_graph(file, {"x": graphs.SHAPE})
    assert work.macs == 2 * 16 * 64 * 64
    roof = place_under_roof(found, work, PEAK, latency_ms=0.01)
    assert roof is not None
    assert (roof.precision, roof.peak_gmac_per_s) == ("int8", 200.0)
    assert roof.gmac_per_s == pytest.approx(131_072 / 1e-5 / 1e9)
    assert roof.fraction == pytest.approx(13.1072 / 200)
    n_bytes = sum(row.n_bytes or 0 for row in found.rows)
    assert roof.memory_fraction == pytest.approx(n_bytes / 1e-5 / 1e9 / 10)
    float_alone = msgspec.structs.replace(PEAK, rates=PEAK.rates[:1])
    assert place_under_roof(found, work, float_alone, latency_ms=0.01) is None
    assert place_under_roof(found, msgspec.structs.replace(work, macs=0), PEAK, latency_ms=0.01) is None


def test_time_by_kind_is_all_of_the_time(tmp_path: Path):
    found = profile_graph(graphs.save_unfused(tmp_path / "g.onnx"), session=SessionOptions(n_threads=1), block_ms=1)
    by_kind = time_by_kind(found)
    assert set(by_kind) == {"matrix product", "quantize and convert", "elementwise"}
    assert sum(by_kind.values()) == pytest.approx(found.operators_ms)
    assert list(by_kind.values()) == sorted(by_kind.values(), reverse=True)


def test_numpy_comes_to_the_same_order_of_magnitude(tmp_path: Path):
    """A cross-check of the unit, not of the speed: numpy's own float product, by the same stop watch."""
    a, b = (np.ones((512, 512), np.float32) for _ in range(2))
    numpy_rate = 512**3 / peak_module.best_s(lambda: a @ b, duration_ms=20) / 1e9
    ours = measure_here(PeakRequest(backend="onnxruntime", n_threads=1, probe_ms=5.0)).rate("float32")
    assert ours is not None
    assert 1 / 50 < ours.gmac_per_s / numpy_rate < 50
    assert json.loads(msgspec.json.encode(ours))["precision"] == "float32"


def test_rates_that_no_store_keeps_hold_for_ten_minutes_of_the_process(tmp_path: Path, monkeypatch):
    asked: list[int] = []

    def measured(*, backend: str, n_threads: int, store: Store) -> str:
        asked.append(n_threads)
        return f"{backend} {n_threads} {len(asked)}"

    monkeypatch.setattr(explain, "measure_peak", measured)
    monkeypatch.setattr(explain, "_rates", {})
    now = [1.0]
    monkeypatch.setattr(explain, "time", SimpleNamespace(monotonic=lambda: now[0]))
    found = [explain.best_rates("onnxruntime", n, Store(tmp_path)) for n in (1, 2, 1)]
    assert found == ["onnxruntime 1 1", "onnxruntime 2 2", "onnxruntime 1 1"]
    now[0] += 601
    assert explain.best_rates("onnxruntime", 1, Store(tmp_path)) == "onnxruntime 1 3"
    assert asked == [1, 2, 1]
