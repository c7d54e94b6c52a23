"""What every verb owes its user: help with examples, the right exit code, one sentence for an error, no traceback."""

import json
import subprocess
import sys

import pytest

from edgevlm.cli.main import VERBS, exit_code_of


def edgevlm(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "edgevlm", *arguments], capture_output=True, text=True, **options)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert exit_code_of([verb, "--help"]) == 0
    assert f"edgevlm {verb}" in capsys.readouterr().out.split("\n", 1)[1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["cmopile"], 2, "Did you mean 'compile'?"),
        (["targets", "lst"], 2, "list"),
        (["targets", "show", "cpuu"], 2, "Did you mean 'cpu'?"),
        (["compile"], 2, "MODEL"),
        (["compile", "demo", "--targte", "cpu"], 2, "--target"),
        (["compile", "demo", "--target", "cpuu"], 2, "Did you mean 'cpu'?"),
        (["compile", "demo", "--precision", "int9"], 2, "int8"),
        (["compile", "no-such-model", "--target", "cpu"], 1, "no-such-model"),
        (["run", "no-such-bundle", "x.jpg"], 1, "no-such-bundle"),
    ],
)
def test_a_wrong_command_is_one_sentence(arguments, code, words, capsys):
    assert exit_code_of(arguments) == code
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


def test_starting_imports_nothing_heavy():
    probe = (
        "import sys; from edgevlm.cli.main import exit_code_of; exit_code_of(['--help']); import edgevlm; "
        "heavy = {'torch', 'transformers', 'onnx', 'numpy', 'onnxruntime', 'PIL', 'rich', 'matplotlib'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_json_is_only_json():
    done = edgevlm("targets", "list", "--json")
    assert {"cpu", "x86-64-avx512-vnni"} <= {target["name"] for target in json.loads(done.stdout)}


def test_no_color_where_it_is_not_wanted():
    assert "\x1b" not in edgevlm("doctor", "--no-color").stdout
