from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgevlm.errors import BundleError, UsageError
from edgevlm.measure import bundles as bundles_module
from edgevlm.measure.bundles import WHOLE, BundleBenchmark, WholePipeline, benchmark_bundles
from edgevlm.measure.interleave import Progress, compare
from edgevlm.measure.protocol import QUICK
from edgevlm.measure.spec import Comparison, Protocol, Subject
from edgevlm.progress import Event, StepFinished, StepStarted
from edgevlm.runtime.machine import describe_machine
from edgevlm.runtime.spec import SessionOptions
from tests.measure.fakes import FakeMachine
from tests.runtime.tiny import SIZE, make_bundle

# One turn is enough to see that everything runs; what it takes is not looked at.
PROTOCOL = msgspec.structs.replace(QUICK, n_rounds=1, min_rounds=1, warmup_ms=0.0, block_ms=0.0)


def test_two_bundles_are_timed_by_graph_and_as_a_whole(tmp_path: Path):
    one, other = make_bundle(tmp_path / "one"), make_bundle(tmp_path / "other", batch=2)
    events: list[Event] = []
    found = benchmark_bundles(one, other, protocol=PROTOCOL, progress=events.append)
    assert found.bundles == (str(one), str(other))
    assert (found.task, found.picture_size) == ("image-classification", (24, 16))
    assert found.batches == {"model": 2}, "the free one takes what the other one was built for"
    assert found.environment.tools["onnxruntime"]
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
        benchmark_bundles([make_bundle(tmp_path / "one"), make_bundle(tmp_path / "four", batch=4)], protocol=PROTOCOL)
    assert seen == [(4, 3, SIZE, SIZE)] * 2


def test_graphs_for_unlike_batches_are_not_compared(tmp_path: Path):
    two, four = make_bundle(tmp_path / "two", batch=2), make_bundle(tmp_path / "four", batch=4)
    with pytest.raises(UsageError, match=r"'model' takes 2 in a run in '.*two', but 4 in '.*four'"):
        benchmark_bundles(two, four)


@pytest.mark.parametrize(("n_threads", "expected"), [(2, 2), (0, describe_machine().n_physical_cores)])
def test_threads_are_for_all(tmp_path: Path, n_threads: int, expected: int):
    found = benchmark_bundles(make_bundle(tmp_path / "one"), n_threads=n_threads, protocol=PROTOCOL)
    assert {m.n_threads for comparison in found.comparisons.values() for m in comparison.measurements} == {expected}


def test_a_graph_that_the_first_bundle_lacks_is_timed_where_it_is(tmp_path: Path):
    folded = make_bundle(tmp_path / "folded", "zero-shot-image-classification/folded")
    towers = make_bundle(tmp_path / "towers", "zero-shot-image-classification")
    found = benchmark_bundles(folded, towers, protocol=PROTOCOL)
    assert {what: [m.subject for m in each.measurements] for what, each in found.comparisons.items()} == {
        "image_encoder": [str(folded), str(towers)],
        "text_encoder": [str(towers)],
        WHOLE: [str(folded), str(towers)],
    }
    assert all(m.failure is None for each in found.comparisons.values() for m in each.measurements)


def test_nobody_is_dropped_and_what_cannot_work_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    machine = FakeMachine(lambda name, turn: 1.0, fails_at={str(tmp_path / "one"): 3})
    protocols: list[Protocol] = []

    def fake(subjects: list[Subject], *, baseline: str, protocol: Protocol, progress: Progress) -> Comparison:
        protocols.append(protocol)
        return compare(
            subjects, baseline=baseline, protocol=protocol, progress=progress, surroundings=machine.surroundings()
        )

    monkeypatch.setattr(bundles_module, "compare", fake)
    found = benchmark_bundles(make_bundle(tmp_path / "one"), make_bundle(tmp_path / "other"))
    assert [protocol.halve_at for protocol in protocols] == [()] * 2, "one comparison for each of graph and whole"
    assert found.comparisons["model"].reasons[0].startswith("The baseline")


def test_threads_stop_spinning_inside_a_whole_pipeline_too(tmp_path: Path):
    session = WholePipeline().open(make_bundle(tmp_path / "one"), SessionOptions(n_threads=2))
    settings = session._pipeline.sessions["model"]._session.get_session_options()
    assert settings.get_session_config_entry("session.force_spinning_stop") == "1"
    assert settings.intra_op_num_threads == 2


def test_what_cannot_be_timed_is_refused_before_anything_runs(tmp_path: Path):
    one = make_bundle(tmp_path / "one")
    features = make_bundle(tmp_path / "features", "image-feature-extraction")
    with pytest.raises(UsageError, match="No bundle"):
        benchmark_bundles()
    with pytest.raises(UsageError, match="cannot be -1 threads"):
        benchmark_bundles(one, n_threads=-1)
    with pytest.raises(UsageError, match="named twice"):
        benchmark_bundles(one, f"{one}/")
    with pytest.raises(UsageError, match="is for image-feature-extraction, but"):
        benchmark_bundles(one, features, protocol=Protocol())
    with pytest.raises(BundleError, match="no bundle"):
        benchmark_bundles(tmp_path / "nowhere")
    graph = one / "components" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="was changed"):
        benchmark_bundles(one, protocol=PROTOCOL)
