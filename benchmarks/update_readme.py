"""Put the newest results into README and docs, between their markers: `python -m benchmarks.update_readme`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def updated(page: str) -> str:
    """A page with every marked block replaced by the file that it stands for, where that was made."""
    table = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
    page = table.sub(lambda m: f"{m[1]}{_read(m[2])}{m[3]}" if (ROOT / m[2]).is_file() else m[0], page)
    example = re.compile(r"(<!-- example: (\S+) -->\n).*?(<!-- /example -->)", re.DOTALL)
    return example.sub(lambda m: f"{m[1]}\n```text\n{_read(m[2]).strip()}\n```\n\n{m[3]}", page)


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


if __name__ == "__main__":
    for file in PAGES:
        file.write_text(updated(file.read_text(encoding="utf-8")), encoding="utf-8")
