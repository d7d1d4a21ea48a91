"""Disaggregated serving: limits, Little's law, closed form against iteration, rows of `dse estimate`, measured runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

from dse.catalog.coefficients import CoefficientSet, coefficient_set
from dse.cost import collectives as coll
from dse.cost.coefficients import Coefficients
from dse.cost.memory import kv_bytes
from dse.cost.pool_steps import decode_times, prefill_times
from dse.cost.pools import Split, estimate_split, estimate_split_one
from dse.cost.shard import shard
from dse.errors import InputError
from dse.programs import LARGE
from dse.space.cases import SplitCase, _records, _split_case, estimate_cases, splits_of

SHARED = Path(__file__).parents[2] / "shared" / "measured"
PHYSICS = CoefficientSet("physics")
ROW = {
    "model": "DeepSeek-V3",
    "gpu": "h200",
    "isl": 4000,
    "osl": 1000,
    "concurrency": 256,
    "prefill_num_workers": 2,
    "prefill_attention_dp_size": 8,
    "prefill_moe_ep_size": 8,
    "decode_num_workers": 1,
    "decode_attention_dp_size": 16,
    "decode_moe_ep_size": 16,
}
DENSE = {
    "model": "Llama-3.1-70B",
    "gpu": "h100",
    "isl": 2000,
    "osl": 300,
    "concurrency": 64,
    "weights": "fp8",
    "prefill_num_workers": 2,
    "prefill_tp_size": 4,
    "decode_num_workers": 3,
    "decode_tp_size": 2,
}


def estimate(*rows: dict[str, Any]) -> pd.DataFrame:
    """Both models are in every batch, so that all tests share one compiled program."""
    return estimate_cases(pd.DataFrame([*rows, ROW, DENSE]).astype(object), PHYSICS).iloc[: len(rows)]


def splits(*rows: dict[str, Any]) -> Split:
    """A batch of split deployments, in float64."""
    cases = [_split_case(row) for row in _records(pd.DataFrame([*rows, ROW, DENSE]).astype(object))]
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), splits_of(cases, PHYSICS))


@jax.jit
@jax.vmap
def alone(x: Split, running: Any) -> Any:
    """Each pool by itself: (prefill, decode)."""
    prefill, decode = (
        shard(p.architecture, p.device, p.topology, p.plan, p.coefficients) for p in (x.prefill, x.decode)
    )
    return prefill_times(prefill, x.prefill.load), decode_times(decode, x.decode.load, running).tpot


# --------------------------------------------------------------------------------------------------- limits


def test_with_free_transfer_each_pool_is_as_it_is_alone() -> None:
    rows = [
        {**row, "kv_transfer": "free", "concurrency": 1, "decode_num_workers": w}
        for row in (ROW, DENSE)
        for w in (1, 9)
    ]
    out = estimate(*rows)
    with jax.enable_x64(True):
        prefill, tpot = alone(splits(*rows), np.ones(6))
        ttft = np.asarray(prefill.idle)[:4] + Coefficients().arrival_overhead
    assert out["ttft_ms"].to_numpy() == pytest.approx(1e3 * ttft, rel=1e-9)
    assert out["tpot_ms"].to_numpy() == pytest.approx(1e3 * np.asarray(tpot)[:4], rel=1e-12)
    assert (out["transfer_ms"] == 0).all()


def test_under_load_tpot_is_that_of_the_requests_in_decode() -> None:
    out = estimate(ROW, DENSE)
    with jax.enable_x64(True):
        _, tpot = alone(splits(ROW, DENSE), np.append(out["running"].to_numpy(float), [1.0, 1.0]))
    assert out["tpot_ms"].to_numpy() == pytest.approx(1e3 * np.asarray(tpot)[:2], rel=1e-9)
    assert (out["running"] * out["decode_num_workers"] < out["concurrency"]).all()


def test_littles_law_holds_for_the_whole_and_for_the_decode_pool() -> None:
    rows = [{**r, "concurrency": n} for r in (ROW, DENSE) for n in (1, 3, 40, 700, 5000)]
    out = estimate(*rows)
    n, osl, workers, rate, e2e, tpot, running, output, gpus = (
        out[name].to_numpy(float)
        for name in (
            *("concurrency", "osl", "decode_num_workers", "requests_s", "e2e_ms", "tpot_ms", "running"),
            *("output_tok_s_gpu", "gpus"),
        )
    )
    assert rate * e2e / 1e3 == pytest.approx(n, rel=1e-9)
    assert rate * tpot * (osl - 1) / 1e3 == pytest.approx(running * workers, rel=1e-9)
    assert output * gpus == pytest.approx(rate * osl, rel=1e-12)


def test_throughput_ends_at_the_slower_pool() -> None:
    """Prefill: its full steps; decode: the requests it has memory for; nothing is lost or invented beyond."""
    rows = [{**DENSE, "concurrency": n, "decode_num_workers": w} for w in (1, 12) for n in (2000, 20_000)]
    out = estimate(*rows)
    assert out["decode_busy"].iloc[:2].to_numpy() == pytest.approx(1.0)
    assert "decode pool: memory" in out["reason"].iloc[1]
    assert out["prefill_busy"].iloc[2:].to_numpy() == pytest.approx(1.0, abs=2e-3)
    assert (out["prefill_busy"] <= 1.0 + 1e-9).all()
    same = out["requests_s"].to_numpy()
    assert same[1] == pytest.approx(same[0])
    assert same[3] == pytest.approx(same[2], rel=2e-3)


def test_a_slow_link_sets_the_rate_and_a_fast_one_does_not() -> None:
    many = [{**DENSE, "concurrency": 3000, "decode_num_workers": 9}] * 14

    def slowed(side: Any, factor: float) -> Any:
        levels = tuple(replace(level, bandwidth=level.bandwidth * factor) for level in side.topology.levels)
        return replace(side, topology=replace(side.topology, levels=levels))

    with jax.enable_x64(True):
        x = splits(*many)
        usual, slow, slower = (
            float(estimate_split(replace(x, prefill=slowed(x.prefill, f), decode=slowed(x.decode, f))).request_rate[0])
            for f in (1.0, 1e-4, 5e-5)
        )
    assert slow / slower == pytest.approx(2.0, rel=0.02)
    assert usual > 2 * slow


def test_more_of_anything_never_hurts() -> None:
    base = {**ROW, "concurrency": 2000}
    out = estimate(
        base,
        {**base, "prefill_num_workers": 4},
        {**base, "decode_num_workers": 3},
        {**base, "kv_transfer": "layerwise"},
        {**base, "kv_transfer": "free"},
    )
    ttft, tpot = out["ttft_ms"].to_numpy(), out["tpot_ms"].to_numpy()
    assert ttft[1] < ttft[0]
    assert tpot[2] < tpot[0]
    assert out["transfer_ms"].iloc[0] > out["transfer_ms"].iloc[3] > out["transfer_ms"].iloc[4] == 0
    assert out["requests_s"].iloc[1:].min() >= out["requests_s"].iloc[0] * (1 - 1e-9)


def test_a_pool_alone_is_undivided_serving_without_the_other_phase() -> None:
    """Or one queue flatters: decode is as whole serving of cached prompts, prefill as whole serving of one token."""
    same = {"model": "Llama-3.1-70B", "gpu": "h100", "weights": "fp8", "isl": 2000}
    split = {**DENSE, "kv_transfer": "free", "prefill_num_workers": 64, "decode_num_workers": 1, "decode_tp_size": 4}
    cached = [{**same, "osl": 3000, "tp": 4, "concurrency": n, "prefix_hit": 1.0} for n in (8, 64)]
    one_token = {**same, "osl": 1, "tp": 4, "concurrency": 400, "chunk": 8192}
    whole = estimate(*cached, one_token)
    out = estimate(
        *({**split, "osl": 3000, "concurrency": n} for n in (8, 64)),
        {**split, "osl": 1, "concurrency": 400, "prefill_num_workers": 1, "decode_num_workers": 64},
    )
    rate = out["running"].to_numpy()[:2] / np.array([8, 64])
    assert rate == pytest.approx(1.0, rel=0.02)
    assert out["tpot_ms"].to_numpy()[:2] == pytest.approx(whole["tpot_ms"].to_numpy()[:2], rel=0.03)
    assert out["requests_s"].iloc[2] == pytest.approx(whole["requests_s"].iloc[2], rel=0.05)


def test_both_ways_of_serving_have_the_work_of_a_request_to_do() -> None:
    """Saturated and with no latency targets, pools in the best ratio gain nothing but what a pool's own plan gains."""
    same = {"model": "Llama-3.1-70B", "gpu": "h100", "weights": "fp8", "isl": 2000, "osl": 300}
    whole = estimate({**same, "tp": 4, "concurrency": 300, "chunk": 2048})
    pools = {**DENSE, "kv_transfer": "free", "prefill_tp_size": 4, "decode_tp_size": 4, "concurrency": 3000}
    ratios = [{**pools, "prefill_num_workers": p, "decode_num_workers": 10 - p} for p in range(2, 8)]
    best = estimate(*({**r, "decode_max_batch": 300} for r in ratios))["output_tok_s_gpu"].max()
    assert best == pytest.approx(whole["output_tok_s_gpu"].iloc[0], rel=0.12)


