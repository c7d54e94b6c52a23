from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgevlm.errors import EdgeVLMError, ModelError, UsageError
from edgevlm.ingest import read_model
from edgevlm.ingest.card import Card, CardInput, read_card
from edgevlm.runtime.spec import CenterCrop, FlipChannels, Normalize, Rescale, Resize
from tests.ingest.layouts import write_card, write_json, write_onnx


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_card(tmp_path / "net.card.toml")
    return write_onnx(tmp_path / "net.onnx")


def refused(kind: type[EdgeVLMError], path: Path, **kwargs: Any) -> EdgeVLMError:
    with pytest.raises(EdgeVLMError) as caught:
        read_model(str(path), **kwargs)
    assert type(caught.value) is kind
    assert caught.value.hint
    return caught.value


def test_a_file_and_its_card(file: Path):
    model = read_model(str(file))
    assert (model.name, model.task, model.family) == ("net", "image-classification", "")
    assert model.labels == ("red", "green", "blue")
    assert model.graphs[0].inputs[0].name == "pixel_values"
    assert model.graphs[0].inputs[0].shape == ("batch", 3, 8, 8)
    assert model.graphs[0].outputs == ("logits",)
    assert model.source.options == {"inputs": {"pixel_values": "image"}, "outputs": {"logits": "scores"}}
    assert model.processing.image.steps == (Resize(height=8, width=8), Rescale(factor=1 / 255))


def test_a_json_card_says_the_same_as_toml(file: Path, tmp_path: Path):
    card = write_json(tmp_path / "other.json", {"task": "image-classification", "labels": ["red", "green", "blue"]})
    assert read_model(str(file), card=card) == read_model(str(file))


def test_every_key_of_a_card(file: Path, tmp_path: Path):
    (tmp_path / "names.txt").write_text("a\nb\nc\n", encoding="utf-8")
    card = write_card(
        tmp_path / "whole.toml",
        """
        task = "image-classification"
        name = "mine"
        licence = "MIT"
        source = "github:me/mine"
        labels = "names.txt"
        [input]
        name = "image"
        height = 8
        width = 8
        channel_order = "bgr"
        resize = "shortest_edge"
        resize_to = 10
        resample = "bicubic"
        scale = 1.0
        mean = [103.5, 116.3, 123.7]
        std = [57.4, 57.1, 58.4]
        [outputs]
        logits = "flat"
        """,
    )
    model = read_model(str(file), card=card)
    assert (model.name, model.labels, model.source.licence) == ("mine", ("a", "b", "c"), "MIT")
    assert model.source.options["outputs"] == {"logits": "flat"}, "any tensor of the graph may be named"
    assert model.processing.image.steps == (
        Resize(shortest_edge=10, resample="bicubic"),
        CenterCrop(height=8, width=8),
        Rescale(factor=1.0),
        FlipChannels(),
        Normalize(mean=(103.5, 116.3, 123.7), std=(57.4, 57.1, 58.4)),
    )


def test_stretching_past_the_input_is_cropped(file: Path, tmp_path: Path):
    text = 'task = "image-classification"\n[input]\nresize_to = 12\n'
    steps = read_model(str(file), card=write_card(tmp_path / "c.toml", text)).processing.image.steps
    assert steps[:2] == (Resize(height=12, width=12), CenterCrop(height=8, width=8))


def test_a_free_size_is_the_cards_and_scales(tmp_path: Path):
    file = write_onnx(tmp_path / "free.onnx", size="s")
    card = write_card(tmp_path / "free.card.toml")
    assert "leaves the height of its input open" in refused(ModelError, file).message
    size = "[input]\nheight = 8\nwidth = 8\nresize_to = 10\n"
    write_card(card, f'task = "image-classification"\n{size}')
    assert read_model(str(file), image_size=16).processing.image.steps[0] == Resize(height=20, width=20)


def test_a_fixed_size_stays(file: Path, tmp_path: Path):
    assert "is of one size" in refused(ModelError, file, image_size=16).hint
    card = write_card(tmp_path / "c.toml", 'task = "image-classification"\n[input]\nheight = 9\n')
    assert "its card says 9" in refused(ModelError, file, card=card).message


def test_the_digest_follows_the_weights_and_the_card(file: Path, tmp_path: Path):
    before = read_model(str(file)).source.digest
    card = write_card(tmp_path / "c.toml", 'task = "image-classification"\n[input]\nscale = 1.0\n')
    assert read_model(str(file), card=card).source.digest != before
    write_onnx(file, weight=2.0)
    assert read_model(str(file)).source.digest != before


