"""TinyViT as SAM's encoder: as large as its paper says, taught by a SAM, saved, compiled and asked."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

import edgevlm
from edgevlm.data import shapes
from edgevlm.distillation.step import Batch
from edgevlm.distillation.students import load_student
from edgevlm.distillation.students.tiny_vit_sam import TinyVitSamStudent
from edgevlm.errors import UsageError
from edgevlm.families.loading import load_module
from edgevlm.families.tiny_vit import Block, TinyVitConfig, TinyVitEncoder
from edgevlm.ingest import read_model
from edgevlm.model import Model
from edgevlm.runtime.tasks.mask_generation import Masks
from tests.distillation.teachers import tower
from tests.families.checkpoints import write_checkpoint
from tests.fast import FAST

NAME = "tinyvit-5m-sam"
SMALL = TinyVitSamStudent(
    name="small",
    config={
        "embed_dims": [8, 16, 16, 32],
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 4],
        "window_sizes": [3, 3, 3, 3],
    },
)
PIXELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
POINTS, LABELS = torch.tensor([[[[20.0, 30.0]]], [[[9.0, 8.0]]]]), torch.tensor([[[1]], [[0]]])
BOXES = torch.tensor([[[2.0, 3.0, 40.0, 50.0]], [[9.0, 8.0, 40.0, 50.0]]])
PROMPTS: tuple[dict[str, torch.Tensor], ...] = (
    {"input_points": POINTS, "input_labels": LABELS},
    {"input_points": POINTS},
    {"input_boxes": BOXES},
    {"input_points": POINTS, "input_labels": LABELS, "input_boxes": BOXES},
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return read_model(str(write_checkpoint("SamModel", tmp_path_factory.mktemp("models") / "teacher")))


def test_it_is_as_large_as_the_papers_say():
    with torch.device("meta"):
        encoder = TinyVitEncoder(TinyVitConfig())
    neck = sum(p.numel() for p in encoder.neck.parameters())
    backbone = sum(p.numel() for p in encoder.parameters()) - neck
    assert neck == 256 * 320 + 9 * 256 * 256 + 4 * 256
    assert backbone == 5_071_124  # timm's tiny_vit_5m_224 with num_classes=0, without its last norm of 640
    classifier = 320 * 1000 + 1000 + 640
    assert round((backbone + neck + classifier) / 1e6, 2) == 6.07  # MobileSAM's encoder, which keeps it unused


def test_parameters_are_called_as_timms():
    with torch.device("meta"):
        names = set(TinyVitEncoder(TinyVitConfig()).state_dict())
    assert {
        "patch_embed.conv1.conv.weight",
        "patch_embed.conv2.bn.running_mean",
        "stages.0.blocks.1.conv3.bn.weight",
        "stages.1.downsample.conv2.conv.weight",
        "stages.2.blocks.5.attn.attention_biases",
        "stages.2.blocks.5.attn.qkv.bias",
        "stages.3.blocks.0.local_conv.conv.weight",
        "stages.3.blocks.1.mlp.norm.bias",
    } <= names


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (16, 112)], ids=str)
def test_any_size_comes_out_at_a_sixteenth(size: tuple[int, int]):
    encoder = TinyVitEncoder(TinyVitConfig(**SMALL.config)).eval()
    with torch.no_grad():
        embeds = encoder(torch.rand(2, 3, *size)).last_hidden_state
    assert embeds.shape == (2, 256, size[0] // 16, size[1] // 16)


def test_a_window_sees_itself_alone():
    torch.manual_seed(1)
    block = Block(8, 2, 4, 2.0).eval()
    picture = torch.rand(1, 8, 10, 8)  # padded to 8 × 12
    other = picture.clone()
    other[:, 5, 9, 0] += 1
    with torch.no_grad():
        changed = (block._attend(picture) != block._attend(other)).any(dim=-1)[0]
    expected = torch.zeros(8, 10, dtype=torch.bool)
    expected[4:, 8:] = True
    assert torch.equal(changed, expected)


def test_it_starts_with_the_teachers_decoder(teacher: Model):
    student, theirs = SMALL.build(teacher, seed=1), load_module(teacher)
    for part in ("prompt_encoder", "mask_decoder", "shared_image_embedding"):
        for name, value in getattr(theirs, part).state_dict().items():
            assert torch.equal(getattr(student, part).state_dict()[name], value)
    again, other = (SMALL.build(teacher, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(again[name], value) for name, value in student.state_dict().items())
    name = "vision_encoder.patch_embed.conv1.conv.weight"
    assert not torch.equal(again[name], other[name])


@pytest.mark.parametrize("prompts", PROMPTS, ids=lambda prompts: "+".join(prompts))
def test_its_outputs_are_transformers(teacher: Model, prompts: dict[str, torch.Tensor]):
    student = SMALL.build(teacher)
    batch = Batch(pixel_values=PIXELS, prompts=prompts)
    found = SMALL.outputs(student, batch, frozenset({"image_embeds", "image_features", "pred_masks", "iou_scores"}))
    assert found["image_embeds"].shape == (2, 16, 4, 4)
    assert found["image_features"].shape == (2, 32, 4, 4)
    for multimask, rows in ((False, slice(0, 1)), (True, slice(1, None))):
        with torch.no_grad():
            theirs = student(pixel_values=PIXELS, multimask_output=multimask, **prompts)
        assert torch.allclose(found["pred_masks"][:, :, rows], theirs.pred_masks, atol=1e-5)
        assert torch.allclose(found["iou_scores"][:, :, rows], theirs.iou_scores, atol=1e-5)


def test_its_outputs_have_gradients_and_an_untrained_one_lets_signals_through(teacher: Model):
    student = SMALL.build(teacher)
    batch = Batch(pixel_values=PIXELS, prompts=PROMPTS[0])
    found = SMALL.outputs(student, batch, frozenset({"image_embeds", "image_features", "pred_masks"}))
    assert 0.05 < float(found["image_features"].detach().std()) < 50
    found["pred_masks"].square().mean().backward()
    for name, parameter in student.vision_encoder.named_parameters():
        assert parameter.grad is not None, name
    alone = SMALL.outputs(student, batch, frozenset({"image_embeds"}))
    assert set(alone) == {"image_embeds"}
    assert torch.equal(alone["image_embeds"], found["image_embeds"])


def test_masks_need_prompts(teacher: Model):
    student = SMALL.build(teacher)
    with pytest.raises(UsageError, match="points and boxes"):
        SMALL.outputs(student, Batch(pixel_values=PIXELS), frozenset({"pred_masks"}))
    with pytest.raises(UsageError, match="no output 'logits'"):
        SMALL.outputs(student, Batch(pixel_values=PIXELS), frozenset({"logits"}))


def test_what_it_cannot_learn_is_refused(teacher: Model, tmp_path: Path):
    student = load_student(NAME)
    with pytest.raises(UsageError, match="cannot learn image-feature-extraction"):
        student.build(tower(tmp_path))
    with pytest.raises(UsageError, match="multiple of 16"):
        try:
            student.processing(teacher, 72)
        except UsageError as error:
            raise UsageError(error.hint or "") from error


def test_it_may_see_smaller_pictures(teacher: Model, tmp_path: Path):
    student = SMALL.build(teacher, image_size=48)
    SMALL.save(student, tmp_path / "student", teacher)
    saved = read_model(str(tmp_path / "student"))
    assert (saved.processing.image.height, saved.graphs[1].inputs[0].shape) == (48, ("batch", 16, 3, 3))
    assert [type(step).__name__ for step in saved.processing.image.steps] == ["Resize", "Rescale", "Normalize", "Pad"]


@pytest.mark.slow
def test_the_whole_student_goes_into_a_bundle(teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))
    student = load_student(NAME)
    built = student.build(teacher)
    student.save(built, tmp_path / "student", teacher)
    saved = read_model(str(tmp_path / "student"))
    assert saved.processing.image == student.processing(teacher)
    loaded = load_module(saved).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in built.state_dict().items())
    made = edgevlm.compile(str(tmp_path / "student"), precision="fp32", **FAST, output=tmp_path / "bundle")
    assert [part.name for part in made.manifest.components] == ["image_encoder", "mask_decoder"]
    assert edgevlm.verify(made.bundle)
    picture = Image.fromarray(shapes.picture(0, seed=1, size=80).image)
    answer = edgevlm.run(made.bundle, picture, boxes=[(10, 10, 60, 60)])
    assert isinstance(answer, Masks)
    embeds = edgevlm.Pipeline.load(made.bundle).encode(picture).outputs["image_embeds"]
    pixels = torch.from_numpy(edgevlm.Pipeline.load(made.bundle).preprocess(picture)[None])
    with torch.no_grad():
        expected = built.vision_encoder(pixels).last_hidden_state.numpy()
    assert np.allclose(embeds, expected, atol=1e-4)
    assert msgspec.to_builtins(made.manifest.processing.image)["steps"][-1]["op"] == "pad"
