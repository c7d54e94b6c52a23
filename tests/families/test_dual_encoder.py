"""Two towers of any make: each pair goes to ONNX and stays equal; what is not known is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgevlm.errors import ModelError
from edgevlm.export import export_graph, scoring_of
from edgevlm.ingest import read_model
from edgevlm.plan import TEXT_ENCODER
from tests.families.checkpoints import checkpoint, write_checkpoint
from tests.families.samples import samples_of

TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {**TOWER, "image_size": 64, "patch_size": 16}
VISION: dict[str, dict[str, Any]] = {
    "mobilevitv2": {
        "image_size": 64,
        "width_multiplier": 0.25,
        "n_attn_blocks": [1, 1, 1],
        "base_attn_unit_dims": [8, 8, 8],
        "hidden_size": 128,
    },
    "vit": VIT,
    "clip_vision_model": VIT,
}
TEXT: dict[str, dict[str, Any]] = {
    "clip_text_model": checkpoint("VisionTextDualEncoderModel").config["text_config"],
    "bert": {**TOWER, "vocab_size": 64, "max_position_embeddings": 8, "pad_token_id": 0},
}


def write(folder: Path, vision: str, text: str) -> Path:
    parts = {
        "vision_config": {**VISION[vision], "model_type": vision},
        "text_config": {**TEXT[text], "model_type": text},
    }
    return write_checkpoint("VisionTextDualEncoderModel", folder, **parts)


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ("clip_vision_model", "clip_text_model"),
        pytest.param("vit", "bert", marks=pytest.mark.slow),
        pytest.param("mobilevitv2", "clip_text_model", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_tower_is_equal_after_export(tmp_path: Path, vision: str, text: str):
    model = read_model(str(write(tmp_path / "checkpoint", vision, text)))
    assert model.family == "dual_encoder"
    image, texts = model.graphs
    for graph in (image, texts):
        made = export_graph(model, graph.name, batch=None, out=tmp_path, samples=samples_of(model, graph))
        assert 0 <= made.proof.max_relative_error < 5e-5
        assert made.outputs[0].shape == ("batch", 16)
    assert made.inputs[0].shape == ("batch", "sequence"), "at its own length, which the export proved"
    assert len(made.inputs) == (2 if text == "bert" else 1)
    scoring = scoring_of(model)
    assert scoring is not None
    assert scoring.activation == "softmax"
    assert scoring.scale == pytest.approx(2.718281828**2.6592, rel=1e-4)


def test_the_image_tower_alone(tmp_path: Path):
    folder = write(tmp_path / "checkpoint", "vit", "bert")
    model = read_model(str(folder), task="image-feature-extraction")
    (graph,) = model.graphs
    assert (graph.name, graph.outputs) == ("model", ("image_embeds",))


@pytest.mark.parametrize(("vision", "is_refused"), [("mobilevitv2", False), ("vit", True)])
def test_the_image_tower_says_which_sizes_there_are(tmp_path: Path, vision: str, is_refused: bool):
    folder = str(write(tmp_path / "checkpoint", vision, "clip_text_model"))
    assert read_model(folder, image_size=96).processing.image.height == 96
    if is_refused:
        with pytest.raises(ModelError, match="takes 64×64") as caught:
            read_model(folder, image_size=100)
        assert "16" in caught.value.hint
    else:
        assert read_model(folder, image_size=100).graphs[0].inputs[0].shape[2:] == (100, 100)


@pytest.mark.parametrize("key", ["vision_config", "text_config"])
def test_a_tower_of_another_kind_is_refused(tmp_path: Path, key: str):
    folder = write(tmp_path / "checkpoint", "vit", "bert")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config[key]["model_type"] = "perceiver"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="'perceiver'") as caught:
        read_model(str(folder))
    assert "bert" in caught.value.hint or "mobilevit" in caught.value.hint


def test_texts_are_read_at_the_length_of_the_tower(tmp_path: Path):
    model = read_model(str(write(tmp_path / "checkpoint", "clip_vision_model", "bert")))
    assert model.processing.text is not None
    assert model.processing.text.max_length == 8
    assert model.graphs[1].name == TEXT_ENCODER
