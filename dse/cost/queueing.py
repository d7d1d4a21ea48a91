"""Queues in front of a server: mean waits, tails and percentiles, for Poisson and burstier arrivals. Pure JAX.

Every form takes one queue (numbers; vmap for many) and stays finite where it has no steady state: `Wait.stable` says
so, and the other fields are then those at `BUSIEST`. Domains, held by tests/test_queueing.py against a recursion:
- M/D/1 and its pipeline forms: exact means and exact tail (Poisson arrivals, one length, first come first served).
- M/G/1: exact mean and second moment (Pollaczek-Khinchine, Takacs); percentiles by a two-moment fit of the wait of
  those that wait (Tijms 2003), within 10% where service has a coefficient of variation up to 1 (17% off at 2).
- G/G/1: independent gaps, gamma where burstier than Poisson (coefficient of variation up to 3: means within 8%,
  percentiles 20%), and down to 0.5 where smoother and the load is 0.5 or more (20%). Correlated bursts are outside.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import gammainc, gammaln

from dse.cost.types import Number, pytree
from dse.numerics import safe_divide

BUSIEST = 1.0 - 1e-4  # utilisation at which a queue without steady state is evaluated, flagged
STATES = 96  # queue lengths of the exact M/D/1; beyond so many service times its tail is a pure exponential
HALVINGS = 40
NEWTON_STEPS = 16


@pytree
class Moments:
    """E[S], E[S^2], E[S^3] of a service time (s, s^2, s^3)."""

    mean: Number
    square: Number
    cube: Number

    @classmethod
    def of(cls, values: Number, weights: Number | None = None) -> Moments:
        """Of values (..., n) with weights that sum to 1 over the last axis (alike by default)."""
        x = jnp.asarray(values)
        w = jnp.full(x.shape[-1], 1.0 / x.shape[-1]) if weights is None else weights
        return cls(mean=jnp.sum(w * x, -1), square=jnp.sum(w * x**2, -1), cube=jnp.sum(w * x**3, -1))

    @property
    def scv(self) -> Number:
        """Squared coefficient of variation."""
        return jnp.maximum(self.square / self.mean**2 - 1.0, 0.0)


@pytree
class Wait:
    """Time in the queue, before service. Seconds."""

    mean: Number
    delayed: Number  # probability of waiting at all
    scv: Number  # squared coefficient of variation of the wait of those that wait
    utilisation: Number
    stable: Number  # bool


@pytree
class Response:
    """`latency`: seconds from the start of service to the first token; a request's TTFT is that and the wait."""

    latency: Number
    wait: Wait

    @property
    def ttft(self) -> Number:
        return self.latency + self.wait.mean


def word(stable: bool) -> str:
    """How a table says whether a queue has a steady state."""
    return "stable" if stable else "unstable"


def _busy(utilisation: Number) -> tuple[Number, Number]:
    """(utilisation to compute with, whether the queue is stable)."""
    return jnp.clip(utilisation, 0.0, BUSIEST), utilisation < 1.0


# ---------------------------------------------------------------------------------------------- one server


def mg1(rate: Number, service: Moments) -> Wait:
    """M/G/1: E[W] = R E[S^2]/(2(1-r)); E[W^2] = 2 E[W]^2 + R E[S^3]/(3(1-r)) (Pollaczek-Khinchine, Takacs)."""
    r, stable = _busy(rate * service.mean)
    arrivals = r / service.mean
    mean = arrivals * service.square / (2.0 * (1.0 - r))
    square = 2.0 * mean**2 + arrivals * service.cube / (3.0 * (1.0 - r))
    # Of those that wait: E = mean/r, E[W^2] = square/r; as R -> 0 the residual service of the one ahead.
    scv = safe_divide(r * square, mean**2, otherwise=2.0) - 1.0
    return Wait(mean=mean, delayed=r, scv=scv, utilisation=rate * service.mean, stable=stable)


