"""A model cut by a plan onto a device and a network: all that does not depend on the batch.

`shard` turns the nouns into lines (rooflines in tokens, collectives in bytes, bytes a token), so that pricing one more
batch of the same plan costs a few multiply-adds. A sweep computes it once a plan; a single estimate, once.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from dse.cost import collectives as coll
from dse.cost.coefficients import Coefficients
from dse.cost.collectives import Fastest, Line, Lines
from dse.cost.eplb import imbalance, with_replicas
from dse.cost.operators import GemmShape, shard_gemm
from dse.cost.roofline import Grouped, Roofline, gemm, grouped, rates
from dse.cost.types import (
    Architecture,
    Core,
    Device,
    FeedForward,
    Indexer,
    Load,
    Mixer,
    Number,
    Plan,
    Routed,
    Topology,
    pytree,
    replace,
)
from dse.numerics import ceil_ratio, safe_divide


@pytree
class CoreCost:
    """Attention of one rank. Seconds a (query, key) pair, a key read, a token, a cached token."""

    core: Core
    pair_prefill: Number
    pair_decode: Number
    key: Number
    token_prefill: Number  # queries in, outputs out
    token_decode: Number
    rematerialise: Number


@pytree
class IndexerCost:
    """The indexer of sparse attention on one rank, seconds."""

    pair: Number  # a (query, index key) pair
    key: Number  # an index key read


@pytree
class StateCost:
    """A recurrence on one rank, seconds."""

    request: Number  # state read and written
    token: Number


@pytree
class SequenceCost:
    """Context parallelism of one mixer: bytes a token of each method, and the lines they travel on."""

    method: Number
    query_bytes: Number  # a token: queries and outputs, this TP rank
    cache_bytes: Number  # a token: keys and values
    decode_bytes: Number  # a decode token: queries and partial outputs
    swap: Lines
    gather: Lines
    neighbour: Line


@pytree
class MixerCost:
    """Layers of one kind of mixing (attention, recurrence) on one stage."""

    count: Number  # layers of this kind on one stage
    gemms: tuple[Roofline, ...]
    kernels: Number  # launched a layer
    core: CoreCost | None
    indexer: IndexerCost | None
    state: StateCost | None
    sequence: SequenceCost | None


@pytree
class RoutedCost:
    """Routed experts of one layer, on one rank of their group."""

    work: Grouped
    dense: tuple[Roofline, ...]  # latent projections
    experts: Number
    top_k: Number
    down_share: Number  # share of the experts' work in the down projection (overlaps with the combine)
    imbalance: Number
    exchange: Number  # 1: tokens are dispatched; 0: every rank already holds them
    dispatch: Fastest  # tokens a rank sends
    combine: Fastest
    slice_gather: Lines  # MoE-TP: all-gather of received copies, reduce-scatter of results
    slice_bytes: Number  # a copy


@pytree
class FeedForwardCost:
    """Layers of one kind of feed-forward part on one stage."""

    count: Number
    dense: tuple[Roofline, ...]  # the dense part, or the shared experts
    kernels: Number  # launched a layer
    reduce: Number  # 1: this kind ends in a TP all-reduce
    routed: RoutedCost | None


@pytree
class Sharded:
    """One pipeline stage of one replica, priced up to the batch."""

    plan: Plan
    mixers: tuple[MixerCost, ...]
    ffns: tuple[FeedForwardCost, ...]
    head: Roofline
    elementwise: Number  # seconds a token a layer
    reduce: Lines  # TP all-reduce, bytes
    reduce_bytes: Number  # a token
    boundary: Line  # to the next stage, bytes
    boundary_bytes: Number  # a token
    c: Coefficients
    draft: Sharded | None = None  # the draft model on the same GPUs


def _roof(shape: GemmShape, part: str, plan: Plan, device: Device, c: Coefficients) -> Roofline:
    p = plan.precision
    weight, act, rate = (getattr(p, f"{part}_{field}") for field in ("bytes", "act", "rate"))
    return gemm(shape, weight, act, rate, device, c)


def _kernels(shapes: list[GemmShape], act_bytes: Number, c: Coefficients) -> Number:
    """Kernels to launch for the (padded) matrices that exist, with the quantisation of their inputs."""
    present = sum((jnp.where(s.weights() > 0, 1.0, 0.0) for s in shapes), start=0.0)
    return present * (1.0 + jnp.where(act_bytes < 2.0, c.quantise_kernels, 0.0))


def _core(core: Core, plan: Plan, device: Device, c: Coefficients) -> CoreCost:
    heads = core.heads / plan.tp
    stream = device.bandwidth * c.core_memory
    dims, dims_decode = core.score_dim + core.value_dim, core.score_dim_decode + core.value_dim_decode
    return CoreCost(
        core=core,
        pair_prefill=2.0 * heads * dims / (device.peak_bf16 * c.core_prefill),
        pair_decode=2.0 * heads * dims_decode / (device.peak_bf16 * c.core_decode),
        key=plan.precision.kv_bytes * core.kv_elements / jnp.minimum(plan.tp, core.kv_heads) / stream,
        token_prefill=2.0 * heads * dims / stream,
        token_decode=2.0 * heads * dims_decode / stream,
        rematerialise=2.0 * core.rematerialise / plan.tp / rates(device, c)[0],
    )


def _sequence(core: Core, plan: Plan, topology: Topology, c: Coefficients) -> SequenceCost | None:
    """Plans of a batch that never shard the sequence carry no method (None), and the program no term for it."""
    if plan.cp_method is None:
        return None
    ranks = coll.group(topology, plan.cp, plan.tp)
    heads = core.heads / plan.tp
    cache = core.kv_elements / jnp.minimum(plan.tp, core.kv_heads)
    return SequenceCost(
        method=plan.cp_method,
        query_bytes=2.0 * heads * (core.score_dim + core.value_dim),
        cache_bytes=cache * 2.0,
        decode_bytes=2.0 * heads * (core.score_dim_decode + core.value_dim_decode) * jnp.where(plan.cp > 1, 1.0, 0.0),
        swap=coll.all_to_all(topology, ranks, c),
        gather=coll.all_gather(topology, ranks, c),
        neighbour=coll.point_to_point(topology, ranks, c),
    )


def _indexer(indexer: Indexer, core: Core, device: Device, c: Coefficients) -> IndexerCost:
    """Indexer in fp8 where the device has it, replicated over TP; one byte an index-key element (DeepSeek-V3.2)."""
    peak = jnp.where(device.peak_fp8 > 0, device.peak_fp8, device.peak_bf16)
    return IndexerCost(
        pair=2.0 * indexer.heads * indexer.dim * core.ratio / (peak * c.core_prefill),
        key=indexer.dim * core.ratio / (device.bandwidth * c.core_memory),
    )


def stage_share(arch: Architecture, plan: Plan) -> Number:
    """Share of the layers on the fullest stage: ceil(L/P)/L, L the larger of mixing and feed-forward layers."""
    mixers = sum((m.count for m in arch.mixers), start=jnp.zeros(()))
    layers = jnp.maximum(mixers, sum((f.count for f in arch.ffns), start=jnp.zeros(())))
    return safe_divide(ceil_ratio(layers, plan.pp), layers)


def _mixer(mixer: Mixer, share: Number, plan: Plan, device: Device, topology: Topology, c: Coefficients) -> MixerCost:
    core, state, indexer = mixer.core, mixer.state, mixer.indexer
    shapes = [shard_gemm(g, plan.tp, core.kv_heads if core is not None else 1.0) for g in mixer.gemms]
    kernels = _kernels(shapes, plan.precision.mixer_act, c) + c.elementwise_kernels
    if core is not None:
        kernels = kernels + jnp.where(core.kv_elements > 0, 1.0, 0.0)
    if indexer is not None:
        kernels = kernels + jnp.where(indexer.heads > 0, 2.0, 0.0)  # scores, top-k
    state_cost = None
    if state is not None:
        kernels = kernels + jnp.where(state.state_bytes > 0, 2.0, 0.0)  # convolution, recurrence
        state_cost = StateCost(
            request=2.0 * state.state_bytes / plan.tp / (device.bandwidth * c.core_memory),
            token=state.flops_per_token / plan.tp / (device.peak_bf16 * c.core_decode),
        )
    return MixerCost(
        count=mixer.count * share,
        gemms=tuple(_roof(s, "mixer", plan, device, c) for s in shapes),
        kernels=kernels,
        core=None if core is None else _core(core, plan, device, c),
        indexer=None if indexer is None or core is None else _indexer(indexer, core, device, c),
        state=state_cost,
        sequence=None if core is None else _sequence(core, plan, topology, c),
    )


def expert_shapes(routed: Routed, moe_tp: Number) -> tuple[GemmShape, GemmShape]:
    """Up (with gate) and down projections of one expert on one MoE-TP rank."""
    width = routed.width / moe_tp
    return (
        GemmShape(k=routed.d_in, n=jnp.maximum(routed.matrices - 1.0, 0.0) * width),
        GemmShape(k=width, n=routed.d_in),
    )


def dense_shapes(ffn: FeedForward, hidden: Number, tp: Number) -> list[GemmShape]:
    """Up (with gate) and down projections of the dense part or the shared experts."""
    width = ffn.width / tp
    return [
        GemmShape(k=hidden * jnp.where(ffn.width > 0, 1.0, 0.0), n=(ffn.matrices - 1.0) * width),
        GemmShape(k=width, n=hidden * jnp.where(ffn.width > 0, 1.0, 0.0)),
    ]


def extra_shapes(routed: Routed, hidden: Number) -> list[GemmShape]:
    """Projections into and out of the experts' latent space, replicated."""
    width = hidden * jnp.where(routed.latent > 0, 1.0, 0.0)
    return [GemmShape(k=width, n=routed.latent), GemmShape(k=routed.latent, n=width)]


