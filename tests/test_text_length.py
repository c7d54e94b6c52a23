"""Texts at their own length: proven exact for towers that allow it, given up with a note for the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgevlm
from edgevlm.errors import ModelError, UsageError
from edgevlm.export import Exported, export_graph, open_source
from edgevlm.families.clip import Clip
from edgevlm.families.siglip import Siglip
from edgevlm.ingest import read_model
from edgevlm.model import Model
from edgevlm.plan import TEXT_ENCODER
from edgevlm.progress import Event, Note
from edgevlm.proof import relative_error
from edgevlm.quantization.calibration import collect_ranges
from edgevlm.quantization.post_training import prepare, quantize
from edgevlm.quantization.schemes import schemes_for
from edgevlm.runtime.backends import Session, load_backend
from edgevlm.runtime.spec import Array, SessionOptions, TextProcessing
from edgevlm.runtime.text import embed_texts, load_tokenizer, tokenize
from tests.families.checkpoints import checkpoint, write_checkpoint
from tests.families.samples import samples_of

WORDS = ("a", "photo", "of", "cat", "dog", "red", "blue", "unheard")
CLOSE = 2e-6  # what the order of additions moves in float32; the proof itself found 0.0 here


def export(model: Model, out: Path, progress: Any = lambda event: None, batch: int | None = None) -> Exported:
    samples = samples_of(model, model.graphs[1])
    return export_graph(model, TEXT_ENCODER, batch=batch, out=out, samples=samples, progress=progress)


def text_of(model: Model) -> TextProcessing:
    assert model.processing.text is not None
    return model.processing.text


class Tower:
    """A small CLIP's text tower: exported with a free length, and as it came."""

    def __init__(self, folder: Path) -> None:
        self.model = read_model(str(write_checkpoint("CLIPModel", folder / "checkpoint")))
        self.made = export(self.model, folder)
        self.file = folder / self.made.file
        self.session = open_graph(self.file)
        self.padded = text_of(self.model)
        self.own = msgspec.structs.replace(self.padded, padding="longest")

    def feeds(self, texts: list[str], spec: TextProcessing) -> dict[str, Array]:
        return tokenize(texts, load_tokenizer(Path(self.model.tokenizer_file), spec), spec)


def open_graph(file: Path) -> Session:
    return load_backend("onnxruntime").open(file, SessionOptions(n_threads=1))


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Tower:
    return Tower(tmp_path_factory.mktemp("tower"))


# --- a tower that allows it -------------------------------------------------------------------------------


def test_a_causal_tower_has_a_free_length_that_is_proven(tower: Tower):
    assert tower.made.inputs[0].shape == ("batch", "sequence")
    assert tower.made.outputs[0].shape == ("batch", 16)
    assert tower.made.notes == ()
    assert tower.made.proof.lengths == (2, 3, 4, 5, 6, 7, 8), "from the shortest to the longest that there can be"
    assert tower.made.proof.length_error is not None
    assert tower.made.proof.length_error < CLOSE


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join), min_size=1, max_size=40))
def test_a_text_has_the_same_embedding_in_any_company(tower: Tower, texts: list[str]):
    def embed(feeds: Any) -> Array:
        return tower.session.run(feeds)["text_embeds"]

    tokenizer = load_tokenizer(Path(tower.model.tokenizer_file), tower.own)
    together = embed_texts(texts, tokenizer, tower.own, embed)
    alone = np.concatenate([embed(tower.feeds([text], tower.own)) for text in texts])
    padded = embed(tower.feeds(texts, tower.padded))
    assert relative_error(together, alone) < CLOSE
    assert relative_error(together, padded) < CLOSE


def test_it_is_what_pytorch_gives_padded(tower: Tower):
    texts = ["", "a photo of a cat", "red " * 20]
    expected = open_source(tower.model, TEXT_ENCODER).run(tower.feeds(texts, tower.padded))["text_embeds"]
    for text, row in zip(texts, expected, strict=True):
        got = tower.session.run(tower.feeds([text], tower.own))["text_embeds"]
        assert relative_error(got, row[None]) < 1e-5


@pytest.mark.parametrize("method", ["dynamic", "minmax", "percentile"])
def test_int8_forms_keep_the_free_length(tower: Tower, tmp_path: Path, method: str):
    prepared = prepare(tower.file, tmp_path / "prepared.onnx")
    schemes = schemes_for(activation_sign="u8", op_counts={"MatMul": 1, "Gemm": 1})
    scheme = next(each for each in schemes if method in (each.method, each.calibration))
    texts = [" ".join(WORDS[: 1 + i % 6]) for i in range(11)]
    ranges = None
    if scheme.calibration is not None:
        feeds = [tower.feeds([text], tower.own) for text in texts]
        assert len({feed["input_ids"].shape for feed in feeds}) == 6, "each call has a length of its own"
        ranges = collect_ranges(prepared, feeds, scheme.calibration, tmp_path / "ranges.json")
    quantize(prepared, scheme, ranges=ranges, out=tmp_path / "int8.onnx")
    session = open_graph(tmp_path / "int8.onnx")
    assert session.inputs[0].shape == ("batch", "sequence")
    for text in ("", *texts):
        feeds = tower.feeds([text], tower.own)
        got, wanted = session.run(feeds)["text_embeds"], tower.session.run(feeds)["text_embeds"]
        assert np.sum(got * wanted) / np.linalg.norm(got) / np.linalg.norm(wanted) > 0.98


