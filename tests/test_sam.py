"""A SAM checkpoint goes in, a bundle comes out that cuts things out of pictures as Transformers does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

import edgevlm
from edgevlm.bundle.write import write_bundle
from edgevlm.data import shapes
from edgevlm.data.readers import read_data_set
from edgevlm.errors import UsageError
from edgevlm.families import MASKS
from edgevlm.measure.bundles import benchmark_bundles
from edgevlm.measure.protocol import QUICK
from edgevlm.runtime.spec import Array, Prompt
from edgevlm.runtime.tasks.mask_generation import Masks
from tests.families.checkpoints import write_checkpoint
from tests.fast import FAST

SIZE = (48, 80)
POINT, BOX = (30.0, 20.0), (10.0, 5.0, 60.0, 40.0)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("SamModel", tmp_path_factory.mktemp("models") / "tiny-sam")


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> edgevlm.compiler.Compiled:
    output = tmp_path_factory.mktemp("out") / "tiny-sam"
    few = read_data_set("shapes", task=MASKS, n_shapes=60)
    return edgevlm.compile(str(checkpoint), precision="fp32", eval_data=few, **FAST, output=output)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "shapes.png"
    drawn = Image.fromarray(shapes.picture(0, seed=5, n_objects=3, size=80).image)
    drawn.crop((0, 0, SIZE[1], SIZE[0])).save(file)
    return file


def transformers_masks(checkpoint: Path, picture: Path, *, multimask: bool, **asked: Any) -> tuple[Array, Array]:
    """All masks and scores of one prompt, by Transformers' own model and processor."""
    import torch
    import transformers

    model = transformers.SamModel.from_pretrained(checkpoint).eval()
    processor = transformers.SamProcessor(transformers.SamImageProcessorPil.from_pretrained(checkpoint))
    inputs = processor(Image.open(picture).convert("RGB"), return_tensors="pt", **asked)
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    with torch.inference_mode():
        found = model(**inputs, multimask_output=multimask)
    (masks,) = processor.image_processor.post_process_masks(found.pred_masks, *sizes)
    return masks[0].numpy(), found.iou_scores[0, 0].numpy()


def test_the_bundle_has_an_encoder_and_a_decoder(compiled: edgevlm.compiler.Compiled):
    manifest = compiled.manifest
    assert [part.name for part in manifest.components] == ["image_encoder", "mask_decoder"]
    embeds, points, labels = manifest.components[1].inputs
    assert embeds.shape == (1, 16, 8, 8)
    assert points.shape[1:] == ("prompts", "points", 2)
    assert labels.shape[1:] == ("prompts", "points")
    assert manifest.accuracy is not None
    assert manifest.accuracy.metric == "mIoU"
    assert manifest.accuracy.has_labels
    assert {"mIoU by box", "mIoU by point"} <= set(manifest.accuracy.others)
    assert len(manifest.golden.cases[0].prompts) == 2


def test_the_bundle_verifies_and_judges(compiled: edgevlm.compiler.Compiled):
    verification = edgevlm.verify(compiled.bundle)
    assert verification, verification.reasons
    found = edgevlm.evaluate(compiled.bundle, "shapes")
    assert found.metric == "mIoU"
    assert 0 < found.value < 1


def test_bundles_whose_golden_pictures_are_larger_are_timed_on_the_first_ones_prompts(
    compiled: edgevlm.compiler.Compiled, tmp_path: Path
):
    manifest = compiled.manifest
    files = {entry.path: compiled.bundle / entry.path for entry in manifest.files}
    outside = (Prompt(points=((5000.0, 5000.0),), labels=(1,)),)
    cases = tuple(msgspec.structs.replace(case, prompts=outside) for case in manifest.golden.cases)
    golden = msgspec.structs.replace(manifest.golden, cases=cases)
    write_bundle(tmp_path / "larger", msgspec.structs.replace(manifest, golden=golden), files)
    found = benchmark_bundles(compiled.bundle, tmp_path / "larger", n_threads=1, protocol=QUICK)
    assert set(found.comparisons) == {"image_encoder", "mask_decoder", "end to end"}
    for comparison in found.comparisons.values():
        assert [each.failure for each in comparison.measurements] == [None, None]


