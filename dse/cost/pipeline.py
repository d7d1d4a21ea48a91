"""Pipelines of more than one model: what each stage takes, what its pool makes requests wait, at a rate.

TTFT = sum_i (wait_i + t_i + transfer_i), throughput = min_i (replicas_i batch_i / t_i). Three forms of stage:
- batches (`Batched`: encoder, rerank, prefill, retrieval): a replica takes up to `batch` of the calls that wait. Calls
  differ by kind (tokens, turn), so a batch's time has a mean and a variance. Stages that share a pool share its
  replicas: their busy shares add up, and each waits for both.
- continuous (`Continuous`: decode): calls join a running batch; TPOT follows the number running, which Little's law
  gives at a rate.
- aggregated (`pipeline_open`): prefill and decode of one pool, in the open loop. What shares the pool takes a share of
  its time (`slowed`).
- delays (gateway, tool): a time and no queue.
The wait is that of c servers (Sakasegawa 1977), which for one server and batches of one is Pollaczek-Khinchine's;
within 20% of a simulation for batches up to 8 and for several servers (tests/test_pipeline_queues.py).
Ignored: correlation of a request's waits, failures, links that several pools saturate together.
"""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.coefficients import Coefficients
from dse.cost.evaluate import Scenario
from dse.cost.lengths import DEVIATES, SHARES
from dse.cost.pipeline_tails import Cumulants, of_moments, of_rest, of_some, of_wait
from dse.cost.pool_steps import decode_times
from dse.cost.queueing import BUSIEST
from dse.cost.serving import flow
from dse.cost.shard import shard_scenario
from dse.cost.step import Batch, Segment, step
from dse.cost.types import Architecture, Device, Number, Plan, Topology, pytree, replace
from dse.numerics import safe_divide

MOST_CROWD = 100.0  # of the variance of calls that run over their mean: beyond, the replica is full


@pytree
class Job:
    """Alike sequences through a model in one step: `tokens` new ones each, behind `cached` ones.

    `bidirectional`: 1 where every token sees the whole sequence (encoders), 0 where only what came before.
    """

    architecture: Architecture
    device: Device
    topology: Topology
    plan: Plan
    coefficients: Coefficients
    sequences: Number
    tokens: Number
    cached: Number = 0.0
    bidirectional: Number = 0.0


def job_times(x: Job) -> tuple[Number, Number]:
    """(seconds until it is through, seconds that it occupies each pipeline stage); 0 where it has no tokens.

    A token of a bidirectional sequence of T sees T keys: as if the sequence began at T/2, for S + T/2 keys are seen.
    Sequences are dealt over the attention-DP ranks; of fewer sequences than ranks, some ranks hold none.
    """
    s = shard_scenario(x)
    some = x.sequences * x.tokens > 0
    tokens = jnp.where(some, x.tokens, 1.0)
    start = x.cached + 0.5 * x.bidirectional * tokens
    requests = jnp.where(some, x.sequences, 1.0)
    ranks = jnp.clip(requests, 1.0, x.plan.attention_dp)
    s = replace(s, plan=replace(s.plan, attention_dp=ranks))  # a step counts the expert group's tokens so
    requests = requests / ranks
    prompts = Segment(requests=requests, tokens=tokens, start=start, span=tokens)
    t = step(s, Batch(prefill=prompts, decode=None), x.plan.overlap_prefill)
    return jnp.where(some, flow(s, t, 1.0), 0.0), jnp.where(some, t.total, 0.0)


def decode_time(x: Scenario) -> Number:
    """TPOT of a decode worker with `load.concurrency` requests running."""
    s = shard_scenario(x)
    return decode_times(s, x.load, x.load.concurrency).tpot


def scan_time(index_bytes: Number, scan: Number, batch: Number, bandwidth: Number, base: Number) -> Number:
    """A batch of queries over an index: base + bytes of the lists that any of them probes / bandwidth.

    Each query reads a share `scan` of the lists, at random: of b queries 1 - (1 - scan)^b is read once.
    """
    read = -jnp.expm1(batch * jnp.log1p(-jnp.minimum(scan, 1.0 - 1e-9)))
    return base + index_bytes * read / bandwidth


