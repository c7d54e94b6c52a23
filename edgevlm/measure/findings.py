"""Why a graph is slow, in sentences: what its profile shows, where, and what mends it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from edgevlm.measure.kinds import CONVOLUTION, LAYOUT, MATRIX, QUANTIZE, kind_of
from edgevlm.measure.operators import OperatorRow, Profile
from edgevlm.measure.work import RIGHT_OPERAND
from edgevlm.runtime.machine import Machine, describe_machine
from edgevlm.runtime.spec import Spec

Kind = Literal[
    "float operators",
    "float bias",
    "unfused quantization",
    "signed activations",
    "instruction set",
    "dynamic quantization",
    "depthwise convolutions",
    "layout",
    "dispatch",
    "provider",
    "reference kernels",
]

# A saving below this could not be told from noise: half of the interval of a ratio is 1.7 % (docs/measuring.md).
_TELLABLE = 0.02
# ResNet-20 and -56, whose graphs hold no needless transpose, spend 2 to 6 % on the order of channels that kernels want.
_USUAL_LAYOUT = 0.06
# ResNet-20 on 32×32 pictures, 0.9 ms in 54 operators, spends 1.8 % on being called and dispatched.
_USUAL_DISPATCH = 0.05

_FLOATS = frozenset({"float32", "float16", "float64", "bf16"})
_X86_INT8 = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
_ARM_INT8 = frozenset({"asimddp", "i8mm"})
_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_N_PLACES = 5


class Finding(Spec, frozen=True, kw_only=True):
    """One reason for a graph's time.

    Args:
        what: a sentence.
        remedy: a sentence that says what to do about it.
        where: names of the operators concerned, slowest first, at most five.
        n: how many operators are concerned.
        share: of the operators' time, as a fraction; null where it concerns no operator.
    """

    kind: Kind
    what: str
    remedy: str
    where: tuple[str, ...]
    n: int
    share: float | None


def find_causes(profile: Profile, *, machine: Machine | None = None) -> tuple[Finding, ...]:
    """What a profile shows, the costliest first; empty where nothing stands out.

    Args:
        machine: where it was taken; this one where left out.
    """
    machine = machine or describe_machine()
    found = [finding for find in FINDERS if (finding := find(profile, machine))]
    return tuple(sorted(found, key=lambda finding: -(finding.share or 0.0)))


# --- what stays in float ----------------------------------------------------------------------------------


def _float_operators(profile: Profile, _machine: Machine) -> Finding | None:
    if not _is_quantized(profile):
        return None
    rows = [
        row
        for row in profile.rows
        if row.precision in _FLOATS and kind_of(row.op_type) != LAYOUT and not _has_float_bias(row)
    ]
    share = _share(rows)
    if share < _TELLABLE:
        return None
    heavy = [row for row in rows if kind_of(row.op_type) in (CONVOLUTION, MATRIX)]
    between = sum("DequantizeLinear" in row.producers and "QuantizeLinear" in row.consumers for row in rows)
    squeezed = f", {between} of them between a dequantize and a quantize" if between else ""
    if _share(heavy) >= _TELLABLE:
        remedy = (
            f"Quantize the {_counted(heavy)} among them, or take the time as the price of the accuracy that they keep."
        )
    else:
        remedy = "Quantize what has an int8 kernel (the operator group `all`); the rest is the price of accuracy."
    return _finding(
        "float operators",
        rows,
        f"In an int8 graph {_counted(rows)} ran in {_joined(sorted({row.precision for row in rows}))}{squeezed}: "
        f"{share:.0%} of the time.",
        remedy,
    )


def _float_bias(profile: Profile, _machine: Machine) -> Finding | None:
    """Source: MatMulAddFusion turns MatMul and Add into a Gemm with a float bias before the Q/DQ fusions run."""
    rows = [row for row in profile.rows if _has_float_bias(row)]
    if not rows:
        return None
    return _finding(
        "float bias",
        rows,
        f"{_counted(rows)} with quantized inputs stayed in float because the bias is float: {_share(rows):.0%} of the "
        "time, besides what dequantizing their inputs takes.",
        "Write each bias as int32 with a DequantizeLinear of scale input × weight, or keep MatMul and Add apart with "
        "the session entry optimization.disable_specified_optimizers = MatMulAddFusion.",
    )


def _has_float_bias(row: OperatorRow) -> bool:
    return (
        row.precision == "float32"
        and row.op_type in ("Gemm", "FusedGemm", "Conv", "FusedConv")
        and row.producers[:2] == ("DequantizeLinear", "DequantizeLinear")
        and len(row.producers) > 2
        and row.producers[2] != "DequantizeLinear"
    )


def _unfused_quantization(profile: Profile, _machine: Machine) -> Finding | None:
    rows = [row for row in profile.rows if row.op_type in QUANTIZE or row.op_type == "FakeQuantize"]
    rows = [row for row in rows if not _is_at_the_rim(row)]
    if profile.rows and not any(row.producers for row in profile.rows):
        # The graph as run could not be read: one at the input and one at the output belong there.
        rows = sorted(rows, key=lambda row: row.time_ms)[:-2]
    if _share(rows) < _TELLABLE:
        return None
    n_weights = sum(row.producers[:1] == ("constant",) for row in rows)
    weights = f", {n_weights} of them on weights, anew at every run" if n_weights else ""
    return _finding(
        "unfused quantization",
        rows,
        f"{_counted(rows)} did not fuse into int8 operators{weights}: {_share(rows):.0%} of the time.",
        "Put a quantize and a dequantize around every input and the output of an operator that has an int8 kernel, and "
        "none around one that has not.",
    )


def _is_at_the_rim(row: OperatorRow) -> bool:
    """Quantizing the graph's input and dequantizing its output is what any int8 graph with float ends must do."""
    return row.producers[:1] == ("input",) or row.consumers == ("output",)


