"""The joint search of pools against brute force over all pairs, through `dse estimate`'s own door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dse.catalog.coefficients import CoefficientSet
from dse.cost.coefficients import Coefficients
from dse.errors import InputError
from dse.report.files import csv
from dse.report.summary import summarise
from dse.report.text import markdown
from dse.search import pairs, pool_blocks
from dse.search import pools as pools_module
from dse.search.pareto import front
from dse.search.pool_recheck import recheck_flat
from dse.search.pools import pair_all
from dse.search.result import SearchResult
from dse.search.run import search
from dse.space import parse_space
from dse.space.cases import estimate_cases
from dse.space.pool_space import CompiledPools, compile_pools, unravel

SHIPPED = Path(__file__).parent.parent / "search_spaces"
PHYSICS = CoefficientSet("physics")
C = (Coefficients(), Coefficients())
SPACE: dict[str, Any] = {
    "name": "pools",
    "models": ["Qwen3-30B-A3B"],
    "clusters": ["h100-dgx"],
    "gpus": [12],
    "workloads": [{"isl": 3000, "osl": 400, "prefix_hit": 0.25}],
    "disaggregated": {
        "kv_transfer": ["after_prefill", "layerwise"],
        "prefill": {"gpus": [1, 2, 4], "tp": [1, 2, 4], "attention_dp": "auto", "chunk": [2048, 8192]},
        "decode": {"gpus": [1, 2, 4], "tp": [1, 2], "attention_dp": "auto", "concurrency": [2, 9, 40, 150, 600]},
    },
    "axes": {"tp": [1, 2, 4], "attention_dp": [1, 2, 4], "concurrency": [2, 9, 40, 150, 600]},
    "constraints": {"ttft_ms": {"max": 900}, "tpot_ms": {"max": 22}},
    "objectives": {"output_tok_s_gpu": "max", "tpot_ms": "min"},
}
OBJECTIVES = [
    {"output_tok_s_gpu": "max", "tpot_ms": "min"},
    {"output_tok_s_gpu": "max", "tpot_ms": "min", "ttft_ms": "min"},
    {"usd_per_mtok": "min"},
]


def pools_of(**changes: Any) -> CompiledPools:
    return compile_pools(parse_space({**SPACE, **changes}, "pools.yaml"))


@pytest.fixture(scope="module")
def everything() -> tuple[CompiledPools, pd.DataFrame]:
    """Every pair that the budget allows, one row each, priced by estimate's own function."""
    pools = pools_of()
    flat = np.arange(np.prod(pools.shape))
    prefill, decode, ratio, _ = unravel(pools, flat)
    sizes = [
        np.repeat(space.designs.gpus, len(space.operating))[points]
        for space, points in ((pools.prefill, prefill), (pools.decode, decode))
    ]
    workers = np.array(pools.ratios)[ratio]
    allowed = flat[(workers * np.stack(sizes, axis=1)).sum(axis=1) <= 12]
    chosen = np.random.default_rng(0).permutation(allowed)[:6000]
    return pools, recheck_flat(pools, C, np.sort(chosen))[0].assign(flat=np.sort(chosen))


def brute_front(rows: pd.DataFrame, spec: Any) -> set[tuple[float, ...]]:
    ok = rows["feasible"].to_numpy(bool) & (rows["prefill_busy"].to_numpy() <= 1 + 1e-12)
    for metric, bound in spec.constraints.items():
        ok &= (rows[metric] <= (bound.max or np.inf)).to_numpy() & (rows[metric] >= (bound.min or 0)).to_numpy()
    sign = [1.0 if way == "min" else -1.0 for _, way in spec.objectives]
    values = rows.loc[ok, [name for name, _ in spec.objectives]].to_numpy(float) * sign
    assert len(values) > 50
    values = np.array([[float(f"{x:.9g}") for x in v] for v in values])  # a root found twice differs in its last digits
    return {tuple(v) for v in values[front(values)].tolist()}


