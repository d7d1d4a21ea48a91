"""The workers of either pool, priced once: every legal plan under every load, as a few numbers each. All in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dse.cost.afd import AttentionFfn, AttentionFfnEstimate, estimate_attention_ffn_one
from dse.cost.evaluate import Scenario
from dse.cost.pool_sides import Receiver, Sender, answer, burdens, receiver, sender
from dse.cost.pool_steps import decode_memory, decode_rate, decode_times, fuller, prefill_memory, prefill_times
from dse.cost.shard import Sharded, shard_scenario, speculating
from dse.cost.types import Load, Number, pytree
from dse.programs import quick
from dse.search.kernel import Tables, scenarios

PRICED = 16_384  # points of a pool a call


@pytree
class PrefillWorkers:
    """Prefill points as arrays (P,). `excess`: of memory over what is usable, relative."""

    side: Sender
    memory: Number
    excess: Number


@pytree
class DecodeWorkers:
    """Decode points as arrays (D,); `rate` requests/s at `running` requests."""

    side: Receiver
    tpot: Number
    half: Number  # seconds of an answer with half as many running
    running: Number
    rate: Number
    memory: Number
    excess: Number


def loaded(t: Tables, load: Load) -> Load:
    hit = load.prefix_hit if t.prefix_hit is None else t.prefix_hit[0]
    return replace(load, isl=t.isl[0], osl=t.osl[0], prefix_hit=hit)


def drafting(x: Scenario) -> Scenario:
    """Without its draft model where the load drafts nothing."""
    return replace(x, plan=speculating(x.plan, x.load))


def prefill_kernel(t: Tables, rows: Number) -> PrefillWorkers:
    """Designs of the pool under every chunk: leaves (rows, Q)."""
    x = scenarios(t, rows)
    sharded = jax.lax.optimization_barrier(jax.vmap(shard_scenario)(x))

    def point(x: Scenario, s: Sharded, load: Load) -> PrefillWorkers:
        x = replace(x, load=loaded(t, load))
        memory = prefill_memory(x)
        side = sender(x, prefill_times(s, x.load))
        return PrefillWorkers(side=side, memory=memory.total, excess=memory.total / memory.usable - 1.0)

    return jax.vmap(jax.vmap(point, (None, None, 0)), (0, 0, None))(x, sharded, t.loads)


def decode_kernel(t: Tables, rows: Number) -> DecodeWorkers:
    """Designs of the pool under every number of running requests (and drafted tokens): leaves (rows, Q)."""
    x = scenarios(t, rows)
    sharded = jax.lax.optimization_barrier(jax.vmap(shard_scenario)(x))

    def point(x: Scenario, s: Sharded, load: Load) -> DecodeWorkers:
        x = drafting(replace(x, load=loaded(t, load)))
        running = x.load.concurrency
        memory = decode_memory(x, running)
        tpot, half = jax.vmap(lambda n: decode_times(replace(s, plan=x.plan), x.load, n).tpot)(
            jnp.stack([running, 0.5 * running])
        )
        return DecodeWorkers(
            side=receiver(x),
            half=answer(x.load, half),
            tpot=tpot,
            running=running,
            rate=decode_rate(running, x.load.osl, tpot),
            memory=memory.total,
            excess=memory.total / memory.usable - 1.0,
        )

    return jax.vmap(jax.vmap(point, (None, None, 0)), (0, 0, None))(x, sharded, t.loads)


def experts_side(x: Scenario, gpus: Number) -> Scenario:
    """The experts' own GPUs of a decode worker: one rank each, on the same machine in the same formats."""
    one = jnp.ones_like(gpus)
    return replace(x, plan=replace(x.plan, tp=one, pp=one, cp=one, attention_dp=gpus, moe_tp=one, moe_ep=gpus))


def apart_kernel(t: Tables, rows: Number, gpus: Number, micro_batches: Number) -> DecodeWorkers:
    """The same with the experts on `gpus` GPUs of their own."""

    def point(x: Scenario, load: Load) -> DecodeWorkers:
        x = replace(x, load=loaded(t, load))
        ffn, running = experts_side(x, gpus), x.load.concurrency

        def price(n: Number) -> AttentionFfnEstimate:
            attention = replace(x, load=replace(x.load, concurrency=n))
            return estimate_attention_ffn_one(AttentionFfn(attention=attention, ffn=ffn, micro_batches=micro_batches))

        found, half = price(running), price(0.5 * running).tpot
        memory = fuller(found.attention_memory, found.ffn_memory)
        return DecodeWorkers(
            side=receiver(x, ffn),
            half=answer(x.load, half),
            tpot=found.tpot,
            running=running,
            rate=decode_rate(running, x.load.osl, found.tpot),
            memory=memory.total,
            excess=memory.total / memory.usable - 1.0,
        )

    return jax.vmap(jax.vmap(point, (None, 0)), (0, None))(scenarios(t, rows), t.loads)


@lru_cache(maxsize=8)
def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return quick(kernel)


def price_decode(t: Tables, experts: Sequence[tuple[int, int]]) -> DecodeWorkers:
    """Every decode point with each choice of the experts' own GPUs: leaves (designs * Q * experts,)."""
    parts = [
        price_pool(t, apart_kernel, np.float64(own), np.float64(m)) if own else price_pool(t, decode_kernel)
        for own, m in experts
    ]
    found: DecodeWorkers = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1).ravel(), *parts)
    return found


def price_pool(t: Tables, kernel: Callable[..., Any], *more: Any) -> Any:
    """Every point of a pool: leaves (designs * Q,), in the order of flat indices."""
    designs, q = int(t.designs_count), int(t.loads_count)
    block = min(designs, max(1, PRICED // q))
    parts = []
    for start in range(0, designs, block):
        rows = np.minimum(np.arange(start, start + block), designs - 1).astype(np.int32)
        part = compiled(kernel)(t, rows, *more)
        count = min(block, designs - start)
        parts.append(jax.tree.map(lambda leaf, n=count: np.asarray(leaf)[:n].reshape(n * q), part))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def dominant(w: PrefillWorkers, group: np.ndarray) -> np.ndarray:
    """Which prefill points no other of their group beats or equals in everything (of equals the first stays)."""
    numbers = [*burdens(w.side), w.memory]
    values = np.stack([np.asarray(x, np.float64) for x in numbers], axis=1)
    keep = np.ones(len(values), bool)
    for g in np.unique(group):
        members = np.flatnonzero(group == g)
        members = members[np.lexsort((members, *values[members].T[::-1]))]  # no one is beaten by a later one alone
        kept: list[int] = []
        for i in members:
            beaten = bool(kept) and bool((values[kept] <= values[i]).all(axis=1).any())
            keep[i] = not beaten
            if not beaten:
                kept.append(int(i))
    return keep


__all__ = [
    "DecodeWorkers",
    "PrefillWorkers",
    "compiled",
    "dominant",
    "drafting",
    "experts_side",
    "loaded",
    "prefill_kernel",
    "price_decode",
    "price_pool",
]
