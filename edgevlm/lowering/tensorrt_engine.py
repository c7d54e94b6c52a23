"""From an ONNX graph to a TensorRT engine, or to what builds one elsewhere: settings, command lines, a script.

The runtime does the building, so that a device can do it without the compile side; here the graph is looked over first.
"""

from __future__ import annotations

from pathlib import Path

from edgevlm.lowering.tensorrt_lint import check_graph
from edgevlm.runtime.backends.tensorrt_build import (
    ParserError,
    buildable_compute_capabilities,
    parser_errors,
    serialize_engine,
)
from edgevlm.runtime.engine import (
    BuildSettings,
    EngineCard,
    ShapeRange,
    build_script,
    trtexec_command,
    trtexec_line,
)

__all__ = [
    "BuildSettings",
    "EngineCard",
    "ParserError",
    "ShapeRange",
    "build_engine",
    "build_script",
    "buildable_compute_capabilities",
    "parser_errors",
    "trtexec_command",
    "trtexec_line",
]


def build_engine(graph: Path, out: Path, *, settings: BuildSettings, timing_cache: Path | None = None) -> EngineCard:
    """Look a graph over, build the engine ``out`` from it, and write the engine's card beside it.

    Args:    timing_cache: read where it is there, and written: makes the next build shorter. Full TensorRT alone.
    Raises:  ModelError: TensorRT rejects the graph or would compute something else. MissingToolError: TensorRT, or a
        GPU where one is needed, is not here. UsageError: the settings ask for what this TensorRT does not do.
    """
    check_graph(graph, shapes=settings.shapes)
    return serialize_engine(graph, out, settings=settings, timing_cache=timing_cache)
