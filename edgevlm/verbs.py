"""Verbs that are no more than a call of the runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence

from edgevlm.runtime.bundle import open_bundle
from edgevlm.runtime.image import ImageSource
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.prompts import Box, Point
from edgevlm.runtime.spec import Manifest
from edgevlm.runtime.tasks import Result


def run(
    bundle: str | os.PathLike[str],
    image: ImageSource,
    *,
    labels: Sequence[str] | None = None,
    top_k: int | None = None,
    points: Sequence[Point] = (),
    boxes: Sequence[Box] = (),
    n_threads: int | None = None,
) -> Result:
    """The answer of a bundle for one picture. For many pictures keep a ``Pipeline``, which loads the bundle once."""
    pipeline = Pipeline.load(bundle, n_threads=n_threads)
    return pipeline(image, labels=labels, top_k=top_k, points=points, boxes=boxes)


def inspect(bundle: str | os.PathLike[str]) -> Manifest:
    """What a bundle says of itself; it need not be able to run here.

    Raises: BundleError: it breaks a rule of the format.
    """
    return open_bundle(bundle).manifest