def test_seats_of_the_decode_engine_hold_requests_back() -> None:
    """Little's law: N requests, so many of them running, and the others wait for one of them to end."""
    rows = [{**DENSE, "concurrency": 300, "decode_max_batch": n} for n in ("", 1000, 24, 8)]
    out = estimate(*rows)
    free, loose, some, few = (out.iloc[i] for i in range(4))
    assert loose["ttft_ms"] == pytest.approx(free["ttft_ms"], rel=1e-9)
    assert (some["running"], few["running"]) == pytest.approx((24, 8))
    assert few["ttft_ms"] > some["ttft_ms"] > 1.1 * free["ttft_ms"]
    assert few["tpot_ms"] < some["tpot_ms"] < free["tpot_ms"]
    assert few["kv_gib"] < free["kv_gib"]
    held = few["concurrency"] - few["requests_s"] * few["tpot_ms"] / 1e3 * (few["osl"] - 1)
    assert few["requests_s"] * few["ttft_ms"] / 1e3 == pytest.approx(held, rel=1e-9)
    assert "decode_max_batch" in estimate({**DENSE, "decode_max_batch": 0})["reason"].iloc[0]


def test_the_first_wave_is_one_wave() -> None:
    """What an undivided engine's scheduler keeps in lockstep (`first_wave` above 1) pools let go: decode runs on."""
    with jax.enable_x64(True):
        x = splits(DENSE, DENSE, DENSE, DENSE)
        weight = np.array([0.5, 1.0, 9.0, 9.0, 1.0, 1.0])
        c = replace(x.prefill.coefficients, first_wave=weight)
        e = estimate_split(replace(x, prefill=replace(x.prefill, coefficients=c)))
    ttft = np.asarray(e.ttft)
    assert ttft[0] < ttft[1]
    assert ttft[2] == pytest.approx(ttft[1], rel=1e-12)


