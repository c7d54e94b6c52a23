"""ONNX Runtime as a backend: what a session may be told."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.errors import BundleError
from edgevlm.runtime.backends.onnxruntime import OnnxRuntime
from edgevlm.runtime.spec import SessionOptions
from tests.quantization.graphs import save_cnn


@pytest.mark.parametrize(
    "entry",
    ["session.collect_node_memory_stats_to_file", "ep.context_file_path", "session.use_env_allocators", "nonsense"],
)
def test_a_bundle_cannot_have_files_written(entry: str, tmp_path: Path):
    file = save_cnn(tmp_path / "graph.onnx")
    with pytest.raises(BundleError, match=f"cannot be told {entry}"):
        OnnxRuntime().open(file, SessionOptions(n_threads=1, entries={entry: str(tmp_path / "written")}))
    assert {path.name for path in tmp_path.iterdir()} == {"graph.onnx"}


def test_what_edgevlm_tells_it_is_taken(tmp_path: Path):
    entries = {"session.intra_op.allow_spinning": "0", "session.disable_quant_qdq": "1"}
    file = save_cnn(tmp_path / "graph.onnx")
    assert OnnxRuntime().open(file, SessionOptions(n_threads=1, entries=entries)).inputs
