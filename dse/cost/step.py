"""One engine step of a sharded model: prefill, decode or both at once, with its breakdown."""

from __future__ import annotations

from typing import cast

import jax.numpy as jnp

from dse.cost.collectives import seconds
from dse.cost.operators import context, experts_touched, keys_read, visible_keys
from dse.cost.overlap import LayerTimes, micro_batches, overlapped
from dse.cost.shard import CoreCost, FeedForwardCost, MixerCost, RoutedCost, SequenceCost, Sharded
from dse.cost.types import Number, pytree, replace
from dse.numerics import pick, safe_divide, smooth_max


@pytree
class Segment:
    """Alike requests of a step: `tokens` new tokens each, the first at position `start`, averaged over `span`."""

    requests: Number
    tokens: Number
    start: Number
    span: Number


@pytree
class Batch:
    """What one attention-DP rank does in one step; `None` where the step has no such part."""

    prefill: Segment | None
    decode: Segment | None


@pytree
class Step:
    """Seconds of one stage's step. Communication parts are as if nothing overlapped; `hidden` is what overlap saves."""

    projections: Number
    attention: Number
    dense: Number
    experts: Number
    elementwise: Number
    head: Number
    reduce: Number
    exchange: Number
    sequence: Number
    hidden: Number
    overhead: Number
    tokens: Number  # tokens this rank computes
    layer: Number  # seconds a layer, for drafting

    @property
    def body(self) -> Number:
        """The stage's layers: what every stage of a pipeline does."""
        compute = self.projections + self.attention + self.dense + self.experts + self.elementwise
        return compute + self.reduce + self.exchange + self.sequence - self.hidden

    @property
    def total(self) -> Number:
        """With the head and the engine's overhead, which a pipeline pays once."""
        return self.body + self.head + self.overhead


BODY = ("projections", "attention", "dense", "experts", "elementwise", "reduce", "exchange", "sequence", "hidden")


@pytree
class _Tokens:
    """Token counts of a rank: what GEMMs see, what the expert group sees, what a rank sends to experts."""

    rank: Number
    group: Number
    sent: Number
    rows: Number
    prefill: Number
    decode: Number


def _tokens(s: Sharded, batch: Batch) -> _Tokens:
    """CP ranks share a prompt's tokens in prefill; in decode each computes every token against its part of the KV."""
    plan = s.plan
    prefill: Number = 0.0
    rows: Number = 0.0
    decode: Number = 0.0
    if batch.prefill is not None:
        p = batch.prefill
        prefill = p.requests * p.tokens / plan.cp
        rows = p.requests * jnp.minimum(safe_divide(p.tokens, p.span), 1.0)
    if batch.decode is not None:
        decode = batch.decode.requests * batch.decode.tokens
    return _Tokens(
        rank=prefill + decode,
        group=(prefill * plan.cp + decode) * plan.attention_dp,
        sent=(prefill + decode / plan.cp) / plan.tp,
        rows=rows + decode,
        prefill=prefill,
        decode=decode,
    )


def _core(cost: CoreCost, seg: Segment, prefill: bool, s: Sharded) -> Number:
    """Scores and values of alike requests on one rank: CP ranks share out a prompt's queries, and decode's keys."""
    cp, tokens = s.plan.cp, seg.tokens
    pairs = tokens * visible_keys(cost.core, seg.start, seg.span) / cp
    read = keys_read(cost.core, seg.start, seg.span, tokens)
    if prefill:
        cached = seg.start + 0.5 * (seg.span - tokens)
        compute = pairs * cost.pair_prefill + cost.rematerialise * cached / cp
        memory = read * cost.key + tokens / cp * cost.token_prefill
    else:
        compute = pairs * cost.pair_decode
        memory = read / cp * cost.key + tokens * cost.token_decode
    return smooth_max(seg.requests * compute, seg.requests * memory, s.c.rounding)


