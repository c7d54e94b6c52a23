"""Every architecture of every family, small and with random weights, goes to ONNX and stays equal to PyTorch."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from edgevlm.export import export_graph, scoring_of
from edgevlm.families import FAMILIES, family_of, load_family
from edgevlm.ingest import read_model
from tests.families.checkpoints import CHECKPOINTS, Tiny, write_checkpoint
from tests.families.samples import samples_of

# One of each kind at a free batch, one at a fixed batch; every other export is marked slow.
FAST_FREE = {"CLIPModel", "ResNetModel", "ViTForImageClassification"}
FAST_FIXED = {"ResNetModel"}
CLOSE = 5e-5  # half of what an export is allowed; the largest seen is 2.7e-5, in MobileNets of random weights


def matrix(fast: set[str]) -> list[object]:
    marks = {True: (), False: (pytest.mark.slow,)}
    return [pytest.param(tiny, id=str(tiny), marks=marks[tiny.architecture in fast]) for tiny in CHECKPOINTS]


def test_the_matrix_has_every_architecture():
    known = {name for family in FAMILIES for name in load_family(family).architectures}
    assert known == {tiny.architecture for tiny in CHECKPOINTS}


def test_every_architecture_is_documented():
    text = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8").lower()
    names = {tiny.architecture for tiny in CHECKPOINTS}
    # Of DINOv2WithRegistersForImageClassification the table says DINOv2, "also with registers".
    stems = {re.sub("(WithRegisters)?(ForImageClassification(WithTeacher)?|Model)$", "", name) for name in names}
    assert [stem for stem in sorted(stems) if not re.search(rf"\b{stem.lower()}", text)] == []


@pytest.mark.parametrize("tiny", CHECKPOINTS, ids=str)
def test_an_architecture_belongs_to_one_family(tiny: Tiny):
    assert family_of(tiny.architecture) == tiny.family
    assert sum(tiny.architecture in load_family(family).architectures for family in FAMILIES) == 1


@pytest.mark.parametrize("tiny", matrix(FAST_FREE))
def test_every_graph_is_equal_at_batches_that_were_not_traced(tiny: Tiny, tmp_path: Path):
    model = read_model(str(write_checkpoint(tiny.architecture, tmp_path / "checkpoint")))
    assert model.family == tiny.family
    for graph in model.graphs:
        made = export_graph(model, graph.name, batch=None, out=tmp_path, samples=samples_of(model, graph))
        assert made.proof.batches == (1, 3)
        assert 0 <= made.proof.max_relative_error < CLOSE
        assert [spec.name for spec in made.inputs] == [spec.name for spec in graph.inputs]
        assert [spec.name for spec in made.outputs] == list(graph.outputs)
        assert all(spec.shape[0] == "batch" for spec in (*made.inputs, *made.outputs))


@pytest.mark.parametrize("tiny", matrix(FAST_FIXED))
def test_every_graph_is_equal_at_a_fixed_batch(tiny: Tiny, tmp_path: Path):
    model = read_model(str(write_checkpoint(tiny.architecture, tmp_path / "checkpoint")))
    for graph in model.graphs:
        made = export_graph(model, graph.name, batch=2, out=tmp_path, samples=samples_of(model, graph))
        assert made.proof.batches == (2,)
        assert 0 <= made.proof.max_relative_error < CLOSE
        assert all(spec.shape[0] == 2 for spec in (*made.inputs, *made.outputs))


def test_two_towers_score_as_their_papers_say(tmp_path: Path):
    clip = scoring_of(read_model(str(write_checkpoint("CLIPModel", tmp_path / "clip"))))
    assert clip is not None
    assert (clip.scale, clip.bias, clip.activation) == (pytest.approx(math.exp(2.6592)), 0.0, "softmax")
    siglip = scoring_of(read_model(str(write_checkpoint("SiglipModel", tmp_path / "siglip"))))
    assert siglip is not None
    assert siglip.activation == "sigmoid"


def test_a_two_tower_checkpoint_gives_its_image_tower_alone(tmp_path: Path):
    folder = write_checkpoint("CLIPModel", tmp_path)
    (folder / "tokenizer.json").unlink()
    model = read_model(str(folder), task="image-feature-extraction")
    assert [graph.name for graph in model.graphs] == ["model"]
    assert model.graphs[0].outputs == ("image_embeds",)
    assert model.processing.text is None


def test_a_tower_saved_without_its_pooler_gives_the_class_token(tmp_path: Path):
    import numpy as np
    import transformers

    from edgevlm.export import open_source

    folder = write_checkpoint("ViTModel", tmp_path)
    vit = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)
    vit.save_pretrained(folder)
    model = read_model(str(folder))
    outputs = open_source(model, "model").run(samples_of(model, model.graphs[0]))
    assert np.array_equal(outputs["pooler_output"], outputs["last_hidden_state"][:, 0])
