"""Checkpoints as bundles beside each other: compiled alike, timed in turns, judged on the same pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import edgevlm
from edgevlm.cli.progress import shown_progress
from edgevlm.evaluation.evaluation import evaluate_bundles
from edgevlm.measure.bundles import benchmark_bundles
from edgevlm.measure.protocol import ALL_STAY
from edgevlm.measure.spec import Protocol
from edgevlm.report.side_by_side import side_by_side, write_side_by_side


def show_beside(
    checkpoints: Sequence[Path],
    *,
    work: Path,
    results: Path,
    name: str,
    judged_on: str | None = None,
    protocol: Protocol = ALL_STAY,
    threads: int | None = None,
    **asked: Any,
) -> str:
    """Write ``results/name.md`` and ``.json``; bundles of an earlier call are taken as they are.

    Args:
        protocol: how bundles are timed against each other.
        judged_on: pictures, as ``read_data_set`` takes them; None compares times and sizes alone.
        threads: to time and judge with; None is what each was compiled for, 0 all.
        asked: as ``edgevlm.compile`` takes it.
    Returns: the Markdown.
    """
    bundles = []
    for checkpoint in checkpoints:
        bundle = work / "bundles" / f"{checkpoint.name}-{asked.get('precision', 'auto')}"
        if not bundle.is_dir():
            with shown_progress() as progress:
                edgevlm.compile(str(checkpoint), output=bundle, progress=progress, **asked)
        bundles.append(bundle)
    evaluations = evaluate_bundles(bundles, judged_on, n_threads=threads) if judged_on is not None else ()
    with shown_progress() as progress:
        found = benchmark_bundles(*bundles, n_threads=threads, protocol=protocol, progress=progress)
    results.mkdir(parents=True, exist_ok=True)
    markdown = ""
    for file in write_side_by_side(side_by_side(found, evaluations), work):
        if file.suffix in (".md", ".json"):
            text = file.read_text(encoding="utf-8").replace(f"{work}/bundles/", "")
            if text.startswith("# "):  # it will stand in a page that has a title
                title, rest = text[2:].split("\n", 1)
                text = f"**{title}**\n{rest}"
            (results / f"{name}{file.suffix}").write_text(text, encoding="utf-8")
            markdown = text if file.suffix == ".md" else markdown
    return markdown
