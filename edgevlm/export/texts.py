"""A text tower's graph: cut as Transformers cuts, and free of padding where that is proven to change nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from edgevlm.errors import ModelError
from edgevlm.export.from_torch import TorchSession, export_torch
from edgevlm.export.program import Asked, Exported, open_graph
from edgevlm.families.loading import quiet
from edgevlm.model import Graph, Model
from edgevlm.progress import Note, Progress
from edgevlm.proof import prove_lengths
from edgevlm.runtime.spec import Array, TextProcessing
from edgevlm.runtime.text import load_tokenizer, tokenize

# Texts in which tokenizers differ: case, spaces, punctuation, digits, accents, ligatures, none at all, too many. The
# last two are the shortest and the longest that there can be.
_TEXTS = ("a photo of a cat", "A Photo,  of a CAT!", "don't: 1234 (x) ", "naïve ﬁné №5", "", "a photo of " * 50)
_WORD_COUNTS = (1, 2, 3, 5, 8, 13, 21, 34, 55)


def check_tokens(model: Model, text: TextProcessing) -> None:
    """Whether the device cuts texts as Transformers does, whose Python classes may do more than ``tokenizer.json``.

    Raises: ModelError: they differ; a text is named.
    """
    with quiet():
        import transformers

        try:
            theirs = transformers.AutoTokenizer.from_pretrained(model.source.location, local_files_only=True)
        except Exception:  # such as a missing sentencepiece; then nobody but tokenizer.json says how texts are cut
            return
        expected = theirs(list(_TEXTS), padding="max_length", truncation=True, max_length=text.max_length)["input_ids"]
    got = tokenize(_TEXTS, load_tokenizer(Path(model.tokenizer_file), text), text)["input_ids"].tolist()
    for sentence, ours, reference in zip(_TEXTS, got, expected, strict=True):
        if ours != reference:
            raise ModelError(
                f"The tokenizer.json of '{model.source.asked}' cuts '{sentence[:40]}' into other tokens than "
                f"Transformers' {type(theirs).__name__}.",
                hint="Write it anew with AutoTokenizer.from_pretrained(...).save_pretrained(...).",
            )


def export_texts(asked: Asked, text: TextProcessing, *, progress: Progress) -> Exported:
    """At texts' own length where the family claims that they may be and the proof agrees, else padded, with a note."""
    model, graph, file = asked.model, asked.graph, asked.file
    try:
        made = export_torch(asked)
        asked.say("comparing texts at their own length with padded ones")
        texts, lengths = _texts_and_lengths(model, text)
        error = prove_lengths(
            open_graph(file), TorchSession(model, graph), texts=texts, lengths=lengths, tolerance=asked.tolerance
        )
    except ModelError as refusal:
        note = f"Every text is padded to {text.max_length} tokens, which takes time: {refusal.message}"
        progress(Note(note))
        made = export_torch(replace(asked, graph=_with_length(graph, text.max_length)))
        return msgspec.structs.replace(made, notes=(note,))
    proof = msgspec.structs.replace(made.proof, lengths=tuple(sorted(set(lengths))), length_error=error)
    return msgspec.structs.replace(made, proof=proof)


def export_at_length(asked: Asked, free: Exported, length: int) -> Exported:
    """At one length, which a backend can plan for; ``free`` was proven to give at any length what it gives padded.

    Raises: ModelError: that was not proven.
    """
    if not free.proof.lengths:
        raise ModelError(
            f"The text tower of '{asked.model.name}' cannot take {length} tokens: padding is part of what it sees.",
            hint="Leave --text-length out.",
        )
    cut = {name: value[:, :length] if value.ndim > 1 else value for name, value in asked.samples.items()}
    made = export_torch(replace(asked, graph=_with_length(asked.graph, length), samples=cut))
    note = (
        f"Every text has {length} tokens, as asked: longer ones are cut, and that padding changes nothing was proven "
        f"(largest relative error {free.proof.length_error or 0.0:.1e})."
    )
    return msgspec.structs.replace(made, notes=(note,))


def _with_length(graph: Graph, length: int) -> Graph:
    inputs = tuple(
        msgspec.structs.replace(spec, shape=(*spec.shape[:1], *(_fixed(size, length) for size in spec.shape[1:])))
        for spec in graph.inputs
    )
    return msgspec.structs.replace(graph, inputs=inputs)


def _fixed(size: int | str, length: int) -> int:
    return size if isinstance(size, int) else length


def _texts_and_lengths(model: Model, text: TextProcessing) -> tuple[dict[str, Array], list[int]]:
    """Padded token ids of texts from no word to too many, and how long each is unpadded."""
    words = ("a photo of " * text.max_length).split()
    texts = [*_TEXTS, *(" ".join(words[:n]) for n in _WORD_COUNTS if n < text.max_length)]
    padded = tokenize(texts, load_tokenizer(Path(model.tokenizer_file), text), text)
    own = msgspec.structs.replace(text, padding="longest")
    tokenizer = load_tokenizer(Path(model.tokenizer_file), own)
    lengths = [tokenize([each], tokenizer, own)["input_ids"].shape[1] for each in texts]
    return padded, lengths