def md1(rate: Number, service: Number) -> Wait:
    """M/D/1: R D^2/(2(1 - RD))."""
    return mg1(rate, Moments(mean=service, square=service**2, cube=service**3))


def _delay_root(rate: Number, arrival_scv: Number, mean: Number) -> Number:
    """The root s in (0, 1) of s = A((1-s)/E[S]), A the transform of gamma gaps: (1 + ca^2 (1-s)/r)^(-1/ca^2).

    log of both sides is concave in s and rises to the root from the first iterate, so Newton steps only rise to it.
    """
    shape, scale = 1.0 / arrival_scv, arrival_scv / (rate * mean)
    s = (1.0 + scale) ** (-shape)
    for _ in range(NEWTON_STEPS):
        inside = 1.0 + scale * (1.0 - s)
        s = s - (jnp.log(s) + shape * jnp.log(inside)) / (1.0 / s - shape * scale / inside)
    return jnp.clip(s, 0.0, 1.0 - 1e-6)


def gg1(rate: Number, arrival_scv: Number, service: Moments) -> Wait:
    """G/G/1 of independent gaps with squared coefficient of variation ca^2 (1: M/G/1, exactly).

    Burstier (ca > 1), gaps are gamma, as load generators draw them. With s the root of GI/M/1, Marshall's identity
    E[W] = Var[X]+E[X]^2/(2|E[X]|) - E[I^2]/(2E[I]), X = S - gap, closed by an exponential time in system, becomes
    E[W] = E[S]/(1-s) + (E[S^2] - 2aE[S])/(2(a - E[S])), a the mean gap, and P(W > 0) = s: exact for M/G/1 and GI/M/1.
    Smoother (ca < 1): r/(1-r) (ca^2+cs^2)/2 E[S] (Kingman, Allen-Cunneen) times Kraemer and Langenbach-Belz's
    exp(-2(1-r)(1-ca^2)^2/(3r(ca^2+cs^2))), probability of delay by Whitt's QNA (1983, eq. 49).
    Variance of the wait of those that wait as QNA's eq. 53, with the chance of delay for the load.
    """
    r, stable = _busy(rate * service.mean)
    r = jnp.maximum(r, 1e-6)
    ca, cs = jnp.maximum(arrival_scv, 1e-3), service.scv
    # burstier
    high = jnp.maximum(ca, 1.0)
    gap = service.mean / r
    root = _delay_root(1.0 / gap, high, service.mean)
    bursty = service.mean / (1.0 - root) + (service.square - 2.0 * gap * service.mean) / (2.0 * (gap - service.mean))
    # smoother
    low, both = jnp.minimum(ca, 1.0), jnp.maximum(jnp.minimum(ca, 1.0) + cs, 1e-3)
    factor = jnp.exp(-2.0 * (1.0 - r) * (1.0 - low) ** 2 / (3.0 * r * both))
    smooth = r / (1.0 - r) * 0.5 * both * service.mean * factor
    bend = (1.0 + low + r * cs) / (1.0 + r * (cs - 1.0) + r**2 * (4.0 * low + cs))
    rarely = jnp.clip(r + (low - 1.0) * r * (1.0 - r) * bend, 0.0, 1.0)
    delayed = jnp.where(ca < 1.0, rarely, root)
    skew = service.cube / service.mean**3
    load = jnp.where(ca < 1.0, r, root)
    return Wait(
        mean=jnp.maximum(jnp.where(ca < 1.0, smooth, bursty), 0.0),
        delayed=delayed,
        scv=2.0 * load - 1.0 + 4.0 * (1.0 - load) * skew / (3.0 * (cs + 1.0) ** 2),
        utilisation=rate * service.mean,
        stable=stable,
    )


def companions(arrival_scv: Number, expected: Number) -> tuple[Number, Number]:
    """Mean number of others that come within an exponential time after an arrival (or before it), and the chance of
    any: f/(1-f) and f = (1 + ca^2/x)^(-1/ca^2), the transform of gamma gaps; x arrivals are `expected` in that time.
    x itself for Poisson arrivals; (ca^2 - 1)/2 more where x is large."""
    scv = jnp.maximum(arrival_scv, 1e-3)
    some = (1.0 + scv / jnp.maximum(expected, 1e-9)) ** (-1.0 / scv)
    return some / jnp.maximum(1.0 - some, 1e-9), some


