"""The Python API and the command line are two ways to the same functions."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import edgevlm
from edgevlm.cli.main import VERBS, cli

GROUPS = ("cache", "targets")


def command_of(verb: str) -> click.Command:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    return command


def subcommands() -> list[tuple[str, str]]:
    return [(group, name) for group in GROUPS for name in command_of(group).commands]  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_function_of_its_name(verb):
    found = getattr(edgevlm, verb)
    assert inspect.ismodule(found) == (verb in GROUPS)
    assert callable(found) or verb in GROUPS
    assert inspect.getdoc(found)


@pytest.mark.parametrize(("group", "name"), subcommands())
def test_every_verb_of_a_group_has_a_function_of_its_name(group, name):
    assert callable(getattr(getattr(edgevlm, group), name))
    assert set(getattr(edgevlm, group).__all__) == set(command_of(group).commands)  # type: ignore[attr-defined]


def test_what_a_compile_may_be_asked_is_the_same_on_both_sides():
    of_python = set(inspect.signature(edgevlm.prepare).parameters)
    of_shell = {parameter.name for parameter in command_of("compile").params}
    only_shell = {"targets", "destination", "dry_run", "quiet", "verbose", "is_json", "no_color", "debug"}
    only_shell |= {"min_shapes", "opt_shapes", "max_shapes"}
    assert of_shell - of_python == only_shell
    assert of_python - of_shell == {"target", "shapes", "output", "check_output", "protocol"}


def test_defaults_are_the_same_on_both_sides():
    of_python = {name: p.default for name, p in inspect.signature(edgevlm.prepare).parameters.items()}
    context = command_of("compile").make_context("compile", ["demo"])
    for name, value in context.params.items():
        if name in of_python and name != "model":
            assert value == of_python[name], name


@pytest.mark.parametrize(("own", "expected"), [(None, "1"), ("0", "0")])
def test_onnx_runtime_does_not_report_home_unless_the_user_wants_it(own, expected, tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    if own is not None:
        environment["ORT_DISABLE_TELEMETRY"] = own
    probe = "import edgevlm, os, onnxruntime, time; time.sleep(1); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
    if expected == "1":
        assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name]


def test_every_public_name_is_there_and_has_words():
    for name in edgevlm.__all__:
        assert getattr(edgevlm, name) is not None
        assert name == "__version__" or inspect.getdoc(getattr(edgevlm, name)), name
    assert dir(edgevlm) == edgevlm.__all__
    with pytest.raises(AttributeError, match="no_such_thing"):
        edgevlm.no_such_thing  # noqa: B018


def test_every_option_of_every_verb_says_what_it_is_for():
    verbs = [command_of(verb) for verb in VERBS if verb not in GROUPS]
    verbs += [command_of(group).commands[name] for group, name in subcommands()]  # type: ignore[attr-defined]
    for command in verbs:
        assert command.help, command.name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{command.name} {parameter.name}"
                assert not parameter.hidden, f"{command.name} {parameter.name}"


HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "numpy", "PIL", "matplotlib", "jinja2", "rich")


def loaded_by(code: str, folder: Path) -> str:
    probe = f"import sys; {code}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=folder, check=True)
    return done.stdout.splitlines()[-1]


def test_importing_loads_nothing_heavy(tmp_path):
    assert loaded_by("import edgevlm; dir(edgevlm); edgevlm.__version__", tmp_path) == "[]"


def test_naming_a_verb_of_the_runtime_loads_the_runtime_alone(tmp_path):
    # OpenVINO and others would show here too, were they imported before they are used.
    assert loaded_by("import edgevlm; edgevlm.run; edgevlm.verify; edgevlm.inspect", tmp_path) in (
        "['PIL', 'numpy']",
        "['PIL', 'numpy', 'onnxruntime']",
    )


def test_naming_compile_loads_no_library_that_does_the_work(tmp_path):
    loaded = loaded_by("import edgevlm; edgevlm.compile", tmp_path)
    assert not {"torch", "transformers", "onnx", "onnxscript"} & set(loaded.strip("[]'").split("', '"))