def exchanges(plan: Plan) -> Number:
    """1 where ranks of the expert group hold different tokens, so that tokens must travel to their experts."""
    return jnp.where(plan.attention_dp * plan.cp > 1, 1.0, 0.0)


def _routed(
    routed: Routed, hidden: Number, plan: Plan, device: Device, topology: Topology, c: Coefficients
) -> RoutedCost:
    ranks = coll.group(topology, plan.moe_ep, plan.moe_tp)
    slices = coll.group(topology, plan.moe_tp, 1.0)
    mode = 0.0 if plan.dispatch is None else plan.dispatch
    p = plan.precision
    skew = imbalance(c.imbalance, routed, plan)
    routed = with_replicas(routed, plan)
    return RoutedCost(
        work=grouped(routed, plan, device, c),
        dense=tuple(_roof(s, "ffn", plan, device, c) for s in extra_shapes(routed, hidden)),
        experts=routed.experts,
        top_k=routed.top_k,
        down_share=safe_divide(1.0, routed.matrices),
        imbalance=skew,
        exchange=exchanges(plan) * jnp.where(routed.top_k > 0, 1.0, 0.0),
        dispatch=coll.dispatch(topology, ranks, routed, mode, routed.d_in * p.dispatch_bytes, c),
        combine=coll.combine(topology, ranks, routed, mode, routed.d_in * p.combine_bytes, c),
        slice_gather=coll.all_gather(topology, slices, c),
        slice_bytes=routed.d_in * (p.dispatch_bytes + p.combine_bytes),
    )


