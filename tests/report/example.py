"""A report with realistic numbers and raw samples, the same on every machine, and its awkward relatives."""

from __future__ import annotations

import msgspec
import numpy as np

from edgevlm.measure.counts import CLASSES, GraphInstructions, Instructions
from edgevlm.measure.explanation import Explained, Explanation, place_under_roof, time_by_kind
from edgevlm.measure.findings import find_causes
from edgevlm.measure.operators import OperatorRow, Profile, with_shares
from edgevlm.measure.peak import Peak, Rate
from edgevlm.measure.spec import Comparison, Environment, Measurement, Protocol, Ratio
from edgevlm.measure.work import Work
from edgevlm.report.spec import REPORT_SCHEMA_VERSION, CandidateRow, DataUse, Proof, Report, ShippedForm, StepRow
from edgevlm.runtime.machine import Machine
from edgevlm.runtime.spec import Accuracy, Latency

TOOLS = {"edgevlm": "0.1.0", "onnx": "1.23.0", "onnxruntime": "1.32.0", "torch": "2.13.0", "transformers": "5.23.0"}

ENVIRONMENT = Environment(
    machine="AMD EPYC 9R14, 2 of 96 cores",
    arch="x86_64",
    isa=("avx2", "avx512f", "avx512_vnni", "avx512_bf16"),
    n_cores=2,
    memory_bytes=16_612_000_000,
    os="Linux 6.8",
    python="3.11.9",
    tools={"numpy": "2.4.0", "onnxruntime": "1.32.0"},
)

MACHINE = Machine(
    arch="x86-64", isa=ENVIRONMENT.isa, is_isa_known=True, cpu=ENVIRONMENT.machine, board="", n_physical_cores=2,
    n_logical_cores=2, memory_bytes=ENVIRONMENT.memory_bytes, os=ENVIRONMENT.os,
)  # fmt: skip

# name, type as run, precision, ms, million multiply-accumulates, of the int8 graph and of the float one
OPERATORS = {
    "int8-static-u8s8-minmax": (
        ("features.0", "Conv", "float32", 0.29, 10.8), ("features.1_dw", "QLinearConv", "int8", 0.63, 3.6),
        *((f"features.{i}", "QLinearConv", "int8", 0.21, 25.0) for i in range(2, 12)),
        ("pool", "QLinearGlobalAveragePool", "int8", 0.02, 0.0), ("classifier", "QGemm", "int8", 0.11, 1.3),
        ("input_quantized", "QuantizeLinear", "conversion", 0.13, 0.0),
        ("features.0_dequantized", "DequantizeLinear", "conversion", 0.09, 0.0),
    ),
    "fp32": (
        ("features.0", "Conv", "float32", 0.31, 10.8), ("features.1_dw", "Conv", "float32", 1.23, 3.6),
        *((f"features.{i}", "Conv", "float32", 0.59, 25.0) for i in range(2, 12)),
        ("pool", "GlobalAveragePool", "float32", 0.02, 0.0), ("classifier", "Gemm", "float32", 0.12, 1.3),
    ),
}  # fmt: skip

# name, precision, status, reason, median ms, ratio half-width, accuracy, drop, size MB, memory MB, rounds
SHAPES = (
    ("int8-static-u8s8-minmax", "int8-static", "winner",
     "The fastest valid candidate inside the accuracy budget.", 3.71, 0.012, 0.712, 0.0050, 3.72, 21.4, 20),
    ("fp32", "fp32", "float", "The baseline of all ratios.", 7.74, 0.0, 0.717, 0.0, 13.96, 38.9, 20),
    ("int8-static-u8s8-percentile", "int8-static", "inside budgets",
     "Inside the budgets, and slower than int8-static-u8s8-minmax.", 3.78, 0.013, 0.714, 0.0030, 3.72, 21.5, 20),
    ("int8-static-u8s8-conv-gemm", "int8-static", "inside budgets",
     "Inside the budgets, and slower than int8-static-u8s8-minmax.", 5.52, 0.015, 0.7155, 0.0015, 3.75, 27.2, 20),
    ("int8-static-u8s8-entropy", "int8-static", "over a budget",
     "Drops 2.1 points on the select split; the budget is 1.", 3.75, 0.014, 0.696, 0.0210, 3.72, 21.4, 20),
    ("int8-static-s8s8-minmax", "int8-static", "slower than float",
     "1.31 times the time of float: x86 has no fast signed path.", 10.14, 0.031, 0.711, 0.0060, 3.72, 22.8, 20),
    ("int8-dynamic-gemm", "int8-dynamic", "not measured validly",
     "The two halves of its turns differ by 7%: the machine was not quiet.", 7.51, 0.062, 0.717, 0.0, 12.1, 37.0, 20),
    ("int8-dynamic-all", "int8-dynamic", "dropped early",
     "After 4 rounds surely slower than 1.1 times the best.", 18.9, 0.09, None, None, 3.68, 30.2, 4),
)  # fmt: skip