# ------------------------------------------------------------------------------------------- parts by hand


def test_the_cache_travels_over_the_level_that_the_deployment_spans() -> None:
    """DeepSeek-V3, 8-bit cache: 576 elements x 61 layers a token; a node has NVLink, two nodes InfiniBand."""
    inside = {**ROW, "prefill_num_workers": 1, "prefill_attention_dp_size": 4, "prefill_moe_ep_size": 4}
    inside |= {"decode_attention_dp_size": 4, "decode_moe_ep_size": 4}
    out = estimate(inside, ROW)
    assert out["gpus"].tolist() == [8, 32]
    with jax.enable_x64(True):
        x = jax.tree.map(lambda leaf: leaf[0], splits(ROW))
        topology, c = x.decode.topology, x.decode.coefficients
        pairs = [coll.group(topology, 2.0, stride) for stride in (1.0, 8.0)]  # two GPUs of a node, of two nodes
        lines = [coll.point_to_point(topology, pair, c) for pair in pairs]
        moved = float(kv_bytes(x.decode.architecture, x.decode.plan, 4000.0))
        travel = [float(line.per_byte) * moved for line in lines]
    assert moved == pytest.approx(576 * 61 * 4000 * x.decode.plan.precision.kv_bytes)
    assert travel[1] > 5 * travel[0]
    spent = out["transfer_ms"].to_numpy() / 1e3 - c.transfer_base
    assert (spent > travel).all()
    assert spent == pytest.approx(travel, abs=1e-4)  # and the latency of the levels crossed


