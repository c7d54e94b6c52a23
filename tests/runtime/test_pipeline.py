from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from edgevlm.errors import BundleError, EdgeVLMError, UsageError
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import Processing, from_json, to_json
from tests.runtime import tiny

TASKS = (
    "image-classification",
    "image-feature-extraction",
    "zero-shot-image-classification/folded",
    "zero-shot-image-classification/both towers",
)


def asked(task: str):
    return tiny.LABELS if task.endswith("both towers") else None


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("suffix", ["", ".evlm"])
def test_a_bundle_answers_alike_for_a_path_bytes_a_file_an_image_and_an_array(tmp_path: Path, task: str, suffix: str):
    pipeline = Pipeline.load(tiny.make_bundle(tmp_path / f"bundle{suffix}", task))
    image = tiny.picture("green")
    image.save(tmp_path / "green.png")
    data = (tmp_path / "green.png").read_bytes()
    sources = (tmp_path / "green.png", str(tmp_path / "green.png"), data, io.BytesIO(data), image, np.array(image))
    answers = {to_json(pipeline(source, labels=asked(task))) for source in sources}
    assert len(answers) == 1


@pytest.mark.parametrize("task", [task for task in TASKS if "feature" not in task])
@pytest.mark.parametrize("colour", tiny.LABELS)
def test_the_answer_is_the_colour_of_the_picture(tmp_path: Path, task: str, colour: str):
    pipeline = Pipeline.load(tiny.make_bundle(tmp_path / "bundle", task))
    answer = pipeline(tiny.picture(colour), labels=asked(task), top_k=2)
    assert answer.top.label == colour
    assert answer.top.index == tiny.LABELS.index(colour)
    assert len(answer.classes) == 2
    assert answer.to_text().splitlines()[0].endswith(colour)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("batch", ["batch", 1, 4])
@pytest.mark.parametrize("n", [1, 3, 4, 9])
def test_any_number_of_pictures_fits_any_batch(tmp_path: Path, task: str, batch: int | str, n: int):
    pipeline = Pipeline.load(tiny.make_bundle(tmp_path / "bundle", task, batch=batch))
    pixels = np.stack([pipeline.preprocess(tiny.picture(tiny.LABELS[i % 3])) for i in range(n)])
    together = pipeline.predict(pixels, labels=asked(task))
    alone = tuple(pipeline.predict(row[None], labels=asked(task))[0] for row in pixels)
    assert len(together) == n
    for one, other in zip(together, alone, strict=True):
        assert one.is_same_answer(other, tolerance=1e-6)
    assert all(len(value) == n for value in pipeline.outputs(pixels).values())


def test_a_result_round_trips_through_json(tmp_path: Path):
    for task in TASKS:
        pipeline = Pipeline.load(tiny.make_bundle(tmp_path / task.replace("/", "-"), task))
        answer = pipeline(tiny.picture(), labels=asked(task))
        assert from_json(to_json(answer), type(answer)) == answer


def test_parts_and_bundle_run_the_same_code(tmp_path: Path):
    manifest, files = tiny.parts("image-classification")
    sessions = {"model": tiny.open_graph(files["components/model.onnx"], tmp_path)}
    from_parts = Pipeline.from_parts(
        task=manifest.task, processing=manifest.processing, sessions=sessions, labels=manifest.labels
    )
    from_bundle = Pipeline.load(tiny.make_bundle(tmp_path / "bundle"))
    for colour in tiny.LABELS:
        assert to_json(from_parts(tiny.picture(colour))) == to_json(from_bundle(tiny.picture(colour)))


