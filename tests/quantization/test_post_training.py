from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from edgevlm.errors import ModelError
from edgevlm.quantization import post_training
from edgevlm.quantization.calibration import collect_ranges
from edgevlm.quantization.graphs import schemes_of_graph, selected_nodes
from edgevlm.quantization.post_training import count_operators, prepare, quantize
from edgevlm.quantization.schemes import Scheme, dynamic_scheme, static_scheme
from edgevlm.steps.variants import file_digest
from tests.quantization.graphs import Builder, feeds, save_cnn, save_transformer

GRAPHS: dict[str, Callable[..., Path]] = {"cnn": save_cnn, "transformer": save_transformer}
CNN = static_scheme("core", "minmax", activation="u8")


@pytest.fixture(scope="module", params=[(name, batch) for name in GRAPHS for batch in ("batch", 1)], ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(name, float graph, prepared graph), with a free and a fixed batch: they fuse differently."""
    name, batch = request.param
    folder = tmp_path_factory.mktemp(name)
    source = GRAPHS[name](folder / "float.onnx", batch=batch)
    return name, source, prepare(source, folder / "prepared.onnx")


def run(file: Path, feed: dict[str, Any], **entries: str) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]).run(None, feed)[0]


def cosine(a: Any, b: Any) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def ranges_for(scheme: Scheme, name: str, prepared: Path, out: Path) -> Path | None:
    return collect_ranges(prepared, feeds(name, 16), scheme.calibration, out) if scheme.calibration else None


def test_prepare_changes_no_output_and_makes_gemms(case: tuple[str, Path, Path]) -> None:
    name, source, prepared = case
    (feed,) = feeds(name, 1, seed=9)
    np.testing.assert_allclose(run(prepared, feed), run(source, feed), rtol=1e-5, atol=1e-5)
    if name == "transformer" and onnx.load(source).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1:
        assert count_operators(prepared)["Gemm"] == 6


def test_every_scheme_runs_fused_and_near_float(case: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, source, prepared = case
    methods = ("minmax", "percentile") if name == "transformer" else ("minmax", "percentile", "entropy")
    schemes = schemes_of_graph(prepared, activation_sign="u8", methods=methods)
    made = set()
    for scheme in schemes:
        out = tmp_path / f"{scheme.name}.onnx"
        quantized = quantize(prepared, scheme, ranges=ranges_for(scheme, name, prepared, tmp_path / "ranges"), out=out)
        made.add(out.read_bytes())
        assert quantized.files == (out.name,)
        for feed in feeds(name, 4, seed=7):
            # Entropy of ONNX Runtime cuts hard; 0.99 and 0.95 are what seeded graphs of this size keep with room.
            assert cosine(run(out, feed), run(source, feed)) > (0.95 if scheme.calibration == "entropy" else 0.99)
        # The two products of attention are activations both, and stay float.
        fusion = quantized.fusion
        assert sum(fusion.n_float.values()) == (2 if name == "transformer" else 0), scheme.name
        assert sum(fusion.n_int8.values()) == (6 if name == "transformer" else 5), scheme.name
    assert len(made) == len(schemes) > 1


def test_signed_activations_run_fused_where_the_session_keeps_them_signed(tmp_path: Path) -> None:
    # On ARM this entry is the default; on x86 ONNX Runtime makes the activations unsigned first, and loses some.
    prepared = prepare(save_cnn(tmp_path / "cnn.onnx"), tmp_path / "prepared.onnx")
    scheme = static_scheme("core", "minmax", activation="s8")
    out = tmp_path / "s8.onnx"
    quantize(prepared, scheme, ranges=ranges_for(scheme, "cnn", prepared, tmp_path / "ranges"), out=out)
    (feed,) = feeds("cnn", 1, seed=7)
    signed = run(out, feed, **{"session.qdqisint8allowed": "1"})
    assert cosine(signed, run(prepared, feed)) > 0.99


def test_core_keeps_logits_and_attention_float(tmp_path: Path) -> None:
    prepared = prepare(save_transformer(tmp_path / "t.onnx"), tmp_path / "prepared.onnx")
    scheme = static_scheme("linear", "minmax", activation="u8")
    out = tmp_path / "q.onnx"
    quantized = quantize(prepared, scheme, ranges=ranges_for(scheme, "transformer", prepared, tmp_path / "r"), out=out)
    assert sum(quantized.fusion.n_int8.values()) == 6
    assert sum(quantized.fusion.n_float.values()) == 2
    # One Q/DQ pair for each distinct input of a linear layer (q, k and v share one) and nothing after it.
    assert count_operators(out)["QuantizeLinear"] == 4


def test_what_stands_behind_the_last_layer_stays_float(tmp_path: Path) -> None:
    b = Builder()
    x = b.node("Relu", b.node("Conv", "pixel_values", b.weight(8, 3, 3, 3), b.weight(8), pads=[1, 1, 1, 1]))
    x = b.node("Concat", x, b.node("Sigmoid", x), axis=1)  # read by the two heads
    boxes = b.node("Conv", x, b.weight(4, 16, 1, 1, scale=10.0), b.weight(4))
    scores = b.node("Sigmoid", b.node("Conv", x, b.weight(4, 16, 1, 1), b.weight(4)))
    both = b.node("Concat", boxes, scores, axis=1)
    b.node("Flatten", both, out="logits")
    file = b.save(tmp_path / "heads.onnx", {"pixel_values": [1, 3, 8, 8]}, {"logits": [1, 512]})
    prepared = prepare(file, tmp_path / "prepared.onnx")
    scheme = static_scheme("core", "minmax", activation="u8")
    graph = onnx.load(prepared).graph
    kinds = [node.op_type for node in selected_nodes(graph, scheme)]
    assert kinds == ["Conv", "Relu", "Sigmoid", "Concat", "Conv", "Conv"]
    first = next(node.name for node in graph.node if node.op_type == "Conv")
    # A clamp behind a float layer stays with it; what reads it alone is no chain of convolutions any more.
    assert [n.op_type for n in selected_nodes(graph, scheme, keep_float={first})] == ["Conv", "Conv"]


def test_ranges_collected_once_give_what_quantize_static_gives_alone(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_static

    class Reader:
        def __init__(self) -> None:
            self.feeds = iter(feeds("cnn", 16))

        def get_next(self) -> Any:
            return next(self.feeds, None)

    prepared = prepare(save_cnn(tmp_path / "cnn.onnx"), tmp_path / "prepared.onnx")
    ours, theirs = tmp_path / "ours.onnx", tmp_path / "theirs.onnx"
    quantize(prepared, CNN, ranges=ranges_for(CNN, "cnn", prepared, tmp_path / "ranges"), out=ours)
    nodes = selected_nodes(onnx.load(prepared).graph, CNN)
    quantize_static(
        prepared,
        theirs,
        Reader(),
        op_types_to_quantize=sorted({node.op_type for node in nodes}),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
    )

    # The order of the scales follows that of a set there, and is sorted here: the contents are equal.
    def contents(file: Path) -> Any:
        graph = onnx.load(file).graph
        weights = {t.name: (t.dims, numpy_helper.to_array(t).tobytes()) for t in graph.initializer}
        return weights, [n.SerializeToString() for n in graph.node]

    our_weights, our_nodes = contents(ours)
    their_weights, their_nodes = contents(theirs)
    assert our_weights == their_weights
    assert sorted(our_nodes) == sorted(their_nodes)


SCRIPT = """
import sys
from pathlib import Path
from edgevlm.quantization.calibration import collect_ranges
from edgevlm.quantization.post_training import prepare, quantize
from edgevlm.quantization.schemes import dynamic_scheme, static_scheme
from tests.quantization.graphs import Builder, feeds, save_cnn
folder = Path(sys.argv[1])
prepared = prepare(save_cnn(folder / "cnn.onnx"), folder / "prepared.onnx")
for method in ("minmax", "percentile"):
    ranges = collect_ranges(prepared, feeds("cnn", 3), method, folder / f"{method}.json")
    for group in ("core", "all"):
        scheme = static_scheme(group, method, activation="u8")
        quantize(prepared, scheme, ranges=ranges, out=folder / f"{scheme.name}.onnx")
quantize(prepared, dynamic_scheme(), ranges=None, out=folder / "dynamic.onnx")
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
    assert len(written[0]) == 9
    assert [name for name in written[0] if written[0][name] != written[1][name]] == []


def test_weights_beside_the_graph_stay_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_training, "_INLINE_LIMIT_BYTES", 1000)
    source = save_cnn(tmp_path / "cnn.onnx")
    prepared = prepare(source, tmp_path / "prepared.onnx")
    assert (tmp_path / "prepared.onnx.data").is_file()
    made = tmp_path / "made"
    made.mkdir()
    for scheme in (CNN, dynamic_scheme()):
        ranges = ranges_for(scheme, "cnn", prepared, tmp_path / "ranges")
        quantized = quantize(prepared, scheme, ranges=ranges, out=made / f"{scheme.name}.onnx")
        assert quantized.files == (f"{scheme.name}.onnx", f"{scheme.name}.onnx.data")
        assert all((made / name).is_file() for name in quantized.files)
        (feed,) = feeds("cnn", 1, seed=7)
        assert cosine(run(made / quantized.files[0], feed), run(source, feed)) > 0.99
        assert quantized.fusion.n_int8
    assert len(list(made.iterdir())) == 4


