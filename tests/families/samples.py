"""Real inputs for a graph: drawn pictures through the model's own preprocessing, sentences through its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from edgevlm.data.shapes import Pictures
from edgevlm.model import Graph, Model
from edgevlm.runtime.image import preprocess
from edgevlm.runtime.spec import Array
from edgevlm.runtime.text import load_tokenizer, tokenize

SENTENCES = ("a photo of a cat", "a red dog", "blue", "a photo of a blue cat and of a red dog")


def samples_of(model: Model, graph: Graph, n: int = 4) -> Mapping[str, Array]:
    if graph.name == "text_encoder":
        assert model.processing.text is not None
        tokenizer = load_tokenizer(Path(model.tokenizer_file), model.processing.text)
        return tokenize(SENTENCES[:n], tokenizer, model.processing.text)
    image = model.processing.image
    drawn = [Image.fromarray(picture.image) for picture in Pictures(n=n, seed=3)]
    return {image.input_name: np.stack([preprocess(picture, image) for picture in drawn])}
