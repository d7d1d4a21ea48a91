"""What users of a replica under open load see, at a rate or at the largest rate that meets their targets (goodput)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

from dse.cost.iterations import Replica, decode, replica
from dse.cost.lengths import Lengths
from dse.cost.memory import Memory
from dse.cost.openloop import Point, point
from dse.cost.pace import SHARES, Top, rate_at, top
from dse.cost.queueing import Wait, both, crossing, quantile, survival
from dse.cost.shard import Sharded
from dse.cost.types import Load, Number, pytree, replace
from dse.numerics import safe_divide, safe_sqrt

HALVINGS, SECANTS = 7, 6  # of the rate: 1% of the capacity, then false positions in that bracket
RESTS = (1.0 / 6.0, 0.5, 5.0 / 6.0)  # of a running iteration, alike likely, are left when a request comes


@pytree
class Arrivals:
    """Requests a second to one replica, and the coefficient of variation of the gaps (1: Poisson)."""

    rate: Number
    cv: Number = 1.0


@pytree
class Slo:
    """Seconds that a request's TTFT and TPOT must both meet, and the share of requests that must."""

    ttft: Number
    tpot: Number
    attainment: Number = 0.9


@pytree
class OpenLoop:
    """A replica under open load. Seconds and requests/s; all finite, also where `stable` is false (then those of
    `FULLEST` of its capacity)."""

    rate: Number  # to the replica
    capacity: Number  # the rate from which the queue grows without end
    utilisation: Number
    stable: Number
    running: Number  # mean requests in decode, a rank
    wait: Number  # part of the mean TTFT that others cause
    ttft: Number
    ttft_p50: Number
    ttft_p90: Number
    ttft_p99: Number
    tpot: Number
    tpot_p90: Number
    tpot_p99: Number
    e2e: Number
    attainment: Number  # share that meets both


@pytree
class Demand:
    """What one kind of user sends and expects of a deployment. `rate` None: only goodput can be asked."""

    lengths: Lengths
    slo: Slo
    cv: Number
    rate: Number | None = None  # requests/s to the whole deployment


def _first_later(x: Replica, p: Point, t: Number) -> Number:
    """(n,) P(TTFT > t) of each node."""
    t = t - x.sharded.c.arrival_overhead - p.base
    rests = jnp.array(RESTS)[:, None, None] * p.lasts[:, None]
    later = jnp.mean(survival(both(p.queue, p.joined), t - rests), axis=0)
    return p.chance @ later + (1.0 - jnp.sum(p.chance)) * survival(p.queue, t)


def _slower(x: Replica, p: Point, t: Number) -> Number:
    """(n,) P(TPOT > t) of each node: beyond the time of a lone request, lognormal of the node's mean and variance."""
    later = t * x.yields - p.floor
    above = jnp.maximum(p.pace - p.floor, 1e-9)
    sigma = jnp.maximum(safe_sqrt(jnp.log1p(p.spread / above**2)), 1e-3)
    z = (jnp.log(jnp.maximum(later, 1e-12) / above) + 0.5 * sigma**2) / sigma
    return jnp.where(x.answer > 0, jnp.where(later > 0.0, ndtr(-z), 1.0), 0.0)


def attainment(x: Replica, p: Point, slo: Slo) -> Number:
    """Share of requests that meet both: given its lengths, a request's TTFT and TPOT are taken as independent."""
    return x.mean((1.0 - _first_later(x, p, slo.ttft)) * (1.0 - _slower(x, p, slo.tpot)))


def _longest(w: Wait) -> Number:
    """A time that a wait hardly ever lasts."""
    return 60.0 * jnp.max(jnp.maximum(w.scv, 1.0) * safe_divide(w.mean, w.delayed))


