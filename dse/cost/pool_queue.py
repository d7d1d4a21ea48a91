"""The way of a request through split pools in closed form: the wait, the transfer, Little's law, the best ratio."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax.nn import sigmoid

from dse.cost.serving import steps_to_token, unseated
from dse.cost.types import Number, pytree
from dse.numerics import safe_divide


@pytree
class Journey:
    """What a request of one (prefill plan, decode plan, workers) meets, all that N does not change. Seconds.

    A prompt's own steps take `idle` in an idle worker, `busy` where every other rank of its worker computes a prompt
    too, `more` longer for each further prompt of its rank that shares them, and `full` where they are full.
    """

    idle: Number
    busy: Number
    more: Number
    full: Number
    service: Number  # a prompt's share of full steps
    stage: Number  # share of a prompt's own time in which the worker takes no other step: 1 without a pipeline
    chunks: Number  # steps of a prompt
    prompts: Number  # of a full step on one rank
    workers: Number  # of the prefill pool
    servers: Number  # their attention-DP ranks
    fixed: Number  # arrival overhead, latency of the transfer, steps of the decode worker to a first token of its own
    travel: Number  # the whole cache over the link
    layers: Number
    layerwise: Number
    first_wave: Number  # weight of the first wave of N prompts at once
    turns: Number = 1.0  # steps like its own that a prompt takes whose worker has fixed the next one already
    decoders: Number = 1.0  # attention-DP ranks of the decode pool
    idle_seats: Number = 0.0  # of each of them
    half: Number = 1e12  # an answer after its first token with half as many in decode


def exposed(j: Journey, prefill: Number) -> Number:
    """Seconds from the end of prefill to the last byte: all of it, or layer by layer what does not fit behind the rest.

    Layer by layer: max(t/L, t - prefill (L-1)/L) of the transfer time t.
    """
    rest = jnp.maximum(j.travel / j.layers, j.travel - prefill * (j.layers - 1.0) / j.layers)
    return jnp.where(j.layerwise > 0, rest, j.travel)


def company(requests: Number) -> Number:
    """Whether any of a rank's requests runs beside another: as in the closed loop of an undivided engine."""
    return jnp.clip(requests - 1.0, 0.0, 1.0)


def met(j: Journey, rate: Number, decoding: Number) -> Number:
    """The rate of others that an arrival meets: (N-1)/N of all, N no more than without any wait.

    In a closed loop an arrival sees the system as the other N - 1 leave it; where N = 1 it meets nobody.
    """
    least = rate * (j.fixed + j.idle + exposed(j, j.idle)) + decoding
    return rate * jnp.maximum(1.0 - 1.0 / jnp.maximum(least, 1.0), 0.0)


def computed(j: Journey, rate: Number) -> Number:
    """Seconds T of a prompt's own steps. The ranks of a worker step together, each with what came in the last step.

    With y = rate T / servers prompts a rank, T = idle + y (busy - idle) up to y = 1, and T = busy + (y - 1 + u) more,
    at most full, beyond: dealt in turn, the fullest rank has u = (K-1)/(2K) prompts more than the mean, which it
    computes as if alone. Where both hold, long steps stay long, for they collect more: the second, by its y up to one.
    """
    n = rate * j.stage / j.servers  # prompts a rank and second
    uneven = 0.5 * (1.0 - j.workers / j.servers) * safe_divide(j.idle, j.busy)
    few = j.idle / jnp.maximum(1.0 - n * jnp.maximum(j.busy - j.idle, 0.0), 1e-9)
    many = jnp.maximum(j.busy - (1.0 - uneven) * j.more, 0.0) / jnp.maximum(1.0 - n * j.more, 1e-9)
    own = jnp.minimum(few, j.busy) + jnp.minimum(n * many, 1.0) * jnp.maximum(many - j.busy, 0.0)
    return jnp.clip(own, j.idle, jnp.maximum(j.full, j.idle))


