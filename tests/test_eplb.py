"""EPLB: the busiest rank's share against greedy replication and packing, its limits, memory, and the axes of speed."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pandas as pd
import pytest
from conftest import columns, in_double
from scenarios import random_scenarios
from test_cost_oracle import assert_close, expect

from dse.catalog.coefficients import CoefficientSet
from dse.cost.eplb import balanced, exponent
from dse.errors import InputError
from dse.search.run import search
from dse.space import compile_space, parse_space
from dse.space.cases import estimate_cases

PHYSICS = CoefficientSet("physics")


def greedy(experts: int, ranks: int, replicas: int, power: float) -> float:
    """Replicate the expert with the most load a replica, then pack fullest first: busiest over mean."""
    load = np.arange(1, experts + 1) ** -power
    count = np.ones(experts)
    for _ in range(replicas):
        count[np.argmax(load / count)] += 1
    slots = np.sort(np.repeat(load / count, count.astype(int)))[::-1]
    held, free = np.zeros(ranks), np.full(ranks, (experts + replicas) // ranks)
    for slot in slots:
        rank = int(np.argmin(np.where(free > 0, held, np.inf)))
        held[rank] += slot
        free[rank] -= 1
    return float(held.max() / held.mean())


def at_random(experts: int, ranks: int, power: float) -> float:
    """The busiest rank over the mean where experts lie anywhere."""
    rng, load = np.random.default_rng(0), np.arange(1, experts + 1) ** -power
    drawn = [rng.permutation(load).reshape(ranks, -1).sum(1).max() for _ in range(200)]
    return float(np.mean(drawn) / load.sum() * ranks)


def share(without: float, experts: float, ranks: float, replicas: float) -> float:
    with jax.enable_x64(True):
        return float(balanced(without, experts, ranks, replicas))


@pytest.mark.parametrize("power", [0.1, 0.2, 0.3, 0.5])
def test_one_slot_a_rank_is_greedy_replication(power: float) -> None:
    """DeepSeek's decode: 256 experts and 32 replicas on 288 ranks."""
    without = greedy(256, 256, 0, power)
    assert without > 1.5
    assert share(without, 256.0, 288.0, 32.0) == pytest.approx(greedy(256, 288, 32, power), rel=0.02)


@pytest.mark.parametrize("ranks", [8, 32, 64, 128, 256])
@pytest.mark.parametrize("power", [0.1, 0.3, 0.5, 0.7])
def test_several_slots_a_rank_pack_as_greedily(ranks: int, power: float) -> None:
    without = at_random(256, ranks, power)
    for times in (1, 2, 4):
        got, wanted = share(without, 256.0, ranks, times * ranks), greedy(256, ranks, times * ranks, power)
        assert got == pytest.approx(wanted, rel=0.12)
        assert 1.0 <= got <= without


def test_limits() -> None:
    assert share(1.2, 256.0, 32.0, 0.0) == 1.2
    assert share(1.2, 256.0, 32.0, 32.0 * 10_000) == pytest.approx(1.0, abs=1e-3)
    assert share(1.0, 256.0, 1.0, 32.0) == 1.0
    hottest = [share(3.0, 256.0, 256.0 + r, float(r)) / (256.0 + r) for r in (0, 16, 32, 64, 128, 256)]
    assert (np.diff(hottest) < 0).all()  # load of the hottest slot, each rank holding one


def test_the_exponent_gives_the_hottest_expert_and_has_a_slope() -> None:
    with jax.enable_x64(True):
        a = exponent(2.5, 256.0)
        assert float((1 - a) * 256.0**a) == pytest.approx(2.5, rel=1e-9)
        slope = jax.grad(lambda x: balanced(x, 256.0, 288.0, 32.0))(2.0)
        step = (share(2.0 + 1e-5, 256.0, 288.0, 32.0) - share(2.0 - 1e-5, 256.0, 288.0, 32.0)) / 2e-5
    assert float(slope) == pytest.approx(step, rel=1e-4)


