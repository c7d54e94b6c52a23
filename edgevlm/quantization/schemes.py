"""Which int8 forms of a graph are worth trying, as values. The machine decides between them: docs/quantization.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from edgevlm.runtime.spec import Spec

Method = Literal["static", "dynamic"]
ActivationSign = Literal["u8", "s8"]
Calibration = Literal["minmax", "percentile", "entropy"]
Group = Literal["all", "core", "linear", "conv"]

CALIBRATIONS: tuple[Calibration, ...] = ("minmax", "percentile", "entropy")

CONV = ("Conv",)
LINEAR = ("Gemm", "MatMul")
# Clamps cost nothing: ONNX Runtime takes them out and lets the quantized range do their work.
CLAMPS = ("Clip", "Relu")
# Shape-keeping operators with an int8 kernel. Left in float between two int8 convolutions, each costs a dequantize
# and a quantize (MobileNetV2, Zen 4 with VNNI, one thread: 1.4x faster than float without these, 2.1x with).
CONV_CHAIN = (
    "Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Mul", "Pad",
    "Relu", "Resize", "Sigmoid", "Slice", "Squeeze",
)  # fmt: skip
# What moves int8 values about unchanged, and what else has an int8 kernel.
ANYWHERE = (*CONV_CHAIN, "Reshape", "Split", "Transpose", "Unsqueeze")


class Scheme(Spec, frozen=True, kw_only=True):
    """One way to make a graph int8.

    Args:
        activation: unsigned or signed; x86 wants u8, ARM s8 (s8 makes MobileViT-S 1.5x slower than float on x86).
        calibration: how activation ranges are found; null where they are found at run time (dynamic).
        op_types: operators that become int8 wherever they stand. A MatMul only where its second input is a weight:
            quantizing the products of two activations gains no time that could be measured.
        chain_op_types: operators that become int8 only where all that they read comes from convolutions.
        float_output_op_types: operators whose result stays float, because float operators read it.
        reduce_range: 7-bit weights, for x86 without VNNI, whose 16-bit sums saturate.
        embedding_bits: of an embedding's table; null where the graph has none. Costs no time, and is most of the size
            of a text tower.
        is_symmetric: no zero points, and biases stay float: all that TensorRT takes.
    """

    name: str
    method: Method
    activation: ActivationSign
    weight: Literal["s8"] = "s8"
    per_channel: bool = True
    calibration: Calibration | None
    group: Group
    op_types: tuple[str, ...]
    chain_op_types: tuple[str, ...] = ()
    float_output_op_types: tuple[str, ...] = ()
    reduce_range: bool = False
    embedding_bits: Literal[4, 8] | None = None
    is_symmetric: bool = False

    @property
    def precision(self) -> str:
        """``int8-static`` or ``int8-dynamic``."""
        return f"int8-{self.method}"

    def describe(self) -> dict[str, str]:
        """The scheme in words, for a report."""
        return {
            "method": self.method,
            "activations": self.activation + (", symmetric" if self.is_symmetric else ""),
            "weights": f"{self.weight}, {'per channel' if self.per_channel else 'per tensor'}"
            + (", 7 bits" if self.reduce_range else ""),
            "calibration": self.calibration or "none",
            "operators": " ".join(self.op_types),
            "operators after convolutions": " ".join(self.chain_op_types),
            "float outputs": " ".join(self.float_output_op_types),
            **({"embeddings": f"{self.embedding_bits} bits"} if self.embedding_bits else {}),
        }


def static_scheme(
    group: Group, calibration: Calibration, *, activation: ActivationSign, reduce_range: bool = False
) -> Scheme:
    """The static scheme of an operator group.

    Example:
        >>> static_scheme("linear", "minmax", activation="u8").name
        'int8-static-linear-minmax'
    """
    op_types: dict[Group, tuple[str, ...]] = {
        "all": (*CONV, *LINEAR, *ANYWHERE),
        "core": (*CONV, *LINEAR, *CLAMPS),
        "linear": LINEAR,
        "conv": (*CONV, *CLAMPS),
    }
    return Scheme(
        name=f"int8-static-{group}-{calibration}",
        method="static",
        activation=activation,
        calibration=calibration,
        group=group,
        op_types=op_types[group],
        chain_op_types=CONV_CHAIN if group in ("core", "conv") else (),
        float_output_op_types=() if group == "all" else LINEAR,
        reduce_range=reduce_range,
    )


def dynamic_scheme(*, reduce_range: bool = False) -> Scheme:
    """Linear layers with int8 weights; each input's range is found as it comes (ONNX Runtime has this for u8 only).

    Dynamic convolutions (ConvInteger) are never offered: they run slower than float.
    """
    return Scheme(
        name="int8-dynamic-linear",
        method="dynamic",
        activation="u8",
        calibration=None,
        group="linear",
        op_types=LINEAR,
        reduce_range=reduce_range,
    )


def schemes_for(
    *,
    activation_sign: ActivationSign,
    op_counts: Mapping[str, int],
    methods: Iterable[Calibration] = CALIBRATIONS,
    reduce_range: bool = False,
) -> tuple[Scheme, ...]:
    """The schemes worth trying for a prepared graph, most promising first.

    Args:
        op_counts: how many nodes of each operator type the prepared graph has.
        methods: the calibration methods that the recipe allows.
        reduce_range: 7-bit weights, for x86 without VNNI.
    Example:
        >>> [s.name for s in schemes_for(activation_sign="u8", op_counts={"MatMul": 8, "Softmax": 2})]
        ['int8-static-linear-minmax', 'int8-static-linear-percentile', 'int8-dynamic-linear']
    """
    n_conv = sum(op_counts.get(op, 0) for op in CONV)
    n_linear = sum(op_counts.get(op, 0) for op in LINEAR)
    is_attentive = any(op_counts.get(op, 0) for op in ("Attention", "LayerNormalization", "Softmax"))
    allowed = tuple(methods)

    def static(group: Group, *calibrations: Calibration) -> list[Scheme]:
        return [
            static_scheme(group, calibration, activation=activation_sign, reduce_range=reduce_range)
            for calibration in calibrations
            if calibration in allowed
        ]

    schemes: list[Scheme] = []
    if n_conv and not is_attentive:
        schemes += static("core", "minmax", "percentile", "entropy")
        # Where nothing but a classifier's head breaks the chain (MobileNetV2, ResNet-56), all runs like core and only
        # loses accuracy by its 8-bit logits.
        schemes += static("all", "minmax") if _breaks_chain(op_counts) else []
    elif n_conv and n_linear:
        schemes += static("core", "minmax", "percentile") + static("linear", "minmax")
        # A lone patch embedding is not worth a candidate of its own.
        schemes += static("conv", "minmax") if n_conv > 2 else []
    elif n_conv:
        schemes += static("conv", "minmax", "percentile")
    elif n_linear:
        schemes += static("linear", "minmax", "percentile")
    # Beside many convolutions the one or two layers of a classifier are no work.
    if n_linear and (is_attentive or n_linear > n_conv):
        schemes.append(dynamic_scheme(reduce_range=reduce_range))
    return tuple(schemes)


def _breaks_chain(op_counts: Mapping[str, int]) -> bool:
    """Whether operators that ``core`` leaves in float stand between convolutions: a head has each but once."""
    in_chain = {*CONV, *LINEAR, *CONV_CHAIN}
    return any(n > 1 for op, n in op_counts.items() if op not in in_chain)