def example_report() -> Report:
    """MobileNetV2 on a two-core server: a winner, its rivals, and one of each kind that lost."""
    measurements = tuple(_measurement(i, shape) for i, shape in enumerate(SHAPES))
    ratios = tuple(
        Ratio(
            subject=name, baseline="fp32", value=median / 7.74, low=median / 7.74 - half, high=median / 7.74 + half,
            n_pairs=rounds, is_valid=status != "not measured validly",
            reasons=("drift of 7% between the halves",) if status == "not measured validly" else (),
        )
        for name, _, status, _, median, half, _, _, _, _, rounds in SHAPES
        if name != "fp32"
    )  # fmt: skip
    failed = Measurement(
        subject="int8-nncf-qdq", turns_ms=(), rounds=(), warmup_ms=(), load_ms=None, memory_bytes=None, n_threads=2,
        failure="QLinearConv: input zero point must be a scalar",
    )  # fmt: skip
    comparison = Comparison(
        baseline="fp32",
        protocol=Protocol(
            n_rounds=20, min_rounds=10, block_ms=60.0, min_runs_per_turn=3, warmup_ms=300.0, confidence=0.95, seed=0
        ),
        environment=ENVIRONMENT,
        measurements=(*measurements, failed),
        ratios=ratios,
        is_valid=True,
        reasons=(),
        wall_s=38.4,
        other_load=0.031,
    )
    winner = comparison.measurement("int8-static-u8s8-minmax")
    return Report(
        schema_version=REPORT_SCHEMA_VERSION,
        title="mobilenet_v2_1.0_224",
        task="image-classification",
        target="cpu",
        source="models/mobilenet_v2 (google/mobilenet_v2_1.0_224, revision 3d4c1a7)",
        licence="Apache-2.0",
        verdict="int8-static-u8s8-minmax was chosen: the fastest of 4 candidates inside the accuracy budget of "
        "1 point, 2.09 times the speed of the float model.",
        selection="measured",
        winner="int8-static-u8s8-minmax",
        metric="top-1",
        budgets={"max_drop": 0.01, "max_latency_ms": 9.0},
        accuracy=Accuracy(
            metric="top-1", value=0.7120, reference=0.7160, drop=0.0040, drop_low=-0.0080, drop_high=0.0160, n=250,
            data="imagenet-sample", has_labels=True, others={"top-1 agreement": 0.984},
        ),
        latency=Latency(
            p50_ms=winner.percentile_ms(50), p90_ms=winner.percentile_ms(90), p99_ms=winner.percentile_ms(99),
            n=len(winner.samples_ms()), n_threads=2, batch=1, ratio=3.71 / 7.74, ratio_low=3.71 / 7.74 - 0.012,
            ratio_high=3.71 / 7.74 + 0.012, machine=ENVIRONMENT.machine,
        ),
        size_bytes=3_724_118,
        float_size_bytes=13_961_204,
        candidates=(
            *(_row(shape, comparison) for shape in SHAPES),
            CandidateRow(
                name="int8-nncf-qdq", precision="int8-static", backend="onnxruntime", recipe={"method": "nncf"},
                status="failed", reason="ONNX Runtime loads it and cannot run it: QLinearConv: input zero point must "
                "be a scalar.", size_bytes=3_802_113,
            ),
        ),
        proofs=(
            Proof(component="model", route="torch.onnx.export, dynamo", n_inputs=8, batches=(1, 3),
                  max_relative_error=2.1e-6, tolerance=1e-4, n_nodes=101),
        ),
        data=DataUse(source="imagenet-sample, 500 pictures in folders by class", n_calibrate=50, n_select=200,
                     n_report=250, has_labels=True, is_synthetic=False),
        comparisons=(comparison,),
        environment=ENVIRONMENT,
        steps=(
            StepRow(name="ingest", hit=False, wall_s=0.21, why="first time"),
            StepRow(name="export model", hit=True, wall_s=0.012, why="same weights, code and tools"),
            StepRow(name="quantize int8-static-u8s8-minmax", hit=False, wall_s=14.2, why="calibration changed: seed"),
            StepRow(name="measure", hit=False, wall_s=38.4, why="candidates changed"),
            StepRow(name="evaluate", hit=False, wall_s=21.7, why="candidates changed"),
        ),
        warnings=("The evaluation set has 500 pictures: an interval of the drop this wide cannot prove half a point.",),
        reproduce="edgevlm compile models/mobilenet_v2 --target cpu \\\n"
        "    --eval-data pictures --max-drop 0.01 --max-latency-ms 9 --threads 2 -o out",
        tools=TOOLS,
        explanation=example_explanation(),
    )  # fmt: skip


