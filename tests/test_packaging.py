"""The wheel: whole, and enough on its own to run a bundle, with nothing but the base dependencies beside it."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import edgevlm
from edgevlm.data import shapes
from tests.fast import FAST

ROOT = Path(__file__).resolve().parents[1]
RECIPES = tuple((ROOT / "edgevlm" / "distillation" / "recipes").glob("*.toml"))
HEAVY = ("torch", "transformers", "onnx", "onnxscript", "jinja2", "matplotlib", "rich", "pyarrow", "safetensors")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory):
    """A Python that has the wheel and its base dependencies, linked from this environment, and nothing else."""
    folder = tmp_path_factory.mktemp("base") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in dependencies("edgevlm"):
        for top in {
            file.parts[0] for file in importlib.metadata.files(name) if file.parts[0] not in ("..", "__pycache__")
        }:
            found = Path(importlib.metadata.distribution(name).locate_file(top))
            if found.exists() and not (site / top).exists():
                (site / top).symlink_to(found)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return folder / "bin" / "python"


def dependencies(name, seen=frozenset()):
    """Everything that a distribution needs without its extras, by name, itself left out."""
    found = set()
    for requirement in importlib.metadata.requires(name) or ():
        other = re.match(r"[\w.-]+", requirement)[0]
        if "extra ==" in requirement or other in seen or other in found or not is_installed(other):
            continue
        found |= {other} | dependencies(other, seen | found | {other})
    return found


def is_installed(name):
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, demo_cache):
    folder = tmp_path_factory.mktemp("bundle")
    shutil.copytree(demo_cache, folder / "cache")
    shapes.write_folder(folder / "pictures", n=60, seed=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(folder / "cache"))
        edgevlm.compile(
            "demo",
            eval_data=folder / "pictures",
            precision="int8-static",
            max_drop=0.5,
            **FAST,
            output=folder / "out",
        )
    return folder / "out"


def run(base, *arguments):
    command = [base, "-I", "-m", "edgevlm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=base.parent)


def test_the_wheel_holds_the_data_folders_the_model_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("targets", "calibration"):
        for file in (ROOT / folder).glob("*.toml"):
            assert f"edgevlm/_data/{folder}/{file.name}" in names
    assert {"edgevlm/py.typed", "edgevlm/data/demo_model/model.safetensors", "edgevlm/data/imagenet.txt"} <= names
    assert any(name.endswith(".j2") for name in names)
    assert {f"edgevlm/distillation/recipes/{file.name}" for file in RECIPES} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_the_base_install_has_nothing_of_the_compile_side(base):
    probe = f"import importlib.util as u; print([n for n in {HEAVY!r} if u.find_spec(n)])"
    assert subprocess.run([base, "-I", "-c", probe], capture_output=True, text=True).stdout.strip() == "[]"


def test_targets_reach_an_installed_wheel(base):
    found = run(base, "targets", "list", "--json")
    assert {target["name"] for target in json.loads(found.stdout)} >= {"cpu", "x86-64-avx512-vnni"}
    assert run(base, "doctor").returncode == 0


def test_compiling_there_names_the_command_that_installs_it(base):
    done = run(base, "compile", "demo")
    assert done.returncode == 3
    assert "pip install 'edgevlm[compile]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bundle_gives_the_same_answers_there_to_the_bit(base, bundle):
    pictures = sorted((bundle.parent / "pictures").rglob("*.png"))[:12]
    there = run(base, "run", bundle, *pictures, "--json", "--top", 64)
    assert there.returncode == 0, there.stderr
    answers = json.loads(there.stdout)
    pipeline = edgevlm.Pipeline.load(bundle)
    for picture in pictures:
        here = pipeline(picture, top_k=64)
        assert answers[str(picture)]["classes"] == [
            {"label": each.label, "index": each.index, "score": each.score} for each in here.classes
        ]


@pytest.mark.parametrize("verb", [("verify",), ("inspect",), ("benchmark",)])
def test_verbs_of_the_runtime_work_there(base, bundle, verb):
    more = ("--rounds", "6") if verb == ("benchmark",) else ()
    done = run(base, *verb, bundle, *more)
    assert done.returncode == 0, done.stderr + done.stdout


def test_evaluating_works_there(base, bundle):
    done = run(base, "evaluate", bundle, "--data", bundle.parent / "pictures", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 60
