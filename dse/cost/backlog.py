"""Prompts that wait behind those of earlier iterations, beside a decode batch that swells with them.

While prompts wait they leave prefill at its full rate, and after as many iterations as an answer has, decode is as
large as at capacity: by then a request takes what it takes there, its own decode steps included, and the queue's load
is the share of the capacity. So the queue is faster than the mean while it is short and slower while it is long, and
its tail is heavier than that of any queue of one speed:
- On a diffusion the wait falls off at each point by what its speed there makes it. A queue that is w seconds long has
  been busy for as long as it will take to empty (reflected Brownian motion looks alike backwards), so that the share
  of the way to the speed at capacity that it has gone is y = 1 - E[exp(-T/stay)], T the first passage from w to 0:
  y = 1 - exp(-w/l), l = (1-r) stay (1 + sqrt(1 + 4 W/((1-r) stay)))/2, W the mean wait of those that wait. The density
  is exp(-int (1-y)/quick + y/slow dw).
- Such backlogs make up part of the mean batch, so that outside of them it is smaller: the speed at no wait is set such
  that the mean over all waits stays what it is.
- Apart from that the batch varies by itself, more slowly than the queue: the waits of a few sizes are mixed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dse.cost.iterations import Replica, full_iteration
from dse.cost.pace import Times, Top
from dse.cost.queueing import BUSIEST, Moments, Wait, either, gg1
from dse.cost.types import Number, replace
from dse.numerics import safe_divide

POINTS = 24  # waits, alike far apart in their logarithm:
NEAREST, FARTHEST = 1e-3, 24.0  # from that of the mean wait at the quick speed to that of the one at the slow speed
BRIEFEST = 1e-6  # of the service: those that wait do so for as long at least (waits of regular arrivals vanish)
ROUNDS = 3
LEAST = 0.2  # of the mean service, in the smallest batch


def at_capacity(x: Replica, t: Times, most: Top) -> Number:
    """(n,) seconds that a prompt takes in a backlog without end."""
    f = t.flow
    n = most.capacity * x.mean(x.steps)
    budget = x.budget(n)
    full = full_iteration(x, n, budget, f.others) + budget * x.extra
    prompt, steps = x.mean(x.prompt), x.mean(x.steps)
    own = x.prompt * full / budget + (x.steps / steps - x.prompt / prompt) * n * t.growth * prompt / budget
    return jnp.maximum(own, 0.0)


def backlog(
    x: Replica, rate: Number, service: Number, more: Number, stay: Number, states: Number, chance: Number
) -> Wait:
    """Wait for the prompts of earlier iterations. `service` (n,) seconds of a prompt in the mean batch, `more` (n,) at
    capacity; `states` (s,) sizes of the batch between those two (0 to 1, below 0 smaller), each with its `chance`;
    `stay` seconds of a request in decode."""

    def queue(service: Number) -> Wait:
        moments = Moments(mean=x.mean(service), square=x.mean(service**2), cube=x.mean(service**3))
        return gg1(rate, x.arrival_scv, moments)

    usual, slow = queue(service), queue(service + more)
    idle = 1.0 - jnp.minimum(rate * x.mean(service), BUSIEST)
    each = safe_divide(usual.mean, usual.delayed, otherwise=1e-12)
    lasts = 0.5 * idle * stay * (1.0 + jnp.sqrt(1.0 + 4.0 * each / (idle * stay)))

    def at(state: Number) -> Wait:
        def wait(swollen: Number) -> tuple[Wait, Number]:
            quiet = state - (1.0 - state) * swollen / (1.0 - swollen)
            quick = queue(jnp.maximum(service + quiet * more, LEAST * service))
            return _swelling(quick, slow, lasts, BRIEFEST * x.mean(service))

        def better(_: Number, swollen: Number) -> Number:
            return jnp.minimum(wait(swollen)[1], 0.7)

        return wait(jax.lax.fori_loop(0, ROUNDS - 1, better, jnp.zeros_like(rate)))[0]

    return either(jax.vmap(at)(states), chance)


def _swelling(quick: Wait, slow: Wait, lasts: Number, least: Number) -> tuple[Wait, Number]:
    """The wait of a queue that goes from one speed to the other as its backlog passes `lasts` seconds, and the share of
    that way that it has gone, over all time. `least`: seconds that those that wait do so."""
    short = jnp.maximum(safe_divide(quick.mean, quick.delayed), least)
    long = jnp.maximum(safe_divide(slow.mean, slow.delayed), short)
    # trapezium over ln w: as exact for one speed as for two that are a million apart
    apart = jnp.log(FARTHEST * long / (NEAREST * short)) / (POINTS - 1)
    w = NEAREST * short * jnp.exp(apart * jnp.arange(POINTS))
    below = jnp.zeros(POINTS).at[0].set(1.0 / jnp.expm1(apart))  # all points before the first: the density is flat
    gone = -jnp.expm1(-w / lasts)
    density = w / short * (1.0 + below) * jnp.exp(-w / long - (1.0 / short - 1.0 / long) * lasts * gone)
    density = density / jnp.sum(density)
    mean, square, share = jnp.sum(density * w), jnp.sum(density * w**2), jnp.sum(density * gone)
    delayed = quick.delayed + (slow.delayed - quick.delayed) * share
    own = quick.scv + (slow.scv - quick.scv) * share  # of a queue of one speed: 1 on a diffusion
    wait = replace(quick, mean=mean * delayed, delayed=delayed, scv=(1.0 + own) * 0.5 * square / mean**2 - 1.0)
    return wait, share * delayed


__all__ = ["at_capacity", "backlog"]
