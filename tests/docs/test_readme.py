"""The README is true: its commands run, its Python runs, its tables are the results, its links lead somewhere."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.update_readme import PAGES, updated

ROOT = Path(__file__).resolve().parents[2]
README = PAGES[0].read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_commands_run_one_after_another(tmp_path):
    (commands,) = blocks(README, "console")
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "EDGEVLM_CACHE": str(tmp_path / "c"),
    }
    lines = [line.removeprefix("$ ") for line in commands.splitlines() if line.startswith("$ ")]
    assert len(lines) >= 6
    for line in lines:
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "demo-cpu" / "report" / "report.html").is_file()


def test_every_verb_stands_in_the_table_and_no_other():
    from edgevlm.cli.main import VERBS

    told = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert told == list(VERBS)


def test_commands_that_are_only_shown_use_flags_that_exist():
    from edgevlm.cli.main import VERBS

    shown = [line for block in blocks(README, "sh") for line in block.splitlines() if line.startswith("edgevlm ")]
    assert len(shown) >= 6
    for line in shown:
        verb = line.split()[1]
        module, _, attribute = VERBS[verb][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        known = {name for parameter in command.params for name in parameter.opts}
        assert set(re.findall(r"(?<=\s)--[a-z-]+", line.partition("#")[0])) <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_and_example_are_the_committed_results(page):
    written = page.read_text(encoding="utf-8")
    assert updated(written) == written


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target
