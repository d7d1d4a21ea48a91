"""Corrected roofline (BLIS / inference-sim, 2026): a step's time as seven physical features, linear in seven betas.

StepTime = b1 max(pf_compute, pf_kv) + b2 max(dc_compute, dc_kv) + b3 w_static + b4 w_moe + b5 tp_allreduce
+ b6 num_requests + b7; every feature is the time at 100% of the hardware's peak. Around the steps, three alphas:
arrival -> scheduled, a request, an output token.

Known errors, kept because they are part of its numbers: MLA's Q projection is taken as d^2 (189 726 720 weights a layer
for DeepSeek-V3; the low-rank sum is 187 105 280); every projection of GQA as d x d, whatever heads x head_dim is; KV
heads are divided by TP beyond their number; the all-reduce runs at HBM bandwidth; no embedding, head, or activation
traffic; distinct experts are tokens x k at most, not the expectation. The logs' own step "duration" lies below the
weight-read floor at times: fit the cycle between steps instead. New hardware: two scalars, flops x eta_compute and
bandwidth x eta_memory, from about ten batch sizes.
"""

from __future__ import annotations

from dataclasses import fields
from types import MappingProxyType

import jax.numpy as jnp

from dse.cost.operators import core_flops
from dse.cost.types import Architecture, Number, pytree
from dse.errors import UnsupportedModel
from dse.published.deepseek import DEEPSEEK_R1
from dse.published.rows import over_rows


@pytree
class Shape:
    """A model as the method sees it. `kv_rank` > 0: MLA, whose four dimensions then stand in for `head_dim`."""

    hidden: Number
    heads: Number
    kv_heads: Number
    head_dim: Number
    dense_layers: Number
    ffn: Number = 0.0
    moe_layers: Number = 0.0
    experts: Number = 0.0
    top_k: Number = 0.0
    expert_ffn: Number = 0.0
    shared_experts: Number = 0.0
    kv_rank: Number = 0.0
    rope: Number = 0.0
    nope: Number = 0.0
    value: Number = 0.0
    weight_bytes: Number = 2.0
    kv_bytes: Number = 2.0


@pytree
class Peak:
    """What 100% means: FLOP/s and HBM bytes/s of one GPU."""

    flops: Number
    bandwidth: Number


@pytree
class Phase:
    """The prefill or decode requests of one step, summed: new tokens T, pairs T (S + T/2), keys S + T."""

    tokens: Number
    pairs: Number
    keys: Number


@pytree
class Step:
    prefill: Phase
    decode: Phase
    requests: Number


@pytree
class Features:
    """Seconds at peak, but `requests`."""

    pf_compute: Number
    pf_kv: Number
    dc_compute: Number
    dc_kv: Number
    w_static: Number
    w_moe: Number
    tp_allreduce: Number
    requests: Number


@pytree
class Beta:
    """1 each is the bare roofline; `request` and `step` are seconds (published health check: others in [.3, 5])."""

    prefill: Number = 1.0
    decode: Number = 1.0
    static: Number = 1.0
    moe: Number = 1.0
    reduce: Number = 1.0
    request: Number = 0.0
    step: Number = 0.0


@pytree
class Alpha:
    """Seconds: arrival -> scheduled, a request, an output token (post-processing)."""

    arrival: Number = 0.0
    request: Number = 0.0
    output_token: Number = 0.0


def uniform(requests: Number, tokens: Number, cached: Number) -> Phase:
    """`requests` alike, each with T new and S cached tokens. Decode: T = 1."""
    return Phase(
        tokens=requests * tokens,
        pairs=requests * tokens * (cached + 0.5 * tokens),
        keys=requests * (cached + tokens),
    )


def step_of(prefills: Number, prefill_tokens: Number, prefill_cached: Number, decodes: Number, context: Number) -> Step:
    """A step of equal prefill chunks and equal decode requests."""
    return Step(
        prefill=uniform(prefills, prefill_tokens, prefill_cached),
        decode=uniform(decodes, 1.0, context),
        requests=prefills + decodes,
    )


