"""The numbers a roofline needs beyond the datasheet, each with a physical meaning and a cited default.

The defaults were fixed from published constants before any serving measurement was opened, but for the collectives and
the MoE exchange: those are rounded from a fit to tables of single calls [C], and `link_network` was chosen by hand on
[B, D]. `dse calibrate` fits them.
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
    [C] tables of single collectives on A100, H100, H200, B200, L40S (NCCL 2.27-2.29, TensorRT-LLM's all-reduce, DeepEP
    under SGLang 0.5; aiconfigurator, 2026);
    [D] DeepSeek-V3 report (20 of 132 SMs for communication) and DeepEP's (H800: 153 GB/s NVLink, 43-58 GB/s RDMA);
    [E] engine documentation.
    """

    # GEMM: peak e/(1 + (peak/power)/flops_per_joule): a chip under its power limit sustains less the more FLOP/s a watt
    # it promises, whatever the precision [G: .85 on A100, .77 / .61 on H100 in 16 / 8 bits, .66 / .49 / .33 on B200]
    flops_per_joule: Number = 4.4e12  # promised FLOP/s a watt at which half of the peak is sustained
    gemm_bf16: Number = 1.0  # share of that, by precision
    gemm_fp8: Number = 1.0
    gemm_fp4: Number = 1.0
    gemm_int8: Number = 1.0
    gemm_m_half: Number = 45.0  # rows that a partial tile wastes [K]
    gemm_k_half: Number = 200.0  # filling and draining a tile, in elements of k at the 16-bit rate [K: 150-260]
    gemm_walk: Number = 1.4e-9  # s an element of k: one thread block's dependent walk ... [K]
    gemm_split: Number = 3500.0  # ... up to this many elements, beyond which k is split over blocks [K]
    quantise_passes: Number = 2.0  # over the inputs of GEMMs in fewer than 16 bits, quantised at run time [K]
    quantise_kernels: Number = 1.0  # and kernels for it
    memory: Number = 0.80  # [G] weights and activations streamed by GEMMs
    # routed experts (grouped GEMMs) [K]
    grouped_gemm: Number = 1.2  # rate of large grouped GEMMs over that of GEMMs
    expert_half: Number = 200.0  # width that a narrow slice of an expert wastes, by precision
    expert_half_fp8: Number = 1000.0
    expert_half_fp4: Number = 200.0
    expert_m_half: Number = 24.0  # rows that an expert's partial tile wastes, ...
    expert_m_most: Number = 10.0  # ... at most this many times its own: few rows run in narrow tiles
    expert_memory: Number = 0.93  # share of bandwidth at which experts are read
    expert_each: Number = 0.1 * US  # a layer, for each expert that a rank holds: scheduling of the groups
    expert_each_fp8: Number = 0.2 * US
    expert_each_fp4: Number = 0.03 * US
    expert_walk: Number = 2.5e-9  # s an element of both reductions, as gemm_walk
    expert_corner: Number = 0.85  # rounding of compute against reading against the walk: nearly their sum
    permute_passes: Number = 1.7  # over the activations of all copies
    # attention
    core_prefill: Number = 0.60  # [F]
    core_decode: Number = 0.70  # tensor-core share of decode kernels; binds where many heads share keys (MLA) [K]
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
    cohort: Number = 0.02  # share of the later ones whose prompts come all at once too: equal answers end together
    # Steps like its own that a prompt takes beside others: the one that computes it, and those in which an engine that
    # schedules ahead has fetched it but not begun, or has its token but not sent it
    turns: Number = 1.0
    idle_seats: Number = 0.02  # of a rank's: clients that find none free, whatever the memory
    # 1: prompts get steps of their own, ahead of decode (SGLang); 0: they share steps with it. None: 0 for all
    prefill_priority: Number | None = None
    transfer_base: Number = 5000.0 * US  # handshake of two pools' workers and first block of a KV transfer [E]
    # collectives [C]
    collective_base: Number = 6.1 * US  # an LL kernel's start; the other protocols add theirs [N: 6.6]
    collective_ll128: Number = 13.0 * US
    collective_simple: Number = 14.0 * US
    hop_ll: Number = 0.56  # hop latency over the level's (LL128) latency: LL ring [N: .3-.7]
    hop_tree: Number = 1.4  # a step of recursive doubling in LL, whose sides wait for each other [N: 5 of 2.7 us]
    hop_ll128: Number = 0.10  # beyond what the start holds
    hop_simple: Number = 1.5  # [N: 1.8-3.5]
    link_ll: Number = 0.30  # share of link bandwidth: half carries flags [N: <= .5]
    link_ll128: Number = 0.50
    link_simple: Number = 0.72
    link_multicast: Number = 0.60
    link_network: Number = 1.15  # the share beyond the innermost level over that inside [B, D]
    own_copy: Number = 0.23  # a rank's own part, copied locally, over a link's time for it
    multicast_base: Number = 52.0 * US  # [N: 25 for the start alone]
    one_shot_base: Number = 1.9 * US  # custom all-reduce inside a node: barrier, read all, barrier
    one_shot_peer: Number = 0.1 * US  # a peer's flag
    link_one_shot: Number = 0.53
    all_to_all_base: Number = 6.9 * US  # send and receive kernels: all-to-all, point to point
    all_to_all_simple: Number = 9.7 * US
    channel_ll: Number = 0.09e-9  # s a byte of one send in LL: 11 GB/s
    # MoE dispatch and combine [D, C]
    dispatch_sms: Number = 20.0  # [D] SMs that copy
    dispatch_base: Number = 27.0 * US
    dispatch_fill: Number = 11.0 * US  # filling the pipeline of copies and links
    dispatch_copy: Number = 0.061e-9  # s a byte on one SM: 16 GB/s
    dispatch_least: Number = 2.0  # copies a token, however few it has
    combine_base: Number = 26.0 * US
    combine_token: Number = 1.3e-9  # s a byte of one token: a warp adds its copies
    combine_copy: Number = 0.049e-9
    combine_least: Number = 3.0
    link_dispatch: Number = 0.65  # share of the innermost link
    low_latency_base: Number = 9.2 * US
    low_latency_expert: Number = 0.016 * US  # a count to each expert, tokens or none
    low_latency_copy: Number = 0.47 * US  # each of the k parts of a sum
    low_latency_token: Number = 2.3 * US  # one SM casting and sending one token
    link_low_dispatch: Number = 0.57
    link_low_combine: Number = 0.53
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
        return cls(**{**zeros, **dict.fromkeys(_SHARES, 1.0), "flops_per_joule": UNLIMITED})


_SHARES = frozenset(
    (
        *("gemm_bf16", "gemm_fp8", "gemm_fp4", "gemm_int8", "grouped_gemm", "memory"),
        *("gemm_split", "expert_memory", "expert_m_most"),
        *("core_prefill", "core_decode", "core_memory", "link_ll", "link_ll128", "link_simple", "link_multicast"),
        *("link_network", "link_one_shot", "link_dispatch", "link_low_dispatch", "link_low_combine", "dispatch_sms"),
        *("imbalance", "utilisation", "partial_overlap", "reserved_output", "first_wave", "turns"),
    )
)
_FREE = tuple(f.name for f in fields(Coefficients) if f.name not in ("rounding", "prefill_priority"))
UNLIMITED = 1e30  # FLOP/s a watt: no power limit
