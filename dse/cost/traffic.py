"""Bytes a second that each network level carries under a plan, by what sends them. Pure JAX.

Level 0 carries what stays inside the innermost unit (NVLink); level l > 0 every byte that leaves a unit of level l-1,
also those that turn further out: what a GPU's NIC sends, and the uplinks above it. Volumes are those of the algorithms
that `collectives` prices: rings level by level (all-reduce 2 S (g-1)/g), an all-to-all or its deduplicated forms.
Ignored: context parallelism, the head's gather, protocol overheads (LL doubles bytes), one-shot all-reduces, which read
(n-1) S.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp

from dse.cost import collectives as coll
from dse.cost.collectives import Group
from dse.cost.evaluate import Scenario
from dse.cost.shard import exchanges, stage_share
from dse.cost.types import Number, Routed, Topology, pytree
from dse.numerics import least, pick


@pytree
class Traffic:
    """Bytes/s that one GPU sends over each level, leaves (levels,): the mean GPU of a replica."""

    reduce: Number  # TP all-reduces (Megatron SP moves the same bytes)
    exchange: Number  # MoE dispatch and combine, and slices of experts under MoE-TP
    pipeline: Number  # activations to the next stage


KINDS = ("reduce", "exchange", "pipeline")


def _levels(values: Iterable[Number]) -> Number:
    """(levels,) One number a level, some of them plain Python's."""
    return jnp.stack([jnp.asarray(x) * jnp.ones(()) for x in values])


def _outwards(own: list[Number]) -> Number:
    """(levels,) What each level carries, where `own` turns at each: bytes that turn further out pass the NIC too."""
    passing: Number = 0.0
    found = []
    for amount in reversed(own[1:]):
        passing = passing + amount
        found.append(passing)
    return _levels((own[0], *reversed(found)))


def gathered(g: Group) -> Number:
    """(levels,) Bytes a rank sends for each byte of an all-gather's (or reduce-scatter's) whole buffer: (n-1)/n of it.

    g_l units meet at level l, each rank with the share 1/within[l-1] of the buffer: (g_l - 1)/(g_l within[l-1]).
    """
    inner: Number = 1.0
    own = []
    for factor, outer in zip(g.factors(), g.within, strict=True):
        own.append((factor - 1.0) / (factor * inner))
        inner = outer
    return _outwards(own)


def swapped(g: Group) -> Number:
    """(levels,) Of each byte that a rank sends in a uniform all-to-all, what level l carries."""
    inside = (g.within[0] - 1.0) / g.n
    return _levels((inside, *((g.n - w) / g.n for w in g.within[:-1])))


def copies(topology: Topology, g: Group, routed: Routed, mode: Number) -> Number:
    """(levels,) Copies of a token that a rank sends over each level to its experts, by the rule of `dispatch`.

    Under `auto` the rule that keeps the busiest level least busy.
    """
    rates = jnp.stack([coll.bandwidth(level) * jnp.ones(()) for level in topology.levels])
    to_ranks = coll.distinct(g.n, routed.top_k)

    def by_node(limit: Number) -> Number:
        own = [to_ranks * (g.within[0] - 1.0) / g.within[0]]
        for inner in g.within[:-1]:
            units = g.n / inner
            own.append(coll.distinct(jnp.minimum(limit, units), routed.top_k) * (units - 1.0) / units)
        return _levels(own)

    limit = jnp.where(routed.group_limit > 0, routed.group_limit, 1e9)
    options = [routed.top_k * swapped(g), to_ranks * swapped(g), by_node(jnp.asarray(1e9)), by_node(limit)]
    busiest = [jnp.max(x / rates) for x in options]
    lowest = least(busiest)
    auto = options[-1]
    for option, time in zip(reversed(options), reversed(busiest), strict=True):
        auto = jnp.where(time <= lowest * (1.0 + 1e-9), option, auto)
    return pick(mode, [auto, *options])


def hops(g: Group) -> Number:
    """(levels,) Of the n-1 hops of a pipeline, those that level l carries."""
    units = [g.n / w for w in g.within]
    return _levels((g.n - units[0], *(u - 1.0 for u in units[:-1])))


def traffic_of(x: Scenario, tokens: Number) -> Traffic:
    """What `tokens` a second on each attention-DP rank (prompt or verified ones) make a GPU of its replica send."""
    plan, arch, p = x.plan, x.architecture, x.plan.precision
    share = stage_share(arch, plan)
    ring = 2.0 * gathered(coll.group(x.topology, plan.tp, 1.0)) * 2.0 * arch.hidden
    reduce = jnp.zeros(len(x.topology.levels))
    exchange = jnp.zeros(len(x.topology.levels))
    for mixer in arch.mixers:
        reduce = reduce + mixer.count * ring
    for ffn in arch.ffns:
        travels: Number = 0.0
        if ffn.routed is not None:
            routed = ffn.routed
            travels = exchanges(plan) * jnp.where(routed.top_k > 0, 1.0, 0.0)
            mode = 0.0 if plan.dispatch is None else plan.dispatch
            ranks = coll.group(x.topology, plan.moe_ep, plan.moe_tp)
            element = routed.d_in * (p.dispatch_bytes + p.combine_bytes)
            sent = copies(x.topology, ranks, routed, mode) * element / plan.tp
            received = plan.attention_dp * routed.top_k / plan.moe_ep * element
            slices = gathered(coll.group(x.topology, plan.moe_tp, 1.0)) * received
            exchange = exchange + ffn.count * travels * (sent + slices)
        reduce = reduce + ffn.count * (1.0 - travels) * ring
    stages = coll.group(x.topology, plan.pp, plan.tp * plan.attention_dp * plan.cp)
    boundary = hops(stages) / plan.pp * 2.0 * arch.hidden / plan.tp
    local = tokens / plan.cp
    return Traffic(reduce=local * share * reduce, exchange=local * share * exchange, pipeline=local * boundary)


__all__ = ["KINDS", "Traffic", "copies", "gathered", "hops", "swapped", "traffic_of"]
