"""Draft models in split pools: decode drafts, prefill computes the draft's prompts, and its cache travels."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

from dse.catalog.coefficients import CoefficientSet
from dse.cost.coefficients import Coefficients
from dse.cost.memory import kv_bytes, weights
from dse.cost.pool_steps import prefill_times
from dse.cost.shard import draft_plan, shard
from dse.cost.step import Batch, Segment, step
from dse.report.files import csv
from dse.search.pool_recheck import recheck_flat
from dse.search.pools import pair_all
from dse.search.run import search
from dse.space import parse_space
from dse.space.cases import _records, _split_case, estimate_cases, splits_of
from dse.space.pool_space import compile_pools, describe_pairs, draft_names

PHYSICS = CoefficientSet("physics")
C = (Coefficients(), Coefficients())
SMALL = "Llama-3.2-1B"
ROW: dict[str, Any] = {
    "model": "Llama-3.1-70B",
    "gpu": "h100",
    "isl": 2000,
    "osl": 300,
    "concurrency": 24,
    "weights": "fp8",
    "prefill_num_workers": 1,
    "prefill_tp_size": 4,
    "decode_num_workers": 2,
    "decode_tp_size": 4,
}
DRAFTED = {**ROW, "speculation": 3, "acceptance": 0.8, "draft_model": SMALL}
SPACE: dict[str, Any] = {
    "name": "pools",
    "models": ["Llama-3.1-70B"],
    "clusters": ["h100-dgx"],
    "gpus": [12],
    "workloads": [{"isl": 2000, "osl": 300}],
    "disaggregated": {
        "aggregated": False,
        "prefill": {"gpus": [2, 4], "tp": [2, 4], "weights": "fp8", "chunk": 4096},
        "decode": {
            "gpus": [2, 4],
            "tp": [2, 4],
            "weights": "fp8",
            "concurrency": [4, 40],
            "draft_tokens": [0, 2],
            "draft_model": [SMALL, "0.9B"],
            "draft_tp": ["auto", 1],
            "acceptance": [0.6, 0.8],
        },
    },
    "objectives": {"output_tok_s_gpu": "max", "tpot_ms": "min", "ttft_ms": "min"},
}


def estimate(*rows: dict[str, Any]) -> pd.DataFrame:
    return estimate_cases(pd.DataFrame([*rows, DRAFTED]).astype(object), PHYSICS).iloc[: len(rows)]


def test_prompts_pass_through_the_draft_and_its_cache_travels() -> None:
    with jax.enable_x64(True):
        cases = [_split_case(row) for row in _records(pd.DataFrame([DRAFTED]).astype(object))]
        x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[0], splits_of(cases, PHYSICS))
        p, d = x.prefill, x.decode
        parts = (p.device, p.topology)
        small = p.plan.draft.architecture
        own = shard(small, *parts, draft_plan(p.plan), p.coefficients)
        target = shard(p.architecture, *parts, replace(p.plan, draft=None), p.coefficients)
        prompt = Segment(requests=1.0, tokens=2000.0, start=0.0, span=2000.0)
        more = float(step(own, Batch(prefill=prompt, decode=None), 0.0).body)
        both = prefill_times(shard(p.architecture, *parts, p.plan, p.coefficients), p.load)
        assert float(both.idle - prefill_times(target, p.load).idle) == pytest.approx(more, rel=1e-6)
        travels = float(kv_bytes(d.architecture, d.plan, 2000.0)) / float(
            kv_bytes(d.architecture, replace(d.plan, draft=None), 2000.0)
        )
        held = float(weights(small, draft_plan(p.plan), 0.0)) / 2**30
    out = estimate(ROW, DRAFTED)
    base = PHYSICS.of().transfer_base * 1e3
    assert (out["transfer_ms"].iloc[1] - base) / (out["transfer_ms"].iloc[0] - base) == pytest.approx(travels, rel=0.01)
    assert out["prefill_memory_gib"].iloc[1] - out["prefill_memory_gib"].iloc[0] > held
    assert out["ttft_ms"].iloc[1] > out["ttft_ms"].iloc[0] + 1e3 * more
    assert out["tpot_ms"].iloc[1] < out["tpot_ms"].iloc[0]


def test_who_drafts_nothing_holds_nothing() -> None:
    out = estimate({**ROW, "speculation": 0, "draft_model": SMALL}, ROW, {**DRAFTED, "decode_draft_tp": 1}, DRAFTED)
    for name in ("ttft_ms", "tpot_ms", "memory_gib", "prefill_memory_gib", "transfer_ms"):
        assert out[name].iloc[0] == out[name].iloc[1]
    assert out["decode_memory_gib"].iloc[2] > out["decode_memory_gib"].iloc[3]  # copies of the draft
    assert out["prefill_memory_gib"].iloc[2] == out["prefill_memory_gib"].iloc[3]


def test_pools_with_drafts_are_searched_and_estimated_to_the_same_numbers() -> None:
    """Every pair: the same draft on both sides, priced by the search as estimate prices its row."""
    pools = compile_pools(parse_space(SPACE, "pools.yaml"))
    met, rows, _ = pair_all(pools, C, best=10**6, prune=False)
    assert met.enumerated == met.evaluated + sum(met.cuts.values())
    assert {"none", SMALL, "0.9B"} == set(rows["draft_model"])
    idle = rows["speculation"] == 0
    assert (rows.loc[idle, "draft_model"] == "none").all()
    assert (rows.loc[~idle, "draft_model"] != "none").all()
    assert {(2, 1), (2, 2), (4, 1), (4, 4)} <= set(zip(rows["decode_tp_size"], rows["decode_draft_tp"], strict=True))
    table = pd.read_csv(io.StringIO(csv(rows.iloc[:: max(1, len(rows) // 60)])), dtype=str)
    again = estimate_cases(table, PHYSICS)
    for name in ("ttft_ms", "tpot_ms", "output_tok_s_gpu", "prefill_memory_gib", "decode_memory_gib"):
        assert again[name].to_numpy(float) == pytest.approx(table[name].astype(float).to_numpy(), rel=1e-6)


def test_pruning_leaves_the_front_of_drafted_pairs_as_it_is() -> None:
    pools = compile_pools(parse_space(SPACE, "pools.yaml"))
    names = [name for name, _ in pools.objectives]
    fronts = []
    for prune in (True, False):
        _, _, values = pair_all(pools, C, best=1, prune=prune)
        fronts.append({tuple(float(f"{x:.8g}") for x in v) for v in values.tolist()})
    assert fronts[0] == fronts[1]
    assert len(names) == 3
    assert len(fronts[0]) > 10


def test_a_pair_has_one_draft_model() -> None:
    pools = compile_pools(parse_space(SPACE, "pools.yaml"))
    prefill, decode = draft_names(pools.prefill), draft_names(pools.decode)
    assert set(prefill) == set(decode) == {"none", SMALL, "0.9B"}
    i, k = int(np.flatnonzero(prefill == "none")[0]), int(np.flatnonzero(decode == SMALL)[0])
    flat = np.ravel_multi_index((i, k, 0), pools.shape)
    assert describe_pairs(pools, np.array([flat]))["draft_model"].iloc[0] == SMALL
    met, _, _ = pair_all(pools, C, best=10**6, prune=False)
    assert flat not in met.front.indices
    assert len(recheck_flat(pools, C, met.front.indices[:3])[0]) == 3


def test_a_search_of_pools_finds_that_drafts_pay() -> None:
    found = search(parse_space(SPACE, "pools.yaml"), coefficients=PHYSICS)
    fastest = found.front.sort_values("tpot_ms").iloc[0]
    assert (fastest["draft_model"], fastest["acceptance"]) == ("0.9B", 0.8)
    assert "draft models" in " ".join(found.cuts)
