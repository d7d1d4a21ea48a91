"""ModelMeter's multi-device cost: four kinds of work a layer, four strategies, one bandwidth for a whole network.

Per layer: tensor-core TFLOP, CUDA-core TFLOP, I/O (terabits), communication (GB). Strategies on N devices, batch B:
`dp` max(tensor, cuda, io) each over min(N, B); `ep` max(...)/N + comm/bisection, nothing overlaps; `attention_sp`
max(comm/p2p, flash attention) + max(projections) + each other layer; `ffn_sp` max(...)/N.

Whether attention_sp divides compute by N is not published: it is divided here, the sequence being split. Its code is
not public, so the counts of a layer are ours (`deepseek_r1_stats`), from the project's operators. What it lacks, as
its authors say: hierarchical links, alpha + beta collectives, configurable overlap, TP collectives, PP bubbles,
utilisation, request-level scheduling, calibration by regime. `com_seconds` prices the same exchanges on the project's
hierarchical topology. The all-to-all's whole volume is divided by the bisection bandwidth, though only half of it
crosses a bisection.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from dse.cost import collectives as coll
from dse.cost.coefficients import Coefficients
from dse.cost.operators import core_flops, experts_touched
from dse.cost.types import Architecture, Number, Topology, pytree
from dse.errors import UnsupportedModel
from dse.numerics import ceil_ratio, safe_divide
from dse.published.deepseek import DEEPSEEK_R1
from dse.published.rows import over_rows

T, G = 1e-12, 1e-9


@pytree
class Stats:
    """Work of a layer or group: TFLOP, TFLOP, terabits, GB."""

    tensor: Number = 0.0
    cuda: Number = 0.0
    io: Number = 0.0
    comm: Number = 0.0


def layers_stats(layers: Sequence[Stats]) -> Stats:
    """A group of layers as one: sums."""
    total = Stats()
    for s in layers:
        total = Stats(
            tensor=total.tensor + s.tensor, cuda=total.cuda + s.cuda, io=total.io + s.io, comm=total.comm + s.comm
        )
    return total


@pytree
class Machine:
    """TFLOP/s, TFLOP/s, TB/s of one device; GB/s between two, and across the network's worst cut."""

    tensor: Number
    cuda: Number
    io: Number
    p2p: Number
    bisection: Number


@pytree
class Cost:
    """Seconds. The last two are of `attention_sp`; `total_cost` is not the sum of the others."""

    tensor_cost: Number = 0.0
    cuda_cost: Number = 0.0
    io_cost: Number = 0.0
    com_cost: Number = 0.0
    total_cost: Number = 0.0
    sp_com_cost: Number = 0.0
    flashatten_cost: Number = 0.0


def _on(stats: Stats, machine: Machine, devices: Number) -> tuple[Number, Number, Number]:
    """Seconds of the three kinds of work spread over `devices`; terabits / 8 before TB/s."""
    return (
        stats.tensor / machine.tensor / devices,
        stats.cuda / machine.cuda / devices,
        stats.io / 8.0 / machine.io / devices,
    )


def _bound(times: tuple[Number, Number, Number]) -> Number:
    return jnp.maximum(jnp.maximum(times[0], times[1]), times[2])


def _local(stats: Stats, machine: Machine, devices: Number, com: Number = 0.0) -> Cost:
    times = _on(stats, machine, devices)
    return Cost(
        tensor_cost=times[0], cuda_cost=times[1], io_cost=times[2], com_cost=com, total_cost=_bound(times) + com
    )


def dp(stats: Stats, machine: Machine, devices: Number, batch: Number) -> Cost:
    """max(tensor, cuda, io), each over min(N, B); no communication."""
    return _local(stats, machine, jnp.minimum(devices, batch))


def ep(stats: Stats, machine: Machine, devices: Number, com: Number | None = None) -> Cost:
    """max(tensor, cuda, io)/N + comm/bisection; `com`: seconds from another network model instead."""
    return _local(stats, machine, devices, stats.comm / machine.bisection if com is None else com)


def ffn_sp(stats: Stats, machine: Machine, devices: Number) -> Cost:
    """max(tensor, cuda, io)/N."""
    return _local(stats, machine, devices)


def attention_sp(
    attention: Stats,
    flash: Stats,
    machine: Machine,
    devices: Number,
    others: Sequence[Stats] = (),
    com: Number | None = None,
) -> Cost:
    """max(comm/p2p, flash) + max(projections = attention - flash) + max(...) of each other layer."""
    exchange = attention.comm / machine.p2p if com is None else com
    projections = Stats(
        tensor=attention.tensor - flash.tensor, cuda=attention.cuda - flash.cuda, io=attention.io - flash.io
    )
    flashing = _bound(_on(flash, machine, devices))
    total = jnp.maximum(exchange, flashing) + _bound(_on(projections, machine, devices))
    for layer in others:
        total = total + _bound(_on(layer, machine, devices))
    whole = _on(layers_stats([attention, *others]), machine, devices)
    return Cost(
        tensor_cost=whole[0],
        cuda_cost=whole[1],
        io_cost=whole[2],
        com_cost=exchange,
        total_cost=total,
        sp_com_cost=exchange,
        flashatten_cost=flashing,
    )


