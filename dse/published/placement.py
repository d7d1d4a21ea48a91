"""DistServe's search for a placement: enumerate, find each one's goodput by bisection, rank by rate a GPU.

All placements are bisected at once: one compiled program carries a batch of rates through a first-come first-served
prefill queue over a sampled trace (`lax.scan`) and a steady decode pool. As published, P90 of TTFT and of TPOT are
checked apart, not jointly; a prefill batch takes all that wait, up to L_m tokens, which is what the KV cache holds.
Unlike the published simulator, decode is priced with its own TP and moving the KV cache costs time.

Lengths: `sharegpt` draws from the quantiles of the 300 requests that the authors logged from OPT-13B on ShareGPT
(several turns of a conversation, 2048 tokens at most). Prompts are near uniform, mean 780 tokens, P90 1512: at TP1 TTFT
of 200 ms allows 1596, so that TP1 prefill can hardly queue, while decode at TP1 is far from its TPOT. Hence the
published optimum, prefill tp2 and decode tp1, by a third above the next placement. Its rate is 1.8-1.9 requests/s/GPU
over 10,000 requests and 1.8 +- .2 over 300, as published (1.56, a step of 5/32 of a bisection to .25): one standard
deviation, for the P90 of 300 prompts is itself known to 6%, and prompts longer by that make it 1.6 to 1.7. That their
search prices decode with the prefill TP's fit makes no difference: decode does not bind. `sharegpt_like` is a lognormal
of any means (long prompts, 600-1100, give the same placement at 1.3-2.4; short ones, 200, TP1 prefill at 4-10).
TPOT's P90 is by Little's law and a Poisson pool, not simulated.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

from dse.cost.types import Number, pytree
from dse.errors import InputError
from dse.numerics import last_good
from dse.programs import Program, program
from dse.published.distserve import OPT_13B, TPS, Fit, Profile, decode_fit, prefill_stage, steady_decode

HEADS = LAYERS = 40  # OPT-13B
KV_BYTES = 2.0 * 2.0 * LAYERS * 5120.0  # a token, fp16
# L_m = 96 872 tokens a GPU less the 30 728 that the weights take: the authors' table of max_num_tokens to .02%
TOKENS_PER_GPU, TOKENS_OF_WEIGHTS = 96872.0, 30728.0
# Every 5% from the least to the most: prompt and answer tokens of 300 ShareGPT requests to OPT-13B in the authors' log
# (simdistserve/benchmarks/alignment of their repository, 3 requests/s); means 780 and 176.
PROMPTS = (9, 31, 94, 180, 279, 345, 430, 501, 573, 658, 758, 821, 867, 972, 1047, 1157, 1319, 1421, 1512, 1718, 2003)
ANSWERS = (2, 5, 9, 12, 14, 18, 23, 33, 36, 48, 67, 112, 164, 201, 236, 278, 337, 403, 478, 594, 1085)
Many = tuple[Number, ...]
NVLINK, NETWORK = 600e9, 25e9 / 8.0  # bytes/s between instances of one node, and of two (25 Gb/s: the paper's testbed)


@pytree
class Placement:
    """`pp_across` nodes, each with a prefill segment of tp x pp GPUs and a decode segment."""

    pp_across: Number
    tp_prefill: Number
    pp_prefill: Number
    tp_decode: Number
    pp_decode: Number
    same_node: Number  # 1: KV moves over NVLink

    @property
    def gpus(self) -> Number:
        return self.pp_across * (self.tp_prefill * self.pp_prefill + self.tp_decode * self.pp_decode)


@pytree
class Trace:
    """Sampled requests: lengths, and exponential gaps of mean 1 to be divided by a rate."""

    isl: Number
    osl: Number
    gap: Number


@pytree
class Target:
    """Seconds, and the share of requests that must meet each of the two."""

    ttft: Number = 0.2
    tpot: Number = 0.1
    share: Number = 0.9


def placements(gpus: int, gpus_per_node: int = 8, nodes: int = 1, same_node: bool = True) -> Placement:
    """Every legal placement of at most `gpus` GPUs: tp | heads and profiled, pp | layers."""
    if gpus < 2:
        raise InputError(f"gpus: {gpus} cannot hold a prefill and a decode instance (2 or more)")
    tps = [n for n in TPS if HEADS % n == 0]
    rows = []
    for across, tp_p, pp_p, tp_d, pp_d in product(range(1, nodes + 1), tps, range(1, gpus), tps, range(1, gpus)):
        deep = LAYERS % (across * pp_p) == 0 and LAYERS % (across * pp_d) == 0
        segment = tp_p * pp_p + tp_d * pp_d
        if deep and across * segment <= gpus and segment <= gpus_per_node:
            rows.append((across, tp_p, pp_p, tp_d, pp_d, float(same_node)))
    columns = np.array(rows, np.float64).T
    return Placement(**dict(zip(Placement.__dataclass_fields__, columns, strict=True)))


def capacity_tokens(gpus: Number) -> Number:
    """L_m: KV tokens that one instance of so many GPUs holds."""
    return jnp.maximum(TOKENS_PER_GPU * gpus - TOKENS_OF_WEIGHTS, 0.0)


def sharegpt(n: int = 1000, seed: int = 0) -> Trace:
    """n requests of lengths between the quantiles of the authors' own (prompt and answer drawn apart), Poisson."""
    rng = np.random.default_rng(seed)
    steps = np.linspace(0.0, 1.0, len(PROMPTS))
    isl, osl = (np.round(np.interp(rng.random(n), steps, table)) for table in (PROMPTS, ANSWERS))
    return Trace(isl=isl, osl=np.minimum(osl, 2048 - isl), gap=rng.exponential(1.0, n))


