"""The nouns of the cost model, as frozen pytrees.

Every leaf is a number (a 0-d array); a batch is the same tree with a leading axis on its leaves. What changes the
*shape* of the program is the tree's structure: how many kinds of mixer and feed-forward layer the widest model of a
batch has, and which optional parts (`None` where no model of the batch uses them) exist. Everything else, the model
and the GPU included, is data, so one compilation serves a batch that mixes models, GPUs, clusters and plans.
SI units: seconds, bytes, FLOP, FLOP/s, bytes/s.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, dataclass_transform

import jax

Number = Any  # a Python float, numpy scalar or jax array; 0-d inside the model, any leading axes outside
T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def pytree(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass whose fields are all pytree children."""
    frozen = dataclass(frozen=True, kw_only=True)(cls)
    jax.tree_util.register_dataclass(frozen, [f.name for f in fields(frozen)], [])  # type: ignore[arg-type]
    return frozen


# ---------------------------------------------------------------------------------------------- the model


@pytree
class Gemm:
    """One weight matrix of a layer: k inputs -> n outputs, and how TP divides it.

    `n_kv` output columns belong to key/value heads: TP divides them by min(tp, kv_heads) only (KV replication).
    """

    k: Number
    n: Number
    n_kv: Number = 0.0
    split_k: Number = 0.0  # 1: row-parallel (k is divided by tp)
    split_n: Number = 0.0  # 1: column-parallel (n is divided by tp)


@pytree
class Core:
    """Softmax attention between the projections, as numbers.

    A query at position x sees x local keys below `window` and `window_fill * window` beyond (window 0: none; fill 1
    sliding, 1/2 chunked: the mean place in a chunk), and `min(x * ratio, top_k)` global keys (full attention: ratio 1,
    top_k large; none: ratio 0; DeepSeek sparse attention: ratio 1, top_k 2048; compressed KV: ratio 1/4 or 1/128).
    Prefill and decode have their own score and value dimensions a head: MLA is materialised in prefill, absorbed in
    decode; elsewhere they are the head dimension.
    """

    heads: Number
    kv_heads: Number  # TP divides the cache by min(tp, kv_heads); MLA and MQA: 1
    score_dim: Number
    value_dim: Number
    score_dim_decode: Number
    value_dim_decode: Number
    kv_elements: Number  # cached elements a token a layer, all KV heads: 2*Hkv*dh, or r+rope for MLA
    window: Number = 0.0
    window_fill: Number = 1.0
    ratio: Number = 1.0
    top_k: Number = 1e9
    rematerialise: Number = 0.0  # MLA prefill: r * H * (nope+v) multiply-adds for each *cached* token


@pytree
class Indexer:
    """The lightning indexer that picks top-k keys: `heads` queries of `dim` against one key of `dim` a token."""

    heads: Number
    dim: Number


@pytree
class State:
    """Linear attention or SSM: a state a request that does not grow with the sequence."""

    state_bytes: Number  # a request a layer, divided by TP
    flops_per_token: Number  # a layer, divided by TP


@pytree
class Mixer:
    """A kind of sequence-mixing layer and how many layers of it there are."""

    count: Number
    gemms: tuple[Gemm, ...]
    extra_params: Number = 0.0  # norms, biases, convolutions: a layer, replicated
    core: Core | None = None
    indexer: Indexer | None = None
    state: State | None = None


@pytree
class Routed:
    """Routed experts of a feed-forward layer: `matrices` (3 gated, 2 not) of `width` x `d_in` an expert."""

    experts: Number
    top_k: Number
    d_in: Number  # hidden size, or the latent size where experts live in a latent space
    width: Number
    matrices: Number
    latent: Number = 0.0  # > 0: two extra projections hidden <-> latent, replicated
    group_limit: Number = 0.0  # device/node-limited routing: at most this many groups a token (0: unlimited)


@pytree
class FeedForward:
    """A kind of feed-forward layer: a dense (or shared-expert) part of `width`, and perhaps routed experts."""

    count: Number
    width: Number  # dense width, or the shared experts' total width; 0: none
    matrices: Number
    extra_params: Number = 0.0
    routed: Routed | None = None


@pytree
class Architecture:
    """A model as numbers. Mixers and feed-forward kinds are counted apart: time adds over both."""

    hidden: Number
    vocab: Number
    embeddings: Number  # 1 tied, 2 separate embedding and head
    mixers: tuple[Mixer, ...]
    ffns: tuple[FeedForward, ...]
    other_params: Number = 0.0  # final norm, position tables, vision tower, ...: held in memory, bf16
    mtp_params: Number = 0.0  # trained multi-token-prediction modules (held only when speculation uses them)


# ------------------------------------------------------------------------------- the machine