@pytree
class Batched:
    """A stage that takes calls in batches. Seconds; `calls` of the stage a request of the pipeline, in the mean."""

    first: Number  # a lone call of the first turn, until it is through
    alone: Number  # a lone call, mean over kinds
    together: Number  # a call in a full batch
    single: Number  # a lone call occupies a replica, mean
    service: Number  # a full batch occupies a replica, mean
    square: Number  # of that, mean of squares over batches of one kind each
    cube: Number  # and of cubes
    batch: Number
    calls: Number
    own: Cumulants  # of a lone call of the first turn
    slopes: tuple[Number, ...] = ()  # of that, by a standard deviation of each amount that other stages see too

    @property
    def capacity(self) -> Number:
        """Requests/s of the pipeline that one replica serves, if it serves nothing else."""
        return safe_divide(self.batch, self.service * self.calls, otherwise=1e12)


def batched(
    latency: tuple[Number, Number],
    occupied: tuple[Number, Number],
    weight: Number,
    first: Number,
    batch: Number,
    calls: Number,
) -> Batched:
    """A stage of the times of its kinds (..., kinds), each of a lone call and of a full batch: until it is through, and
    while it occupies a replica.

    `weight`: shares of the calls; `first`: shares of the first turn's. A batch mixes kinds: its mean is theirs.
    """
    return Batched(
        first=jnp.sum(first * latency[0], -1),
        alone=jnp.sum(weight * latency[0], -1),
        together=jnp.sum(weight * latency[1], -1),
        single=jnp.sum(weight * occupied[0], -1),
        service=jnp.sum(weight * occupied[1], -1),
        square=jnp.sum(weight * occupied[1] ** 2, -1),
        cube=jnp.sum(weight * occupied[1] ** 3, -1),
        batch=batch,
        calls=calls,
        own=of_moments(*(jnp.sum(first * latency[0] ** power, -1) for power in (1, 2, 3))),
    )


@pytree
class Continuous:
    """A stage that calls join and leave. Leaves (..., k) by number of running calls a replica, ascending."""

    rate: Number  # (..., k) calls/s of a replica
    tpot: Number  # (..., k)
    seats: Number  # calls that may run on a replica
    scv: Number  # of the time that a call stays
    calls: Number
    steps: Number = 1.0  # TPOTs that a call stays, mean
    uneven: Number = 0.0  # (..., k) variance of tpot between contexts, if all calls had the same

    @property
    def capacity(self) -> Number:
        return self.rate[..., -1] / self.calls


@pytree
class Load:
    """A pool at a rate."""

    wait: Number  # seconds before each batched stage, a call
    delayed: Number  # chance of any, ...
    scv: Number  # ... and squared coefficient of variation of the waits of those that wait
    utilisation: Number  # with full batches: what is left of 1 is left to serve more
    stable: Number
    filled: tuple[Number, ...]  # by stage: 0 where calls run alone, 1 in full batches


