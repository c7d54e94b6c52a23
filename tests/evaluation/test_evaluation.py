from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgevlm.data.data_set import DataSet
from edgevlm.data.readers import read_data_set
from edgevlm.errors import DataError, UsageError
from edgevlm.evaluation.evaluation import compare_evaluations, evaluate, evaluate_bundle, evaluate_bundles
from edgevlm.evaluation.metrics import AGREEMENT, COSINE, NEAREST, TOP_1
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import (
    Array,
    ImageProcessing,
    Normalize,
    Processing,
    Rescale,
    Resize,
    SessionOptions,
    from_json,
    to_json,
)
from tests.data.pictures import png, write, write_folders
from tests.evaluation.pipelines import calls, classifier, colors, extractor, mean_color, two_towers
from tests.runtime.tiny import make_bundle


def unlabelled(data: DataSet) -> DataSet:
    return data.only([replace(sample, label=None) for sample in data.samples])


def wrong_at(*rows: int) -> object:
    """``mean_color`` with the classes turned for some pictures, counted over the calls."""
    seen = iter(range(10**6))

    def function(pixels: Array) -> Array:
        turned = [np.roll(row, 1) if next(seen) in rows else row for row in mean_color(pixels)]
        return np.array(turned)

    return function


def test_top_1_of_a_model_that_is_right(tmp_path: Path) -> None:
    found = evaluate(classifier(), colors(tmp_path / "data"))
    assert (found.metric, found.value, found.n, found.data) == (TOP_1, 1.0, 30, "data")
    assert found.scores.shape == (30,)
    assert found.predictions[:, 0].tolist() == 10 * [2] + 10 * [1] + 10 * [0], "blue, green, red as folders sort"
    low, high = found.interval()
    assert low < 0.9 < high == 1


def test_labels_in_another_order_change_nothing(tmp_path: Path) -> None:
    colors(tmp_path / "data")
    turned = ("blue", "red", "green")
    pipeline = classifier(lambda pixels: mean_color(pixels)[:, [2, 0, 1]], labels=turned)
    assert evaluate(pipeline, colors(tmp_path / "data", labels=turned)).value == 1


def test_the_drop_is_paired(tmp_path: Path) -> None:
    data = colors(tmp_path / "data")
    reference = evaluate(classifier(wrong_at(0, 1)), data)
    candidate = evaluate(classifier(wrong_at(1, 2, 3, 4)), data, reference=reference)
    drop = compare_evaluations(candidate, reference)
    assert (drop.n_worse, drop.n_better, drop.n) == (3, 1, 30)
    assert drop.value == pytest.approx(2 / 30)
    assert drop.value == pytest.approx(drop.reference - drop.candidate)
    assert drop.low < 0 < drop.value < drop.high
    assert candidate.others == {AGREEMENT: pytest.approx(26 / 30)}
    accuracy = drop.to_accuracy()
    assert (accuracy.value, accuracy.drop, accuracy.n) == (candidate.value, drop.value, 30)
    assert accuracy.others == candidate.others


def test_equal_answers_keep_an_open_interval(tmp_path: Path) -> None:
    data = colors(tmp_path / "data")
    reference = evaluate(classifier(), data)
    drop = compare_evaluations(evaluate(classifier(), data, reference=reference), reference)
    assert drop.value == 0
    assert drop.low < 0 < drop.high


def test_without_labels_agreement_with_the_float_model(tmp_path: Path) -> None:
    data = unlabelled(colors(tmp_path / "data"))
    reference = evaluate(classifier(wrong_at(0)), data)
    assert (reference.metric, reference.value) == (AGREEMENT, 1.0)
    drop = compare_evaluations(evaluate(classifier(wrong_at(0, 1)), data, reference=reference), reference)
    assert drop.value == pytest.approx(1 / 30)
    assert 0 < drop.low < drop.value < drop.high, "it cannot agree more than wholly"
    same = compare_evaluations(evaluate(classifier(wrong_at(0)), data, reference=reference), reference)
    assert (same.value, same.low) == (0, 0)
    assert same.high > 0


def test_other_pictures_are_not_compared(tmp_path: Path) -> None:
    one, other = colors(tmp_path / "one", 10), colors(tmp_path / "other", 11)
    reference = evaluate(classifier(), one)
    with pytest.raises(UsageError, match="other pictures"):
        evaluate(classifier(), other, reference=reference)
    with pytest.raises(UsageError, match="cannot be compared"):
        compare_evaluations(evaluate(classifier(), other), reference)


def test_batches_are_as_asked(tmp_path: Path) -> None:
    data = colors(tmp_path / "data")
    for batch, expected in ((1, [1] * 30), (8, [8, 8, 8, 6])):
        pipeline = classifier()
        evaluate(pipeline, data, batch=batch)
        assert calls(pipeline) == expected


