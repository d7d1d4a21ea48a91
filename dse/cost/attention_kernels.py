"""Times of single attention kernels: softmax and latent (MLA), prefill and decode. See `kernels` for what they share.

A decode core is memory traffic, arithmetic on packed query heads, and waves of thread blocks, each with its latency; a
prefill core is arithmetic with partial tiles at the diagonal. The tables they are fitted to hold no prefill over cached
tokens: `cached` follows the formulas and is unchecked.
"""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.kernels import beyond, peak, stream, walk
from dse.cost.types import Device, Number, pytree
from dse.numerics import smooth_max

MLA_SCORE, MLA_VALUE = 192.0, 128.0  # DeepSeek's dimensions a head, materialised
MLA_LATENT, MLA_ABSORBED_VALUE = 576.0, 512.0  # cached elements a token; of them values


@pytree
class AttentionCase:
    """`batch` requests of `tokens` new tokens after `cached` ones; heads of one rank; window 0: none.

    MLA reads `heads`, `batch`, `tokens`, `cached` and `kv_bytes` alone.
    """

    batch: Number
    heads: Number
    kv_heads: Number
    head_dim: Number
    tokens: Number
    cached: Number
    window: Number
    kv_bytes: Number
    rate: Number  # of the matrix products: index of units.RATES


# ------------------------------------------------------------------------------------------- softmax, prefill


@pytree
class ContextAttentionKernel:
    """Coefficients of one GPU, precision and cache precision."""

    launch: Number  # s, with RoPE and the write of the cache
    launch_narrow: Number  # s more below 100 dimensions a head
    launch_wide: Number  # s more above 150
    peak_share: Number  # at 128 dimensions a head
    narrow_power: Number  # share falls as (D/128)^this below 128 ...
    wide_power: Number  # ... and above
    half_k: Number  # keys of a partial tile at the diagonal
    window_edge: Number  # keys more at the edge of a window
    memory_share: Number
    query_passes: Number  # over queries and outputs
    wave: Number  # cycles of a further wave of blocks
    serial: Number  # cycles a key
    split: Number  # keys
    corner: Number
    l2_share: Number
    l2_rate: Number


def causal_pairs(tokens: Number, cached: Number, window: Number) -> Number:
    """(Query, key) pairs of one request: T(S + T/2), or the band of a window where it is narrower."""
    total = tokens + cached
    full = tokens * (cached + 0.5 * tokens)
    reach = jnp.minimum(window, total)
    outside, before = total - reach, jnp.maximum(cached - reach, 0.0)
    return jnp.where(window > 0, full - 0.5 * (outside**2 - before**2), full)


def context_attention(c: ContextAttentionKernel, case: AttentionCase, device: Device, warm: Number = 0.0) -> Number:
    """Seconds: launch + walk(keys of a query) + max(compute, memory, wave beyond(B H/SMs - 1)), rounded by `corner`.

    compute = 4 B H D (pairs + (half_k/2 + window_edge) T)/(peak share(D)); memory = 4 query_passes B T H D +
    (4 + 2c) B (T + S) Hkv D bytes: queries, outputs, keys and values in, cache out.
    """
    total = case.tokens + case.cached
    windowed = (case.window > 0) & (case.window < total)
    reach = jnp.where(windowed, case.window, total)
    edge = 0.5 * c.half_k + c.window_edge * windowed
    pairs = causal_pairs(case.tokens, case.cached, case.window) + edge * case.tokens
    size = jnp.log(case.head_dim / 128.0)
    share = c.peak_share * jnp.exp(jnp.where(size < 0, c.narrow_power, c.wide_power) * size)
    compute = 4.0 * case.batch * case.heads * case.head_dim * pairs / (peak(device, case.rate) * share)
    queries = 4.0 * c.query_passes * case.batch * case.tokens * case.heads * case.head_dim
    keys = (4.0 + 2.0 * case.kv_bytes) * case.batch * total * case.kv_heads * case.head_dim
    memory = stream(queries + keys, c.memory_share, c.l2_share, c.l2_rate, device, warm)
    waves = c.wave / device.clock * beyond(case.batch * case.heads / device.sms - 1.0)
    launch = c.launch + c.launch_narrow * (case.head_dim < 100) + c.launch_wide * (case.head_dim > 150)
    busy = smooth_max(smooth_max(compute, memory, c.corner), waves, c.corner)
    return launch + walk(reach, c.serial, c.split, device) + busy


