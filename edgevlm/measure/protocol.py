"""Ready-made protocols."""

from __future__ import annotations

import msgspec

from edgevlm.measure.spec import Protocol

QUICK = Protocol(
    n_rounds=8, min_rounds=6, stop_half_width=0.05, block_ms=5.0, warmup_ms=20.0, halve_at=(), budget_s=20.0
)
"""For tests and a first look: enough rounds for a verdict, not for a fine one."""


ALL_STAY = Protocol(halve_at=())
"""For a benchmark, where the ratio of the slowest is wanted as well."""


def extended(protocol: Protocol) -> Protocol:
    """Twice the rounds and twice the budget, for the one repetition after a measurement that is not valid.

    Another seed, so that neither the order of the turns nor the resampling repeats what failed.
    """
    return msgspec.structs.replace(
        protocol, n_rounds=2 * protocol.n_rounds, budget_s=2 * protocol.budget_s, seed=protocol.seed + 1
    )


def with_rounds(protocol: Protocol, n_rounds: int) -> Protocol:
    """At most ``n_rounds``; fewer where every interval is narrow before that, or where the budget ends."""
    return msgspec.structs.replace(protocol, n_rounds=n_rounds, min_rounds=min(n_rounds, protocol.min_rounds))


def screening(protocol: Protocol) -> Protocol:
    """Enough to tell who deserves to be measured well: a third of the rounds, and early farewells.

    What is surely a quarter slower than the best after 4 rounds does not become the best in the others.
    """
    n_rounds = max(8, protocol.n_rounds // 3)
    return msgspec.structs.replace(
        protocol,
        n_rounds=min(n_rounds, protocol.n_rounds),
        min_rounds=min(8, protocol.min_rounds),
        stop_half_width=2 * protocol.stop_half_width,
        halve_at=(4, 8) if protocol.halve_at else (),
        drop_ratio=1.25,
        budget_s=protocol.budget_s / 2,
    )
