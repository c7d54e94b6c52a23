"""The runtime loads nothing that a device lacks, and nothing that it does not use."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import edgevlm
from tests.runtime import tiny

HEAVY = {"torch", "onnx", "onnxscript", "transformers", "nncf", "optimum", "matplotlib", "jinja2", "psutil", "pyarrow"}
NOT_NEEDED_HERE = {"tokenizers", "huggingface_hub", "safetensors", "rich", "click"}

SCRIPT = """
import sys
from edgevlm.runtime.pipeline import Pipeline
print(Pipeline.load(sys.argv[1])(sys.argv[2]).top.label)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_running_a_bundle_loads_only_what_it_uses(tmp_path: Path):
    bundle = tiny.make_bundle(tmp_path / "bundle")
    tiny.picture("blue").save(tmp_path / "blue.png")
    command = [sys.executable, "-c", SCRIPT, str(bundle), str(tmp_path / "blue.png")]
    answer, modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert answer == "blue"
    assert {"numpy", "onnxruntime", "PIL"} <= set(modules.split())
    assert not set(modules.split()) & (HEAVY | NOT_NEEDED_HERE)


def test_import_edgevlm_loads_nothing_heavy():
    command = [sys.executable, "-c", "import edgevlm, sys; print(*{n.partition('.')[0] for n in sys.modules})"]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not set(modules) & (HEAVY | {"numpy", "onnxruntime", "PIL"})


def test_the_runtime_imports_nothing_of_the_compile_side():
    folder = Path(edgevlm.__file__).parent / "runtime"
    files = sorted(folder.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            ours = [name for name in names if name.split(".")[0] == "edgevlm"]
            assert all(name == "edgevlm.errors" or name.startswith("edgevlm.runtime") for name in ours), file