# -------------------------------------------------------------------------------------------- softmax, decode


@pytree
class GenerationAttentionKernel:
    """Coefficients of one GPU and cache precision: a kernel for grouped queries, and a plain one (see `is_plain`)."""

    launch: Number  # s, with RoPE and the write of the cache
    launch_narrow: Number  # s more at no more than 64 dimensions a head
    launch_grouped: Number  # s more at 32 query heads a KV head, as the square of their number
    memory_share: Number
    flops: Number  # a cycle a SM: decode cores wait on issue and CUDA cores, not on the tensor peak
    wave: Number  # cycles of a further wave of blocks
    wave_ratio: Number  # query heads a KV head at which a wave takes twice that
    head_dim: Number  # dimensions' worth of cost that no head saves
    serial: Number  # cycles a key
    split: Number  # keys
    split_keys: Number  # keys a block at which the cache is split over more blocks
    most_splits: Number  # blocks a SM that splitting adds at most
    resident: Number  # blocks a SM at once
    corner: Number
    wave_corner: Number
    l2_share: Number
    l2_rate: Number
    plain_launch: Number
    plain_wave: Number
    plain_resident: Number
    plain_flops: Number
    plain_serial: Number
    plain_split: Number
    plain_below: Number  # the plain kernel runs below this many grouped blocks a SM
    bytes_share: Number  # of the cache's nominal bytes that the grouped kernel reads; 1 but for mislabelled tables


def is_plain(plain_below: Number, case: AttentionCase, device: Device) -> Number:
    """Whether the plain kernel (one block a query head) runs in place of the grouped one. Constant to every gradient.

    MHA, more than 40 query heads a KV head, or few blocks: 4 B Hkv max(1, S//128) < plain_below SMs. The last is
    TensorRT-LLM's rule, from what its tables show; generations that dropped it have plain_below 0.
    """
    ratio = case.heads / case.kv_heads
    blocks = 4.0 * case.batch * case.kv_heads * jnp.maximum(1.0, jnp.floor((case.cached + case.tokens) / 128.0))
    return (ratio < 1.5) | (ratio > 40.0) | (blocks < plain_below * device.sms)


def generation_attention(
    c: GenerationAttentionKernel, case: AttentionCase, device: Device, warm: Number = 0.0
) -> Number:
    """Seconds: launch + walk(S') h + max(compute, memory, waves) with S' = min(S, window), h = (D + d)/(128 + d).

    memory = (2 B Hkv S' D c bytes_share + 4 B H D)/(bandwidth share); compute = 4 B H S' D/(flops SMs clock); waves =
    wave (1 + (ratio/wave_ratio)^2) h beyond(blocks/(resident SMs) - 1), blocks = B Hkv and those that splitting adds.
    """
    plain = is_plain(c.plain_below, case, device)
    length = case.cached + case.tokens
    keys = jnp.where(case.window > 0, jnp.minimum(length, case.window), length)
    ratio = case.heads / case.kv_heads
    kv_bytes = case.kv_bytes * jnp.where(plain, 1.0, c.bytes_share)
    cache = 2.0 * case.batch * case.kv_heads * keys * case.head_dim * kv_bytes
    moved = cache + 4.0 * case.batch * case.heads * case.head_dim
    memory = stream(moved, c.memory_share, c.l2_share, c.l2_rate, device, warm)
    rate = jnp.where(plain, c.plain_flops, c.flops) * device.sms * device.clock
    compute = 4.0 * case.batch * case.heads * keys * case.head_dim / rate
    added = case.batch * case.kv_heads * beyond(length / c.split_keys - 1.0)
    added = added / (1.0 + added / (c.most_splits * device.sms))
    grouped_blocks = (case.batch * case.kv_heads + added) / c.resident
    blocks = jnp.where(plain, case.batch * case.heads / c.plain_resident, grouped_blocks)
    height = (case.head_dim + c.head_dim) / (128.0 + c.head_dim)
    wave = jnp.where(plain, c.plain_wave, c.wave * (1.0 + (ratio / c.wave_ratio) ** 2)) / device.clock
    waves = wave * beyond(blocks / device.sms - 1.0) * height
    serial = walk(keys, jnp.where(plain, c.plain_serial, c.serial), jnp.where(plain, c.plain_split, c.split), device)
    grouped_launch = c.launch + c.launch_narrow * (case.head_dim <= 64) + c.launch_grouped * (ratio / 32.0) ** 2
    busy = smooth_max(smooth_max(compute, memory, c.corner), waves, c.wave_corner)
    return jnp.where(plain, c.plain_launch, grouped_launch) + serial * height + busy


