"""DistServe (Zhong et al., OSDI 2024): prefill and decode on separate GPUs; step-time fits and M/D/1 waits.

Profiled on A100-80G with OPT-13B, ms: prefill stage (a + b sum(l) + c sum(l^2))/pp + pp; decode stage (a + b sum(ctx) +
c B)/pp, one fit below 95 requests and one from there on. TTFT by M/D/1: D + R D^2/(2(1 - R D)), and its forms for a
pipeline and for tensor parallelism. The search over placements is in `dse.published.placement`.

Known errors: `+ pp` is a guess of pipeline overhead and is paid by every stage; the two decode fits disagree by several
ms where they meet; the published simulator prices decode with the prefill TP's fit, and moves KV for nothing. M/D/1
is one prompt length and no batching.
"""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.types import Number, pytree
from dse.numerics import safe_divide, safe_sqrt
from dse.published.rows import over_rows
from dse.units import MS

SMALL_BATCH = 95.0  # requests from which the second decode fit holds
TPS = (1, 2, 4)  # degrees that were profiled


@pytree
class Fit:
    """a (ms), b (ms a token), c (ms a token^2 in prefill, ms a request in decode)."""

    a: Number
    b: Number
    c: Number


@pytree
class Profile:
    """Fits by TP degree, in the order of `TPS`."""

    prefill: tuple[Fit, ...]
    decode_small: tuple[Fit, ...]
    decode_large: tuple[Fit, ...]


# OPT-13B on A100-80G (the authors' profiler output)
OPT_13B = Profile(
    prefill=(
        Fit(a=18.10254647, b=0.1019122573, c=7.122264e-6),
        Fit(a=14.7429737, b=0.0685772, c=2.44957e-6),
        Fit(a=12.062297, b=0.0380814, c=5.22625e-7),
    ),
    decode_small=(
        Fit(a=19.934703, b=0.000626936, c=0.0385070),
        Fit(a=13.29480, b=0.000341092, c=0.0629639),
        Fit(a=10.25623, b=0.000187867, c=0.0326927),
    ),
    decode_large=(
        Fit(a=7.16619, b=0.00057980, c=0.158311),
        Fit(a=10.63874, b=0.000311834, c=0.0856291),
        Fit(a=10.48351, b=0.000171209, c=0.0456665),
    ),
)


def _of_tp(fits: tuple[Fit, ...], tp: Number) -> Fit:
    """The fit of a traced degree; one that was not profiled gets the nearest below."""
    chosen = fits[0]
    for degree, fit in zip(TPS[1:], fits[1:], strict=True):
        chosen = Fit(**{k: jnp.where(tp >= degree, getattr(fit, k), getattr(chosen, k)) for k in ("a", "b", "c")})
    return chosen


def prefill_stage(tokens: Number, squares: Number, tp: Number, pp: Number, profile: Profile = OPT_13B) -> Number:
    """Seconds of one pipeline stage for a batch with sum(l) tokens and sum(l^2)."""
    fit = _of_tp(profile.prefill, tp)
    return ((fit.a + fit.b * tokens + fit.c * squares) / pp + pp) * MS


def decode_fit(requests: Number, tp: Number, profile: Profile = OPT_13B) -> Fit:
    """The fit that holds at this batch."""
    small, large = _of_tp(profile.decode_small, tp), _of_tp(profile.decode_large, tp)
    few = requests < SMALL_BATCH
    return Fit(**{k: jnp.where(few, getattr(small, k), getattr(large, k)) for k in ("a", "b", "c")})


def decode_stage(requests: Number, context: Number, tp: Number, pp: Number, profile: Profile = OPT_13B) -> Number:
    """Seconds of one pipeline stage for `requests` with `context` cached tokens in all."""
    fit = decode_fit(requests, tp, profile)
    return (fit.a + fit.b * context + fit.c * requests) / pp * MS


# --------------------------------------------------------------------------------------------------- waits


@pytree
class Wait:
    """Mean TTFT in seconds: inf where the queue has no steady state (`stable` false), never a negative number."""

    ttft: Number
    utilisation: Number
    stable: Number


def mean_ttft(latency: Number, bottleneck: Number, rate: Number) -> Wait:
    """latency + R s^2/(2 (1 - R s)), s the time a request holds the slowest stage; requests arrive Poisson.

    One server: latency = s = D. n stages: D, s = D/n, which is D + R D^2/(2n(n - RD)). Intra-op with speed-up K:
    latency = s = D/K, which is D/K + R D^2/(2K(K - RD)).
    """
    busy = rate * bottleneck
    stable = busy < 1.0
    wait = safe_divide(busy * bottleneck, 2.0 * jnp.where(stable, 1.0 - busy, 1.0))
    return Wait(ttft=jnp.where(stable, latency + wait, jnp.inf), utilisation=busy, stable=stable)


