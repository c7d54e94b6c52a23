from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevlm.quantization.graphs import operator_counts, schemes_of_graph
from edgevlm.quantization.schemes import schemes_for, static_scheme
from edgevlm.runtime.spec import from_json, to_json
from tests.quantization.graphs import Builder

MOBILENET_V2 = {"Add": 10, "Clip": 35, "Conv": 52, "Gemm": 1, "ReduceMean": 1, "Reshape": 1}
MOBILENET_V3 = {"Add": 10, "Conv": 52, "Gemm": 1, "HardSwish": 20, "HardSigmoid": 8, "Mul": 8}
CLIP_IMAGE = {"Conv": 1, "Gemm": 73, "MatMul": 24, "LayerNormalization": 26, "Softmax": 12}
CLIP_TEXT = {"MatMul": 96, "LayerNormalization": 25, "Softmax": 12, "Gather": 2}
MOBILEVIT = {"Add": 74, "Conv": 35, "Gemm": 1, "LayerNormalization": 21, "MatMul": 72, "Softmax": 9}


@pytest.mark.parametrize(
    ("op_counts", "expected"),
    [
        (MOBILENET_V2, ["static-core-minmax", "static-core-percentile", "static-core-entropy"]),
        (
            MOBILENET_V3,
            ["static-core-minmax", "static-core-percentile", "static-core-entropy", "static-all-minmax"],
        ),
        (CLIP_IMAGE, ["static-core-minmax", "static-core-percentile", "static-linear-minmax", "dynamic-linear"]),
        (CLIP_TEXT, ["static-linear-minmax", "static-linear-percentile", "dynamic-linear"]),
        (
            MOBILEVIT,
            [
                "static-core-minmax", "static-core-percentile", "static-linear-minmax", "static-conv-minmax",
                "dynamic-linear",
            ],
        ),
        ({"Relu": 3}, []),
    ],
    ids=["mobilenet-v2", "mobilenet-v3", "clip-image", "clip-text", "mobilevit", "nothing"],
)  # fmt: skip
def test_candidates_suit_the_graph(op_counts: dict[str, int], expected: list[str]) -> None:
    assert [s.name for s in schemes_for(activation_sign="u8", op_counts=op_counts)] == [f"int8-{n}" for n in expected]


def test_the_recipe_limits_the_methods_and_the_target_the_sign() -> None:
    schemes = schemes_for(activation_sign="s8", op_counts=MOBILEVIT, methods=("minmax",), reduce_range=True)
    assert {s.calibration for s in schemes} == {"minmax", None}
    assert {s.activation for s in schemes if s.method == "static"} == {"s8"}
    assert all(s.reduce_range for s in schemes)


@given(
    st.dictionaries(
        st.sampled_from(["Conv", "MatMul", "Gemm", "Softmax", "LayerNormalization", "Add", "Reshape"]),
        st.integers(0, 60),
    )
)
def test_names_are_unique_and_schemes_survive_json(op_counts: dict[str, int]) -> None:
    schemes = schemes_for(activation_sign="u8", op_counts=op_counts)
    assert len({s.name for s in schemes}) == len(schemes)
    for scheme in schemes:
        assert from_json(to_json(scheme), type(scheme)) == scheme
        assert all(isinstance(value, str) for value in scheme.describe().values())


def test_precision_is_short() -> None:
    assert static_scheme("core", "minmax", activation="u8").precision == "int8-static"


def test_no_two_schemes_make_the_same_graph_and_none_makes_none(tmp_path: Path) -> None:
    b = Builder()
    x = "x"
    for _ in range(3):
        x = b.node("Erf", b.node("Conv", x, b.weight(3, 3, 1, 1)))
    b.node("Conv", x, b.weight(3, 3, 1, 1), out="y")
    file = b.save(tmp_path / "g.onnx", {"x": [1, 3, 4, 4]}, {"y": [1, 3, 4, 4]})
    counts = operator_counts(onnx.load(file).graph)
    names = [s.name for s in schemes_for(activation_sign="u8", op_counts=counts, methods=("minmax",))]
    assert names == ["int8-static-core-minmax", "int8-static-all-minmax"]
    found = schemes_of_graph(file, activation_sign="u8", methods=("minmax",))
    assert [s.name for s in found] == ["int8-static-core-minmax"]


def test_a_product_of_two_activations_is_nothing_to_quantize(tmp_path: Path) -> None:
    b = Builder()
    b.node("MatMul", "x", "x", out="y")
    file = b.save(tmp_path / "g.onnx", {"x": [1, 4, 4]}, {"y": [1, 4, 4]})
    assert schemes_of_graph(file, activation_sign="u8") == ()
