"""ShallowSim (Kevin Zhang "zartbot", 2025): DeepSeek-V3/R1 on one type of GPU, prefill and decode tables in ms.

Its arithmetic is reproduced, quirks included, because they are part of its numbers. What is wrong with it:
- H800 (and any GPU without FP4) has its dispatch volume halved in prefill as if it were FP4;
- H200 gets the H20's table of expert-GEMM efficiency, because its name contains "H20";
- `Total` is not divided by TP: tokens/s of a TP group are told as of a GPU;
- MiB/(GB/s) is called ms, and GiB/(GB/s) seconds: true times of moving bytes are 4.9% and 7.4% longer;
- compute and weight loading are added where they overlap; attention in prefill is full, not causal;
- against measured single-node H200 decode it is 1.6-6.5x too slow; within about 20% of DeepSeek's own figures at
  large EP.
"""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.types import Number, pytree
from dse.numerics import ceil_ratio, pick
from dse.published.deepseek import (
    DENSE_LAYERS,
    EXPERT_FFN,
    EXPERTS,
    HEADS,
    HIDDEN,
    KV_RANK,
    LATENT,
    LAYERS,
    MOE_LAYERS,
    NOPE,
    Q_RANK,
    ROPE,
    TOP_K,
    VALUE,
)
from dse.published.rows import over_rows
from dse.published.shallowsim_gpus import EXPERT_MIB, Gpu, Rates, dense_mlp_ms, ffn_gflop, mla_ms, rates, tp_mla_ms
from dse.units import GIB, MIB

# ------------------------------------------------------------------------------------------------- prefill


@pytree
class PrefillCase:
    """S tokens of which the share `kv_cache_rate` is cached, on tp x dp GPUs."""

    seq_len: Number
    kv_cache_rate: Number
    tp: Number
    dp: Number
    discount_rate: Number = 0.85


@pytree
class PrefillTable:
    """Columns of the published table, ms. A layer each but the last three, which are of the model."""

    MLA: Number
    DenseMLP: Number
    TP_MLA: Number
    SharedExpert: Number
    Combine: Number
    Overlap1: Number
    RoutedExpert: Number
    Dispatch: Number
    Overlap2: Number
    Compute: Number
    Comm: Number
    Sum: Number


def prefill_one(gpu: Gpu, x: PrefillCase) -> PrefillTable:
    """One row: Sum = 3 (MLA + DenseMLP) + 58 (TP_MLA + Shared + Routed + max(0, Overlap1) + max(0, Overlap2))."""
    r = rates(gpu, x.discount_rate, gpu.comm_sm)
    s = x.seq_len
    projections = HIDDEN * Q_RANK + Q_RANK * HEADS * (NOPE + ROPE) + HEADS * KV_RANK * (NOPE + VALUE)
    gemm = 2e-9 * s * (projections + HIDDEN * LATENT * (1.0 - x.kv_cache_rate))
    attention = 2e-9 * (HEADS * s * s * (NOPE + ROPE + VALUE) + s * HEADS * VALUE * HIDDEN)
    mla = mla_ms(gemm, attention, r)
    tp_mla = tp_mla_ms(mla, s, x.tp, r)
    dense = dense_mlp_ms(s, r)
    tokens = s / x.tp
    shared = ffn_gflop(tokens, EXPERT_FFN) / r.best + EXPERT_MIB / r.memory
    routed = ffn_gflop(TOP_K * tokens, EXPERT_FFN) / r.best + EXPERT_MIB / r.memory * EXPERTS / (x.tp * x.dp)
    exchange = _prefill_exchange_ms(gpu, x, r)
    combine, dispatch = 2.0 * exchange + 0.05, 0.5 * exchange + 0.05
    overlap1, overlap2 = combine - tp_mla - shared, dispatch - routed
    compute = DENSE_LAYERS * (mla + dense) + MOE_LAYERS * (tp_mla + shared + routed)
    exposed = jnp.maximum(overlap1, 0.0) + jnp.maximum(overlap2, 0.0)
    return PrefillTable(
        MLA=mla,
        DenseMLP=dense,
        TP_MLA=tp_mla,
        SharedExpert=shared,
        Combine=combine,
        Overlap1=overlap1,
        RoutedExpert=routed,
        Dispatch=dispatch,
        Overlap2=overlap2,
        Compute=compute,
        Comm=MOE_LAYERS * (combine + dispatch),
        Sum=compute + MOE_LAYERS * exposed,
    )


