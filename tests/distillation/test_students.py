from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from edgevlm.data.shapes import Pictures
from edgevlm.distillation.step import Batch
from edgevlm.distillation.students import STUDENTS, load_student, student_names
from edgevlm.errors import ModelError, StoreError, UsageError
from edgevlm.export import export_graph, scoring_of
from edgevlm.families import FEATURES
from edgevlm.families.loading import load_module
from edgevlm.ingest import read_model
from edgevlm.model import Model
from edgevlm.plan import TEXT_ENCODER
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.image import preprocess
from edgevlm.runtime.spec import Letterbox, SessionOptions
from edgevlm.runtime.text import load_tokenizer, tokenize
from tests.distillation.teachers import classifier, said, tower, with_steps
from tests.families.checkpoints import write_checkpoint
from tests.families.samples import samples_of

XXS = "mobilevit-xxs"
IMAGE_OUTPUTS = frozenset({"image_embeds", "image_features"})
TEXT_OUTPUTS = frozenset({"text_embeds", "text_features"})
_EMBEDS = ("image_embeds", "text_embeds")
PICTURES = torch.from_numpy(np.random.default_rng(5).normal(size=(3, 3, 64, 64)).astype(np.float32))


def settled(module: Any) -> Any:
    """Batch norms with statistics of their own, as after a training."""
    run = getattr(module, "get_image_features", module)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = None
    with torch.no_grad():
        module.train()
        run(pixel_values=torch.from_numpy(np.random.default_rng(0).normal(size=(8, 3, 64, 64)).astype(np.float32)))
    return module.eval()


@pytest.fixture(scope="module")
def demo() -> Model:
    return read_model("demo")


# --- the table --------------------------------------------------------------------------------------------


def test_every_line_of_the_table_is_a_student_of_that_name():
    assert student_names() == tuple(STUDENTS)
    assert [load_student(name).name for name in STUDENTS] == list(STUDENTS)


def test_the_nearest_name_is_suggested():
    with pytest.raises(UsageError, match="no student 'mobilevit-xss'") as caught:
        load_student("mobilevit-xss")
    assert "'mobilevit-xs" in caught.value.hint


def test_the_table_loads_no_torch():
    code = (
        "import sys; from edgevlm.distillation.students import STUDENTS, load_student; "
        "[load_student(name) for name in STUDENTS]; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# As arXiv:2110.02178 and arXiv:2206.02680 give them, with 1000 classes.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("mobilevit-xxs", 1.3),
        ("mobilevit-xs", 2.3),
        ("mobilevit-s", 5.6),
        ("mobilevitv2-0.5", 1.4),
        ("mobilevitv2-0.75", 2.9),
        ("mobilevitv2-1.0", 4.9),
    ],
)
def test_sizes_are_those_of_the_papers(name: str, millions: float):
    module = load_student(name).build(said("image-classification"), n_classes=1000)
    n_parameters = sum(parameter.numel() for parameter in module.parameters())
    assert round(n_parameters / 1e6, 1) == millions


# --- two towers -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [XXS, "mobilevitv2-0.5"])
def test_two_towers_run_in_the_runtime_as_in_torch(demo: Model, tmp_path: Path, name: str):
    student = load_student(name)
    module = settled(student.build(demo))
    student.save(module, tmp_path / "student", demo)
    model = read_model(str(tmp_path / "student"))
    assert (model.task, model.family) == (demo.task, "dual_encoder")
    assert model.processing == demo.processing
    assert model.warnings == ()
    pictures = [Image.fromarray(picture.image) for picture in Pictures(n=3, seed=11)]
    texts = ["a photo of a red circle", "a blue star", ""]
    text = model.processing.text
    assert text is not None
    ids = tokenize(texts, load_tokenizer(Path(model.tokenizer_file), text), text)["input_ids"]
    pixels = np.stack([preprocess(picture, model.processing.image) for picture in pictures])
    batch = Batch(pixel_values=torch.from_numpy(pixels), input_ids=torch.from_numpy(ids))
    with torch.no_grad():
        expected = student.outputs(module, batch, frozenset({"image_embeds", "text_embeds", "logit_scale"}))
    for graph, inputs in zip(model.graphs, ({"pixel_values": pixels}, {"input_ids": ids}), strict=True):
        made = export_graph(model, graph.name, batch=None, out=tmp_path, samples=samples_of(model, graph))
        session = load_backend("onnxruntime").open(tmp_path / made.file, SessionOptions(n_threads=1))
        (output,) = graph.outputs
        got, wanted = session.run(inputs)[output], expected[output].numpy()
        assert np.abs(wanted).max() > 0.01
        assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
        if graph.name == TEXT_ENCODER:
            assert made.inputs[0].shape == ("batch", "sequence"), "texts at their own length"
    scoring = scoring_of(model)
    assert scoring is not None
    assert scoring.scale == pytest.approx(float(expected["logit_scale"]))


