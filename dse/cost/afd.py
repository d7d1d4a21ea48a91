"""Attention-FFN disaggregation in decode: attention workers hold the KV cache, FFN workers the experts.

Per layer a micro-batch computes attention (T_a), travels to the experts (T_c), computes there (T_f) and travels back.
m micro-batches play ping-pong, so a layer of all of them lasts max(T_a + T_f + 2 T_c, m max(T_a, T_f, T_c)): the round
of one, or the busiest of the three (MegaScale-Infer, Zhu et al. 2025, section 4.1; both directions of a link run at
once). Times are means over the kinds of layer.
Ignored: attention that starts before a whole micro-batch is back, FFN ranks that serve two models.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax.numpy as jnp

from dse.cost import collectives as coll
from dse.cost.collectives import Line, distinct
from dse.cost.evaluate import Scenario, gpus_of_replica
from dse.cost.memory import Memory, memory
from dse.cost.serving import accepted_of
from dse.cost.shard import shard
from dse.cost.step import Batch, Segment, Step, step
from dse.cost.types import Architecture, Number, pytree
from dse.numerics import safe_divide
from dse.programs import program
from dse.units import HOUR


@pytree
class AttentionFfn:
    """One decode deployment: a group of attention GPUs and a group of FFN GPUs, `load.concurrency` requests in all.

    The FFN plan's `attention_dp` is the number of its ranks (tp 1): each computes its share of the tokens' dense part
    and holds its share of the experts. Both plans have one pipeline stage (whoever makes them refuses more).
    """

    attention: Scenario
    ffn: Scenario
    micro_batches: Number
    free: Number = 0.0  # 1: the exchange costs nothing


@pytree
class AttentionFfnEstimate:
    """SI units; rates are of one GPU of either group. `attention`, `ffn`, `transfer`: a layer of one micro-batch."""

    tpot: Number
    output_rate: Number
    user_rate: Number
    gpus: Number
    usd_per_mtok: Number
    attention: Number
    ffn: Number
    transfer: Number  # one way
    layer: Number  # all micro-batches
    head: Number
    attention_step: Step
    attention_memory: Memory
    ffn_memory: Memory


def attention_part(arch: Architecture) -> Architecture:
    """The model without its feed-forward layers: what an attention worker computes and holds (embeddings too)."""
    return replace(
        arch, ffns=tuple(replace(f, count=f.count * 0.0) for f in arch.ffns), mtp_params=arch.mtp_params * 0.0
    )


def ffn_part(arch: Architecture) -> Architecture:
    """The model without mixers, embeddings and head: what an FFN worker computes and holds."""
    return replace(
        arch,
        mixers=tuple(replace(m, count=m.count * 0.0) for m in arch.mixers),
        vocab=arch.vocab * 0.0,
        other_params=arch.other_params * 0.0,
    )


def layers_of(arch: Architecture) -> Number:
    mixers = sum((m.count for m in arch.mixers), start=jnp.zeros(()))
    return jnp.maximum(mixers, sum((f.count for f in arch.ffns), start=jnp.zeros(())))


def exchange_bytes(arch: Architecture, x: AttentionFfn, tokens: Number) -> tuple[Number, Number]:
    """Bytes that one layer's `tokens` send to the FFN ranks and get back: a copy for each rank that is needed.

    Means over the kinds of layer: dense ones need one rank, routed ones the distinct ranks of k uniform choices.
    """
    p, ranks = x.ffn.plan.precision, x.ffn.plan.moe_ep
    there: Number = 0.0
    back: Number = 0.0
    for ffn in arch.ffns:
        copies: Number = 1.0
        width = arch.hidden
        if ffn.routed is not None:
            routed = ffn.routed.top_k > 0
            copies = jnp.where(routed, distinct(ranks, jnp.maximum(ffn.routed.top_k, 1.0)) * x.ffn.plan.moe_tp, 1.0)
            width = jnp.where(routed, ffn.routed.d_in, arch.hidden)
        there = there + ffn.count * copies * width * p.dispatch_bytes
        back = back + ffn.count * copies * width * p.combine_bytes
    layers = layers_of(arch)
    return tokens * safe_divide(there, layers), tokens * safe_divide(back, layers)


def _between(x: AttentionFfn, gpus: Number) -> Line:
    """The slowest level that both groups span together."""
    sides = (x.attention, x.ffn)
    lines = [coll.point_to_point(s.topology, coll.group(s.topology, gpus, 1.0), s.coefficients) for s in sides]
    return Line(
        fixed=jnp.maximum(lines[0].fixed, lines[1].fixed), per_byte=jnp.maximum(lines[0].per_byte, lines[1].per_byte)
    )


def _side(x: Scenario, arch: Architecture, requests: Number, tokens: Number) -> Step:
    """A decode step of one side with `requests` on each of its attention-DP ranks; nothing overlaps inside it."""
    sharded = shard(arch, x.device, x.topology, x.plan, x.coefficients)
    seg = Segment(requests=requests, tokens=tokens, start=x.load.isl, span=x.load.osl)
    return step(sharded, Batch(prefill=None, decode=seg), jnp.zeros(()))


def estimate_attention_ffn_one(x: AttentionFfn) -> AttentionFfnEstimate:
    """Price one deployment."""
    load, m = x.attention.load, x.micro_batches
    arch = x.attention.architecture
    draft, accepted = load.drafted, accepted_of(load)
    groups = gpus_of_replica(x.attention.plan), gpus_of_replica(x.ffn.plan)
    gpus = groups[0] + groups[1]
    layers = layers_of(arch)
    requests = load.concurrency / m
    # Below one request a rank, some attention ranks hold none; FFN ranks share whatever there is.
    a_rank = jnp.maximum(requests / x.attention.plan.attention_dp, 1.0)
    one = _side(x.attention, attention_part(arch), a_rank, 1.0 + draft)
    two = _side(x.ffn, ffn_part(arch), requests / x.ffn.plan.attention_dp, 1.0 + draft)
    attention = one.body / layers
    ffn = (two.body - two.exchange) / layers  # tokens come from the attention workers, not from each other
    line = _between(x, gpus)
    there, back = exchange_bytes(arch, x, requests * (1.0 + draft))
    skew = 1.0 + (x.ffn.coefficients.imbalance - 1.0) * (1.0 - 1.0 / x.ffn.plan.moe_ep)
    busiest = jnp.maximum(1.0 / groups[0], skew / groups[1]) * jnp.maximum(there, back)
    transfer = jnp.where(x.free > 0, 0.0, line(busiest))
    layer = jnp.maximum(attention + ffn + 2.0 * transfer, m * jnp.maximum(jnp.maximum(attention, ffn), transfer))
    head = m * one.head * (1.0 + draft)
    tpot = (layers * layer + draft * layer + head + one.overhead) / accepted
    output = load.concurrency / tpot
    price = groups[0] * x.attention.device.price + groups[1] * x.ffn.device.price
    return AttentionFfnEstimate(
        tpot=tpot,
        output_rate=output / gpus,
        user_rate=safe_divide(1.0, tpot),
        gpus=gpus,
        usd_per_mtok=safe_divide(price / HOUR * 1e6, output),
        attention=attention,
        ffn=ffn,
        transfer=transfer,
        layer=layer,
        head=head,
        attention_step=one,
        attention_memory=attention_memory(x.attention, load.concurrency),
        ffn_memory=_held(x.ffn, ffn_part(arch), requests),
    )


def attention_memory(x: Scenario, requests: Number) -> Memory:
    """Of an attention GPU whose group keeps `requests` requests."""
    return _held(x, attention_part(x.architecture), requests)


def _held(x: Scenario, part: Architecture, requests: Number) -> Memory:
    """Memory for a part of the model under pure decode."""
    load = replace(x.load, concurrency=requests, chunk=jnp.zeros_like(requests))
    return memory(part, x.device, x.plan, load, x.coefficients)


@lru_cache(maxsize=1)
def _batched() -> Any:
    return program(estimate_attention_ffn_one, in_axes=0)


def estimate_attention_ffn(batch: AttentionFfn) -> AttentionFfnEstimate:
    """Estimates of a batch: every leaf has one leading axis of the same length N, and so has the result's."""
    result: AttentionFfnEstimate = _batched()(batch)
    return result


__all__ = [
    "AttentionFfn",
    "AttentionFfnEstimate",
    "attention_memory",
    "attention_part",
    "estimate_attention_ffn",
    "estimate_attention_ffn_one",
    "ffn_part",
]