def sharegpt_like(
    mean_in: float, mean_out: float, cv_in: float = 1.0, cv_out: float = 1.0, n: int = 1000, seed: int = 0
) -> Trace:
    """n requests of lognormal lengths (of the means and coefficients of variation given, 4 to 2048 tokens), Poisson.

    OPT's window is 2048 tokens, so answers are cut where they would pass it, as the authors' data is.
    """
    rng = np.random.default_rng(seed)

    def lengths(mean: float, cv: float, top: Number) -> np.ndarray:
        variance = np.log1p(cv**2)
        drawn = rng.lognormal(np.log(mean) - 0.5 * variance, np.sqrt(variance), n)
        return np.clip(np.round(drawn), 4, top)

    isl = lengths(mean_in, cv_in, 2044)
    return Trace(isl=isl, osl=lengths(mean_out, cv_out, np.maximum(2048 - isl, 4)), gap=rng.exponential(1.0, n))


def prefill_ttft(x: Placement, rate: Number, trace: Trace, stages: int, profile: Profile = OPT_13B) -> Number:
    """TTFT of every request: first come first served, a free first stage takes all that have come, up to L_m tokens.

    One pass over arrivals builds the batches; a batch's end, known at its last member, is carried back to the first.
    `stages` bounds pp (it shapes the program).
    """
    pp = x.pp_across * x.pp_prefill
    limit = capacity_tokens(x.tp_prefill * pp)
    arrival = jnp.cumsum(trace.gap) / rate

    def through(start: Number, tokens: Number, squares: Number, free: Number) -> tuple[Number, Number]:
        """End of a batch, and when each stage is free after it."""
        stage = prefill_stage(tokens, squares, x.tp_prefill, pp, profile)
        end, after = start, []
        for k in range(stages):
            end = jnp.where(k < pp, jnp.maximum(end, free[k]) + stage, end)
            after.append(end)
        return end, jnp.stack(after)

    def arrive(carry: Many, request: Many) -> tuple[Many, Many]:
        start, tokens, squares, free = carry
        time, length = request
        joins = (time <= start) & (tokens + length <= limit)
        _, after = through(start, tokens, squares, free)
        free = jnp.where(joins, free, after)
        start = jnp.where(joins, start, jnp.maximum(time, free[0]))
        tokens = jnp.where(joins, tokens, 0.0) + length
        squares = jnp.where(joins, squares, 0.0) + length * length
        end, _ = through(start, tokens, squares, free)
        return (start, tokens, squares, free), (end, joins)

    # a "batch" of no tokens opens the trace; it ends long before the first arrival
    zero, long_ago = 0.0 * arrival[0], 0.0 * arrival[0] - 1e3
    nothing = (long_ago, zero, zero, jnp.full(stages, -1e3, arrival.dtype))
    _, (end, joins) = jax.lax.scan(arrive, nothing, (arrival, trace.isl))
    more = jnp.concatenate([joins[1:], jnp.zeros(1, bool)])  # the next request is of the same batch

    def back(later: Number, item: Many) -> tuple[Number, Number]:
        own = jnp.where(item[1], later, item[0])
        return own, own

    _, finished = jax.lax.scan(back, end[-1], (end, more), reverse=True)
    return finished - arrival


