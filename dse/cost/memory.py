"""Bytes a GPU: weights, KV cache, activations, communication buffers, graphs, runtime."""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.coefficients import Coefficients
from dse.cost.eplb import with_replicas
from dse.cost.operators import cached_keys, shard_gemm
from dse.cost.shard import (
    dense_shapes,
    draft_plan,
    exchanges,
    expert_shapes,
    extra_shapes,
    sequence_shards,
    stage_share,
)
from dse.cost.types import Architecture, Device, FeedForward, Load, Mixer, Number, Plan, pytree
from dse.numerics import safe_divide

SIXTEEN_BIT = 2.0
UNLIMITED = 1e12  # requests, where one needs no memory of its own


@pytree
class Memory:
    """Bytes on the fullest GPU of a replica. `requests`: how many of an attention-DP rank the KV space holds."""

    weights: Number
    kv_request: Number  # one request at its full length
    kv: Number  # all requests asked for
    activations: Number
    buffers: Number  # communication
    reserve: Number  # runtime and captured graphs
    usable: Number  # capacity * utilisation
    requests: Number

    @property
    def total(self) -> Number:
        return self.weights + self.kv + self.activations + self.buffers + self.reserve


def _mixer_weights(mixer: Mixer, plan: Plan) -> Number:
    kv_heads = mixer.core.kv_heads if mixer.core is not None else 1.0
    elements = sum((shard_gemm(g, plan.tp, kv_heads).weights() for g in mixer.gemms), start=0.0)
    return elements * plan.precision.mixer_bytes + mixer.extra_params * SIXTEEN_BIT


def _ffn_weights(ffn: FeedForward, hidden: Number, plan: Plan) -> Number:
    p = plan.precision
    size = sum((s.weights() for s in dense_shapes(ffn, hidden, plan.tp)), start=0.0) * p.ffn_bytes
    size = size + ffn.extra_params * SIXTEEN_BIT
    if ffn.routed is not None:
        one = sum((s.weights() for s in expert_shapes(ffn.routed, plan.moe_tp)), start=0.0)
        present = jnp.where(ffn.routed.top_k > 0, 1.0, 0.0)
        size = size + present * with_replicas(ffn.routed, plan).experts / plan.moe_ep * one * p.expert_bytes
        size = size + sum((s.weights() for s in extra_shapes(ffn.routed, hidden)), start=0.0) * p.ffn_bytes
    return size


def weights(arch: Architecture, plan: Plan, drafting: Number) -> Number:
    """Weights of the fullest stage: its share of layers, and embedding or head (both where there is one stage)."""
    mixers = sum((m.count * _mixer_weights(m, plan) for m in arch.mixers), start=0.0)
    ffns = sum((f.count * _ffn_weights(f, arch.hidden, plan) for f in arch.ffns), start=0.0)
    tables = jnp.where(plan.pp > 1, 1.0, arch.embeddings)
    vocabulary = tables * arch.vocab * arch.hidden / plan.tp * SIXTEEN_BIT
    other = arch.other_params * SIXTEEN_BIT
    expert_ranks = plan.moe_ep * plan.moe_tp
    mtp = jnp.where(
        drafting > 0, arch.mtp_params * plan.precision.expert_bytes / jnp.maximum(expert_ranks, plan.tp), 0.0
    )
    return (mixers + ffns) * stage_share(arch, plan) + vocabulary + other + mtp


def draft_weights(plan: Plan, drafting: Number) -> Number:
    """Weights of a draft model, where it drafts, in place of MTP modules'."""
    if plan.draft is None:
        return 0.0
    return jnp.where(drafting > 0, plan.draft.present, 0.0) * weights(plan.draft.architecture, draft_plan(plan), 0.0)


