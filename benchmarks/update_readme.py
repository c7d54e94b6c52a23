"""Put the newest results into the README, between its markers: `python -m benchmarks.update_readme`."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def updated(readme: str) -> str:
    """The README with every marked block replaced by the file that it stands for, where that was made."""
    table = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
    readme = table.sub(lambda m: f"{m[1]}{_read(m[2])}{m[3]}" if (HERE.parent / m[2]).is_file() else m[0], readme)
    example = re.compile(r"(<!-- example: (\S+) -->\n).*?(<!-- /example -->)", re.DOTALL)
    return example.sub(lambda m: f"{m[1]}\n```text\n{_read(m[2]).strip()}\n```\n\n{m[3]}", readme)


def _read(path: str) -> str:
    return (HERE.parent / path).read_text(encoding="utf-8")


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