def single(service: Number, rate: Number) -> Wait:
    """M/D/1."""
    return mean_ttft(service, service, rate)


def inter_op(service: Number, rate: Number, stages: Number) -> Wait:
    """`stages` equal pipeline stages."""
    return mean_ttft(service, service / stages, rate)


def intra_op(service: Number, rate: Number, speedup: Number) -> Wait:
    """Tensor parallelism that runs `speedup` times as fast."""
    return mean_ttft(service / speedup, service / speedup, rate)


def crossover(speedup: Number) -> Number:
    """R D below which intra-op (speed-up K) beats two pipeline stages: the lesser root of x^2 - (K+2) x +
    8K(K-1)/(3K-2) = 0, at which D/K + x D/(2K(K-x)) = D + x D/(4(2-x))."""
    k = speedup
    return 0.5 * (k + 2.0 - safe_sqrt((k + 2.0) ** 2 - 32.0 * k * (k - 1.0) / (3.0 * k - 2.0)))


# ------------------------------------------------------------------------------------------------ one case


@pytree
class Case:
    """A prefill and a decode instance under requests of one length."""

    tp_prefill: Number
    pp_prefill: Number
    tp_decode: Number
    pp_decode: Number
    isl: Number
    osl: Number
    rate: Number  # requests/s to the instance pair


@pytree
class Served:
    """Seconds; tokens/s. `batch`: requests that decode together in the steady state."""

    prefill: Number  # one stage, one prompt
    ttft: Number
    utilisation: Number
    batch: Number
    decode: Number  # one stage
    tpot: Number
    stable: Number
    rate_per_gpu: Number
    gpus: Number


def steady_decode(rate: Number, osl: Number, context: Number, tp: Number, pp: Number, profile: Profile) -> Wait:
    """TPOT by Little: B = R osl t(B), t linear in B: t = a/(1 - R osl (b ctx + c)/pp); B/pp requests a stage at once.

    Of the two fits, the small one where its own batch is below 95, else the large one at 95 requests or more.
    `ttft` of the result is that TPOT.
    """

    def solve(fits: tuple[Fit, ...]) -> tuple[Number, Number, Fit]:
        fit = _of_tp(fits, tp)
        load = rate * osl * MS * (fit.b * context + fit.c) / pp
        return fit.a * MS / jnp.where(load < 1.0, 1.0 - load, 1.0), load, fit

    small, small_load, _ = solve(profile.decode_small)
    large, large_load, fit = solve(profile.decode_large)
    edge = (fit.a + (fit.b * context + fit.c) * SMALL_BATCH) * MS
    few = (small_load < 1.0) & (rate * osl * small / pp < SMALL_BATCH)
    load = jnp.where(few, small_load, large_load)
    stable = load < 1.0
    tpot = jnp.where(few, small, jnp.maximum(large, edge))
    return Wait(ttft=jnp.where(stable, tpot, jnp.inf), utilisation=load, stable=stable)


def serve_one(x: Case, profile: Profile = OPT_13B) -> Served:
    """Mean TTFT (M/D/1 pipeline) and steady TPOT of one pair of instances."""
    stage = prefill_stage(x.isl, x.isl * x.isl, x.tp_prefill, x.pp_prefill, profile)
    first = mean_ttft(stage * x.pp_prefill, stage, x.rate)
    then = steady_decode(x.rate, x.osl, x.isl + 0.5 * x.osl, x.tp_decode, x.pp_decode, profile)
    gpus = x.tp_prefill * x.pp_prefill + x.tp_decode * x.pp_decode
    return Served(
        prefill=stage,
        ttft=first.ttft,
        utilisation=first.utilisation,
        batch=jnp.where(then.stable, x.rate * x.osl * jnp.where(then.stable, then.ttft, 0.0), jnp.inf),
        decode=then.ttft / x.pp_decode,
        tpot=then.ttft,
        stable=first.stable & then.stable,
        rate_per_gpu=x.rate / gpus,
        gpus=gpus,
    )


def serve(cases: Case) -> Served:
    """A batch: every leaf has one leading axis."""
    served: Served = over_rows(serve_one)(cases)
    return served
