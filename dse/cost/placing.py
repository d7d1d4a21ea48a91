"""Goodput of one placement: a prefill and a decode instance on GPUs of their own, as DistServe rates them. Pure JAX.

Prefill is an M/G/1 queue of prompts, each its share of full steps long (`prefill_times`: the pipeline's first stage),
then its own way through the stages. Decode holds a Poisson number of requests about Little's law; its TPOT at n
requests is the cost model's, and the KV transfer delays the second token, so it is spread over the answer. The largest
rate a GPU is found by bisection, on whether enough requests meet TTFT, and enough meet TPOT (`jointly`: both at once,
taken as independent). Ignored: batching that makes short prompts wait, decode's variance of contexts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

from dse.cost.evaluate import Scenario, gpus_of_replica
from dse.cost.goodput import Slo
from dse.cost.lengths import Lengths
from dse.cost.memory import activations, kv_bytes, memory, weights
from dse.cost.pool_sides import link, request_ranks
from dse.cost.pool_steps import decode_memory, decode_times, prefill_times
from dse.cost.queueing import Moments, mg1, survival
from dse.cost.serving import accepted_of
from dse.cost.shard import shard_scenario
from dse.cost.traffic import Traffic, traffic_of
from dse.cost.types import Level, Number, Topology, pytree, replace
from dse.numerics import last_good, safe_divide

HALVINGS = 24
MOST_RUNNING = 4096.0  # requests an attention-DP rank, in decode
UNHELD = 1e9  # requests, where no memory limits them


@pytree
class Pair:
    """A prefill and a decode instance, alike in model and workload; `same_node`: 1 where the KV cache stays inside."""

    prefill: Scenario
    decode: Scenario
    same_node: Number
    across: Number  # nodes that the stages of both pipelines are spread over


@pytree
class Placed:
    """What a placement reaches. Rates are requests/s; traffic is bytes/s that a GPU sends, (levels,), at that rate."""

    rate: Number
    per_gpu: Number
    gpus: Number
    prefill_tokens: Number  # L_m: tokens that a prefill batch can hold
    decode_tokens: Number  # KV tokens of the decode instance
    ttft_met: Number  # shares of requests at that rate
    tpot_met: Number
    transfer: Number  # seconds, mean request
    prefill_traffic: Traffic
    decode_traffic: Traffic
    kv_traffic: Number  # of a prefill GPU


def segmented(topology: Topology, x: Pair, stage_gpus: Number) -> Topology:
    """The network as an instance sees it whose stages are dealt to `across` nodes, `stage_gpus` of it in each."""
    first: Level = topology.levels[0]
    size = jnp.where(x.across > 1, stage_gpus, first.size)
    return replace(topology, levels=(replace(first, size=size), *topology.levels[1:]))


def batch_tokens(x: Scenario) -> Number:
    """L_m: (usable - weights - buffers - reserve) over KV and activations of a token, on each GPU alike."""
    one = replace(x.load, concurrency=x.plan.attention_dp * jnp.ones(()), chunk=jnp.zeros(()), draft_tokens=None)
    held = memory(x.architecture, x.device, x.plan, one, x.coefficients)
    per_token = kv_bytes(x.architecture, x.plan, x.load.isl) / x.load.isl
    per_token = per_token + activations(x.architecture, x.plan, 1.0, 0.0)
    free = held.usable - weights(x.architecture, x.plan, x.load.drafted) - held.buffers - held.reserve
    return jnp.maximum(safe_divide(free, per_token), 0.0)


def place(x: Pair, lengths: Lengths, slo: Slo, top: Number, jointly: bool = False) -> Placed:
    """The largest rate a GPU in [0, top] that meets the targets; 0 where even the least misses. lengths (n,)."""
    a, b = x.prefill, x.decode
    gpus_a, gpus_b = gpus_of_replica(a.plan), gpus_of_replica(b.plan)
    sides = (
        replace(a, topology=segmented(a.topology, x, gpus_a / x.across)),
        replace(b, topology=segmented(b.topology, x, gpus_b / x.across)),
    )
    s_a, s_b = (shard_scenario(side) for side in sides)
    gpus = gpus_a + gpus_b

    def prompt(isl: Number) -> tuple[Number, Number]:
        found = prefill_times(s_a, replace(a.load, isl=isl))
        return found.idle, found.service

    idle, service = jax.vmap(prompt)(lengths.isl)
    base = idle + a.coefficients.arrival_overhead
    moments = Moments.of(service, lengths.weight)

    # The KV cache's way: inside the node, or through the slowest level between nodes
    span = jnp.where(x.same_node > 0, jnp.minimum(gpus, b.topology.levels[0].size), b.topology.levels[0].size + 1.0)
    line = link((a.topology, b.topology), (a.coefficients, b.coefficients), span, 0.0, 0.0)
    cache = kv_bytes(b.architecture, b.plan, b.load.isl)
    holders = request_ranks(a.plan), request_ranks(b.plan)
    transfer = line.fixed + line.per_byte * cache * jnp.maximum(1.0, holders[1] / holders[0])
    most = safe_divide(jnp.minimum(gpus_a, gpus_b), line.per_byte * cache * holders[1], otherwise=1e12)

    answer = jnp.sum(lengths.weight * jnp.maximum(lengths.osl - 1.0, 0.0))
    seen = lengths.weight * lengths.osl / jnp.sum(lengths.weight * lengths.osl)
    context = replace(b.load, isl=jnp.sum(seen * lengths.isl), osl=jnp.sum(seen * lengths.osl))  # long answers stay
    late = transfer / jnp.maximum(answer, 1.0)

    def tpot(running: Number) -> Number:
        return decode_times(s_b, context, running).tpot

    room = decode_memory(replace(b, load=context), b.plan.attention_dp * jnp.ones(())).requests * b.plan.attention_dp
    room = jnp.minimum(room, MOST_RUNNING * b.plan.attention_dp)

    allowed = last_good(lambda running: tpot(running) + late <= slo.tpot, jnp.zeros_like(room), room, HALVINGS)
    pace = tpot(jnp.maximum(allowed, 1.0))  # near the most it may hold: where the bisection ends
    l_m = batch_tokens(a)
    fits = (l_m >= jnp.max(jnp.where(lengths.weight > 0, lengths.isl, 0.0))) & (room >= 1.0) & (allowed >= 1.0)

    def met(rate: Number) -> tuple[Number, Number]:
        queue = mg1(rate, moments)
        early = jnp.sum(lengths.weight * jnp.where(base <= slo.ttft, 1.0 - survival(queue, slo.ttft - base), 0.0))
        busy = rate * answer * (pace + late)
        smooth = ndtr((allowed - busy) / jnp.sqrt(jnp.maximum(busy, 1e-6)))
        return jnp.where(queue.stable & fits, early, 0.0), jnp.where(fits & (rate <= most), smooth, 0.0)

    def enough(per_gpu: Number) -> Number:
        early, smooth = met(per_gpu * gpus)
        return jnp.where(jointly, early * smooth, jnp.minimum(early, smooth)) >= slo.attainment

    per_gpu = last_good(enough, 0.0 * gpus, 0.0 * gpus + top, HALVINGS)
    rate = per_gpu * gpus
    early, smooth = met(jnp.maximum(rate, 1e-6))
    verified = rate * answer * (1.0 + b.load.drafted) / accepted_of(b.load)
    prompts = jnp.sum(lengths.weight * (lengths.isl - lengths.cached))
    crossing = jnp.arange(len(b.topology.levels)) == jnp.where(x.same_node > 0, 0, 1)
    return Placed(
        rate=rate,
        per_gpu=per_gpu,
        gpus=gpus,
        prefill_tokens=l_m,
        decode_tokens=jnp.maximum(room, 0.0) * (context.isl + b.coefficients.reserved_output * context.osl),
        ttft_met=early,
        tpot_met=smooth,
        transfer=transfer,
        prefill_traffic=traffic_of(sides[0], rate * prompts / a.plan.attention_dp),
        decode_traffic=traffic_of(sides[1], verified / b.plan.attention_dp),
        kv_traffic=jnp.where(crossing, rate * cache * holders[1] / gpus_a, 0.0),
    )


__all__ = ["Pair", "Placed", "batch_tokens", "place", "segmented"]
