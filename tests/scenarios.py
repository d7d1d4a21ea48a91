"""Random scenarios over the whole feature space, all of one pytree structure, so that a batch of them compiles once.

Every optional part is present; `ABSENT_*` below are its neutral numbers. `bare` drops what is neutral.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from dse.cost.coefficients import Coefficients
from dse.cost.evaluate import Scenario
from dse.cost.types import (
    CP_METHODS,
    DISPATCHES,
    OVERLAPS,
    Architecture,
    Core,
    Device,
    FeedForward,
    Gemm,
    Indexer,
    Level,
    Load,
    Mixer,
    Plan,
    Precision,
    Routed,
    State,
    Topology,
    replace,
)
from dse.units import BYTES_PER_ELEMENT, GIB, PRECISIONS, RATE_OF_PRECISION, RATES

Rng = np.random.Generator
MIXERS, GEMMS, LEVELS = 3, 6, 3
ABSENT_GEMM = Gemm(k=0.0, n=0.0)
ABSENT_CORE = Core(
    heads=0.0,
    kv_heads=1.0,
    score_dim=0.0,
    value_dim=0.0,
    score_dim_decode=0.0,
    value_dim_decode=0.0,
    kv_elements=0.0,
    ratio=0.0,
)
ABSENT_INDEXER = Indexer(heads=0.0, dim=0.0)
ABSENT_STATE = State(state_bytes=0.0, flops_per_token=0.0)
ABSENT_ROUTED = Routed(experts=0.0, top_k=0.0, d_in=0.0, width=0.0, matrices=3.0)
FEATURES = ("gqa", "mqa", "mla", "sliding", "chunked", "dsa", "compressed", "linear", "mamba")


def one_of(rng: Rng, *values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def log_uniform(rng: Rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


# ------------------------------------------------------------------------------------------ the model


def mixer(count: float, gemms: list[Gemm], core: Core | None = None, **parts: Any) -> Mixer:
    """A mixer padded to the common structure."""
    return Mixer(
        count=float(count),
        gemms=tuple(gemms + [ABSENT_GEMM] * (GEMMS - len(gemms))),
        core=core or ABSENT_CORE,
        indexer=parts.get("indexer", ABSENT_INDEXER),
        state=parts.get("state", ABSENT_STATE),
        extra_params=parts.get("extra_params", 0.0),
    )


def attention(count: float, d: float, heads: float, kv: float, dim: float, indexer: Any = None, **core: Any) -> Mixer:
    """Grouped-query attention: q and kv projections in one matrix, output projection."""
    gemms = [Gemm(k=d, n=heads * dim, n_kv=2 * kv * dim, split_n=1.0), Gemm(k=heads * dim, n=d, split_k=1.0)]
    numbers = {"score_dim": dim, "value_dim": dim, "score_dim_decode": dim, "value_dim_decode": dim}
    full = Core(heads=heads, kv_heads=kv, kv_elements=2 * kv * dim, **numbers, **core)
    if indexer is not None:
        gemms.append(Gemm(k=d, n=indexer.heads * indexer.dim + indexer.dim))
    return mixer(count, gemms, full, indexer=indexer or ABSENT_INDEXER, extra_params=2 * d)


def latent_attention(
    count: float, d: float, heads: float, rq: float, r: float, nope: float, rope: float, v: float, **parts: Any
) -> Mixer:
    """MLA: low-rank query (rq > 0), materialised in prefill, absorbed in decode."""
    query = [Gemm(k=d, n=rq), Gemm(k=rq, n=heads * (nope + rope), split_n=1.0)]
    gemms = [
        *(query if rq > 0 else [Gemm(k=d, n=heads * (nope + rope), split_n=1.0)]),
        Gemm(k=d, n=r + rope),
        Gemm(k=r, n=heads * (nope + v), split_n=1.0),
        Gemm(k=heads * v, n=d, split_k=1.0),
    ]
    indexer = parts.pop("indexer", None)
    if indexer is not None:
        gemms.append(Gemm(k=d, n=indexer.heads * indexer.dim + indexer.dim))
    core = Core(
        heads=heads,
        kv_heads=1.0,
        score_dim=nope + rope,
        value_dim=v,
        score_dim_decode=r + rope,
        value_dim_decode=r,
        kv_elements=r + rope,
        rematerialise=r * heads * (nope + v),
        **parts,
    )
    return mixer(count, gemms, core, indexer=indexer or ABSENT_INDEXER, extra_params=2 * d + rq + r)


def recurrent(count: float, d: float, heads: float, dim: float, state: float) -> Mixer:
    """Linear attention or SSM: heads of a dim x state matrix."""
    gemms = [Gemm(k=d, n=2 * heads * dim + 2 * state, split_n=1.0), Gemm(k=heads * dim, n=d, split_k=1.0)]
    numbers = State(state_bytes=4 * heads * dim * state, flops_per_token=6 * heads * dim * state)
    return mixer(count, gemms, state=numbers, extra_params=4 * heads * dim)


def random_mixer(rng: Rng, kind: str, d: float, count: float) -> Mixer:
    heads, dim = float(one_of(rng, 32, 64, 128)), float(one_of(rng, 64, 128))
    indexer = Indexer(heads=float(one_of(rng, 16, 64)), dim=128.0)
    window = float(one_of(rng, 128, 1024, 4096))
    top_k = float(one_of(rng, 512, 2048))
    kv = 1.0 if kind == "mqa" else float(one_of(rng, 2, 4, 8))
    if kind in ("mla", "dsa"):
        sparse = {"top_k": top_k, "indexer": indexer} if kind == "dsa" else {}
        rq = float(one_of(rng, 0, 1536))
        return latent_attention(count, d, heads, rq, 512.0, 128.0, 64.0, 128.0, **sparse)
    if kind == "linear":
        return recurrent(count, d, 32.0, 128.0, 128.0)
    if kind == "mamba":
        return recurrent(count, d, 64.0, 64.0, 256.0)
    local = {
        "sliding": {"window": window, "ratio": 0.0},
        "chunked": {"window": 8192.0, "window_fill": 0.5, "ratio": 0.0},
        "compressed": {"window": 128.0, "ratio": one_of(rng, 1 / 4, 1 / 128), "top_k": top_k, "indexer": indexer},
    }
    return attention(count, d, heads, kv, dim, **local.get(kind, {}))


def random_architecture(rng: Rng) -> tuple[Architecture, list[str], bool]:
    d, layers = float(one_of(rng, 2048, 4096, 7168, 8192)), int(rng.integers(24, 97))
    kinds = [one_of(rng, *FEATURES) for _ in range(int(rng.integers(1, MIXERS + 1)))]
    cuts = np.sort(rng.integers(1, layers, len(kinds) - 1)) if len(kinds) > 1 else np.array([], int)
    counts = np.diff([0, *cuts, layers])
    mixers = [random_mixer(rng, kind, d, float(n)) for kind, n in zip(kinds, counts, strict=True)]
    mixers += [mixer(0.0, [])] * (MIXERS - len(mixers))
    moe = bool(rng.random() < 0.65)
    dense_layers = int(rng.integers(0, 4)) if moe else layers
    width = float(one_of(rng, 4096, 14336, 28672)) if dense_layers else 0.0
    dense = FeedForward(count=float(dense_layers), width=width, matrices=3.0, extra_params=d, routed=ABSENT_ROUTED)
    if moe:
        experts, top_k = one_of(rng, (8, 2), (64, 6), (128, 8), (256, 8), (384, 8))
        latent = float(one_of(rng, 0, 0, 1024))
        routed = Routed(
            experts=float(experts),
            top_k=float(top_k),
            d_in=latent or d,
            width=float(one_of(rng, 768, 2048, 14336 if experts == 8 else 1536)),
            matrices=float(one_of(rng, 2, 3)),
            latent=latent,
            group_limit=float(one_of(rng, 0, 4)),
        )
        shared = float(one_of(rng, 0, 2048))
        sparse = FeedForward(
            count=float(layers - dense_layers),
            width=shared,
            matrices=3.0,
            extra_params=d * (experts + 1),
            routed=routed,
        )
    else:
        sparse = FeedForward(count=0.0, width=0.0, matrices=3.0, routed=ABSENT_ROUTED)
    arch = Architecture(
        hidden=d,
        vocab=float(one_of(rng, 32000, 128256, 201088)),
        embeddings=float(one_of(rng, 1, 2)),
        mixers=tuple(mixers),
        ffns=(dense, sparse),
        other_params=d * one_of(rng, 1, 1e5),
        mtp_params=one_of(rng, 0.0, 1e9),
    )
    return arch, kinds, moe


# ---------------------------------------------------------------------------------------- the machine


def random_device(rng: Rng) -> Device:
    bf16 = log_uniform(rng, 1.2e14, 2.5e15)
    return Device(
        peak_bf16=bf16,
        peak_fp8=bf16 * one_of(rng, 0, 2),
        peak_fp4=bf16 * one_of(rng, 0, 4),
        peak_int8=bf16 * one_of(rng, 0, 2),
        bandwidth=log_uniform(rng, 8e11, 8e12),
        capacity=float(one_of(rng, 24, 48, 80, 141, 192, 288)) * GIB,
        power=rng.uniform(300, 1400),
        price=rng.uniform(0.5, 8),
    )


def random_topology(rng: Rng, gpus: float) -> Topology:
    """One, two or three levels that hold `gpus`; those that are missing have size 1."""
    sizes = one_of(rng, [None], [8, None], [4, None], [72, None], [2, 4, None], [8, 4, None], [4, 18, None])
    levels = []
    for i in range(LEVELS):
        if i >= len(sizes):
            levels.append(Level(size=1.0, bandwidth=levels[-1].bandwidth, latency=0.0))
            continue
        size = float(sizes[i] or max(1, np.ceil(gpus / np.prod(sizes[:i] or [1]))))
        link = log_uniform(rng, 3e10, 9e11) / 6.0**i
        over = float(one_of(rng, 1, 1, 2))
        hop, rails = log_uniform(rng, 1e-6, 1e-5), float(one_of(rng, 0, 1))
        levels.append(Level(size=size, bandwidth=link, latency=hop, oversubscription=over, rails=rails))
    return Topology(levels=tuple(levels), multicast=float(one_of(rng, 0, 1)))


# ------------------------------------------------------------------------------------- what runs on it


def random_precision(rng: Rng) -> Precision:
    def part() -> tuple[float, float, float]:
        name = one_of(rng, *PRECISIONS)
        rate = RATE_OF_PRECISION[name]
        act = {"bf16": 2.0, "fp8": 1.0, "fp4": BYTES_PER_ELEMENT["fp4"], "int8": 1.0}[rate]
        return BYTES_PER_ELEMENT[name], act, float(RATES.index(rate))

    numbers = {}
    for name in ("mixer", "ffn", "expert"):
        numbers |= dict(zip((f"{name}_bytes", f"{name}_act", f"{name}_rate"), part(), strict=True))
    kv, dispatch = float(one_of(rng, 2, 1, BYTES_PER_ELEMENT["fp4"])), float(one_of(rng, 1, 2))
    return Precision(**numbers, kv_bytes=kv, dispatch_bytes=dispatch, combine_bytes=float(one_of(rng, 1, 2)))


def random_plan(rng: Rng, moe: bool) -> Plan:
    tp, cp = float(one_of(rng, 1, 1, 2, 4, 8, 16)), float(one_of(rng, 1, 1, 2, 4, 8))
    dp, pp = float(one_of(rng, 1, 1, 2, 8)), float(one_of(rng, 1, 1, 2, 4))
    stage = tp * cp * dp
    moe_tp = float(one_of(rng, *[t for t in (1, 1, 2, 4) if stage % t == 0])) if moe else 1.0
    return Plan(
        tp=tp,
        pp=pp,
        attention_dp=dp,
        cp=cp,
        moe_tp=moe_tp,
        moe_ep=stage / moe_tp if moe else 1.0,
        replicas=float(one_of(rng, 1, 3)),
        precision=random_precision(rng),
        overlap_prefill=float(rng.integers(len(OVERLAPS))),
        overlap_decode=float(rng.integers(len(OVERLAPS))),
        microbatches=float(one_of(rng, 0, 0, 1, 2, 6)),
        sequence_parallel=float(one_of(rng, 0, 1)),
        cp_method=float(rng.integers(len(CP_METHODS))) if cp > 1 else 0.0,
        dispatch=float(rng.integers(len(DISPATCHES))),
    )


def random_load(rng: Rng) -> Load:
    isl = np.floor(log_uniform(rng, 1, 1e6))
    return Load(
        isl=float(isl),
        osl=float(np.floor(log_uniform(rng, 1, 32768))),
        concurrency=float(np.floor(log_uniform(rng, 1, 4096))),
        chunk=float(one_of(rng, 512, 2048, 8192, 32768)),
        prefix_hit=float(one_of(rng, 0, 0, 0.25, 0.5, 0.95)),
        waves=float(rng.uniform(1, 20)),
        acceptance=float(rng.uniform(0, 0.95)),
        draft_tokens=float(one_of(rng, 0, 0, 1, 3)),
        static_batch=float(rng.random() < 0.2),
    )


def random_coefficients(rng: Rng) -> Coefficients:
    """The defaults, each shaken by up to 20%. What is None by default stays so: see `with_priorities`."""
    values = {}
    for field in fields(Coefficients):
        default = field.default
        values[field.name] = None if default is None else float(default) * rng.uniform(0.8, 1.2)
    return Coefficients(**values)


def random_scenario(rng: Rng) -> Scenario:
    arch, _, moe = random_architecture(rng)
    plan = random_plan(rng, moe)
    return Scenario(
        architecture=arch,
        device=random_device(rng),
        topology=random_topology(rng, plan.tp * plan.cp * plan.attention_dp * plan.pp),
        plan=plan,
        load=random_load(rng),
        coefficients=random_coefficients(rng),
    )


def random_scenarios(n: int, seed: int = 0) -> list[Scenario]:
    rng = np.random.default_rng(seed)
    return [random_scenario(rng) for _ in range(n)]


def with_priorities(scenarios: list[Scenario], seed: int = 0) -> list[Scenario]:
    """The same of engines that give prompts steps of their own: never, always or at times. A program of its own."""
    rng = np.random.default_rng(seed)
    return [
        replace(x, coefficients=replace(x.coefficients, prefill_priority=float(one_of(rng, 0, 1, rng.uniform(0, 1)))))
        for x in scenarios
    ]


# --------------------------------------------------------------------------------------------- as dicts


def as_dict(tree: Any) -> Any:
    """Nested dicts of a pytree of dataclasses; numbers as Python floats."""
    if is_dataclass(tree) and not isinstance(tree, type):
        return {f.name: as_dict(getattr(tree, f.name)) for f in fields(tree)}
    if isinstance(tree, tuple | list):
        return [as_dict(item) for item in tree]
    return None if tree is None else float(tree)
