"""Why a candidate is as fast as it is: its operators, its findings, and how near to the machine's best it comes."""

from __future__ import annotations

from edgevlm.measure.findings import Finding
from edgevlm.measure.kinds import kind_of
from edgevlm.measure.operators import Profile
from edgevlm.measure.peak import Peak
from edgevlm.measure.work import Work
from edgevlm.runtime.spec import Spec


class Roofline(Spec, frozen=True, kw_only=True):
    """A graph's rate beside the best that its backend reached on this machine with as many threads.

    Args:
        gmac_per_s: the graph's multiply-accumulates over its median latency, as the candidates were timed.
        precision: in which the graph does most of its multiply-accumulates; ``peak_gmac_per_s`` is that of it.
        fraction: the one over the other.
        memory_fraction: the weights and the operators' inputs and outputs over the latency, as a fraction of the
            memory's bandwidth; above 1 where caches hold much of it. Null where the backend does not tell bytes.
    """

    gmac_per_s: float
    precision: str
    peak_gmac_per_s: float
    fraction: float
    memory_fraction: float | None


class Explained(Spec, frozen=True, kw_only=True):
    """One graph in one form.

    Args:
        name: the variant's, such as ``fp32``.
        by_kind_ms: the operators' time by the kind of their work, a name of ``edgevlm.measure.kinds``, the costliest
            first.
        roofline: null where its work or the peak is not known.
        failure: why there is no profile; one sentence.
    """

    graph: str
    name: str
    backend: str
    profile: Profile | None
    by_kind_ms: dict[str, float] = {}
    findings: tuple[Finding, ...] = ()
    roofline: Roofline | None = None
    failure: str | None = None


class Explanation(Spec, frozen=True, kw_only=True):
    """The winner and the float graphs, on real inputs.

    Args:
        work: by graph, as the float graph is written.
        winner, reference: one for each graph; ``reference`` is empty where the winner is float.
        peaks: by backend and threads.
        notes: sentences about what could not be found out.
    """

    work: dict[str, Work]
    winner: tuple[Explained, ...]
    reference: tuple[Explained, ...]
    peaks: tuple[Peak, ...]
    notes: tuple[str, ...] = ()


def time_by_kind(profile: Profile) -> dict[str, float]:
    """Milliseconds by the kind of work, the costliest first."""
    found: dict[str, float] = {}
    for row in profile.rows:
        found[kind_of(row.op_type)] = found.get(kind_of(row.op_type), 0.0) + row.time_ms
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def place_under_roof(profile: Profile, work: Work, peak: Peak, *, latency_ms: float) -> Roofline | None:
    """How near a graph comes to the best rate; None where nothing is known to compare with."""
    precision = main_precision(profile)
    rate = peak.rate(precision)
    if rate is None or not work.macs or latency_ms <= 0:
        return None
    gmac_per_s = work.macs / latency_ms / 1e6
    sizes = [row.n_bytes for row in profile.rows if row.n_bytes is not None]
    return Roofline(
        gmac_per_s=gmac_per_s,
        precision=precision,
        peak_gmac_per_s=rate.gmac_per_s,
        fraction=gmac_per_s / rate.gmac_per_s,
        memory_fraction=sum(sizes) / latency_ms / 1e6 / peak.bandwidth_gb_per_s if sizes else None,
    )


def main_precision(profile: Profile) -> str:
    """That of most multiply-accumulates; of most of the time where those are not known.

    ``float32`` where nothing multiplies.
    """
    macs: dict[str, int] = {}
    times: dict[str, float] = {}
    for row in profile.rows:
        if row.precision in ("conversion", "none"):
            continue
        macs[row.precision] = macs.get(row.precision, 0) + (row.macs or 0)
        times[row.precision] = times.get(row.precision, 0.0) + row.time_ms
    are_known = all(row.macs is not None for row in profile.rows)
    if are_known and any(macs.values()):
        return max(macs, key=lambda precision: macs[precision])
    return max(times, key=lambda precision: times[precision]) if times else "float32"
