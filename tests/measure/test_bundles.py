from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgevlm.errors import BundleError, UsageError
from edgevlm.measure import bundles as bundles_module
from edgevlm.measure.bundles import WHOLE, BundleBenchmark, benchmark_bundles
from edgevlm.measure.protocol import QUICK
from edgevlm.measure.spec import Comparison, Protocol, Subject
from edgevlm.progress import Event, StepFinished, StepStarted
from tests.runtime.tiny import SIZE, make_bundle

# One turn is enough to see that everything runs; what it takes is not looked at.
PROTOCOL = msgspec.structs.replace(QUICK, n_rounds=1, min_rounds=1, warmup_ms=0.0, block_ms=0.0)


def test_two_bundles_are_timed_by_graph_and_as_a_whole(tmp_path: Path):
    one, other = make_bundle(tmp_path / "one"), make_bundle(tmp_path / "other", batch=2)
    events: list[Event] = []
    found = benchmark_bundles(one, other, protocol=PROTOCOL, progress=events.append)
    assert found.bundles == (str(one), str(other))
    assert list(found.comparisons) == ["model", WHOLE]
    for comparison in found.comparisons.values():
        assert comparison.baseline == str(one)
        assert [m.failure for m in comparison.measurements] == [None, None]
        assert comparison.was_extended, "one round is not valid, so it was measured once more"
    assert [type(event) for event in events if isinstance(event, StepStarted | StepFinished)] == [
        StepStarted,
        StepFinished,
    ] * 2
    assert msgspec.json.decode(msgspec.json.encode(found), type=BundleBenchmark) == found


def test_both_towers_and_the_question_about_labels_are_timed(tmp_path: Path):
    bundle = make_bundle(tmp_path / "towers", "zero-shot-image-classification")
    found = benchmark_bundles(bundle, protocol=PROTOCOL)
    assert list(found.comparisons) == ["image_encoder", "text_encoder", WHOLE]
    for comparison in found.comparisons.values():
        (measurement,) = comparison.measurements
        assert measurement.failure is None
        assert measurement.turns_ms


def test_graphs_are_fed_the_golden_picture_at_their_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, ...]] = []

    def look(subjects: list[Subject], *, baseline: str, **_: object) -> Comparison:
        for subject in subjects:
            with np.load(subject.inputs, allow_pickle=False) as inputs:
                seen.extend(inputs[name].shape for name in inputs.files if name == "pixel_values")
                if "pixel_values" in inputs.files:
                    assert len(np.unique(inputs["pixel_values"])) > 2, "a real picture, not zeros"
        raise UsageError("Enough.")

    monkeypatch.setattr(bundles_module, "compare", look)
    with pytest.raises(UsageError, match="Enough"):
        benchmark_bundles(make_bundle(tmp_path / "one"), make_bundle(tmp_path / "four", batch=4), protocol=PROTOCOL)
    assert seen == [(1, 3, SIZE, SIZE), (4, 3, SIZE, SIZE)]


def test_threads_are_for_all(tmp_path: Path):
    found = benchmark_bundles(make_bundle(tmp_path / "one"), n_threads=2, protocol=PROTOCOL)
    assert {m.n_threads for comparison in found.comparisons.values() for m in comparison.measurements} == {2}


def test_what_cannot_be_timed_is_refused_before_anything_runs(tmp_path: Path):
    one = make_bundle(tmp_path / "one")
    features = make_bundle(tmp_path / "features", "image-feature-extraction")
    with pytest.raises(UsageError, match="No bundle"):
        benchmark_bundles()
    with pytest.raises(UsageError, match="named twice"):
        benchmark_bundles(one, f"{one}/")
    with pytest.raises(UsageError, match="unlike tasks"):
        benchmark_bundles(one, features, protocol=Protocol())
    with pytest.raises(BundleError, match="no bundle"):
        benchmark_bundles(tmp_path / "nowhere")
    graph = one / "components" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="was changed"):
        benchmark_bundles(one, protocol=PROTOCOL)
