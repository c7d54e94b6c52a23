"""Detection and segmentation, the whole way: an ONNX file with a card goes in, a bundle comes out, and it is judged."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import edgevlm
from edgevlm.cli.main import main
from edgevlm.data.readers import read_data_set
from edgevlm.evaluation.evaluation import evaluate
from edgevlm.ingest.card import card_labels, card_processing, read_card, whole_processing
from edgevlm.measure.protocol import QUICK
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import SessionOptions, to_json
from tests.ingest.layouts import write_card
from tests.ingest.test_detection_cards import DETECTOR, SEGMENTER, write_detector, write_segmenter

pytest.importorskip("pycocotools", reason="pycocotools is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

ROOT = Path(__file__).resolve().parents[1]
N = 24


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def draw(i: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A grey picture twice as wide as high, with a cell of it in green."""
    image = Image.new("RGB", (64, 32), (2 * i, 2 * i, 2 * i))
    left, top = 16 * (i % 4), 16 * (i // 4 % 2)
    ImageDraw.Draw(image).rectangle((left, top, left + 15, top + 15), fill=(10, 240, 10))
    return image, (left, top, 16, 16)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures with boxes, as masks, and alone."""
    root = tmp_path_factory.mktemp("data")
    images, annotations = [], []
    for i in range(N):
        image, box = draw(i)
        for folder in ("boxes/images", "masks/images", "alone"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / f"{i}.png").write_bytes(png(image))
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 32})
        annotations.append({"image_id": i, "category_id": 1, "bbox": box, "iscrowd": 0, "segmentation": []})
        mask = Image.new("L", (64, 32))
        ImageDraw.Draw(mask).rectangle((box[0], box[1], box[0] + 15, box[1] + 15), fill=1)
        (root / "masks/masks").mkdir(exist_ok=True)
        (root / f"masks/masks/{i}.png").write_bytes(png(mask))
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (root / "boxes/instances.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module", params=["boxes", "masks"])
def compiled(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp(request.param)
    write: Callable[[Path], Path]
    write, card = {"boxes": (write_detector, DETECTOR), "masks": (write_segmenter, SEGMENTER)}[request.param]
    write_card(root / "net.card.toml", card)
    return edgevlm.compile(
        str(write(root / "net.onnx")),
        eval_data=data / request.param,
        precision="fp32",
        protocol=QUICK,
        output=root / "out",
    )


METRIC = {"object-detection": "mAP50", "semantic-segmentation": "mIoU"}


def test_a_bundle_is_made_verified_and_judged(compiled, data: Path):
    manifest = compiled.manifest
    assert edgevlm.verify(compiled.bundle)
    assert manifest.accuracy is not None
    assert (manifest.accuracy.metric, manifest.accuracy.n) == (METRIC[manifest.task], 10)
    assert manifest.accuracy.has_labels
    # The detector's cells are the things; the segmenter sees edges four pixels late.
    assert manifest.accuracy.value > {"object-detection": 0.999, "semantic-segmentation": 0.6}[manifest.task]
    assert METRIC[manifest.task] in (compiled.bundle / "report" / "report.md").read_text()
    kind = "boxes" if manifest.task == "object-detection" else "masks"
    found = edgevlm.evaluate(compiled.bundle, data / kind)
    assert (found.metric, found.n) == (METRIC[manifest.task], N)
    assert found.low <= found.value <= found.high


def test_without_labels_a_bundle_agrees_with_itself(compiled, data: Path):
    found = edgevlm.evaluate(compiled.bundle, data / "alone", reference=compiled.bundle)
    assert (found.value, found.n) == (1, N)
    assert found.metric in ("box agreement", "pixel agreement")


def test_the_verbs_of_the_command_line(compiled, data: Path, capsys: pytest.CaptureFixture[str]):
    picture = str(data / "alone" / "1.png")

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main([*words])
        assert caught.value.code == 0
        return capsys.readouterr().out

    answer = json.loads(run("run", str(compiled.bundle), picture, "--json"))
    assert (answer["height"], answer["width"]) == (32, 64)
    assert answer == json.loads(to_json(edgevlm.run(compiled.bundle, picture)))
    text = run("run", str(compiled.bundle), picture)
    shown = run("inspect", str(compiled.bundle))
    if compiled.manifest.task == "object-detection":
        assert text.endswith("cat  x 16 to 32, y 0 to 16\n")
        assert "letterbox" in shown
        assert "from grid, score above 0.25, strides 8, overlap of a class at most 0.65" in shown
    else:
        assert sum(float(line.split()[0]) for line in text.splitlines()) == pytest.approx(100, abs=0.1)
    assert METRIC[compiled.manifest.task] in shown


# --- the real ones, against figures that were found apart from this code ----------------------------------


def real(assets: Path, name: str, card_name: str) -> Pipeline:
    file = ROOT / "benchmarks" / "cards" / f"{card_name}.card.toml"
    card = read_card(file)
    image = card_processing(card, where=name, graph_size=(None, None), image_size=None)
    model = assets / "models" / f"{name}.onnx"
    session = load_backend("onnxruntime").open(model, SessionOptions(n_threads=2))
    from msgspec.structs import replace

    image = replace(image, input_name=session.inputs[0].name)
    return Pipeline.from_parts(
        task=card.task,
        processing=whole_processing(card, file, image),
        sessions={"model": session},
        labels=card_labels(card, file),
    )


@pytest.mark.assets
def test_yolox_finds_what_is_known_of_it(assets: Path):
    pipeline = real(assets, "yolox-nano-coco", "yolox-nano-coco")
    data = read_data_set(assets / "data/coco128", labels=pipeline.labels, task=pipeline.task)
    found = evaluate(pipeline, data)
    assert found.n == 64
    assert found.value == pytest.approx(0.5321, abs=0.0005)
    # Boxes end at the picture's edges here, which the figure's did not: 0.3384.
    assert found.others["mAP50-95"] == pytest.approx(0.3366, abs=0.0025)


@pytest.mark.slow
@pytest.mark.assets
def test_espnet_segments_as_is_known_of_it(assets: Path):
    pipeline = real(assets, "espnetv2-s2.0-voc", "espnetv2-voc")
    data = read_data_set(assets / "data/coco128", labels=pipeline.labels, task=pipeline.task)
    assert "60 categories" in data.notes[0]
    found = evaluate(pipeline, data)
    assert found.value == pytest.approx(0.4601, abs=0.0005)
    assert found.others["pixel accuracy"] == pytest.approx(0.8979, abs=0.0005)
    answer = pipeline(assets / "data/coco128/images/000000000009.jpg")
    assert answer.to_array().shape == (480, 640)
    assert np.isclose(sum(each.share for each in answer.classes), 1)