def _attention(mixer: MixerCost, batch: Batch, tokens: _Tokens, s: Sharded) -> Number:
    """Cores, indexers and recurrences of both parts of the step."""
    total: Number = 0.0
    for seg in (batch.prefill, batch.decode):
        if seg is None:
            continue
        if mixer.core is not None:
            total = total + _core(mixer.core, seg, seg is batch.prefill, s)
            if mixer.indexer is not None:
                pairs = seg.tokens * (seg.start + 0.5 * seg.span) / s.plan.cp
                read = context(seg.start, seg.span, seg.tokens) / s.plan.cp
                total = total + seg.requests * (pairs * mixer.indexer.pair + read * mixer.indexer.key)
        if mixer.state is not None:
            total = total + seg.requests * mixer.state.request
    if mixer.state is not None:
        total = total + tokens.rank * mixer.state.token
    return total


def _sequence(cost: SequenceCost, core: CoreCost, batch: Batch, attention: Number, s: Sharded) -> Number:
    """Exposed communication of context parallelism: the asked method, or the least (prefill); pass-Q (decode).

    Ulysses: all-to-all of Q, K, V and outputs; ring: N-1 neighbour steps hidden behind attention; pass-KV: all-gather
    of keys and values; pass-Q: queries around, outputs back.
    """
    n = s.plan.cp
    total: Number = 0.0
    if batch.prefill is not None:
        p = batch.prefill
        tokens = p.requests * p.tokens / n
        cached = p.requests * context(p.start, p.span, p.tokens)
        ulysses = seconds(cost.swap, tokens * (cost.query_bytes + cost.cache_bytes))
        hop = cost.neighbour(cached / n * cost.cache_bytes)
        ring = (n - 1.0) * jnp.maximum(0.0, hop - attention / n)
        pass_kv = seconds(cost.gather, cached * cost.cache_bytes)
        query = tokens * n * cost.query_bytes * 0.5
        pass_q = seconds(cost.gather, query) + seconds(cost.swap, query)
        least = jnp.minimum(jnp.minimum(ulysses, ring), jnp.minimum(pass_kv, pass_q))
        total = pick(cost.method, [least, ulysses, ring, pass_kv, pass_q])
    if batch.decode is not None:
        total = total + seconds(cost.swap, batch.decode.requests * batch.decode.tokens * cost.decode_bytes)
    return total


def _experts(r: RoutedCost, tokens: _Tokens, s: Sharded) -> tuple[Number, Number, Number]:
    """Expert GEMMs on the busiest rank, dispatch and combine (seconds a layer)."""
    plan = s.plan
    copies = tokens.group * r.top_k / plan.moe_ep
    touched = experts_touched(r.experts, r.top_k, tokens.group, plan.moe_ep)
    busiest = copies * r.imbalance
    work = jnp.where(r.top_k > 0, r.work(busiest, touched), 0.0)
    slices = seconds(r.slice_gather, copies * r.slice_bytes) * 0.5
    travel = [r.exchange * (line(tokens.sent * r.imbalance) + slices) for line in (r.dispatch, r.combine)]
    return work, travel[0], travel[1]


def _feed_forward(f: FeedForwardCost, tokens: _Tokens, latency: Number, s: Sharded) -> tuple[Number, ...]:
    """Dense seconds, expert seconds, dispatch, combine, share of experts in the down projection: a layer."""
    dense = sum((roof(tokens.rank, rounding=s.c.rounding) for roof in f.dense), start=0.0) + f.kernels * latency
    if f.routed is None:
        return dense, 0.0, 0.0, 0.0, 0.0
    work, dispatch, combine = _experts(f.routed, tokens, s)
    latent = sum((roof(tokens.rank, rounding=s.c.rounding) for roof in f.routed.dense), start=0.0)
    return dense, work + latent, dispatch, combine, f.routed.down_share * work


