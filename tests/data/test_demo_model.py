"""The demo model: it loads, it reads pictures and texts as documented, and it is as good as its log says."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from edgevlm.data.shapes import HELD_OUT_PAIRS, PROMPT_TEMPLATE, SHAPES, Pictures, class_names
from edgevlm.distillation.students.mobilevit import XXS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from edgevlm.data import train_demo  # noqa: E402 - needs torch
from edgevlm.data.train_demo import DEMO_MODEL  # noqa: E402
from edgevlm.distillation.students.tower import start_afresh  # noqa: E402

LOG = json.loads((DEMO_MODEL / "training_log.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model():
    return transformers.VisionTextDualEncoderModel.from_pretrained(DEMO_MODEL).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture
def small_teacher(monkeypatch):
    """A teacher that a test can wait for."""
    monkeypatch.setattr(train_demo, "TEACHER", XXS)


@pytest.fixture(scope="module")
def measured(model, tokenizer):
    return train_demo.evaluate_demo(model, tokenizer, seed=LOG["evaluation_seed"], n=1000)


def most_by_chance(*, n: int, n_choices: int) -> float:
    """The accuracy that guessing passes once in a thousand times: the binomial's 99.9th percentile, as a normal."""
    chance = 1 / n_choices
    return chance + 3.09 * math.sqrt(chance * (1 - chance) / n)


def test_new_pictures_of_pairs_seen(measured):
    assert measured["seen"].n == 1000
    assert measured["seen"].label >= 0.95


def test_pictures_of_pairs_never_shown(measured):
    assert measured["held_out"].n == 1000
    assert measured["held_out"].label >= 0.80


def test_labels_are_at_chance_where_values_are_shuffled(measured):
    assert measured["values_shuffled"].label <= most_by_chance(n=1000, n_choices=len(class_names()))


def test_shapes_are_at_chance_where_pixels_are_shuffled(measured):
    assert measured["pixels_shuffled"].shape <= most_by_chance(n=1000, n_choices=len(SHAPES))


def test_the_log_says_what_is_measured(measured):
    assert LOG["evaluation_seed"] != LOG["seed"]
    for name, accuracy in measured.items():
        assert LOG["teacher"]["accuracies"][name]["n"] == accuracy.n
        for part in ("label", "color", "shape"):
            # Another machine may round a near tie the other way.
            assert getattr(accuracy, part) == pytest.approx(LOG["accuracies"][name][part], abs=0.005), (name, part)


def test_an_untrained_model_passes_no_bar(model, tokenizer):
    torch.manual_seed(0)
    untrained = transformers.VisionTextDualEncoderModel(model.config).eval()
    start_afresh(untrained)
    accuracies = train_demo.evaluate_demo(untrained, tokenizer, seed=1, n=200)
    assert max(accuracies[name].label for name in ("seen", "held_out")) < 0.2


def test_loads_with_no_key_missing_or_left_over():
    _, report = transformers.VisionTextDualEncoderModel.from_pretrained(DEMO_MODEL, output_loading_info=True)
    assert not any(report.values()), report


def test_is_the_student_of_a_teacher_at_least_four_times_its_size(model):
    assert sum(each.numel() for each in model.parameters()) == LOG["n_parameters"]
    assert LOG["teacher"]["n_parameters"] >= 4 * LOG["n_parameters"]


def test_is_small_enough_to_commit():
    assert sum(path.stat().st_size for path in DEMO_MODEL.iterdir()) < 8 * 1024 * 1024


def test_tokenizer_knows_every_prompt_and_ends_it_by_the_highest_id(model, tokenizer):
    prompts = [PROMPT_TEMPLATE.format(label=name) for name in class_names()]
    ids = tokenizer(prompts)["input_ids"]
    end = model.config.text_config.eos_token_id
    assert end == tokenizer.eos_token_id == len(tokenizer) - 1 != 2
    assert all(row[0] == tokenizer.bos_token_id and row[-1] == end for row in ids)
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert len(set(map(tuple, ids))) == len(prompts)
    assert train_demo.demo_tokenizer()(prompts)["input_ids"] == ids