def example_explanation() -> Explanation:
    """MobileNetV2: its first convolution stayed in float, and one depthwise convolution is slow."""
    work = Work(macs=265_700_000, by_op={"Conv": 264_400_000, "Gemm": 1_300_000}, weight_bytes=13_961_204,
                activation_bytes=52_015_392)  # fmt: skip
    peak = Peak(
        backend="onnxruntime", version="1.32.0", n_threads=2, bandwidth_gb_per_s=31.4, disagreement=0.011,
        is_valid=True, machine=ENVIRONMENT.machine,
        rates=(
            Rate(precision="float32", gmac_per_s=112.0, probe="MatMul 512×512×512", by_probe={}),
            Rate(precision="int8", gmac_per_s=406.0, probe="MatMul 384×768×768", by_probe={}),
        ),
    )  # fmt: skip
    return Explanation(
        work={"model": work},
        winner=(_explained("int8-static-u8s8-minmax", 3.71, work, peak),),
        reference=(_explained("fp32", 7.74, work, peak),),
        peaks=(peak,),
    )


def _explained(name: str, latency_ms: float, work: Work, peak: Peak) -> Explained:
    rows = with_shares([
        OperatorRow(
            name=operator, op_type=op_type, n_calls=1, time_ms=time_ms, share=0.0, precision=precision,
            provider="CPUExecutionProvider", macs=round(mega_macs * 1e6), n_bytes=400_000,
            input_shapes=((1, 32, 112, 112), (32, 1, 3, 3)) if operator.endswith("_dw") and name == "fp32" else (),
            producers=("input",) if operator == "input_quantized" else ("Conv",),
            consumers=("QLinearConv",),
        )
        for operator, op_type, precision, time_ms, mega_macs in OPERATORS[name]
    ])  # fmt: skip
    profile = Profile(
        backend="onnxruntime", version="1.32.0", n_threads=2, n_runs=100, latency_ms=latency_ms,
        operators_ms=sum(row.time_ms for row in rows), profiler_ms=0.003, dispatch_ms=0.01, has_real_inputs=True,
        rows=rows,
    )  # fmt: skip
    return Explained(
        graph="model", name=name, backend="onnxruntime", profile=profile, by_kind_ms=time_by_kind(profile),
        findings=find_causes(profile, machine=MACHINE),
        roofline=place_under_roof(profile, work, peak, latency_ms=latency_ms),
    )  # fmt: skip


def fallback_report() -> Report:
    """Nothing beat float: it ships; judged by agreement with itself on generated pictures."""
    report = example_report()
    explanation = example_explanation()
    float_row = next(row for row in report.candidates if row.name == "fp32")
    slower = tuple(
        msgspec.structs.replace(row, status="slower than float", reason="Not faster than float.", ratio=1.2,
                                ratio_low=1.1, ratio_high=1.3)
        for row in report.candidates if row.name == "int8-static-s8s8-minmax"
    )  # fmt: skip
    assert report.accuracy and report.latency
    timed = report.comparisons[0].measurement("fp32")
    return msgspec.structs.replace(
        report,
        selection="float-fallback",
        winner="fp32",
        verdict="No candidate was surely faster than the float model, so the float model ships.",
        candidates=(float_row, *slower),
        data=msgspec.structs.replace(report.data, has_labels=False, is_synthetic=True, source="edgevlm.data.shapes"),
        accuracy=msgspec.structs.replace(
            report.accuracy, value=1.0, reference=1.0, drop=0.0, drop_low=0.0, drop_high=0.0, has_labels=False
        ),
        latency=msgspec.structs.replace(
            report.latency,
            p50_ms=timed.percentile_ms(50),
            p90_ms=timed.percentile_ms(90),
            p99_ms=timed.percentile_ms(99),
            ratio=None,
            ratio_low=None,
            ratio_high=None,
        ),
        size_bytes=report.float_size_bytes,
        explanation=msgspec.structs.replace(explanation, winner=explanation.reference, reference=()),
    )


