"""What every rendering of a report says: the derived facts and their wording, once, so that no two formats disagree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from edgevlm.measure.counts import Instructions
from edgevlm.measure.spec import Comparison, Environment, Measurement
from edgevlm.report.notation import MISSING, count, error, interval, millions, ms, percent, points, seconds, size, times
from edgevlm.report.spec import CandidateRow, Report, Status
from edgevlm.runtime.spec import Accuracy, Spec
from edgevlm.search.choose import FLOAT

# In the order a reader wants them, each with a sign, so that no verdict is told by colour alone.
SIGNS: dict[Status, str] = {
    "winner": "★",
    "float": "◆",
    "inside budgets": "●",
    "slower than float": "▲",
    "over a budget": "■",
    "dropped early": "▼",
    "not measured validly": "○",
    "left out": "◇",
    "failed": "✕",
}

BUDGETS: dict[str, tuple[str, Callable[[float], str]]] = {
    "max_drop": ("Accuracy drop at most", lambda value: f"{100 * value:g} {'point' if value == 0.01 else 'points'}"),
    "max_latency_ms": ("Median latency at most", lambda value: f"{value:g} ms"),
    "max_size_mb": ("Size at most", lambda value: f"{value:g} MB"),
}


# --- who is who -------------------------------------------------------------------------------------------


def float_name(report: Report) -> str | None:
    """The candidate that all others are compared with; None where nobody says which."""
    marked = next((row.name for row in report.candidates if row.status == "float"), None)
    if marked or not report.comparisons:
        return marked or (report.winner if report.selection == "float-fallback" else None)
    return report.comparisons[0].baseline


def float_ships(report: Report) -> bool:
    return report.selection == "float-fallback" or report.winner == float_name(report)


def row_of(report: Report, name: str | None) -> CandidateRow | None:
    return next((row for row in report.candidates if row.name == name), None)


def in_order(report: Report) -> tuple[CandidateRow, ...]:
    """The winner, float, then by verdict and by latency."""
    order = list(SIGNS)

    def key(row: CandidateRow) -> tuple[bool, bool, int, bool, float]:
        is_float = row.name == float_name(report)
        return (
            row.name != report.winner,
            not is_float,
            order.index(row.status),
            row.p50_ms is None,
            row.p50_ms or 0.0,
        )

    return tuple(sorted(report.candidates, key=key))


def measurement_of(report: Report, name: str) -> tuple[Comparison, Measurement] | None:
    """Where a candidate was timed and has samples; the last such comparison, as that is the one that counts."""
    for comparison in reversed((*report.screenings, *report.comparisons)):
        for measurement in comparison.measurements:
            if measurement.subject == name and measurement.turns_ms:
                return comparison, measurement
    return None


def pareto(report: Report) -> tuple[CandidateRow, ...]:
    """The rows that no other beats in both latency and accuracy, fastest first; only what was measured validly."""
    front: list[CandidateRow] = []
    for row in sorted(plotted(report), key=lambda r: (r.p50_ms or 0.0, -(r.accuracy or 0.0))):
        if row.status != "not measured validly" and (not front or (row.accuracy or 0.0) > (front[-1].accuracy or 0.0)):
            front.append(row)
    return tuple(front)


def plotted(report: Report) -> tuple[CandidateRow, ...]:
    return tuple(row for row in in_order(report) if row.p50_ms is not None and row.accuracy is not None)


def is_timed(report: Report) -> bool:
    return any(row.p50_ms is not None for row in report.candidates)


def is_judged(report: Report) -> bool:
    return any(row.accuracy is not None for row in report.candidates)


# --- sentences --------------------------------------------------------------------------------------------


class Figure(Spec, frozen=True, kw_only=True):
    """One of the few numbers at the top: what it is, the number, its unit, and its conditions."""

    label: str
    value: str
    unit: str
    notes: tuple[str, ...]

    def text(self) -> str:
        return f"{self.value}{self.unit}" if self.unit in ("×", "%") else f"{self.value} {self.unit}".rstrip()


def headline(report: Report) -> str:
    """What ships and how fast it is, in one line."""
    latency = report.latency
    if report.selection == "unmeasured" and not report.forms:
        return f"{report.winner} ships; no time of it is the target's"
    if report.selection == "unmeasured":
        return f"{count(len(report.forms), 'form')} ship; none was timed on the target"
    if float_ships(report):
        return "The float model ships"
    asked = ", as requested" if report.selection == "requested" else ""
    if latency is None or latency.ratio is None:
        return f"{report.winner} ships{asked}"
    return f"{report.winner} ships{asked}: {times(1 / latency.ratio)}× the speed of float"


def key_figures(report: Report) -> tuple[Figure, ...]:
    return (_speed(report), _median(report), _accuracy(report), _size(report))


def _speed(report: Report) -> Figure:
    latency = report.latency
    label = "Speed against float"
    if report.selection == "unmeasured":
        return Figure(label=label, value=MISSING, unit="", notes=("not measured",))
    if float_ships(report):
        return Figure(label=label, value="1.00", unit="×", notes=("this is the float model",))
    if latency is None or latency.ratio is None:
        return Figure(label=label, value=MISSING, unit="", notes=("not measured",))
    notes = []
    if latency.ratio_low is not None and latency.ratio_high is not None:
        low, high = times(1 / latency.ratio_high), times(1 / latency.ratio_low)
        notes.append(f"{confidence(report)}% interval {low} to {high}")
    found = measurement_of(report, report.winner)
    if found:
        ratio = found[0].ratio(report.winner)
        if ratio:
            notes.append(f"from {count(ratio.n_pairs, 'paired turn')}")
        if not found[0].is_valid or (ratio and not ratio.is_valid):
            notes.append("the measurement is not valid, see below")
    return Figure(label=label, value=times(1 / latency.ratio), unit="×", notes=tuple(notes))


def _median(report: Report) -> Figure:
    latency = report.latency
    if latency is None:
        return Figure(label="Median latency", value=MISSING, unit="", notes=("not measured",))
    return Figure(
        label="Median latency",
        value=ms(latency.p50_ms),
        unit="ms",
        notes=(
            f"p90 {ms(latency.p90_ms)} ms, p99 {ms(latency.p99_ms)} ms",
            f"batch {latency.batch}, {threads(latency.n_threads)}",
        ),
    )


def _accuracy(report: Report) -> Figure:
    accuracy = report.accuracy
    if accuracy is None:
        return Figure(label="Accuracy", value=MISSING, unit="", notes=("not judged",))
    return Figure(
        label=f"{'Accuracy' if accuracy.has_labels else 'Agreement with float'}, {report.metric}",
        value=percent(accuracy.value).rstrip("%"),
        unit="%",
        notes=(drop_text(report), f"on {count(accuracy.n, 'picture')} never used to choose"),
    )


def _size(report: Report) -> Figure:
    value, _, unit = size(report.size_bytes).partition(" ")
    note = "this is the float model"
    if not float_ships(report) and report.float_size_bytes:
        share = 100 * report.size_bytes / report.float_size_bytes
        note = f"{share:.0f}% of float's {size(report.float_size_bytes)}"
    return Figure(label="Size", value=value, unit=unit, notes=(note,))


def metric_name(report: Report) -> str:
    """The metric with what it was judged by: without labels, the float model is the judge."""
    accuracy = report.accuracy
    has_labels = accuracy.has_labels if accuracy else report.data.has_labels
    return report.metric if has_labels else f"{report.metric}, agreement with float"


def drop_text(report: Report) -> str:
    accuracy = report.accuracy
    if accuracy is None:
        return "not judged"
    if float_ships(report):
        return "this is the float model"
    low, high = points(accuracy.drop_low), points(accuracy.drop_high)
    return f"drop {points(accuracy.drop)} points, 95% interval {low} to {high}"


def confidence(report: Report) -> str:
    protocol = report.comparisons[-1].protocol if report.comparisons else None
    return f"{100 * (protocol.confidence if protocol else 0.95):g}"


def threads(n: int) -> str:
    return count(n, "thread") if n else "all threads"


def about_candidates(report: Report) -> str:
    """How to read the table of candidates."""
    told = []
    if is_timed(report):
        told.append(
            "Times are of the model alone, preprocessing excluded. Time ÷ float is measured in turns with float: "
            f"below 1 is faster, brackets hold the {confidence(report)}% interval."
        )
    else:
        told.append("Nothing was timed.")
    if is_judged(report):
        told.append("Accuracy here is on the select split: it chooses the winner and claims nothing.")
    if report.pareto:
        told.append(front_text(report))
    return " ".join(told)


def about_sensitivity(report: Report) -> str:
    """How to read the table of groups."""
    return (
        f"Each line lowers one stretch of nodes of {report.sensitivities[0].form} alone and leaves the rest in float. "
        "Noise is the power of the outputs over that of their change, in decibel: less is worse. Time is measured in "
        "turns with float."
    )


def sensitivity_rows(report: Report) -> tuple[tuple[str, ...], ...]:
    """For each group: graph, nodes, noise, drop, time saved, time over float's with its interval."""
    return tuple(
        (
            each.graph,
            f"{each.group} ({count(len(each.nodes), 'node')})",
            f"{each.sqnr_db:.1f}",
            MISSING if each.drop is None else points(each.drop),
            f"{each.saved_ms:.3g}".replace("-", "−"),
            f"{times(each.ratio)} {interval(times(each.ratio_low), times(each.ratio_high))}",
        )
        for each in report.sensitivities
    )


