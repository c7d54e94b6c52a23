"""The wheel installed by pip, from the package index, in an environment of its own: what a device gets.

tests/test_packaging.py asks the same of an environment made without a network, in seconds.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import edgevlm
from edgevlm.data import shapes
from edgevlm.data_files import data_names
from tests import colours
from tests.fast import FAST

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = ("click", "msgspec", "numpy", "onnxruntime", "pillow", "tokenizers")
COMPILE_SIDE = ("torch", "transformers", "onnx", "onnxscript", "jinja2", "matplotlib", "safetensors", "pyarrow")


def plain_environment(**more: object) -> dict[str, str]:
    """This process's, without what would let the checkout be imported instead of the wheel."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return kept | {name: str(value) for name, value in more.items()}


def succeed(*command: object, **options: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=plain_environment(), **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def needs_index(*command: object, cwd: Path) -> None:
    """Run what downloads packages; where no package index can be reached, skip with pip's own words."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=plain_environment(), cwd=cwd)
    told = f"{done.stdout}\n{done.stderr}"
    if done.returncode != 0 and ("connection" in told.lower() or "(from versions: none)" in told):
        pytest.skip(next(line for line in told.splitlines() if "connection" in line.lower() or "from versions" in line))
    assert done.returncode == 0, told


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building in the checkout would leave folders behind."""
    source = tmp_path_factory.mktemp("source") / "edgevlm"
    kept = ("pyproject.toml", "README.md", "LICENSE", "edgevlm", "targets", "calibration")
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out)
    succeed(sys.executable, "-m", "pip", "wheel", *options, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment with the wheel and the versions that this one has."""
    folder = tmp_path_factory.mktemp("venv") / "base"
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in RUNTIME]
    needs_index(programs / "python", "-m", "pip", "install", "--quiet", wheel, *pins, cwd=folder)
    return programs


def on_device(base: Path, *arguments: object, code: int = 0, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A verb in the base install, with a cache of its own."""
    done = subprocess.run(
        [str(base / "edgevlm"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=plain_environment(EDGEVLM_CACHE=cwd / "cache"),
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles from the compile side: a quantized classifier, and two towers with their tokenizer, packed."""
    folder = tmp_path_factory.mktemp("made")
    pictures = colours.write_pictures(folder / "pictures")
    shapes.write_folder(folder / "shapes", n=60, seed=8)
    model = colours.write_classifier(folder / "colours.onnx")
    checkpoint = shutil.copytree(Path(shapes.__file__).parent / "demo_model", folder / "checkpoint")
    asked = {"precision": "fp32", **FAST}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(folder / "cache"))
        colours_bundle = edgevlm.compile(str(model), eval_data=pictures, output=folder / "colours", **asked).bundle
        towers = edgevlm.compile(
            str(checkpoint), eval_data=folder / "shapes", output=folder / "towers.evlm", **asked
        ).bundle
        demo = edgevlm.compile(
            "demo", eval_data=folder / "shapes", output=folder / "demo", max_drop=0.2, **asked | {"precision": "int8"}
        ).bundle
    return {
        "pictures": pictures,
        "shapes": folder / "shapes",
        "colours": colours_bundle,
        "towers": towers,
        "demo": demo,
    }


# --- what works without the compile side ------------------------------------------------------------------


def test_nothing_of_the_compile_side_is_there(base, tmp_path):
    probe = f"import importlib.util as u; print([m for m in {COMPILE_SIDE!r} if u.find_spec(m)])"
    assert succeed(base / "python", "-c", probe, cwd=tmp_path).strip() == "[]"


def test_targets_and_recipes_are_found(base, tmp_path):
    found = json.loads(on_device(base, "targets", "list", "--json", cwd=tmp_path).stdout)
    assert tuple(target["name"] for target in found) == data_names("targets")
    assert on_device(base, "targets", "show", "cpu", cwd=tmp_path).stdout
    probe = (
        "from edgevlm.quantization.calibration import load_recipe, recipe_names; "
        "print(*[load_recipe(name).name for name in recipe_names()])"
    )
    assert succeed(base / "python", "-c", probe, cwd=tmp_path).split() == list(data_names("calibration"))


def test_help_of_every_verb(base, tmp_path):
    from edgevlm.cli.main import VERBS

    for verb in VERBS:
        assert f"edgevlm {verb}" in on_device(base, verb, "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize("name", ["colours", "demo", "towers"])
def test_bundles_are_whole_and_bit_equal_there(base, made, tmp_path, name):
    verified = json.loads(on_device(base, "verify", made[name], "--json", cwd=tmp_path).stdout)
    assert verified["is_same_machine"]
    assert [case["is_bit_equal"] for case in verified["cases"]] == [True] * 3
    assert on_device(base, "inspect", made[name], "-v", cwd=tmp_path).stdout


@pytest.mark.parametrize("name", ["colours", "demo", "towers"])
def test_answers_are_the_same_to_the_last_digit(base, made, tmp_path, name):
    from edgevlm.runtime.spec import to_json

    pictures = sorted(made["pictures" if name == "colours" else "shapes"].rglob("*.png"))[:8]
    labels = ("red circle", "blue square", "green star") if name == "towers" else None
    asked = ("--labels", ",".join(labels)) if labels else ()
    told = on_device(base, "run", made[name], *pictures, *asked, "--json", cwd=tmp_path).stdout
    pipeline = edgevlm.Pipeline.load(made[name])
    assert told == to_json({str(picture): pipeline(picture, labels=labels) for picture in pictures}).decode()


def test_evaluating_there_gives_what_it_gives_here(base, made, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "ours"))
    told = on_device(base, "evaluate", made["demo"], "--data", made["shapes"], "--json", "-q", cwd=tmp_path).stdout
    ours = edgevlm.evaluate(made["demo"], made["shapes"])
    assert (json.loads(told)["value"], json.loads(told)["n"]) == (ours.value, ours.n)
    assert on_device(base, "evaluate", made["demo"], "--data", "shapes", cwd=tmp_path).stdout


def test_benchmarking_there_times_every_part(base, made, tmp_path):
    told = on_device(base, "benchmark", made["demo"], "--rounds", 6, "--json", cwd=tmp_path).stdout
    assert set(json.loads(told)["comparisons"]) == {"image_encoder", "end to end"}
    assert "end to end" in on_device(base, "benchmark", made["towers"], "--rounds", 6, cwd=tmp_path).stdout
