"""Each finding on a small graph that has the fault, and none on the same graph without it.

The graphs are profiled for real; then every operator is given the same time, so that no finding hangs on the clock.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgevlm.measure.findings import Finding, find_causes
from edgevlm.measure.operators import OperatorRow, Profile, profile_graph, with_shares
from edgevlm.runtime.machine import Machine
from edgevlm.runtime.spec import SessionOptions
from tests.measure import graphs
from tests.quantization.graphs import save_cnn

VNNI = Machine(
    arch="x86-64", isa=("avx2", "avx512_bf16", "avx512_vnni", "avx512f"), is_isa_known=True, cpu="A Zen 4", board="",
    n_physical_cores=2, n_logical_cores=4, memory_bytes=1 << 34, os="Linux",
)  # fmt: skip
AVX2 = msgspec.structs.replace(VNNI, isa=("avx2",), cpu="A Haswell")
A53 = msgspec.structs.replace(VNNI, arch="aarch64", isa=("asimd",), cpu="Cortex-A53")
A76 = msgspec.structs.replace(VNNI, arch="aarch64", isa=("asimd", "asimddp"), cpu="Cortex-A76")

Save = Callable[[Path], Path]


def profile(file: Path, *, latency_ms: float = 10.0) -> Profile:
    """The graph's real operators, each with the same time, in a run of ``latency_ms``."""
    found = profile_graph(file, session=SessionOptions(n_threads=1), block_ms=1.0)
    rows = with_shares([msgspec.structs.replace(row, time_ms=1.0) for row in found.rows])
    return msgspec.structs.replace(found, rows=rows, latency_ms=latency_ms)


def kinds(found: Profile, machine: Machine = VNNI) -> set[str]:
    return {finding.kind for finding in find_causes(found, machine=machine)}


def the(kind: str, found: Profile, machine: Machine = VNNI) -> Finding:
    return next(finding for finding in find_causes(found, machine=machine) if finding.kind == kind)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return profile(graphs.save_fused(tmp_path_factory.mktemp("graphs") / "fused.onnx"))


def test_a_graph_that_is_as_it_should_be_has_no_finding(fused: Profile):
    assert {row.op_type for row in fused.rows} > {"QuantizeLinear", "DequantizeLinear"}, "its ends are float"
    assert find_causes(fused, machine=VNNI) == ()


def test_dense_convolutions_are_not_told_as_depthwise(tmp_path: Path):
    assert "depthwise convolutions" not in kinds(profile(graphs.save_depthwise(tmp_path / "dense.onnx", group=1)))


def test_a_float_bias_that_keeps_a_layer_in_float_is_found(tmp_path: Path):
    found = profile(graphs.save_float_bias(tmp_path / "g.onnx"))
    finding = the("float bias", found)
    assert (finding.n, finding.share) == (1, pytest.approx(1 / len(found.rows)))
    assert finding.what.startswith("1 Gemm with quantized inputs stayed in float because the bias is float")
    assert "MatMulAddFusion" in finding.remedy
    # The remedy is one: without the fusion nothing of the kind is found.
    cured = profile_graph(
        tmp_path / "g.onnx",
        session=SessionOptions(n_threads=1, entries={"optimization.disable_specified_optimizers": "MatMulAddFusion"}),
        block_ms=1.0,
    )
    assert "float bias" not in kinds(cured)


def test_pairs_that_did_not_fuse_are_counted_without_the_ends_of_the_graph(tmp_path: Path):
    found = profile(graphs.save_unfused(tmp_path / "g.onnx"))
    finding = the("unfused quantization", found)
    assert finding.n == sum(row.op_type in ("QuantizeLinear", "DequantizeLinear") for row in found.rows) - 2
    assert finding.n >= 6
    floats = the("float operators", found)
    assert floats.n == 4
    assert "4 Erf ran in float32, " in floats.what
    assert "between a dequantize and a quantize" in floats.what
    assert "operator group `all`" in floats.remedy


def test_float_layers_in_an_int8_graph_are_named_in_the_remedy(fused: Profile):
    layer = msgspec.structs.replace(fused.rows[0], name="late", op_type="Gemm", precision="float32", producers=("Erf",))
    found = msgspec.structs.replace(fused, rows=with_shares([*fused.rows, layer]))
    finding = the("float operators", found)
    assert finding.where == ("late",)
    assert finding.remedy.startswith("Quantize the 1 Gemm")


def test_a_float_graph_is_not_told_that_it_is_float(tmp_path: Path):
    assert kinds(profile(save_cnn(tmp_path / "cnn.onnx", batch=1))) <= {"layout", "depthwise convolutions"}


def test_signed_activations_are_found_on_x86_alone(tmp_path: Path):
    signed = profile(graphs.save_signed(tmp_path / "s8.onnx"))
    assert the("signed activations", signed).what.startswith("1 QLinearMatMul ran with signed activations")
    assert kinds(signed, A76) == set()
    assert kinds(profile(graphs.save_signed(tmp_path / "u8.onnx", kind=np.uint8))) == set()