SENSITIVITY_HEADER = ("graph", "group lowered alone", "signal ÷ noise, dB", "drop, points", "saved ms", "time ÷ float")


def front_text(report: Report) -> str:
    """The candidates that no other beats in time, accuracy and size at once."""
    return f"No other beats these in time, accuracy and size at once: {', '.join(report.pareto)}."


class HasRatio(Protocol):
    """Something timed against float."""

    @property
    def ratio(self) -> float | None: ...
    @property
    def ratio_low(self) -> float | None: ...
    @property
    def ratio_high(self) -> float | None: ...


def ratio_text(row: HasRatio) -> str:
    if row.ratio is None:
        return MISSING
    if row.ratio_low is None or row.ratio_high is None:
        return times(row.ratio)
    return f"{times(row.ratio)} {interval(times(row.ratio_low), times(row.ratio_high))}"


def row_drop_text(row: CandidateRow) -> str:
    if row.drop is None:
        return MISSING
    if row.drop_low is None or row.drop_high is None:
        return points(row.drop)
    return f"{points(row.drop)} {interval(points(row.drop_low), points(row.drop_high))}"


def budgets(report: Report) -> tuple[tuple[str, str], ...]:
    """Each budget in words; one that this version has no words for keeps its name."""
    told = []
    for name, value in report.budgets.items():
        words, text = BUDGETS.get(name, (name, lambda value: f"{value:g}"))
        told.append((words, text(value)))
    return tuple(told)


