from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgevlm.errors import DataError, ModelError
from edgevlm.lowering.onnxruntime import OnnxRuntimeLowering
from edgevlm.plan import Budgets, Request
from edgevlm.quantization import post_training
from edgevlm.quantization.embeddings import fitting_block_size, pack_rows
from edgevlm.quantization.graphs import lowered_names, schemes_of_graph
from edgevlm.quantization.half import fp16_graph
from edgevlm.quantization.post_training import count_operators, prepare, quantize
from edgevlm.quantization.weight_only import (
    WEIGHT_SCHEMES,
    WeightScheme,
    quantize_weights,
    weight_names,
    weight_schemes_of_graph,
)
from edgevlm.search.spec import Variant
from edgevlm.steps.requires import requires_of
from edgevlm.steps.variants import GraphForms
from edgevlm.target import Target
from tests.quantization.graphs import Builder, save_cnn, save_transformer
from tests.quantization.test_post_training import cosine, run

N_WORDS, N_TOKENS, WIDTH = 50, 6, 40
INT8, INT4 = WEIGHT_SCHEMES[:2]


def save_text_tower(path: Path, *, width: int = WIDTH, scale: float = 1.0, n_layers: int = 1) -> Path:
    """Words and their places out of tables, linear layers with a bias, and a Gemm for the projection.

    ``width`` is no multiple of a block; ``scale`` multiplies what the first layer gives.
    """
    b = Builder()
    table, places = b.weight(N_WORDS, width, scale=1.0), b.weight(N_TOKENS, width, scale=0.1)
    x = b.node("Add", b.node("Gather", table, "input_ids"), b.node("Gather", places, "position_ids"))
    for _ in range(n_layers):
        x = b.node("Add", b.node("MatMul", x, b.weight(width, 64, scale=width**-0.5)), b.weight(64, scale=0.1))
        x = b.node("Mul", x, b.constant(np.float32(scale)))
        x = b.node("MatMul", b.node("Tanh", x), b.weight(64, width, scale=0.125))
    x = b.node("ReduceMean", x, b.constant(np.array([1])), keepdims=0)
    b.node("Gemm", x, b.weight(24, width), b.weight(24), transB=1, out="text_embeds")
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", N_TOKENS]) for n in FEED]
    outputs = [helper.make_tensor_value_info("text_embeds", TensorProto.FLOAT, ["batch", 24])]
    graph = helper.make_graph(b.nodes, "g", inputs, outputs, b.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


FEED = {
    "input_ids": np.random.default_rng(3).integers(0, N_WORDS, (8, N_TOKENS)),
    "position_ids": np.tile(np.arange(N_TOKENS), (8, 1)),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    return prepare(save_text_tower(folder / "text.onnx"), folder / "prepared.onnx")


@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES, ids=lambda s: s.name)
def test_every_layer_and_embedding_runs_packed_and_near_float(
    prepared: Path, scheme: WeightScheme, tmp_path: Path
) -> None:
    made = quantize_weights(prepared, scheme, out=tmp_path / "q.onnx")
    assert (made.fusion.n_packed, made.fusion.n_embeddings, made.fusion.n_float) == (3, 2, 0)
    assert made.files == ("q.onnx",)
    # 0.999 is what a weight-only int8 tower must keep; 4 bits of random weights lose some.
    assert cosine(run(tmp_path / "q.onnx", FEED), run(prepared, FEED)) > (0.999 if scheme.bits == 8 else 0.97)
    weights = {t.data_type for t in onnx.load(tmp_path / "q.onnx").graph.initializer if len(t.dims) > 1}
    assert TensorProto.UINT8 in weights


def test_a_wide_graph_is_as_small_as_its_bits(tmp_path: Path) -> None:
    prepared = prepare(save_text_tower(tmp_path / "t.onnx", width=512), tmp_path / "prepared.onnx")
    sizes = {s.name: quantize_and_weigh(prepared, s, tmp_path) for s in WEIGHT_SCHEMES}
    n = prepared.stat().st_size
    # 8 of 32 bits are 0.25, 4 are 0.125; scales, zero points, float biases and the embeddings' 8 bits add the rest.
    assert 0.25 < sizes["int8-weights-block128"] / n < 0.30
    assert 0.125 < sizes["int4-weights-block128"] / n < sizes["int4-weights-block32"] / n < 0.25


def quantize_and_weigh(prepared: Path, scheme: WeightScheme, folder: Path) -> int:
    quantize_weights(prepared, scheme, out=folder / "q.onnx")
    return (folder / "q.onnx").stat().st_size


def test_a_layer_without_embeddings_is_packed_too_and_products_of_activations_are_not(tmp_path: Path) -> None:
    prepared = prepare(save_transformer(tmp_path / "t.onnx", batch=1), tmp_path / "prepared.onnx")
    assert count_operators(prepared)["Gemm"] == 6
    made = quantize_weights(prepared, INT8, out=tmp_path / "q.onnx")
    assert (made.fusion.n_packed, made.fusion.n_embeddings, made.fusion.n_float) == (6, 0, 2)
    feed = {"tokens": np.random.default_rng(1).normal(size=(1, 6, 32)).astype(np.float32)}
    assert cosine(run(tmp_path / "q.onnx", feed), run(prepared, feed)) > 0.999


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_gemm_gives_what_it_gave(trans_b: int, has_bias: bool, tmp_path: Path) -> None:
    b = Builder()
    weight = b.weight(*((24, 48) if trans_b else (48, 24)), scale=0.2)
    b.node("Gemm", "x", weight, *([b.weight(24)] if has_bias else []), transB=trans_b, out="y")
    source = b.save(tmp_path / "g.onnx", {"x": [3, 48]}, {"y": [3, 24]})
    made = quantize_weights(prepare(source, tmp_path / "p.onnx"), INT8, out=tmp_path / "q.onnx")
    assert made.fusion.n_packed == 1
    feed = {"x": b.rng.normal(size=(3, 48)).astype(np.float32)}
    np.testing.assert_allclose(run(tmp_path / "q.onnx", feed), run(source, feed), atol=0.05)


def test_a_gemm_that_is_more_than_a_product_stays_float(tmp_path: Path) -> None:
    b = Builder()
    b.node("Gemm", "x", b.weight(48, 24), b.weight(24), alpha=0.5, out="h")
    b.node("MatMul", "h", b.weight(24, 16), out="y")
    prepared = prepare(b.save(tmp_path / "g.onnx", {"x": [3, 48]}, {"y": [3, 16]}), tmp_path / "p.onnx")
    made = quantize_weights(prepared, INT8, out=tmp_path / "q.onnx")
    assert (made.fusion.n_packed, made.fusion.n_float) == (1, 1)


def test_one_table_and_one_weight_read_twice_are_packed_once(tmp_path: Path) -> None:
    b = Builder()
    weight = b.weight(32, 32, scale=0.2)
    b.node("MatMul", b.node("Tanh", b.node("MatMul", "x", weight)), weight, out="y")
    prepared = prepare(b.save(tmp_path / "g.onnx", {"x": [3, 32]}, {"y": [3, 32]}), tmp_path / "p.onnx")
    made = quantize_weights(prepared, INT8, out=tmp_path / "q.onnx")
    assert made.fusion.n_packed == 2
    names = [t.name for t in onnx.load(tmp_path / "q.onnx").graph.initializer]
    assert len(names) == len(set(names)) == 2
    feed = {"x": b.rng.normal(size=(3, 32)).astype(np.float32)}
    assert cosine(run(tmp_path / "q.onnx", feed), run(prepared, feed)) > 0.999


def test_nodes_that_are_kept_keep_their_weights(prepared: Path, tmp_path: Path) -> None:
    names = weight_names(prepared, INT4)
    assert len(names) == 5
    kept = (names[0], names[-1])
    made = quantize_weights(prepared, INT4, keep_float=kept, out=tmp_path / "q.onnx")
    assert (made.fusion.n_packed, made.fusion.n_embeddings, made.fusion.n_float) == (2, 1, 1)
    by_name = {node.name: node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}
    assert {by_name[name] for name in kept} == {"Gather", "Gemm"}


def test_embeddings_may_stay_float(prepared: Path, tmp_path: Path) -> None:
    scheme = WeightScheme(name="w8", bits=8, block_size=32, is_symmetric=True, embedding_bits=None)
    assert quantize_weights(prepared, scheme, out=tmp_path / "q.onnx").fusion.n_embeddings == 0


def test_a_graph_with_nothing_to_pack_is_said(tmp_path: Path) -> None:
    b = Builder()
    b.node("Conv", "x", b.weight(4, 3, 3, 3), out="y")
    prepared = prepare(b.save(tmp_path / "c.onnx", {"x": [1, 3, 8, 8]}, {"y": [1, 4, 6, 6]}), tmp_path / "p.onnx")
    assert weight_schemes_of_graph(prepared) == ()
    with pytest.raises(ModelError, match=r"'p\.onnx' has no linear layer and no embedding"):
        quantize_weights(prepared, INT8, out=tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("block_size", [8, 48])
def test_a_block_that_no_kernel_has_is_no_scheme(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"{block_size} is no power of two from 16 on"):
        WeightScheme(name="w", bits=4, block_size=block_size, is_symmetric=True)


def test_weights_beside_the_graph_stay_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_training, "_INLINE_LIMIT_BYTES", 1000)
    prepared = prepare(save_text_tower(tmp_path / "t.onnx", width=128), tmp_path / "prepared.onnx")
    (tmp_path / "made").mkdir()
    made = quantize_weights(prepared, INT8, out=tmp_path / "made" / "q.onnx")
    assert made.files == ("q.onnx", "q.onnx.data")
    assert cosine(run(tmp_path / "made" / "q.onnx", FEED), run(prepared, FEED)) > 0.999
    (tmp_path / "half").mkdir()
    halved = fp16_graph(prepared, [FEED], out=tmp_path / "half" / "h.onnx")
    assert halved.files == ("h.onnx", "h.onnx.data")
    np.testing.assert_allclose(run(tmp_path / "half" / "h.onnx", FEED), run(prepared, FEED), atol=0.02)
    (tmp_path / "int8").mkdir()
    dynamic = next(s for s in schemes_of_graph(prepared, activation_sign="u8") if s.method == "dynamic")
    quantized = quantize(prepared, dynamic, ranges=None, out=tmp_path / "int8" / "d.onnx")
    assert quantized.files == ("d.onnx", "d.onnx.data")
    assert cosine(run(tmp_path / "int8" / "d.onnx", FEED), run(prepared, FEED)) > 0.99
    data = (tmp_path / "int8" / "d.onnx.data").stat().st_size
    assert data < 0.3 * (tmp_path / "prepared.onnx.data").stat().st_size


SCRIPT = """
import sys
from pathlib import Path
from edgevlm.quantization.half import fp16_graph
from edgevlm.quantization.post_training import prepare
from edgevlm.quantization.weight_only import WEIGHT_SCHEMES, quantize_weights
from tests.quantization.test_weight_only import FEED, save_text_tower
folder = Path(sys.argv[1])
prepared = prepare(save_text_tower(folder / "text.onnx"), folder / "prepared.onnx")
for scheme in WEIGHT_SCHEMES:
    quantize_weights(prepared, scheme, out=folder / f"{scheme.name}.onnx")
fp16_graph(prepared, [FEED], out=folder / "fp16.onnx")
"""


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
        subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], check=True, env=environment, cwd=root)
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert written[0].keys() == written[1].keys()
    assert len(written[0]) == 6
    assert [name for name in written[0] if written[0][name] != written[1][name]] == []