def invalid_report() -> Report:
    """The machine was never quiet: nothing could be measured validly, though measuring was extended once."""
    report = fallback_report()
    comparison = report.comparisons[0]
    return msgspec.structs.replace(
        report,
        verdict="Nothing could be measured validly, even after measuring was extended, so the float model ships.",
        candidates=tuple(
            msgspec.structs.replace(row, status="float" if row.name == "fp32" else "not measured validly")
            for row in report.candidates
        ),
        comparisons=(
            msgspec.structs.replace(
                comparison, is_valid=False, was_extended=True,
                reasons=("Other programs took 71% of the processor time", "The medians drifted by 11%"),
            ),
        ),
    )  # fmt: skip


def failures_report() -> Report:
    """Every quantized candidate failed."""
    report = fallback_report()
    return msgspec.structs.replace(
        report,
        verdict="Every quantized candidate failed, so the float model ships.",
        candidates=(
            report.candidates[0],
            *(
                CandidateRow(name=f"int8-{i}", precision="int8", backend="onnxruntime", recipe={}, status="failed",
                             reason="No kernel for GridSample(20) in " + "int8, " * 30)
                for i in range(3)
            ),
        ),
    )  # fmt: skip


# Of MobileNetV2 on a Cortex-A76, in thousands: float32 multiply-add, int8 dot product, integer SIMD multiply, the rest
COUNTED = {"fp32": (80_100, 0, 0, 103_300), "int8-static": (0, 17_600, 2_800, 44_003)}


def _instructions() -> Instructions:
    classes = ("float32 multiply-add", "int8 dot product", "integer SIMD multiply", "other")
    return Instructions(
        name="mobilenet",
        cpu="cortex-a76",
        tools={"qemu": "7.2", "onnxruntime": "1.32.0"},
        left_out={"openvino-int8": "openvino's kernels are made as a graph is opened, and are not counted"},
        graphs=tuple(
            GraphInstructions(
                form=form,
                graph="model",
                precision=form,
                n_instructions=1000 * sum(thousands),
                by_class={
                    **dict.fromkeys(CLASSES, 0),
                    **{name: 1000 * n for name, n in zip(classes, thousands, strict=True)},
                },
            )
            for form, thousands in COUNTED.items()
        ),
    )


def unmeasured_report() -> Report:
    """For a board that is not at hand: several forms, nothing timed."""
    report = example_report()
    assert report.accuracy is not None
    forms = tuple(
        ShippedForm(
            name=row.name,
            precision=row.precision,
            backend=row.backend,
            status="ready to tune",
            size_bytes=row.size_bytes or 0,
            accuracy=report.accuracy,
            verified=("Accuracy and golden vectors: onnxruntime 1.32.0 on this machine (Board, x86-64).",),
            unproven=("How fast it is on raspberry-pi-5: nothing was timed.",),
        )
        for row in report.candidates[:3]
    )
    return msgspec.structs.replace(
        report,
        target="raspberry-pi-5",
        selection="unmeasured",
        explanation=None,
        winner="fp32",
        verdict="The target is not at hand, so nothing is claimed: run `edgevlm tune` on it.",
        accuracy=None,
        latency=None,
        comparisons=(),
        warnings=(),
        budgets={},
        forms=forms,
        instructions=_instructions(),
        size_bytes=report.float_size_bytes,
        licence=None,
        candidates=tuple(
            CandidateRow(name=row.name, precision=row.precision, backend=row.backend, recipe=row.recipe,
                         status="float" if row.name == "fp32" else "inside budgets",
                         reason="Verified here, not timed.", size_bytes=row.size_bytes)
            for row in report.candidates[:3]
        ),
    )  # fmt: skip


def single_report() -> Report:
    """One candidate, asked for by name, with no accuracy and no proof, and with text that wants to be markup."""
    report = example_report()
    hostile = "<script>alert(1)</script> $x_1$ | `tick` **bold** & [a](b)"
    return msgspec.structs.replace(
        report,
        title=hostile,
        source=hostile,
        selection="requested",
        verdict=hostile,
        accuracy=None,
        proofs=(),
        candidates=(msgspec.structs.replace(report.candidates[0], reason=hostile, precision="int8 $x_1$|<b>"),),
        warnings=(hostile,),
        reproduce="edgevlm compile '```' --target cpu",
    )


