"""Building engines, where TensorRT is: on the device that will run them, or ahead of time for the GPUs of an RTX.

Sources: docs.nvidia.com/deeplearning/tensorrt and .../tensorrt-rtx, Python API (Builder, OnnxParser, IBuilderConfig);
"Migrating Python Code from TensorRT 10.x to 11.x".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgevlm.errors import MissingToolError, ModelError, UsageError
from edgevlm.runtime.backends.tensorrt import TITLES, Cuda, dtype_name, import_tensorrt, new_log
from edgevlm.runtime.engine import (
    BuildSettings,
    EngineBackend,
    EngineCard,
    HardwareCompatibility,
    ShapeRange,
    graph_digest,
    write_card,
)
from edgevlm.runtime.spec import Spec, TensorSpec

# One of them says what is wrong; a broken graph may give hundreds.
_MAX_ERRORS = 3

_COMPATIBILITY: dict[HardwareCompatibility, str] = {
    "none": "NONE", "ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"
}  # fmt: skip


class ParserError(Spec, frozen=True, kw_only=True):
    """Why TensorRT's parser does not take a node; ``node`` and ``op_type`` are empty where it names none."""

    node: str
    op_type: str
    reason: str

    def describe(self) -> str:
        where = f"node '{self.node}' ({self.op_type}): " if self.op_type else ""
        return f"{where}{self.reason}"


def serialize_engine(
    graph: Path, out: Path, *, settings: BuildSettings, timing_cache: Path | None = None
) -> EngineCard:
    """Build the engine ``out`` from an ONNX graph, and write its card beside it.

    Args:    timing_cache: read where it is there, and written: makes the next build shorter. Full TensorRT alone.
    Raises:  MissingToolError: TensorRT, or a GPU where one is needed, is not here. ModelError: TensorRT does not take
        the graph, or cannot build it. UsageError: the settings ask for what this TensorRT does not do.
    """
    trt, title = import_tensorrt(settings.backend), TITLES[settings.backend]
    _check_settings(trt, settings, timing_cache)
    built_for = settings.compute_capabilities or (Cuda().compute_capability(),)
    log = new_log(trt)
    builder = trt.Builder(log)
    network, parser = _parsed(trt, builder, log, graph)
    if not parser.is_parsed:
        errors = parser_errors_of(parser.parser)
        raise ModelError(
            f"{title} {trt.__version__} does not take '{graph.name}': "
            f"{'; '.join(error.describe() for error in errors[:_MAX_ERRORS]) or log.words()}.",
            hint="Lower the graph anew by edgevlm for this target, or use another backend.",
        )
    config = _config(trt, builder, settings)
    cache = _timing_cache(config, timing_cache) if timing_cache else None
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ModelError(
            f"{title} {trt.__version__} cannot build '{graph.name}': {log.words()}.",
            hint="Give every free dimension a range of sizes, or use another backend.",
        )
    if timing_cache and cache:
        _replace(timing_cache, bytes(memoryview(cache.serialize())))
    card = EngineCard(
        version=str(trt.__version__),
        compute_capabilities=built_for,
        graph_sha256=graph_digest(graph),
        settings=settings,
        inputs=tuple(_tensor_spec(network.get_input(i)) for i in range(network.num_inputs)),
        outputs=tuple(_tensor_spec(network.get_output(i)) for i in range(network.num_outputs)),
    )
    _replace(out, bytes(memoryview(plan)))
    write_card(out, card)
    return card


def parser_errors(graph: Path, backend: EngineBackend) -> tuple[ParserError, ...]:
    """What TensorRT's own parser has against a graph; empty where it takes it.

    Raises: MissingToolError: TensorRT is not here.
    """
    trt = import_tensorrt(backend)
    log = new_log(trt)
    # The network stays alive as long as its parser: without it the parser reads freed memory.
    network, parser = _parsed(trt, trt.Builder(log), log, graph)
    errors = () if parser.is_parsed else parser_errors_of(parser.parser)
    del parser, network
    return errors


def parser_errors_of(parser: Any) -> tuple[ParserError, ...]:
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    return tuple(
        ParserError(node=e.node_name(), op_type=e.node_operator(), reason=" ".join(e.desc().split())) for e in found
    )


def buildable_compute_capabilities(backend: EngineBackend) -> tuple[str, ...]:
    """GPUs that engines can be built for without having one; empty for full TensorRT, which has to have it.

    Raises: MissingToolError: TensorRT is not here.
    """
    kinds = getattr(import_tensorrt(backend), "ComputeCapability", None)
    names = [name for name in getattr(kinds, "__members__", ()) if name.startswith("SM")]
    return tuple(f"{name[2:-1]}.{name[-1]}" for name in names)  # SM86, SM120


class _Parsed:
    """A parser that has read a graph, and whether it took it."""

    def __init__(self, parser: Any, is_parsed: bool) -> None:
        self.parser = parser
        self.is_parsed = is_parsed


def _parsed(trt: Any, builder: Any, log: Any, graph: Path) -> tuple[Any, _Parsed]:
    """The network of a graph; whoever holds the parser must hold the network too."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    return network, _Parsed(parser, bool(parser.parse_from_file(str(graph))))


def _config(trt: Any, builder: Any, settings: BuildSettings) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = settings.optimization_level
    config.hardware_compatibility_level = getattr(
        trt.HardwareCompatibilityLevel, _COMPATIBILITY[settings.hardware_compatibility]
    )
    if settings.workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.compute_capabilities:
        config.num_compute_capabilities = len(settings.compute_capabilities)
        for index, wanted in enumerate(settings.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{wanted.replace('.', '')}"), index)
    if settings.shapes:
        _add_profile(builder, config, settings.shapes)
    return config


def _timing_cache(config: Any, file: Path) -> Any:
    """What earlier builds found out about kernels; whoever builds must hold it. One of another GPU is started anew."""
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _add_profile(builder: Any, config: Any, shapes: dict[str, ShapeRange]) -> None:
    profile = builder.create_optimization_profile()
    for name, span in shapes.items():
        profile.set_shape(name, span.min, span.opt, span.max)
    config.add_optimization_profile(profile)


def _check_settings(trt: Any, settings: BuildSettings, timing_cache: Path | None) -> None:
    title = TITLES[settings.backend]
    known = buildable_compute_capabilities(settings.backend)
    unknown = [each for each in settings.compute_capabilities if each not in known]
    if unknown and not known:
        raise MissingToolError(
            f"{title} {trt.__version__} builds for the GPU at hand alone, not ahead of time for compute capability "
            f"{', '.join(unknown)}.",
            hint="Build the engine on the device, by its build script.",
        )
    if unknown:
        raise UsageError(
            f"{title} {trt.__version__} cannot build for compute capability {', '.join(unknown)}.",
            hint=f"Use one of: {', '.join(known)}; for others use TensorRT on the device.",
        )
    if timing_cache and settings.backend != "tensorrt":
        raise UsageError(f"{title} keeps no timing cache for builds.", hint="Leave the timing cache out.")


def _tensor_spec(tensor: Any) -> TensorSpec:
    names: Sequence[str] = [tensor.get_dimension_name(i) or "?" for i in range(len(tensor.shape))]
    shape = tuple(name if size < 0 else int(size) for size, name in zip(tensor.shape, names, strict=True))
    return TensorSpec(name=tensor.name, dtype=dtype_name(tensor.dtype), shape=shape)


def _replace(file: Path, data: bytes) -> None:
    """Write a file so that it is never there by halves."""
    written = file.with_name(f".edgevlm-{os.getpid()}-{file.name}")
    written.write_bytes(data)
    written.replace(file)
