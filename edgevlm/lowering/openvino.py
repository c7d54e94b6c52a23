"""OpenVINO: float, bfloat16, int8 by NNCF's post-training quantization, and int8 or int4 weights alone.

Sources: docs.openvino.ai (convert_model, nncf.quantize, nncf.compress_weights); SmoothQuant, arXiv:2211.10438; AWQ,
arXiv:2306.00978.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import itertools
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np

from edgevlm.errors import DataError, MissingToolError, ModelError
from edgevlm.job import place
from edgevlm.lowering import CalibrationData, Lowered, Recipe
from edgevlm.quantization.calibration import CalibrationRecipe
from edgevlm.quantization.graphs import lowered_names, schemes_of_graph
from edgevlm.quantization.post_training import prepare, quantize
from edgevlm.quantization.schemes import Scheme
from edgevlm.runtime.backends.openvino import DIMENSIONS, import_openvino, no_telemetry, openvino_core, words_of
from edgevlm.runtime.spec import Array, SessionOptions
from edgevlm.target import Target

Weights = Literal["int8_sym", "int8_asym", "int4_sym", "int4_asym"]

BF16 = SessionOptions(entries={"INFERENCE_PRECISION_HINT": "bf16"})
# What layers with compressed weights read is quantized as it comes, 32 values to a scale: OpenVINO's own default.
DYNAMIC = SessionOptions(entries={"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"})

_BF16_ISA = frozenset({"avx512_bf16", "amx_bf16"})
_VNNI_ISA = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})

_CONV = frozenset({
    "Convolution", "ConvolutionBackpropData", "GroupConvolution", "GroupConvolutionBackpropData",
})  # fmt: skip
_WORK = _CONV | {"MatMul"}
_NO_WORK = frozenset({"Constant", "Parameter", "Result"})

# What the CPU plugin calls its kernels for these. Source: openvino/src/plugins/intel_cpu/src/cpu_types.cpp.
_KERNELS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "GatherMatmul", "MatMul"})

# What a kernel says it computes in; for weights alone it is what they are stored as.
_COMPUTED_IN = {"i8": "int8", "u8": "int8", "i4": "int4", "u4": "int4"}


# AWQ takes NNCF's default of 32; scale estimation would take 64, and as long again.
_N_FOR_WEIGHTS = 32


class OpenVinoRecipe(Recipe, frozen=True, kw_only=True):
    """How a form is made; all defaults together leave the graph in float.

    Args:
        method: ``quantize`` makes weights and activations int8, ``compress`` weights alone; ``convert`` takes what
            ONNX Runtime's quantizer makes of ``scheme``.
        preset: ``mixed`` gives activations a zero point, ``performance`` does not.
        is_transformer: NNCF's patterns for attention, and SmoothQuant.
        ranges: of an activation: the ``mean`` of each picture's extremes, or the extremes over all of them.
        bias: ``by layer`` corrects biases one after the other, each over what the layers before it really give.
        reduces_range: 7-bit weights, for x86 without VNNI, whose 16-bit sums saturate.
        weights: what ``compress`` stores them as.
        group_size: weights that share a scale; -1 is a whole row.
        is_data_aware: scales are chosen by what the layers see (AWQ and scale estimation).
    """

    method: Literal["float", "quantize", "compress", "convert"] = "float"
    scheme: Scheme | None = None
    preset: Literal["mixed", "performance"] = "mixed"
    is_transformer: bool = False
    ranges: Literal["mean", "minmax"] = "mean"
    bias: Literal["as it is", "fast", "by layer"] = "fast"
    reduces_range: bool = False
    weights: Weights = "int8_sym"
    group_size: int = -1
    is_data_aware: bool = False

    def describe(self) -> dict[str, str]:
        rest = self.session.entries.get("INFERENCE_PRECISION_HINT", "f32")
        if self.method == "quantize":
            words = {
                "method": "NNCF quantize",
                "activations": "asymmetric" if self.preset == "mixed" else "symmetric",
                "weights": "int8, per channel" + (", 7 bits" if self.reduces_range else ""),
                "ranges": self.ranges,
                "bias correction": self.bias,
            }
            words |= {"smoothing": "SmoothQuant"} if self.is_transformer else {}
        elif self.method == "compress":
            words = {
                "method": "NNCF compress_weights" + (", AWQ, scale estimation" if self.is_data_aware else ""),
                "weights": self.weights + (f", groups of {self.group_size}" if self.group_size > 0 else ", per row"),
                "activations": "int8, as they come" if self.session == DYNAMIC else "float",
            }
        else:
            words = self.scheme.describe() if self.scheme else {}
        return words | {"the rest in": rest} | super().describe()


class OpenVinoLowering:
    tools: ClassVar[tuple[str, ...]] = ("openvino", "nncf", "numpy")
    judged_by: ClassVar[str] = "openvino"
    judged_with: ClassVar[SessionOptions] = SessionOptions()

    def prepare(self, graph: Path, out: Path) -> Path:
        """OpenVINO's own format, weights in float32, shapes and names as they were exported.

        Beside it lies the graph as ONNX Runtime's quantizer wants it, for convolutional nets that it takes.
        """
        prepared = _save(_converted(graph), out / f"{graph.stem}.xml")
        if not _is_attentive(_operators(_read(prepared))):
            with contextlib.suppress(ModelError):
                prepare(graph, _for_onnx_runtime(prepared))
        return prepared

    def recipes(self, prepared: Path, *, target: Target, calibration: CalibrationRecipe) -> tuple[OpenVinoRecipe, ...]:
        """Float, bfloat16 where the processor has it, int8 in the ways that suit the graph, weights alone for size.

        The files of a form with the rest in bfloat16 are those of the form with the rest in float.
        """
        model = _read(prepared)
        counts = _operators(model)
        has_bf16 = "bf16" in target.precisions and bool(_BF16_ISA & set(target.isa))
        recipes = [OpenVinoRecipe(name="openvino-fp32", precision="fp32")]
        if has_bf16:
            recipes.append(OpenVinoRecipe(name="openvino-bf16", precision="bf16", session=BF16))
        if "int8" in target.precisions:
            recipes += _onnx_runtime_recipes(_for_onnx_runtime(prepared), target, calibration)
        if not _work_nodes(model) or _missing_nncf():
            return tuple(recipes)
        if "int8" in target.precisions:
            recipes += _int8_recipes(counts, target, calibration, has_bf16=has_bf16)
        if counts["MatMul"]:
            recipes += _weight_recipes(target)
        return tuple(recipes)

    def lowered_nodes(self, prepared: Path, recipe: OpenVinoRecipe) -> tuple[str, ...]:
        if recipe.method == "float":
            return ()
        if recipe.scheme:
            return lowered_names(_for_onnx_runtime(prepared), recipe.scheme)
        kept = set(recipe.keep_float)
        names = (op.get_friendly_name() for op in _work_nodes(_read(prepared)))
        return tuple(name for name in names if name not in kept)

    def sessions(self, recipe: OpenVinoRecipe, *, n_threads: int, may_use_fewer: bool) -> dict[str, SessionOptions]:
        """Threads tied to cores of their own win where nothing else runs, and lose where something does."""
        found: dict[str, SessionOptions] = {}
        if n_threads > 1:
            found["pinned"] = _told(recipe.session, n_threads=n_threads, entries={"ENABLE_CPU_PINNING": "YES"})
            if may_use_fewer:
                found["1-thread"] = _told(recipe.session, n_threads=1)
        return found

    def lower(self, graph: Path, prepared: Path, recipe: OpenVinoRecipe, data: CalibrationData, out: Path) -> Lowered:
        """A float form is the prepared graph itself. Raises besides: MissingToolError: NNCF is not installed."""
        file = out / f"{graph.stem}.xml"
        if recipe.method == "float":
            for suffix in (".xml", ".bin"):
                place(prepared.with_suffix(suffix), file.with_suffix(suffix))
        else:
            make = {"quantize": _quantized, "compress": _compressed, "convert": _requantized}[recipe.method]
            _save(make(prepared, recipe, data), file)
        runs = _runs(file) + (" by their weights" if recipe.method == "compress" else "")
        return Lowered(files=(file.name, file.with_suffix(".bin").name), runs={"runs": runs})


def _told(session: SessionOptions, *, n_threads: int, entries: Mapping[str, str] | None = None) -> SessionOptions:
    return msgspec.structs.replace(session, n_threads=n_threads, entries={**session.entries, **(entries or {})})


# --- recipes ----------------------------------------------------------------------------------------------


def _onnx_runtime_recipes(prepared: Path, target: Target, calibration: CalibrationRecipe) -> Iterator[OpenVinoRecipe]:
    """Its Q/DQ pairs stand where OpenVINO can use them too, and its ranges are there already.

    MobileNetV2 and ResNet-56, one thread: 3.5 and 0.81 ms, NNCF's 3.6 and 0.83, at a smaller error for the latter.
    """
    if not prepared.is_file():
        return
    schemes = schemes_of_graph(
        prepared,
        activation_sign=target.activation_sign,
        methods=calibration.methods,
        reduce_range=_saturates(target),
    )
    for scheme in [each for each in schemes if each.method == "static"][:1]:
        yield OpenVinoRecipe(
            name="openvino-int8-onnx", precision=scheme.precision, is_calibrated=True, method="convert", scheme=scheme
        )


def _saturates(target: Target) -> bool:
    """Pairs of 8-bit products overflow the 16 bits that x86 without VNNI adds them up in."""
    return target.arch == "x86-64" and not set(target.isa) & _VNNI_ISA


def _int8_recipes(
    counts: Counter[str], target: Target, calibration: CalibrationRecipe, *, has_bf16: bool
) -> Iterator[OpenVinoRecipe]:
    is_attentive = _is_attentive(counts)
    first = OpenVinoRecipe(
        name="openvino-int8",
        precision="int8-static",
        is_calibrated=True,
        method="quantize",
        # Activations without a zero point run faster (MobileNetV2, Zen 4, one thread: 3.3 ms for 3.6), but those of a
        # transformer are lopsided.
        preset="mixed" if is_attentive else "performance",
        is_transformer=is_attentive,
        reduces_range=_saturates(target),
    )
    yield first
    if is_attentive and has_bf16:  # softmax and norms stay in float; a convolutional net has next to nothing left there
        yield _rest_in_bf16(first)
    if is_attentive:
        yield OpenVinoRecipe(name="openvino-int8-dynamic", precision="int8-dynamic", method="compress", session=DYNAMIC)
    if calibration.name == "thorough":
        yield msgspec.structs.replace(first, name="openvino-int8-minmax", ranges="minmax", bias="as it is")
        # It runs the graph once for each layer: minutes.
        yield msgspec.structs.replace(first, name="openvino-int8-by-layer", bias="by layer")


def _weight_recipes(target: Target) -> Iterator[OpenVinoRecipe]:
    """Small rather than fast: weights in int8 alone made CLIP B/32's image tower slower than float."""
    if "int8" in target.precisions:
        yield OpenVinoRecipe(
            name="openvino-int8-weights", precision="int8-weights", is_for_size=True, method="compress"
        )
    if "int4" in target.precisions:
        # Groups of 128 are NNCF's default; 64 hold the narrower layers of towers.
        yield OpenVinoRecipe(
            name="openvino-int4-weights", precision="int4-weights", is_calibrated=True, is_for_size=True,
            method="compress", weights="int4_asym", group_size=64, is_data_aware=True, session=DYNAMIC,
        )  # fmt: skip


