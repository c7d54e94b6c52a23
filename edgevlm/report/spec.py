"""What a report says. ``report.json`` is this value; the other formats draw it."""

from __future__ import annotations

from typing import Literal

from edgevlm.measure.counts import Instructions
from edgevlm.measure.explanation import Explanation
from edgevlm.measure.spec import Comparison, Environment
from edgevlm.runtime.spec import Accuracy, Latency, Spec

REPORT_SCHEMA_VERSION = 1

Status = Literal[
    "winner",
    "inside budgets",
    "slower than float",
    "dropped early",
    "over a budget",
    "not measured validly",
    "failed",
    "float",
    "left out",
]


class CandidateRow(Spec, frozen=True, kw_only=True):
    """One candidate. ``status`` is the verdict and ``reason`` the sentence for it.

    Units: ``accuracy`` and ``drop*`` are fractions on the select split (never a claim), ``ratio*`` is time ÷ float's.
    """

    name: str
    precision: str
    backend: str
    recipe: dict[str, str]
    status: Status
    reason: str
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    accuracy: float | None = None
    drop: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None
    size_bytes: int | None = None
    memory_bytes: int | None = None
    load_ms: float | None = None


class GroupSensitivity(Spec, frozen=True, kw_only=True):
    """What one group of nodes costs in accuracy and saves in time when it alone is lowered; both were measured.

    Units: ``sqnr_db`` is the power of the float graph's outputs over that of their change; ``drop`` is a fraction on
        the select split, null where judging every group would have taken too long; ``ratio*`` is time ÷ float's time,
        ``saved_ms`` float's median less the group's.
    Args:
        form: the candidate whose recipe lowers the group.
        nodes: that the group holds, in the order in which they run.
    """

    graph: str
    form: str
    group: str
    nodes: tuple[str, ...]
    sqnr_db: float
    drop: float | None
    saved_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


class Proof(Spec, frozen=True, kw_only=True):
    """How far an exported graph is from the framework's own output: |difference| max over |expected| max.

    Args:
        lengths: of the texts, in tokens, that give unpadded what they give padded; empty where the length is fixed.
        length_error: how far apart the two are at most, in the exported graph.
    """

    component: str
    route: str
    n_inputs: int
    batches: tuple[int, ...]
    max_relative_error: float
    tolerance: float
    n_nodes: int
    lengths: tuple[int, ...] = ()
    length_error: float | None = None


class DataUse(Spec, frozen=True, kw_only=True):
    """Which pictures served which purpose; the three sets are disjoint."""

    source: str
    n_calibrate: int
    n_select: int
    n_report: int
    has_labels: bool
    is_synthetic: bool


class StepRow(Spec, frozen=True, kw_only=True):
    """A step of the plan and whether its result was looked up (``hit``) or made."""

    name: str
    hit: bool
    wall_s: float
    why: str


class ShippedForm(Spec, frozen=True, kw_only=True):
    """A form in a bundle for hardware that was not at hand: what was proven of it, where, and what was not.

    Args:
        verified: what was found out, and by what, a sentence each.
        unproven: what only the device can tell, a sentence each.
    """

    name: str
    precision: str
    backend: str
    status: str
    size_bytes: int
    accuracy: Accuracy
    verified: tuple[str, ...]
    unproven: tuple[str, ...]


class Report(Spec, frozen=True, kw_only=True):
    """Everything that a compile found out.

    ``verdict`` is one or two sentences: what was chosen, and why. ``warnings`` are sentences too. ``comparisons``
    are of the best, one for each graph; ``screenings`` are the short ones before them. ``explanation`` is null where
    nothing was profiled; ``forms`` are what the device chooses from where nothing was timed;
    ``instructions`` are null where nobody asked for them.
    """

    schema_version: int
    title: str
    task: str
    target: str
    source: str
    licence: str | None
    verdict: str
    selection: str
    winner: str
    metric: str
    budgets: dict[str, float]
    accuracy: Accuracy | None
    latency: Latency | None
    size_bytes: int
    float_size_bytes: int
    candidates: tuple[CandidateRow, ...]
    proofs: tuple[Proof, ...]
    data: DataUse
    comparisons: tuple[Comparison, ...]
    environment: Environment
    steps: tuple[StepRow, ...]
    warnings: tuple[str, ...]
    reproduce: str
    tools: dict[str, str]
    screenings: tuple[Comparison, ...] = ()
    sensitivities: tuple[GroupSensitivity, ...] = ()
    pareto: tuple[str, ...] = ()
    explanation: Explanation | None = None
    forms: tuple[ShippedForm, ...] = ()
    instructions: Instructions | None = None