def pool_load(rate: Number, stages: tuple[Batched, ...], replicas: Number) -> Load:
    """Batched stages on c = `replicas` replicas, `rate` requests/s of the pipeline; finite, `stable` says whether true.

    A batch takes what came while the one before ran, n = R t(n)/c of 1..b calls, t(n) straight between a lone call's
    and a full batch's. A call waits for the running batch, if all replicas are busy (share beta, from rho up to
    a/(a + exp(-a)), a = R t(n)/c: after a batch none may have come), and for the backlog, which drains at b/t(b), with
    rho the busy share in full batches:
    W = [beta^k t(n)/2 (1 + cv^2/n) + rho^(k+1)/(1-rho) t(b)/(2b) (1 + cv^2)]/c, k = sqrt(2(c+1)) - 1,
    weighted by the stages' shares. One server, b = 1: R E[S^2]/(2(1-rho)); rho -> 1: t(b)/(2 b c (1-rho)).
    Those that wait (beta^k) wait for a geometric number of residual services, as before one server exactly: more than
    one by the backlog's share q of W, cv^2 = (1-q) cv_r^2 + q. The least of c residuals is nearer to an exponential:
    1 - 3(1 - cv_r^2)/(c + 2) for cv_r^2.
    """
    each = [rate * s.calls * s.service / (s.batch * replicas) for s in stages]
    whole = sum(each, start=0.0 * replicas)
    rho = jnp.clip(whole, 0.0, BUSIEST)
    busy, weights, residual, square, backlog, filled = 0.0 * rho, 0.0 * rho, 0.0 * rho, 0.0 * rho, 0.0 * rho, []
    for share, s in zip(each, stages, strict=True):
        free = replicas * (1.0 - jnp.clip(whole - share, 0.0, BUSIEST))
        arrivals, more = rate * s.calls / free, safe_divide(s.service - s.single, s.batch - 1.0)
        n = safe_divide(arrivals * (s.single - more), 1.0 - arrivals * more, otherwise=s.batch)
        n = jnp.clip(jnp.where(arrivals * more < 1.0, n, s.batch), 1.0, s.batch)
        time = s.single + (n - 1.0) * more
        spread = jnp.maximum(safe_divide(s.square, s.service**2, otherwise=1.0) - 1.0, 0.0)
        skew = safe_divide(s.cube, s.service**3, otherwise=1.0) - 1.0 - 3.0 * spread
        own = rate * s.calls * time / (n * replicas)
        weights = weights + own
        found = arrivals * time
        busy = busy + jnp.minimum(own, found / (found + jnp.exp(-found)))
        residual = residual + own * 0.5 * time * (1.0 + spread / n)
        square = square + own * time**2 * (1.0 + 3.0 * spread / n + skew / n**2) / 3.0
        backlog = backlog + safe_divide(share, whole) * 0.5 * s.service / s.batch * (1.0 + spread)
        filled.append(safe_divide(n - 1.0, s.batch - 1.0))
    power = jnp.sqrt(2.0 * (replicas + 1.0)) - 1.0
    delayed = jnp.clip(jnp.maximum(busy, rho), 1e-12, 1.0) ** power
    one = safe_divide(residual, weights)
    uneven = safe_divide(safe_divide(square, weights), one**2, otherwise=4.0 / 3.0) - 1.0
    uneven = 1.0 - 3.0 * (1.0 - uneven) / (replicas + 2.0)
    backlog = backlog * jnp.maximum(rho, 1e-12) ** (power + 1.0) / (1.0 - rho)
    return Load(
        wait=(one * delayed + backlog) / replicas,
        delayed=delayed,
        scv=uneven + (1.0 - uneven) * safe_divide(backlog, one * delayed + backlog),
        utilisation=whole,
        stable=whole < 1.0,
        filled=tuple(filled),
    )


@pytree
class Part:
    """What a stage adds to a request. Seconds."""

    wait: Number  # of a call
    first: Number  # time of a first turn's call
    total: Number  # waits and times of all calls
    ttft: Cumulants  # the first turn's, over requests that meet the stage and those that do not
    calls: Number  # a request, in the mean
    tpot: Number = 0.0  # mean over requests, ...
    tpot_variance: Number = 0.0  # ... variance and third central moment
    tpot_third: Number = 0.0
    slopes: tuple[Number, ...] = ()  # of the first turn's time, as of `Batched`; their squares are in ttft's variance


def batched_part(s: Batched, load: Load, filled: Number, share: Number, iteration: Number) -> Part:
    """In a pool under `load`. `share` of the requests call it in their first turn; before it runs, what is left of the
    `iteration` of an aggregated LLM beside it must end. A batch of n calls mixes kinds: its time varies 1/n as much.
    """
    more = filled * (s.together - s.alone)
    wait = load.wait + 0.5 * iteration
    n = 1.0 + filled * (s.batch - 1.0)
    stretch = safe_divide(s.first + more, s.first, otherwise=1.0)
    service = Cumulants(
        mean=s.first + more, variance=s.own.variance * stretch**2 / n, third=s.own.third * stretch**3 / n**2
    )
    call = of_wait(load.wait, load.delayed, load.scv) + of_rest(iteration) + service
    total = s.calls * (wait + s.alone + more)
    slopes = tuple(slope * stretch / n for slope in s.slopes)
    return Part(wait=wait, first=s.first + more, total=total, ttft=of_some(call, share), calls=s.calls, slopes=slopes)


@pytree
class Running:
    """A continuous stage at a rate."""

    part: Part
    utilisation: Number
    stable: Number


@pytree
class _Crowd:
    """Calls that run on a replica at a rate: how many, their TPOT, and how it grows with one call more."""

    running: Number
    tpot: Number
    slope: Number
    uneven: Number