def _rest_in_bf16(recipe: OpenVinoRecipe) -> OpenVinoRecipe:
    return msgspec.structs.replace(
        recipe, name=f"{recipe.name}-bf16", precision=f"{recipe.precision}-bf16", session=BF16
    )


# --- graphs -----------------------------------------------------------------------------------------------


def _converted(graph: Path) -> Any:
    """The model of an ONNX graph.

    Raises: ModelError: OpenVINO cannot read it.
    """
    ov = import_openvino()
    try:
        with _quiet():
            model = ov.convert_model(str(graph))
    except Exception as error:  # openvino raises RuntimeError and classes of its own
        raise ModelError(
            f"OpenVINO {ov.__version__.split('-')[0]} cannot read '{graph.name}': {words_of(error)}.",
            hint="Compile with --backends onnxruntime.",
        ) from error
    _keep_dimension_names(graph, model)
    return model


def _for_onnx_runtime(prepared: Path) -> Path:
    return prepared.with_suffix(".onnx")


def _operators(model: Any) -> Counter[str]:
    return Counter(op.get_type_name() for op in model.get_ordered_ops())


def _is_attentive(counts: Counter[str]) -> bool:
    """A lone softmax is a classifier's head."""
    return counts["Softmax"] > 1 or counts["ScaledDotProductAttention"] > 0 or counts["MVN"] > 0


