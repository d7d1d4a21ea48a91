"""The numbers a roofline needs beyond the datasheet, each with a physical meaning and a cited default.

The defaults were fixed from published constants before any serving measurement was opened; `dse calibrate` fits them.
"""

from __future__ import annotations

from dataclasses import fields

from dse.cost.types import Number, pytree
from dse.units import GIB, US


@pytree
class Coefficients:
    """Efficiencies (0..1], latencies (s), overheads (s), shares, reserves (bytes).

    Sources: [G] large-GEMM and skinny-GEMM efficiencies measured on A100/H100/B200 (bf16 .60-.89, fp8 .36-.69, nvfp4
    .26-.45; memory .59-.86); [F] FlashAttention-3 (Shah et al. 2024, up to 75% of bf16 peak on H100; 60% at common
    lengths); [N] NCCL 2.30 tuning model (base 6.6/8.4 us; hop 0.6/3.4 us NVLink, 2.7/14 us network for LL/Simple;
    LL has half the bandwidth); [B] busbw 340 of 450 GB/s on an H100 node, 36 of 50 GB/s between nodes;
    [K] grouped-GEMM tables of TensorRT-LLM on five GPUs (aiconfigurator, 2026: half widths 140-1600, .05-.3 us each);
    [D] DeepSeek-V3 report (20 of 132 SMs for communication) and DeepEP; [E] engine documentation.
    """

    # GEMM: e = e_max * m/(m+m_half) * n/(n+n_half), tiles of 128 half full at 64
    gemm_bf16: Number = 0.75  # [G]
    gemm_fp8: Number = 0.60  # [G]
    gemm_fp4: Number = 0.40  # [G]
    gemm_int8: Number = 0.60  # [G], as fp8
    gemm_m_half: Number = 64.0
    gemm_n_half: Number = 128.0
    grouped_gemm: Number = 1.0  # grouped (expert) GEMMs against one GEMM of the same total size
    expert_half: Number = 600.0  # width of an expert's slice at half efficiency: TP inside experts is slow [K]
    expert_each: Number = 0.1 * US  # a layer, for each expert that a rank holds: scheduling of the groups [K]
    memory: Number = 0.80  # [G] weights and activations streamed by GEMMs
    # attention
    core_prefill: Number = 0.60  # [F]
    core_decode: Number = 0.40  # tensor-core share of decode kernels (few query rows a tile)
    core_memory: Number = 0.75  # KV gathered through page tables
    # roofline corner: None is the hard maximum; 0..1 rounds it (numerics.smooth_max)
    rounding: Number | None = None
    # kernels
    kernel_prefill: Number = 3.0 * US  # start, tail and gap of one kernel, eager launch overlapped
    kernel_decode: Number = 1.5 * US  # the same inside a captured graph
    elementwise_kernels: Number = 6.0  # norms, rotary, cache write, activation, residual: kernels a layer
    elementwise_passes: Number = 12.0  # and hidden-size vectors they read or write a token a layer
    # engine
    step_overhead: Number = 500.0 * US  # scheduling, sampling, detokenising that does not overlap, a step [E]
    request_overhead: Number = 2.0 * US  # the part of it that grows with the requests of a step
    arrival_overhead: Number = 5000.0 * US  # HTTP, tokenisation, first scheduling: once a request
    first_wave: Number = 1.0  # weight of the first wave of prompts over 1 / requests a client
    # collectives
    collective_base: Number = 6.6 * US  # [N] LL base; Simple adds collective_simple
    collective_simple: Number = 1.8 * US  # [N]
    hop_ll: Number = 0.4  # LL hop latency over the level's (LL128) latency [N]
    hop_simple: Number = 2.0  # Simple hop latency over the level's latency [N]
    link_ll: Number = 0.45  # LL share of link bandwidth (half, less flags) [N]
    link_simple: Number = 0.76  # [B]
    one_shot_base: Number = 5.0 * US  # custom all-reduce inside a node: barrier, read all, barrier
    multicast_base: Number = 25.0 * US  # [N] NVLS
    all_to_all_base: Number = 15.0 * US  # [D] dispatch or combine kernel
    # overlap
    partial_overlap: Number = 0.5  # rho of the rule `partial`
    sm_share: Number = 0.15  # [D] compute rate lost while communication kernels run
    # routing
    imbalance: Number = 1.2  # busiest rank's share of expert work over the mean (1: balanced)
    # memory
    utilisation: Number = 0.90  # share of HBM an engine may use [E]
    runtime_reserve: Number = 3.0 * GIB  # context, workspaces, fragmentation
    graph_reserve: Number = 1.0 * GIB  # captured graphs
    communication_buffer: Number = 0.5 * GIB  # a rank that talks to others
    reserved_output: Number = 1.0  # share of osl whose KV is set aside at admission

    @classmethod
    def ideal(cls) -> Coefficients:
        """The bare roofline: full peaks, no latency, no overhead, balanced experts. For limits and worked figures."""
        zeros = {name: 0.0 for name in _FREE if name not in _SHARES}
        return cls(**zeros, **dict.fromkeys(_SHARES, 1.0))


_SHARES = frozenset(
    (
        *("gemm_bf16", "gemm_fp8", "gemm_fp4", "gemm_int8", "grouped_gemm", "memory"),
        *("core_prefill", "core_decode", "core_memory", "link_ll", "link_simple"),
        *("imbalance", "utilisation", "partial_overlap", "reserved_output", "first_wave"),
    )
)
_FREE = tuple(f.name for f in fields(Coefficients) if f.name != "rounding")