def test_gradients_pass_through_the_fixed_point() -> None:
    with jax.enable_x64(True):
        x = jax.tree.map(lambda leaf: leaf[0], splits(DENSE))

        def outputs(scale: Any) -> Any:
            device = replace(x.decode.device, bandwidth=x.decode.device.bandwidth * scale)
            c = replace(x.prefill.coefficients, gemm_bf16=x.prefill.coefficients.gemm_bf16 * scale)
            prefill = replace(x.prefill, coefficients=c)
            e = estimate_split_one(replace(x, prefill=prefill, decode=replace(x.decode, device=device)))
            return np.asarray(1e3) * e.ttft, np.asarray(1e3) * e.tpot, e.request_rate

        price = jax.jit(outputs)
        exact = jax.jit(jax.jacfwd(outputs), compiler_options=LARGE)(1.0)
        step = 1e-5
        finite = [(a - b) / (2 * step) for a, b in zip(price(1.0 + step), price(1.0 - step), strict=True)]
    assert [float(v) for v in exact] == pytest.approx([float(v) for v in finite], rel=1e-4)


# ------------------------------------------------------------------------------------------------ estimate


def test_split_and_whole_rows_in_one_file() -> None:
    whole = {"model": "Llama-3.1-70B", "gpu": "h100", "isl": 2000, "osl": 300, "tp": 4, "weights": "fp8"}
    out = estimate(whole, DENSE, {**DENSE, "model": "nope"}, whole, {**DENSE, "decode_gpu": "h200"})
    assert out["gpus"].tolist()[:2] == [4, 2 * 4 + 3 * 2]
    assert "nope" in out["reason"].iloc[2]
    assert np.isnan(out["ttft_ms"].iloc[2])
    by_itself = estimate(whole)
    for name in ("ttft_ms", "tpot_ms", "memory_gib", "usd_per_mtok"):
        assert out[name].iloc[[0, 3]].to_numpy() == pytest.approx(by_itself[name].iloc[0], rel=1e-12)
    assert out["feasible"].tolist() == [True, True, False, True, True]
    assert out["tpot_ms"].iloc[4] < out["tpot_ms"].iloc[1]
    assert out["usd_per_mtok"].iloc[4] != out["usd_per_mtok"].iloc[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prefill_tp_size": 3}, ["prefill pool", "tp: 3", "allowed: 1, 2, 4, 8"]),
        ({"decode_num_workers": 0}, ["decode_num_workers", "0", "out of range"]),
        ({"decode_num_workers": "two"}, ["decode_num_workers", "'two'", "not a number"]),
        ({"kv_transfer": "layer"}, ["kv_transfer", "layerwise"]),
        ({"decode_gpu": "h10"}, ["decode pool", "h10", "h100"]),
        ({"concurrency": 0.5}, ["concurrency", "0.5"]),
        ({"decode_num_workers": "", "decode_tp_size": ""}, ["decode_*", "give both pools"]),
        ({"speculation": 2, "draft_model": "Qwen3-0.6B"}, ["prefill pool", "draft_model", "tokenizer"]),
        (
            {"model": "Qwen3-30B-A3B", "speculation": 2, "draft_model": "0.5B", "decode_ffn_gpus": 2},
            ["draft_model: 0.5B", "decode_ffn_gpus", "allowed: none"],
        ),
        (
            {"model": "Qwen3-30B-A3B", "decode_tp_size": 2, "decode_pp_size": 2, "decode_ffn_gpus": 2},
            ["decode_pp_size: 2", "allowed: 1"],
        ),
    ],
)
def test_a_bad_split_row_says_why(change: dict[str, Any], words: list[str]) -> None:
    out = estimate({**DENSE, **change})
    assert not out["feasible"].iloc[0]
    assert [word for word in words if word not in out["reason"].iloc[0]] == []


def test_pools_of_two_gpu_types_pay_for_both() -> None:
    out = estimate(DENSE, {**DENSE, "prefill_gpu": "h200"}, {**DENSE, "prefill_gpu": "h200", "decode_gpu": "h200"})
    usd = (out["usd_per_mtok"] * out["output_tok_s_gpu"]).to_numpy()  # price of a GPU-hour, up to a factor
    assert usd[1] == pytest.approx((8 * usd[2] + 6 * usd[0]) / 14)


# ------------------------------------------------------------------------------------------------ measurements

measured = pytest.mark.skipif(not SHARED.exists(), reason="shared measurements are not here")