def kv_bytes(arch: Architecture, plan: Plan, length: Number) -> Number:
    """KV cache and recurrent state of one request of `length` tokens on one GPU, a draft model's with it.

    GQA is divided by min(tp, kv_heads), MLA (kv_heads = 1) not at all; by cp where the sequence is sharded; by pp.
    """
    total: Number = 0.0
    if plan.draft is not None:
        total = plan.draft.present * kv_bytes(plan.draft.architecture, draft_plan(plan), length)
    own: Number = 0.0
    for mixer in arch.mixers:
        layer: Number = 0.0
        if mixer.core is not None:
            shards = jnp.minimum(plan.tp, mixer.core.kv_heads) * plan.cp
            layer = plan.precision.kv_bytes * mixer.core.kv_elements / shards * cached_keys(mixer.core, length)
            if mixer.indexer is not None:
                present = jnp.where(mixer.indexer.heads > 0, 1.0, 0.0)
                layer = layer + present * mixer.indexer.dim * mixer.core.ratio * length / plan.cp
        if mixer.state is not None:
            layer = layer + mixer.state.state_bytes / plan.tp
        own = own + mixer.count * layer
    return own * stage_share(arch, plan) + total


def activations(arch: Architecture, plan: Plan, tokens: Number, rows: Number) -> Number:
    """Peak of the widest operator at `tokens` tokens a rank: residual, inputs and outputs; float32 logits of `rows`."""
    widest: Number = 0.0
    for mixer in arch.mixers:
        kv_heads = mixer.core.kv_heads if mixer.core is not None else 1.0
        for g in mixer.gemms:
            shape = shard_gemm(g, plan.tp, kv_heads)
            widest = jnp.maximum(widest, shape.k + shape.n)
    for ffn in arch.ffns:
        for shape in dense_shapes(ffn, arch.hidden, plan.tp):
            widest = jnp.maximum(widest, shape.k + shape.n)
        if ffn.routed is not None:
            up, _ = expert_shapes(ffn.routed, plan.moe_tp)
            copies = ffn.routed.top_k * jnp.where(exchanges(plan) > 0, 1.0, 1.0 / plan.moe_ep)
            widest = jnp.maximum(widest, copies * (up.k + up.n))
    residual = 2.0 * arch.hidden / sequence_shards(plan)
    return tokens * SIXTEEN_BIT * (residual + widest) + rows * arch.vocab / plan.tp * 4.0


def memory(arch: Architecture, device: Device, plan: Plan, load: Load, c: Coefficients) -> Memory:
    """Every term of one GPU's memory, and how many requests fit."""
    drafting = load.drafted
    modules = drafting if plan.draft is None else drafting * (1.0 - plan.draft.present)  # the target's own, that draft
    requests = jnp.maximum(load.concurrency / plan.attention_dp, 1.0)
    prompt = load.isl * (1.0 - load.prefix_hit)
    step_prompt = jnp.minimum(load.chunk, prompt * requests) / plan.cp
    rows = requests * (1.0 + drafting)
    ranks = plan.tp * plan.pp * plan.attention_dp * plan.cp
    exchange = exchanges(plan) * jnp.where(plan.moe_ep > 1, 1.0, 0.0)
    tokens = step_prompt + rows
    dispatched = 2.0 * tokens * arch.hidden * (plan.precision.dispatch_bytes + plan.precision.combine_bytes)
    parts = {
        "weights": weights(arch, plan, modules) + draft_weights(plan, drafting),
        "activations": activations(arch, plan, tokens, rows),
        "buffers": jnp.where(ranks > 1, c.communication_buffer, 0.0) + exchange * dispatched,
        "reserve": jnp.asarray(c.runtime_reserve + c.graph_reserve),
    }
    usable = device.capacity * c.utilisation
    one = kv_bytes(arch, plan, load.isl + c.reserved_output * load.osl)
    free = usable - sum(parts.values(), start=0.0)
    return Memory(
        **parts,
        kv_request=one,
        kv=requests * one,
        usable=usable,
        requests=jnp.maximum(safe_divide(free, one, otherwise=UNLIMITED), 0.0),
    )