# --- what this machine lacks ------------------------------------------------------------------------------


def _signed_activations(profile: Profile, machine: Machine) -> Finding | None:
    """Source: static S8S8 instead of U8S8 made MobileViT-S 1.5 times slower than float on Zen 4 with VNNI."""
    rows = [
        row
        for row in profile.rows
        if row.precision == "int8" and row.op_type in RIGHT_OPERAND and row.input_types[:1] == ("int8",)
    ]
    if not rows or machine.arch != "x86-64" or profile.backend != "onnxruntime":
        return None
    return _finding(
        "signed activations",
        rows,
        f"{_counted(rows)} ran with signed activations, {_share(rows):.0%} of the time: the int8 instructions of x86 "
        "multiply unsigned by signed.",
        'Quantize activations to uint8: activation_sign = "u8" in the target.',
    )


def _instruction_set(profile: Profile, machine: Machine) -> Finding | None:
    if not machine.is_isa_known:
        return None
    isa = set(machine.isa)
    products = [row for row in profile.rows if kind_of(row.op_type) in (CONVOLUTION, MATRIX)]
    int8 = [row for row in products if row.precision == "int8"]
    if int8 and machine.arch == "x86-64" and not isa & _X86_INT8:
        return _finding(
            "instruction set",
            int8,
            f"{machine.name} has no int8 dot product (VNNI): its sums saturate at 16 bits. {_counted(int8)} ran in "
            f"int8: {_share(int8):.0%} of the time.",
            "Compile for x86-64-avx2, whose weights have 7 bits, and let compile measure whether float wins.",
        )
    if int8 and machine.arch == "aarch64" and not isa & _ARM_INT8:
        return _finding(
            "instruction set",
            int8,
            f"{machine.name} has no int8 dot product (asimddp): {_counted(int8)} took {_share(int8):.0%} of the time.",
            "Let compile measure whether float wins here.",
        )
    half = [row for row in products if row.precision == "bf16"]
    if half and not isa & _BF16:
        return _finding(
            "instruction set",
            half,
            f"{machine.name} has no bf16 instructions: {_counted(half)} in bf16 took {_share(half):.0%} of the time.",
            "Ask for float32.",
        )
    half = [row for row in products if row.precision == "float16"]
    if half and machine.arch == "x86-64" and profile.backend == "onnxruntime":
        return _finding(
            "instruction set",
            half,
            f"ONNX Runtime has no float16 kernels on x86: {_counted(half)} ran at the speed of float32: "
            f"{_share(half):.0%} of the time.",
            "Ship float32 or int8 here; float16 saves space alone.",
        )
    return None


# --- how the graph is written -----------------------------------------------------------------------------


def _dynamic_quantization(profile: Profile, _machine: Machine) -> Finding | None:
    """Source: dynamic quantization of all operators made MobileViT-S 2.5 times slower than float (ConvInteger)."""
    rows = [row for row in profile.rows if row.op_type in ("DynamicQuantizeLinear", "ConvInteger")]
    if _share(rows) < _TELLABLE:
        return None
    ranges = [row for row in rows if row.op_type == "DynamicQuantizeLinear"]
    return _finding(
        "dynamic quantization",
        rows,
        f"Dynamic quantization costs {_share(rows):.0%} of the time: {_counted(rows)}, "
        f"{_share(ranges):.0%} for finding ranges.",
        "Quantize statically with calibration pictures; keep dynamic quantization to MatMul and Gemm.",
    )