# ---------------------------------------------------------------------------------------------------- MLA


@pytree
class ContextMlaKernel:
    """Coefficients of one GPU and cache precision."""

    launch: Number
    peak_share: Number
    half_k: Number
    memory_share: Number
    wave: Number
    serial: Number
    split: Number
    corner: Number
    l2_share: Number
    l2_rate: Number


def context_mla(c: ContextMlaKernel, case: AttentionCase, device: Device, warm: Number = 0.0) -> Number:
    """Materialised MLA core: as `context_attention` with 192 + 128 dimensions, keys and values of every head, and the
    latent cache (576 elements a token) written."""
    total = case.tokens + case.cached
    pairs = causal_pairs(case.tokens, case.cached, 0.0) + 0.5 * c.half_k * case.tokens
    compute = 2.0 * case.batch * case.heads * (MLA_SCORE + MLA_VALUE) * pairs
    compute = compute / (peak(device, case.rate) * c.peak_share)
    passes = 2.0 * (MLA_SCORE + MLA_VALUE) * case.heads * (case.tokens + total)
    moved = case.batch * (passes + case.tokens * MLA_LATENT * (2.0 + case.kv_bytes))
    memory = stream(moved, c.memory_share, c.l2_share, c.l2_rate, device, warm)
    waves = c.wave / device.clock * beyond(case.batch * case.heads / device.sms - 1.0)
    busy = smooth_max(smooth_max(compute, memory, c.corner), waves, c.corner)
    return c.launch + walk(total, c.serial, c.split, device) + busy


@pytree
class GenerationMlaKernel:
    """Coefficients of one GPU and cache precision. Before Hopper the walk is not split: `split` is very large."""

    launch: Number
    memory_share: Number
    peak_share: Number
    idle_heads: Number  # rows of a tile that no head fills
    query_passes: Number
    wave: Number
    wave_heads: Number  # heads that make a block of their own
    serial: Number
    split: Number
    corner: Number
    wave_corner: Number
    l2_share: Number
    l2_rate: Number


def generation_mla(c: GenerationMlaKernel, case: AttentionCase, device: Device, warm: Number = 0.0) -> Number:
    """Absorbed MLA core, seconds: launch + max(compute, memory, walk(S), waves).

    compute = 2 B (H + idle_heads) (576 + 512) S/(peak share); memory = (B S 576 c + 2 query_passes B H 1088)/(bandwidth
    share); waves = wave beyond(B (1 + H/wave_heads)/SMs - 1).
    """
    length = case.cached + case.tokens
    wide = MLA_LATENT + MLA_ABSORBED_VALUE
    compute = 2.0 * case.batch * (case.heads + c.idle_heads) * wide * length / (peak(device, case.rate) * c.peak_share)
    moved = case.batch * (length * MLA_LATENT * case.kv_bytes + 2.0 * c.query_passes * case.heads * wide)
    memory = stream(moved, c.memory_share, c.l2_share, c.l2_rate, device, warm)
    waves = c.wave / device.clock * beyond(case.batch * (1.0 + case.heads / c.wave_heads) / device.sms - 1.0)
    serial = walk(length, c.serial, c.split, device)
    busy = smooth_max(smooth_max(compute, memory, c.corner), serial, c.wave_corner)
    return c.launch + smooth_max(busy, waves, c.wave_corner)


__all__ = [
    "AttentionCase",
    "ContextAttentionKernel",
    "ContextMlaKernel",
    "GenerationAttentionKernel",
    "GenerationMlaKernel",
    "causal_pairs",
    "context_attention",
    "context_mla",
    "generation_attention",
    "generation_mla",
    "is_plain",
]
