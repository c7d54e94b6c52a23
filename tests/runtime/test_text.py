from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgevlm.errors import BundleError
from edgevlm.runtime.spec import TextProcessing
from edgevlm.runtime.text import check_text_processing, embed_texts, load_tokenizer, tokenize
from tests.runtime import tiny


def test_texts_are_padded_and_cut(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes(tiny.tokenizer_json())
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", tiny.TEXT)
    given = tokenize(["a RED", "a a a a a", "cat"], tokenizer, tiny.TEXT)
    assert given["input_ids"].tolist() == [[2, 3, 0, 0], [2, 2, 2, 2], [1, 0, 0, 0]]
    assert given["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert {value.dtype for value in given.values()} == {np.dtype("int64")}


OWN = msgspec.structs.replace(tiny.TEXT, padding="longest")


def test_texts_at_their_own_length(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes(tiny.tokenizer_json())
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", OWN)
    given = tokenize(["a RED", "cat"], tokenizer, OWN)
    assert given["input_ids"].tolist() == [[2, 3], [1, 0]]
    assert given["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert tokenize(["a " * 9], tokenizer, OWN)["input_ids"].tolist() == [[2, 2, 2, 2]], "never longer than the graph"
    assert tokenize([""], tokenizer, OWN)["input_ids"].tolist() == [[0]], "a graph takes no text of no length"


@pytest.mark.parametrize("spec", [tiny.TEXT, OWN], ids=["padded", "own length"])
def test_vectors_come_in_the_order_of_the_texts(tmp_path: Path, spec: TextProcessing):
    (tmp_path / "tokenizer.json").write_bytes(tiny.tokenizer_json())
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", spec)
    texts = ["a " * (1 + i % 4) + ("red", "green", "blue")[i % 3] for i in range(75)]
    widths = []

    def embed(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        ids = feeds["input_ids"]
        widths.append(ids.shape)
        return np.stack([(ids == 2).sum(axis=1), ids.max(axis=1)], axis=1)

    expected = [[1 + i % 4, 2 if i % 4 == 3 else 3 + i % 3] for i in range(75)]
    assert embed_texts(texts, tokenizer, spec, embed).tolist() == expected
    assert [n for n, _ in widths] == [32, 32, 11]
    assert [width for _, width in widths] == ([4, 4, 4] if spec is tiny.TEXT else [3, 4, 4])


def test_only_the_declared_inputs_are_given(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes(tiny.tokenizer_json())
    spec = msgspec.structs.replace(tiny.TEXT, input_names=("input_ids",))
    assert tokenize(["a"], load_tokenizer(tmp_path / "tokenizer.json", spec), spec).keys() == {"input_ids"}


def test_a_broken_tokenizer_is_refused_by_name(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes(tiny.tokenizer_json()[:100])
    with pytest.raises(BundleError, match=r"'tokenizer\.json' is not a tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json", tiny.TEXT)


@pytest.mark.parametrize(
    "changes",
    [
        {"input_names": ("input_ids", "token_type_ids")},
        {"input_names": ("attention_mask",)},
        {"max_length": 0},
        {"prompt_template": "a photo"},
    ],
)
def test_text_processing_that_cannot_be_done_is_refused(changes: dict):
    with pytest.raises(BundleError):
        check_text_processing(msgspec.structs.replace(tiny.TEXT, **changes))


SENTENCES = [
    "a photo of a cat",
    "A PHOTO of  a\tDog!!",
    "",
    "naïve café 123 — it's 'quoted'",
    "word " * 100,
    "\u65e5\u672c\u8a9e \U0001f600",
]


def test_parity_with_transformers_on_clips_own_vocabulary(shared_assets: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    with gzip.open(shared_assets / "models/clip-bpe/bpe_simple_vocab_16e6.txt.gz", "rt") as opened:
        merges = [tuple(line.split()) for line in opened.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    theirs = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    expected = theirs(SENTENCES, padding="max_length", truncation=True, max_length=77, return_tensors="np")
    theirs.save_pretrained(tmp_path)
    spec = TextProcessing(
        tokenizer="tokenizer.json",
        input_names=("input_ids", "attention_mask"),
        max_length=77,
        pad_token_id=theirs.pad_token_id,
    )
    given = tokenize(SENTENCES, load_tokenizer(tmp_path / "tokenizer.json", spec), spec)
    for name in spec.input_names:
        assert np.array_equal(given[name], expected[name]), name
    assert given["input_ids"][0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]  # OpenAI's own ids
