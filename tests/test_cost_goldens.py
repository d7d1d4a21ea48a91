"""The worked figures of the field's reference, to their printed digits, and its collective formulas by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest
from scenarios import attention, latent_attention

from dse.cost import collectives as coll
from dse.cost.coefficients import Coefficients
from dse.cost.memory import kv_bytes
from dse.cost.operators import core_flops, experts_touched, keys_read, shard_gemm, visible_keys
from dse.cost.shard import Sharded, shard
from dse.cost.step import Batch, Segment, step
from dse.cost.types import (
    DISPATCHES,
    Architecture,
    Device,
    FeedForward,
    Level,
    Plan,
    Precision,
    Routed,
    Topology,
    replace,
)

US = 1e-6
HBM = 3.35e12
H100 = Device(
    peak_bf16=989.5e12,
    peak_fp8=0.0,
    peak_fp4=0.0,
    peak_int8=0.0,
    bandwidth=HBM,
    capacity=80e9,
    power=700.0,
    price=2.0,
)
BF16 = Precision(
    mixer_bytes=2.0,
    mixer_act=2.0,
    mixer_rate=0.0,
    ffn_bytes=2.0,
    ffn_act=2.0,
    ffn_rate=0.0,
    expert_bytes=2.0,
    expert_act=2.0,
    expert_rate=0.0,
    kv_bytes=2.0,
    dispatch_bytes=2.0,
    combine_bytes=2.0,
)
NETWORK = Topology(levels=(Level(size=8.0, bandwidth=HBM, latency=0.0),))


def plan(tp: float = 1.0, moe_tp: float | None = None) -> Plan:
    ones = dict.fromkeys(("pp", "attention_dp", "cp", "replicas"), 1.0)
    return Plan(tp=tp, moe_tp=tp if moe_tp is None else moe_tp, moe_ep=1.0, precision=BF16, **ones)


def llama(layers: float, d: float, heads: float, width: float) -> Architecture:
    """Without embedding and head, as the figures are."""
    ffn = FeedForward(count=layers, width=width, matrices=3.0)
    return Architecture(
        hidden=d, vocab=0.0, embeddings=0.0, mixers=(attention(layers, d, heads, 8.0, 128.0),), ffns=(ffn,)
    )


LLAMA_8B = llama(32.0, 4096.0, 32.0, 14336.0)
LLAMA_70B = llama(80.0, 8192.0, 64.0, 28672.0)
MIXTRAL = replace(
    llama(32.0, 4096.0, 32.0, 0.0),
    ffns=(
        FeedForward(
            count=32.0,
            width=0.0,
            matrices=3.0,
            routed=Routed(experts=8.0, top_k=2.0, d_in=4096.0, width=14336.0, matrices=3.0),
        ),
    ),
)


@pytest.fixture(autouse=True)
def _double() -> Any:
    with jax.enable_x64(True):
        yield


def priced(arch: Architecture, tp: float, device: Device = H100, network: Topology = NETWORK) -> Sharded:
    return shard(arch, device, network, plan(tp), Coefficients.ideal())


def compute_us(arch: Architecture, tp: float, batch: Batch) -> float:
    """With endless bandwidth everywhere only FLOPs take time."""
    fast = replace(NETWORK, levels=(replace(NETWORK.levels[0], bandwidth=1e40),))
    endless = priced(arch, tp, replace(H100, bandwidth=1e40), fast)
    return float(step(endless, batch, 0.0).total) / US


def static_us(s: Sharded) -> float:
    """Matrices of mixers and dense parts, read once."""
    mixers = sum(m.count * sum(g.memory_fixed for g in m.gemms) for m in s.mixers)
    return float(mixers + sum(f.count * sum(g.memory_fixed for g in f.dense) for f in s.ffns)) / US


def kv_us(s: Sharded, seg: Segment) -> float:
    mixer = s.mixers[0]
    keys = keys_read(mixer.core.core, seg.start, seg.span, seg.tokens)
    return float(mixer.count * seg.requests * keys * mixer.core.key) / US


def reduce_us(s: Sharded, tokens: float, tp: float) -> float:
    """The figures count the buffer once: two of them a layer."""
    return float(2 * s.mixers[0].count * tokens * s.reduce_bytes) / HBM / US if tp > 1 else 0.0


DECODE_32 = Segment(requests=32.0, tokens=1.0, start=1024.0, span=1.0)
DECODE_1 = Segment(requests=1.0, tokens=1.0, start=1024.0, span=1.0)
PREFILL = Segment(requests=1.0, tokens=1024.0, start=0.0, span=1024.0)


@pytest.mark.parametrize(
    ("arch", "tp", "seg", "compute", "kv", "static", "experts", "reduce"),
    [
        (LLAMA_8B, 1.0, PREFILL, 14723.1218, 40.065, 4166.7593, 0.0, 0.0),
        (LLAMA_8B, 1.0, DECODE_32, 468.7871, 1283.3318, 4166.7593, 0.0, 0.0),
        (LLAMA_70B, 4.0, DECODE_32, 1128.5518, 802.0824, 10216.5733, 0.0, 25.0406),
        (MIXTRAL, 2.0, DECODE_32, 416.6964, 641.6659, 400.6499, 13461.8378, 5.0081),
        (MIXTRAL, 2.0, DECODE_1, 13.0218, 20.0521, 400.6499, 3365.4594, 0.1565),
    ],
    ids=["8b-prefill", "8b-decode", "70b-tp4", "mixtral-32", "mixtral-1"],
)
def test_worked_figures(
    arch: Architecture,
    tp: float,
    seg: Segment,
    compute: float,
    kv: float,
    static: float,
    experts: float,
    reduce: float,
) -> None:
    is_prefill = seg is PREFILL
    batch = Batch(prefill=seg if is_prefill else None, decode=None if is_prefill else seg)
    s = priced(arch, tp)
    near = {"rel": 1e-6, "abs": 5.1e-5}
    assert compute_us(arch, tp, batch) == pytest.approx(compute, **near)
    assert kv_us(s, seg) == pytest.approx(kv, rel=1e-6, abs=5.1e-4)
    assert static_us(s) == pytest.approx(static, **near)
    assert reduce_us(s, seg.requests * seg.tokens, tp) == pytest.approx(reduce, **near)
    if experts:
        routed = s.ffns[0].routed
        touched = min(8.0, 2.0 * seg.requests)  # as the figures count: no two tokens share an expert until all are read
        assert float(s.ffns[0].count * touched * routed.work.weights) / US == pytest.approx(experts, **near)


def test_uniform_routing_touches_two_experts_at_one_token_and_nearly_all_at_32() -> None:
    assert experts_touched(8.0, 2.0, 1.0, 1.0) == pytest.approx(2.0)
    assert experts_touched(8.0, 2.0, 32.0, 1.0) == pytest.approx(8 * (1 - 0.75**32))
    assert experts_touched(256.0, 8.0, 100.0, 16.0) == pytest.approx(16 * (1 - (1 - 8 / 256) ** 100))
    assert experts_touched(8.0, 8.0, 1.0, 1.0) == pytest.approx(8.0, rel=2e-7)
    assert experts_touched(0.0, 0.0, 10.0, 1.0) == 0.0


# ---------------------------------------------------------------------------------------- DeepSeek-V3

V3 = latent_attention(61.0, 7168.0, 128.0, 1536.0, 512.0, 128.0, 64.0, 128.0)


def test_deepseek_v3_attention_flops_of_128_tokens() -> None:
    _, _, kv_down, kv_up, out, _ = (shard_gemm(g, 1.0, 1.0) for g in V3.gemms)
    assert kv_down.flops(128.0) == 1_056_964_608
    assert kv_up.flops(128.0) == 2 * 2_147_483_648  # UK and UV
    assert out.flops(128.0) == 30_064_771_072
    rope = visible_keys(V3.core, 0.0, 128.0)
    assert core_flops(128.0, 64.0, 128.0, rope) == 134_217_728  # causal
    assert core_flops(128.0, 512.0, 128.0, 128.0) == 2_147_483_648  # the reference's no-PE scores: all T x T pairs


def test_deepseek_v3_attention_weights_and_cache() -> None:
    assert sum(shard_gemm(g, 1.0, 1.0).weights() for g in V3.gemms) == 187_105_280
    assert 7168.0**2 == 51_380_224
    assert V3.core.kv_elements == 576
    assert 2 * 128 * 128 / V3.core.kv_elements == pytest.approx(57, abs=0.2)
    arch = replace(LLAMA_8B, mixers=(V3,), ffns=())
    seg = Segment(requests=1.0, tokens=1.0, start=4096.0, span=1.0)
    assert kv_us(priced(arch, 1.0), seg) == pytest.approx(85.942, abs=5.1e-4)


def test_mla_cache_is_not_divided_by_tp() -> None:
    arch = replace(LLAMA_8B, mixers=(V3,))
    assert kv_bytes(arch, plan(8.0), 1000.0) == kv_bytes(arch, plan(1.0), 1000.0) == 61 * 576 * 2 * 1000
    assert priced(arch, 8.0).mixers[0].core.key == pytest.approx(priced(arch, 1.0).mixers[0].core.key)


def test_kv_heads_are_replicated_once_tp_exceeds_them() -> None:
    one, eight, sixteen = (float(kv_bytes(LLAMA_8B, plan(tp), 1000.0)) for tp in (1.0, 8.0, 16.0))
    assert one == 131072 * 1000
    assert eight == sixteen == one / 8
    qkv = LLAMA_8B.mixers[0].gemms[0]
    assert shard_gemm(qkv, 8.0, 8.0).n == (4096 + 2048) / 8
    assert shard_gemm(qkv, 16.0, 8.0).n == 4096 / 16 + 2048 / 8


# ---------------------------------------------------------------------------------------- operators


def test_causal_attention_is_4_h_dh_t_s_plus_half_t() -> None:
    core = LLAMA_8B.mixers[0].core
    keys = visible_keys(core, 300.0, 50.0)
    assert core_flops(32.0, 256.0, 50.0, keys) == pytest.approx(4 * 32 * 128 * 50 * (300 + 25))
    assert keys_read(core, 300.0, 50.0, 50.0) == 350


@pytest.mark.parametrize("start", [0.0, 50.0, 90.0, 200.0])
def test_window_is_the_mean_of_min_s_plus_t_w(start: float) -> None:
    core = attention(1.0, 64.0, 1.0, 1.0, 64.0, window=100.0, ratio=0.0).core
    points = 20000
    mean = sum(min(start + 40 * (i + 0.5) / points, 100.0) for i in range(points)) / points
    assert visible_keys(core, start, 40.0) == pytest.approx(mean, rel=1e-7)
    assert keys_read(core, start, 1.0, 1.0) <= 101.0


def test_sparse_and_compressed_cores_read_the_top_k() -> None:
    sparse = latent_attention(1.0, 64.0, 1.0, 0.0, 8.0, 8.0, 8.0, 8.0, top_k=2048.0).core
    assert visible_keys(sparse, 1e5, 1.0) == 2048
    assert keys_read(sparse, 1e5, 1.0, 1.0) == 2048
    packed = attention(1.0, 64.0, 1.0, 1.0, 64.0, window=128.0, ratio=0.25, top_k=512.0).core
    assert visible_keys(packed, 1000.0, 2.0) == pytest.approx(128 + 1001 / 4)
    assert visible_keys(packed, 1e5, 2.0) == pytest.approx(128 + 512)


# ---------------------------------------------------------------------------------------- collectives

NODE = Level(size=8.0, bandwidth=450e9, latency=2e-6)
RACK = Level(size=4.0, bandwidth=50e9, latency=6e-6)
HALL = Level(size=16.0, bandwidth=25e9, latency=20e-6)
BARE = replace(Coefficients.ideal(), hop_ll=1.0, hop_tree=1.0, hop_ll128=1.0, hop_simple=1.0)
SIZE = 3e8


def lines(collective: Any, levels: tuple[Level, ...], n: float, stride: float = 1.0, multicast: float = 0.0) -> Any:
    topology = Topology(levels=levels, multicast=multicast)
    result = collective(topology, coll.group(topology, n, stride), BARE)
    return [float(line(SIZE)) for line in result] if isinstance(result, tuple) else float(result(SIZE))


def test_flat_collectives() -> None:
    n, alpha, beta = 8.0, NODE.latency, 1 / NODE.bandwidth
    ring, ring128, doubling, _, one_shot = lines(coll.all_reduce, (NODE,), n)
    assert ring == ring128 == pytest.approx(2 * (n - 1) * alpha + 2 * (n - 1) / n * SIZE * beta)
    assert doubling == pytest.approx(2 * 3 * alpha + 2 * (n - 1) / n * SIZE * beta)
    assert one_shot == pytest.approx(2 * alpha + (n - 1) * SIZE * beta)
    assert lines(coll.nccl_all_reduce, (NODE,), n) == lines(coll.all_reduce, (NODE,), n)[:-1]
    assert lines(coll.all_gather, (NODE,), n) == pytest.approx([ring / 2, ring128 / 2, doubling / 2])
    multicast = lines(coll.all_reduce, (NODE,), n, multicast=1.0)[3]
    assert multicast == pytest.approx(SIZE * (1 + 1 / n) * beta)
    flat, pairwise, bruck = lines(coll.all_to_all, (NODE,), n)
    assert flat == pytest.approx(alpha + (n - 1) / n * SIZE * beta)
    assert pairwise == pytest.approx((n - 1) * alpha + (n - 1) / n * SIZE * beta)
    assert bruck == pytest.approx(3 * (alpha + SIZE / 2 * beta))
    assert lines(coll.point_to_point, (NODE,), n) == pytest.approx(alpha + SIZE * beta)


def test_two_levels() -> None:
    g, nodes, n = 8.0, 4.0, 32.0
    a1, b1, a2, b2 = NODE.latency, 1 / NODE.bandwidth, RACK.latency, 1 / RACK.bandwidth
    inner = (g - 1) * a1 + (g - 1) / g * SIZE * b1
    outer = (nodes - 1) * a2 + (nodes - 1) / nodes * SIZE / g * b2
    assert lines(coll.all_gather, (NODE, RACK), n)[0] == pytest.approx(inner + outer)
    assert lines(coll.all_reduce, (NODE, RACK), n)[0] == pytest.approx(2 * inner + 2 * outer)
    flat, pairwise, _ = lines(coll.all_to_all, (NODE, RACK), n)
    assert flat == pytest.approx(a1 + a2 + max(SIZE * (g - 1) / n * b1, SIZE * (n - g) / n * b2))
    hierarchical = (nodes - 1) * a2 + SIZE * (nodes - 1) / nodes * b2 + (g - 1) * a1 + SIZE * (g - 1) / g * b1
    assert pairwise == pytest.approx(hierarchical)
    assert lines(coll.point_to_point, (NODE, RACK), n) == pytest.approx(a1 + a2 + SIZE * b2)


def test_low_latency_protocols_take_the_shorter_way_at_each_level() -> None:
    """A step of doubling of 2.5 hops: the ring up to 4 ranks (3 hops against 5), doubling from 8 on (7 against 7.5 is
    still the ring; 15 against 10 is not)."""
    c = replace(BARE, hop_tree=2.5)
    for n, hops in ((2.0, 1.0), (4.0, 3.0), (8.0, 7.0), (16.0, 10.0)):
        topology = Topology(levels=(replace(NODE, size=n),))
        line = coll.all_gather(topology, coll.group(topology, n, 1.0), c)[2]
        assert float(line.fixed) == pytest.approx(hops * NODE.latency)


def test_without_rails_a_ring_leaves_a_unit_through_one_flow() -> None:
    """g = 8 ranks a node, 4 nodes: S (N-1)/N beta_2 through one flow, an eighth of that with a rail a rank."""
    shared = (NODE, replace(RACK, rails=0.0))
    extra = 3 / 4 * SIZE / RACK.bandwidth * (1 - 1 / 8)
    assert lines(coll.all_gather, shared, 32.0)[0] - lines(coll.all_gather, (NODE, RACK), 32.0)[0] == pytest.approx(
        extra
    )
    assert lines(coll.all_to_all, shared, 32.0) == lines(coll.all_to_all, (NODE, RACK), 32.0)


def test_three_levels() -> None:
    levels, n = (NODE, RACK, HALL), 64.0
    left, ring = SIZE, 0.0
    for level, g in zip(levels, (8, 4, 2), strict=True):
        ring += (g - 1) * level.latency + left * (g - 1) / g / level.bandwidth
        left /= g
    assert lines(coll.all_gather, levels, n)[0] == pytest.approx(ring)
    shares = (7 / 64 / NODE.bandwidth, 56 / 64 / RACK.bandwidth, 32 / 64 / HALL.bandwidth)
    flat = sum(level.latency for level in levels) + SIZE * max(shares)
    assert lines(coll.all_to_all, levels, n)[0] == pytest.approx(flat)


@pytest.mark.parametrize(
    ("n", "stride", "shape"),
    [(8, 1, (8, 1)), (8, 4, (2, 4)), (4, 8, (1, 4)), (2, 16, (1, 2)), (16, 2, (4, 4)), (2, 4, (2, 1)), (1, 8, (1, 1))],
)
def test_a_subgroup_has_the_shape_of_its_ranks_by_stride(n: float, stride: float, shape: tuple[float, ...]) -> None:
    topology = Topology(levels=(NODE, RACK))
    assert [float(f) for f in coll.group(topology, float(n), float(stride)).factors()] == list(shape)


def test_oversubscription_divides_a_levels_bandwidth() -> None:
    thin = replace(RACK, oversubscription=2.0)
    half = replace(RACK, bandwidth=25e9)
    assert lines(coll.all_gather, (NODE, thin), 32.0) == lines(coll.all_gather, (NODE, half), 32.0)


@pytest.mark.parametrize("name", DISPATCHES)
def test_dispatch_volumes(name: str) -> None:
    """Seconds of the network level alone: the first level is made endless."""
    g, nodes, n, k, limit = 8.0, 4.0, 32.0, 8.0, 2.0
    topology = Topology(levels=(replace(NODE, bandwidth=1e40, latency=0.0), replace(RACK, latency=0.0)))
    routed = Routed(experts=256.0, top_k=k, d_in=7168.0, width=2048.0, matrices=3.0, group_limit=limit)
    line = coll.dispatch(topology, coll.group(topology, n, 1.0), routed, float(DISPATCHES.index(name)), 1.0, BARE)
    volumes = SimpleNamespace(
        flat=k * (n - g) / n,
        rank_dedup=(n - 1) * (1 - (1 - 1 / n) ** k) * (n - g) / (n - 1),
        node_dedup=(nodes - 1) * (1 - (1 - 1 / nodes) ** k),
        node_limited=limit * (1 - (1 - 1 / limit) ** k) * (nodes - 1) / nodes,
    )
    volumes.auto = min(vars(volumes).values())
    assert float(line(1.0)) * RACK.bandwidth == pytest.approx(getattr(volumes, name))


def test_rank_dedup_on_one_level_is_the_references_volume() -> None:
    n, k = 16.0, 8.0
    topology = Topology(levels=(replace(NODE, size=n, latency=0.0),))
    routed = Routed(experts=256.0, top_k=k, d_in=7168.0, width=2048.0, matrices=3.0)
    line = coll.dispatch(topology, coll.group(topology, n, 1.0), routed, 2.0, 1.0, BARE)
    assert float(line(1.0)) * NODE.bandwidth == pytest.approx((n - 1) * (1 - (1 - 1 / n) ** k))