def test_threads_are_what_was_asked_for(bundle: Path):
    for n_threads in (0, 1, 2):
        Pipeline.load(bundle, n_threads=n_threads)(tiny.picture())
    with pytest.raises(UsageError, match="-1 threads"):
        Pipeline.load(bundle, n_threads=-1)


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("0 classes", lambda p: p(tiny.picture(), top_k=0)),
        ("its own labels", lambda p: p(tiny.picture(), labels=["cat"])),
        ("one text", lambda p: p(tiny.picture(), labels="cat,dog")),
        ("shape", lambda p: p.predict(np.zeros((1, 3, 7, 8), np.float32))),
        ("shape", lambda p: p.predict(np.zeros((0, 3, 8, 8), np.float32))),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(bundle: Path, words: str, call):
    with pytest.raises(UsageError, match=words) as raised:
        call(Pipeline.load(bundle))
    assert raised.value.hint


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["red", "violet"], "'violet' is not one of the 3 labels"),
        ([], "no labels of its own"),
        (["red", " "], "empty"),
        (["red", "red"], "twice"),
    ],
)
def test_a_folded_bundle_takes_only_its_labels(tmp_path: Path, labels: list[str], words: str):
    pipeline = Pipeline.load(tiny.make_bundle(tmp_path / "bundle", "zero-shot-image-classification/folded"))
    with pytest.raises(UsageError, match=words) as raised:
        pipeline(tiny.picture(), labels=labels)
    assert raised.value.hint


def test_a_folded_bundle_takes_some_of_its_labels_in_any_order(tmp_path: Path):
    pipeline = Pipeline.load(tiny.make_bundle(tmp_path / "bundle", "zero-shot-image-classification/folded"))
    answer = pipeline(tiny.picture("red"), labels=["blue", "red"])
    assert (answer.top.label, answer.top.index) == ("red", 1)
    assert sum(each.score for each in answer.classes) == pytest.approx(1)


def test_a_bundle_with_both_towers_needs_labels(tmp_path: Path):
    pipeline = Pipeline.load(tiny.make_bundle(tmp_path / "bundle", "zero-shot-image-classification/both towers"))
    with pytest.raises(UsageError, match="no labels of its own"):
        pipeline(tiny.picture())


def test_a_parts_list_that_makes_no_pipeline_is_refused():
    processing = Processing(image=tiny.IMAGE)
    for task in ("image-classification", "zero-shot-image-classification", "image-feature-extraction"):
        with pytest.raises(BundleError, match="needs the component"):
            Pipeline.from_parts(task=task, processing=processing, sessions={})
    with pytest.raises(UsageError) as raised:
        Pipeline.from_parts(task="image-clasification", processing=processing, sessions={})
    assert "Did you mean 'image-classification'" in raised.value.hint


def test_nan_gives_no_answer(tmp_path: Path):
    pipeline = Pipeline.load(tiny.make_bundle(tmp_path / "bundle"))
    with pytest.raises(EdgeVLMError, match="'logits' holds NaN"):
        pipeline.results({"logits": np.full((1, 3), np.nan, np.float32)})


def test_labels_that_do_not_fit_the_graph_are_refused(tmp_path: Path):
    session = tiny.open_graph(tiny.image_graph(), tmp_path)
    pipeline = Pipeline.from_parts(
        task="image-classification",
        processing=Processing(image=tiny.IMAGE),
        sessions={"model": session},
        labels=("cat", "dog"),
    )
    with pytest.raises(BundleError, match="3 classes apart, but there are 2 labels"):
        pipeline(tiny.picture())


@pytest.mark.parametrize(
    ("output", "shape", "axes"),
    [
        ("pooler_output", (192, 1, 1), None),
        ("last_hidden_state", (12, 16), (1,)),
        ("last_hidden_state", (12, 4, 4), (2, 3)),
    ],
)
def test_features_are_pooled_as_documented(tmp_path: Path, output: str, shape: tuple[int, ...], axes):
    pipeline = Pipeline.from_parts(
        task="image-feature-extraction",
        processing=Processing(image=tiny.IMAGE),
        sessions={"model": tiny.open_graph(tiny.feature_graph(output, shape), tmp_path)},
    )
    pixels = pipeline.preprocess(tiny.picture())[None]
    raw = pixels.reshape(1, *shape)
    expected = raw.reshape(-1) if axes is None else raw.mean(axis=axes)[0]
    np.testing.assert_allclose(pipeline.predict(pixels)[0].to_array(), expected, rtol=1e-6)
