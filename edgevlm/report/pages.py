"""Pages that are one table: in HTML, Markdown and JSON beside each other."""

from __future__ import annotations

from pathlib import Path

from edgevlm.errors import StoreError
from edgevlm.runtime.spec import Spec


class PageRow(Spec, frozen=True, kw_only=True):
    """Args: link: of the first cell; empty where it has none."""

    link: str
    cells: tuple[str, ...]


class Page(Spec, frozen=True, kw_only=True):
    """What a page with one table says.

    Args:
        over: above the title, after the program's name; ``verdict`` below it.
        caption: what the table holds, for those who cannot see it.
    """

    title: str
    over: str
    verdict: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[PageRow, ...]


def write_page(page: Page, markdown: str, json: str, folder: Path, stem: str) -> tuple[Path, ...]:
    """``STEM.html``, ``STEM.md`` and ``STEM.json`` in ``folder``, which is made where it is not there.

    Raises: StoreError: the folder cannot be written.
    """
    from edgevlm.report.html import templates

    html = templates().get_template("page.html.j2").render(page=page)
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in {"html": html, "md": markdown, "json": json}.items():
            path = folder / f"{stem}.{suffix}"
            path.write_text(content, encoding="utf-8", newline="\n")
            paths.append(path)
    except OSError as error:
        raise StoreError(
            f"The page cannot be written to {folder}: {error.strerror or error}.",
            hint="Give a folder that can be written and has space.",
        ) from error
    return tuple(paths)
