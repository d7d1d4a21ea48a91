"""Disaggregated serving: a pool of prefill workers, a pool of decode workers, and the KV cache that travels between.

The steps are those of `step`; this file adds the queue before the prefill pool, the transfer, and Little's law, which
ties them: N requests in flight = X * TTFT + those in decode, X requests/s. Whoever is slower, a pool, the link or the N
users, sets X; nothing waits longer than the other requests in flight allow.
Ignored: variance of lengths, preemption, a lone prefill rank that batches short prompts, waves after the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp

from dse.cost.afd import AttentionFfn, attention_memory, estimate_attention_ffn_one
from dse.cost.evaluate import Scenario
from dse.cost.memory import Memory
from dse.cost.pool_queue import Journey, computed, exposed, in_flight, met
from dse.cost.pool_sides import Receiver, Sender, answer, first_token, journey, layer_count, link, receiver, sender
from dse.cost.pool_steps import (
    DecodeTimes,
    decode_memory,
    decode_rate,
    decode_times,
    fuller,
    prefill_memory,
    prefill_times,
)
from dse.cost.shard import Sharded, shard
from dse.cost.step import Step
from dse.cost.types import Load, Number, pytree
from dse.numerics import safe_divide
from dse.programs import by_size
from dse.units import HOUR

BISECTIONS = 52  # halvings of the requests in decode: float64's mantissa


@pytree
class Transfer:
    """How a request's KV cache travels. `layerwise`: 1 where layers are sent while later ones compute.

    `first_step`: 1 where the decode worker computes the first token again, so that TTFT holds one decode step.
    `free`: 1 where it costs nothing.
    """

    layerwise: Number = 0.0
    first_step: Number = 0.0
    free: Number = 0.0


@pytree
class Split:
    """A split deployment: one worker of each pool as a scenario (loads alike; `concurrency` counts all in flight)."""

    prefill: Scenario
    decode: Scenario
    prefill_workers: Number
    decode_workers: Number
    transfer: Transfer
    ffn: Scenario | None = None  # the experts' GPUs of a decode worker, where attention and FFN are split
    micro_batches: Number | None = None  # of such a worker
    apart: Number = 0.0  # 1: the pools are in different clusters, joined by the outermost levels of both
    seats: Number | None = None  # requests that a decode worker's engine runs at most; None: memory alone limits


@pytree
class Delivered:
    """What users and owners see. SI units; rates are of one GPU unless said; names as in `Estimate`."""

    ttft: Number
    tpot: Number
    e2e: Number
    output_rate: Number
    total_rate: Number
    user_rate: Number
    request_rate: Number  # requests/s, whole deployment
    gpus: Number
    usd_per_mtok: Number
    joules_per_token: Number


@pytree
class SplitEstimate(Delivered):
    """What a split deployment delivers, and why."""

    memory: Memory  # of the pool that is nearer to its limit
    prefill_memory: Memory
    decode_memory: Memory
    queue: Number  # part of ttft spent waiting
    transfer: Number  # part of ttft in which KV travels and nothing else happens
    running: Number  # requests in decode, a worker
    prefill_busy: Number  # share of the prefill pool's rate that is used
    decode_busy: Number  # share of the requests a decode worker has room for
    prefill_step: Step
    decode_step: Step


def decode_worker(x: Split, sharded: Sharded, running: Number) -> DecodeTimes:
    """A decode worker of a split deployment, whose attention and FFN may be split once more."""
    if x.ffn is None or x.micro_batches is None:
        return decode_times(sharded, x.decode.load, running)
    found = estimate_attention_ffn_one(_attention_ffn(x, running))
    return DecodeTimes(tpot=found.tpot, step=found.attention_step)


def _attention_ffn(x: Split, running: Number) -> AttentionFfn:
    return AttentionFfn(
        attention=replace(x.decode, load=replace(x.decode.load, concurrency=running)),
        ffn=cast(Scenario, x.ffn),
        micro_batches=x.micro_batches,
    )


def worker_memory(x: Split, running: Number) -> Memory:
    """Of the GPU of a decode worker that is nearest to its limit."""
    if x.ffn is None:
        return decode_memory(x.decode, running)
    found = estimate_attention_ffn_one(_attention_ffn(x, running))
    return fuller(found.attention_memory, found.ffn_memory)


# ------------------------------------------------------------------------------------------- both pools together


def decode_room(x: Split) -> Number:
    """Requests that a decode worker has memory and seats for.

    Memory is no limit where not even one fits: the plan is refused anyway.
    """
    ranks = x.decode.plan.attention_dp * jnp.ones(())
    held = decode_memory(x.decode, ranks) if x.ffn is None else attention_memory(x.decode, ranks)
    room = jnp.where(held.requests < 1.0, 1e12, held.requests * ranks)
    return room if x.seats is None else jnp.minimum(room, x.seats)


def delivered(
    a: Sender, b: Receiver, workers: tuple[Number, Number], load: Load, rate: Number, ttft: Number, tpot: Number
) -> Delivered:
    """Rates, cost and power of `rate` requests/s; every GPU of both pools counts."""
    gpus = workers[0] * a.gpus + workers[1] * b.gpus
    output = rate * load.osl
    return Delivered(
        ttft=ttft,
        tpot=tpot,
        e2e=ttft + jnp.maximum(load.osl - 1.0, 0.0) * tpot,
        output_rate=output / gpus,
        total_rate=rate * (load.osl + load.isl) / gpus,
        user_rate=safe_divide(1.0, tpot),
        request_rate=rate,
        gpus=gpus,
        usd_per_mtok=safe_divide((workers[0] * a.price + workers[1] * b.price) / HOUR * 1e6, output),
        joules_per_token=safe_divide(workers[0] * a.power + workers[1] * b.power, output),
    )


def estimate_split_one(x: Split) -> SplitEstimate:
    """Price one split deployment in a closed loop of `load.concurrency` requests."""
    load, workers = x.decode.load, (x.prefill_workers, x.decode_workers)
    s_prefill, s_decode = (
        shard(p.architecture, p.device, p.topology, p.plan, p.coefficients) for p in (x.prefill, x.decode)
    )
    times = prefill_times(s_prefill, x.prefill.load)
    a = sender(x.prefill, times)
    b = receiver(x.decode, x.ffn)
    sides = (x.prefill.topology, x.decode.topology), (x.prefill.coefficients, x.decode.coefficients)
    line = link(*sides, workers[0] * a.gpus + workers[1] * b.gpus, x.apart, x.transfer.free)
    trip, most = journey(a, b, line, workers, layer_count(x.decode.architecture), x.transfer.layerwise)

    def decoding(running: Number) -> tuple[Number, Journey]:
        """TPOT of so many requests in decode, a worker, and the way to a first token that they leave."""
        tpot, half = jax.vmap(lambda n: decode_worker(x, s_decode, n).tpot)(jnp.stack([running, 0.5 * running]))
        own = x.transfer.first_step * first_token(x.decode, running, tpot)
        return tpot, replace(trip, fixed=trip.fixed + own, half=answer(load, half))

    def excess(share: Number) -> Number:
        """Above 0: more requests in decode than N users, or the pool before it, can keep there."""
        running = share * load.concurrency / workers[1]
        tpot, way = decoding(running)
        rate = workers[1] * decode_rate(running, load.osl, tpot)
        n, _ = in_flight(way, jnp.minimum(rate, most), running * workers[1])
        return jnp.maximum(n / load.concurrency, rate / most) - 1.0

    asked = _root(excess) * load.concurrency / workers[1]
    room = decode_room(x)
    running = jnp.minimum(asked, room)
    decode = decode_worker(x, s_decode, running)
    rate = workers[1] * decode_rate(running, load.osl, decode.tpot)
    ttft = (load.concurrency - running * workers[1]) / rate
    _, trip = decoding(running)
    prefill = computed(trip, met(trip, rate, running * workers[1]))
    travel = line.fixed + exposed(trip, prefill)
    held = asked if x.seats is None else jnp.minimum(asked, x.seats)
    memories = prefill_memory(x.prefill), worker_memory(x, held)
    return SplitEstimate(
        **vars(delivered(a, b, workers, load, rate, ttft, decode.tpot)),
        memory=fuller(*memories),
        prefill_memory=memories[0],
        decode_memory=memories[1],
        queue=jnp.maximum(ttft - trip.fixed - prefill - exposed(trip, prefill), 0.0),
        transfer=travel,
        running=running,
        prefill_busy=rate * times.service / trip.servers,
        decode_busy=running / room,
        prefill_step=times.alone,
        decode_step=decode.step,
    )


def _root(f: Callable[[Number], Number]) -> Number:
    """The zero in (0, 1] of an increasing function with f(1) >= 0, by bisection; differentiable (implicitly)."""

    def solve(g: Callable[[Number], Number], start: Number) -> Number:
        def halve(_: int, ends: tuple[Number, Number]) -> tuple[Number, Number]:
            low, high = ends
            middle = 0.5 * (low + high)
            above = g(middle) > 0
            return jnp.where(above, low, middle), jnp.where(above, middle, high)

        return jax.lax.fori_loop(0, BISECTIONS, halve, (0.0 * start, start))[1]

    return jax.lax.custom_root(f, jnp.ones(()), solve, lambda g, y: y / g(jnp.ones_like(y)))


@lru_cache(maxsize=1)
def _batched() -> Any:
    return by_size(estimate_split_one)


def estimate_split(splits: Split) -> SplitEstimate:
    """Estimates of a batch: every leaf has one leading axis of the same length N, and so has the result's."""
    result: SplitEstimate = _batched()(splits)
    return result


__all__ = [
    "Delivered",
    "Split",
    "SplitEstimate",
    "Transfer",
    "decode_worker",
    "delivered",
    "estimate_split",
    "estimate_split_one",
    "worker_memory",
]
