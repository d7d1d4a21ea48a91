"""Percentiles of a sum of stages: each stage's part of TTFT as three cumulants, which independent stages add up.

A request's waits and services are taken as independent from stage to stage, but for amounts that several stages see (an
encoder's tokens are prompt tokens too): what each takes more by a standard deviation of it adds up first (`together`).
Other lengths in common make tails too short (tests/test_pipeline_queues.py says by how much). Turned into percentiles
by `dse.search.pipeline_tails`.
"""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.types import Number, pytree
from dse.numerics import safe_divide


@pytree
class Cumulants:
    """Of a time: mean, variance, third central moment (s, s^2, s^3)."""

    mean: Number
    variance: Number
    third: Number

    def __add__(self, other: Cumulants) -> Cumulants:
        return Cumulants(
            mean=self.mean + other.mean, variance=self.variance + other.variance, third=self.third + other.third
        )


def of_moments(mean: Number, square: Number, cube: Number) -> Cumulants:
    """Of raw moments."""
    return Cumulants(
        mean=mean,
        variance=jnp.maximum(square - mean**2, 0.0),
        third=cube - 3.0 * mean * square + 2.0 * mean**3,
    )


def of_some(x: Cumulants, share: Number) -> Cumulants:
    """Where only a share of the requests meets the time; the others spend none."""
    square = x.variance + x.mean**2
    cube = x.third + 3.0 * x.mean * x.variance + x.mean**3
    return of_moments(share * x.mean, share * square, share * cube)


def of_wait(mean: Number, delayed: Number, scv: Number) -> Cumulants:
    """A wait: 0 or, for the share `delayed`, gamma of squared coefficient of variation `scv`; `mean` over all."""
    waits = safe_divide(mean, delayed)
    own = of_moments(waits, waits**2 * (1.0 + scv), waits**3 * (1.0 + scv) * (1.0 + 2.0 * scv))
    return of_some(own, delayed)


def of_rest(length: Number) -> Cumulants:
    """What is left of something that lasts `length` when a request comes: uniform."""
    return Cumulants(mean=0.5 * length, variance=length**2 / 12.0, third=0.0 * length)


def together(own: Cumulants, slopes: tuple[Number, ...], skewness: tuple[float, ...], sign: float = 1.0) -> Cumulants:
    """With (or, sign -1, without) what follows an amount linearly: s^2 of the variance, s^3 its skewness of the third.

    Stages are summed without their slopes, then get the square of the sum of these.
    """
    for s, skew in zip(slopes, skewness, strict=True):
        own = Cumulants(mean=own.mean, variance=own.variance + sign * s**2, third=own.third + sign * skew * s**3)
    return own


__all__ = ["Cumulants", "of_moments", "of_rest", "of_some", "of_wait", "together"]