def _ffn(
    ffn: FeedForward, hidden: Number, share: Number, plan: Plan, device: Device, topology: Topology, c: Coefficients
) -> FeedForwardCost:
    shapes = dense_shapes(ffn, hidden, plan.tp)
    kernels = _kernels(shapes, plan.precision.ffn_act, c)
    routed = ffn.routed
    reduce: Number = 1.0
    cost = None
    if routed is not None:
        has = jnp.where(routed.top_k > 0, 1.0, 0.0)
        cost = _routed(routed, hidden, plan, device, topology, c)
        extra = _kernels(extra_shapes(routed, hidden), plan.precision.ffn_act, c)
        kernels = kernels + 5.0 * has + extra  # router, top-k, permute, 2 GEMMs
        reduce = 1.0 - cost.exchange
    return FeedForwardCost(
        count=ffn.count * share,
        dense=tuple(_roof(s, "ffn", plan, device, c) for s in shapes),
        kernels=kernels,
        reduce=reduce,
        routed=cost,
    )


def shard(arch: Architecture, device: Device, topology: Topology, plan: Plan, c: Coefficients) -> Sharded:
    """Cut one model by one plan. Every field of the result is a number a batch does not change."""
    tp_ranks = coll.group(topology, plan.tp, 1.0)
    reduce = coll.all_reduce(topology, tp_ranks, c)
    if plan.sequence_parallel is not None:
        scatter = coll.all_gather(topology, tp_ranks, c)
        megatron = tuple(Line(fixed=2.0 * line.fixed, per_byte=2.0 * line.per_byte) for line in scatter)
        wide = (*megatron, *megatron)[: len(reduce)]
        reduce = tuple(
            Line(
                fixed=jnp.where(plan.sequence_parallel > 0, w.fixed, r.fixed),
                per_byte=jnp.where(plan.sequence_parallel > 0, w.per_byte, r.per_byte),
            )
            for r, w in zip(reduce, wide, strict=True)
        )
    stage = coll.group(topology, plan.pp, plan.tp * plan.attention_dp * plan.cp)
    share, spread = stage_share(arch, plan), sequence_shards(plan)
    head = GemmShape(k=arch.hidden, n=arch.vocab / plan.tp)
    return Sharded(
        plan=plan,
        mixers=tuple(_mixer(m, share, plan, device, topology, c) for m in arch.mixers),
        ffns=tuple(_ffn(f, arch.hidden, share, plan, device, topology, c) for f in arch.ffns),
        head=gemm(head, 2.0, 2.0, 0.0, device, c),
        elementwise=c.elementwise_passes * arch.hidden * 2.0 / spread / (device.bandwidth * c.memory),
        reduce=reduce,
        reduce_bytes=2.0 * arch.hidden,
        boundary=coll.point_to_point(topology, stage, c),
        boundary_bytes=2.0 * arch.hidden / plan.tp,
        c=c,
        draft=None if plan.draft is None else shard(plan.draft.architecture, device, topology, draft_plan(plan), c),
    )