@measured
def test_gpus_of_a_stage_are_tp_times_attention_dp_in_the_measured_table() -> None:
    """moe_tp * moe_ep = tp * attention_dp in every row of a MoE model, so both count towards GPUs."""
    table = pd.read_csv(SHARED / "disaggregated.csv")
    moe = table[~table["model"].str.contains("Qwen3-32B")]
    for pool in ("prefill", "decode"):
        size = {name: moe[f"{pool}_{name}_size"] for name in ("tp", "attention_dp", "moe_tp", "moe_ep")}
        assert (size["tp"] * size["attention_dp"] == size["moe_tp"] * size["moe_ep"]).all()


@measured
def test_measured_split_deployments_without_speculation() -> None:
    table = pd.read_csv(SHARED / "disaggregated.csv", dtype=str)
    out = estimate_cases(table, coefficient_set())
    assert out["tpot_ms"].notna().all()
    plain = (table["speculation"] == "no").to_numpy()
    error = (out["tpot_ms"] / table["measured_tpot_ms"].astype(float) - 1).abs()[plain]
    assert error.mean() <= 0.20


@measured
def test_waits_for_the_first_token_follow_from_the_recipes_batches() -> None:
    """Runs whose published recipe (NVIDIA/srt-slurm, recipes/trtllm/gb300-fp8) names the decode batch: seconds
    of TTFT within 10% with it, where memory alone would let every request in."""
    table = pd.read_csv(SHARED / "disaggregated.csv", dtype=str)
    chosen = table[(table["gpu"] == "gb300") & (table["engine"] == "trtllm") & (table["weights"] == "fp8")]
    batches = {("1024", "24"): "4", ("1024", "84"): "16", ("8192", "36"): "8"}  # (osl, concurrency)
    keys = list(zip(chosen["osl"], chosen["concurrency"], strict=True))
    chosen = chosen[[key in batches for key in keys]].assign(
        decode_max_batch=[batches[k] for k in keys if k in batches]
    )
    assert len(chosen) == len(batches)
    seen = chosen["measured_ttft_ms"].astype(float).to_numpy()
    known, unknown = (
        estimate_cases(rows.reset_index(drop=True), coefficient_set())["ttft_ms"].to_numpy(float)
        for rows in (chosen, chosen.drop(columns="decode_max_batch"))
    )
    assert known == pytest.approx(seen, rel=0.1)
    assert (unknown < 0.1 * seen).all()


@measured
def test_the_better_ratio_of_prefill_to_decode_workers_is_picked() -> None:
    """dstack's study: throughput a GPU of every two ratios at the same lengths and load."""
    runs = pd.read_csv(SHARED / "published_runs.csv")
    runs = runs[runs["prefill_workers"].notna() & (runs["metric"] == "output_tok_s")].reset_index(drop=True)
    rows = pd.DataFrame(
        {
            "model": runs["model"],
            "gpu": runs["gpu"],
            "engine": runs["framework"],
            "weights": "mxfp4",
            "isl": runs["isl"],
            "osl": runs["mean_osl"],
            "concurrency": runs["batch_or_concurrency"],
            **{f"{p}_num_workers": runs[f"{p}_workers"] for p in ("prefill", "decode")},
            **{f"{p}_tp_size": runs["tp"] for p in ("prefill", "decode")},
        }
    ).astype(str)
    out = estimate_cases(rows, coefficient_set())
    runs = runs.assign(predicted=out["output_tok_s_gpu"], seen=runs["value"] / runs["n_gpus"])
    right = []
    for _, group in runs.groupby(["isl", "osl", "batch_or_concurrency"]):
        for a, b in combinations(group.itertuples(), 2):
            right.append((a.predicted > b.predicted) == (a.seen > b.seen))
    assert len(right) >= 30
    assert np.mean(right) >= 0.8


def test_a_split_row_is_no_observation_of_an_undivided_engine() -> None:
    from dse.space.cases import parse_cases

    assert "dse estimate" in str(parse_cases(pd.DataFrame([DENSE]).astype(object))[0])
    with pytest.raises(InputError, match="give both pools"):
        _split_case({"model": "Llama-3.1-8B", "gpu": "h100", "isl": "1", "osl": "1", "prefill_tp_size": "2"})
    assert isinstance(_split_case(_records(pd.DataFrame([ROW]).astype(object))[0]), SplitCase)
