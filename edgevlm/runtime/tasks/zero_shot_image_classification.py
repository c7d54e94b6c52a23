"""One of any labels, by how near a picture's and a sentence's embeddings lie.

Component ``image_encoder``: pixel_values -> image_embeds. The labels' embeddings were either computed beforehand
(``Scoring.label_embeddings``) or come from ``text_encoder``: input_ids, attention_mask -> text_embeds.

Source: CLIP, arXiv:2103.00020; SigLIP, arXiv:2303.15343.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgevlm.errors import BundleError, UsageError
from edgevlm.runtime.classes import Classification, need_finite, rank, softmax
from edgevlm.runtime.image import Size
from edgevlm.runtime.session import output_of, run_rows
from edgevlm.runtime.spec import Array, Processing, Scoring
from edgevlm.runtime.tasks import Need, Parts, Result, check_needs

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_N_REMEMBERED = 16  # label sets whose embeddings are kept: a person's few questions, not a stream of them


class ZeroShotImageClassification:
    needs: ClassVar[tuple[Need, ...]] = (
        Need(component="image_encoder", inputs=("pixel_values",), outputs=("image_embeds",)),
        Need(
            component="text_encoder",
            inputs=("input_ids", "attention_mask"),
            outputs=("text_embeds",),
            is_optional=True,
        ),
    )
    result_type: ClassVar[type[Result]] = Classification

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._tokenizer: Tokenizer | None = None
        self._folded: Array | None = None
        self._embeddings: dict[tuple[str, ...], Array] = {}

    @classmethod
    def check(cls, components: frozenset[str], processing: Processing, scoring: Scoring | None) -> None:
        check_needs(cls.needs, components)
        if scoring is None:
            raise BundleError("A zero-shot model needs its scoring.", hint="Compile the model again.")
        if scoring.label_embeddings is None and ("text_encoder" not in components or processing.text is None):
            raise BundleError(
                "A zero-shot model needs label embeddings, or a text encoder and its processing, but has neither.",
                hint="Compile the model again, with --labels or with both towers.",
            )

    def outputs(self, pixel_values: Array) -> dict[str, Array]:
        return run_rows(self._parts.sessions["image_encoder"], {self._parts.processing.image.input_name: pixel_values})

    def results(
        self,
        outputs: Mapping[str, Array],
        *,
        labels: tuple[str, ...] | None,
        top_k: int | None,
        sizes: Sequence[Size] | None,
    ) -> tuple[Classification, ...]:
        scoring = self._parts.scoring
        assert scoring is not None, "check() saw to it"
        names = self._parts.labels if labels is None else labels
        texts = self.label_embeddings(names).astype(np.float64)
        images = unit_rows(need_finite(output_of(outputs, "image_embeds"), "image_embeds"))
        logits = scoring.scale * (images @ texts.T) + scoring.bias
        scores = softmax(logits) if scoring.activation == "softmax" else 1 / (1 + np.exp(-logits))
        return rank(scores, names, top_k=top_k)

    def label_embeddings(self, labels: tuple[str, ...]) -> Array:
        """Unit rows, float32 [n_labels, d]; looked up where they were computed before.

        Raises: UsageError: no labels, one twice, or one that needs a text encoder where there is none.
        """
        if labels not in self._embeddings:
            _check_labels(labels)
            if len(self._embeddings) == _N_REMEMBERED:
                del self._embeddings[next(iter(self._embeddings))]
            is_folded = self._parts.scoring is not None and self._parts.scoring.label_embeddings is not None
            if is_folded and set(labels) <= set(self._parts.labels):
                rows = [self._parts.labels.index(label) for label in labels]
                self._embeddings[labels] = self._folded_embeddings()[rows]
            else:
                self._embeddings[labels] = self._encode(labels)
        return self._embeddings[labels]

    def _folded_embeddings(self) -> Array:
        if self._folded is None:
            assert self._parts.scoring is not None
            assert self._parts.scoring.label_embeddings is not None
            name = self._parts.scoring.label_embeddings
            try:
                rows: Array = np.load(self._parts.file(name), allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise BundleError(
                    f"'{name}' is not a numpy array: {error}.", hint="Compile the model again."
                ) from error
            if rows.ndim != 2 or len(rows) != len(self._parts.labels) or rows.dtype != np.float32:
                raise BundleError(
                    f"'{name}' is {rows.dtype} {rows.shape}, not float32 with one row for each of "
                    f"{len(self._parts.labels)} labels.",
                    hint="Compile the model again.",
                )
            self._folded = rows
        return self._folded

    def _encode(self, labels: tuple[str, ...]) -> Array:
        processing = self._parts.processing.text
        if processing is None or "text_encoder" not in self._parts.sessions:
            unknown = next(label for label in labels if label not in self._parts.labels)
            raise UsageError(
                f"'{unknown}' is not one of the {len(self._parts.labels)} labels that this bundle was compiled for.",
                hint="Compile the model without --labels: then the bundle holds the text encoder and takes any label.",
            )
        from edgevlm.runtime.text import embed_texts, load_tokenizer

        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._parts.file(processing.tokenizer), processing)
        prompts = [processing.prompt_template.replace("{}", label) for label in labels]
        rows = embed_texts(prompts, self._tokenizer, processing, self._text_embeds)
        return unit_rows(need_finite(rows, "text_embeds")).astype(np.float32)

    def _text_embeds(self, feeds: Mapping[str, Array]) -> Array:
        return output_of(run_rows(self._parts.sessions["text_encoder"], feeds), "text_embeds")


def unit_rows(rows: Array) -> Array:
    """Each row at length 1, float64: what a cosine needs."""
    wide = rows.astype(np.float64)
    scaled: Array = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return scaled


def _check_labels(labels: tuple[str, ...]) -> None:
    if not labels:
        raise UsageError("This bundle has no labels of its own.", hint="Give some: --labels cat,dog.")
    if any(not label.strip() for label in labels):
        raise UsageError("One of the labels is empty.", hint="Leave it out.")
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise UsageError(f"The label '{twice[0]}' stands twice.", hint="Leave one of them out.")