@pytest.mark.parametrize(
    ("machine", "words"),
    [(AVX2, "A Haswell has no int8 dot product (VNNI)"), (A53, "Cortex-A53 has no int8 dot product (asimddp)")],
)
def test_a_missing_dot_product_is_told_with_the_machine(fused: Profile, machine: Machine, words: str):
    assert words in the("instruction set", fused, machine).what
    assert "instruction set" not in kinds(fused, msgspec.structs.replace(machine, is_isa_known=False))


@pytest.mark.parametrize("machine", [VNNI, A76])
def test_nothing_is_missing_where_there_is_one(fused: Profile, machine: Machine):
    assert kinds(fused, machine) == set()


def test_half_precision_without_instructions_for_it_is_told(fused: Profile):
    def in_precision(precision: str) -> Profile:
        rows = tuple(msgspec.structs.replace(row, precision=precision, op_type="MatMul") for row in fused.rows)
        return msgspec.structs.replace(fused, rows=rows)

    assert "no bf16 instructions" in the("instruction set", in_precision("bf16"), AVX2).what
    assert kinds(in_precision("bf16"), VNNI) == set()
    assert "no float16 kernels" in the("instruction set", in_precision("float16"), VNNI).what
    assert kinds(in_precision("float16"), A76) == set()


def test_ranges_found_at_run_time_and_integer_convolutions_are_told(tmp_path: Path, fused: Profile):
    found = profile(graphs.save_dynamic(tmp_path / "g.onnx"))
    finding = the("dynamic quantization", found)
    assert finding.n == 4
    assert "2 ConvInteger and 2 DynamicQuantizeLinear" in finding.what
    assert "dynamic quantization" not in kinds(fused)


def test_depthwise_convolutions_that_take_more_than_their_part_are_told(tmp_path: Path):
    found = profile(graphs.save_depthwise(tmp_path / "g.onnx", group=graphs.D))
    finding = the("depthwise convolutions", found)
    assert finding.n == 3
    assert "for 4% of the multiply-accumulates" in finding.what  # 3 · 9 of 3 · 9 + 64 · 9 products a value


def test_transposes_are_told_where_they_take_more_than_usual(tmp_path: Path, fused: Profile):
    found = profile(graphs.save_transposing(tmp_path / "g.onnx"))
    finding = the("layout", found)
    assert "Transpose" in finding.what
    assert finding.n >= 3
    few = [msgspec.structs.replace(row, time_ms=0.01 if row.name in finding.where else 10.0) for row in found.rows]
    assert "layout" not in kinds(msgspec.structs.replace(found, rows=with_shares(few)))


def test_a_tiny_graph_is_told_that_calling_it_costs(fused: Profile):
    tiny = msgspec.structs.replace(fused, latency_ms=0.02)
    finding = the("dispatch", tiny)
    assert "of 20 µs about" in finding.what
    assert finding.share is None
    assert kinds(fused) == set()


def test_operators_that_fell_back_to_the_cpu_are_told(fused: Profile):
    rows = [msgspec.structs.replace(row, provider="TensorrtExecutionProvider") for row in fused.rows[1:]]
    mixed = msgspec.structs.replace(fused, rows=with_shares([fused.rows[0], *rows]))
    assert the("provider", mixed).where == (fused.rows[0].name,)
    assert "provider" not in kinds(fused)


def test_reference_kernels_are_told(fused: Profile):
    rows = (msgspec.structs.replace(fused.rows[0], detail="ref_any_f32"), *fused.rows[1:])
    assert the("reference kernels", msgspec.structs.replace(fused, rows=rows)).n == 1


def test_findings_are_in_the_order_of_what_they_cost_and_name_five_places(tmp_path: Path):
    found = find_causes(profile(graphs.save_unfused(tmp_path / "g.onnx")), machine=AVX2)
    shares = [finding.share or 0.0 for finding in found]
    assert shares == sorted(shares, reverse=True)
    assert len(found) >= 3
    assert all(len(finding.where) <= 5 and finding.what.endswith(".") for finding in found)
    assert all(finding.remedy.endswith(".") for finding in found)


def test_without_the_graph_as_run_the_two_ends_are_still_not_blamed(fused: Profile):
    blind = [msgspec.structs.replace(row, producers=(), consumers=()) for row in fused.rows]
    assert kinds(msgspec.structs.replace(fused, rows=tuple(blind))) == set()
    pair = OperatorRow(
        name="q", op_type="QuantizeLinear", n_calls=1, time_ms=1.0, share=0.0, precision="conversion", provider=""
    )
    more = [*blind, pair, msgspec.structs.replace(pair, name="dq", op_type="DequantizeLinear")]
    assert the("unfused quantization", msgspec.structs.replace(fused, rows=with_shares(more))).n == 2
