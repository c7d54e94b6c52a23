"""The operators of a bundle's graphs, or of any graph on disk: what ``edgevlm inspect --operators`` tells."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from edgevlm.errors import UsageError
from edgevlm.measure.bundles import golden_inputs
from edgevlm.measure.explanation import Explained, time_by_kind
from edgevlm.measure.findings import find_causes
from edgevlm.measure.operators import profile_graph
from edgevlm.runtime.bundle import open_bundle
from edgevlm.runtime.spec import Array, SessionOptions

# What runs a graph on disk, by the end of its name.
BACKEND_OF_SUFFIX = {".onnx": "onnxruntime", ".ort": "onnxruntime", ".xml": "openvino"}


def inspect_operators(path: str | os.PathLike[str], *, n_threads: int | None = None) -> tuple[Explained, ...]:
    """Profile a graph, or each graph of a bundle, here: one after another, each in a process of its own.

    A bundle's graphs get its first golden picture; a graph on its own gets inputs made up from its shapes.

    Args:
        n_threads: 0 means all cores; as the bundle was compiled where left out (all cores for a graph on its own).
    Raises: UsageError: there is no such file. ModelError: a graph does not run. BundleError: a bundle breaks a rule.
    """
    if n_threads is not None and n_threads < 0:
        raise UsageError(f"There cannot be {n_threads} threads.", hint="Give a number above 0, or 0 for all cores.")
    file = Path(path)
    if file.suffix in BACKEND_OF_SUFFIX:
        if not file.is_file():
            raise UsageError(f"There is no file '{path}'.", hint="Name a bundle, or an ONNX or OpenVINO graph.")
        session = SessionOptions(n_threads=n_threads or 0)
        backend = BACKEND_OF_SUFFIX[file.suffix]
        return (_explained(file, graph=file.stem, name="", backend=backend, session=session, inputs=None),)
    bundle = open_bundle(path)
    bundle.check_requires()
    explained = []
    for part in bundle.manifest.components:
        for each in part.files:
            bundle.file(each)
        session = part.session if n_threads is None else msgspec.structs.replace(part.session, n_threads=n_threads)
        explained.append(
            _explained(
                bundle.root / part.file,
                graph=part.name,
                name=part.precision,
                backend=part.backend,
                session=session,
                inputs=golden_inputs(bundle, part),
            )
        )
    return tuple(explained)


def _explained(
    file: Path, *, graph: str, name: str, backend: str, session: SessionOptions, inputs: dict[str, Array] | None
) -> Explained:
    profile = profile_graph(file, backend=backend, inputs=inputs, session=session)
    return Explained(
        graph=graph,
        name=name,
        backend=backend,
        profile=profile,
        by_kind_ms=time_by_kind(profile),
        findings=find_causes(profile),
    )