@pytest.mark.parametrize(
    ("text", "kind", "message", "hint"),
    [
        ("", UsageError, "missing required field `task`", ""),
        ("task = ", UsageError, "is not TOML", ""),
        ('task = "image-clasification"', UsageError, "is no task of edgevlm", "'image-classification'"),
        ('task = "zero-shot-image-classification"', UsageError, "needs a Hugging Face checkpoint", ""),
        ('task = "image-classification"\nlabel = []', UsageError, "unknown field `label`", "'labels'"),
        ('task = "image-classification"\n[input]\nmeen = 1', UsageError, "unknown field `meen`", "'mean'"),
        ('task = "image-classification"\n[input]\nstd = [1, 0, 1]', UsageError, "has std", ""),
        ('task = "image-classification"\n[input]\nstd = [1, 1]', UsageError, "is wrong", ""),
        ('task = "image-classification"\n[input]\nname = "imag"', ModelError, "no input 'imag'", "'image'"),
        ('task = "image-classification"\n[outputs]\nlogit = "x"', UsageError, "the output 'logit'", "'logits'"),
        ('task = "image-classification"\n[outputs]\nlogits = "score"', ModelError, "no tensor 'score'", "'scores'"),
        ('task = "image-classification"\nlabels = "none.txt"', UsageError, "cannot be read", "'labels'"),
        ('task = "image-classification"\nlabels = ["a"]', UsageError, "1 labels", ""),
        (
            'task = "image-classification"\n[input]\nresize = "shortest_edge"\nresize_to = 4',
            ModelError,
            "shortest edge of 4",
            "resize_to",
        ),
    ],
)
def test_a_card_that_is_wrong(file: Path, tmp_path: Path, text: str, kind: type[EdgeVLMError], message: str, hint: str):
    error = refused(kind, file, card=write_card(tmp_path / "wrong.toml", text))
    assert message in error.message
    assert hint in error.hint


def test_no_card_and_no_file(tmp_path: Path):
    file = write_onnx(tmp_path / "net.onnx")
    error = refused(ModelError, file)
    assert "has no card" in error.message
    assert "net.card.toml" in error.hint
    assert "There is no file" in refused(UsageError, tmp_path / "ned.onnx").message
    assert "net.onnx" in refused(UsageError, tmp_path / "ned.onnx").hint
    assert "cannot be read" in refused(UsageError, file, card="nowhere.toml").message
    assert "cannot be read" in refused(UsageError, file, card="nowhere.json").message
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    assert "is not JSON" in refused(UsageError, file, card=tmp_path / "bad.json").message


def test_another_task_or_labels_than_the_cards(file: Path, tmp_path: Path):
    assert "does image-classification" in refused(UsageError, file, task="image-feature-extraction").message
    assert read_model(str(file), labels=("x", "y", "z")).labels == ("x", "y", "z")
    assert "2 labels" in refused(UsageError, file, labels=("x", "y")).message
    tower = write_card(tmp_path / "tower.toml", 'task = "image-feature-extraction"')
    assert read_model(str(file), card=tower).graphs[0].outputs == ("image_embeds",)
    assert "has none" in refused(UsageError, file, card=tower, labels=("x",)).message


@pytest.mark.parametrize("n_bytes", [0, 10, 100])
def test_a_truncated_file(file: Path, n_bytes: int):
    file.write_bytes(file.read_bytes()[:n_bytes])
    assert "is not a whole ONNX file" in refused(ModelError, file).message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opset": 999}, "has opset 999"),
        ({"ir_version": 999}, "has ONNX IR version 999"),
        ({"op": "Frobnicate"}, "has the operator 'Frobnicate' (node 'pool')"),
        ({"softmax": True}, "comes out of a Softmax"),
    ],
)
def test_a_file_that_cannot_be_used(file: Path, changes: dict[str, Any], message: str):
    assert message in refused(ModelError, write_onnx(file, **changes)).message


def test_an_input_that_is_no_picture(file: Path):
    import onnx

    proto = onnx.load(file)
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(proto, file)
    assert "float [n, 1, 8, 8]" in refused(ModelError, file).message
    proto.graph.input.append(onnx.helper.make_tensor_value_info("mask", 1, [1]))
    onnx.save(proto, file)
    assert "has the inputs image, mask" in refused(ModelError, file).message
    named = write_card(file.with_name("c.toml"), 'task = "image-classification"\n[input]\nname = "image"')
    assert "takes more than a picture: mask" in refused(ModelError, file, card=named).message


def test_several_outputs_are_mapped_by_the_card(file: Path):
    import onnx

    proto = onnx.load(file)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("flat", 1, ["n", 3]))
    onnx.save(proto, file)
    assert "has the outputs scores, flat" in refused(ModelError, file).message


def test_external_data(tmp_path: Path):
    write_card(tmp_path / "net.card.toml")
    file = write_onnx(tmp_path / "net.onnx", external=True)
    before = read_model(str(file)).source.digest
    data = tmp_path / "net.onnx.data"
    data.write_bytes(data.read_bytes()[::-1])
    assert read_model(str(file)).source.digest != before, "the weights lie in the data file"
    data.unlink()
    assert "keeps weights in 'net.onnx.data', which is not beside it" in refused(ModelError, file).message


def test_external_data_elsewhere(tmp_path: Path):
    import onnx

    write_card(tmp_path / "net.card.toml")
    file = write_onnx(tmp_path / "net.onnx", external=True)
    proto = onnx.load(file, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "../secret"
    file.write_bytes(proto.SerializeToString())
    assert "outside its own folder" in refused(ModelError, file).message


def test_the_documented_card_is_a_card(tmp_path: Path):
    text = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    card = read_card(write_card(tmp_path / "card.toml", text.split("```toml\n")[1].split("```")[0]))
    assert card.outputs == {"logits": "scores"}
    documented = set(Card.__struct_fields__) | set(CardInput.__struct_fields__)
    assert all(name in text for name in documented)
