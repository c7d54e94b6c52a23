"""ONNX Runtime's forms of a graph: float as exported, int8 and small weights by its own quantizers, and fp16."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from edgevlm.job import place
from edgevlm.lowering import CalibrationData, Lowered, Recipe
from edgevlm.lowering.ready_made import READY_MADE, check_fits
from edgevlm.quantization.calibration import CalibrationRecipe
from edgevlm.quantization.graphs import has_embedding, lowered_names, schemes_of_graph
from edgevlm.quantization.half import fp16_graph
from edgevlm.quantization.post_training import external_file, fusion_of, prepare, quantize
from edgevlm.quantization.schemes import Scheme
from edgevlm.quantization.weight_only import WeightScheme, quantize_weights, weight_names, weight_schemes_of_graph
from edgevlm.runtime.spec import SessionOptions
from edgevlm.target import Target

VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})

NO_SPINNING = "session.intra_op.allow_spinning"


class OnnxRuntimeRecipe(Recipe, frozen=True, kw_only=True):
    """``scheme`` is how the graph becomes int8 or its weights small; null leaves it as it was exported.

    Args:
        is_half: in 16-bit floats.
        ready_made: a graph that takes its place as it is, with its digest.
    """

    scheme: Scheme | WeightScheme | None = None
    is_half: bool = False
    ready_made: str = ""
    ready_made_sha256: str = ""

    def describe(self) -> dict[str, str]:
        return {**(self.scheme.describe() if self.scheme else {}), **super().describe()}


class OnnxRuntimeLowering:
    tools: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "numpy")
    judged_by: ClassVar[str] = "onnxruntime"
    judged_with: ClassVar[SessionOptions] = SessionOptions()

    def prepare(self, graph: Path, out: Path) -> Path:
        return prepare(graph, out / graph.name)

    def recipes(
        self, prepared: Path, *, target: Target, calibration: CalibrationRecipe
    ) -> tuple[OnnxRuntimeRecipe, ...]:
        schemes = schemes_of_graph(
            prepared,
            activation_sign=target.activation_sign,
            methods=calibration.methods,
            # Pairs of 8-bit products overflow the 16 bits that x86 without VNNI adds them up in.
            reduce_range=target.arch == "x86-64" and not set(target.isa) & VNNI,
        )
        has_text = has_embedding(prepared)
        return (
            OnnxRuntimeRecipe(name="fp32", precision="fp32"),
            *map(_recipe, schemes),
            *(_weight_recipe(scheme, is_for_size=not has_text) for scheme in weight_schemes_of_graph(prepared)),
            OnnxRuntimeRecipe(name="fp16", precision="fp16", is_calibrated=True, is_half=True, is_for_size=True),
        )

    def lowered_nodes(self, prepared: Path, recipe: OnnxRuntimeRecipe) -> tuple[str, ...]:
        if isinstance(recipe.scheme, WeightScheme):
            return weight_names(prepared, recipe.scheme)
        return lowered_names(prepared, recipe.scheme) if recipe.scheme else ()

    def lower(
        self, graph: Path, prepared: Path, recipe: OnnxRuntimeRecipe, data: CalibrationData, out: Path
    ) -> Lowered:
        scheme = recipe.scheme
        if recipe.ready_made:
            return _placed_ready_made(Path(recipe.ready_made), graph, out)
        if recipe.is_half:
            halved = fp16_graph(prepared, data.feeds(), out=out / graph.name)
            return Lowered(files=halved.files, runs={"runs": halved.describe()})
        if isinstance(scheme, WeightScheme):
            packed = quantize_weights(prepared, scheme, keep_float=recipe.keep_float, out=out / graph.name)
            return Lowered(files=packed.files, runs={"runs": packed.fusion.describe()})
        if scheme is None:
            files = [file for file in (graph, external_file(graph)) if file.is_file()]
            return Lowered(files=tuple(place(file, out / file.name).name for file in files))
        ranges = data.ranges(prepared, scheme.calibration) if scheme.calibration else None
        quantized = quantize(prepared, scheme, ranges=ranges, keep_float=recipe.keep_float, out=out / graph.name)
        return Lowered(files=quantized.files, runs={"runs": quantized.fusion.describe()})

    def sessions(self, recipe: Recipe, *, n_threads: int, may_use_fewer: bool) -> dict[str, SessionOptions]:
        """Threads that wait by spinning win where nothing else runs, and lose where something does."""
        found: dict[str, SessionOptions] = {}
        if n_threads > 1:
            found["no-spinning"] = SessionOptions(n_threads=n_threads, entries={NO_SPINNING: "0"})
            if may_use_fewer:
                found["1-thread"] = SessionOptions(n_threads=1)
        found["extended"] = SessionOptions(n_threads=n_threads, graph_level="extended")
        return found


def ready_made_recipe(file: Path, sha256: str) -> OnnxRuntimeRecipe:
    """The form that is ``file`` itself."""
    return OnnxRuntimeRecipe(name=READY_MADE, precision=READY_MADE, ready_made=str(file), ready_made_sha256=sha256)


def _placed_ready_made(file: Path, exported: Path, out: Path) -> Lowered:
    check_fits(file, exported)
    files = [each for each in (file, external_file(file)) if each.is_file()]
    for each in files:
        place(each, out / each.name)
    return Lowered(files=tuple(each.name for each in files), runs={"runs": fusion_of(file).describe()})


def _recipe(scheme: Scheme) -> OnnxRuntimeRecipe:
    return OnnxRuntimeRecipe(
        name=scheme.name, precision=scheme.precision, is_calibrated=scheme.calibration is not None, scheme=scheme
    )


def _weight_recipe(scheme: WeightScheme, *, is_for_size: bool) -> OnnxRuntimeRecipe:
    return OnnxRuntimeRecipe(name=scheme.name, precision=scheme.precision, scheme=scheme, is_for_size=is_for_size)