def attention_flops(shape: Shape, phase: Phase, tp: Number) -> dict[str, Number]:
    """FLOPs a layer by part, those of GQA or of absorbed MLA (the other's are 0)."""
    t, d, h = phase.tokens, shape.hidden, shape.heads
    mla = jnp.where(shape.kv_rank > 0, 1.0, 0.0)
    gqa = 1.0 - mla
    r = shape.kv_rank
    return {
        "qkv": gqa * 2.0 * t * d * (d + 2.0 * shape.kv_heads * shape.head_dim) / tp,
        "core": gqa * core_flops(h / tp, 2.0 * shape.head_dim, 1.0, phase.pairs),
        "out": gqa * 2.0 * t * d * d / tp,
        "w_dkv": mla * 2.0 * t * d * (r + shape.rope),  # replicated
        "w_q": mla * 2.0 * t * d * d / tp,
        "w_uk": mla * 2.0 * t * h * shape.nope * r / tp,
        "w_uv": mla * 2.0 * t * h * r * shape.value / tp,
        "w_o": mla * 2.0 * t * h * shape.value * d / tp,
        "scores": mla * core_flops(h / tp, 2.0 * r, 1.0, phase.pairs),
        "rope_scores": mla * core_flops(h / tp, shape.rope, 1.0, phase.pairs),
    }


def compute_flops(shape: Shape, phase: Phase, tp: Number) -> Number:
    """L attention + L_dense T 6 d f/TP + L_moe T (k + n_sh) 6 d fe/TP."""
    attention = sum(attention_flops(shape, phase, tp).values())
    experts = (shape.top_k + shape.shared_experts) * shape.expert_ffn
    ffn = phase.tokens * 6.0 * shape.hidden * (shape.dense_layers * shape.ffn + shape.moe_layers * experts) / tp
    return (shape.dense_layers + shape.moe_layers) * attention + ffn


def attention_weights(shape: Shape) -> Number:
    """Elements a layer; MLA's Q as d^2."""
    d, h = shape.hidden, shape.heads
    gqa = 2.0 * d * d + 2.0 * d * shape.kv_heads * shape.head_dim
    mla = (
        d * d + d * (shape.kv_rank + shape.rope) + h * shape.kv_rank * (shape.nope + shape.value) + h * shape.value * d
    )
    return jnp.where(shape.kv_rank > 0, mla, gqa)


def features_one(shape: Shape, tp: Number, peak: Peak, step: Step) -> Features:
    """The seven features (the first two as their two parts) of one step."""
    layers = shape.dense_layers + shape.moe_layers
    tokens = step.prefill.tokens + step.decode.tokens
    # cached elements a token a layer: 2 (Hkv/TP) dh, or r + rope, which TP does not divide
    cached = jnp.where(shape.kv_rank > 0, shape.kv_rank + shape.rope, 2.0 * shape.kv_heads / tp * shape.head_dim)
    key_seconds = layers * cached * shape.kv_bytes / peak.bandwidth
    matrix_seconds = shape.weight_bytes / (tp * peak.bandwidth)
    expert = 3.0 * shape.hidden * shape.expert_ffn
    static = layers * attention_weights(shape) + shape.dense_layers * 3.0 * shape.hidden * shape.ffn
    read = jnp.minimum(shape.experts, jnp.maximum(shape.top_k, tokens * shape.top_k))
    reduce = 2.0 * layers * tokens * shape.hidden * shape.weight_bytes / peak.bandwidth
    return Features(
        pf_compute=compute_flops(shape, step.prefill, tp) / peak.flops,
        pf_kv=step.prefill.keys * key_seconds,
        dc_compute=compute_flops(shape, step.decode, tp) / peak.flops,
        dc_kv=step.decode.keys * key_seconds,
        w_static=(static + shape.moe_layers * shape.shared_experts * expert) * matrix_seconds,
        w_moe=shape.moe_layers * read * expert * matrix_seconds,
        tp_allreduce=jnp.where(tp > 1, reduce, 0.0),
        requests=step.requests,
    )


def terms(f: Features) -> tuple[Number, ...]:
    """What the betas multiply, in their order: the row of a linear fit."""
    return (
        jnp.maximum(f.pf_compute, f.pf_kv),
        jnp.maximum(f.dc_compute, f.dc_kv),
        f.w_static,
        f.w_moe,
        f.tp_allreduce,
        f.requests,
        jnp.ones_like(f.w_static),
    )


