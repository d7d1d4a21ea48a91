"""Compiled spaces: the shipped ones, plans and loads as the cost model takes them, rows for people, legal sampling."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dse.cost.types import CP_METHODS, DISPATCHES, OVERLAPS
from dse.errors import InputError
from dse.space import (
    CompiledSpace,
    axis_names,
    compile_space,
    describe,
    load_space,
    loads,
    parse_space,
    plans,
    rank_decode,
    rank_encode,
)
from dse.space.legal import MOST_DESIGNS

FOLDER = Path(__file__).parents[1] / "search_spaces"
SHIPPED = sorted(p.stem for p in FOLDER.glob("*.yaml") if "\npipeline:" not in p.read_text())
MIXED: dict[str, Any] = {
    "models": ["Llama-3.1-8B", "Qwen3-30B-A3B"],
    "clusters": ["h100-dgx", {"cluster": "h200-hgx"}, {"gpu": "b200"}, "gb200"],
    "gpus": [1, 4, 8],
    "workloads": [{"isl": 1024, "osl": 128}, {"isl": 4096, "osl": 256, "prefix_hit": 0.5, "weight": 3}],
    "axes": {
        "tp": "auto",
        "pp": [1, 2],
        "attention_dp": [1, 2],
        "cp": [1, 2],
        "ep": "auto",
        "weights": ["bf16", "native", "fp8"],
        "kv": ["bf16", "fp8"],
        "overlap_prefill": ["none", "two_batch"],
        "overlap_decode": ["none", "full", "shared_expert"],
        "dispatch": ["auto", "flat"],
        "cp_method": ["ring", "pass_kv"],
        "sequence_parallel": [True, False],
        "microbatches": ["auto", 2, 4],
        "concurrency": [1, 8, 64],
        "chunk": [2048, 8192],
    },
}


@pytest.fixture(scope="module")
def mixed() -> CompiledSpace:
    return compile_space(parse_space(MIXED, "mixed"))


def shipped(name: str) -> CompiledSpace:
    return compile_space(load_space(FOLDER / f"{name}.yaml"))


def test_the_promised_spaces_are_shipped() -> None:
    promised = """quickstart deepseek_v3_h200 deepseek_v3_nvl72 qwen3_235b_b200
        moe_10b_plan long_context_cp gpu_shootout billion"""
    assert set(promised.split()) <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_spaces_compile_to_legal_points(name: str) -> None:
    c = shipped(name)
    assert c.spec.name == name
    assert c.spec.description
    assert c.legal == len(c.designs) * len(c.operating) >= 1
    assert c.enumerated == c.legal + sum(c.cuts.values())
    d = c.designs
    assert np.array_equal(d.tp * d.attention_dp * d.cp * d.pp * d.replicas, d.gpus)
    moe = np.array([any(f.routed for f in e.ffns) for e in c.models])[d.model]
    assert np.array_equal((d.tp * d.attention_dp * d.cp)[moe], (d.moe_ep * d.moe_tp)[moe])
    assert np.all(d.gpus <= np.array([m.size for m in c.machines])[d.machine])
    assert sum(c.workloads.weight) == pytest.approx(1.0)
    for tree, rows in ((c.architectures, c.models), (c.devices, c.machines), (c.topologies, c.machines)):
        assert {leaf.shape for leaf in jax.tree.leaves(tree)} == {(len(rows),)}
    sample = np.unique(np.linspace(0, c.legal - 1, 50).astype(np.int64))
    assert not describe(c, sample).isna().any().any()


def test_quickstart_is_small_and_billion_is_not() -> None:
    quick = shipped("quickstart")
    assert 2_000 <= quick.legal <= 100_000
    assert quick.designs.gpus.max() == 16
    tracemalloc.start()
    start = time.perf_counter()
    billion = shipped("billion")
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert billion.legal >= 10**9
    assert 10**4 <= len(billion.designs) <= 10**5
    assert seconds < 10
    assert peak < 200 * 2**20


def test_the_moe_plan_brings_its_own_machine() -> None:
    c = shipped("moe_10b_plan")
    assert (c.machines[0].gpu.name, c.machines[0].cluster.name) == ("plan-gpu", "plan-cluster")
    assert float(c.devices.peak_bf16[0]) == 400e12
    assert float(c.devices.capacity[0]) == pytest.approx(64e9)
    assert float(c.devices.bandwidth[0]) == 1.8e12
    assert ("ttft_ms", "max", 10_000.0) in c.constraints
    assert ("total_tok_s_gpu", "min", 100_000.0) in c.constraints


def test_machines_pair_gpus_with_clusters(mixed: CompiledSpace) -> None:
    assert [(m.gpu.name, m.cluster.name) for m in mixed.machines] == [
        ("h100", "h100-dgx"),
        ("h200", "h200-hgx"),
        ("b200", "b200-hgx"),
        ("gb200", "gb200-nvl72"),
    ]


def test_plans_are_batched_and_precise(mixed: CompiledSpace) -> None:
    rows = np.arange(len(mixed.designs))[::7]
    p, d = plans(mixed, rows), mixed.designs
    assert {leaf.shape for leaf in jax.tree.leaves(p)} == {(len(rows),)}
    assert {leaf.dtype for leaf in jax.tree.leaves(p)} == {np.dtype(np.float64)}
    for name in ("tp", "pp", "attention_dp", "cp", "moe_tp", "moe_ep", "replicas", "overlap_decode", "cp_method"):
        assert np.array_equal(getattr(p, name), getattr(d, name)[rows])
    kv = np.array([name.kv for name in mixed.precision_names])[d.precision_index[rows]]
    assert np.array_equal(p.precision.kv_bytes, np.where(kv == "fp8", 1.0, 2.0))
    assert np.array_equal(plans(mixed).tp, d.tp)
    assert jax.tree.structure(plans(mixed, rows[:1])) == jax.tree.structure(p)


def test_parts_that_a_space_never_uses_are_absent() -> None:
    p = plans(shipped("quickstart"))
    assert (p.cp_method, p.dispatch, p.sequence_parallel) == (None, None, None)


def test_loads_are_points_by_workloads(mixed: CompiledSpace) -> None:
    full = loads(mixed)
    assert {leaf.shape for leaf in jax.tree.leaves(full)} == {(6, 2)}
    assert full.isl.tolist() == [[1024, 4096]] * 6
    assert full.prefix_hit[0].tolist() == [0, 0.5]
    assert full.concurrency[:, 0].tolist() == [1, 1, 8, 8, 64, 64]
    assert full.chunk[:, 1].tolist() == [2048, 8192] * 3
    assert not full.static_batch.any()
    assert loads(mixed, np.array([3])).concurrency.tolist() == [[8, 8]]
    assert mixed.workloads.weight.tolist() == [0.25, 0.75]


def test_a_static_batch_says_so() -> None:
    c = compile_space(parse_space({**MIXED, "axes": {"batch": [4, 8]}}))
    assert loads(c).static_batch.tolist() == [[1, 1], [1, 1]]
    assert describe(c, [0, 1])[["concurrency", "static_batch"]].to_numpy().tolist() == [[4, 1], [8, 1]]


def test_options_reach_the_load() -> None:
    c = compile_space(parse_space({**MIXED, "options": {"acceptance": 0.9, "waves": 2}}))
    assert set(loads(c).acceptance.ravel()) == {0.9}
    assert set(loads(c).waves.ravel()) == {2.0}


def test_describe_round_trips(mixed: CompiledSpace) -> None:
    """Every point's row says all that tells it from the others, and reads back to the same numbers."""
    flat = np.arange(0, mixed.legal, 5)
    rows = describe(mixed, flat)
    d, o = mixed.designs, mixed.operating
    design, q = flat // len(o), flat % len(o)
    assert not rows.drop(columns=["isl", "osl", "prefix_hit"]).duplicated().any()
    for name in ("tp", "pp", "attention_dp", "cp", "moe_tp", "moe_ep", "replicas", "gpus", "microbatches"):
        assert np.array_equal(rows[name], getattr(d, name)[design])
    for name in ("concurrency", "chunk"):
        assert np.array_equal(rows[name], getattr(o, name)[q])
    rule = rows["overlap"].str.split("/")
    assert np.array_equal([OVERLAPS.index(r[0]) for r in rule], d.overlap_prefill[design])
    assert np.array_equal([OVERLAPS.index(r[-1]) for r in rule], d.overlap_decode[design])
    assert np.array_equal([DISPATCHES.index(x) for x in rows["dispatch"]], d.dispatch[design])
    assert np.array_equal([CP_METHODS.index(x) for x in rows["cp_method"]], d.cp_method[design])
    assert [mixed.models[i].name for i in d.model[design]] == rows["model"].tolist()
    assert [mixed.machines[i].gpu.name for i in d.machine[design]] == rows["gpu"].tolist()
    assert set(rows["weights"]) == {"bf16", "fp8"}
    assert set(rows["isl"]) == {"1024|4096"}
    assert set(rows["prefix_hit"]) == {"0.0|0.5"}