def boundary(j: Journey, rate: Number, own: Number) -> Number:
    """Mean seconds until the step that runs on an arrival's worker ends; `own` seconds are those of a prompt.

    A gate that lets all in at the end of each step T is shut a share x/(x + exp(-x)) of the time, x = rate T / workers
    (exact for Poisson arrivals and constant T), and then for half a step; of several workers an open one is taken
    (Sakasegawa's exponent). A rank alone meets the rest of a whole prompt, many meet that of one chunk.
    """
    x = rate * own * j.stage / j.workers
    shut = x / (x + jnp.exp(-x))
    every = shut ** (jnp.sqrt(2.0 * (j.workers + 1.0)) - 1.0)
    ranks = j.servers / j.workers
    return 0.5 * every * own * j.stage / (1.0 + (j.chunks - 1.0) * (1.0 - 1.0 / ranks))


def fixed_before(j: Journey, rate: Number, own: Number) -> Number:
    """Share of the time in which a worker that schedules ahead has fixed its next step while one runs.

    Where a step leaves nobody over, all who come while it runs go into the next one: it waits for no scheduler. More
    than m, the `prompts` of all ranks, of the x = rate T / workers who come meanwhile, leave some over; they fix the
    next step, and those of that step the one after it, until a step brings none: p/(p + exp(-x)), with p =
    exp(-x) x^(m+1)/(m+1)!, which nearly all of the Poisson tail is where it matters (Stirling). With m = 1 a fixed step
    has no room for others.
    """
    m, x = jnp.maximum(j.servers / j.workers * j.prompts, 1.0), jnp.maximum(rate * own * j.stage / j.workers, 1e-9)
    odds = (m + 1.0) * (1.0 + jnp.log(x / (m + 1.0))) - 0.5 * jnp.log(2.0 * math.pi * (m + 1.0))
    return jnp.minimum(m - 1.0, 1.0) * sigmoid(odds)


def ahead(j: Journey, rate: Number, own: Number) -> Number:
    """Seconds that a prompt waits because its worker had fixed the next step before it came."""
    return own * (steps_to_token(j.turns, fixed_before(j, rate, own)) - 1.0)


def waiting(rate: Number, service: Number, servers: Number) -> Number:
    """Mean wait before `servers` ranks of a constant service time behind one balanced queue (M/D/c).

    S/(2c) rho^(sqrt(2(c+1))-1)/(1-rho) (Sakasegawa 1977; exact for one server). Finite at rho = 1: a closed loop never
    waits that long, and `in_flight` says how long.
    """
    rho = jnp.minimum(rate * service / servers, 1.0 - 1e-9)
    return 0.5 * service / servers * rho ** (jnp.sqrt(2.0 * (servers + 1.0)) - 1.0) / (1.0 - rho)


def behind(j: Journey, rate: Number) -> Number:
    """Of that wait, what is left when the step that runs has ended (M/D/1: S rho^2/(2(1-rho)))."""
    return waiting(rate, j.service, j.servers) * rate * j.service / j.servers


def second_wave(j: Journey, rate: Number, decoding: Number) -> Number:
    """Mean wait of the second wave of N behind the first: what few decode, they answer before all have been computed.

    c = servers/service prompts a second leave the first wave, so that decode fills as c t. An answer lasts from a up to
    A = decoding/rate, nearly linearly in those beside it (`half`: with half of them), so the first one ends at t =
    a (exp(u)-1)/u, u = (A-a) c/N, the last at N/c + A. Those who come back meet a line of G = N/c - t seconds that
    melts over H = A - t, no less than G at any rate that the pool bears: G^2/(2H). Ignored: waves after that.
    """
    drain, answer = decoding * j.service / j.servers, decoding / rate
    least = jnp.maximum(2.0 * j.half - answer, 0.0)
    u = jnp.clip((answer - least) / drain, 1e-6, 30.0)
    back = jnp.minimum(least * jnp.expm1(u) / u, answer)
    line = jnp.maximum(drain - back, 0.0)
    return 0.5 * line**2 / jnp.maximum(answer - back, jnp.maximum(line, 1e-9))