def _read(file: Path) -> Any:
    return openvino_core().read_model(str(file))


def _work_nodes(model: Any) -> list[Any]:
    """Convolutions and matrix products that have weights, in the order in which they run."""
    return [
        op
        for op in model.get_ordered_ops()
        if op.get_type_name() in _WORK
        and any(op.input_value(i).get_node().get_type_name() == "Constant" for i in range(op.get_input_size()))
    ]


def _keep_dimension_names(graph: Path, model: Any) -> None:
    """Write what the ONNX graph calls its free dimensions into the model, which has only question marks for them."""
    import onnx

    values = onnx.load(graph, load_external_data=False).graph
    names = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*values.input, *values.output)
        if any(dim.dim_param for dim in value.type.tensor_type.shape.dim)
    }
    if names:
        model.set_rt_info(json.dumps(names, sort_keys=True), list(DIMENSIONS))


def _save(model: Any, file: Path) -> Path:
    """Write a model so that the same one gives the same bytes: no paths, no settings, no running numbers in names."""
    ov = import_openvino()
    for key in list(model.rt_info):
        if key not in ("Runtime_version", DIMENSIONS[0]):
            del model.rt_info[key]
    _settle_names(model)
    ov.save_model(model, str(file), compress_to_fp16=False)
    return file


