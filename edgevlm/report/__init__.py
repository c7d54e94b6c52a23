"""The report of a compile: one value, written as HTML, Markdown and JSON."""

from __future__ import annotations

import importlib
from pathlib import Path

from edgevlm.errors import StoreError
from edgevlm.report.spec import Report

# File suffix -> the function that turns a report into that file's text.
FORMATS = {
    "html": "edgevlm.report.html:html_from_report",
    "md": "edgevlm.report.markdown:markdown_from_report",
    "json": "edgevlm.report.json:json_from_report",
}


def write_report(report: Report, directory: Path) -> tuple[Path, ...]:
    """Write ``report.<format>`` for every format, each under a temporary name first.

    Raises: StoreError: the directory cannot be written.
    """
    texts = {suffix: text_from_report(report, suffix) for suffix in FORMATS}
    paths = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            path = directory / f"report.{suffix}"
            part = directory / f".report.{suffix}.part"
            part.write_text(text, encoding="utf-8", newline="\n")
            part.replace(path)
            paths.append(path)
    except OSError as error:
        raise StoreError(
            f"The report cannot be written to {directory}: {error.strerror or error}.",
            hint="Give a directory that can be written and has space.",
        ) from error
    return tuple(paths)


def text_from_report(report: Report, suffix: str) -> str:
    module, _, function = FORMATS[suffix].partition(":")
    text: str = getattr(importlib.import_module(module), function)(report)
    return text
