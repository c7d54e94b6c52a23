import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.errors import StoreError
from edgevlm.report import FORMATS, facts, notation, text_from_report, write_report
from edgevlm.report.json import report_schema
from edgevlm.report.spec import Report
from edgevlm.runtime.spec import from_json
from tests.report.example import EXAMPLES, example_report

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "report"


@pytest.fixture(scope="module", params=EXAMPLES)
def example(request: pytest.FixtureRequest) -> tuple[str, Report, dict[str, str]]:
    report = EXAMPLES[request.param]()
    return request.param, report, {suffix: text_from_report(report, suffix) for suffix in FORMATS}


# --- all formats ------------------------------------------------------------------------------------------


def test_write_report_writes_every_format_and_nothing_else(tmp_path: Path) -> None:
    paths = write_report(example_report(), tmp_path / "report")
    assert [path.name for path in paths] == ["report.html", "report.md", "report.json"]
    assert sorted(paths) == sorted((tmp_path / "report").iterdir())


def test_write_report_says_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StoreError, match=r"cannot be written to .*taken") as caught:
        write_report(EXAMPLES["unmeasured"](), tmp_path / "taken")
    assert caught.value.hint


def test_the_same_report_is_the_same_text_in_another_process() -> None:
    script = (
        "import hashlib; from edgevlm.report import FORMATS, text_from_report; "
        "from tests.report.example import example_report; "
        "print(*(hashlib.sha256(text_from_report(example_report(), f).encode()).hexdigest() for f in FORMATS))"
    )
    root = Path(__file__).resolve().parents[2]
    runs = {
        subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 1


def test_importing_the_report_loads_nothing_heavy() -> None:
    probe = (
        "import sys, edgevlm.report, edgevlm.report.facts, edgevlm.report.markdown, edgevlm.report.html; "
        "print(sorted({'matplotlib', 'jinja2', 'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- JSON -------------------------------------------------------------------------------------------------


def test_json_is_the_report(example: tuple[str, Report, dict[str, str]]) -> None:
    _, report, texts = example
    assert from_json(texts["json"].encode(), Report) == report
    assert json.loads(texts["json"])["schema_version"] == report.schema_version


def test_schema_names_every_field_of_the_json() -> None:
    properties = report_schema()["$defs"]["Report"]["properties"]
    assert set(properties) == set(json.loads(text_from_report(example_report(), "json")))


# --- Markdown ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["measured", "fallback", "unmeasured"])
def test_markdown_is_as_it_was(name: str) -> None:
    _compare(text_from_report(EXAMPLES[name](), "md"), GOLDEN / f"{name}.md")


def test_markdown_tables_are_whole(example: tuple[str, Report, dict[str, str]]) -> None:
    """Every row has as many cells as its header, whatever the report's own words hold."""
    width = None
    for line in example[2]["md"].splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1
        assert cells == (width or cells), line
        width = cells


def test_markdown_escapes_what_would_be_markup() -> None:
    text = text_from_report(EXAMPLES["single"](), "md")
    assert "<script>" not in text
    assert r"\*\*bold\*\*" in text
    assert "````sh\nedgevlm compile '```'" in text


def test_markdown_is_read_as_tables_by_a_real_parser() -> None:
    markdown_it = pytest.importorskip("markdown_it", reason="markdown-it-py comes with rich")
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(text_from_report(example_report(), "md"))
    assert html.count("<table>") == 13
    assert "|" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)


@settings(max_examples=25, deadline=None)
@given(
    value=st.floats(0, 1),
    drop=st.floats(-0.5, 0.5),
    ratio=st.floats(0.05, 5),
    p50=st.floats(0.01, 5000),
    n_bytes=st.integers(1, 10**10),
)
def test_numbers_in_markdown_are_in_json(value: float, drop: float, ratio: float, p50: float, n_bytes: int) -> None:
    report = example_report()
    assert report.accuracy and report.latency
    report = msgspec.structs.replace(
        report,
        accuracy=msgspec.structs.replace(report.accuracy, value=value, reference=value + drop, drop=drop),
        latency=msgspec.structs.replace(report.latency, ratio=ratio, p50_ms=p50),
        size_bytes=n_bytes,
    )
    known = _numbers(json.loads(text_from_report(report, "json")))
    told = re.sub(r"```.*?```", "", text_from_report(report, "md"), flags=re.DOTALL)
    for words in sorted(_strings(json.loads(text_from_report(report, "json"))), key=len, reverse=True):
        told = told.replace(words, " ")
    words = [word.strip("|[](),;:.*%×").replace("−", "-") for word in told.split()]
    numbers = [word for word in words if re.fullmatch(r"-?\d[\d,]*(\.\d+)?(e-?\d+)?", word)]
    assert len(numbers) > 100
    for number in numbers:
        assert _is_known(number.replace(",", ""), known), number


# --- HTML -------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page holds, as far as these tests ask."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def test_html_is_as_it_was() -> None:
    """Without the drawings, whose text is matplotlib's and changes with its version."""
    html = text_from_report(EXAMPLES["measured"](), "html")
    _compare(re.sub(r'<svg viewBox="0 0 (960|380).*?</svg>', "<svg/>", html, flags=re.DOTALL), GOLDEN / "measured.html")


def test_html_loads_nothing_and_runs_nothing(example: tuple[str, Report, dict[str, str]]) -> None:
    page = Page(example[2]["html"])
    assert not page.open
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("href", "src", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), attributes
    assert not re.search(r"url\((?!#)|@import", example[2]["html"])
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_html_ids_are_unique_and_links_arrive(example: tuple[str, Report, dict[str, str]]) -> None:
    page = Page(example[2]["html"])
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {(a.get("href") or a.get("xlink:href") or "#")[1:] for _, a in page.tags} - {""}
    targets |= set(re.findall(r"url\(#([^)]+)\)", example[2]["html"]))
    assert targets <= set(ids)


def test_html_tables_have_scoped_headers_and_captions(example: tuple[str, Report, dict[str, str]]) -> None:
    page = Page(example[2]["html"])
    tags = [tag for tag, _ in page.tags]
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th")
    assert tags.count("caption") == tags.count("table")
    assert tags.count("h1") == 1
    assert all(attributes.get("aria-label") for _, attributes in page.tags if attributes.get("role") == "img")


def test_html_tells_every_candidate_and_caution(example: tuple[str, Report, dict[str, str]]) -> None:
    _, report, texts = example
    words = " ".join(Page(texts["html"]).words)
    for sentence in (facts.headline(report), report.verdict, report.reproduce, *facts.cautions(report)):
        assert sentence in words
    for row in report.candidates:
        assert row.name in words
        assert row.status in words
        assert row.reason in words


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_can_be_read_in_both_themes(theme: int) -> None:
    """Contrast of at least 4.5 to 1 for text (WCAG 2.2, 1.4.3) on every ground that it stands on."""
    html = text_from_report(EXAMPLES["unmeasured"](), "html")
    blocks = re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[theme]))
    grounds = [colours["page"], colours["card"], colours["caution"]]
    for name in ("ink", "muted", "accent", "float", "good", "warn", "bad"):
        assert min(_contrast(colours[name], ground) for ground in grounds) >= 4.5, name