def describe(x: Replica, u: Number, most: Top, stable: Number, slo: Slo) -> OpenLoop:
    """All that a table says of a replica at u arrivals an iteration."""
    p = point(x, u, most)
    overhead = x.sharded.c.arrival_overhead
    wait = p.queue.mean + p.chance @ (0.5 * p.lasts + jnp.sum(x.weight * p.joined.mean, -1))
    ttft = overhead + wait + x.mean(p.base)
    late = overhead + jnp.max(p.base) + jnp.max(p.lasts) + _longest(both(p.queue, p.joined))
    slow = (jnp.maximum(jnp.max(p.pace), p.floor) + 30.0 * safe_sqrt(jnp.max(p.spread))) / x.yields + 1e-9

    def first(share: Number) -> Number:
        return quantile(lambda t: x.mean(_first_later(x, p, t)), share, late)

    def later(share: Number) -> Number:
        return quantile(lambda t: x.mean(_slower(x, p, t)), share, slow)

    firsts, laters = jax.vmap(first)(jnp.array([0.5, 0.9, 0.99])), jax.vmap(later)(jnp.array([0.9, 0.99]))
    tpot = x.mean(p.pace) / x.yields
    capacity = most.rate
    return OpenLoop(
        rate=p.rate * x.ranks,
        capacity=capacity * x.ranks,
        utilisation=p.rate / capacity,
        stable=stable,
        running=p.running,
        wait=wait,
        ttft=ttft,
        ttft_p50=firsts[0],
        ttft_p90=firsts[1],
        ttft_p99=firsts[2],
        tpot=tpot,
        tpot_p90=laters[0],
        tpot_p99=laters[1],
        e2e=ttft + x.mean(x.answer) * tpot,
        attainment=attainment(x, p, slo),
    )


def open_loop(s: Sharded, load: Load, lengths: Lengths, memory: Memory, arrivals: Arrivals, slo: Slo) -> OpenLoop:
    """A replica at a given rate. `memory` is that of `resident(load, lengths)`."""
    x = replica(s, load, lengths, memory, arrivals.cv)
    most = top(x)
    rate = arrivals.rate / x.ranks
    stable = rate < most.rate
    low, high = jax.lax.stop_gradient(_around(x, most, rate))
    u = crossing(lambda u: jnp.where(stable, rate, most.rate) - rate_at(x, u), low, high, HALVINGS, SECANTS)
    u = jnp.where(stable, u, most.u)
    return replace(describe(x, u, most, stable, slo), rate=arrivals.rate * jnp.ones_like(u))


def _around(x: Replica, most: Top, rate: Number) -> tuple[Number, Number]:
    """Arrivals an iteration between which a rank's `rate` is, by the paces that are known."""
    known = most.numbers(1.0)
    reached = known / most.paces >= rate
    first = jnp.where(jnp.any(reached), jnp.argmax(reached), len(SHARES) - 1)
    # below the first: no iteration is shorter than one that hardly decodes
    slowest = 2.0 * jnp.maximum(most.paces[0], decode(x, 1.0) * x.ratio)
    low = jnp.where(first > 0, known[first - 1], 0.9 * rate * decode(x, 1e-6) * x.ratio)
    high = jnp.where(first > 0, known[first], jnp.minimum(known[0], rate * slowest))
    return jnp.minimum(low, most.u), jnp.minimum(high, most.u)


def goodput(s: Sharded, load: Load, lengths: Lengths, memory: Memory, cv: Number, slo: Slo) -> OpenLoop:
    """A replica at the largest rate at which the asked share of requests meets both targets.

    By bisection on the arrivals of an iteration: attainment falls with them. Where not even a lone request meets the
    targets, `rate` is 0 and the rest is what that request sees.
    """
    x = replica(s, load, lengths, memory, cv)
    most = top(x)
    end = most.u
    u = crossing(lambda u: attainment(x, point(x, u, most), slo) - slo.attainment, 1e-6 * end, end, HALVINGS, SECANTS)
    reached = u > 1.5e-6 * end
    u = jnp.where(u < end * (1.0 - 2.0 ** (1 - HALVINGS - SECANTS)), u, end)
    result = describe(x, u, most, jnp.asarray(True), slo)
    return replace(result, rate=jnp.where(reached, result.rate, 0.0))


__all__ = ["Arrivals", "Demand", "OpenLoop", "Slo", "attainment", "describe", "goodput", "open_loop"]
