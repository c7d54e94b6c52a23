"""Confidence intervals of means and of paired drops, with numpy alone."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from edgevlm.runtime.spec import Array

N_RESAMPLES = 4000
_CHUNK = 1 << 22

N_POOLED_RESAMPLES = 1000
"""Of a metric that is computed anew for each: the ends of a 95 % interval then still rest on 25 resamples each."""


def wilson(n_hits: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a proportion: not empty at 0 of n or n of n.

    Source:  Wilson, JASA 22 (1927); recommended for small n by Brown, Cai and DasGupta, Statistical Science 16 (2001).
    Example:
        >>> low, high = wilson(0, 200)
        >>> low, round(high, 4)
        (0.0, 0.0188)
    """
    z = _z(confidence)
    p = n_hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low = 0.0 if n_hits == 0 else centre - half
    high = 1.0 if n_hits == n else centre + half
    return max(0.0, low), min(1.0, high)


def paired_proportions(n_worse: int, n_better: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of the drop between two proportions on the same pictures.

    Only the pictures that one gets right and the other wrong count. The interval is Wald's with one picture
    of each kind added, so that it stays open where the two never differ; a bootstrap gives [0, 0] there,
    as if unseen pictures could not differ either.

    Args:
        n_worse: pictures that the reference gets right and the candidate wrong; ``n_better`` the other way.
    Source:  Bonett and Price, J. Educ. Behav. Stat. 37 (2012); recommended by Fagerland, Lydersen and Laake,
             Statistics in Medicine 33 (2014).
    Example:
        >>> low, high = paired_proportions(0, 0, 200)
        >>> round(low, 4), round(high, 4)
        (-0.0137, 0.0137)
    """
    worse, better = (n_worse + 1) / (n + 2), (n_better + 1) / (n + 2)
    drop = worse - better
    half = _z(confidence) * ((worse + better - drop * drop) / (n + 2)) ** 0.5
    return max(-1.0, drop - half), min(1.0, drop + half)


def bootstrap_mean(values: Array, *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean; the same values and seed always give the same.

    Source:  Efron, Annals of Statistics 7 (1979).
    """
    rng = np.random.default_rng(seed)
    n = len(values)
    step = max(1, _CHUNK // n)  # resamples at a time: all at once would not fit for large n
    means = np.concatenate(
        [
            values[rng.integers(0, n, size=(min(step, N_RESAMPLES - start), n))].mean(axis=1)
            for start in range(0, N_RESAMPLES, step)
        ]
    )
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, (tail, 100 - tail))
    return float(low), float(high)


def bootstrap_pooled(
    statistic: Callable[[Array], Array], n: int, *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a metric of a whole data set, over its ``n`` pictures.

    Args:    statistic: from how often each picture was drawn, [resamples, n], to the metric of each resample. One that
             cannot be told there (NaN) is left out.
    Source:  Efron, Annals of Statistics 7 (1979).
    """
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=N_POOLED_RESAMPLES)
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(statistic(weights), (tail, 100 - tail))
    return float(low), float(high)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)