def test_the_model_with_replicas_agrees_with_the_oracle() -> None:
    some = random_scenarios(60, seed=3)
    replicas = [x.plan.moe_ep * (i % 3) for i, x in enumerate(some)]
    batch = [replace(x, plan=replace(x.plan, eplb_replicas=r)) for x, r in zip(some, replicas, strict=True)]
    assert sum(r > 0 and x.plan.moe_ep > 1 for r, x in zip(replicas, some, strict=True)) > 10
    assert_close(columns(in_double(batch)), expect(batch), 1e-10)


ROW = {"model": "DeepSeek-V3", "gpu": "h200", "isl": 2000, "osl": 1000, "attention_dp": 32, "moe_ep": 32}
ROW |= {"concurrency": 4096, "weights": "fp8"}


def priced(*changes: dict[str, object]) -> pd.DataFrame:
    return estimate_cases(pd.DataFrame([{**ROW, **x} for x in changes]), PHYSICS)


def test_columns_replicas_take_memory_and_give_time() -> None:
    out = priced(*({"eplb_replicas": r} for r in (0, 32, 64)), {"eplb_replicas": 5}, {})
    assert out["reason"].tolist()[:3] == ["", "", ""]
    assert "5 with 256 experts do not fill 32 ranks" in out["reason"][3]
    experts = 58 * 3 * 7168 * 2048 * 32 / 32 / 2**30  # one more fp8 expert a rank and layer
    assert np.diff(out["weights_gib"][:3]) == pytest.approx([experts, experts], rel=0.01)
    assert out["decode_experts_ms"][1] < out["decode_experts_ms"][0]
    assert out["ttft_ms"][4] == out["ttft_ms"][0]


def test_columns_speculation_and_acceptance() -> None:
    drafts = priced(*({"speculation": n, "acceptance": 0.8} for n in (0, 1, 3)))
    assert (np.diff(drafts["decode_step_ms"]) > 0).all()
    assert drafts["weights_gib"][1] > drafts["weights_gib"][0]  # MTP modules
    accepted = priced(*({"speculation": 3, "acceptance": p} for p in (0.0, 0.3, 0.7, 1.0)))
    assert (np.diff(accepted["tpot_ms"]) < 0).all()
    assert "out of range" in priced({"acceptance": 1.2})["reason"][0]
    hits = priced(*({"prefix_hit": h} for h in (0.0, 0.5, 0.9)))
    assert (np.diff(hits["ttft_ms"]) < 0).all()


SPACE = {
    "models": ["DeepSeek-V3"],
    "clusters": ["h200-hgx"],
    "gpus": [32],
    "workloads": [{"isl": 2000, "osl": 1000, "prefix_hit": 0.5}],
    "axes": {
        "tp": 1,
        "attention_dp": 32,
        "ep": 32,
        "eplb_replicas": [0, 32, 40],
        "draft_tokens": [0, 1, 3],
        "concurrency": [512, 4096],
    },
    "options": {"acceptance": 0.8},
}


def test_a_search_over_replicas_and_drafts_equals_estimate_of_its_rows() -> None:
    result = search(parse_space(SPACE), coefficients=PHYSICS)
    rows = result.candidates
    assert set(rows["eplb_replicas"]) == {0, 32}
    assert set(rows["speculation"]) == {0, 1, 3}
    again = estimate_cases(rows[[name for name in rows if name not in ("ttft_ms", "tpot_ms")]], PHYSICS)
    for name in ("ttft_ms", "tpot_ms", "output_tok_s_gpu", "memory_gib"):
        assert again[name].to_numpy(float) == pytest.approx(rows[name].to_numpy(float), rel=1e-9)
    assert result.cuts["eplb_replicas do not fill the ranks evenly"] == 6


def test_replicas_without_experts_are_one_plan() -> None:
    axes = {"eplb_replicas": [0, 8], "concurrency": [8]}
    dense = compile_space(parse_space({**SPACE, "models": ["Llama-3.1-8B"], "gpus": [8], "axes": axes}))
    assert not dense.designs.eplb_replicas.any()
    with pytest.raises(InputError, match="eplb_replicas"):
        parse_space({**SPACE, "axes": {"eplb_replicas": -1}})