def test_the_root_logger_stays_as_it_was(prepared: Path, tmp_path: Path) -> None:
    # The quantizer's module calls logging.basicConfig when it is first imported.
    sys.modules.pop("onnxruntime.quantization.matmul_nbits_quantizer", None)
    before = (list(logging.getLogger().handlers), logging.getLogger().level)
    quantize_weights(prepared, INT8, out=tmp_path / "q.onnx")
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == before


# --- embeddings ---------------------------------------------------------------------------------------------


@given(n=st.integers(1, 5000), power=st.integers(4, 8))
def test_blocks_hold_little_padding(n: int, power: int) -> None:
    block = fitting_block_size(n, 2**power)
    assert block & (block - 1) == 0
    assert 16 <= block <= 2**power
    assert block == 16 or -n % block <= n / 8
    assert block == 2**power or -n % (2 * block) > n / 8


def unpacked(rows: Any, scales: Any, zeros: Any, *, bits: int, block_size: int, n_columns: int) -> Any:
    """A table from its bytes, as the operator's specification reads them."""
    n_rows, n_blocks = scales.shape

    def split(values: Any, n: int) -> Any:
        if bits == 8:
            return values[:, :n].astype(np.float64)
        return np.stack([values & 15, values >> 4], axis=-1).reshape(n_rows, -1)[:, :n].astype(np.float64)

    middle = np.full((n_rows, n_blocks), 2.0 ** (bits - 1)) if zeros is None else split(zeros, n_blocks)
    steps = split(rows, n_columns)
    return (steps - middle.repeat(block_size, 1)[:, :n_columns]) * scales.repeat(block_size, 1)[:, :n_columns]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([16, 32, 64]),
    n_columns=st.integers(8, 80).map(lambda n: 2 * n),
    is_symmetric=st.booleans(),
    spread=st.floats(1e-3, 1e3),
)
def test_values_come_back_within_a_step_of_their_block(
    seed: int, bits: Any, block_size: int, n_columns: int, is_symmetric: bool, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    table = (rng.normal(size=(5, n_columns)) * np.geomspace(1, spread, 5)[:, None]).astype(np.float32)
    rows, scales, zeros = pack_rows(table, bits=bits, block_size=block_size, is_symmetric=is_symmetric)
    assert rows.shape == (5, n_columns * bits // 8)
    back = unpacked(rows, scales, zeros, bits=bits, block_size=block_size, n_columns=n_columns)
    step = np.abs(scales).repeat(block_size, 1)[:, :n_columns]
    # Symmetric: the end that is not the largest magnitude clips by up to a whole step. With zero points, which are
    # rounded as well, each end may clip by half a step more.
    assert (np.abs(back - table) <= step * (1 + 1e-3)).all()
    n_steps = 2**bits - 1 if not is_symmetric else 2 ** (bits - 1)
    for start in range(0, n_columns, block_size):
        block = table[:, start : start + block_size]
        reach = np.abs(block).max(1) if is_symmetric else np.maximum(block.max(1), 0) - np.minimum(block.min(1), 0)
        np.testing.assert_allclose(np.abs(scales[:, start // block_size]), reach / n_steps, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n_columns", [16, 40, 130])
def test_the_kernel_reads_what_was_packed(bits: Any, n_columns: int, tmp_path: Path) -> None:
    b = Builder()
    table = b.weight(20, n_columns, scale=1.0)
    b.node("Gather", table, "ids", out="rows")
    graph = helper.make_graph(
        b.nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", n_columns])],
        b.weights,
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "g.onnx")
    scheme = WeightScheme(name="w", bits=bits, block_size=32, is_symmetric=False, embedding_bits=bits)
    quantize_weights(prepare(tmp_path / "g.onnx", tmp_path / "p.onnx"), scheme, out=tmp_path / "q.onnx")
    values = numpy_helper.to_array(b.weights[0])
    block = fitting_block_size(n_columns, 32)
    packed = pack_rows(values, bits=bits, block_size=block, is_symmetric=False)
    expected = unpacked(*packed, bits=bits, block_size=block, n_columns=n_columns)
    ids = np.array([3, 0, 19, 3])
    np.testing.assert_allclose(run(tmp_path / "q.onnx", {"ids": ids}), expected[ids], rtol=1e-5, atol=1e-6)


def test_int8_schemes_pack_embeddings_too(prepared: Path, tmp_path: Path) -> None:
    schemes = schemes_of_graph(prepared, activation_sign="u8")
    assert {scheme.embedding_bits for scheme in schemes} == {8}
    dynamic = next(scheme for scheme in schemes if scheme.method == "dynamic")
    names = lowered_names(prepared, dynamic)
    assert len(names) == 5
    quantize(prepared, dynamic, ranges=None, out=tmp_path / "q.onnx")
    assert count_operators(tmp_path / "q.onnx")["GatherBlockQuantized"] == 2
    assert cosine(run(tmp_path / "q.onnx", FEED), run(prepared, FEED)) > 0.99
    # Each part alone, as a search over groups of nodes asks for it.
    tables = tuple(n for n in names if n.startswith("gather"))
    only_tables = tuple(n for n in names if n not in tables)
    alone = quantize(prepared, dynamic, ranges=None, keep_float=only_tables, out=tmp_path / "e.onnx")
    assert sum(alone.fusion.n_int8.values()) == 0
    assert count_operators(tmp_path / "e.onnx")["GatherBlockQuantized"] == 2
    quantize(prepared, dynamic, ranges=None, keep_float=tables, out=tmp_path / "l.onnx")
    assert "GatherBlockQuantized" not in count_operators(tmp_path / "l.onnx")
    with pytest.raises(ModelError, match="nothing that int8-dynamic-linear makes int8"):
        quantize(prepared, dynamic, ranges=None, keep_float=names, out=tmp_path / "n.onnx")


# --- fp16 ---------------------------------------------------------------------------------------------------


def test_fp16_is_half_as_large_and_keeps_types(tmp_path: Path) -> None:
    prepared = prepare(save_text_tower(tmp_path / "t.onnx", width=256), tmp_path / "prepared.onnx")
    fp16_graph(prepared, [FEED], out=tmp_path / "h.onnx")
    assert 0.49 < (tmp_path / "h.onnx").stat().st_size / prepared.stat().st_size < 0.55
    got = run(tmp_path / "h.onnx", FEED)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, run(prepared, FEED), atol=0.02)


def test_fp16_takes_a_mask_of_minus_infinity_and_convolutions(tmp_path: Path) -> None:
    for name, save, key, shape in (
        ("transformer", save_transformer, "tokens", (1, 6, 32)),
        ("cnn", save_cnn, "pixel_values", (1, 3, 16, 16)),
    ):
        prepared = prepare(save(tmp_path / f"{name}.onnx"), tmp_path / f"{name}-prepared.onnx")
        feed = {key: np.random.default_rng(2).normal(size=shape).astype(np.float32)}
        fp16_graph(prepared, [feed], out=tmp_path / "h.onnx")
        np.testing.assert_allclose(run(tmp_path / "h.onnx", feed), run(prepared, feed), atol=0.02)


def test_an_overflow_is_said_with_the_tensor_that_overflows(tmp_path: Path) -> None:
    prepared = prepare(save_text_tower(tmp_path / "t.onnx", scale=30000.0), tmp_path / "prepared.onnx")
    product = next(node for node in onnx.load(prepared).graph.node if node.op_type == "Mul")
    with pytest.raises(ModelError, match=rf"overflows: tensor '{product.output[0]}' reaches .*65504"):
        fp16_graph(prepared, [FEED], out=tmp_path / "h.onnx")
    assert not (tmp_path / "h.onnx").exists()


def test_fp16_without_anything_to_check_it_with_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing to check 'prepared\.onnx' in fp16 with"):
        fp16_graph(prepared, [], out=tmp_path / "h.onnx")


# --- shipped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "least"),
    [(None, "1.18"), (INT8, "1.23"), (msgspec.structs.replace(INT8, embedding_bits=None), "1.22")],
    ids=["float", "packed", "float-embedding"],
)
def test_a_bundle_asks_for_a_runtime_that_reads_packed_weights(
    prepared: Path, scheme: WeightScheme | None, least: str, tmp_path: Path
) -> None:
    file = prepared
    if scheme:
        quantize_weights(prepared, scheme, out=tmp_path / "q.onnx")
        file = tmp_path / "q.onnx"
    variant = Variant(graph="text_encoder", name="t", precision="t", backend="onnxruntime", file=file.name)
    assert requires_of((variant,), file.parent, {}).backends == {"onnxruntime": least}


# --- offered ------------------------------------------------------------------------------------------------


def test_a_text_tower_is_offered_small_weights_and_a_picture_tower_only_for_its_size(
    prepared: Path, tmp_path: Path
) -> None:
    from edgevlm.quantization.calibration import load_recipe

    picture = prepare(save_cnn(tmp_path / "cnn.onnx"), tmp_path / "prepared.onnx")
    target = Target(name="t", description="", arch="x86-64", isa=("avx512_vnni",))
    lowering = OnnxRuntimeLowering()
    offered = {
        name: lowering.recipes(file, target=target, calibration=load_recipe("default"))
        for name, file in (("text", prepared), ("picture", picture))
    }
    small = {"int8-weights-block128", "int4-weights-block32", "int4-weights-block128"}
    by_name = {what: {r.name: r for r in recipes} for what, recipes in offered.items()}
    assert small <= by_name["text"].keys()
    assert not any(by_name["text"][name].is_for_size for name in small)
    assert all(by_name["picture"][name].is_for_size for name in small & by_name["picture"].keys())
    assert by_name["text"]["fp16"].is_for_size
    assert by_name["picture"]["fp16"].is_for_size
    assert len(lowering.lowered_nodes(prepared, by_name["text"]["int8-weights-block128"])) == 5
    assert lowering.lowered_nodes(prepared, by_name["text"]["fp16"]) == ()


@pytest.mark.parametrize(
    ("wanted", "max_size_mb", "found"),
    [
        ("auto", None, set()),
        ("auto", 1.0, {"int8-weights-block128", "int4-weights-block32", "int4-weights-block128", "fp16"}),
        ("int8", None, set()),
        ("int8", 1.0, {"int8-weights-block128"}),
        ("int8-weights", None, {"int8-weights-block128"}),
        ("int4", None, {"int4-weights-block32", "int4-weights-block128"}),
        ("int4-weights", None, {"int4-weights-block32", "int4-weights-block128"}),
        ("fp16", None, {"fp16"}),
        ("int8-static", 1.0, set()),
    ],
)
def test_what_is_made_for_its_size_is_tried_when_it_is_asked_for(
    wanted: str, max_size_mb: float | None, found: set[str], tmp_path: Path
) -> None:
    from edgevlm.quantization.calibration import load_recipe

    file = prepare(save_transformer(tmp_path / "t.onnx", batch=1), tmp_path / "prepared.onnx")
    target = Target(name="t", description="", arch="x86-64", isa=("avx512_vnni",))
    recipes = OnnxRuntimeLowering().recipes(file, target=target, calibration=load_recipe("default"))
    params = {"precision": wanted, "precisions": list(target.precisions)}
    request = Request(budgets=Budgets(max_size_mb=max_size_mb))
    forms: Any = object.__new__(GraphForms)
    forms.graph = "image_encoder"
    forms._work = SimpleNamespace(step=SimpleNamespace(params=params), job=SimpleNamespace(request=request))
    assert {recipe.name for recipe in recipes if recipe.is_for_size and forms._is_wanted(recipe)} == found