def dispersion(arrival_scv: Number, expected: Number) -> Number:
    """Variance over mean I of the number that come in a time in which x are `expected`: 1 + 2 (mean companions within
    half of it) - x, from E[N(N-1)] = 2 x (mean over the interval of the companions behind each). 1 for Poisson
    arrivals, from 1 to ca^2 with the length of the interval otherwise."""
    near, _ = companions(arrival_scv, 0.5 * expected)
    return jnp.maximum(1.0 + 2.0 * near - expected, 1e-3)


def any_come(dispersed: Number, expected: Number) -> Number:
    """P(N > 0) = 1 - I^(-x/(I-1)): negative binomial (bursts), Poisson (I = 1) or binomial (regular arrivals). Within
    30% of gamma gaps of a coefficient of variation from 0.5 to 3, I by `dispersion` within 25%."""
    over = dispersed - 1.0
    flat = jnp.abs(over) < 1e-4
    rate = jnp.where(flat, 1.0 - 0.5 * over, jnp.log(dispersed) / jnp.where(flat, 1.0, over))
    return -jnp.expm1(-expected * rate)


# ------------------------------------------------------------------------------------------ waits put together


def _square(w: Wait) -> Number:
    return safe_divide((1.0 + w.scv) * w.mean**2, w.delayed)


def _of_squares(mean: Number, square: Number, delayed: Number, utilisation: Number, stable: Number) -> Wait:
    scv = safe_divide(square * delayed, mean**2, otherwise=2.0) - 1.0
    return Wait(mean=mean, delayed=delayed, scv=scv, utilisation=utilisation, stable=stable)


def either(w: Wait, chance: Number) -> Wait:
    """One of several waits (s,), each with its `chance`."""
    mean, square, delayed, utilisation = (
        jnp.sum(chance * values) for values in (w.mean, _square(w), w.delayed, w.utilisation)
    )
    return _of_squares(mean, square, delayed, utilisation, jnp.all(w.stable))


def both(a: Wait, b: Wait) -> Wait:
    """The sum of two independent waits."""
    return _of_squares(
        a.mean + b.mean,
        _square(a) + _square(b) + 2.0 * a.mean * b.mean,
        1.0 - (1.0 - a.delayed) * (1.0 - b.delayed),
        jnp.maximum(a.utilisation, b.utilisation),
        a.stable & b.stable,
    )


# ------------------------------------------------------------------------------- DistServe's pipeline forms


def single(rate: Number, service: Number) -> Response:
    """D + R D^2/(2(1-RD))."""
    return Response(latency=service, wait=md1(rate, service))


def inter_op(rate: Number, service: Number, stages: Number) -> Response:
    """n equal stages: D + R D^2/(2n(n-RD)); the first stage is the queue."""
    return Response(latency=service, wait=md1(rate, service / stages))


def intra_op(rate: Number, service: Number, speedup: Number) -> Response:
    """Tensor parallelism that runs K times as fast: D/K + R D^2/(2K(K-RD))."""
    return Response(latency=service / speedup, wait=md1(rate, service / speedup))


def crossover(speedup: Number, stages: Number = 2.0) -> Number:
    """R D below which intra-op (speed-up K) has the lower mean TTFT than `stages` pipeline stages, for any n.

    The root of 1/K + x/(2K(K-x)) = 1 + x/(2n(n-x)) on (0, K), by bisection; n where K >= n (intra-op always), 0 where
    K <= 1 (never).
    """
    inside = (speedup > 1.0) & (speedup < stages)
    k = jnp.where(inside, speedup, 0.5 * (1.0 + stages))

    def gap(x: Number, k: Number) -> Number:
        return 1.0 / k + x / (2.0 * k * (k - x)) - 1.0 - x / (2.0 * stages * (stages - x))

    root = crossing(lambda x: -gap(x, k), 0.0, k * BUSIEST, halvings=50)
    return jnp.where(inside, root, jnp.where(speedup > 1.0, jnp.asarray(stages, root.dtype), 0.0))


