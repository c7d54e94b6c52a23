"""Real inputs for a graph: drawn pictures through the model's own preprocessing, sentences through its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from edgevlm.data.shapes import Pictures
from edgevlm.export import open_source
from edgevlm.model import Graph, Model
from edgevlm.runtime.image import preprocess
from edgevlm.runtime.spec import Array, Prompt
from edgevlm.runtime.tasks.mask_generation import decoder_prompts
from edgevlm.runtime.text import load_tokenizer, tokenize

SENTENCES = ("a photo of a cat", "a red dog", "blue", "a photo of a blue cat and of a red dog")


def samples_of(model: Model, graph: Graph, n: int = 4) -> Mapping[str, Array]:
    if graph.name == "text_encoder":
        assert model.processing.text is not None
        tokenizer = load_tokenizer(Path(model.tokenizer_file), model.processing.text)
        return tokenize(SENTENCES[:n], tokenizer, model.processing.text)
    if graph.name == "mask_decoder":
        return _decoder_samples(model, n)
    image = model.processing.image
    drawn = [Image.fromarray(picture.image) for picture in Pictures(n=n, seed=3)]
    return {image.input_name: np.stack([preprocess(picture, image) for picture in drawn])}


def _decoder_samples(model: Model, n: int) -> Mapping[str, Array]:
    """Four prompts for each picture, of two points and a box."""
    pixels = samples_of(model, model.graphs[0], n)
    embeds = open_source(model, model.graphs[0].name).run(pixels)
    prompts = [
        [Prompt(points=((8 * i + j, 20), (3, 9 * j)), labels=(1, 0), box=(2, 3 + j, 60, 50 - i)) for j in range(1, 5)]
        for i in range(1, n + 1)
    ]
    return {**embeds, **decoder_prompts(prompts, [(64, 64)] * n, model.processing.image)}
