"""What kind of work an operator does, by the name that a backend gives it."""

from __future__ import annotations

from edgevlm.measure.work import RIGHT_OPERAND

CONVOLUTION = "convolution"
MATRIX = "matrix product"
CONVERSION = "quantize and convert"
LAYOUT = "layout"
NORMALIZATION = "normalization and softmax"
POOLING = "pooling and reduction"
ELEMENTWISE = "elementwise"
OTHER = "other"

KINDS = (CONVOLUTION, MATRIX, NORMALIZATION, ELEMENTWISE, POOLING, CONVERSION, LAYOUT, OTHER)

QUANTIZE = frozenset({"QuantizeLinear", "DequantizeLinear"})

_KIND_OF = {
    **{op: CONVOLUTION if "Conv" in op or op == "Deconvolution" else MATRIX for op in RIGHT_OPERAND},
    **dict.fromkeys(
        (*QUANTIZE, "DynamicQuantizeLinear", "Cast", "Convert", "FakeQuantize", "Quantize", "Dequantize"), CONVERSION
    ),
    **dict.fromkeys(
        (
            "Attention", "QAttention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention",
            "ScaledAttn", "ScaledDotProductAttention", "Einsum", "LSTM", "GRU", "RNN",
        ),
        MATRIX,
    ),
    **dict.fromkeys(
        (
            "Transpose", "Reshape", "ReorderInput", "ReorderOutput", "Reorder", "Flatten", "Squeeze", "Unsqueeze",
            "Slice", "StridedSlice", "Split", "Concat", "QLinearConcat", "Gather", "GatherElements", "GatherND", "Pad",
            "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "ScatterND", "ScatterElements", "Identity",
            "MemcpyToHost", "MemcpyFromHost", "Broadcast", "ShuffleChannels",
        ),
        LAYOUT,
    ),
    **dict.fromkeys(
        (
            "LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization",
            "RMSNorm", "SkipSimplifiedLayerNormalization", "InstanceNormalization", "GroupNormalization",
            "BatchNormalization", "LpNormalization", "MVN", "NormalizeL2", "Softmax", "QLinearSoftmax", "LogSoftmax",
            "LogSoftMax", "SoftMax",
        ),
        NORMALIZATION,
    ),
    **dict.fromkeys(
        (
            "GlobalAveragePool", "QLinearGlobalAveragePool", "AveragePool", "QLinearAveragePool", "MaxPool",
            "GlobalMaxPool", "Pooling", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd",
            "QLinearReduceMean", "Reduce", "ArgMax", "ArgMin", "TopK", "NonMaxSuppression", "CumSum",
        ),
        POOLING,
    ),
    **dict.fromkeys(
        (
            "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Log", "Erf", "Abs", "Neg", "Relu", "LeakyRelu", "PRelu",
            "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "Swish",
            "SiLU", "Mish", "Elu", "Celu", "Selu", "Softplus", "Where", "Equal", "Greater", "Less", "And", "Or", "Not",
            "Min", "Max", "Sum", "Mean", "Resize", "Upsample", "Interpolate", "QLinearAdd", "QLinearMul",
            "QLinearSigmoid", "QLinearLeakyRelu", "QLinearWhere", "Eltwise", "Subgraph", "MathFused", "Select",
            "Sin", "Cos", "Floor", "Ceil", "Round", "Mod", "Reciprocal", "Sign",
        ),
        ELEMENTWISE,
    ),
}  # fmt: skip


def kind_of(op_type: str) -> str:
    """One of ``KINDS``.

    Example:
        >>> kind_of("QLinearConv"), kind_of("ReorderInput"), kind_of("SomethingNew")
        ('convolution', 'layout', 'other')
    """
    return _KIND_OF.get(op_type, OTHER)
