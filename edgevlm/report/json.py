"""``report.json``: the report value itself, and the schema that describes it."""

from __future__ import annotations

from typing import Any

import msgspec

from edgevlm.report.spec import Report
from edgevlm.runtime.spec import to_json


def json_from_report(report: Report) -> str:
    return to_json(report).decode()


def report_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of ``report.json``."""
    return msgspec.json.schema(Report)