def all_to_all_gb(x: Case, tokens: Number, hidden: Number, top_k: Number) -> Number:
    """(cast + gather bytes) B S d topk capacity (N-1)/N."""
    sent = tokens * hidden * top_k * x.capacity_factor * (x.devices - 1.0) / x.devices
    return (x.cast_bytes + x.gather_bytes) * sent * G


def sequence_gb(x: Case, tokens: Number, k_dim: Number, v_dim: Number) -> Number:
    """(K_dim + V_dim) S_prefill B (N-1)/N bits/8."""
    return (k_dim + v_dim) * tokens * (x.devices - 1.0) / x.devices * x.kv_bits / 8.0 * G


# ------------------------------------------------------------------------------------------- whole models


@pytree
class Case:
    """A prefill of `batch` prompts of `seq_len` tokens on N devices, in chunks of at most `chunk` tokens."""

    seq_len: Number
    batch: Number
    devices: Number
    chunk: Number = 32768.0
    weight_bits: Number = 8.0
    act_bits: Number = 16.0
    kv_bits: Number = 16.0
    cast_bytes: Number = 1.0  # dispatch
    gather_bytes: Number = 2.0  # combine
    capacity_factor: Number = 1.0


ELEMENTWISE, SOFTMAX, ACTIVATION = 10.0, 5.0, 4.0  # CUDA-core FLOPs an element: norms and rotary, a score, SwiGLU


@pytree
class ModelStats:
    """Sums over the layers of each group, over all chunks; `flash` is the part of `attention` between projections."""

    attention: Stats
    flash: Stats
    ffn: Stats
    moe: Stats


def deepseek_r1_stats(x: Case, model: Architecture = DEEPSEEK_R1) -> ModelStats:
    """Counts of a chunked prefill. Chunks are more layers of the group: their work is summed before the maximum.

    n = ceil(S/chunk); sum of the chunks' starts = chunk n (n-1)/2; scores S^2/2 however it is cut; each chunk reads
    the weights again, the KV of all tokens before it, and makes K and V of them anew. No embedding, head or sampling.
    """
    mixer, (dense, sparse) = model.mixers[0], model.ffns
    core, routed = mixer.core, sparse.routed
    if core is None or routed is None:
        raise UnsupportedModel("ModelMeter: needs a model of latent attention, dense and expert layers")
    d, tokens = model.hidden, x.batch * x.seq_len
    chunks = jnp.maximum(ceil_ratio(x.seq_len, x.chunk), 1.0)
    starts = jnp.minimum(x.chunk, x.seq_len) * chunks * (chunks - 1.0) / 2.0
    weight, act = x.weight_bits * T, x.act_bits * T  # terabits an element
    pairs = 0.5 * x.seq_len * tokens
    wide = core.heads * (core.score_dim + core.value_dim)  # K and V (or Q and output) elements a token, materialised
    flash = Stats(
        tensor=mixer.count * core_flops(core.heads, core.score_dim + core.value_dim, 1.0, pairs * T),
        cuda=mixer.count * SOFTMAX * core.heads * pairs * T,
        io=mixer.count * act * wide * (tokens + x.batch * (starts + x.seq_len)),
    )
    matrix = sum(g.k * g.n for g in mixer.gemms)
    edges = sum(g.k + g.n for g in mixer.gemms)
    projections = Stats(
        tensor=mixer.count * 2.0 * T * (tokens * matrix + x.batch * starts * core.rematerialise),
        cuda=mixer.count * ELEMENTWISE * tokens * d * T,
        io=mixer.count * (chunks * matrix * weight + tokens * edges * act),
        comm=mixer.count * sequence_gb(x, tokens, core.kv_elements, 0.0),  # the latent is K and V at once
    )

    def gated(width: Number, rows: Number, matrices: Number) -> Stats:
        """`rows` tokens through gated FFNs of `width`, of which `matrices` are read."""
        return Stats(
            tensor=6.0 * rows * d * width * T,
            cuda=ACTIVATION * rows * width * T,
            io=matrices * 3.0 * d * width * weight + rows * (2.0 * d + 3.0 * width) * act,
        )

    touched = chunks * experts_touched(routed.experts, routed.top_k, tokens / chunks, 1.0)
    moe = layers_stats(
        [
            gated(routed.width, tokens * routed.top_k, touched),
            gated(sparse.width, tokens, chunks),
            Stats(comm=all_to_all_gb(x, tokens, d, routed.top_k)),
        ]
    )
    return ModelStats(
        attention=layers_stats([projections, flash]),
        flash=flash,
        ffn=_times(gated(dense.width, tokens, chunks), dense.count),
        moe=_times(moe, sparse.count),
    )


