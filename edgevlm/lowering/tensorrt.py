"""TensorRT's forms of a graph: float, float16, int8 and int4 weights, all as ONNX that any ONNX Runtime opens.

Networks are strongly typed, in TensorRT 11 and TensorRT for RTX always: what is computed in which type stands in the
graph, as Q/DQ pairs and casts, and builders have no flags for it. So what a form answers can be judged on the CPU,
where ONNX Runtime computes the same quantized numbers; how fast its engine is only the GPU tells.

Sources: docs.nvidia.com/deeplearning/tensorrt, "Working with Quantized Types", "Explicit Quantization" and "Strongly
Typed Networks".
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from edgevlm.job import place
from edgevlm.lowering import CalibrationData, Lowered, Recipe
from edgevlm.lowering.tensorrt_lint import check_graph
from edgevlm.quantization.blocked import at_opset, blocked_names, quantize_blocks
from edgevlm.quantization.calibration import CalibrationRecipe
from edgevlm.quantization.graphs import has_external_data, lowered_names
from edgevlm.quantization.half import fp16_graph
from edgevlm.quantization.post_training import external_file, prepare, quantize, save_model
from edgevlm.quantization.schemes import CONV, LINEAR, Calibration, Scheme
from edgevlm.runtime.spec import SessionOptions
from edgevlm.target import Target

AS_WRITTEN = SessionOptions(entries={"session.disable_quant_qdq": "1"})
"""How ONNX Runtime computes these forms as they are written. Left to itself it makes biases of int8 layers 32-bit
integers, and where the rest is float16 their scales overflow: MobileNetV2 then gives nothing but noise."""

# What TensorRT's own tools (ModelOpt) take for weights of 4 bits.
_BLOCK_SIZE = 128
# Q/DQ pairs around float16 need scales in float16.
_HALF_SCALES_OPSET = 19


class TensorRtRecipe(Recipe, frozen=True, kw_only=True):
    """How a form is made; all defaults together leave the graph as it was exported.

    Args:
        scheme: how it becomes int8.
        block_size: of weights in 4 bits.
        is_half: what is left in float is in 16 bits.
    """

    scheme: Scheme | None = None
    block_size: int | None = None
    is_half: bool = False

    def describe(self) -> dict[str, str]:
        words: dict[str, str] = {}
        if self.scheme:
            words |= self.scheme.describe()
        if self.block_size:
            words |= {"method": "weight-only", "weights": f"4 bits in blocks of {self.block_size}, symmetric"}
        rest = "the rest in" if words else "computes in"
        return words | {rest: "float16" if self.is_half else "float32"} | super().describe()


class TensorRtLowering:
    """Nothing of TensorRT is needed here; ``prefix`` sets apart the forms of two backends that take the same graphs."""

    tools: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "numpy")
    judged_by: ClassVar[str] = "onnxruntime"
    judged_with: ClassVar[SessionOptions] = AS_WRITTEN
    prefix: ClassVar[str] = "tensorrt"

    def prepare(self, graph: Path, out: Path) -> Path:
        return _raise_opset(prepare(graph, out / graph.name), _HALF_SCALES_OPSET)

    def recipes(self, prepared: Path, *, target: Target, calibration: CalibrationRecipe) -> tuple[TensorRtRecipe, ...]:
        """Float, float16, int8 by each way to find ranges and int4 weights, with the rest in float32 and in float16."""
        made = [self._recipe("fp32", "fp32"), self._recipe("fp16", "fp16", is_calibrated=True, is_half=True)]
        for method in calibration.methods:
            scheme = int8_scheme(method)
            if lowered_names(prepared, scheme):
                made += self._both(f"int8-{method}", scheme.precision, is_calibrated=True, scheme=scheme)
        if blocked_names(prepared, _BLOCK_SIZE):
            made += self._both("int4-weights", "int4-weights", is_for_size=True, block_size=_BLOCK_SIZE)
        return tuple(recipe for recipe in made if _is_wanted(recipe, target))

    def lowered_nodes(self, prepared: Path, recipe: TensorRtRecipe) -> tuple[str, ...]:
        if recipe.block_size:
            return blocked_names(prepared, recipe.block_size)
        return lowered_names(prepared, recipe.scheme) if recipe.scheme else ()

    def sessions(self, recipe: TensorRtRecipe, *, n_threads: int, may_use_fewer: bool) -> dict[str, SessionOptions]:
        return {}

    def lower(self, graph: Path, prepared: Path, recipe: TensorRtRecipe, data: CalibrationData, out: Path) -> Lowered:
        """A graph that TensorRT takes, which is checked. Raises besides: ModelError: a tensor overflows in float16."""
        file = out / graph.name
        if recipe.scheme is None and recipe.block_size is None and not recipe.is_half:
            files = tuple(place(each, out / each.name).name for each in (graph, external_file(graph)) if each.is_file())
            lowered = Lowered(files=files)
        else:
            lowered = _lowered(prepared, recipe, data, file)
        check_graph(file)
        return lowered

    def _both(self, name: str, precision: str, *, is_calibrated: bool = False, **how: Any) -> Iterator[TensorRtRecipe]:
        yield self._recipe(name, precision, is_calibrated=is_calibrated, **how)
        # Looking for overflow takes pictures.
        yield self._recipe(f"{name}-fp16", f"{precision}-fp16", is_calibrated=True, is_half=True, **how)

    def _recipe(self, name: str, precision: str, **how: Any) -> TensorRtRecipe:
        return TensorRtRecipe(name=f"{self.prefix}-{name}", precision=precision, **how)


class TensorRtRtxLowering(TensorRtLowering):
    prefix: ClassVar[str] = "tensorrt-rtx"


def int8_scheme(calibration: Calibration) -> Scheme:
    """Convolutions and linear layers in signed 8 bits; what they give stays float, so that the rest can fuse to it."""
    return Scheme(
        name=f"int8-static-symmetric-{calibration}",
        method="static",
        activation="s8",
        calibration=calibration,
        group="core",
        op_types=(*CONV, *LINEAR),
        float_output_op_types=(*CONV, *LINEAR),
        is_symmetric=True,
    )


def _is_wanted(recipe: TensorRtRecipe, target: Target) -> bool:
    words = {"fp16" if recipe.is_half else "fp32", recipe.precision.split("-")[0]}
    return words <= set(target.precisions)


def _lowered(prepared: Path, recipe: TensorRtRecipe, data: CalibrationData, out: Path) -> Lowered:
    """First fewer bits for weights and activations, then 16 for what is left: the quantizer wants float32."""
    with tempfile.TemporaryDirectory(prefix=".edgevlm-", dir=out.parent) as folder:
        quantized = Path(folder) / out.name if recipe.is_half else out
        source, files = prepared, tuple[str, ...]()
        words: dict[str, str] = {}
        if recipe.scheme:
            assert recipe.scheme.calibration is not None, "int8 is static here"
            ranges = data.ranges(prepared, recipe.scheme.calibration)
            made = quantize(prepared, recipe.scheme, ranges=ranges, keep_float=recipe.keep_float, out=quantized)
            source, files, words = quantized, made.files, {"asks for": _int8_words(quantized)}
        elif recipe.block_size:
            blocked = quantize_blocks(prepared, recipe.block_size, keep_float=recipe.keep_float, out=quantized)
            source, files, words = quantized, blocked.files, {"asks for": blocked.describe()}
        if recipe.is_half:
            files = fp16_graph(source, data.feeds(), out=out).files
    return Lowered(files=files, runs=words)


def _int8_words(graph: Path) -> str:
    """What the Q/DQ pairs ask for; what a builder fuses of it is the builder's affair."""
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    products = [node for node in nodes if node.op_type in (*CONV, *LINEAR)]
    n_int8 = sum(dequantized.issuperset(node.input[:2]) for node in products)
    return f"{n_int8} convolutions and matrix products in int8, {len(products) - n_int8} in float"


def _raise_opset(prepared: Path, opset: int) -> Path:
    """Bring a graph to ``opset`` where it lies, if it is older."""
    import onnx

    header = onnx.load(prepared, load_external_data=False)
    if all(each.version >= opset for each in header.opset_import if each.domain in ("", "ai.onnx")):
        return prepared
    model = at_opset(onnx.load(prepared), opset)
    is_large = has_external_data(prepared)
    external_file(prepared).unlink(missing_ok=True)  # onnx would write behind what is there
    save_model(model, prepared, is_large=is_large)
    return prepared