def _crowd(s: Continuous, each: Number) -> _Crowd:
    """Between the priced numbers of running calls TPOT is linear in them, t + b (n - n0), and Little's law ties both:
    n = rate steps tpot(n), tpot = (t - b n0)/(1 - rate steps b). Below the first number and beyond the last, its own.
    """
    steps = jnp.asarray(s.steps)
    alive = s.rate * steps[..., None] * s.tpot
    slopes = safe_divide(jnp.diff(s.tpot, axis=-1), jnp.diff(alive, axis=-1))
    last = slopes.shape[-1] - 1
    at = jnp.clip(jnp.sum(each[..., None] >= s.rate, axis=-1) - 1, 0, last)
    at = jnp.broadcast_to(at, each.shape)[..., None]

    def here(values: Number) -> Number:
        values = jnp.broadcast_to(values, (*each.shape, values.shape[-1]))
        return jnp.take_along_axis(values, at, axis=-1)[..., 0]

    slope, tpot = here(slopes), here(s.tpot)
    tpot = safe_divide(tpot - slope * here(alive), 1.0 - each * steps * slope, otherwise=s.tpot[..., -1])
    tpot = jnp.where(each < s.rate[..., -1], jnp.where(tpot > 0, tpot, s.tpot[..., -1]), s.tpot[..., -1])
    tpot = jnp.clip(tpot, s.tpot[..., 0], jnp.max(s.tpot, axis=-1))
    uneven = here(jnp.broadcast_to(s.uneven, s.tpot.shape))
    return _Crowd(running=jnp.maximum(each * steps * tpot, 1e-9), tpot=tpot, slope=slope, uneven=uneven)


def running(s: Continuous, rate: Number, replicas: Number) -> Running:
    """`rate` requests/s over `replicas`.

    For a seat a call waits as before K = seats * replicas servers: rho^(sqrt(2(K+1))-1)/(1-rho) (1 + cv^2)/2 over the
    largest rate.
    """
    each = jnp.asarray(rate * s.calls / replicas)
    crowd = _crowd(s, each)
    variance, third = _tpot_spread(s, crowd)
    seats = s.seats * replicas
    busy = each / s.rate[..., -1]
    rho = jnp.clip(busy, 1e-12, BUSIEST)
    delayed = rho ** (jnp.sqrt(2.0 * (seats + 1.0)) - 1.0)
    wait = delayed / (1.0 - rho) * 0.5 * (1.0 + s.scv) / (s.rate[..., -1] * replicas)
    return Running(
        part=Part(
            wait=wait,
            first=0.0 * wait,
            total=s.calls * wait,
            ttft=of_wait(wait, delayed, 1.0),
            calls=s.calls,
            tpot=crowd.tpot,
            tpot_variance=variance,
            tpot_third=third,
        ),
        utilisation=busy,
        stable=busy < 1.0,
    )


def _tpot_spread(s: Continuous, at: _Crowd) -> tuple[Number, Number]:
    """Variance and third central moment over requests of the mean TPOT of their stay.

    Calls share a replica's steps as a processor-sharing queue whose speed depends on their number n alone: n is the
    same for every distribution of stays (insensitivity; Kelly 1979), p(n) = p(n-1) rate steps tpot(n)/n, where tpot =
    a + b n negative binomial: variance m g and third moment m g (2g - 1), g = tpot/a = tpot/(tpot - m b). Contexts
    add `uneven`/m. What n was is forgotten over a mean stay x g, so that a stay of x mean ones averages
    f = 2 (z - 1 + exp(-z))/z^2 of the variance, z = x/g, and f^2 of the third moment. Arrivals taken as Poisson,
    though a prefill pool hands on batches. Within 3% of a step simulation (tests/test_pipeline_queues.py).
    """
    m, b = at.running, at.slope
    g = jnp.clip(safe_divide(at.tpot, at.tpot - m * b, otherwise=MOST_CROWD), 1.0, MOST_CROWD)
    sigma = jnp.sqrt(jnp.log1p(jnp.asarray(s.scv)))
    stays = [jnp.exp(sigma * d) for d in DEVIATES]
    mean = sum(w * x for w, x in zip(SHARES, stays, strict=True))
    f: Number = 0.0
    for w, x in zip(SHARES, stays, strict=True):
        z = x / mean / g
        f = f + w * 2.0 * (z + jnp.expm1(-z)) / z**2
    return f * (b**2 * m * g + at.uneven / jnp.maximum(m, 1.0)), f**2 * b**3 * m * g * (2.0 * g - 1.0)


def slowed(load: Load) -> Number:
    """How many times as long an aggregated LLM takes whose pool is `load`ed with batched stages as well."""
    return 1.0 / (1.0 - jnp.clip(load.utilisation, 0.0, BUSIEST))


__all__ = [
    "Batched",
    "Continuous",
    "Job",
    "Load",
    "Part",
    "Running",
    "batched",
    "batched_part",
    "decode_time",
    "job_times",
    "pool_load",
    "running",
    "scan_time",
    "slowed",
]
