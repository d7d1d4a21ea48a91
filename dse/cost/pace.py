"""Iterations of a replica at so many arrivals an iteration: what they carry, what they take, and where they end.

Everything is explicit in u, the requests that come in one iteration, so that no fixed point of rate and pace has to be
iterated: R = u/T(u). `flow` says what iterations carry, `iterations` prices them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dse.cost.flow import FADE, Flow, flow_of, lockstep, together
from dse.cost.iterations import Curve, Replica, curve_of, decode
from dse.cost.queueing import any_come
from dse.cost.types import Number, pytree, replace
from dse.numerics import safe_divide, safe_sqrt

FULLEST = 0.999  # of the capacity
ROUNDS = 4
SHARES = (1e-3, 0.125, 0.25, 0.5, 0.75, 1.0)  # of the capacity at which the pace is found once


def most_arrivals(x: Replica) -> Number:
    """u at which the token budget or the seats are full."""
    budget = x.width / (x.mean(x.prompt) + x.mean(x.steps) * (1.0 + x.draft))
    return jnp.minimum(budget, x.seats / x.stay)


@pytree
class Times:
    """Iterations at u arrivals: what they carry, and their seconds."""

    flow: Flow
    curve: Curve
    alone: Number  # decode only, with as many requests as one in decode finds
    growth: Number  # more for a request in decode more
    elastic: Number  # relative change of the pace with that of the requests in decode
    stolen: Number  # share of its own length that an iteration adds to the next
    wide: Number  # standard deviation of mixed ones
    floor: Number  # with one request
    mixed: Number
    follow: Number  # chance that a prompt leaves others behind its last iteration
    pace: Number  # mean

    def rate(self, u: Number) -> Number:
        return u / self.pace

    def kinds(self) -> tuple[Number, Number]:
        """(k,) seconds of iterations that decode only, of short and of long mixed ones, and the share of time of each.

        The two kinds of mixed ones have the mean, the deviation and, as far as the budget lets them, the skewness of a
        gamma distribution that begins where they carry nothing: most are short, and requests find the long ones.
        """
        more = jnp.maximum(self.mixed - self.alone, 1e-9)
        wide, uneven = self.wide, self.wide / more
        most = safe_divide(self.curve.full - self.mixed, wide, otherwise=1.0)
        skew = jnp.maximum(jnp.minimum(uneven + jnp.sqrt(1.0 + uneven**2), most), uneven + 0.1)
        rare = 1.0 / (1.0 + skew**2)
        seconds = jnp.stack([self.alone, self.mixed - wide / skew, self.mixed + wide * skew])
        busy = self.flow.anywhere
        return seconds, jnp.stack([1.0 - busy, (1.0 - rare) * busy, rare * busy]) * seconds / self.pace


def times(x: Replica, u: Number) -> Times:
    f = flow_of(x, u)
    n = f.running
    # Its slope over the others that a request finds in decode: n + sd and, positive, n^2/(n + sd).
    most = n + safe_sqrt(jnp.maximum(f.varied * n, 0.25))
    counts = jnp.stack([1.0 + n * n / most, n, 1.0 + most, jnp.ones_like(n)])
    less, before, more, floor = x.ratio * jax.vmap(lambda n: decode(x, n))(counts)
    curve = curve_of(x, n, f.budget, f.others, before)
    growth = (more - less) / (counts[2] - counts[0])
    if lockstep(x):
        f, shift, crowd = together(x, u, f, curve, before)
        curve = replace(curve, seconds=curve.seconds + shift, full=curve.full + shift)
    mixed, several, follow = drains(x, u, f, curve, before)
    mixed = mixed + f.slowest * x.mean_extra
    if lockstep(x):
        slowest, uneven = crowd.moments(lambda tokens: curve.of(x, tokens))
        mixed, several = jnp.where(x.ranks > 1, slowest, mixed), jnp.where(x.ranks > 1, uneven, several)
    # A request in decode finds n + Var[n]/n there; more of them are slower, and so stay for longer.
    steady = (1.0 - f.anywhere) * before + f.anywhere * mixed
    high, low = jnp.minimum(f.slowest + f.spread, f.budget), jnp.maximum(f.slowest - f.spread, 0.0)
    steep = safe_divide(curve(high) - curve(low), high - low)
    between, within = (1.0 - f.busy) * f.mix**2 + 1e-9, f.spread**2
    slope = (between * (mixed - before) / f.slowest + within * steep) / (between + within)
    stolen = jnp.clip(slope * f.tokens / steady, 0.0, 0.95)
    elastic = jnp.clip(n * growth / ((1.0 - stolen) * steady), 0.0, 0.75)
    found = 1.0 + (f.varied / (1.0 - elastic) - 1.0) * (1.0 - (f.tokens / f.budget) ** FADE)
    found = jnp.minimum(found, jnp.maximum(x.seats - n, 1.0))
    alone = before + found * growth
    mixed = mixed + found * growth
    pace = (1.0 - f.anywhere) * alone + f.anywhere * mixed
    return Times(
        flow=f,
        curve=curve,
        alone=alone,
        growth=growth,
        elastic=jnp.clip(n * growth / ((1.0 - stolen) * pace), 0.0, 0.95),
        stolen=stolen,
        wide=jnp.minimum(several, 0.99 * jnp.maximum(mixed - alone, 0.0)),
        floor=floor,
        mixed=mixed,
        follow=follow,
        pace=pace,
    )


def drains(x: Replica, u: Number, f: Flow, curve: Curve, short: Number) -> tuple[Number, Number, Number]:
    """Seconds of iterations with prompts: mean, standard deviation, and the chance that a prompt leaves others behind.

    Those that leave prompts behind are full, and their pipeline stays filled (`Curve.full`). A request leaves nobody in
    the queue with the chance that a new one finds none there, 1 - busy share of time, and none behind its iteration
    where those that came in it are not counted; it takes `mix` tokens an iteration, so one in prompt/mix is its last.
    That holds where prompts are served one by one; where many share an iteration, no more of them are full than if the
    work were exponential: e^-y, (1 - e^-y)/y = mix/budget, y about budget/mix - mix/budget.
    """
    prompt = x.mean(x.prompt)
    last = jnp.minimum(f.mix / prompt, 1.0)
    least = jnp.minimum(-jnp.expm1(f.mix / f.budget - f.budget / f.mix), last)

    def kinds(alone: Number) -> tuple[Number, Number, Number]:
        tokens = jnp.clip((f.mix - (1.0 - alone) * f.budget) / alone, 1.0, f.budget)
        apart = jnp.minimum(f.spread, jnp.minimum(f.budget - tokens, tokens))
        low, high = curve(tokens - apart), curve(tokens + apart)
        return 0.5 * (low + high), 0.5 * (high - low), alone * 0.5 * (low + high) + (1.0 - alone) * curve.full

    def better(_: Number, alone: Number) -> Number:
        mean = kinds(alone)[2]
        pace = (1.0 - f.busy) * short + f.busy * mean
        nobody = (1.0 - f.busy * mean / pace) / (1.0 - any_come(f.clustered, u * mean / pace))
        return jnp.clip(last * nobody, jnp.maximum(least, 1e-3), last)

    alone = jax.lax.fori_loop(0, ROUNDS, better, last)  # share that leaves nobody behind; `last`: at no load
    drained, apart, mean = kinds(alone)
    spread = safe_sqrt(alone * apart**2 + alone * (1.0 - alone) * (drained - curve.full) ** 2)
    return mean, spread, 1.0 - alone / last


def rate_at(x: Replica, u: Number) -> Number:
    """Requests/s to a rank at u arrivals an iteration."""
    return times(x, u).rate(u)


@pytree
class Top:
    """A replica as near to its capacity as a steady state is described."""

    capacity: Number  # arrivals an iteration at which the token budget or the seats are full
    paces: Number  # (k,) seconds of an iteration at `SHARES` of u

    @property
    def pace(self) -> Number:
        """Seconds of an iteration at u."""
        return self.paces[-1]

    @property
    def u(self) -> Number:
        """Arrivals an iteration: where an unstable rate is evaluated, flagged."""
        return FULLEST * self.capacity

    @property
    def rate(self) -> Number:
        """Requests/s to a rank, at u: what it can serve."""
        return self.u / self.pace

    def numbers(self, each: Number) -> Number:
        """(k,) requests at which `paces` are, where each takes part in so many iterations."""
        return jnp.array(SHARES) * self.u * each


def top(x: Replica) -> Top:
    """The end of what a replica serves: found once, for every rate that is asked of it."""
    capacity = most_arrivals(x)
    paces = jax.vmap(lambda share: times(x, share * FULLEST * capacity).pace)(jnp.array(SHARES))
    return Top(capacity=capacity, paces=paces)


__all__ = ["FULLEST", "Times", "Top", "rate_at", "times", "top"]
