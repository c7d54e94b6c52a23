"""From texts to a text graph's inputs, as Transformers' tokenizers give them, and from there to its vectors.

A text that need not be padded to the full length costs less: see benchmarks/text_length.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.errors import BundleError
from edgevlm.runtime.spec import Array, TextProcessing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_TEXTS = 32
"""In a call: a thousand at once would need gigabytes of activations."""


def load_tokenizer(file: Path, processing: TextProcessing) -> Tokenizer:
    """The tokenizer with the declared padding and truncation, whatever its own file says of them.

    Raises: BundleError: the file is no tokenizer.
    """
    from tokenizers import Tokenizer  # takes 20 ms, and most bundles have their labels folded

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises Exception itself
        raise BundleError(f"'{file.name}' is not a tokenizer: {error}.", hint="Compile the model again.") from error
    tokenizer.enable_truncation(processing.max_length)
    length = processing.max_length if processing.padding == "max_length" else None
    tokenizer.enable_padding(length=length, pad_id=processing.pad_token_id)
    return tokenizer


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, processing: TextProcessing) -> dict[str, Array]:
    """Token ids by input name.

    Shapes: int64 [n_texts, max_length] each, or as long as the longest of them where nothing is padded beyond that.
    """
    encodings = tokenizer.encode_batch(list(texts))
    for encoding in encodings:
        encoding.pad(1, pad_id=processing.pad_token_id)  # a text without tokens, alone in its call
    rows = {
        "input_ids": [encoding.ids for encoding in encodings],
        "attention_mask": [encoding.attention_mask for encoding in encodings],
    }
    return {name: np.array(rows[name], dtype=np.int64) for name in processing.input_names}


def embed_texts(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    processing: TextProcessing,
    embed: Callable[[Mapping[str, Array]], Array],
) -> Array:
    """What ``embed`` gives for each text, a few at a time and those of like length together.

    Args: embed: from inputs by name [n, length] each to vectors [n, d].
    Shapes: [n_texts, d], in the order of the texts; n_texts above 0.
    """
    order = _by_length(texts, tokenizer, processing)
    parts = [order[start : start + MOST_TEXTS] for start in range(0, len(order), MOST_TEXTS)]
    rows = np.concatenate([embed(tokenize([texts[i] for i in part], tokenizer, processing)) for part in parts])
    given: Array = np.empty_like(rows)
    given[order] = rows
    return given


def _by_length(texts: Sequence[str], tokenizer: Tokenizer, processing: TextProcessing) -> list[int]:
    """Indices of the texts, the shortest first, where their lengths matter."""
    order = list(range(len(texts)))
    if processing.padding == "max_length" or len(texts) <= MOST_TEXTS:
        return order
    n_tokens = [sum(encoding.attention_mask) for encoding in tokenizer.encode_batch(list(texts))]
    return sorted(order, key=n_tokens.__getitem__)


def check_text_processing(processing: TextProcessing) -> None:
    """Raises: BundleError: an input that no tokenizer gives, no length, or a template without a place for the label."""
    unknown = set(processing.input_names) - {"input_ids", "attention_mask"}
    if unknown or "input_ids" not in processing.input_names:
        raise BundleError(
            f"The text graph takes {', '.join(processing.input_names)}, "
            f"but input_ids and perhaps attention_mask are what can be given.",
            hint="Export the text graph with those inputs.",
        )
    if processing.max_length < 1 or "{}" not in processing.prompt_template:
        raise BundleError(
            f"The text processing needs a length above 0 and a template with '{{}}', "
            f"not {processing.max_length} and '{processing.prompt_template}'.",
            hint="Mend the model's card.",
        )
