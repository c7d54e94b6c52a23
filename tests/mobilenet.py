"""The real MobileNetV2 with its pictures where they lie beside the checkout; elsewhere one of its shape and colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.suite.random_weights import settle
from edgevlm.runtime.image import decode_image
from tests import colours
from tests.conftest import ASSETS

_N_PER_CLASS = 32


def mobilenet_and_pictures(folder: Path) -> tuple[Path, Path]:
    """A Hugging Face folder of MobileNetV2 1.0, and labelled pictures: the trained one, or one made in ``folder``."""
    if ASSETS.is_dir():
        return ASSETS / "models" / "mobilenet-v2-imagenet", ASSETS / "data" / "imagenet-sample"
    pictures = colours.write_pictures(folder / "pictures", n_per_class=_N_PER_CLASS)
    write_mobilenet(folder / "mobilenet", pictures)
    return folder / "mobilenet", pictures


def write_mobilenet(out: Path, pictures: Path) -> None:
    """MobileNetV2 1.0 as it was published, for 224 x 224, which tells the three colours apart.

    Its weights are random and seeded, its batch norms have the statistics of those pictures, and
    the head is fitted to their pooled features by least squares.
    """
    torch = pytest.importorskip("torch", reason="makes the model")
    transformers = pytest.importorskip("transformers", reason="makes the model")
    torch.manual_seed(0)
    names = dict(enumerate(colours.LABELS))
    config = transformers.MobileNetV2Config(id2label=names, label2id={name: i for i, name in names.items()})
    model = transformers.MobileNetV2ForImageClassification(config)
    processor = transformers.MobileNetV2ImageProcessorPil()
    files = [(i, file) for i, label in names.items() for file in sorted((pictures / label).iterdir())]
    seen = np.asarray(processor([decode_image(file) for _, file in files], return_tensors="np")["pixel_values"])
    settle(model, seen, input_name="pixel_values")
    with torch.no_grad():
        pooled = model.mobilenet_v2(torch.from_numpy(seen)).pooler_output.numpy()
    wanted = 8 * np.eye(len(names), dtype=np.float32)[[i for i, _ in files]]
    centre = pooled.mean(0)
    weight = np.linalg.pinv(pooled - centre, rcond=0.1) @ wanted
    model.classifier.weight.data = torch.from_numpy(np.ascontiguousarray(weight.T))
    model.classifier.bias.data = torch.from_numpy(-centre @ weight)
    model.save_pretrained(out)
    processor.save_pretrained(out)
