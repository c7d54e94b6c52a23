"""The search over the forms of one graph: screen all, repair what is fast and inexact, tune, and time the best well.

All of it goes through the store trial by trial, so a search that was stopped goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from edgevlm.errors import EdgeVLMError
from edgevlm.evaluation.evaluation import Drop
from edgevlm.job import Work
from edgevlm.measure.protocol import screening
from edgevlm.measure.spec import Protocol
from edgevlm.progress import StepProgress
from edgevlm.report.spec import GroupSensitivity
from edgevlm.search.choose import FLOAT, Trial, misses, speed
from edgevlm.search.spec import Timing, Variant
from edgevlm.search.trials import GraphTrials
from edgevlm.steps.judging import Judge
from edgevlm.steps.sensitivity import NodeGroup, find_sensitivities, keeping, keeping_nodes, node_groups
from edgevlm.steps.timing import time_variants
from edgevlm.steps.variants import Form, GraphForms

# What ships is timed against float and these many others, precisely; more of them cost time and change little.
N_FINALISTS = 3
N_TUNED = 2
# A form that is repaired must promise at least this much over the best that needs no repair, or it is no use.
WORTH_REPAIRING = 0.97
# Forms that are repaired at most; the second one is for a backend whose casts cost less.
N_REPAIRED = 2
# Judging every group on the whole select split may take this share of the time that is left.
SHARE_FOR_JUDGING_GROUPS = 0.25


@dataclass(kw_only=True)
class Clock:
    """The time that a search may take beyond its first round, after which it is started."""

    allowed_s: float
    now: Callable[[], float] = time.monotonic
    was_over: bool = False
    began_s: float | None = None

    def start(self) -> None:
        self.began_s = self.now()

    def left_s(self) -> float:
        return self.allowed_s - (0.0 if self.began_s is None else self.now() - self.began_s)

    def is_over(self) -> bool:
        if self.left_s() > 0:
            return False
        self.was_over = True
        return True


@dataclass(kw_only=True)
class GraphSearch:
    """What is known of one graph's forms so far; ``run`` finds out more."""

    work: Work
    forms: GraphForms
    baseline: Variant
    judge: Judge
    others: tuple[Variant, ...]
    """The other graphs' float variants: what a variant of this graph is judged together with."""
    clock: Clock
    made: dict[str, Form] = field(default_factory=dict)
    sensitivities: tuple[GroupSensitivity, ...] = ()
    judging_s: float = 0.0
    """The longest that a form took to be judged, with reading pictures and counting pixels."""

    def __post_init__(self) -> None:
        self.known = GraphTrials(graph=self.forms.graph)

    @property
    def graph(self) -> str:
        return self.forms.graph

    def run(self) -> None:
        self._add(self.baseline, self.forms.baseline)
        for form in self.forms.forms()[1:]:
            if isinstance(form, Variant):
                self._add(form, None)
            else:
                self._add(self.forms.make(form), form)
        self._time(self.known.variants.values(), self._screening, extend=False, what="screening, ")
        for name in self._fastest_first():
            self._judge(name)
        self._bring_back()
        self.clock.start()
        if not self.clock.is_over():
            self._look_inside()
        self._time_finalists()

    # --- what is known ------------------------------------------------------------------------------------

    def _inside(self) -> list[Trial]:
        """Judged, inside the budgets that hold for this graph alone, and no slower than float; fastest first."""
        budgets = self.work.job.request.budgets
        trials = [self.known.trial(name) for name in self.known.drops if name != FLOAT]
        # A latency budget is for all graphs together, and known well only at the end.
        alone = msgspec.structs.replace(budgets, max_latency_ms=None)
        return sorted((t for t in trials if not t.failure and not misses(t, alone)), key=speed)

    # --- trying -------------------------------------------------------------------------------------------

    @property
    def _protocol(self) -> Protocol:
        return self.work.job.request.protocol

    @property
    def _screening(self) -> Protocol:
        """Who is slow is let go early, except where a slow one may have to ship."""
        job = self.work.job
        may_be_slow = job.request.budgets.max_size_mb is not None or job.request.precision != "auto"
        protocol = screening(self._protocol)
        return msgspec.structs.replace(protocol, halve_at=()) if may_be_slow else protocol

    def _add(self, variant: Variant, form: Form | None) -> None:
        self.known.variants[variant.name] = variant
        if form is not None:
            self.made[variant.name] = form

    def _time(self, variants: Iterable[Variant], protocol: Protocol, *, extend: bool, what: str) -> None:
        comparison = time_variants(
            self.work, self.graph, list(variants), protocol=protocol, extend=extend, what=what + self._so_far()
        )
        self.known.timings.append(Timing(graph=self.graph, comparison=comparison))

    def _so_far(self) -> str:
        best = next(iter(self._inside()), None)
        if best is None or best.ratio is None:
            return ""
        return f"best so far {best.name} at {best.ratio:.2f} × float's time, drop {(best.drop or 0) * 100:.2f} points, "

    def _fastest_first(self) -> list[str]:
        trials = [self.known.trial(name) for name in self.known.variants]
        alive = [t for t in trials if not t.failure and not t.was_dropped]
        return [trial.name for trial in sorted(alive, key=speed)]

    def _judge(self, name: str) -> Drop | None:
        if name not in self.known.drops and name not in self.known.failures:
            began_s = self.clock.now()
            try:
                self.known.drops[name] = self.judge.drop(self._members(self.known.variants[name]))
                self.judging_s = max(self.judging_s, self.clock.now() - began_s)
            except EdgeVLMError as error:
                if name == FLOAT:
                    raise
                self.known.failures[name] = error.message
        return self.known.drops.get(name)

    def _bring_back(self) -> None:
        """Judge who was let go for being slower than a form that turned out to lose too much accuracy.

        Fastest first, until one is inside the budget: it is timed again, and whoever is slower stays away.
        """
        while (name := self._let_go_in_vain()) is not None:
            drop = self._judge(name)
            if drop is not None and drop.value <= self.work.job.request.budgets.max_drop:
                best = [self.known.variants[trial.name] for trial in self._inside() if trial.name != name][:1]
                protocol = msgspec.structs.replace(self._screening, halve_at=())
                self._time([self.baseline, *best, self.known.variants[name]], protocol, extend=False, what="again, ")

    def _let_go_in_vain(self) -> str | None:
        """The fastest form that was dropped, is surely faster than all that is inside the budget, and is not judged."""
        inside = [trial.ratio for trial in self._inside() if not trial.was_dropped and trial.ratio is not None]
        limit = min(inside, default=1.0)
        trials = [self.known.trial(name) for name in self.known.variants if name not in self.known.drops]
        found = [
            trial
            for trial in trials
            if trial.was_dropped and not trial.failure and trial.ratio_high is not None and trial.ratio_high < limit
        ]
        return min(found, key=speed).name if found else None

    def _members(self, variant: Variant) -> tuple[Variant, ...]:
        return tuple(variant if v.graph == self.graph else v for v in self.others)

    def _try(self, form: Form, suffix: str) -> Trial:
        """Make, time and judge one more form, beside float and the best so far."""
        variant = self.forms.make(form, suffix=suffix)
        self._add(variant, form)
        best = [self.known.variants[trial.name] for trial in self._inside()[:1]]
        if variant.failure is None:
            self._time([self.baseline, *best, variant], self._screening, extend=False, what="mixed, ")
            self._judge(variant.name)
        return self.known.trial(variant.name)

    # --- mixed precision ----------------------------------------------------------------------------------

    def _look_inside(self) -> None:
        """Which groups of a lowered form cost accuracy, and which save time; keep the wrong ones in float."""
        best = next(iter(self._inside()), None)
        broken = sorted(
            (name for name in self._fastest_first() if self._needs_repair(name, best)),
            key=lambda name: self.known.drops[name].value,
        )
        if not broken:
            self._find_sensitivities(best.name if best else "")
            self._leave_slow_groups(best.name if best else "")
        # What is nearest to the budget loses least speed by being brought inside.
        for name in broken[:N_REPAIRED]:
            if self.clock.is_over():
                return
            if self._find_sensitivities(name):
                self._repair(name)

    def _find_sensitivities(self, name: str) -> bool:
        """Whether the form has groups, and there was time to look at them."""
        form = self.made.get(name)
        groups = self._groups(form)
        if form is None or len(groups) < 2:
            return False
        # Each is float but for one group. What an earlier search judged was only looked up, in no time.
        running_s = len(self.work.job.splits.select) * (self.known.trial(FLOAT).p50_ms or 0.0) / 1e3
        judging_s = len(groups) * max(running_s, self.judging_s)
        is_judged = judging_s < SHARE_FOR_JUDGING_GROUPS * self.clock.left_s()

        def drop_of(variant: Variant) -> Drop | None:
            return self.judge.drop(self._members(variant)) if is_judged else None

        found = find_sensitivities(
            self.work, self.forms, form, self.baseline, groups, drop_of, is_over=self.clock.is_over
        )
        self.sensitivities += found
        return bool(found)

    def _groups(self, form: Form | None) -> tuple[NodeGroup, ...]:
        return node_groups(self.forms.lowered_nodes(form)) if form else ()

    def _needs_repair(self, name: str, best: Trial | None) -> bool:
        trial, drop, form = self.known.trial(name), self.known.drops.get(name), self.made.get(name)
        if form is None or drop is None or drop.value <= self.work.job.request.budgets.max_drop:
            return False
        limit = WORTH_REPAIRING * (best.ratio if best and best.ratio else 1.0)
        return trial.ratio is not None and trial.ratio < limit and len(self.forms.lowered_nodes(form)) > 1

    def _by_loss_for_time(self, name: str) -> list[NodeGroup]:
        """The groups that lose most for the time that they save come first.

        By accuracy where a group alone loses more than its share of the budget, which is more than chance; by noise
        among the others. Of a ResNet-50 two groups of 10 decibel each lost 8.1 points and 0.2.
        """
        known = self._sensitivities_of(name)
        groups = self._groups(self.made[name])
        share = self.work.job.request.budgets.max_drop / len(groups)

        def price(group: NodeGroup) -> tuple[float, float]:
            found = known.get(group.name)
            if found is None:
                return float("inf"), float("inf")  # it does not even run alone
            saved_ms = max(found.saved_ms, 1e-3)
            drop = found.drop if found.drop is not None and found.drop > share else 0.0
            # Noise of independent groups adds up by its power (arXiv:1511.06393).
            return drop / saved_ms, float(10 ** (-found.sqnr_db / 10) / saved_ms)

        return sorted(groups, key=price, reverse=True)

    def _sensitivities_of(self, name: str) -> dict[str, GroupSensitivity]:
        return {s.group: s for s in self.sensitivities if s.form == self.made[name].recipe.name}

    def _first_guess(self, name: str, ranked: list[NodeGroup]) -> int:
        """How many groups to keep in float first: what the others lost alone then adds up to less than is allowed.

        Where groups were not judged, half of them.
        """
        known = self._sensitivities_of(name)
        found = [known.get(group.name) for group in ranked]
        losses = [each.drop if each else None for each in found]
        judged = [loss for loss in losses if loss is not None]
        if len(judged) < len(losses):
            return len(ranked) // 2
        max_drop = self.work.job.request.budgets.max_drop
        return next((n for n in range(1, len(ranked)) if sum(judged[n:]) <= max_drop), len(ranked) - 1)

    def _repair(self, name: str) -> None:
        """The fewest groups in float that keep to the accuracy budget, by bisection; then fewer layers of them.

        What just keeps to the budget here may not on the report split, so something is tried that takes half of it.
        """
        form, ranked = self.made[name], self._by_loss_for_time(name)
        max_drop = self.work.job.request.budgets.max_drop
        drops: dict[int, float] = {}

        def loses(n: int) -> float:
            if n not in drops:
                trial = self._try(keeping(form, ranked[:n]), f"-mixed-{n}")
                drops[n] = float("inf") if trial.drop is None else trial.drop
            return drops[n]

        low, high = 0, len(ranked)  # with none it fails; with all it is float
        n = self._first_guess(name, ranked)
        while high - low > 1 and not self.clock.is_over():
            low, high = (low, n) if loses(n) <= max_drop else (n, high)
            n = (low + high) // 2
        n = (high + len(ranked)) // 2
        if high < n < len(ranked) and loses(high) > max_drop / 2 and not self.clock.is_over():
            loses(n)
        if safe := [n for n, drop in drops.items() if drop <= max_drop / 2]:
            self._narrow(name, ranked[: min(safe)])

    def _narrow(self, name: str, groups: list[NodeGroup]) -> None:
        """Fewer of the groups' nodes in float: part after part is lowered where that takes no more than half of the
        budget, in ever finer parts. These are only judged, which takes a moment; what is left in the end is timed.

        Source: minimizing delta debugging (Zeller and Hildebrandt 2002, doi:10.1109/32.988498).
        """
        form, max_drop = self.made[name], self.work.job.request.budgets.max_drop / 2
        all_nodes = nodes = [node for group in groups for node in group.nodes]
        n_parts, n_tried = min(max(2, len(groups)), len(nodes)), 0
        while len(nodes) > 1 and not self.clock.is_over():
            parts = np.array_split(np.arange(len(nodes)), n_parts)
            for part in reversed(parts):  # the groups stand with the worst first
                if self.clock.is_over():
                    break
                fewer = [node for i, node in enumerate(nodes) if i not in part]
                n_tried += 1
                drop = self._drop_of(keeping_nodes(form, fewer), f"~narrow-{n_tried}")
                if drop is not None and drop <= max_drop:
                    nodes, n_parts = fewer, max(n_parts - 1, 2)
                    break
            else:
                if n_parts == len(nodes):
                    break
                n_parts = min(2 * n_parts, len(nodes))
        if len(nodes) < len(all_nodes):
            self._try(keeping_nodes(form, nodes), f"-mixed-{len(nodes)}-nodes")

    def _drop_of(self, form: Form, suffix: str) -> float | None:
        """Of a form that is not timed; None where it does not run."""
        variant = self.forms.make(form, suffix=suffix)
        if variant.failure is not None:
            return None
        try:
            return self.judge.drop(self._members(variant)).value
        except EdgeVLMError:
            return None

    def _leave_slow_groups(self, name: str) -> None:
        """Groups that are surely slower when lowered stay in float."""
        slow = {s.group for s in self.sensitivities if s.ratio_low > 1}
        form = self.made.get(name)
        groups = self._groups(form)
        kept = [group for group in groups if group.name in slow]
        if form and kept and len(kept) < len(groups) and not self.clock.is_over():
            self._try(keeping(form, kept), f"-mixed-{len(kept)}")

    # --- the end ------------------------------------------------------------------------------------------

    def _time_finalists(self) -> None:
        """Float and the best few, with other ways to open them, timed well: the figures that are reported."""
        names = [trial.name for trial in self._inside()[:N_FINALISTS]]
        finalists = [self.baseline, *(self.known.variants[name] for name in names)]
        if not self.clock.is_over():
            for name in [*names[:N_TUNED], *([] if names else [FLOAT])]:
                finalists += self._otherwise_opened(name)
        # Nobody is let go: who comes next ships where the report split refuses the best.
        protocol = msgspec.structs.replace(self._protocol, halve_at=())
        self._time(finalists, protocol, extend=True, what="the best, ")
        for variant in finalists:
            self._judge(variant.name)

    def _otherwise_opened(self, name: str) -> list[Variant]:
        form, found = self.made[name], []
        for short, session in self.forms.sessions(form).items():
            self.work.progress(StepProgress(name=self.work.step.name, detail=f"{self.graph}: {name}, {short}"))
            variant = msgspec.structs.replace(self.known.variants[name], name=f"{name}@{short}", session=session)
            self._add(variant, form)
            found.append(variant)
        return found
