"""Which candidates are inside the budgets, in which order they deserve to ship, and why the others do not."""

from __future__ import annotations

from edgevlm.errors import GateError
from edgevlm.plan import Budgets
from edgevlm.report.spec import Status
from edgevlm.runtime.spec import Spec

FLOAT = "fp32"


class Trial(Spec, frozen=True, kw_only=True):
    """What was found out about one candidate.

    Units: ``drop`` and its interval are fractions on the select split, ``ratio*`` is time ÷ float's time.
    Args:
        failure: why it does not run at all; nothing else is known then.
        invalid_because: reasons why its latency is not to be trusted; empty where it is.
        is_rough: it was only screened, not timed with the best: it ships after those.
        was_dropped: it was so much slower than another that measuring it further was not worth the time.
    """

    name: str
    is_requested: bool = True
    size_bytes: int = 0
    p50_ms: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    drop: float | None = None
    failure: str | None = None
    invalid_because: tuple[str, ...] = ()
    is_rough: bool = False
    was_dropped: bool = False

    @property
    def is_float(self) -> bool:
        return self.name == FLOAT


class Verdict(Spec, frozen=True, kw_only=True):
    name: str
    status: Status
    reason: str


class Choice(Spec, frozen=True, kw_only=True):
    """``contenders``: who may ship, best first; the float graph is last where it is inside the budgets."""

    contenders: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    def verdict(self, name: str) -> Verdict:
        return next(verdict for verdict in self.verdicts if verdict.name == name)


def choose(trials: tuple[Trial, ...], budgets: Budgets) -> Choice:
    """Order the candidates that may ship.

    A candidate must be inside every budget and, where float is inside them too, surely faster than float: its whole
    interval below 1. Float needs no proof but the hard budgets.

    Raises: GateError: nothing is inside the budgets, not even float; it names the nearest misses.
    """
    float_trial = next(trial for trial in trials if trial.is_float)
    float_ships = float_trial.is_requested and not float_trial.failure and not misses(float_trial, budgets)
    verdicts = tuple(_verdict(trial, budgets, must_beat_float=float_ships) for trial in trials)
    inside = {verdict.name for verdict in verdicts if verdict.status == "inside budgets"}
    ranked = sorted((t for t in trials if t.name in inside), key=lambda t: (t.is_rough, *speed(t)))
    contenders = tuple(trial.name for trial in ranked) + ((FLOAT,) if float_ships else ())
    if not contenders:
        raise GateError(
            f"No candidate is inside the budgets ({_budget_text(budgets)}). Nearest: {_nearest(trials, budgets)}.",
            hint="Loosen the budget that is missed, choose a smaller model, or lower --image-size.",
        )
    return Choice(contenders=contenders, verdicts=verdicts)


def speed(trial: Trial) -> tuple[float, int, str]:
    """What sorts trials fastest first: by their time over float's, which was taken in the same turns."""
    return (1.0 if trial.ratio is None else trial.ratio, trial.size_bytes, trial.name)


def pareto(trials: tuple[Trial, ...]) -> tuple[str, ...]:
    """Those that no other beats in time, drop and size at once, fastest first; only what was timed and judged."""
    known = sorted((t for t in trials if t.drop is not None and not t.invalid_because and not t.was_dropped), key=speed)
    return tuple(t.name for t in known if not any(_beats(other, t) for other in known))


def _beats(one: Trial, other: Trial) -> bool:
    def figures(trial: Trial) -> tuple[float, float, int]:
        return (1.0 if trial.ratio is None else trial.ratio, trial.drop or 0.0, trial.size_bytes)

    mine, theirs = figures(one), figures(other)
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def misses(trial: Trial, budgets: Budgets) -> tuple[str, ...]:
    """The budgets that a candidate breaks, each with by how much."""
    found = []
    if trial.drop is not None and not trial.is_float and trial.drop > budgets.max_drop:
        found.append(f"drops {trial.drop:.2%} of accuracy where {budgets.max_drop:.2%} is allowed")
    if budgets.max_latency_ms is not None and trial.p50_ms is not None and trial.p50_ms > budgets.max_latency_ms:
        found.append(f"takes {trial.p50_ms:.2f} ms where {budgets.max_latency_ms:g} ms is allowed")
    if budgets.max_size_mb is not None and trial.size_bytes > budgets.max_size_mb * 1e6:
        found.append(f"is {trial.size_bytes / 1e6:.2f} MB where {budgets.max_size_mb:g} MB is allowed")
    return tuple(found)


def _verdict(trial: Trial, budgets: Budgets, *, must_beat_float: bool) -> Verdict:
    def verdict(status: Status, reason: str) -> Verdict:
        return Verdict(name=trial.name, status=status, reason=reason)

    missed = misses(trial, budgets)
    if trial.failure:
        return verdict("failed", trial.failure)
    if trial.is_float:
        return verdict("float", f"{'; '.join(missed)}" if missed else "what every candidate is compared with")
    if not trial.is_requested:
        return verdict("over a budget", "another precision was asked for")
    if trial.was_dropped:  # what it was let go for may have missed a budget itself
        slow = verdict("dropped early", "surely slower than another candidate")
        return verdict("over a budget", "; ".join(missed)) if missed else slow
    if trial.invalid_because and (must_beat_float or budgets.max_latency_ms is not None):
        return verdict("not measured validly", "; ".join(trial.invalid_because))
    if missed:
        return verdict("over a budget", "; ".join(missed))
    if must_beat_float and (trial.ratio_high is None or trial.ratio_high >= 1):
        surely = trial.ratio_low is not None and trial.ratio_low > 1
        return verdict("slower than float", "surely slower than float" if surely else "not surely faster than float")
    # Where neither float nor a latency budget has to be beaten, a rough time is no ground to refuse what was asked for.
    doubt = f"; its time is rough: {'; '.join(trial.invalid_because)}" if trial.invalid_because else ""
    return verdict("inside budgets", f"inside every budget{doubt}")


def _budget_text(budgets: Budgets) -> str:
    parts = [f"accuracy drop ≤ {budgets.max_drop:.2%}"]
    if budgets.max_latency_ms is not None:
        parts.append(f"latency ≤ {budgets.max_latency_ms:g} ms")
    if budgets.max_size_mb is not None:
        parts.append(f"size ≤ {budgets.max_size_mb:g} MB")
    return ", ".join(parts)


def _nearest(trials: tuple[Trial, ...], budgets: Budgets) -> str:
    """The candidates that break the fewest budgets by the least, in words."""
    runnable = [trial for trial in trials if not trial.failure and trial.is_requested]
    ranked = sorted(runnable, key=lambda trial: (len(misses(trial, budgets)), _excess(trial, budgets)))
    lines = [f"{t.name} {'; '.join(misses(t, budgets)) or 'was not measured validly'}" for t in ranked[:3]]
    failures = [f"{trial.name} failed ({trial.failure})" for trial in trials if trial.failure]
    return " / ".join(lines or failures[:3]) or "there was no candidate"


def _excess(trial: Trial, budgets: Budgets) -> float:
    latency = (trial.p50_ms or 0.0) / budgets.max_latency_ms if budgets.max_latency_ms else 0.0
    size = trial.size_bytes / (budgets.max_size_mb * 1e6) if budgets.max_size_mb else 0.0
    drop = (trial.drop or 0.0) / max(budgets.max_drop, 1e-9) if not trial.is_float else 0.0
    return max(latency, size, drop)