@pytest.mark.slow
def test_a_student_is_compiled_into_a_bundle(demo: Model, tmp_path: Path):
    import edgevlm
    from tests.fast import FAST

    student = load_student(XXS)
    student.save(settled(student.build(demo)), tmp_path / "student", demo)
    made = edgevlm.compile(str(tmp_path / "student"), output=tmp_path / "bundle", **FAST)
    assert made.manifest.task == demo.task
    assert made.manifest.components[0].name == "image_encoder"


def test_towers_meet_in_the_teachers_space_and_read_its_tokens(demo: Model):
    student = load_student("mobilevit-s")
    module: Any = student.build(demo)
    config = module.config
    assert config.projection_dim == 64
    # The demo's text tower is narrower and shallower than the student's would be.
    text = config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (64, 2, 4)
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (1, 31, 0)
    assert (text.vocab_size, text.max_position_embeddings) == (32, 16)
    ids = torch.tensor([[1, 9, 31, 0, 0, 0], [1, 9, 10, 11, 12, 31]])
    batch = Batch(pixel_values=PICTURES, input_ids=ids)
    with torch.no_grad():
        got = student.outputs(module, batch, IMAGE_OUTPUTS | TEXT_OUTPUTS | {"logit_scale"})
    shapes = {name: tuple(value.shape) for name, value in got.items()}
    assert shapes == {
        "image_embeds": (3, 64),
        "image_features": (3, 640, 2, 2),
        "text_embeds": (2, 64),
        "text_features": (2, 6, 64),
        "logit_scale": (),
    }
    assert float(got["logit_scale"]) == pytest.approx(np.exp(2.6592), rel=1e-4)
    with torch.no_grad():
        alone = student.outputs(module, Batch(pixel_values=PICTURES, input_ids=ids[:1, :3]), TEXT_OUTPUTS)
    assert torch.allclose(alone["text_embeds"], got["text_embeds"][:1], atol=1e-6), "padding is not seen"


def test_only_the_tower_that_is_asked_for_runs(demo: Model, monkeypatch: pytest.MonkeyPatch):
    student = load_student(XXS)
    module: Any = student.build(demo)
    batch = Batch(pixel_values=PICTURES, input_ids=torch.tensor([[1, 9, 31]]))
    ran: list[str] = []
    for tower_name in ("vision_model", "text_model"):
        part = getattr(module, tower_name)
        part.register_forward_pre_hook(lambda *_, name=tower_name: ran.append(name))
    student.outputs(module, batch, frozenset({"logit_scale"}))
    assert ran == []
    student.outputs(module, batch, frozenset({"text_embeds"}))
    assert ran == ["text_model"]
    student.outputs(module, batch, frozenset({"image_features"}))
    assert ran == ["text_model", "vision_model"]


def test_outputs_carry_gradients_to_every_weight(demo: Model):
    student = load_student(XXS)
    # At 64×64 the last block sees one patch, over which attention is the identity: nothing to learn for its queries.
    module: Any = student.build(demo, image_size=128).train()
    pictures = torch.nn.functional.interpolate(PICTURES, 128)
    batch = Batch(pixel_values=pictures, input_ids=torch.tensor([[1, 9, 31], [1, 4, 31]]))
    got = student.outputs(module, batch, frozenset({"image_embeds", "text_embeds", "logit_scale"}))
    image = torch.nn.functional.normalize(got["image_embeds"])
    text = torch.nn.functional.normalize(got["text_embeds"])
    ((image @ text.T * got["logit_scale"]) ** 2).sum().backward()
    untouched = [name for name, value in module.named_parameters() if value.grad is None or not value.grad.any()]
    assert untouched == []


@pytest.mark.parametrize("architecture", ["SiglipModel", "VisionTextDualEncoderModel"])
def test_other_two_towers_teach_too(tmp_path: Path, architecture: str):
    teacher = read_model(str(write_checkpoint(architecture, tmp_path / "teacher")))
    student = load_student(XXS)
    module: Any = student.build(teacher)
    assert module.config.text_config.eos_token_id == 3
    ids = torch.tensor([[1, 4, 3, 0]])
    with torch.no_grad():
        got = student.outputs(module, Batch(pixel_values=PICTURES, input_ids=ids), frozenset(_EMBEDS))
    assert {name: tuple(value.shape) for name, value in got.items()} == {
        "image_embeds": (3, 16),
        "text_embeds": (1, 16),
    }


