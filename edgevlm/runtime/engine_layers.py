"""What an engine does, layer by layer: what TensorRT fused, in which numbers it computes, and how long that takes.

TensorRT's engine inspector names the layers as JSON, its profiler times them by name; ``trtexec`` writes both to files.
Source: docs.nvidia.com/deeplearning/tensorrt, "Engine Inspector" and "Per-Layer Profiling"; NVIDIA/TensorRT,
samples/common/sampleReporting.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from edgevlm.errors import BundleError
from edgevlm.runtime.spec import Spec, from_json, to_json

# TensorRT's words for element types, in the order in which they are looked for: "BFloat16" holds "Float16".
_PRECISIONS = {
    "bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "fp16": "fp16", "half": "fp16", "fp8": "fp8", "fp4": "fp4",
    "int8": "int8", "int4": "int4", "int32": "int32", "int64": "int64", "uint8": "uint8", "bool": "bool",
    "fp32": "fp32", "float32": "fp32", "float": "fp32",
}  # fmt: skip


class EngineLayer(Spec, frozen=True, kw_only=True):
    """A layer as it runs: often several nodes of the graph.

    Args:
        kind: TensorRT's own word, such as ``CaskConvolution``.
        precision: of what it reads, such as ``int8``; empty where TensorRT does not say.
        layout: how its result lies in memory, in TensorRT's words.
        time_ms: in one run, the median of several; null where it was not timed.
        share: of all layers' time, as a fraction.
    """

    name: str
    kind: str = ""
    precision: str = ""
    layout: str = ""
    time_ms: float | None = None
    share: float | None = None


class EngineLayers(Spec, frozen=True, kw_only=True):
    """The layers of an engine in the order in which they run; ``<engine>-layers.json`` beside it.

    Layers are timed with synchronization between them, so that their sum is more than a run takes.

    Args:
        measured_by: what timed them, and its version.
        device: the GPU.
        n_runs: that were timed.
    """

    VERSION: ClassVar[int] = 1

    schema_version: int = VERSION
    measured_by: str
    device: str
    n_runs: int
    layers: tuple[EngineLayer, ...]

    @property
    def total_ms(self) -> float:
        return sum(layer.time_ms or 0.0 for layer in self.layers)

    def slowest(self, n: int) -> tuple[EngineLayer, ...]:
        """Those that were timed, the slowest first."""
        timed = [layer for layer in self.layers if layer.time_ms is not None]
        return tuple(sorted(timed, key=lambda layer: -(layer.time_ms or 0.0))[:n])


def layers_file(engine: Path) -> Path:
    """Where an engine's layers lie."""
    return engine.with_name(f"{engine.name}-layers.json")


def write_layers(engine: Path, layers: EngineLayers) -> Path:
    file = layers_file(engine)
    file.write_bytes(to_json(layers))
    return file


def read_layers(engine: Path) -> EngineLayers | None:
    """The layers of an engine; null where nobody profiled it.

    Raises: BundleError: the file cannot be read.
    """
    file = layers_file(engine)
    if not file.is_file():
        return None
    try:
        return from_json(file.read_bytes(), EngineLayers)
    except (OSError, msgspec.MsgspecError) as error:
        raise BundleError(
            f"The engine's layers '{file.name}' cannot be read: {error}.", hint="Build the engine anew from its graph."
        ) from error


def layers_from_inspector(text: str) -> tuple[EngineLayer, ...]:
    """The layers that TensorRT's engine inspector lists as JSON.

    An engine that was built without detailed verbosity has names alone.

    Raises: ValueError: it is no such list.
    """
    try:
        found = msgspec.json.decode(text.encode())
    except msgspec.DecodeError as error:
        raise ValueError(f"the engine inspector's answer is no JSON: {error}") from error
    listed = found.get("Layers") if isinstance(found, dict) else None
    if not isinstance(listed, list):
        raise ValueError("the engine inspector lists no layers")
    return tuple(_layer(each) for each in listed)


def with_times(layers: tuple[EngineLayer, ...], times_ms: Mapping[str, float]) -> tuple[EngineLayer, ...]:
    """The layers with what each takes; those that only the profiler names come last."""
    total, left = sum(times_ms.values()), dict(times_ms)
    timed = [_timed(layer, left.pop(layer.name, None), total) for layer in layers]
    return (*timed, *(_timed(EngineLayer(name=name), time_ms, total) for name, time_ms in left.items()))


def _timed(layer: EngineLayer, time_ms: float | None, total_ms: float) -> EngineLayer:
    if time_ms is None:
        return layer
    return msgspec.structs.replace(layer, time_ms=time_ms, share=time_ms / total_ms if total_ms else 0.0)


def _layer(listed: Any) -> EngineLayer:
    if not isinstance(listed, dict):
        return EngineLayer(name=str(listed))
    inputs, outputs = _formats(listed.get("Inputs")), _formats(listed.get("Outputs"))
    return EngineLayer(
        name=str(listed.get("Name", "")),
        kind=str(listed.get("LayerType", "")),
        precision=next((kind for each in (*inputs, *outputs) if (kind := precision_of(each))), ""),
        layout=outputs[0] if outputs else "",
    )


def _formats(tensors: Any) -> tuple[str, ...]:
    listed = tensors if isinstance(tensors, list) else []
    return tuple(str(each.get("Format/Datatype", "")) for each in listed if isinstance(each, dict))


def precision_of(words: str) -> str:
    """The element type in TensorRT's description of a tensor's format; empty where it names none.

    Example:
        >>> precision_of("Thirty-two wide channel vectorized row major Int8 format.")
        'int8'
    """
    found = re.findall(r"[a-z]+\d*", words.lower())
    return next((kind for word, kind in _PRECISIONS.items() if word in found), "")