def test_preprocessed_pictures_are_kept_for_the_next_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, folder = colors(tmp_path / "data"), tmp_path / "pixels"
    first = evaluate(classifier(), data, folder=folder)
    (kept,) = folder.iterdir()
    assert np.load(kept).shape == (30, 3, 8, 8)
    assert (np.load(kept)[4] == classifier().preprocess(data.samples[4].read())).all()
    monkeypatch.setattr(Pipeline, "preprocess", lambda *_: pytest.fail("preprocessed again"))
    second = evaluate(classifier(), data, folder=folder)
    assert (second.predictions == first.predictions).all()
    with pytest.raises(pytest.fail.Exception):
        evaluate(classifier(), data.only(data.samples[1:]), folder=folder)


def test_a_full_disk_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevlm.evaluation import pixels

    class Full:
        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr(pixels, "_open", lambda *_: Full())
    assert evaluate(classifier(), colors(tmp_path / "data"), folder=tmp_path / "pixels").value == 1
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.undo()
    assert evaluate(classifier(), colors(tmp_path / "data"), folder=tmp_path / "file" / "pixels").value == 1


def test_an_interrupted_evaluation_leaves_nothing(tmp_path: Path) -> None:
    data, folder = colors(tmp_path / "data", 30), tmp_path / "pixels"

    def interrupt(_: Array) -> Array:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(classifier(interrupt), data, folder=folder)
    assert list(folder.iterdir()) == []


def test_a_picture_that_changes_underway_is_refused(tmp_path: Path) -> None:
    data = colors(tmp_path / "data")
    (tmp_path / "data" / "red" / "003.png").write_bytes(png(seed=99))
    with pytest.raises(DataError, match=r"'red/003.png' cannot be used: it has changed"):
        evaluate(classifier(), data)
    (tmp_path / "data" / "red" / "003.png").unlink()
    with pytest.raises(DataError, match=r"'red/003.png' cannot be used: No such file"):
        evaluate(classifier(), data)


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    evaluate(classifier(), colors(tmp_path / "data"), count=lambda done, n: heard.append((done, n)))
    assert heard[-1] == (30, 30)
    assert heard == sorted(heard)


def test_two_towers(tmp_path: Path) -> None:
    task = "zero-shot-image-classification"
    data = colors(tmp_path / "data", task=task, labels=("green", "blue", "red"))
    assert evaluate(two_towers(tmp_path, ("green", "blue", "red")), data).value == 1


def test_embeddings(tmp_path: Path) -> None:
    task = "image-feature-extraction"
    data = colors(tmp_path / "data", task=task, labels=())
    assert data.class_names == ("blue", "green", "red")
    reference = evaluate(extractor(), data)
    assert (reference.metric, reference.value) == (NEAREST, 1.0)
    rng = np.random.default_rng(0)
    noisy = evaluate(
        extractor(lambda x: mean_color(x) + rng.normal(size=(len(x), 3))), unlabelled(data),
        reference=evaluate(extractor(), unlabelled(data)),
    )  # fmt: skip
    assert noisy.metric == COSINE
    drop = compare_evaluations(noisy, evaluate(extractor(), unlabelled(data)))
    assert 0 < drop.low < drop.value < drop.high
    assert drop.reference == pytest.approx(1)
    assert drop.interval == "paired bootstrap"


# --- bundles ----------------------------------------------------------------------------------------------