def test_describe_has_the_columns_of_estimate() -> None:
    rows = describe(shipped("quickstart"), [0, 5])
    contract = """model gpu isl osl cluster weights kv tp pp attention_dp moe_tp moe_ep cp concurrency chunk prefix_hit
        speculation overlap gpus replicas"""
    assert set(contract.split()) <= set(rows.columns)
    assert rows["isl"].tolist() == [2048, 2048]
    assert rows["prefix_hit"].dtype == np.float64


def test_describe_refuses_what_is_outside(mixed: CompiledSpace) -> None:
    for flat in (-1, mixed.legal):
        with pytest.raises(InputError, match=f"index {flat} is outside the space"):
            describe(mixed, [flat])
    assert len(describe(mixed, [])) == 0


def test_axis_names_are_those_with_a_choice(mixed: CompiledSpace) -> None:
    names = axis_names(mixed)
    assert names[:4] == ("model", "machine", "gpus", "pp")
    assert names[-2:] == ("concurrency", "chunk")
    assert "activations" not in names
    assert "draft_tokens" not in names
    assert axis_names(shipped("quickstart")) == (
        "gpus", "pp", "tp", "weights", "kv", "overlap_prefill", "concurrency", "chunk",
    )  # fmt: skip


def test_every_point_is_reached_and_none_but_legal_ones(mixed: CompiledSpace) -> None:
    everything = np.arange(mixed.legal)
    u = rank_encode(mixed, everything)
    assert u.shape == (mixed.legal, len(axis_names(mixed)))
    assert bool(np.all((u > 0) & (u < 1)))
    assert np.array_equal(rank_decode(mixed, u), everything)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_coordinates_are_legal_and_fair(mixed: CompiledSpace, seed: int) -> None:
    u = np.random.default_rng(seed).random((64, len(axis_names(mixed))))
    u[0], u[1] = 0.0, np.nextafter(1.0, 0.0)
    flat = rank_decode(mixed, u)
    assert flat[0] == 0
    assert flat[1] == mixed.legal - 1
    assert np.all((flat >= 0) & (flat < mixed.legal))
    # the values of an axis depend on the coordinates up to it, and on no later ones
    k = 5
    later = u.copy()
    later[:, k:] = 0.5
    names = axis_names(mixed)[:k]
    first, again = (mixed.designs, flat // 6), (mixed.designs, rank_decode(mixed, later) // 6)
    for name in names:
        assert np.array_equal(getattr(first[0], name)[first[1]], getattr(again[0], name)[again[1]])


def test_ranks_are_even_among_what_is_legal(mixed: CompiledSpace) -> None:
    """Half of [0, 1) goes to each of two models, however many designs each has."""
    u = np.full((1000, len(axis_names(mixed))), 0.5)
    u[:, 0] = np.linspace(0, 1, 1000, endpoint=False)
    assert np.bincount(mixed.designs.model[rank_decode(mixed, u) // 6]).tolist() == [500, 500]


def test_bad_coordinates_are_refused(mixed: CompiledSpace) -> None:
    with pytest.raises(InputError, match=r"allowed: \(n, "):
        rank_decode(mixed, np.zeros((3, 2)))
    for bad in (1.0, -0.1, np.nan):
        with pytest.raises(InputError, match=r"must lie in \[0, 1\)"):
            rank_decode(mixed, np.full((1, len(axis_names(mixed))), bad))


def test_a_single_point_has_no_axes() -> None:
    c = compile_space(parse_space({**MIXED, "models": ["Llama-3.1-8B"], "clusters": "h100", "gpus": 8, "axes": {
        "tp": 8, "concurrency": 4, "chunk": 2048}}))  # fmt: skip
    assert (c.legal, axis_names(c)) == (1, ())
    assert rank_decode(c, np.zeros((2, 0))).tolist() == [0, 0]
    assert rank_encode(c, np.array([0])).shape == (1, 0)


@pytest.mark.slow
def test_a_space_near_the_limit_stays_small() -> None:
    """Millions of designs compile within a minute and a gigabyte, and can still be sampled."""
    rules = {
        name: "all" for name in ("overlap_prefill", "overlap_decode", "dispatch", "cp_method", "sequence_parallel")
    }
    axes = {**rules, **dict.fromkeys(("tp", "pp", "cp", "attention_dp", "ep"), "auto"), "kv": ["bf16", "fp8"]}
    tracemalloc.start()
    c = compile_space(
        parse_space({**MIXED, "models": ["DeepSeek-V3"], "clusters": ["h200"], "gpus": [8, 16, 32, 64], "axes": axes})
    )
    u = np.random.default_rng(0).random((1000, len(axis_names(c))))
    flat = rank_decode(c, u)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert MOST_DESIGNS // 10 < len(c.designs) <= MOST_DESIGNS
    assert c.enumerated == c.legal + sum(c.cuts.values())
    assert np.array_equal(rank_decode(c, rank_encode(c, flat)), flat)
    assert peak < 2**30