@pytest.mark.parametrize(
    ("asked", "theirs", "multimask"),
    [
        ({"points": [POINT]}, {"input_points": [[[list(POINT)]]], "input_labels": [[[1]]]}, True),
        ({"boxes": [BOX]}, {"input_boxes": [[list(BOX)]]}, False),
        (
            {"points": [POINT, (70.0, 40.0, 0)]},
            {"input_points": [[[list(POINT), [70.0, 40.0]]]], "input_labels": [[[1, 0]]]},
            False,
        ),
        (
            {"points": [POINT], "boxes": [BOX]},
            {"input_points": [[[list(POINT)]]], "input_labels": [[[1]]], "input_boxes": [[list(BOX)]]},
            False,
        ),
    ],
    ids=["point", "box", "points", "point in box"],
)
def test_masks_are_transformers(
    compiled: edgevlm.compiler.Compiled, checkpoint: Path, picture: Path, asked, theirs, multimask: bool
):
    answer = edgevlm.run(compiled.bundle, picture, **asked)
    assert isinstance(answer, Masks)
    masks, scores = transformers_masks(checkpoint, picture, multimask=multimask, **theirs)
    best = int(scores.argmax())
    assert answer.masks[0].score == pytest.approx(scores[best], abs=1e-4)
    assert masks[best].any()
    assert not masks[best].all()
    assert (answer.to_arrays()[0] != masks[best]).sum() <= 4  # of 3,840, where both are all but 0


def test_the_command_line_writes_masks(compiled: edgevlm.compiler.Compiled, picture: Path, tmp_path: Path):
    command = [sys.executable, "-m", "edgevlm", "run", str(compiled.bundle), str(picture), "--json"]
    boxes = ["--box", "10,5,60,40", "--box", "1,2,30,30"]
    done = subprocess.run([*command, *boxes, "--masks", str(tmp_path / "masks")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["masks"]) == 2
    for i, mask in enumerate(answer["masks"]):
        pixels = np.asarray(Image.open(tmp_path / "masks" / f"shapes-{i}.png").convert("L"))
        assert pixels.shape == SIZE
        assert set(np.unique(pixels)) <= {0, 255}
        assert (pixels == 255).sum() == mask["n_pixels"]
    for wrong, words in ((["--point", "1"], "Write x,y"), ([], "--point x,y"), (["--point", "900,2"], "outside")):
        done = subprocess.run([*command, *wrong], capture_output=True, text=True)
        assert done.returncode == 2
        assert words in done.stderr


def test_labels_are_refused(checkpoint: Path):
    with pytest.raises(UsageError, match="mask-generation has none"):
        edgevlm.prepare(str(checkpoint), labels=["cat"])


@pytest.mark.slow
def test_a_checkpoint_of_sam_vit_bases_size_is_exported(tmp_path: Path):
    """facebook/sam-vit-base's configuration, which is Transformers' default, with random weights."""
    import torch
    import transformers

    from edgevlm.export import export_graph
    from edgevlm.ingest import read_model
    from tests.families.samples import samples_of

    torch.manual_seed(0)
    module = transformers.SamModel(transformers.SamConfig())
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.05)
    module.save_pretrained(tmp_path / "sam")
    transformers.SamImageProcessorPil().save_pretrained(tmp_path / "sam")
    model = read_model(str(tmp_path / "sam"))
    assert model.processing.image.height == 1024
    encoder, decoder = (
        export_graph(model, graph.name, batch=1, out=tmp_path, samples=samples_of(model, graph, n=1))
        for graph in model.graphs
    )
    assert encoder.outputs[0].shape == (1, 256, 64, 64)
    assert decoder.inputs[0].shape == (1, 256, 64, 64)
    assert decoder.outputs[0].shape[2:] == (4, 256, 256)
    assert max(encoder.proof.max_relative_error, decoder.proof.max_relative_error) < 1e-4