def how_judged(report: Report) -> tuple[tuple[str, str], ...]:
    """How accuracy was judged, as terms and sentences."""
    data, accuracy = report.data, report.accuracy
    judge = (
        "The data set's own labels."
        if data.has_labels
        else "No labels were given: an answer counts as right where it agrees with the float model. "
        "This says what lowering changed, not how good the model is."
    )
    rows = [
        ("Metric", metric_name(report)),
        ("Judge", judge),
        ("Pictures", data.source + (" (generated)" if data.is_synthetic and "(generated)" not in data.source else "")),
        ("Calibrate on", count(data.n_calibrate, "picture")),
        ("Select on", f"{count(data.n_select, 'picture')}; these numbers choose the winner and claim nothing"),
        ("Report on", f"{count(data.n_report, 'picture')}, used once, after the choice"),
    ]
    if accuracy is None:
        rows.append(("Claim", "None: accuracy was not judged."))
    elif float_ships(report):
        rows.append(("Claim", f"{percent(accuracy.value)} on the report split; this is the float model."))
    else:
        rows.append(
            (
                "Claim",
                f"{percent(accuracy.value)} on the report split against {percent(accuracy.reference)} for float: "
                f"{drop_text(report)}, paired picture by picture.",
            )
        )
    if accuracy is not None and accuracy.others:
        rows.append(("Beside it", others_text(accuracy)))
    return tuple(rows)


