from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgevlm.bundle.golden import how_far_apart, make_golden
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.spec import Processing, from_json
from edgevlm.runtime.verify import golden_conditions
from edgevlm.search.spec import Variant
from edgevlm.steps.bundle import tolerance_of
from tests.runtime import tiny


def test_golden_cases_hold_the_picture_the_outputs_and_the_answer(tmp_path: Path):
    manifest, files = tiny.parts("image-classification")
    pipeline = Pipeline.from_parts(
        task="image-classification",
        processing=Processing(image=tiny.IMAGE),
        sessions={"model": tiny.open_graph(files["components/model.onnx"], tmp_path)},
        labels=tiny.LABELS,
    )
    picture = tiny.picture("green", (31, 17))
    golden, made = make_golden(pipeline, [picture, picture], components=manifest.components, tolerance=0.01)
    assert golden.made_on == golden_conditions(manifest.components)
    assert golden.tolerance == 0.01
    assert len(golden.cases) == 2
    assert len(made) == 6
    case = golden.cases[0]
    assert np.array_equal(Image.open(io.BytesIO(made[case.picture])), picture)
    expected = pipeline.outputs(pipeline.preprocess(picture)[None])["logits"]
    assert np.array_equal(np.load(io.BytesIO(made[case.outputs["logits"]])), expected)
    answer = pipeline(picture)
    assert from_json(made[case.answer], type(answer)) == answer


def test_the_same_pictures_give_the_same_bytes(tmp_path: Path):
    files = [tiny.make_bundle(tmp_path / name) / "golden/0.png" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_how_far_two_pipelines_are_apart_is_their_worst_pictures():
    outputs = {"a": [[4.0, 1.0], [0.0, 2.0]], "b": [[4.0, 2.0], [1.0, 2.0]]}

    class Fixed:
        def __init__(self, name):
            self.rows = iter(outputs[name])

        def preprocess(self, image):
            return np.zeros((3, 2, 2), np.float32)

        def outputs(self, pixels):
            return {"logits": np.array([next(self.rows)], np.float32)}

    pictures = [Image.new("RGB", (2, 2))] * 2
    assert how_far_apart(Fixed("b"), Fixed("a"), pictures) == 0.5
    assert how_far_apart(Fixed("a"), Fixed("a"), pictures) == 0


@pytest.mark.parametrize(
    ("precisions", "moved", "tolerance"),
    [
        (["fp32"], 0, 1e-4),
        (["fp32", "int8-static"], 0.02, 0.03),
        (["int8-static"], 0.26, 0.13),
        (["bf16", "int8-static"], 0.02, 0.1),
        (["bf16", "int8-static-bf16"], 0.26, 0.13),
        (["int8-static"], math.inf, 0.03),
        (["int8-static"], math.nan, 0.03),
    ],
)
def test_what_quantizing_moved_widens_what_another_machine_may_be_off(precisions, moved, tolerance):
    variants = [Variant(graph="g", name=p, precision=p, backend="openvino") for p in precisions]
    assert tolerance_of(variants, moved) == tolerance