def test_a_bundle_is_judged_on_labelled_data(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    colors(tmp_path / "data")
    found = evaluate_bundle(bundle, tmp_path / "data", cache=tmp_path / "cache")
    assert (found.metric, found.value, found.n, found.drop) == (TOP_1, 1.0, 30, None)
    assert found.low < 1 == found.high
    assert from_json(to_json(found), type(found)) == found


def test_a_bundle_without_labels_needs_another_to_agree_with(tmp_path: Path) -> None:
    bundle, other = make_bundle(tmp_path / "bundle"), make_bundle(tmp_path / "other", batch=4)
    for i in range(6):
        write(tmp_path / "data" / f"{i}.png", png(seed=i))
    with pytest.raises(DataError, match="has no labels that the bundle knows"):
        evaluate_bundle(bundle, tmp_path / "data")
    found = evaluate_bundle(other, tmp_path / "data", reference=bundle)
    assert (found.metric, found.value) == (AGREEMENT, 1.0)
    assert found.drop is not None
    assert found.drop.value == 0 < found.drop.high


@pytest.mark.parametrize("task", ["zero-shot-image-classification", "zero-shot-image-classification/folded"])
def test_a_two_tower_bundle_chooses_among_the_data_sets_classes(tmp_path: Path, task: str) -> None:
    colors(tmp_path / "data")
    assert evaluate_bundle(make_bundle(tmp_path / "bundle", task), tmp_path / "data").value == 1


def test_two_towers_without_any_labels_are_judged_by_their_vectors(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "zero-shot-image-classification")
    data = unlabelled(colors(tmp_path / "data", task="zero-shot-image-classification", labels=()))
    found = evaluate(Pipeline.load(bundle), data)
    assert (found.metric, found.value) == (COSINE, pytest.approx(1))


def test_data_of_other_classes_is_refused(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", {"red": 2, "purple": 2})
    with pytest.raises(DataError, match="'purple'"):
        evaluate_bundle(make_bundle(tmp_path / "bundle"), tmp_path / "data")


def test_the_base_install_is_enough() -> None:
    heavy = ["torch", "transformers", "onnx", "nncf", "pyarrow", "datasets", "matplotlib", "scipy", "pandas"]
    code = f"import edgevlm.evaluation.evaluation, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- real data --------------------------------------------------------------------------------------------


def resnet(assets: Path, name: str) -> Pipeline:
    card = json.loads((assets / f"models/{name}.json").read_text())
    processing = ImageProcessing(
        input_name=card["input"]["name"],
        height=32,
        width=32,
        steps=(
            Resize(height=32, width=32),
            Rescale(factor=1 / 255),
            Normalize(mean=tuple(card["input"]["mean"]), std=tuple(card["input"]["std"])),
        ),
    )
    session = load_backend("onnxruntime").open(assets / f"models/{name}.onnx", SessionOptions(n_threads=1))
    return Pipeline.from_parts(
        task="image-classification",
        processing=Processing(image=processing),
        sessions={"model": session},
        labels=card["classes"],
    )


@pytest.mark.assets
def test_resnets_on_cifar10_equal_a_plain_loop(assets: Path, tmp_path: Path) -> None:
    from PIL import Image

    small, large = resnet(assets, "resnet20-cifar10"), resnet(assets, "resnet56-cifar10")
    whole = read_data_set(assets / "data/cifar10-sample", labels=small.labels, task="image-classification")
    data = whole.only(whole.samples[::4])
    found = {name: evaluate(each, data, folder=tmp_path, batch=50) for name, each in (("20", small), ("56", large))}

    root = assets / "data/cifar10-sample/images"
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = np.stack([(np.array(Image.open(root / s.name)) / 255 - mean) / std for s in data.samples])
    session = load_backend("onnxruntime").open(assets / "models/resnet56-cifar10.onnx", SessionOptions(n_threads=1))
    logits = session.run({"image": pixels.transpose(0, 3, 1, 2).astype(np.float32)})["logits"]
    right = logits.argmax(axis=1) == np.array([s.label for s in data.samples])
    assert found["56"].scores.tolist() == right.astype(float).tolist()
    assert 0.75 < found["56"].value < 0.9
    assert found["56"].others["top-5"] > 0.95

    drop = compare_evaluations(found["20"], found["56"])
    assert drop.value == pytest.approx(found["56"].value - found["20"].value)
    assert drop.low < drop.value < drop.high
    assert len(list(tmp_path.iterdir())) == 1, "one set of pixels serves both"


def relabelled(bundle: Path, *labels: str) -> Path:
    """The bundle with other names for its classes."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["labels"] = list(labels)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


def test_bundles_of_other_classes_are_not_compared(tmp_path: Path) -> None:
    colors(tmp_path / "data")
    first, second = (make_bundle(tmp_path / name) for name in ("first", "second"))
    both = evaluate_bundles([first, second], tmp_path / "data")
    assert [each.value for each in both] == [1.0, 1.0] and both[0].drop is None and both[1].drop is not None
    relabelled(first, "blue", "green", "red")
    with pytest.raises(UsageError, match=r"The classes of '.*first' are not those that '.*second' is judged by"):
        evaluate_bundles([first, second], tmp_path / "data")


def test_vectors_of_another_length_are_judged_by_classes_alone(tmp_path: Path) -> None:
    data = colors(tmp_path / "data")
    longer = evaluate(extractor(lambda pixels: np.repeat(mean_color(pixels), 2, axis=1)), data)
    found = evaluate(extractor(mean_color), data, reference=longer)
    assert found.metric == longer.metric == NEAREST and COSINE not in found.others
    assert compare_evaluations(found, longer).value == 0
    bare = unlabelled(data)
    reference = evaluate(extractor(lambda pixels: np.repeat(mean_color(pixels), 2, axis=1)), bare)
    with pytest.raises(UsageError, match=r"Answers of \[3\] and \[6\] values cannot be compared"):
        evaluate(extractor(mean_color), bare, reference=reference)
