"""From texts to a text graph's inputs, as Transformers' tokenizers give them with ``padding="max_length"``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.errors import BundleError
from edgevlm.runtime.spec import Array, TextProcessing

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
    tokenizer.enable_padding(length=processing.max_length, pad_id=processing.pad_token_id)
    return tokenizer


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, processing: TextProcessing) -> dict[str, Array]:
    """Token ids by input name.

    Shapes: int64 [n_texts, max_length] each.
    """
    encodings = tokenizer.encode_batch(list(texts))
    rows = {
        "input_ids": [encoding.ids for encoding in encodings],
        "attention_mask": [encoding.attention_mask for encoding in encodings],
    }
    return {name: np.array(rows[name], dtype=np.int64) for name in processing.input_names}


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