@pytest.mark.slow
def test_texts_can_be_given_one_length_that_is_shorter(tower: Tower, tmp_path: Path):
    samples = samples_of(tower.model, tower.model.graphs[1])
    made = export_graph(tower.model, TEXT_ENCODER, batch=None, out=tmp_path, samples=samples, text_length=5)
    assert made.inputs[0].shape == ("batch", 5)
    assert "5 tokens" in made.notes[0]
    session = open_graph(tmp_path / made.file)
    short = msgspec.structs.replace(tower.padded, max_length=5)
    for text in ("a cat", "a photo of"):
        got = session.run(tower.feeds([text], short))["text_embeds"]
        wanted = tower.session.run(tower.feeds([text], tower.own))["text_embeds"]
        assert relative_error(got, wanted) < CLOSE


def test_a_length_that_changes_the_answer_is_refused(tmp_path: Path):
    model = read_model(str(write_checkpoint("SiglipModel", tmp_path / "checkpoint")))
    samples = samples_of(model, model.graphs[1])
    with pytest.raises(ModelError, match="padding is part of what it sees") as caught:
        export_graph(model, TEXT_ENCODER, batch=None, out=tmp_path, samples=samples, text_length=5)
    assert "--text-length" in caught.value.hint


@pytest.mark.parametrize("length", [1, 9])
def test_a_length_that_the_tower_does_not_have_is_refused_before_any_work(length: int, tmp_path: Path):
    folder = write_checkpoint("CLIPModel", tmp_path / "checkpoint")
    with pytest.raises(UsageError, match="between 2 and 8"):
        edgevlm.prepare(str(folder), labels=("a cat", "a dog"), text_length=length, output=tmp_path / "out")


def test_the_batch_may_be_fixed_while_the_length_is_free(tmp_path: Path):
    model = read_model(str(write_checkpoint("CLIPModel", tmp_path / "checkpoint")))
    made = export(model, tmp_path, batch=2)
    assert made.inputs[0].shape == (2, "sequence")
    assert made.proof.lengths[0] == 2


@pytest.mark.slow
def test_a_tower_read_at_the_largest_id_has_a_free_length_too(tmp_path: Path):
    """What Transformers keeps for configurations from before its PR #24773: ``eos_token_id`` 2 means ``argmax``."""
    text = {**checkpoint("CLIPModel").config["text_config"], "eos_token_id": 2}
    model = read_model(str(write_checkpoint("CLIPModel", tmp_path / "checkpoint", text_config=text)))
    assert export(model, tmp_path).proof.lengths == (2, 3, 4, 5, 6, 7, 8)


# --- towers that do not -----------------------------------------------------------------------------------


def assert_given_up(model: Model, out: Path, why: str) -> None:
    events: list[Event] = []
    made = export(model, out, events.append)
    assert made.inputs[0].shape == ("batch", 8)
    assert (made.proof.lengths, made.proof.length_error) == ((), None)
    (note,) = made.notes
    assert note.startswith("Every text is padded to 8 tokens")
    assert why in note
    assert [event.text for event in events if isinstance(event, Note)] == [note]


def test_a_tower_read_at_the_padding_keeps_its_length(tmp_path: Path):
    """Pooled at the largest id, which here is the one that pads: such a tower sees how far a text was padded."""
    text = {**checkpoint("CLIPModel").config["text_config"], "eos_token_id": 2}
    folder = write_checkpoint("CLIPModel", tmp_path / "checkpoint", text_config=text)
    settings_file = folder / "tokenizer_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"pad_token": "blue"}))
    model = read_model(str(folder))
    assert text_of(model).pad_token_id == 10
    assert_given_up(model, tmp_path, "gives another 'text_embeds' than padded")


@pytest.mark.slow
def test_a_tower_that_sees_the_padding_keeps_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SigLIP with a claim that it does not make: not causal, and read at the last place."""
    monkeypatch.setattr(Siglip, "text", Clip.text)
    model = read_model(str(write_checkpoint("SiglipModel", tmp_path / "checkpoint")))
    assert model.graphs[1].inputs[0].shape == ("batch", "sequence")
    assert_given_up(model, tmp_path, "gives another 'text_embeds' than padded")


@pytest.mark.slow
def test_a_tower_whose_tokens_are_averaged_keeps_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def averaged(self: Clip, module: Any, graph: str, *inputs: Any) -> tuple[Any, ...]:
        return (module.text_model(input_ids=inputs[0]).last_hidden_state.mean(1),)

    monkeypatch.setattr(Clip, "call", averaged)
    model = read_model(str(write_checkpoint("CLIPModel", tmp_path / "checkpoint")))
    assert_given_up(model, tmp_path, "gives another 'text_embeds' than padded")


@pytest.mark.slow
def test_a_tower_that_cannot_be_traced_at_any_length_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    def joined(self: Clip, module: Any, graph: str, *inputs: Any) -> tuple[Any, ...]:
        places = module.text_model(input_ids=inputs[0]).last_hidden_state.flatten(1)
        return (places @ torch.eye(8 * 16, 16),)

    monkeypatch.setattr(Clip, "call", joined)
    model = read_model(str(write_checkpoint("CLIPModel", tmp_path / "checkpoint")))
    assert_given_up(model, tmp_path, "cannot be traced")


def test_siglip_claims_nothing(tmp_path: Path):
    model = read_model(str(write_checkpoint("SiglipModel", tmp_path / "checkpoint")))
    made = export(model, tmp_path)
    assert made.inputs[0].shape == ("batch", 8)
    assert (made.proof.lengths, made.notes) == ((), ())