def _prefill_exchange_ms(gpu: Gpu, x: PrefillCase, r: Rates) -> Number:
    """Volume D at one byte over its link: 8-GPU nodes send 3 (8/tp) S d to three other nodes over eight NICs; racks
    of n GPUs send every copy but those to the local experts over NVLink."""
    node = 3.0 * (8.0 / x.tp) * x.seq_len * TOP_K / 8.0 * HIDDEN / MIB / (8.0 * r.pcie)
    local = ceil_ratio(EXPERTS, gpu.gpu_per_node)
    rack = (EXPERTS - local) / EXPERTS * TOP_K * x.seq_len / x.tp * HIDDEN / MIB / r.nvlink
    return jnp.where(gpu.gpu_per_node == 8, node, rack)


# -------------------------------------------------------------------------------------------------- decode


@pytree
class DecodeCase:
    """`BatchSize` requests a GPU at context `seq_len`, `mbs` micro-batches, experts over `EP` GPUs."""

    seq_len: Number
    decode_len: Number
    BatchSize: Number
    TP: Number
    EP: Number
    fp8_combine: Number = 0.0
    mbs: Number = 2.0
    discount_rate: Number = 0.85


@pytree
class DecodeTable:
    """Columns of the published table: ms a layer up to Delta and LoadKV, ms a token for TPOT, tokens/s beyond."""

    DenseMLA: Number
    DenseMLP: Number
    SparseMLA: Number
    Combine: Number
    SharedExpert: Number
    RoutedExpert: Number
    Dispatch: Number
    COMP_SUM: Number
    COMM_SUM: Number
    Delta: Number
    TPOT: Number
    TPOT_O: Number
    TPS: Number
    TPS_O: Number
    Total: Number
    Total_O: Number
    Comm_Impact: Number
    gemm_group_per_device: Number
    max_batch: Number
    LoadKV: Number


def decode_one(gpu: Gpu, x: DecodeCase) -> DecodeTable:
    """One row: TPOT = 3 (DenseMLA + DenseMLP) + 58 (COMP_SUM + max(0, COMM_SUM - SparseMLA - Shared))."""
    r = rates(gpu, x.discount_rate, 0.0)
    b, s = x.BatchSize, x.seq_len
    projections = HIDDEN * Q_RANK + Q_RANK * HEADS * ROPE + HEADS * (Q_RANK * NOPE + NOPE * KV_RANK)
    core = HEADS * s * (2.0 * KV_RANK + ROPE) + HEADS * VALUE * KV_RANK + HEADS * VALUE * HIDDEN
    mla = mla_ms(2e-9 * b * projections, 2e-9 * b * core, r)
    load_kv = s * LATENT * b / GIB / r.memory * 1000.0
    sparse = tp_mla_ms(mla, b, x.TP, r) + load_kv
    dense_mla, dense = mla + load_kv, dense_mlp_ms(b, r)
    groups = ceil_ratio(EXPERTS, x.EP)
    shared, routed = _expert_ms(gpu, x, groups, r)
    dispatch, combine = _decode_exchange_ms(gpu, x, groups, r)
    comp, comm = sparse + shared + routed, dispatch + combine
    delta = comm - sparse - shared
    ideal = DENSE_LAYERS * (dense_mla + dense) + MOE_LAYERS * comp
    tpot = ideal + MOE_LAYERS * jnp.maximum(delta, 0.0)
    total, total_ideal = b * 1000.0 / tpot, b * 1000.0 / ideal
    return DecodeTable(
        DenseMLA=dense_mla,
        DenseMLP=dense,
        SparseMLA=sparse,
        Combine=combine,
        SharedExpert=shared,
        RoutedExpert=routed,
        Dispatch=dispatch,
        COMP_SUM=comp,
        COMM_SUM=comm,
        Delta=delta,
        TPOT=tpot,
        TPOT_O=ideal,
        TPS=1000.0 / tpot,
        TPS_O=1000.0 / ideal,
        Total=total,
        Total_O=total_ideal,
        Comm_Impact=(total_ideal - total) / total_ideal,
        gemm_group_per_device=groups,
        max_batch=max_batch(gpu, x, groups),
        LoadKV=load_kv,
    )


