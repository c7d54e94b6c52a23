"""Every model that edgevlm reads can teach: its outputs have the names and shapes that objectives ask for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="teachers are PyTorch modules")
pytest.importorskip("transformers", reason="teachers are checkpoints of Transformers")

from edgevlm.distillation.teachers import OnnxTeacher, Teacher, teacher_of  # noqa: E402 - torch first
from edgevlm.export import open_source  # noqa: E402
from edgevlm.ingest import read_model  # noqa: E402
from tests.colours import SIZE, write_classifier  # noqa: E402
from tests.families.checkpoints import write_checkpoint  # noqa: E402

EVERYTHING = frozenset({"logits", "image_embeds", "image_features", "text_embeds", "text_features"})


def teacher(architecture: str, folder: Path) -> Teacher:
    return teacher_of(read_model(str(write_checkpoint(architecture, folder / architecture))))


def pixels(made: Teacher, n: int = 3) -> np.ndarray:
    image = made.processing.image
    return np.random.default_rng(0).normal(size=(n, 3, image.height, image.width)).astype(np.float32)


@pytest.mark.parametrize(
    ("architecture", "shapes"),
    [
        # 32 pixels in patches of 8 are 4 x 4 places behind one class token.
        ("ViTForImageClassification", {"logits": (5,), "image_features": (16, 4, 4)}),
        ("ResNetForImageClassification", {"logits": (5,), "image_features": (16, 1, 1)}),
        ("Dinov2Model", {"image_embeds": (16,), "image_features": (16, 4, 4)}),
        (
            "CLIPModel",
            {"image_embeds": (16,), "image_features": (16, 4, 4), "text_embeds": (16,), "text_features": (8, 16)},
        ),
        (
            "SiglipModel",
            {"image_embeds": (16,), "image_features": (16, 4, 4), "text_embeds": (16,), "text_features": (8, 16)},
        ),
    ],
)
def test_outputs_have_their_names_and_shapes(
    tmp_path: Path, architecture: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    made = teacher(architecture, tmp_path)
    assert made.sizes() == shapes
    given = made.outputs(pixels(made), EVERYTHING) | made.text_outputs(["a", "b", "a b"], EVERYTHING)
    assert {name: value.shape for name, value in given.items()} == {name: (3, *size) for name, size in shapes.items()}
    assert made.outputs(pixels(made), frozenset({"nothing"})) == {}


def test_outputs_are_the_models_own(tmp_path: Path) -> None:
    made = teacher("CLIPModel", tmp_path)
    expected = open_source(made.model, "image_encoder").run({"pixel_values": pixels(made)})["image_embeds"]
    np.testing.assert_array_equal(made.outputs(pixels(made), EVERYTHING)["image_embeds"], expected)


def test_places_stay_where_they_are(tmp_path: Path) -> None:
    """A change in one corner of the picture changes the features of that corner most."""
    made = teacher("ViTForImageClassification", tmp_path)
    plain = pixels(made, 1)
    changed = plain.copy()
    changed[:, :, :8, 24:] += 3
    one, other = (made.outputs(each, EVERYTHING)["image_features"][0] for each in (plain, changed))
    difference = np.abs(one - other).mean(0)
    assert np.unravel_index(difference.argmax(), difference.shape) == (0, 3)


def test_an_onnx_file_teaches_without_a_module(tmp_path: Path) -> None:
    made = teacher_of(read_model(str(write_classifier(tmp_path / "net.onnx"))))
    assert isinstance(made, OnnxTeacher) and made.sizes() == {"logits": (3,)}
    assert made.outputs(np.zeros((5, 3, SIZE, SIZE), np.float32), EVERYTHING)["logits"].shape == (5, 3)
    assert made.text_outputs(["a"], EVERYTHING) == {}


def test_the_digest_is_of_the_weights(tmp_path: Path) -> None:
    files = [write_classifier(tmp_path / f"{weight}.onnx", weight=weight) for weight in (1.0, 2.0)]
    one, other = (teacher_of(read_model(str(file))) for file in files)
    assert one.digest != other.digest and len(one.digest) == 64
