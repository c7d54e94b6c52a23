"""What is told of a study: a row for the teacher, and one for each arm."""

from __future__ import annotations

import statistics

from benchmarks.distillation.spec import StudyResult
from edgevlm.distillation.students.facts import StudentFacts


def table(result: StudyResult) -> str:
    """Each arm's mean over the seeds, and from the worst of them to the best."""
    names = list(result.teacher)
    facts = result.facts
    lines = [
        "| | parameters | MB | ms | seeds | " + " | ".join(names) + " |",
        "|---" * (5 + len(names)) + "|",
        f"| teacher | {result.teacher_n_parameters / 1e6:.2f} M | {result.teacher_n_bytes / 1e6:.1f} "
        f"| {_ms(facts.teacher if facts else None)} | | "
        + " | ".join(f"{result.teacher[name]:.3f}" for name in names)
        + " |",
    ]
    for arm in result.study.arms:
        runs = [run for run in result.runs if run.arm == arm.name]
        if not runs:
            continue
        cells = []
        for name in names:
            values = [run.metrics[name] for run in runs]
            cells.append(f"{statistics.fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]")
        lines.append(
            f"| {arm.name}, {runs[0].n_steps} steps | {runs[0].n_parameters / 1e6:.2f} M | {runs[0].n_bytes / 1e6:.1f} "
            f"| {_ms(facts.student if facts else None)} | {len(runs)} | " + " | ".join(cells) + " |"
        )
    graphs = " and ".join(facts.student.latency_ms) if facts else "the graphs"
    told = ", ".join(f"{name} {version}" for name, version in sorted(result.versions.items()))
    return (
        f"**{result.study.title}**\n\n" + "\n".join(lines) + f"\n\nOn {result.n_unseen} pictures that no arm trained "
        f"on; brackets from the worst seed to the best. Times are medians of {graphs} in ONNX Runtime in float32, one "
        f"picture, on {result.machine}. {result.made_at}, {told}.\n"
    )


def _ms(facts: StudentFacts | None) -> str:
    return " + ".join(f"{value:.2f}" for value in facts.latency_ms.values()) if facts and facts.latency_ms else "–"
