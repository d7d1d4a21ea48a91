"""Guarded arithmetic whose gradients stay finite: division by zero, square roots at zero, smooth corners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Number = Any


def safe_divide(a: Number, b: Number, otherwise: Number = 0.0) -> Number:
    """a / b where b != 0, else `otherwise`. The double `where` keeps the gradient finite on both branches."""
    zero = b == 0
    return jnp.where(zero, otherwise, a / jnp.where(zero, 1.0, b))


def safe_sqrt(x: Number) -> Number:
    """sqrt(x) for x > 0, else 0 with gradient 0 (the true one is infinite at 0).

    The stand-in is tiny, not 1: XLA may compute x twice with other roundings, and disagree about its sign.
    """
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1e-30)), 0.0)


def smooth_max(a: Number, b: Number, rounding: Number | None) -> Number:
    """Maximum of two times with a rounded corner: (a + b + sqrt((a-b)^2 + 4 r^2 a b)) / 2 for a, b >= 0.

    r = 0 is max(a, b), r = 1 is a + b: the share of the shorter of two overlapping activities that stays exposed.
    Homogeneous of degree one, so units do not matter. `None` is the hard maximum at the price of one instruction.
    """
    if rounding is None:
        return jnp.maximum(a, b)
    return 0.5 * (a + b + safe_sqrt((a - b) ** 2 + 4.0 * rounding**2 * a * b))


def least(values: list[Number]) -> Number:
    """The least of several times."""
    result = values[0]
    for value in values[1:]:
        result = jnp.minimum(result, value)
    return result


def pick(code: Number, options: list[Number]) -> Number:
    """`options[code]` for a traced integer-valued code: a chain of selects, so every option must be finite."""
    result = options[0]
    for i, option in enumerate(options[1:], start=1):
        result = jnp.where(code == i, option, result)
    return result


def last_good(good: Callable[[Number], Number], low: Number, high: Number, halvings: int) -> Number:
    """The largest x in [low, high] (arrays alike) that is good, by bisection, where x is good up to it and not beyond.

    `low` where none is. Without a gradient (`cost.queueing.crossing` has one).
    """

    def halve(_: Number, ends: tuple[Number, Number]) -> tuple[Number, Number]:
        low, high = ends
        middle = 0.5 * (low + high)
        met = good(middle)
        return jnp.where(met, middle, low), jnp.where(met, high, middle)

    return jax.lax.fori_loop(0, halvings, halve, (low, high))[0]


def ceil_ratio(a: Number, b: Number) -> Number:
    """ceil(a / b) for whole numbers in any float precision: XLA may turn a/b into a*(1/b), so stay off the edge."""
    return jnp.ceil((a - 0.5) / b)