# --- facts ------------------------------------------------------------------------------------------------


def test_float_that_ships_claims_no_speed() -> None:
    report = EXAMPLES["fallback"]()
    assert facts.headline(report) == "The float model ships"
    assert facts.key_figures(report)[0].notes == ("this is the float model",)


def test_speed_is_the_ratio_upside_down_with_its_interval() -> None:
    report = example_report()
    assert report.latency is not None
    report = msgspec.structs.replace(
        report, latency=msgspec.structs.replace(report.latency, ratio=0.5, ratio_low=0.4, ratio_high=0.8)
    )
    figure = facts.key_figures(report)[0]
    assert figure.value == "2.00"
    assert figure.notes[0] == "95% interval 1.25 to 2.50"


def test_front_holds_what_nothing_beats_and_nothing_invalid() -> None:
    report = example_report()
    front = facts.pareto(report)
    assert [row.name for row in front] == [
        "int8-static-u8s8-minmax",
        "int8-static-u8s8-percentile",
        "int8-static-u8s8-conv-gemm",
        "fp32",
    ]
    for row in facts.plotted(report):
        beaten = any(f.p50_ms <= row.p50_ms and f.accuracy >= row.accuracy for f in front)  # type: ignore[operator]
        assert row in front or beaten or row.status == "not measured validly"


