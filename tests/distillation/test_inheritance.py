from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgevlm.distillation.students import load_student
from edgevlm.distillation.students.inheritance import inherit_weights
from edgevlm.families.loading import load_module
from edgevlm.ingest import read_model
from edgevlm.model import Model
from tests.distillation.teachers import classifier, said
from tests.families.checkpoints import checkpoint, write_checkpoint

TEXT = {**checkpoint("CLIPModel").config["text_config"], "max_position_embeddings": 8}


def deep_teacher(folder: Path, **text: Any) -> Model:
    return read_model(str(write_checkpoint("CLIPModel", folder, text_config={**TEXT, **text})))


def test_evenly_spaced_layers_of_the_text_tower(tmp_path: Path):
    teacher = deep_teacher(tmp_path, num_hidden_layers=8)
    student: Any = load_student("mobilevit-xxs").build(teacher)
    theirs = load_module(teacher)
    said_of_it = inherit_weights(student, theirs)
    assert said_of_it[0] == "The text tower's 3 layers are the teacher's 1, 5, 8 of 8."
    assert any("logit scale" in sentence for sentence in said_of_it)
    assert any("text_projection.weight" in sentence for sentence in said_of_it)
    ours = student.text_model.encoder.layers
    for layer, i in zip(ours, (0, 4, 7), strict=True):
        wanted = theirs.text_model.encoder.layers[i].state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in layer.state_dict().items())
    for name in ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight"):
        assert torch.equal(student.text_model.state_dict()[name], theirs.text_model.state_dict()[name])
    assert torch.equal(student.logit_scale, theirs.logit_scale)
    assert all(parameter.requires_grad for parameter in student.parameters()), "the copy is trained, the teacher is not"


def test_shorter_texts_take_the_first_positions(tmp_path: Path):
    student: Any = load_student("mobilevit-xxs").build(deep_teacher(tmp_path / "a", max_position_embeddings=6))
    theirs = load_module(deep_teacher(tmp_path / "b"))
    said_of_it = inherit_weights(student, theirs)
    assert any("position_embedding.weight (its first 6 of 8 rows)" in sentence for sentence in said_of_it)
    positions = student.text_model.embeddings.position_embedding.weight
    assert torch.equal(positions, theirs.text_model.embeddings.position_embedding.weight[:6])


def test_nothing_is_taken_from_a_tower_of_another_width_or_kind(tmp_path: Path):
    student: Any = load_student("mobilevit-xxs").build(deep_teacher(tmp_path / "a"))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    wider = load_module(deep_teacher(tmp_path / "b", hidden_size=32))
    assert inherit_weights(student, wider) == ("From the teacher's logit scale: logit_scale.",)
    after = student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "logit_scale")
    vit = classifier(tmp_path / "c")
    own = load_student("mobilevit-xxs").build(vit)
    assert inherit_weights(own, load_module(vit)) == ()


def test_a_larger_tower_of_the_same_kind_gives_what_is_of_the_same_shape():
    teacher = said("image-classification", labels=("a", "b"))
    small, large = (load_student(name).build(teacher, seed=i) for i, name in enumerate(("mobilevit-xs", "mobilevit-s")))
    own, theirs = small.state_dict(), large.state_dict()
    name = "mobilevit.conv_stem.convolution.weight"
    assert not torch.equal(own[name], theirs[name])
    (sentence,) = inherit_weights(small, large)
    n_alike = sum(
        key in theirs and theirs[key].shape == value.shape
        for key, value in own.items()
        if key.startswith("mobilevit.") and value.is_floating_point()
    )
    assert f"image tower: {n_alike} of " in sentence
    assert torch.equal(small.state_dict()[name], theirs[name])
    twin = load_student("mobilevit-s").build(teacher, seed=5)
    inherit_weights(twin, large)
    shared = [key for key in theirs if key.startswith("mobilevit.")]
    assert all(torch.equal(twin.state_dict()[key], theirs[key]) for key in shared)
