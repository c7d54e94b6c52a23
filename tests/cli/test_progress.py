import io
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevlm.cli.progress import _listener, shown_progress
from edgevlm.progress import Event, Note, Progress, StepFinished, StepProgress, StepStarted, silent

EVENTS: tuple[Event, ...] = (
    StepStarted("ingest", "reading config.json"),
    StepFinished("ingest", 0.31),
    StepStarted("export model"),
    StepFinished("export model", 0.01, hit=True),
    Note("The interval will be wide."),
    StepStarted("quantize [bold]int8[/]", "collecting ranges"),
    StepProgress("quantize [bold]int8[/]", 0.5, "picture 25 of 50"),
    StepProgress("quantize [bold]int8[/]", 1.0, "picture 50 of 50"),
    StepFinished("quantize [bold]int8[/]", 75.2),
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal and keeps what it is sent."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


def _play(stream: io.StringIO, *, verbose: bool = False, quiet: bool = False, color: bool = True) -> str:
    with shown_progress(stream=stream, verbose=verbose, quiet=quiet, color=color) as progress:
        for event in EVENTS:
            progress(event)
    return stream.getvalue()


def _seen(sent: str) -> list[str]:
    """What stays on the terminal: without colours, and without the live lines that were wiped."""
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent).replace("\r", "\n").splitlines()
    return [line.rstrip() for line in lines if line.startswith(("✓", "✕", "!"))]


# --- not a terminal ---------------------------------------------------------------------------------------


def test_a_pipe_gets_one_line_a_finished_step() -> None:
    assert _play(io.StringIO()).splitlines() == [
        "ingest: 0.3 s",
        "export model: cached",
        "note: The interval will be wide.",
        "quantize [bold]int8[/]: 1:15",
    ]


def test_a_pipe_gets_details_when_asked() -> None:
    assert _play(io.StringIO(), verbose=True).splitlines() == [
        "ingest: reading config.json",
        "ingest: 0.3 s",
        "export model: started",
        "export model: cached",
        "note: The interval will be wide.",
        "quantize [bold]int8[/]: collecting ranges",
        "quantize [bold]int8[/]: picture 25 of 50",
        "quantize [bold]int8[/]: picture 50 of 50",
        "quantize [bold]int8[/]: 1:15",
    ]


@given(st.text(), st.text(), st.booleans())
def test_a_pipe_never_gets_control_characters(name: str, detail: str, verbose: bool) -> None:
    stream = io.StringIO()
    with shown_progress(stream=stream, verbose=verbose) as progress:
        progress(StepStarted(name, detail))
        progress(StepProgress(name, None, detail))
        progress(StepFinished(name, 1.0))
        progress(Note(detail))
    assert all(c.isprintable() for c in stream.getvalue().replace("\n", ""))


def test_a_pipe_hears_where_the_work_was_stopped() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), shown_progress(stream=stream) as progress:
        progress(StepStarted("measure"))
        raise KeyboardInterrupt
    assert re.fullmatch(r"measure: stopped after \d+\.\d s\n", stream.getvalue())


# --- a terminal -------------------------------------------------------------------------------------------


def test_a_terminal_keeps_finished_steps_with_time_or_cached() -> None:
    assert _seen(_play(Terminal())) == [
        "✓ ingest  0.3 s",
        "✓ export model  cached",
        "! The interval will be wide.",
        "✓ quantize [bold]int8[/]  1:15",
    ]


def test_a_terminal_shows_the_running_step_and_wipes_it() -> None:
    stream = Terminal()
    with _listener(stream, quiet=False, verbose=False, color=True) as progress:
        progress(StepStarted("measure", "round 1 of 20"))
        progress(StepProgress("measure", 0.25, "round 5 of 20"))
        progress.progress.refresh()  # type: ignore[attr-defined]
        live = stream.getvalue()
    assert "measure" in live
    assert "round 5 of 20" in live
    assert "━" in live
    sent = stream.getvalue()
    assert sent.index("\x1b[?25l") < sent.rindex("\x1b[?25h"), "the cursor must be shown again"
    assert sent.rindex("\x1b[2K") > sent.rindex("round 5 of 20")


def test_a_terminal_keeps_details_when_asked() -> None:
    assert "✓ ingest  0.3 s  reading config.json" in _seen(_play(Terminal(), verbose=True))


def test_a_terminal_is_left_clean_when_the_work_is_stopped() -> None:
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), shown_progress(stream=stream) as progress:
        progress(StepStarted("compile"))
        progress(StepStarted("measure"))
        raise KeyboardInterrupt
    assert [line.split("  ")[0] for line in _seen(stream.getvalue())] == ["✕ measure", "✕ compile"]
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_a_step_can_run_again_and_a_stray_report_is_no_error() -> None:
    stream = Terminal()
    with shown_progress(stream=stream) as progress:
        progress(StepProgress("nobody", 0.5))
        progress(StepStarted("measure"))
        progress(StepStarted("measure"))
        progress(StepProgress("measure", 7.0))
        progress(StepFinished("measure", 1.0))
        progress(StepFinished("nobody", 1.0))
    assert _seen(stream.getvalue()) == ["✓ measure  1.0 s", "✓ nobody  1.0 s"]


@pytest.mark.parametrize("how", ["option", "variable"])
def test_colours_can_be_turned_off(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
    assert colours.search(_play(Terminal()))
    if how == "variable":
        monkeypatch.setenv("NO_COLOR", "1")
    assert not colours.search(_play(Terminal(), color=how != "option"))


def test_a_dumb_terminal_is_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in _play(Terminal())


def test_without_rich_a_terminal_is_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert _play(Terminal()).startswith("ingest: 0.3 s\n")


# --- either -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet_says_nothing(stream: io.StringIO) -> None:
    assert _play(stream, quiet=True) == ""


def test_standard_output_is_left_to_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    for target in (None, stream):
        with shown_progress(stream=target) as progress:
            progress(StepStarted("ingest"))
            sys.stdout.write("result\n")
            progress(StepFinished("ingest", 1.0))
    captured = capsys.readouterr()
    assert captured.out == "result\nresult\n"
    assert captured.err == "ingest: 1.0 s\n"
    assert "result" not in stream.getvalue()


def test_silent_is_a_progress() -> None:
    listener: Progress = silent
    for event in EVENTS:
        listener(event)


def test_rich_is_loaded_only_for_a_terminal() -> None:
    probe = (
        "import io, sys; from edgevlm.cli.progress import shown_progress; from edgevlm.progress import Note\n"
        "with shown_progress(stream=io.StringIO()) as p: p(Note('x'))\n"
        "print('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
