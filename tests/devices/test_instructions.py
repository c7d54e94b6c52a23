"""Counting without an emulator: what the plugin wrote, and what is said where nothing can be counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.cli.inspect import instructions_text
from edgevlm.cli.main import exit_code_of
from edgevlm.devices import instructions
from edgevlm.devices.counted_runs import EMPTY, RUN, START
from edgevlm.errors import EdgeVLMError, MissingToolError, UsageError
from tests.runtime import tiny


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return tiny.make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def nothing_is_set_up(monkeypatch):
    for name in ("prepare_emulator", "prepare_counting_qemu", "_compile_plugin"):
        monkeypatch.setattr(instructions, name, lambda *_: pytest.fail("something was set up"))


def line(label: int, *counts: int) -> str:
    return " ".join(map(str, (label, *counts, *[0] * (len(instructions.CLASSES) - len(counts)))))


def test_the_last_run_counts_less_what_marking_costs():
    lines = [line(START, 9), line(EMPTY, 1, 1), line(RUN, 70, 7), line(START, 9), line(EMPTY, 2, 1), line(RUN, 50, 8)]
    found = instructions.counts_in("\n".join(lines) + "\n")
    assert tuple(found) == instructions.CLASSES
    assert list(found.values())[:3] == [48, 7, 0]


@pytest.mark.parametrize("text", ["", line(EMPTY, 1), f"{RUN} 1 2\n{EMPTY} 1 2"])
def test_a_plugin_that_did_not_count_is_an_error(text):
    with pytest.raises(EdgeVLMError, match="did not count the runs"):
        instructions.counts_in(text)


def test_processors_that_cannot_be_counted_are_refused(bundle, nothing_is_set_up):
    with pytest.raises(UsageError, match="Instructions of 'cortex-a710' cannot be counted"):
        instructions.count_instructions(bundle, "cortex-a710")


def test_an_installed_package_says_where_the_plugin_is(bundle, nothing_is_set_up, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(instructions.SOURCE_VARIABLE, str(tmp_path / "none.c"))
    assert exit_code_of(["inspect", str(bundle), "--instructions"]) == 3
    said = capsys.readouterr().err
    assert "none.c" in said and instructions.SOURCE_VARIABLE in said


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path))
    with pytest.raises(MissingToolError, match="unavailable: no-such-compiler is not installed") as caught:
        instructions._compile_plugin(instructions.find_plugin_source(), lambda event: None)
    assert "gcc" in caught.value.hint


def test_operators_and_instructions_are_asked_for_one_at_a_time(bundle, nothing_is_set_up):
    assert exit_code_of(["inspect", str(bundle), "--operators", "--instructions"]) == 2


def test_counts_are_shown_as_counts_the_largest_first():
    by_class = dict.fromkeys(instructions.CLASSES, 0) | {"other": 1_000, "int8 dot product": 3_000}
    graph = instructions.GraphInstructions(
        graph="model", precision="int8-static", n_instructions=4_000, by_class=by_class
    )
    shown = instructions_text(instructions.Instructions(name="tiny", cpu="cortex-a76", tools={}, graphs=(graph,)))
    assert "model int8-static on cortex-a76 (emulated), 1 thread: 4,000 instructions a run" in shown
    assert shown.index("int8 dot product") < shown.index("other ")
    assert "SVE" not in shown
    assert "Counts, not times" in shown and "ms" not in shown