def others_text(accuracy: Accuracy) -> str:
    """Further metrics of what ships; agreement is with the float model's answers."""
    return ", ".join(f"{name} {percent(value)}" for name, value in accuracy.others.items())


FORMS_HEADER = ("form", "status", "size", "on the report split", "verified", "not proven")


def form_rows(report: Report) -> tuple[tuple[str, ...], ...]:
    """For each form that the device chooses from: what it is, what was found out, and what was not."""
    return tuple(
        (
            f"{form.name} ({form.precision}, {form.backend})",
            form.status,
            size(form.size_bytes),
            _form_accuracy(form.name, form.accuracy),
            " ".join(form.verified),
            " ".join(form.unproven),
        )
        for form in report.forms
    )


def _form_accuracy(form: str, accuracy: Accuracy) -> str:
    if form == FLOAT:
        return f"{accuracy.metric} {percent(accuracy.value)}"
    between = interval(points(accuracy.drop_low), points(accuracy.drop_high))
    return f"{accuracy.metric} {percent(accuracy.value)}, drop {points(accuracy.drop)} {between}"


def instructions_header(counted: Instructions) -> tuple[str, ...]:
    """What stands above each column, a graph of a form each."""
    has_graphs = len({each.graph for each in counted.graphs}) > 1
    names = (each.form or each.precision for each in counted.graphs)
    graphs = (f" {each.graph}" if has_graphs else "" for each in counted.graphs)
    return ("instructions", *(f"{name}{graph}" for name, graph in zip(names, graphs, strict=True)))


def instruction_rows(counted: Instructions) -> tuple[tuple[str, ...], ...]:
    """Millions in a run of each graph: all, then each class that any of them has, the most frequent first."""
    totals = {name: sum(each.by_class[name] for each in counted.graphs) for name in counted.graphs[0].by_class}
    present = sorted((name for name, total in totals.items() if total), key=lambda name: -totals[name])
    rows = [("all", *(millions(each.n_instructions) for each in counted.graphs))]
    return (*rows, *((name, *(millions(each.by_class[name]) for each in counted.graphs)) for name in present))


def about_instructions(counted: Instructions) -> tuple[str, ...]:
    """How they were counted, and what they are not."""
    tools = " and ".join(f"{name} {version}" for name, version in counted.tools.items())
    left_out = {
        why: _listed([form for form, reason in counted.left_out.items() if reason == why])
        for why in counted.left_out.values()
    }
    return (
        f"Millions of instructions in one run at one thread, counted on an emulated {counted.cpu} ({tools}). They are "
        "the same each time, and no times: one instruction is not as fast as another, and memory is not in them.",
        *(f"Not counted: {names}; {why}." for why, names in left_out.items()),
    )


def about_lengths(report: Report) -> tuple[str, ...]:
    """What was proven of texts that are not padded."""
    return tuple(
        f"{proof.component} takes texts at their own length: with {_listed(proof.lengths)} tokens they gave unpadded, "
        f"alone and beside longer ones, what they give padded (largest relative error "
        f"{error(proof.length_error or 0.0)})."
        for proof in report.proofs
        if proof.lengths
    )


def _listed(items: Sequence[object]) -> str:
    *others, last = map(str, items)
    return f"{', '.join(others)} and {last}" if others else last


def cautions(report: Report) -> tuple[str, ...]:
    """The report's own warnings, then those that follow from what it holds."""
    found = list(report.warnings)
    if report.data.is_synthetic:
        found.append(
            "Accuracy was judged on generated pictures: it shows what lowering changed, "
            "not how the model does on real photographs."
        )
    invalid = [c for c in report.comparisons if not c.is_valid]
    if invalid:
        found.append(
            f"{count(len(invalid), 'latency measurement')} of {len(report.comparisons)} not valid: "
            f"{_joined([reason for c in invalid for reason in c.reasons])}."
        )
    return tuple(found)


