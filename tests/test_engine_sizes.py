"""What engines are built for: as asked for, else what the pipeline feeds, and never less than golden vectors need."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import edgevlm
from edgevlm.data import shapes
from edgevlm.errors import ModelError
from edgevlm.plan import TEXT_ENCODER
from edgevlm.runtime.engine import AskedRange, BuildSettings, ShapeRange
from edgevlm.runtime.spec import TensorSpec
from edgevlm.runtime.tasks.mask_generation import IMAGE_ENCODER, MASK_DECODER
from edgevlm.steps.engines import shape_ranges
from tests.fast import FAST

PIXELS = TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, 64, 64))
FIXED = TensorSpec(name="pixel_values", dtype="float32", shape=(1, 3, 64, 64))
TOKENS = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence"))
POINTS = TensorSpec(name="input_points", dtype="float32", shape=(1, "prompts", "points", 2))


def span_of(graph: str, spec: TensorSpec, **asked: AskedRange) -> ShapeRange | None:
    return shape_ranges(graph, [spec], asked=asked, text_length=77).get(spec.name)


@pytest.mark.parametrize(
    ("graph", "spec", "least", "best", "most"),
    [
        (IMAGE_ENCODER, PIXELS, (1, 3, 64, 64), (1, 3, 64, 64), (8, 3, 64, 64)),
        (TEXT_ENCODER, TOKENS, (1, 1), (1, 77), (32, 77)),
        (MASK_DECODER, POINTS, (1, 1, 1, 2), (1, 1, 2, 2), (1, 16, 8, 2)),
    ],
)
def test_where_nobody_asks_the_pipeline_is_served(graph, spec, least, best, most):
    assert span_of(graph, spec) == ShapeRange(min=least, opt=best, max=most)


@pytest.mark.parametrize(
    ("asked", "least", "best"),
    [
        (AskedRange(max=(16, 3, 64, 64)), 1, 1),
        (AskedRange(opt=(4, 3, 64, 64), max=(16, 3, 64, 64)), 1, 4),
        (AskedRange(min=(2, 3, 64, 64), max=(16, 3, 64, 64)), 2, 2),
        (AskedRange(opt=(16, 3, 64, 64)), 1, 16),
        (AskedRange(min=(16, 3, 64, 64)), 16, 16),
    ],
)
def test_what_is_left_out_begins_at_one_where_the_dimension_is_free(asked, least, best):
    sizes = (3, 64, 64)
    wanted = ShapeRange(min=(least, *sizes), opt=(best, *sizes), max=(16, *sizes))
    assert span_of(IMAGE_ENCODER, PIXELS, pixel_values=asked) == wanted


def test_a_graph_of_fixed_sizes_gets_no_range_even_where_one_is_asked_for():
    assert span_of(IMAGE_ENCODER, FIXED) is None
    assert span_of(IMAGE_ENCODER, FIXED, pixel_values=AskedRange(max=(1, 3, 64, 64))) is None
    # What is not its size is left for the lint to refuse.
    wrong = AskedRange(max=(2, 3, 64, 64))
    assert span_of(IMAGE_ENCODER, FIXED, pixel_values=wrong) == wrong.as_given()


@pytest.mark.slow
def test_a_range_without_what_golden_vectors_are_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))
    pictures = tmp_path / "pictures"
    shapes.write_folder(pictures, n=120, seed=5)
    rest = {name: value for name, value in FAST.items() if name != "backends"}
    asked = {**rest, "target": "jetson-orin-nano", "batch": None, "eval_data": pictures, "precision": "fp32"}
    narrow = {"pixel_values": ShapeRange(min=(4, 3, 64, 64), opt=(4, 3, 64, 64), max=(8, 3, 64, 64))}
    with pytest.raises(ModelError, match="'pixel_values' will be 1×3×64×64, but the engine is to be built for 4×3"):
        edgevlm.compile("demo", **asked, shapes=narrow, output=tmp_path / "out")
    wide = {"pixel_values": AskedRange(max=(16, 3, 64, 64))}
    edgevlm.compile("demo", **asked, shapes=wide, output=tmp_path / "out")
    form = next(form for form in edgevlm.inspect(tmp_path / "out").forms if form.build)
    built = msgspec.convert(form.build, BuildSettings).shapes["pixel_values"]
    assert built == ShapeRange(min=(1, 3, 64, 64), opt=(1, 3, 64, 64), max=(16, 3, 64, 64))