def test_other_weights_beside_an_equal_graph_are_another_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_training, "_INLINE_LIMIT_BYTES", 1000)
    prepared = prepare(save_cnn(tmp_path / "cnn.onnx"), tmp_path / "prepared.onnx")
    before = file_digest(prepared)
    data = tmp_path / "prepared.onnx.data"
    changed = bytearray(data.read_bytes())
    changed[-1] ^= 1
    data.write_bytes(changed)
    assert file_digest(prepared) != before


def test_nothing_half_written_is_left_when_the_quantizer_refuses(tmp_path: Path) -> None:
    prepared = prepare(save_cnn(tmp_path / "cnn.onnx"), tmp_path / "prepared.onnx")
    broken = tmp_path / "ranges.json"
    broken.write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ModelError, match=r"cannot quantize 'prepared\.onnx' by int8-static-core-minmax"):
        quantize(prepared, CNN, ranges=broken, out=out / "q.onnx")
    assert not list(out.iterdir())


@pytest.mark.assets
def test_prepare_takes_what_symbolic_shape_inference_refuses(assets: Path, tmp_path: Path) -> None:
    source = assets / "models" / "espnetv2-s0.5-voc.onnx"
    (graph_input,) = onnx.load(source).graph.input
    shape = [d.dim_value or 1 for d in graph_input.type.tensor_type.shape.dim]
    feed = {graph_input.name: np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    prepared = prepare(source, tmp_path / "prepared.onnx")
    np.testing.assert_allclose(run(prepared, feed), run(source, feed), rtol=1e-3, atol=1e-3)


def test_a_file_that_is_no_graph_is_said(tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"not a graph")
    with pytest.raises(ModelError, match=r"'junk\.onnx' cannot be prepared"):
        prepare(tmp_path / "junk.onnx", tmp_path / "prepared.onnx")


def test_a_scheme_with_nothing_to_do_is_said(tmp_path: Path) -> None:
    prepared = prepare(save_transformer(tmp_path / "t.onnx"), tmp_path / "prepared.onnx")
    scheme = static_scheme("conv", "minmax", activation="u8")
    with pytest.raises(ModelError, match="nothing that int8-static-conv-minmax makes int8"):
        quantize(prepared, scheme, ranges=tmp_path / "none", out=tmp_path / "q.onnx")


def test_ranges_are_for_static_schemes_and_only_for_them(tmp_path: Path) -> None:
    prepared = prepare(save_cnn(tmp_path / "cnn.onnx"), tmp_path / "prepared.onnx")
    with pytest.raises(ValueError, match="takes its activation ranges"):
        quantize(prepared, CNN, ranges=None, out=tmp_path / "q.onnx")
    with pytest.raises(ValueError, match="takes no activation ranges"):
        quantize(prepared, dynamic_scheme(), ranges=tmp_path / "none", out=tmp_path / "q.onnx")


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    spread=st.floats(1e-3, 1e3),
    is_reduced=st.booleans(),
)
def test_weights_come_back_within_half_a_step(
    tmp_path_factory: pytest.TempPathFactory, seed: int, spread: float, is_reduced: bool
) -> None:
    folder = tmp_path_factory.mktemp("steps")
    b = Builder(seed)
    weight = b.rng.normal(size=(4, 3, 3, 3)) * np.geomspace(1, spread, 4)[:, None, None, None]
    b.node("Conv", "x", b.constant(weight.astype(np.float32)), out="y")
    prepared = prepare(b.save(folder / "conv.onnx", {"x": [1, 3, 5, 5]}, {"y": [1, 4, 3, 3]}), folder / "p.onnx")
    scheme = static_scheme("core", "minmax", activation="u8", reduce_range=is_reduced)
    x = b.rng.normal(size=(1, 3, 5, 5)).astype(np.float32)
    ranges = collect_ranges(prepared, [{"x": x}], "minmax", folder / "r")
    quantize(prepared, scheme, ranges=ranges, out=folder / "q.onnx")
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(folder / "q.onnx").graph.initializer}
    q = next(v for n, v in weights.items() if v.dtype == np.int8 and v.ndim == 4)
    scale = next(v for v in weights.values() if v.dtype == np.float32 and v.shape == (4,))
    back = q.astype(np.float64) * scale[:, None, None, None]
    # Half a step for each channel on its own, up to float32 rounding of the scale.
    assert (np.abs(back - weight) <= scale[:, None, None, None] * (0.5 + 1e-3)).all()
    assert np.abs(q).max() <= (64 if is_reduced else 127)