def _joined(sentences: Sequence[str]) -> str:
    return "; ".join(sentence.rstrip(".") for sentence in sentences) or "no reason was given"


class Validity(Spec, frozen=True, kw_only=True):
    """What one interleaved measurement says about itself."""

    title: str
    is_valid: bool
    reasons: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    subjects: tuple[tuple[str, str], ...]


def validity(report: Report) -> tuple[Validity, ...]:
    n = len(report.comparisons)
    return tuple(
        Validity(
            title=f"Measurement {i} of {n}" if n > 1 else "Measurement",
            is_valid=comparison.is_valid,
            reasons=comparison.reasons,
            facts=_protocol(comparison),
            subjects=_troubles(comparison),
        )
        for i, comparison in enumerate(report.comparisons, start=1)
    )


def _protocol(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    protocol = comparison.protocol
    runs = [len(turn) for m in comparison.measurements for turn in m.turns_ms]
    return (
        ("Baseline", comparison.baseline),
        ("Subjects", f"{len(comparison.measurements)}, each in a process of its own, taking turns"),
        ("Runs kept", f"{sum(runs):,} after {protocol.warmup_ms:g} ms of warm-up each"),
        (
            "Turns",
            f"{protocol.min_rounds} to {protocol.n_rounds} of about {protocol.block_ms:g} ms, "
            f"at least {count(min(runs, default=protocol.min_runs_per_turn), 'run')} each",
        ),
        ("Interval", f"bootstrap over paired turns, {100 * protocol.confidence:g}%, seed {protocol.seed}"),
        ("Took", seconds(comparison.wall_s) + (", extended once" if comparison.was_extended else "")),
        ("Other programs", _other_load(comparison)),
        *_conditions(comparison),
        ("Machine", comparison.environment.machine),
    )


def _conditions(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    """What the machine said of itself; what it did not tell is left out."""
    texts = comparison.conditions.to_texts() if comparison.conditions else {}
    return tuple((name.capitalize(), text) for name, text in texts.items() if text is not None)


def _other_load(comparison: Comparison) -> str:
    if comparison.other_load is None:
        return "not known: the system does not tell"
    return f"took {percent(comparison.other_load)} of the machine's processor time meanwhile"


def _troubles(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    for m in comparison.measurements:
        ratio = comparison.ratio(m.subject)
        if m.failure:
            found.append((m.subject, f"failed: {m.failure}"))
        if m.dropped_after_round is not None:
            found.append((m.subject, f"dropped after {count(m.dropped_after_round, 'turn')}, surely slower"))
        elif ratio and not ratio.is_valid:
            found.append((m.subject, f"ratio not valid: {_joined(ratio.reasons)}"))
    return tuple(found)


def environment_facts(environment: Environment) -> tuple[tuple[str, str], ...]:
    return (
        ("Machine", environment.machine),
        ("Architecture", environment.arch),
        ("Instruction sets", ", ".join(environment.isa) or MISSING),
        ("Cores", str(environment.n_cores)),
        ("Memory", size(environment.memory_bytes)),
        ("Operating system", environment.os),
        ("Python", environment.python),
        *sorted(environment.tools.items()),
    )


def provenance_facts(report: Report) -> tuple[tuple[str, str], ...]:
    return (
        ("Source", report.source),
        ("Licence", report.licence or "not stated by the source: ask its author before you distribute the bundle"),
        ("Task", report.task),
        ("Target", report.target),
        *sorted(report.tools.items()),
    )


def steps_summary(report: Report) -> str:
    hits = sum(step.hit for step in report.steps)
    total = sum(step.wall_s for step in report.steps)
    return f"{count(len(report.steps), 'step')}, {hits} looked up in the store, {seconds(total)} in all."
