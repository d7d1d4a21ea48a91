"""How many requests run at once, and the wait of those that find every seat taken. Pure JAX.

Requests in decode slow each other down: the more there are, the longer each stays, so that their number swings far
wider than that of independent ones, and further up than down. It is taken as a birth and death process whose service
time depends on its state (exact for Poisson arrivals and exponential service), in packets of z requests where arrivals
or services make it vary z times as much (Whitt's peakedness):

    ln p(n) = 1/z int_0^n ln(R/m(x)) dx - 1/2 ln m(n),  m(n) = n/stay(n) requests that leave a second,

the first two orders of the process's own product R^n/(m(1)..m(n)). Above K seats nothing slows further: a geometric
tail from p(K) on.
"""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.queueing import BUSIEST, Wait, companions
from dse.cost.types import Number, pytree

CELLS = 48  # numbers at which the density is taken
SWING = 2.0  # mean over balance of requests that slow each other down, at most


@pytree
class Occupancy:
    """Requests that hold a seat, and the wait for one."""

    mean: Number
    variance: Number
    wait: Wait


def occupancy(
    rate: Number,
    seats: Number,
    there: Number,
    stay: Number,
    arrival_scv: Number,
    service_scv: Number,
    peakedness: Number = 1.0,
    elastic: Number = 0.0,
) -> Occupancy:
    """`rate` requests/s to `seats` that each takes for `stay` (k,) seconds where `there` (k,) requests run (straight in
    between, as at the ends beyond them).

    `peakedness` z: variance over mean of the number that would be there if stays were alike and seats without end (1
    for Poisson arrivals); `elastic`: relative change of the stay with that number, which only places the cells. Those
    that wait do so for E[S]/(K(1-r)) (ca^2+cs^2)/2 in the mean, exponentially.
    """
    scv = 0.5 * (arrival_scv + service_scv)
    full = rate * jnp.interp(seats, there, stay) / seats
    r, stable = jnp.clip(full, 0.0, BUSIEST), full < 1.0
    # Cells: even in s, where the root of the number is its mean and sinh(s) standard deviations (Anscombe).
    usual = _balance(rate, there, stay)
    middle = jnp.clip(usual, 1e-3, seats)
    wide = 0.5 * jnp.sqrt(peakedness / (1.0 - elastic))
    top = jnp.sqrt(seats)
    ends = jnp.arcsinh(jnp.stack([-jnp.sqrt(middle), top - jnp.sqrt(middle)]) / wide)
    s = jnp.linspace(ends[0], ends[1], CELLS + 1)
    root = jnp.clip(jnp.sqrt(middle) + wide * jnp.sinh(s), 1e-3 * top, top)
    n, step = root**2, 2.0 * root * wide * jnp.cosh(s) * (ends[1] - ends[0]) / CELLS
    leave = n / jnp.interp(n, there, stay)
    come = jnp.maximum(leave + (rate - leave) / peakedness, 1e-3 * leave)
    push = jnp.log(come / leave) * step
    climb = jnp.cumsum(push) - 0.5 * push  # trapezium; the constant does not matter
    chance = climb - 0.5 * jnp.log(come * leave)
    chance = jnp.exp(chance - jnp.max(chance))
    inside = chance * step * jnp.ones(CELLS + 1).at[0].set(0.5).at[-1].set(0.5)
    # p(K)/(1 - r) from K on; of p(K) the half below K is inside as well
    above = chance[-1] * peakedness / (1.0 - r)
    total = jnp.sum(inside) + above - 0.5 * chance[-1]
    delayed = above / total
    above = above - 0.5 * chance[-1]
    mean = (jnp.sum(inside * n) + above * seats) / total
    square = (jnp.sum(inside * n**2) + above * seats**2) / total
    # The density has none of the times at which nobody is there, which are most where the balance is below one request.
    there_is = jnp.minimum(SWING * usual / mean, 1.0)
    mean, square = there_is * mean, there_is * square
    # By Little's law the number that waits, r scv/(1-r), and half the companions of an arrival: bursts find seats taken
    # more often than they are.
    each = scv * jnp.interp(seats, there, stay) / (seats * (1.0 - r))
    seen = delayed * jnp.maximum(1.0 + 0.25 * (arrival_scv - 1.0) * (1.0 - r) / jnp.maximum(r * scv, 1e-12), 0.0)
    # Who finds K seats taken has had K others before it within a stay: what is left where the number is mostly 0.
    _, some = companions(arrival_scv, usual)
    seen = jnp.minimum(seen, jnp.minimum(some**seats / (1.0 - r), 1.0))
    wait = Wait(
        mean=seen * each,
        delayed=seen,
        scv=jnp.ones_like(each),
        utilisation=full,
        stable=stable,
    )
    return Occupancy(mean=mean, variance=jnp.maximum(square - mean**2, 0.0), wait=wait)


def _balance(rate: Number, there: Number, stay: Number) -> Number:
    """The number at which as many leave as come: the first crossing of n = R stay(n)."""
    gap = there - rate * stay
    first = jnp.argmax(gap >= 0.0)
    low = jnp.maximum(first - 1, 0)
    share = jnp.where(first > 0, -gap[low] / jnp.maximum(gap[first] - gap[low], 1e-30), 0.0)
    found = there[low] + share * (there[first] - there[low])
    return jnp.where(jnp.any(gap >= 0.0), found, rate * stay[-1])


__all__ = ["Occupancy", "occupancy"]