_EFFICIENCY = ((8, 0.05), (16, 0.08), (32, 0.1), (64, 0.2), (128, 0.35), (256, 0.4), (512, 0.6), (None, 0.7))
_EFFICIENCY_H20 = ((4, 0.06), (8, 0.12), (16, 0.25), (32, 0.45), (64, 0.8), (128, 0.9), (None, 1.0))


def _step(m: Number, table: tuple[tuple[int | None, float], ...]) -> Number:
    """Efficiency at the least power of two strictly above int(m): that power is <= p exactly where m < p."""
    result: Number = table[-1][1]
    for bound, efficiency in reversed(table[:-1]):
        result = jnp.where(m < bound, efficiency, result)
    return result


def _expert_ms(gpu: Gpu, x: DecodeCase, groups: Number, r: Rates) -> tuple[Number, Number]:
    """Shared and routed experts of all micro-batches: mbs (FLOPs/(Fg eff) + weights), b = B/mbs tokens in each."""
    tokens = x.BatchSize / x.mbs
    rows = tokens * TOP_K / groups
    efficiency = pick(gpu.h20, [_step(rows, _EFFICIENCY), _step(rows, _EFFICIENCY_H20)])
    load = EXPERT_MIB / r.memory * jnp.where(r.has_fp4, 0.5, 1.0)
    one = ffn_gflop(tokens, EXPERT_FFN) / (r.best * efficiency)
    return x.mbs * (one + load), x.mbs * (TOP_K * one + load * groups)


def _decode_exchange_ms(gpu: Gpu, x: DecodeCase, groups: Number, r: Rates) -> tuple[Number, Number]:
    """Dispatch B k d bytes + 10 us, combine twice that (once: FP8 combine on a GPU with FP4). 8-GPU nodes go over
    PCIe unless all experts are in one node (256/g = 8); racks over NVLink unless EP exceeds the rack."""
    node = jnp.where(EXPERTS / groups == 8.0, r.nvlink, r.pcie)
    rack = jnp.where(gpu.gpu_per_node < x.EP, r.pcie, r.nvlink)
    volume = x.BatchSize * TOP_K * HIDDEN / MIB / jnp.where(gpu.gpu_per_node == 8, node, rack)
    once = (x.fp8_combine > 0) & r.has_fp4
    return volume + 0.01, jnp.where(once, 1.0, 2.0) * volume + 0.01


def max_batch(gpu: Gpu, x: DecodeCase, groups: Number) -> Number:
    """Requests whose KV fits: [.9 mem - 2.91 - 187.17 61/tp/1024 - 44.05 58 (g+1)/1024] GiB over KV (times tp)."""
    weights = 2.91 + 187.17 * LAYERS / x.TP / 1024.0 + 44.05 * MOE_LAYERS * (groups + 1.0) / 1024.0
    request = (x.seq_len + x.decode_len) * LATENT * LAYERS * x.TP
    return (0.9 * gpu.mem_GB - weights) * GIB / request


def prefill(gpu: Gpu, cases: PrefillCase) -> PrefillTable:
    """Tables of a batch: every leaf has one leading axis."""
    table: PrefillTable = over_rows(prefill_one)(gpu, cases)
    return table


def decode(gpu: Gpu, cases: DecodeCase) -> DecodeTable:
    """Tables of a batch: every leaf has one leading axis."""
    table: DecodeTable = over_rows(decode_one)(gpu, cases)
    return table


__all__ = [
    "DecodeCase",
    "DecodeTable",
    "Gpu",
    "PrefillCase",
    "PrefillTable",
    "decode",
    "decode_one",
    "max_batch",
    "prefill",
    "prefill_one",
]