@pytest.mark.parametrize("objectives", OBJECTIVES, ids=lambda o: "+".join(o))
def test_the_front_is_that_of_all_pairs(objectives: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruned and in small blocks, against every pair priced: by meet, and those on the front by estimate."""
    pools = pools_of(objectives=objectives)
    if len(objectives) == 2:
        pairs.compiled_pairs.cache_clear()  # the block's shape is read when it is traced
        for module in (pairs, pool_blocks, pools_module):
            monkeypatch.setattr(module, "ROWS", 3)
            monkeypatch.setattr(module, "COLUMNS", 7)
    met, rows, values = pair_all(pools, C)
    whole, all_rows, all_values = pair_all(pools, C, best=10**6, prune=False)
    assert whole.evaluated > 2 * met.evaluated
    assert met.enumerated == met.evaluated + sum(met.cuts.values())
    assert whole.enumerated == whole.evaluated + sum(whole.cuts.values())
    found, expected = brute_front(rows, pools.spec), brute_front(all_rows, pools.spec)
    assert found == expected
    names = [name for name, _ in pools.objectives]
    sign = np.array([1.0 if way == "min" else -1.0 for _, way in pools.objectives])
    assert all_rows[names].to_numpy(float) * sign == pytest.approx(all_values, rel=1e-9)
    assert rows[names].to_numpy(float) * sign == pytest.approx(values, rel=1e-9)
    pairs.compiled_pairs.cache_clear()


@pytest.mark.slow
def test_no_sampled_pair_beats_the_front(everything: tuple[CompiledPools, pd.DataFrame]) -> None:
    """Pairs priced as estimate prices them, none of them through the search: none is better than what it found."""
    pools, rows = everything
    met, kept, _ = pair_all(pools, C)
    names = ["output_tok_s_gpu", "tpot_ms"]
    best = kept.loc[kept["feasible"].astype(bool), names].to_numpy(float) * [-1, 1]
    ok = rows["feasible"].to_numpy(bool) & (rows["ttft_ms"] <= 900).to_numpy() & (rows["tpot_ms"] <= 22).to_numpy()
    ok &= rows["prefill_busy"].to_numpy() <= 1 + 1e-12
    assert ok.sum() > 100
    assert met.passed[-1] > 0
    for row in rows.loc[ok, names].to_numpy(float) * [-1, 1]:
        assert (best <= row + 1e-9 * np.abs(row)).all(axis=1).any()


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return search(parse_space(SPACE, "pools.yaml"), coefficients=PHYSICS)


def test_a_row_of_pareto_csv_is_estimated_to_the_same_numbers(result: SearchResult, tmp_path: Path) -> None:
    path = tmp_path / "pareto.csv"
    path.write_text(csv(result.front))
    table = pd.read_csv(path, dtype=str)
    again = estimate_cases(table, PHYSICS)
    split = (table["serving"] == "disaggregated").to_numpy()
    assert split.any()
    for name in ("ttft_ms", "tpot_ms", "output_tok_s_gpu", "usd_per_mtok", "memory_gib", "gpus", "requests_s"):
        assert again.loc[split, name].to_numpy(float) == pytest.approx(table.loc[split, name].astype(float), rel=1e-6)
    whole = again.loc[~split, ["ttft_ms", "tpot_ms"]].to_numpy(float)
    assert whole == pytest.approx(table.loc[~split, ["ttft_ms", "tpot_ms"]].to_numpy(float), rel=1e-6)


def test_one_front_of_both_ways_and_what_splitting_brings(result: SearchResult) -> None:
    names = ["output_tok_s_gpu", "tpot_ms"]
    alone = {
        flag: search(
            parse_space(
                {**SPACE, "disaggregated": {**SPACE["disaggregated"], "aggregated": False}}
                if flag
                else {k: v for k, v in SPACE.items() if k != "disaggregated"}
            ),
            coefficients=PHYSICS,
        )
        for flag in (True, False)
    }
    both = pd.concat([r.front[names] for r in alone.values()]).to_numpy(float) * [-1, 1]
    expected = {tuple(float(f"{x:.9g}") for x in v) for v in both[front(both)]}
    found = {tuple(float(f"{x:.9g}") for x in v) for v in result.front[names].to_numpy(float) * [-1, 1]}
    assert found == expected
    told = result.run["disaggregated"]
    best = {flag: r.front["output_tok_s_gpu"].max() for flag, r in alone.items()}
    assert told["gain"] == pytest.approx(best[True] / best[False] - 1, rel=1e-9)
    for level, gained in told["levels"]:
        reach = {
            flag: r.front.loc[r.front["tpot_ms"] <= level * (1 + 1e-9), names[0]].max() for flag, r in alone.items()
        }
        assert gained == pytest.approx(reach[True] / reach[False] - 1, rel=1e-6)
    assert result.enumerated == result.legal + sum(result.cuts.values())
    text = markdown(summarise(result))
    assert "Disaggregated" in text
    assert f"{told['gain']:+.1%} tokens/s/GPU at the same targets" in text
    assert "nan" not in text.lower()


def test_nothing_feasible_names_the_nearest_pair() -> None:
    alone = {**SPACE["disaggregated"], "aggregated": False}
    spec = parse_space({**SPACE, "disaggregated": alone, "constraints": {"ttft_ms": {"max": 1}}}, "pools.yaml")
    found = search(spec, coefficients=PHYSICS)
    assert len(found.front) == 0
    assert found.least is not None
    assert [b.metric for b in found.binding] == ["ttft_ms"]
    assert summarise(found).headlines


@pytest.mark.slow
def test_two_gpu_types_pay_for_both_and_meet_over_the_outermost_levels() -> None:
    changes = {"prefill": {**SPACE["disaggregated"]["prefill"], "clusters": ["h200-hgx"]}}
    mixed = {"aggregated": False, **SPACE["disaggregated"], **changes, "kv_transfer": ["after_prefill"]}
    mixed["aggregated"] = False
    found = search(parse_space({**SPACE, "disaggregated": mixed, "gpus": [4]}, "pools.yaml"), coefficients=PHYSICS)
    row = found.front.iloc[0]
    assert (row.prefill_gpu, row.decode_gpu, row.gpu) == ("h200", "h100", "h200 + h100")
    again = estimate_cases(pd.read_csv(pd.io.common.StringIO(csv(found.front)), dtype=str), PHYSICS)
    assert again["ttft_ms"].to_numpy(float) == pytest.approx(found.front["ttft_ms"].to_numpy(float), rel=1e-6)
    assert again["usd_per_mtok"].to_numpy(float) == pytest.approx(found.front["usd_per_mtok"].to_numpy(float), rel=1e-6)
    usual = pools_of(disaggregated={**SPACE["disaggregated"], "kv_transfer": ["after_prefill"]})
    _, rows, _ = pair_all(usual, C)
    assert found.front["transfer_ms"].min() > rows.loc[rows["gpus"] <= 4, "transfer_ms"].max()  # network, not NVLink


@pytest.mark.slow
def test_experts_on_gpus_of_their_own_are_searched_and_estimated() -> None:
    """Attention and FFN split once more: the row says so, and is estimated to the same numbers."""
    decode = {**SPACE["disaggregated"]["decode"], "ffn_gpus": [0, 2, 4], "micro_batches": [1, 2]}
    space = {**SPACE["disaggregated"], "decode": decode, "kv_transfer": "after_prefill", "aggregated": False}
    pools = pools_of(disaggregated=space)
    assert pools.experts == ((0, 1), (2, 1), (2, 2), (4, 1), (4, 2))
    _, rows, values = pair_all(pools, C, best=4000)
    apart = rows[rows["decode_ffn_gpus"] > 0]
    assert len(apart) > 20
    assert len(apart) < len(rows)
    assert set(apart["decode_micro_batches"]) == {1, 2}
    gpus = rows["prefill_num_workers"] * rows["prefill_tp_size"] * rows["prefill_attention_dp_size"]
    worker = rows["decode_tp_size"] * rows["decode_attention_dp_size"] + rows["decode_ffn_gpus"]
    assert (gpus + rows["decode_num_workers"] * worker == rows["gpus"]).all()
    assert rows["output_tok_s_gpu"].to_numpy() == pytest.approx(-values[:, 0], rel=1e-9)
    some = pd.concat([apart.iloc[:20], rows[rows["decode_ffn_gpus"] == 0].iloc[:5]])
    again = estimate_cases(some.astype(object), PHYSICS)
    for name in ("ttft_ms", "tpot_ms", "output_tok_s_gpu", "memory_gib", "gpus", "usd_per_mtok"):
        assert again[name].to_numpy(float) == pytest.approx(some[name].to_numpy(float), rel=1e-9)
    wrong = estimate_cases(some.iloc[:1].assign(decode_ffn_gpus=3).astype(object), PHYSICS)
    assert "decode_ffn_gpus: 3" in wrong["reason"].iloc[0]
    assert "128 experts" in wrong["reason"].iloc[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": ["Qwen3-30B-A3B", "Llama-3.1-8B"]}, ["models", "2", "allowed"]),
        ({"workloads": [{"isl": 1, "osl": 1}, {"isl": 2, "osl": 2}]}, ["workloads", "2"]),
        ({"gpus": [1]}, ["more than the", "1 that gpus allows"]),
        ({"disaggregated": {"prefill": {"gpus": [1]}}}, ["disaggregated.decode", "required"]),
        ({"disaggregated": {"prefill": {"gpus": 1, "concurrency": 4}, "decode": {"gpus": 1}}}, ["prefill.concurrency"]),
        ({"disaggregated": {"prefill": {"gpus": 1}, "decode": {"gpus": 1, "chunk": 64}}}, ["decode.chunk"]),
        ({"disaggregated": {"prefill": {"gpus": 1}, "decode": {"gpus": 1}, "kv_transfer": "lyer"}}, ["layerwise"]),
        (
            {"disaggregated": {"prefill": {"gpus": 1}, "decode": {"gpus": 1, "ffn_gpus": 5}}},
            ["ffn_gpus: 5", "128 experts"],
        ),
        (
            {"disaggregated": {"prefill": {"gpus": 1}, "decode": {"gpus": 4, "pp": [1, 2], "ffn_gpus": 2}}},
            ["decode.pp: 2 beside ffn_gpus", "allowed: 1"],
        ),
        ({"disaggregated": {"prefill": {"gpus": 1}, "decode": {"gpus": 1, "prefix_hit": 0.5}}}, ["decode.prefix_hit"]),
        ({"disaggregated": {"prefill": {"gpus": 1, "acceptance": 0.5}, "decode": {"gpus": 1}}}, ["prefill.acceptance"]),
        (
            {"disaggregated": {"prefill": {"gpus": 1, "draft_model": "0.5B"}, "decode": {"gpus": 1}}},
            ["prefill.draft_model", "the decode pool's"],
        ),
        (
            {"disaggregated": {"prefill": {"gpus": 1}, "decode": {"gpus": 1, "ffn_gpus": 2, "draft_model": "0.5B"}}},
            ["decode.draft_model: 0.5B", "ffn_gpus"],
        ),
        (
            {"disaggregated": {"prefill": {"gpus": 1, "kv": "bf16"}, "decode": {"gpus": 1, "kv": "fp8"}}},
            ["one format", "same kv"],
        ),
    ],
)
def test_a_wrong_space_gets_one_message(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        search(parse_space({**SPACE, **change}, "pools.yaml"), coefficients=PHYSICS)
    assert [word for word in words if word not in str(error.value)] == []


def test_samplers_and_intervals_are_refused() -> None:
    for asked in ({"sampler": "tpe"}, {"intervals": True}):
        with pytest.raises(InputError, match=r"allowed: grid|leave one of them out"):
            search(parse_space(SPACE, "pools.yaml"), **asked)


def test_a_search_traces_its_pair_kernel_once() -> None:
    pools = pools_of(constraints={"e2e_ms": {"max": 9000}})
    before = pairs.TRACES["pairs"]
    pair_all(pools, C)
    pair_all(pools, C)
    assert pairs.TRACES["pairs"] == before + 1


def test_the_shipped_space_compiles() -> None:
    from dse.space import load_space

    pools = compile_pools(load_space(SHIPPED / "deepseek_v3_disagg_h200.yaml"))
    p, d, _ = pools.shape
    assert p * d > 1_000_000
    assert set(pools.ratios) == {(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1)}
