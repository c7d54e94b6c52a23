from pathlib import Path

import pytest

from edgevlm.cli.tables import MAX_ROWS, summary_text
from edgevlm.report import facts
from tests.report.example import EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("width", [80, 96, 120])
def test_summary_fits_the_terminal(name: str, width: int) -> None:
    text = summary_text(EXAMPLES[name](), bundle=Path("out"), width=width)
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("name", EXAMPLES)
def test_summary_says_what_ships_why_and_where(name: str) -> None:
    report = EXAMPLES[name]()
    lines = summary_text(report, bundle=Path("some where/out"), width=1000).splitlines()
    assert lines[0] == facts.headline(report)
    assert report.verdict in lines
    assert [line.split(maxsplit=1)[1] for line in lines[-2:]] == [
        "some where/out",
        str(Path("some where/out/report/report.html")),
    ]


def test_summary_is_as_a_customer_sees_it() -> None:
    text = summary_text(EXAMPLES["fallback"](), bundle=Path("out"), width=90)
    assert (
        text
        == """\
The float model ships

No candidate was surely faster than the float model, so the float model ships.

candidate             verdict              p50 ms            ÷ float  top-1  drop     size
fp32                  ◆ float                7.75                  –  71.7%     –  14.0 MB
int8-stati…s8-minmax  ▲ slower than float    10.1  1.20 [1.10, 1.30]  71.1%  0.60   3.7 MB
top-1 and drop (in points) here are on the select split: they choose, they claim nothing.

warning: The evaluation set has 500 pictures: an interval of the drop this wide cannot
         prove half a point.
warning: Accuracy was judged on generated pictures: it shows what lowering changed, not
         how the model does on real photographs.

Speed against float          1.00×    this is the float model
Median latency               7.75 ms  p90 7.91 ms, p99 8.05 ms; batch 1, 2 threads
Agreement with float, top-1  100.0%   this is the float model; on 250 pictures never used
                                      to choose
Size                         14.0 MB  this is the float model
Bundle                       out
Report                       out/report/report.html
"""
    )


def test_long_names_stay_apart() -> None:
    text = summary_text(EXAMPLES["crowded"](), width=90)
    names = [line.split("  ")[0] for line in text.splitlines() if "●" in line or "▲" in line]
    assert len(set(names)) == len(names) == MAX_ROWS - 2
    assert "and 28 more in the report" in text


def test_a_path_is_never_wrapped() -> None:
    bundle = Path("a" * 60) / ("b c " * 20).strip()
    assert str(bundle / "report" / "report.html") in summary_text(EXAMPLES["single"](), bundle=bundle, width=80)