def _settle_names(model: Any) -> None:
    """OpenVINO numbers what has no name, through all graphs of a process; number it within the graph."""
    for index, op in enumerate(model.get_ordered_ops()):
        kind, name = op.get_type_name(), op.get_friendly_name()
        is_numbered = re.fullmatch(r"[A-Z]\w*_\d+", name) if kind == "Constant" else re.fullmatch(rf"{kind}_\d+", name)
        if is_numbered:
            op.set_friendly_name(f"{kind}.{index}")


def _runs(file: Path) -> str:
    """What the plugin runs after its own fusions. The same files may be opened for float32 and for bfloat16, so what
    is neither int8 nor int4 is float."""
    compiled = openvino_core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    kinds = Counter(
        _COMPUTED_IN.get(str(info["runtimePrecision"].value), "float")
        for info in infos
        if info["layerType"].value in _KERNELS
    )
    return f"{_counted(kinds)} convolutions and matrix products"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[kind]} {kind}" for kind in ("int8", "int4", "float") if counts[kind]) or "no"


def _requantized(prepared: Path, recipe: OpenVinoRecipe, data: CalibrationData) -> Any:
    scheme, graph = recipe.scheme, _for_onnx_runtime(prepared)
    assert scheme is not None and scheme.calibration is not None, "such recipes are made with a static scheme"
    with tempfile.TemporaryDirectory(prefix="edgevlm-openvino-") as folder:
        made = Path(folder) / graph.name
        ranges = data.ranges(graph, scheme.calibration)
        quantize(graph, scheme, ranges=ranges, keep_float=recipe.keep_float, out=made)
        return _converted(made)


# --- NNCF -------------------------------------------------------------------------------------------------


def _missing_nncf() -> bool:
    return importlib.util.find_spec("nncf") is None


def _import_nncf() -> Any:
    try:
        with no_telemetry():
            nncf = importlib.import_module("nncf")
    except ImportError as error:
        raise MissingToolError("NNCF is not installed.", hint="Run: pip install 'edgevlm[openvino]'") from error
    nncf.set_log_level(logging.ERROR)
    return nncf