def step(s: Sharded, batch: Batch, rule: Number) -> Step:
    """Price one step under an overlap rule. Attention is shared out over the feed-forward kinds by their counts."""
    if s.draft is not None:
        return _drafted(s, batch, step(replace(s, draft=None), batch, rule))
    micro = micro_batches(rule)
    batch = Batch(
        prefill=None if batch.prefill is None else _scaled(batch.prefill, micro),
        decode=None if batch.decode is None else _scaled(batch.decode, micro),
    )
    tokens = _tokens(s, batch)
    latency = s.c.kernel_decode
    if batch.prefill is not None:  # captured graphs serve pure decode only
        latency = jnp.where(batch.prefill.requests > 0, s.c.kernel_prefill, s.c.kernel_decode)
    reduce = seconds(s.reduce, tokens.rank * s.reduce_bytes)
    zero: Number = 0.0
    projections, attention, sequence, elementwise, mixers = zero, zero, zero, zero, zero
    for m in s.mixers:
        gemms = sum((roof(tokens.rank, rounding=s.c.rounding) for roof in m.gemms), start=0.0)
        core = _attention(m, batch, tokens, s)
        projections = projections + m.count * gemms
        attention = attention + m.count * core
        elementwise = elementwise + m.count * (tokens.rank * s.elementwise + m.kernels * latency)
        mixers = mixers + m.count
        if m.sequence is not None and m.core is not None:
            present = jnp.where(m.core.core.kv_elements > 0, m.count, 0.0)
            sequence = sequence + present * _sequence(m.sequence, m.core, batch, core, s)
    mixing = projections + attention + elementwise
    layers = sum((f.count for f in s.ffns), start=0.0)
    total, dense, experts, exchange, reduces = zero, zero, zero, zero, mixers * reduce
    for f in s.ffns:
        per_layer = _feed_forward(f, tokens, latency, s)
        shared, routed, dispatch, combine, down = (f.count * x for x in per_layer)
        share = safe_divide(f.count, layers)
        closing = f.count * f.reduce * reduce
        times = LayerTimes(
            attention=share * (mixing + sequence),  # what a ring hides behind attention is hidden already
            shared=shared,
            routed=routed,
            routed_down=down,
            reduce=share * mixers * reduce + closing,
            dispatch=dispatch,
            combine=combine,
        )
        total = total + overlapped(rule, times, s.c)
        dense, experts = dense + shared, experts + routed
        exchange, reduces = exchange + dispatch + combine, reduces + closing
    # A model without feed-forward layers (pure SSM) has nothing to share its mixers out to.
    total = total + jnp.where(layers > 0, 0.0, mixing + sequence + mixers * reduce)
    head = s.head(tokens.rows, rounding=s.c.rounding)
    communication = reduces + exchange + sequence
    fill = jnp.where(micro > 1, safe_divide(reduces + exchange, layers), 0.0)
    hidden = mixing + dense + experts + communication - total
    requests = sum((seg.requests for seg in (batch.prefill, batch.decode) if seg is not None), start=0.0)
    return Step(
        projections=micro * projections,
        attention=micro * attention,
        dense=micro * dense,
        experts=micro * experts,
        elementwise=micro * elementwise,
        head=micro * head,
        reduce=micro * reduces,
        exchange=micro * exchange,
        sequence=micro * sequence,
        hidden=micro * hidden - fill,
        overhead=s.c.step_overhead + micro * requests * s.c.request_overhead,
        tokens=micro * tokens.rank,
        layer=micro * safe_divide(total, jnp.maximum(layers, mixers)),
    )


def _drafted(s: Sharded, batch: Batch, found: Step) -> Step:
    """The same step with a draft model in it, which computes every prompt too, part by part.

    What is drafted costs steps of its own: a pipeline passes `layer` once a stage and the target's head once a drafted
    token (`serving.cycle`), so `layer` is the draft's stage and the difference of the heads, shared out over stages.
    """
    small, plan = cast(Sharded, s.draft), s.plan
    present = 1.0 if plan.draft is None else plan.draft.present
    none = jnp.zeros(())
    layer, prompts = found.layer, {}
    if batch.decode is not None:
        token = Segment(requests=batch.decode.requests, tokens=1.0, start=batch.decode.start, span=batch.decode.span)
        one = step(small, Batch(prefill=None, decode=token), none)
        layer = jnp.where(present > 0, one.body + (one.head - found.head) / plan.pp, layer)
    if batch.prefill is not None:
        whole = step(small, Batch(prefill=batch.prefill, decode=None), none)
        share = jnp.where(batch.prefill.requests > 0, present, 0.0)
        prompts = {name: getattr(found, name) + share * getattr(whole, name) for name in BODY}
    return replace(found, layer=layer, **prompts)


def _scaled(seg: Segment, micro: Number) -> Segment:
    return Segment(requests=seg.requests / micro, tokens=seg.tokens, start=seg.start, span=seg.span)