def test_padding_changes_no_text_embedding(model, tokenizer):
    text = PROMPT_TEMPLATE.format(label="red circle")
    with torch.inference_mode():
        short = model.get_text_features(**tokenizer([text], return_tensors="pt")).pooler_output
        padded = tokenizer([text], padding="max_length", return_tensors="pt")
        long = model.get_text_features(**padded).pooler_output
        unmasked = model.get_text_features(input_ids=padded["input_ids"]).pooler_output
    assert padded["input_ids"].shape[1] == train_demo.TEXT_LENGTH > 8
    torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unmasked, short, rtol=1e-4, atol=1e-5)


def test_image_processor_does_what_training_did():
    processor = transformers.AutoImageProcessor.from_pretrained(DEMO_MODEL)
    images = [shown.image for shown in Pictures(n=3, seed=9)]
    processed = processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processed, train_demo.pixel_values(images), rtol=0, atol=1e-5)


def test_a_larger_picture_is_brought_to_size_and_still_read(model, tokenizer):
    processor = transformers.AutoImageProcessor.from_pretrained(DEMO_MODEL)
    split = Pictures(n=60, seed=11, size=224)
    pixels = processor(images=[shown.image for shown in split], return_tensors="pt")["pixel_values"]
    texts = tokenizer([PROMPT_TEMPLATE.format(label=name) for name in class_names()], padding=True, return_tensors="pt")
    with torch.inference_mode():
        best = model(pixel_values=pixels, **texts).logits_per_image.argmax(dim=1)
    found = [class_names()[i] for i in best]
    assert np.mean([name == shown.label for name, shown in zip(found, split, strict=True)]) > 0.8


def test_the_teacher_is_shown_and_told_no_held_out_pair(monkeypatch, small_teacher):
    shown, named = [], []
    losses_of, text_embeds = train_demo.losses_of, train_demo._text_embeds

    def watch_pictures(model, tokenizer, batch, *, template):
        shown.extend((each.objects[0].color, each.objects[0].shape) for each in batch)
        return losses_of(model, tokenizer, batch, template=template)

    def watch_texts(model, tokenizer, texts):
        named.extend(texts)
        return text_embeds(model, tokenizer, texts)

    monkeypatch.setattr(train_demo, "losses_of", watch_pictures)
    monkeypatch.setattr(train_demo, "_text_embeds", watch_texts)
    train_demo.train(n_steps=2, seed=0)
    assert len(shown) == 2 * train_demo.BATCH_SIZE
    assert not set(shown) & set(HELD_OUT_PAIRS)
    assert any("red circle" in text for text in named)
    assert not any(f"{color} {shape}" in text for text in named for color, shape in HELD_OUT_PAIRS)


def test_the_same_seed_gives_the_same_weights(small_teacher):
    first, second, other = (train_demo.train(n_steps=2, seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_script_writes_a_whole_model_and_overwrites_none(tmp_path: Path, monkeypatch, capsys, small_teacher):
    monkeypatch.setattr(train_demo, "N_EVALUATED", 8)
    monkeypatch.setattr(train_demo, "N_PICTURES", 80)
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))
    output, work = tmp_path / "made", tmp_path / "work"
    options = ["--output", str(output), "--work", str(work), "--steps", "1", "--student-steps", "2", "--seed", "5"]
    train_demo.main(options)
    assert {path.name for path in output.iterdir()} == {path.name for path in DEMO_MODEL.iterdir()}
    written = json.loads((output / "training_log.json").read_text(encoding="utf-8"))
    assert (written["seed"], written["n_steps"], len(written["losses"])) == (5, 2, 2)
    assert (written["teacher"]["seed"], written["teacher"]["n_steps"]) == (5, 1)
    # The student's image tower is its own, its text tower the teacher's.
    student, teacher = (
        transformers.VisionTextDualEncoderModel.from_pretrained(folder).state_dict()
        for folder in (output, work / "seed-5" / "teacher-1")
    )
    for name, value in student.items():
        if name.startswith("text_") or name == "logit_scale":
            assert torch.equal(value, teacher[name]), name
    assert not torch.equal(student["visual_projection.weight"], teacher["visual_projection.weight"])
    with (work / "seed-5" / "pictures" / "labels.csv").open(encoding="utf-8") as file:
        assert not {tuple(row["label"].split()) for row in csv.DictReader(file)} & set(HELD_OUT_PAIRS)
    with pytest.raises(SystemExit) as exit_:
        train_demo.main(["--output", str(output)])
    assert exit_.value.code == 2
    assert "name a new folder" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if "unfinished" in path.name]