# ------------------------------------------------------------------------------------------ tails, percentiles


def survival(wait: Wait, t: Number) -> Number:
    """P(W > t): `delayed` times a fit of mean and variance (Tijms): for c^2 <= 1 a mix of one and two exponential
    stages (c^2 below 1/2 counts as 1/2), above it two exponentials of balanced means."""
    mean = safe_divide(wait.mean, wait.delayed, otherwise=1.0)
    mean = jnp.maximum(mean, 1e-12)
    x = jnp.maximum(t, 0.0) / mean
    low = jnp.clip(wait.scv, 0.5, 1.0 - 1e-4)
    p = (2.0 * low - jnp.sqrt(2.0 - 2.0 * low)) / (1.0 + low)
    a = (2.0 - p) * x
    erlang = jnp.exp(-a) * (1.0 + (1.0 - p) * a)
    high = jnp.maximum(wait.scv, 1.0 + 1e-4)
    q = 0.5 * (1.0 + jnp.sqrt((high - 1.0) / (high + 1.0)))
    hyper = q * jnp.exp(-2.0 * q * x) + (1.0 - q) * jnp.exp(-2.0 * (1.0 - q) * x)
    tail = wait.delayed * jnp.where(wait.scv < 1.0, erlang, hyper)
    return jnp.where(t < 0.0, 1.0, tail)


def crossing(
    fall: Callable[[Number], Number], low: Number, high: Number, halvings: int = HALVINGS, secants: int = 0
) -> Number:
    """The largest x in [low, high] with fall(x) >= 0, for a falling function of one number, by bisection.

    `secants`: false positions within the last bracket (Illinois), each worth many halvings where `fall` is smooth.
    Gradient by the implicit function theorem, at the price of one derivative of `fall`, when one is asked for.
    """
    bottom, top = jnp.broadcast_arrays(jnp.asarray(low, jnp.result_type(float)), high)

    def solve(fall: Callable[[Number], Number], _: Number) -> Number:
        def narrow(i: Number, ends: tuple[Number, ...]) -> tuple[Number, ...]:
            low, high, above, below = ends
            blind = (i < halvings) | (high == top) | (low == bottom)  # what `fall` is at the ends is not known
            share = jnp.where(blind, 0.5, jnp.clip(above / jnp.maximum(above - below, 1e-30), 0.0, 1.0))
            place = low + share * (high - low)
            value = fall(place)
            met = value >= 0.0
            return (
                jnp.where(met, place, low),
                jnp.where(met, high, place),
                jnp.where(met, value, jnp.where(i < halvings, above, 0.5 * above)),
                jnp.where(met, jnp.where(i < halvings, below, 0.5 * below), value),
            )

        ends = (bottom, top, jnp.ones_like(bottom), -jnp.ones_like(bottom))
        return jax.lax.fori_loop(0, halvings + secants, narrow, ends)[0]

    def tangent(line: Callable[[Number], Number], y: Number) -> Number:
        slope = line(jnp.ones_like(y))
        return jnp.where(slope < 0.0, y / jnp.where(slope < 0.0, slope, -1.0), 0.0)

    return jax.lax.custom_root(fall, bottom, solve, tangent)


def quantile(tail: Callable[[Number], Number], share: Number, high: Number) -> Number:
    """The t in [0, high] with tail(t) = 1 - share, for a falling tail; 0 where it is below that from the start."""
    return crossing(lambda t: tail(t) - (1.0 - share), 0.0, high)


def percentile(wait: Wait, share: Number) -> Number:
    """Wait that `share` of requests do not exceed (0 where fewer wait)."""
    mean = safe_divide(wait.mean, wait.delayed, otherwise=0.0)
    return quantile(lambda t: survival(wait, t), share, 60.0 * mean * jnp.maximum(wait.scv, 1.0) + 1e-12)