def _quantized(prepared: Path, recipe: OpenVinoRecipe, data: CalibrationData) -> Any:
    nncf = _import_nncf()
    samples = _samples(prepared, data.feeds())
    advanced = nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.ENABLE if recipe.reduces_range else nncf.OverflowFix.DISABLE,
        disable_bias_correction=recipe.bias == "as it is",
    )
    if recipe.ranges == "minmax":
        ranges = importlib.import_module("nncf.quantization.range_estimator")
        advanced.activations_range_estimator_params = ranges.RangeEstimatorParametersSet.MINMAX
    model = _read(prepared)
    with _refused(prepared, recipe), _quiet(), _one_core():
        return nncf.quantize(
            model,
            nncf.Dataset(samples),
            preset=nncf.QuantizationPreset(recipe.preset),
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(samples),
            fast_bias_correction=recipe.bias == "fast",
            model_type=nncf.ModelType.TRANSFORMER if recipe.is_transformer else None,
            ignored_scope=_ignored(nncf, (*recipe.keep_float, *_after(model, recipe.keep_float))),
            advanced_parameters=advanced,
        )


def _compressed(prepared: Path, recipe: OpenVinoRecipe, data: CalibrationData) -> Any:
    nncf = _import_nncf()
    options: dict[str, Any] = {}
    if recipe.is_data_aware:
        samples = _samples(prepared, itertools.islice(data.feeds(), _N_FOR_WEIGHTS))
        options = {"dataset": nncf.Dataset(samples), "subset_size": len(samples), "awq": True, "scale_estimation": True}
    if recipe.group_size > 0:
        options |= {
            "group_size": recipe.group_size,
            # A layer that no group fits gets a smaller one.
            "advanced_parameters": nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
            ),
            "all_layers": True,
        }
    with _refused(prepared, recipe), _quiet(), _one_core():
        return nncf.compress_weights(
            _read(prepared),
            mode=nncf.CompressWeightsMode(recipe.weights),
            ignored_scope=_ignored(nncf, recipe.keep_float),
            **options,
        )


def _after(model: Any, kept: tuple[str, ...]) -> Iterator[str]:
    """What comes between a layer that stays in float and the next layer: sums, poolings, products of activations.

    NNCF quantizes these wherever they stand. Between layers in float that saves no time, and costs what no repair gets
    back: of a ResNet-50 of random weights each group alone lost 9 points or more, the last layer alone 9.1.
    """
    work = {op.get_friendly_name() for op in _work_nodes(model)}
    is_kept = False
    for op in model.get_ordered_ops():
        if op.get_friendly_name() in work:
            is_kept = op.get_friendly_name() in kept
        elif is_kept and op.get_type_name() not in _NO_WORK:
            yield op.get_friendly_name()


def _ignored(nncf: Any, names: tuple[str, ...]) -> Any:
    return nncf.IgnoredScope(names=sorted(names)) if names else None


def _samples(prepared: Path, feeds: Iterable[dict[str, Array]]) -> list[dict[str, Array]]:
    """All feeds: NNCF goes over them several times.

    Raises: DataError: there are none, or one holds NaN or infinity.
    """
    samples = list(feeds)
    for sample in samples:
        for name, value in sample.items():
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                raise DataError(
                    f"Calibrating '{prepared.stem}' met NaN or infinity in '{name}', where numbers were expected.",
                    hint="Check the pictures and their preprocessing.",
                )
    if not samples:
        raise DataError(
            f"There is nothing to calibrate '{prepared.stem}' with: 0 samples.",
            hint="Give at least one picture with --calibration-data.",
        )
    return samples


@contextlib.contextmanager
def _refused(prepared: Path, recipe: OpenVinoRecipe) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # nncf raises its own classes, ValueError, RuntimeError, ...
        raise ModelError(
            f"NNCF cannot lower '{prepared.stem}' by {recipe.name}: {words_of(error)}.",
            hint="Leave that form out, or compile with --precision fp32.",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNCF draws progress bars and tables on standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """NNCF makes a Core for every graph that it runs: give it the process's one; ``openvino_core`` says why."""
    ov = import_openvino()
    of_library = ov.Core
    ov.Core = openvino_core
    try:
        yield
    finally:
        ov.Core = of_library
