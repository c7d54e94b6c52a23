"""What a machine must have to run a graph, read from the graph itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from edgevlm.extras import tool_versions
from edgevlm.runtime.backends import BACKENDS, load_backend
from edgevlm.runtime.bundle import release
from edgevlm.runtime.spec import Requires
from edgevlm.search.spec import Variant

# The first ONNX Runtime that reads an ONNX IR version. Source: its docs/Versioning.md.
_RUNTIME_OF_IR = {8: "1.10", 9: "1.15", 10: "1.18", 11: "1.21", 12: "1.23", 13: "1.24"}
# The first that runs packed weights as they are written here: 8 bits, and tables of bytes. Found by opening them with
# 1.20.1, 1.21.1, 1.22.1 and 1.23.2.
_RUNTIME_OF_OP = {"MatMulNBits": "1.22", "GatherBlockQuantized": "1.23"}


def requires_of(variants: tuple[Variant, ...], folder: Path, at_hand: Mapping[str, str]) -> Requires:
    """The least that runs the variants, whose graphs lie in ``folder``.

    Args:    at_hand: the target's own versions, of backends that need not be installed here.
    """
    graphs = {name: [folder / v.file for v in variants if v.backend == name] for name in BACKENDS}
    requires = _requires_of_onnx(graphs["onnxruntime"]) if graphs["onnxruntime"] else Requires()
    others = {
        name: at_hand.get(name) or _release(name) for name, files in graphs.items() if files and name != "onnxruntime"
    }
    return msgspec.structs.replace(requires, backends={**requires.backends, **others})


def _requires_of_onnx(files: list[Path]) -> Requires:
    import onnx

    headers = [onnx.load(file, load_external_data=False) for file in files]
    ir = max(header.ir_version for header in headers)
    opset = max(each.version for header in headers for each in header.opset_import if each.domain in ("", "ai.onnx"))
    ops = {node.op_type for header in headers for node in header.graph.node}
    least = [_RUNTIME_OF_IR.get(ir) or tool_versions("onnxruntime")["onnxruntime"]]
    least += [version for op, version in _RUNTIME_OF_OP.items() if op in ops]
    return Requires(backends={"onnxruntime": max(least, key=release)}, onnx_ir=ir, opset=opset)


def _release(backend: str) -> str:
    """The year and number of the release that made a graph: what an older one reads of it nobody says.

    Source: OpenVINO's releases are 2026.4, 2026.4.1, ...; a third number only mends.
    """
    return ".".join((load_backend(backend).version() or "").split(".")[:2])