def md1_survival(utilisation: Number, x: Number) -> Number:
    """P(W > x D) of M/D/1, exactly (Crommelin), in sums of positive terms only, so that nothing cancels.

    With k-1 <= x < k and y = k - x: P(W <= x) = sum_{j<k} Q_{k-1-j} e^{-ry} (ry)^j/j! (Franx 2001), Q_m the chance that
    at most m wait; the chain's own probabilities by level crossing, p_{j+1} = e^r (p_0 a_j + sum p_i a_{j+1-i}) with
    a_j = P(Poisson(r) > j). From x = STATES on, the exponential tail (1-r)/(r e^s - 1) e^{-sx}, r(e^s - 1) = s.
    """
    r = jnp.clip(utilisation, 1e-6, BUSIEST)
    order = jnp.arange(STATES + 1)
    more = gammainc(order + 1.0, r)

    def fill(p: Number, j: Number) -> tuple[Number, None]:
        others = jnp.where((order >= 1) & (order <= j), p[:-1] * more[jnp.clip(j + 1 - order, 0, STATES)], 0.0)
        return p.at[j + 1].set(jnp.exp(r) * (p[0] * more[j] + jnp.sum(others))), None

    first = jnp.zeros(STATES + 2, more.dtype).at[0].set(1.0 - r)
    p, _ = jax.lax.scan(fill, first, order)
    at_most = jnp.cumsum(p)[1:]  # Q_m: at most m + 1 in the system
    k = jnp.floor(jnp.clip(x, 0.0, STATES - 1.0)) + 1.0
    y = jnp.clip(k - x, 1e-30, 1.0)
    j = order[:STATES].astype(p.dtype)
    poisson = jnp.exp(-r * y + j * jnp.log(r * y) - gammaln(j + 1.0))
    reach = jnp.clip(k - 1.0 - j, 0, STATES).astype(jnp.int32)
    exact = 1.0 - jnp.sum(jnp.where(j < k, at_most[reach] * poisson, 0.0))
    decay = _md1_decay(r)
    tail = (1.0 - r) / (r * jnp.exp(decay) - 1.0) * jnp.exp(-decay * x)
    return jnp.where(x < 0.0, 1.0, jnp.where(x < STATES, jnp.maximum(exact, 0.0), tail))


def _md1_decay(r: Number) -> Number:
    """The positive root of r(e^s - 1) = s, by Newton steps from above (the function is convex)."""
    s = 2.0 * (1.0 - r) / r + 2.0 * jnp.log(1.0 / r)
    for _ in range(24):
        s = s - (r * jnp.expm1(s) - s) / (r * jnp.exp(s) - 1.0)
    return s


def md1_percentile(rate: Number, service: Number, share: Number) -> Number:
    """Exact percentile of an M/D/1 wait (at `BUSIEST` where the queue is unstable), for any share up to 1 - 1e-6."""
    r, _ = _busy(rate * service)
    most = 20.0 / _md1_decay(jnp.maximum(r, 1e-6)) + 1.0
    return service * quantile(lambda x: md1_survival(r, x), share, most)


# ----------------------------------------------------------------------------------- the recursion to check by


def lindley(gaps: Number, services: Number) -> Number:
    """Waits of n requests in order of arrival: W' = max(0, W + S - gap to the next). `gaps` (n,) before each request,
    `services` (n, ...) may have plans as trailing axes: one pass serves them all."""

    def arrive(state: tuple[Number, Number], request: tuple[Number, Number]) -> tuple[tuple[Number, Number], Number]:
        before, service = state
        gap, own = request
        wait = jnp.maximum(before + service - gap, 0.0)
        return (wait, own), wait

    gaps, services = (jnp.asarray(x, jnp.result_type(float)) for x in (gaps, services))
    nothing = jnp.zeros_like(services[0])
    _, waits = jax.lax.scan(arrive, (nothing, nothing), (gaps, services))
    return waits