def crowded_report() -> Report:
    """Forty candidates with long names, over two orders of magnitude."""
    report = example_report()
    shape = SHAPES[2]
    rows, measurements = [], []
    for i in range(38):
        median = 3.8 * 1.11**i
        name = f"int8-static-u8s8-per-channel-percentile-99.{i:02d}-conv-gemm-add-global-average-pool"
        measurement = _measurement(i, (name, *shape[1:4], median, *shape[5:]))
        measurements.append(measurement)
        rows.append(
            CandidateRow(
                name=name, precision="int8-static", backend="onnxruntime", recipe={}, reason="",
                status="inside budgets" if median < 7.74 else "slower than float",
                p50_ms=measurement.percentile_ms(50), p90_ms=measurement.percentile_ms(90),
                p99_ms=measurement.percentile_ms(99), ratio=median / 7.74, ratio_low=median / 7.74 * 0.97,
                ratio_high=median / 7.74 * 1.03, accuracy=0.716 - 0.0004 * ((i * 7) % 38), drop=0.001 * i,
                drop_low=0.001 * i - 0.01, drop_high=0.001 * i + 0.01, size_bytes=3_700_000 + 1000 * i,
                memory_bytes=21_000_000, load_ms=40.0 + i,
            )
        )  # fmt: skip
    kept = report.comparisons[0].measurements[:2]
    return msgspec.structs.replace(
        report,
        candidates=(*report.candidates[:2], *rows),
        comparisons=(msgspec.structs.replace(report.comparisons[0], measurements=(*kept, *measurements)),),
    )


EXAMPLES = {
    "measured": example_report,
    "fallback": fallback_report,
    "invalid": invalid_report,
    "failures": failures_report,
    "unmeasured": unmeasured_report,
    "single": single_report,
    "crowded": crowded_report,
}


def _row(shape: tuple, comparison: Comparison) -> CandidateRow:  # type: ignore[type-arg]
    name, precision, status, reason, _, _, accuracy, drop, size_mb, memory_mb, _ = shape
    measurement, ratio = comparison.measurement(name), comparison.ratio(name)
    return CandidateRow(
        name=name,
        precision=precision,
        backend="onnxruntime",
        recipe={"method": precision},
        status=status,
        reason=reason,
        p50_ms=measurement.percentile_ms(50),
        p90_ms=measurement.percentile_ms(90),
        p99_ms=measurement.percentile_ms(99),
        ratio=ratio.value if ratio else None,
        ratio_low=ratio.low if ratio else None,
        ratio_high=ratio.high if ratio else None,
        accuracy=accuracy,
        drop=drop if ratio else None,
        drop_low=drop - 0.012 if ratio and drop is not None else None,
        drop_high=drop + 0.012 if ratio and drop is not None else None,
        size_bytes=round(size_mb * 1e6),
        memory_bytes=round(memory_mb * 1e6),
        load_ms=measurement.load_ms,
    )


def _measurement(seed: int, shape: tuple) -> Measurement:  # type: ignore[type-arg]
    """Log-normal noise, a few spikes, and a drift where the example needs one."""
    name, _, status, _, median, _, _, _, _, memory_mb, rounds = shape
    # RandomState's stream is frozen for good, Generator's is not (NumPy NEP 19).
    random = np.random.RandomState(seed)
    per_turn = max(3, round(60 / median))
    noise = np.exp(random.normal(0.0, 0.018, (rounds, per_turn)))
    spikes = 1 + (random.random_sample(noise.shape) < 0.012) * random.random_sample(noise.shape) * 0.8
    drift = np.linspace(1.0, 1.07, rounds)[:, None] if status == "not measured validly" else 1.0
    turns = np.round(median * noise * spikes * drift, 4)
    return Measurement(
        subject=name,
        turns_ms=tuple(tuple(float(sample) for sample in turn) for turn in turns),
        rounds=tuple(range(rounds)),
        warmup_ms=(median * 2.1, median * 1.04),
        load_ms=round(31.0 + 3.3 * seed, 1),
        memory_bytes=round(memory_mb * 1e6),
        n_threads=2,
        dropped_after_round=rounds if status == "dropped early" else None,
    )