@pytree
class Device:
    """A GPU. `peak_*`: dense FLOP/s (no structured sparsity); 0 where the hardware has no such unit."""

    peak_bf16: Number
    peak_fp8: Number
    peak_fp4: Number
    peak_int8: Number
    bandwidth: Number  # HBM, bytes/s
    capacity: Number  # HBM, bytes
    power: Number  # W at load (TDP)
    price: Number  # USD an hour
    sms: Number = 132.0  # SMs, compute units (an H100's where nobody said)
    clock: Number = 1.83e9  # Hz
    l2: Number = 50e6  # last-level cache, bytes


@pytree
class Level:
    """One level of the network, innermost first."""

    size: Number  # how many units of the level below (GPUs at the first)
    bandwidth: Number  # bytes/s a GPU a direction
    latency: Number  # s a hop
    oversubscription: Number = 1.0  # >= 1: bandwidth between units of this level is divided by it
    rails: Number = 1.0  # 1: every GPU has its own way out of its unit; 0: a ring leaves a unit through one flow


@pytree
class Topology:
    """A cluster's network: levels innermost first. `multicast`: 1 where level 1 reduces in the switch (NVLS)."""

    levels: tuple[Level, ...]
    multicast: Number = 0.0


# ------------------------------------------------------------------------------- what runs on it


@pytree
class Precision:
    """Weights, activations and cache in numbers: bytes an element and which peak rate multiplies them.

    `rate_*` index `(bf16, fp8, fp4, int8)`; `act_*` bytes of the GEMM's input elements.
    """

    mixer_bytes: Number
    mixer_act: Number
    mixer_rate: Number
    ffn_bytes: Number
    ffn_act: Number
    ffn_rate: Number
    expert_bytes: Number
    expert_act: Number
    expert_rate: Number
    kv_bytes: Number
    dispatch_bytes: Number  # MoE dispatch payload an element (fp8 1, bf16 2)
    combine_bytes: Number


@pytree
class Draft:
    """A smaller model that drafts tokens for a larger one on the same GPUs; `tp` of them share it."""

    architecture: Architecture
    tp: Number
    present: Number = 1.0  # 0: this plan of the batch has none (its own MTP modules draft, if any)


@pytree
class Plan:
    """How one replica is divided over GPUs: tp * attention_dp * cp * pp of them, a stage's as moe_ep * moe_tp too."""

    tp: Number
    pp: Number
    attention_dp: Number
    cp: Number
    moe_tp: Number
    moe_ep: Number
    replicas: Number
    precision: Precision
    overlap_prefill: Number = 0.0  # index of OVERLAPS
    overlap_decode: Number = 0.0
    microbatches: Number = 0.0  # in flight through the pipeline in decode; 0: pp
    # None where no plan of the batch uses the feature: the program then has no term for it
    sequence_parallel: Number | None = None  # Megatron SP: reduce-scatter + all-gather in place of all-reduce
    cp_method: Number | None = None  # index of CP_METHODS (None: cp = 1 throughout)
    dispatch: Number | None = None  # index of DISPATCHES (None: auto)
    eplb_replicas: Number | None = None  # redundant experts a layer over the whole expert group
    draft: Draft | None = None  # a draft model of its own


CP_METHODS = ("auto", "ulysses", "ring", "pass_kv", "pass_q")
DISPATCHES = ("auto", "flat", "rank_dedup", "node_dedup", "node_limited")
TRANSFERS = ("after_prefill", "layerwise", "free")  # of the KV cache between disaggregated pools
OVERLAPS = ("none", "partial", "full", "two_batch", "shared_expert", "shallowsim")


@pytree
class Load:
    """Requests and how the engine meets them. `concurrency`: in flight on one replica, over all attention-DP ranks."""

    isl: Number
    osl: Number
    concurrency: Number
    chunk: Number  # token budget of a step, a replica's attention-DP rank
    prefix_hit: Number = 0.0  # share of the prompt found in the prefix cache
    waves: Number = 10.0  # requests a client sends; the first wave arrives all at once
    acceptance: Number = 0.7  # chance that a drafted token is accepted, given the ones before it were
    # None where no load of the batch uses the feature
    draft_tokens: Number | None = None  # speculated tokens a step (MTP depth)
    static_batch: Number | None = None  # 1: one batch, prefilled together, then decoded together
    stream_interval: Number | None = None  # tokens that an engine sends at a time, the first of them too

    @property
    def drafted(self) -> Number:
        """Tokens drafted a step; 0 where the load has no such feature."""
        return 0.0 if self.draft_tokens is None else self.draft_tokens


def stack(trees: list[T]) -> T:
    """One batched tree of several of the same structure (numpy leaves with a leading axis)."""
    import numpy as np

    return jax.tree.map(lambda *leaves: np.stack([np.asarray(x, np.float64) for x in leaves]), *trees)


__all__ = [
    "CP_METHODS",
    "DISPATCHES",
    "OVERLAPS",
    "TRANSFERS",
    "Architecture",
    "Core",
    "Device",
    "Draft",
    "FeedForward",
    "Gemm",
    "Indexer",
    "Level",
    "Load",
    "Mixer",
    "Number",
    "Plan",
    "Precision",
    "Routed",
    "State",
    "Topology",
    "pytree",
    "replace",
    "stack",
]