def in_flight(j: Journey, rate: Number, decoding: Number) -> tuple[Number, Number]:
    """(N, TTFT) at `rate` requests/s with `decoding` requests in the decode pool, below the prefill pool's rate.

    N = X TTFT(N) + decoding + those that find no seat (`idle_seats`). A prompt of the first wave, of weight f, is done
    when its step is: one step of all, from `idle` to `busy` by the ranks that have one and S N/c where they have more,
    up to (full + S N/c)/2, the mean of the first full step and the last. Later ones wait for a step to end, for one
    more where that is fixed `ahead`, and for the queue, W, which the N - 1 others bound: S (N-1)/(2c). Each branch is
    a line in N with slope below one, so the solution is the larger over the max of the smaller over the min.
    """
    f, share = j.first_wave, j.service / j.servers
    others = met(j, rate, decoding)
    own = computed(j, others)
    base = j.fixed + exposed(j, own) + (1.0 - f) * (own + boundary(j, others, own) + ahead(j, others, own))
    base = base + jnp.minimum(f, 1.0 - f) * second_wave(j, rate, decoding)
    occupied = decoding + j.decoders * unseated(j.idle_seats, company(decoding / j.decoders))
    wait, half = (1.0 - f) * behind(j, others), (1.0 - f) * 0.5 * share

    def solve(constant: Number, slope: Number) -> Number:
        return (rate * constant + occupied) / jnp.maximum(1.0 - rate * slope, 1e-9)

    def until(constant: Number, slope: Number = 0.0) -> Number:
        """N where a first wave lasts constant + slope N and the queue is what it is, or what the others can make it."""
        start = base + f * constant
        return jnp.minimum(solve(start + wait, f * slope), solve(start - half, f * slope + half))

    rank = safe_divide(jnp.maximum(j.busy - j.idle, 0.0), j.servers - j.workers)  # a rank more with a prompt
    few = jnp.minimum(until(j.idle - rank * j.workers, rank), until(j.busy))
    many = jnp.minimum(until(0.0, share), until(0.5 * j.full, 0.5 * share))
    n = jnp.maximum(until(j.idle), jnp.maximum(few, many))
    return n, (n - decoding) / rate


def best_ratio(
    prefill_rate: Number, decode_rate: Number, prefill_gpus: Number, decode_gpus: Number, budget: Number, most: int = 64
) -> tuple[Number, Number, Number]:
    """Workers (prefill, decode) with the most requests/s a GPU within `budget` GPUs, and that rate.

    Rates in requests/s of one worker, GPUs of one worker; leaves broadcast. All pairs of 1..most workers are tried;
    ties go to fewer GPUs. Rate 0 where not even one worker of each fits.
    """
    counts = jnp.arange(1, most + 1, dtype=jnp.result_type(float))
    arrays = jnp.broadcast_arrays(prefill_rate, decode_rate, prefill_gpus, decode_gpus, budget)
    rp, rd, gp, gd, limit = (jnp.asarray(a)[..., None, None] for a in arrays)
    p, d = counts[:, None], counts[None, :]
    gpus = p * gp + d * gd
    rate = jnp.where(gpus <= limit, jnp.minimum(p * rp, d * rd) / gpus, 0.0)
    rate = rate.reshape(*rate.shape[:-2], -1)
    fewest = jnp.broadcast_to(gpus, (*arrays[0].shape, most, most)).reshape(rate.shape)
    top = rate.max(axis=-1, keepdims=True)
    place = jnp.argmin(jnp.where(rate >= top * (1.0 - 1e-6), fewest, jnp.inf), axis=-1)
    return counts[place // most], counts[place % most], top[..., 0]


__all__ = [
    "Journey",
    "ahead",
    "best_ratio",
    "boundary",
    "company",
    "computed",
    "exposed",
    "in_flight",
    "met",
    "second_wave",
    "waiting",
]