def _depthwise(profile: Profile, _machine: Machine) -> Finding | None:
    rows = [row for row in profile.rows if kind_of(row.op_type) == CONVOLUTION and _is_depthwise(row)]
    macs = sum(row.macs or 0 for row in profile.rows)
    share = _share(rows)
    share_of_macs = sum(row.macs or 0 for row in rows) / macs if macs else 0.0
    # Twice its part of the multiply-accumulates is half of the speed of the rest.
    if share < _TELLABLE or share < 2 * share_of_macs:
        return None
    return _finding(
        "depthwise convolutions",
        rows,
        f"{_counted(rows)} used each value that they read only a few times: {share:.0%} of the time for "
        f"{share_of_macs:.0%} of the multiply-accumulates.",
        "Try another backend (--backends), whose kernels may differ most here; the graph itself cannot do better.",
    )


def _is_depthwise(row: OperatorRow) -> bool:
    at = RIGHT_OPERAND.get(row.op_type)
    kernel = row.input_shapes[at] if at is not None and at < len(row.input_shapes) else None
    picture = row.input_shapes[0] if row.input_shapes else None
    if not kernel or len(kernel) < 3 or not picture or len(picture) < 3:
        return False
    # OpenVINO: groups, outputs of a group, inputs of a group; ONNX: outputs, inputs of a group.
    inputs_of_a_group = kernel[2] if len(kernel) > len(picture) else kernel[1]
    return inputs_of_a_group == 1 and min(picture[1], picture[-1]) > 1  # channels stand first or last


def _layout(profile: Profile, _machine: Machine) -> Finding | None:
    rows = [row for row in profile.rows if kind_of(row.op_type) == LAYOUT]
    if _share(rows) < _USUAL_LAYOUT:
        return None
    return _finding(
        "layout",
        rows,
        f"{_counted(rows)} only moved values: {_share(rows):.0%} of the time.",
        "Export from a layout that the kernels keep, and look for transposes and slices that undo one another.",
    )


def _dispatch(profile: Profile, _machine: Machine) -> Finding | None:
    share = profile.dispatch_ms / profile.latency_ms if profile.latency_ms else 0.0
    if share < _USUAL_DISPATCH:
        return None
    n_calls = sum(row.n_calls for row in profile.rows)
    return Finding(
        kind="dispatch",
        what=(
            f"The graph is small: of {profile.latency_ms * 1000:.0f} µs about {min(1.0, share):.0%} go into calling "
            f"the backend and dispatching {n_calls} operators."
        ),
        remedy="Run several pictures in one call (--batch), or use one thread.",
        where=(),
        n=n_calls,
        share=None,
    )


# --- where it ran -----------------------------------------------------------------------------------------


def _provider(profile: Profile, _machine: Machine) -> Finding | None:
    fallback = "CPUExecutionProvider"
    wanted = sorted({row.provider for row in profile.rows} - {fallback, "CPU", ""})
    rows = [row for row in profile.rows if row.provider == fallback]
    if not wanted or not rows:
        return None
    return _finding(
        "provider",
        rows,
        f"{_counted(rows)} fell back from {_joined(wanted)} to the CPU: {_share(rows):.0%} of the time, besides the "
        "copies between the two.",
        "Replace these operators by ones that the provider has, or keep the whole graph on the CPU.",
    )


def _reference_kernels(profile: Profile, _machine: Machine) -> Finding | None:
    rows = [row for row in profile.rows if row.detail.startswith("ref")]
    if _share(rows) < _TELLABLE:
        return None
    return _finding(
        "reference kernels",
        rows,
        f"{_counted(rows)} ran in reference kernels, which are not optimized: {_share(rows):.0%} of the time.",
        "Replace these operators by common ones, or try another backend (--backends).",
    )


FINDERS: tuple[Callable[[Profile, Machine], Finding | None], ...] = (
    _float_operators,
    _float_bias,
    _unfused_quantization,
    _signed_activations,
    _instruction_set,
    _dynamic_quantization,
    _depthwise,
    _layout,
    _dispatch,
    _provider,
    _reference_kernels,
)


# --- words ------------------------------------------------------------------------------------------------


def _finding(kind: Kind, rows: Sequence[OperatorRow], what: str, remedy: str) -> Finding:
    slowest = sorted(rows, key=lambda row: -row.time_ms)
    return Finding(
        kind=kind,
        what=what,
        remedy=remedy,
        where=tuple(row.name for row in slowest[:_N_PLACES]),
        n=len(rows),
        share=_share(rows),
    )


def _is_quantized(profile: Profile) -> bool:
    return any(row.precision == "int8" or row.op_type in QUANTIZE for row in profile.rows)


def _share(rows: Iterable[OperatorRow]) -> float:
    return sum(row.share for row in rows)


def _counted(rows: Iterable[OperatorRow]) -> str:
    """``12 Softmax``, ``12 Softmax and 3 Gemm``, or the three commonest and how many others."""
    counts = sorted(Counter(row.op_type for row in rows).items(), key=lambda item: (-item[1], item[0]))
    told = [f"{n} {op_type}" for op_type, n in counts[:3]]
    n_others = sum(n for _, n in counts[3:])
    return _joined([*told, *([f"{n_others} others"] if n_others else [])])


def _joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
