"""Percentiles of the time of a whole pipeline from its cumulants, and cumulants from percentiles: Pearson's type III.

A gamma distribution with a shift, of the sum's mean, variance and skewness: exact for a sum of one exponential and
constants, and for any gamma. From a skewness on, the percentile of a standardised one falls again (P90: 1.12, P99:
beyond what queues have); it is held at its largest, so that percentiles rise with each cumulant and what is better in
all of them is never worse: a search may leave out the rest. The median falls with the third; it is told, not searched.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy.special import gammaincinv, ndtri

Array = np.ndarray
LEAST, MOST = 1e-3, 12.0  # skewness; below, normal
KNOTS = 1200


def _standard(share: float, skewness: Array) -> Array:
    """The percentile of a standardised gamma distribution of a skewness in [LEAST, MOST]."""
    shape = 4.0 / skewness**2
    return np.asarray((gammaincinv(shape, share) - shape) / np.sqrt(shape))


@cache
def _table(share: float) -> tuple[Array, Array]:
    """Skewness, and how many standard deviations beyond the mean the percentile lies."""
    skewness = np.concatenate([[0.0], np.geomspace(LEAST, MOST, KNOTS)])
    values = np.concatenate([[ndtri(share)], _standard(share, skewness[1:])])
    return skewness, np.maximum.accumulate(values) if share > 0.5 else values


def percentile(share: float, mean: Array, variance: Array, third: Array) -> Array:
    """Seconds that a share of the requests does not exceed; never negative."""
    deviation = np.sqrt(np.maximum(variance, 0.0))
    cubed = deviation**3
    skewness = np.divide(third, cubed, out=np.zeros_like(cubed), where=cubed > 0)
    return np.maximum(mean + deviation * np.interp(skewness, *_table(share)), 0.0)


def cumulants(mean: Array, p90: Array, p99: Array) -> tuple[Array, Array]:
    """(variance, third) of the distribution with this mean, P90 and P99: `percentile` gives them back.

    Tails shorter than a normal distribution's have its skewness, 0, and their P90. Longer ones than the longest here
    (a body and a few requests that wait long) have their P99, and a P90 beyond theirs: late, never early.
    """
    skewness, ninety = _table(0.9)
    _, nine = _table(0.99)
    rising = np.arange(len(skewness)) <= np.argmax(nine)
    skewness, ninety, nine = skewness[rising], ninety[rising], nine[rising]
    above = np.maximum(p90 - mean, 0.0)
    ratio = np.divide(p99 - mean, above, out=np.full_like(above, 1.0), where=above > 0)
    found = np.interp(ratio, nine / ninety, skewness)
    long = ratio > nine[-1] / ninety[-1]
    deviation = np.where(long, (p99 - mean) / nine[-1], above / np.interp(found, skewness, ninety))
    return deviation**2, found * deviation**3


__all__ = ["cumulants", "percentile"]