def step_time(f: Features, beta: Beta) -> Number:
    """Seconds of a step. An empty one still costs b3 w_static + b4 w_moe + b7."""
    total: Number = 0.0
    for term, name in zip(terms(f), fields(beta), strict=True):
        total = total + getattr(beta, name.name) * term
    return total


def request_overhead(alpha: Alpha, output_tokens: Number) -> Number:
    """Seconds a request spends outside steps: a0 + a1 + a2 output tokens."""
    return alpha.arrival + alpha.request + alpha.output_token * output_tokens


def _both(shape: Shape, tp: Number, peak: Peak, step: Step, beta: Beta) -> tuple[Features, Number]:
    f = features_one(shape, tp, peak, step)
    return f, step_time(f, beta)


def evaluate(shape: Shape, tp: Number, peak: Peak, step: Step, beta: Beta) -> tuple[Features, Number]:
    """Features and step times of a batch: every leaf has one leading axis."""
    result: tuple[Features, Number] = over_rows(_both)(shape, tp, peak, step, beta)
    return result


# ------------------------------------------------------------------------------------------------- shapes


def _llama(hidden: int, heads: int, kv_heads: int, layers: int, ffn: int) -> Shape:
    return Shape(
        hidden=float(hidden),
        heads=float(heads),
        kv_heads=float(kv_heads),
        head_dim=128.0,
        dense_layers=float(layers),
        ffn=float(ffn),
    )


def _mixtral(hidden: int, heads: int, layers: int, ffn: int) -> Shape:
    shape = _llama(hidden, heads, 8, 0, 0)
    return Shape(**{**vars(shape), "moe_layers": float(layers), "experts": 8.0, "top_k": 2.0, "expert_ffn": float(ffn)})


def shape_of(architecture: Architecture, weight_bytes: float = 2.0, kv_bytes: float = 2.0) -> Shape:
    """A model (unbatched) as this method sees it: one kind of full attention, gated FFNs."""
    if len(architecture.mixers) != 1 or architecture.mixers[0].core is None:
        raise UnsupportedModel("corrected roofline: knows models with one kind of softmax attention layer only")
    core = architecture.mixers[0].core
    dense = [f for f in architecture.ffns if f.routed is None]
    sparse = [f for f in architecture.ffns if f.routed is not None]
    odd = core.window > 0 or core.ratio != 1 or architecture.mixers[0].indexer is not None
    gated = all(f.matrices == 3 for f in architecture.ffns)
    if odd or not gated or len(dense) > 1 or len(sparse) > 1:
        raise UnsupportedModel(
            "corrected roofline: knows full attention and one kind each of gated dense and expert layers only"
        )
    latent = core.score_dim_decode != core.score_dim
    routed = sparse[0].routed if sparse else None
    mla = {
        "kv_rank": core.value_dim_decode,
        "rope": core.score_dim_decode - core.value_dim_decode,
        "nope": core.score_dim - (core.score_dim_decode - core.value_dim_decode),
        "value": core.value_dim,
    }
    return Shape(
        hidden=architecture.hidden,
        heads=core.heads,
        kv_heads=core.kv_heads,
        head_dim=core.score_dim,
        dense_layers=dense[0].count if dense else 0.0,
        ffn=dense[0].width if dense else 0.0,
        moe_layers=sparse[0].count if sparse else 0.0,
        experts=routed.experts if routed else 0.0,
        top_k=routed.top_k if routed else 0.0,
        expert_ffn=routed.width if routed else 0.0,
        shared_experts=sparse[0].width / routed.width if routed else 0.0,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        **(mla if latent else {}),
    )


# The method's own models, from the config.json of each checkpoint; any other: `shape_of` or the columns of a row.
SHAPES = MappingProxyType(
    {
        "Llama-2-7B": _llama(4096, 32, 32, 32, 11008),
        "Llama-2-70B": _llama(8192, 64, 8, 80, 28672),
        "Llama-3.1-8B": _llama(4096, 32, 8, 32, 14336),
        "Llama-3.1-70B": _llama(8192, 64, 8, 80, 28672),
        "CodeLlama-34B": _llama(8192, 64, 8, 48, 22016),
        "Mixtral-8x7B": _mixtral(4096, 32, 32, 14336),
        "Mixtral-8x22B": _mixtral(6144, 48, 56, 16384),
        "DeepSeek-V3": shape_of(DEEPSEEK_R1),
    }
)