def test_a_tokenizer_that_marks_only_the_end(demo: Model, tmp_path: Path):
    """As SigLIP's does."""
    tokenizer = json.loads(Path(demo.tokenizer_file).read_text(encoding="utf-8"))
    del tokenizer["post_processor"]["single"][0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    teacher = msgspec.structs.replace(demo, tokenizer_file=str(tmp_path / "tokenizer.json"))
    config: Any = load_student(XXS).build(teacher).config
    assert (config.text_config.bos_token_id, config.text_config.eos_token_id) == (None, 31)


# --- one tower --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [XXS, "mobilevitv2-0.5"])
def test_a_classifier_has_the_teachers_classes(tmp_path: Path, name: str):
    teacher = classifier(tmp_path / "teacher")
    student = load_student(name)
    module = settled(student.build(teacher, image_size=64))
    student.save(module, tmp_path / "student", teacher)
    model = read_model(str(tmp_path / "student"))
    assert model.labels == ("a", "b", "c", "d", "e")
    assert model.task == "image-classification"
    assert model.graphs[0].inputs[0].shape == ("batch", 3, 64, 64)
    names = frozenset({"logits", "image_features"})
    with torch.no_grad():
        got = student.outputs(module, Batch(pixel_values=PICTURES), names)
        again = load_module(model)(pixel_values=PICTURES).logits
    assert set(got) == names
    assert tuple(got["image_features"].shape[2:]) == (2, 2)
    assert torch.allclose(got["logits"], again, atol=1e-6)
    assert got["logits"].std() > 1e-3


@pytest.mark.parametrize("name", [XXS, "mobilevitv2-0.5"])
def test_an_image_tower_gives_what_it_is_compiled_to(tmp_path: Path, name: str):
    teacher = tower(tmp_path / "teacher")
    student = load_student(name)
    module = settled(student.build(teacher, image_size=64))
    student.save(module, tmp_path / "student", teacher)
    model = read_model(str(tmp_path / "student"))
    assert (model.task, model.family) == ("image-feature-extraction", "image_tower")
    with torch.no_grad():
        got = student.outputs(module, Batch(pixel_values=PICTURES), IMAGE_OUTPUTS)
        again = load_module(model)(pixel_values=PICTURES)
    assert torch.allclose(got["image_embeds"], again.pooler_output, atol=1e-6)
    assert torch.allclose(got["image_features"], again.last_hidden_state, atol=1e-5)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_callers_alone():
    student, teacher = load_student(XXS), said("image-classification", labels=("a", "b"))
    torch.manual_seed(3)
    first = student.build(teacher, seed=1).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    second, other = (student.build(teacher, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize("name", [name for name in STUDENTS if FEATURES in load_student(name).tasks])
def test_an_untrained_student_lets_signals_through(name: str):
    """As Transformers initializes MobileViT, what comes of an untrained one is below 1e-42."""
    student = load_student(name)
    module = student.build(said("image-feature-extraction"))
    with torch.no_grad():
        features = student.outputs(module, Batch(pixel_values=PICTURES), IMAGE_OUTPUTS)["image_features"]
    assert 0.05 < float(features.std()) < 50


# --- what is refused --------------------------------------------------------------------------------------


def test_a_task_that_it_cannot_learn():
    with pytest.raises(UsageError, match="cannot learn object-detection"):
        load_student(XXS).build(said("object-detection"))


def test_classes_that_nobody_knows():
    with pytest.raises(UsageError, match="has no labels"):
        load_student(XXS).build(said("image-classification"))
    with pytest.raises(UsageError, match="3 classes"):
        load_student(XXS).build(said("image-classification", labels=("a", "b")), n_classes=3)


def test_outputs_and_texts_that_are_not_there(demo: Model):
    student = load_student(XXS)
    batch = Batch(pixel_values=PICTURES)
    with pytest.raises(UsageError, match="no output 'logits' here"):
        student.outputs(student.build(demo), batch, frozenset({"logits"}))
    with pytest.raises(UsageError, match="asks for texts"):
        student.outputs(student.build(demo), batch, frozenset({"text_embeds"}))


def test_a_teacher_without_texts():
    with pytest.raises(UsageError, match="no text tower"):
        load_student(XXS).build(said("zero-shot-image-classification"))


def test_pictures_that_no_image_processor_prepares():
    teacher = with_steps(said("image-classification", labels=("a",)), Letterbox(height=64, width=64))
    with pytest.raises(UsageError, match=r"how 'said' prepares pictures: .*letterbox"):
        load_student(XXS).processing(teacher)


def test_a_size_that_is_none(demo: Model):
    with pytest.raises(UsageError, match="image size of 0"):
        load_student(XXS).build(demo, image_size=0)


def test_texts_without_an_end(demo: Model, tmp_path: Path):
    tokenizer = json.loads(Path(demo.tokenizer_file).read_text(encoding="utf-8"))
    tokenizer["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    teacher = msgspec.structs.replace(demo, tokenizer_file=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="no token of its own"):
        load_student(XXS).build(teacher)


# --- on disk ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_replaced_whole_and_nothing_else_is(tmp_path: Path):
    student, teacher = load_student(XXS), said("image-classification", labels=("a", "b"))
    for seed in (1, 2):
        student.save(student.build(teacher, seed=seed), tmp_path / "student", teacher)
    saved = load_module(read_model(str(tmp_path / "student"))).state_dict()
    wanted = student.build(teacher, seed=2).state_dict()
    assert all(torch.equal(saved[key], wanted[key]) for key in wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(StoreError, match="no checkpoint"):
        student.save(student.build(teacher), tmp_path / "mine", teacher)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