def test_order_is_winner_float_then_by_verdict() -> None:
    names = [row.status for row in facts.in_order(example_report())]
    assert names[:3] == ["winner", "float", "inside budgets"]
    assert names[-1] == "failed"


def test_texts_at_their_own_length_are_told() -> None:
    report = example_report()
    (proof,) = report.proofs
    assert facts.about_lengths(report) == (), "this one has a fixed length"
    proof = msgspec.structs.replace(proof, component="text_encoder", lengths=(2, 8, 77), length_error=3e-7)
    report = msgspec.structs.replace(report, proofs=(proof,))
    (sentence,) = facts.about_lengths(report)
    assert "with 2, 8 and 77 tokens" in sentence
    assert "3.0e-07" in sentence
    for kind in ("md", "html"):
        assert "at their own length: with 2, 8 and 77 tokens" in text_from_report(report, kind)


def test_synthetic_and_invalid_are_cautioned() -> None:
    told = " ".join(facts.cautions(EXAMPLES["invalid"]()))
    assert "generated pictures" in told
    assert "medians drifted by 11%" in told


@given(st.lists(st.text("ab-0", min_size=1, max_size=40), unique=True, min_size=1), st.integers(5, 30))
def test_shortened_names_fit(names: list[str], length: int) -> None:
    cut = notation.shortened(names, length)
    assert all(len(name) <= length for name in cut)
    assert all(short == name for short, name in zip(cut, names, strict=True) if len(name) <= length)


# --- helpers ----------------------------------------------------------------------------------------------


def _compare(text: str, golden: Path) -> None:
    """Against a golden file; a missing one is written and fails, so that nobody takes it for agreement."""
    if not golden.exists():
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text, encoding="utf-8")
        pytest.fail(f"{golden.name} was missing and has been written; read it, then run again")
    assert text == golden.read_text(encoding="utf-8"), f"delete {golden.name} and run twice if the change is meant"


def _numbers(value: object) -> set[float]:
    """Every number of the JSON but the raw samples, which are too many to prove anything."""
    if isinstance(value, dict):
        return {n for key, item in value.items() if key not in ("turns_ms", "warmup_ms") for n in _numbers(item)} | {
            float(len(item)) for item in value.values() if isinstance(item, list)
        }
    if isinstance(value, list):
        return {n for item in value for n in _numbers(item)}
    return {float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def _strings(value: object) -> set[str]:
    if isinstance(value, dict):
        return {s for item in value.values() for s in _strings(item)}
    if isinstance(value, list):
        return {s for item in value for s in _strings(item)}
    return {value} if isinstance(value, str) and re.search(r"\d", value) else set()


def _is_known(text: str, known: set[float]) -> bool:
    """Is it one of the numbers in another unit, turned into a speed, or a ratio or sum that the words explain?"""
    digits = len(text.partition(".")[2].partition("e")[0])
    told = float(text)
    # Half a unit in the last place, and a little for a tie that rounds the other way.
    slack = 0.5001 * 10.0 ** (-digits if "e" not in text else int(text.partition("e")[2]) - digits)
    units = (1.0, 1e2, 1e-3, 1e-6, 1e-9)
    if any(abs(n * unit - told) <= slack for n in known for unit in units):
        return True
    return any(n and abs(1 / n - told) <= slack for n in known) or told in DERIVED or _is_share(told, known, slack)


# Numbers in the words themselves: 95 % intervals, "time ÷ 1", percentiles, runs kept and time in all of the example.
DERIVED = {95.0, 1.0, 50.0, 90.0, 99.0, 1632.0, 15.0}


def _is_share(told: float, known: set[float], slack: float) -> bool:
    large = [n for n in known if n >= 1000]
    return any(abs(100 * a / b - told) <= slack for a in known for b in large)


def _contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)