def _times(s: Stats, n: Number) -> Stats:
    return Stats(tensor=n * s.tensor, cuda=n * s.cuda, io=n * s.io, comm=n * s.comm)


@pytree
class ModelCost:
    """A whole model by group, seconds."""

    attention: Cost
    ffn: Cost
    moe: Cost

    @property
    def total(self) -> Number:
        return self.attention.total_cost + self.ffn.total_cost + self.moe.total_cost

    def summed(self, name: str) -> Number:
        """One kind of cost over the groups."""
        return getattr(self.attention, name) + getattr(self.ffn, name) + getattr(self.moe, name)


@pytree
class Exchange:
    """Seconds of all exchanges of a model, where they are not ModelMeter's: None keeps its own."""

    sequence: Number
    experts: Number


def dp_ep(x: Case, machine: Machine, network: Exchange | None = None) -> ModelCost:
    """Attention and dense FFN by dp, MoE by ep with its all-to-all."""
    s = deepseek_r1_stats(x)
    return ModelCost(
        attention=dp(s.attention, machine, x.devices, x.batch),
        ffn=dp(s.ffn, machine, x.devices, x.batch),
        moe=ep(s.moe, machine, x.devices, None if network is None else network.experts),
    )


def sp_ep(x: Case, machine: Machine, network: Exchange | None = None) -> ModelCost:
    """Attention by attention_sp, MoE by ep, dense FFN by ffn_sp."""
    s = deepseek_r1_stats(x)
    return ModelCost(
        attention=attention_sp(
            s.attention, s.flash, machine, x.devices, com=None if network is None else network.sequence
        ),
        ffn=ffn_sp(s.ffn, machine, x.devices),
        moe=ep(s.moe, machine, x.devices, None if network is None else network.experts),
    )


def com_seconds(x: Case, topology: Topology, c: Coefficients, dispatch: Number = 0.0) -> Exchange:
    """The same exchanges on a hierarchical topology, by the project's collectives; `dispatch` indexes DISPATCHES.

    Experts: dispatch + combine of B S/N tokens a rank, a layer, with a start a chunk. Sequence: a ring of N-1 hops.
    """
    mixer, sparse = DEEPSEEK_R1.mixers[0], DEEPSEEK_R1.ffns[1]
    core, routed = mixer.core, sparse.routed
    if core is None or routed is None:
        raise UnsupportedModel("ModelMeter: needs a model of latent attention and expert layers")
    g = coll.group(topology, x.devices, 1.0)
    chunks = jnp.maximum(ceil_ratio(x.seq_len, x.chunk), 1.0)
    tokens = x.batch * x.seq_len
    mine = tokens / x.devices * x.capacity_factor
    experts: Number = 0.0
    for exchange, element in ((coll.dispatch, x.cast_bytes), (coll.combine, x.gather_bytes)):
        time = exchange(topology, g, routed, dispatch, DEEPSEEK_R1.hidden * element, c)
        experts = experts + sparse.count * chunks * time(mine / chunks)
    hop = coll.point_to_point(topology, g, c)
    received = sequence_gb(x, tokens, core.kv_elements, 0.0) / G
    ring = mixer.count * (chunks * (x.devices - 1.0) * hop.fixed + hop.per_byte * received)
    return Exchange(sequence=ring, experts=experts)


def collapsed(topology: Topology, devices: Number) -> tuple[Number, Number]:
    """One bandwidth for a topology, GB/s: p2p that of the slowest level which N devices cross; bisection N/2 of it."""
    g = coll.group(topology, devices, 1.0)
    slowest: Number = coll.bandwidth(topology.levels[0])
    for level, factor in zip(topology.levels[1:], g.factors()[1:], strict=True):
        slowest = jnp.where(factor > 1, jnp.minimum(slowest, coll.bandwidth(level)), slowest)
    return slowest * G, safe_divide(devices, 2.0) * slowest * G


def dp_ep_batch(cases: Case, machines: Machine) -> ModelCost:
    """A batch: every leaf has one leading axis."""
    cost: ModelCost = over_rows(dp_ep)(cases, machines)
    return cost


def sp_ep_batch(cases: Case, machines: Machine) -> ModelCost:
    """A batch: every leaf has one leading axis."""
    cost: ModelCost = over_rows(sp_ep)(cases, machines)
    return cost