def shard_scenario(x: Any) -> Sharded:
    """The same of a `Scenario`, or of anything else that has its architecture, device, topology, plan, coefficients."""
    return shard(x.architecture, x.device, x.topology, x.plan, x.coefficients)


def draft_plan(plan: Plan) -> Plan:
    """A (dense) draft model's plan on the GPUs of its target: in the same formats and stages, over `tp` ranks of each.

    Nothing else is shared out: what ranks beyond its own TP hold of it are copies.
    """
    one = jnp.ones_like(plan.tp)
    tp = one if plan.draft is None else plan.draft.tp
    own = replace(plan, tp=tp, cp=one, moe_ep=one, moe_tp=tp, draft=None)
    return replace(own, sequence_parallel=None, cp_method=None, dispatch=None, eplb_replicas=None)


def speculating(plan: Plan, load: Load) -> Plan:
    """The plan without its draft model where the load drafts nothing."""
    if plan.draft is None:
        return plan
    drafted = 0.0 if load.draft_tokens is None else jnp.where(load.draft_tokens > 0, 1.0, 0.0)
    return replace(plan, draft=replace(plan.draft, present=plan.draft.present * drafted))


def sequence_shards(plan: Plan) -> Number:
    """Over how many ranks Megatron SP spreads the activations between operators (1 without it)."""
    if plan.sequence_parallel is None:
        return 1.0
    return jnp.where(plan.sequence_parallel > 0, plan.tp, 1.0)


__all__ = [
    "Sharded",
    "dense_shapes",
    "draft_plan",
    "exchanges",
    "expert_shapes",
    "extra_shapes",
    "sequence_shards",
    "shard",
    "shard_scenario",
    "speculating",
    "stage_share",
]