def decode_tpot(x: Placement, rate: Number, trace: Trace, z: Number, profile: Profile = OPT_13B) -> Number:
    """TPOT that requests see `z` standard deviations above the mean: occupancy of the pool is Poisson about Little's B.

    Plus the KV transfer, spread over a mean answer; inf where the pool has no steady state or its KV no room.
    """
    pp = x.pp_across * x.pp_decode
    osl = jnp.mean(trace.osl)
    context = jnp.mean(trace.osl * (trace.isl + 0.5 * trace.osl)) / osl  # as time sees it: long answers stay longer
    steady = steady_decode(rate, osl, context, x.tp_decode, pp, profile)
    mean = rate * osl * jnp.where(steady.stable, steady.ttft, 0.0)
    busy = mean + z * jnp.sqrt(mean)
    fit: Fit = decode_fit(busy / pp, x.tp_decode, profile)
    tpot = (fit.a + (fit.b * context + fit.c) * busy / pp) * 1e-3
    transfer = jnp.mean(trace.isl) * KV_BYTES / jnp.where(x.same_node > 0, NVLINK, NETWORK * pp)
    room = busy * context <= capacity_tokens(x.tp_decode * pp)
    return jnp.where(steady.stable & room, tpot + transfer / jnp.maximum(osl - 1.0, 1.0), jnp.inf)


def meets(x: Placement, rate: Number, trace: Trace, target: Target, stages: int, profile: Profile) -> Number:
    """Whether the asked share of requests meets TTFT, and TPOT at that percentile holds too (apart, as published)."""
    share = jnp.mean(prefill_ttft(x, rate, trace, stages, profile) <= target.ttft)
    z = jax.scipy.stats.norm.ppf(target.share)
    return (share >= target.share) & (decode_tpot(x, rate, trace, z, profile) <= target.tpot)


@pytree
class Goodput:
    """Requests/s of a placement, and of one of its GPUs; 0 where even the least rate misses."""

    rate: Number
    per_gpu: Number
    l_m: Number  # tokens that a prefill batch may hold
    tokens_decode: Number  # KV tokens of the decode instance


def _search(stages: int, halvings: int, x: Placement, trace: Trace, target: Target, top: Number) -> Goodput:
    ok = jax.vmap(lambda p, r: meets(p, r, trace, target, stages, OPT_13B))
    per_gpu = last_good(lambda middle: ok(x, middle * x.gpus), 0.0 * x.gpus, 0.0 * x.gpus + top, halvings)
    return Goodput(
        rate=per_gpu * x.gpus,
        per_gpu=per_gpu,
        l_m=capacity_tokens(x.pp_across * x.tp_prefill * x.pp_prefill),
        tokens_decode=capacity_tokens(x.pp_across * x.tp_decode * x.pp_decode),
    )


def goodput(x: Placement, trace: Trace, target: Target, top: float = 16.0, tolerance: float = 0.01) -> Goodput:
    """The largest rate a GPU in [0, top] that meets the target, of each placement, to `tolerance`."""
    stages = int(np.max(np.asarray(x.pp_across) * np.asarray(x.pp_prefill)))
    halvings = max(1, int(np.ceil(np.log2(top / tolerance))))
    result: Goodput = _compiled(stages, halvings)(x, trace, target, top)
    return result


@cache
def _compiled(stages: int, halvings: int) -> Program:
    return program(_search, stages, halvings)


def best(x: Placement, found: Goodput) -> int:
    """Index of the placement with the best rate a GPU; ties go to fewer GPUs."""
    per_gpu, gpus = np.asarray(found.per_gpu), np.asarray(x.gpus)
    return int(np.lexsort((gpus, -per_gpu))[0])
