"""Pipelines of several models: limits, oracles in plain Python, brute force, and what a person gets wrong."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from dse import cli
from dse.cost.coefficients import Coefficients
from dse.cost.pipeline import Batched
from dse.errors import InputError
from dse.report.files import write_outputs
from dse.search.pipeline import edges, lines, pools_at, transfer
from dse.search.pipeline_result import search_pipeline
from dse.search.pipeline_stages import price
from dse.search.result import SearchResult
from dse.search.run import search
from dse.space.load import load_any, load_space, parse_pipeline
from dse.space.pipeline_compile import compile_pipeline, kinds

SHIPPED = Path(__file__).parent.parent / "search_spaces"
PIPELINES = ("epd_qwen3_vl", "rag_70b", "agentic")
C = Coefficients()
VIT = {"layers": 24, "hidden": 1024, "heads": 16, "ffn": 4096}
SPACE: dict[str, Any] = {
    "name": "small",
    "pipeline": [
        {"name": "gateway", "kind": "gateway", "time_ms": 3},
        {
            "name": "encode",
            "kind": "encoder",
            "encoder": VIT,
            "tokens": {"each": 2000, "items": 2, "share": 0.6, "cv": 0.7},
            "merge": 4,
            "replicas": [1, 2],
            "batch": [1, 4],
        },
        {
            "name": "prefill",
            "kind": "prefill",
            "model": "Qwen3-0.6B",
            "tp": [1, 2],
            "replicas": [1, 2, 3],
            "batch": [1, 2],
            "kv": ["bf16", "fp8"],
        },
        {
            "name": "decode",
            "kind": "decode",
            "model": "Qwen3-0.6B",
            "tp": [1, 2],
            "replicas": [1, 2],
            "batch": [4, 64],
            "kv": ["bf16", "fp8"],
        },
    ],
    "request": {"isl": {"mean": 800, "cv": 0.5}, "osl": 100},
    "clusters": ["h100-dgx"],
    "gpus": 8,
    "rates": [2.0, 20.0, 60.0],
    "objectives": {"requests_s_gpu": "max", "ttft_ms": "min"},
}


def space(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy({**SPACE, **changes})


def without(data: dict[str, Any], *stages: str) -> dict[str, Any]:
    return {**data, "pipeline": [s for s in data["pipeline"] if s["name"] not in stages]}


def run(data: dict[str, Any], **options: Any) -> SearchResult:
    return search_pipeline(parse_pipeline(data, "small.yaml"), C, **options)


def table(p: Any) -> Coefficients:
    return jax.tree.map(lambda x: np.full((len(p.machines), len(p.entries)), x), C)


# ----------------------------------------------------------------------------------------------- stages and sums


def test_an_encoder_sees_both_ways() -> None:
    """The bare roofline, by hand: 2 * parameters * tokens, and 4 h d T^2 a layer of attention, not half of it."""
    data = without(space(), "gateway", "prefill", "decode")
    tokens = 40_000.0
    data["pipeline"][0] |= {"tokens": tokens, "batch": 1, "replicas": 1}
    p = compile_pipeline(parse_pipeline(data))
    ideal = jax.tree.map(lambda x: np.full((1, 1), x), Coefficients.ideal())
    with jax.enable_x64(True):
        found = float(price(p, ideal)["encode"].times.alone[0])
    layers, hidden, ffn = VIT["layers"], VIT["hidden"], VIT["ffn"]
    flops = layers * (2 * (4 * hidden**2 + 2 * hidden * ffn) * tokens + 4 * hidden * tokens**2)
    assert found == pytest.approx(flops / float(p.devices.peak_bf16[0]), rel=0.01)


def test_with_free_transfers_and_no_load_ttft_is_the_sum_of_the_stages() -> None:
    data = space(rates=[1e-6], transfers="free")
    for s in data["pipeline"][1:]:
        s |= {"replicas": 1, "batch": 2} | ({"kv": "bf16", "tp": 1} if "kv" in s else {})
    row = run(data).front.iloc[0]
    p = compile_pipeline(parse_pipeline(data))
    with jax.enable_x64(True):
        alone = price(p, table(p))
    expected = 0.003 + 0.6 * float(alone["encode"].times.first[0]) + float(alone["prefill"].times.first[0])
    assert row["ttft_ms"] == pytest.approx(expected * 1e3, rel=1e-4)
    assert row["tpot_ms"] == pytest.approx(float(alone["decode"].times.tpot[0, 0]) * 1e3, rel=1e-4)
    assert row["e2e_ms"] == pytest.approx(row["ttft_ms"] + 99 * row["tpot_ms"], rel=1e-9)


def test_throughput_is_that_of_the_slowest_stage() -> None:
    data = space(rates=[1.0])
    p = compile_pipeline(parse_pipeline(data))
    with jax.enable_x64(True):
        priced = price(p, table(p))
    rows = run(data, prune=False, best=10**6).candidates
    designs = {name: {(d.tp, d.kv, d.batch): i for i, d in enumerate(d)} for name, d in p.designs.items()}
    for row in rows.sample(40, random_state=1).to_dict("records"):
        most = {}
        for name in ("encode", "prefill", "decode"):
            kv = "auto" if name == "encode" else row[f"{name}_kv"]
            i = designs[name][row[f"{name}_tp"], kv, row[f"{name}_batch"]]
            t = priced[name].times
            each = t.batch / (t.service * t.calls) if isinstance(t, Batched) else t.rate[:, -1] / t.calls
            most[name] = row[f"{name}_replicas"] * float(each[i])
        assert row["capacity_requests_s"] == pytest.approx(min(most.values()), rel=1e-5)
        assert row["bottleneck"] == min(most, key=most.__getitem__)


def test_no_encoder_tokens_no_encoder_time() -> None:
    data = space(rates=[5.0], gpus=12)  # room for all, beside the idle encoder
    data["pipeline"][1]["tokens"]["share"] = 0.0
    with_encoder, bare = run(data), run(without(data, "encode"))
    best = with_encoder.front["ttft_ms"].min(), bare.front["ttft_ms"].min()
    assert best[0] == pytest.approx(best[1], rel=1e-9)
    assert (with_encoder.front["encode_utilisation"] == 0).all()


def test_a_loop_is_the_sum_of_its_turns() -> None:
    """Each turn priced as a request of its own: context, cached prefix, answer."""
    stages = [s | {"replicas": 1} for s in without(space(), "gateway", "encode")["pipeline"]]
    for s in stages:
        s |= {"tp": 1, "batch": 1, "kv": "bf16"}
    base = space(pipeline=stages, rates=[1e-6], transfers="free")
    loop = {"turns": 3, "tool_latency_ms": 500, "growth": 400, "hit": 0.8}
    whole = run({**base, "request": {"isl": 800, "osl": 100}, "loop": loop}).front.iloc[0]
    total, turns = 0.0, []
    for j in range(3):
        context = 800 + j * 500
        hit = 0.8 * (context - 400) / context if j else 0.0
        turns.append(run({**base, "request": {"isl": context, "osl": 100, "prefix_hit": hit}}).front.iloc[0])
        total += turns[-1]["e2e_ms"]
    assert whole["e2e_ms"] == pytest.approx(total + 2 * 500, rel=2e-3)
    assert whole["ttft_ms"] == pytest.approx(turns[0]["ttft_ms"], rel=1e-4)


def test_prompts_hold_what_the_stages_add() -> None:
    found = kinds(parse_pipeline(space()))
    prompt = found["prefill"]
    assert float(prompt.weight @ prompt.tokens) == pytest.approx(800 + 0.6 * 4000 / 4, rel=1e-9)
    assert float(found["encode"].weight @ (found["encode"].sequences * found["encode"].tokens)) == pytest.approx(4000)
    assert found["encode"].calls == 0.6


# ----------------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize(
    "objectives",
    [{"requests_s_gpu": "max", "ttft_ms": "min"}, {"usd_per_request": "min", "e2e_ms": "min", "tpot_ms": "min"}],
)
def test_the_front_is_that_of_brute_force(objectives: dict[str, str]) -> None:
    """All options of all pools, summed one by one, and the O(n^2) front."""
    data = space(objectives=objectives, constraints={"ttft_ms": {"max": 120}, "tpot_ms": {"max": 6}})
    spec = parse_pipeline(data)
    p = compile_pipeline(spec)
    with jax.enable_x64(True):
        pools = pools_at(p, table(p), price(p, table(p)))
        ways = lines(p, table(p))
    rows = []
    for r, rate in enumerate(spec.rates):
        for choice in itertools.product(*(range(len(q.gpus)) for q in pools)):
            at = [{k: v[r, i] for k, v in q.at.items()} for q, i in zip(pools, choice, strict=True)]
            gpus = sum(q.gpus[i] for q, i in zip(pools, choice, strict=True))
            usd = sum(q.usd[i] for q, i in zip(pools, choice, strict=True))
            ends = [q.ends[i] for q, i in zip(pools, choice, strict=True)]
            if gpus > 8 or not all(x["stable"] for x in at) or ends[1][2] != ends[2][2]:
                continue
            moved = [transfer(e, ways, ends[e.source], ends[e.target]) for e in edges(p)]
            ttft = 0.003 + sum(x["ttft"] for x in at) + 0.6 * moved[0] + moved[1]
            tpot = at[2]["tpot"]
            if ttft > 0.12 or tpot > 0.006:
                continue
            values = {
                "requests_s_gpu": -rate / gpus,
                "ttft_ms": ttft * 1e3,
                "usd_per_request": usd / 3600 / rate,
                "tpot_ms": tpot * 1e3,
                "e2e_ms": (ttft + 99 * tpot) * 1e3,
            }
            rows.append([values[name] for name in objectives])
    every = np.unique(np.array(rows), axis=0)
    beaten = [((every <= x).all(1) & (every < x).any(1)).any() for x in every]
    expected = every[~np.array(beaten)]
    found = run(data)
    sign = [1.0 if d == "min" else -1.0 for d in objectives.values()]
    reached = found.front[list(objectives)].to_numpy(float) * sign
    assert len(reached) > 2
    # values that differ in their last digits only are alike
    close = [np.isclose(expected, x, rtol=1e-9).all(1).any() for x in reached]
    assert all(close)
    missed = [x for x in expected if not np.isclose(reached, x, rtol=1e-9).all(1).any()]
    assert all(((reached <= x * (1 + np.sign(x) * 1e-9)).all(1)).any() for x in missed)


def test_a_shared_pool_needs_at_most_as_many_gpus() -> None:
    apart = space(rates=[4.0], objectives={"gpus": "min"})
    shared = copy.deepcopy(apart)
    shared["pipeline"][1]["pool"] = "prefill"
    del shared["pipeline"][1]["replicas"]
    few, many = (run(x).front["gpus"].min() for x in (shared, apart))
    assert few < many
    row = run(shared).front.iloc[0]
    assert row["encode_gpus"] == 0
    assert "encode_transfer_ms" not in row


def test_a_lone_host_stage_adds_price_not_gpus() -> None:
    host = {"memory_gb_s": 300, "capacity_gib": 256, "usd_per_hour": 5}
    search_stage = {"name": "find", "kind": "retrieval", "vectors": 1e9, "vector_bytes": 96, "scan": 0.01, "host": host}
    data = without(space(rates=[5.0], objectives={"usd_per_request": "min"}), "encode")
    bare = run(data).front.iloc[0]
    row = run({**data, "pipeline": [search_stage, *data["pipeline"]]}).front.iloc[0]
    assert row["gpus"] == bare["gpus"]
    assert row["usd_per_request"] == pytest.approx(bare["usd_per_request"] + 5 / 3600 / 5.0, rel=1e-9)
    assert row["find_time_ms"] == pytest.approx(1e3 * 1e9 * 96 * 0.01 / 300e9, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- the edges


def wrong(**changes: Any) -> Any:
    data = space()
    for place, value in changes.items():
        where: Any = data
        *path, last = [int(x) if x.isdigit() else x for x in place.split("__")]
        for key in path:
            where = where[key]
        where[last] = value
    return data


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pipeline__2__replica": 3}, ["pipeline[2]", "'replica'", "replicas"]),
        ({"pipeline__1__tokens__ech": 3}, ["pipeline[1].tokens", "'ech'", "each"]),
        ({"pipeline__1__kind": "encodr"}, ["pipeline[1].kind", "encoder"]),
        ({"pipeline__1__encoder__layer": 3}, ["pipeline[1].encoder", "layers"]),
        ({"pipeline__2__model": "Qwen3-0.7B"}, ["prefill", "Qwen3-0.7B", "Qwen3-0.6B"]),
        ({"pipeline__2__tokens": 5}, ["pipeline[2].tokens", "says nothing"]),
        ({"pipeline__3__name": "prefill"}, ["one name"]),
        ({"pipeline__3__kind": "prefill"}, ["language model stages"]),
        ({"pipeline__0__pool": "prefill"}, ["pipeline[0].pool", "says nothing"]),
        ({"pipeline": []}, ["pipeline", "empty"]),
        ({"rates": [-1]}, ["rates", "out of range"]),
        ({"objectives": {"ttft": "min"}}, ["objectives", "ttft_ms"]),
        ({"loop": {"turn": 2}}, ["loop", "turns"]),
        ({"request": {"isl": {"mean": 5, "sd": 1}, "osl": 3}}, ["request.isl", "'sd'"]),
        ({"request": {"isl": {"cv": 1}, "osl": 3}}, ["request.isl", "'mean'"]),
        ({"loop": {"turns": 2, "growth": {"mean": 5, "sd": 1}}}, ["loop.growth", "'sd'"]),
        ({"pipeline__1__ep": 2}, ["pipeline[1].ep", "says nothing"]),
        ({"pipeline__2__tp": [3]}, ["prefill", "tp does not divide"]),
        ({"rates": [1e6]}, ["rates", "at most"]),
        ({"gpus": 1}, ["gpus", "within 1 GPUs"]),
    ],
)
def test_what_is_wrong_is_one_clear_error(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        run(wrong(**changes))
    for word in ["small.yaml", *words]:
        assert word in str(error.value)


def test_nothing_feasible_names_what_binds() -> None:
    found = run(space(rates=[2.0], constraints={"ttft_ms": {"max": 0.5}}))
    assert not len(found.front)
    assert found.least is not None
    assert [b.metric for b in found.binding] == ["ttft_ms"]


def test_other_samplers_are_refused() -> None:
    for options in ({"sampler": "tpe"}, {"engine": "dask"}, {"intervals": True}):
        with pytest.raises(InputError, match="pipeline"):
            search(parse_pipeline(space()), **options)


def test_load_space_says_that_it_is_a_pipeline() -> None:
    with pytest.raises(InputError, match="dse search"):
        load_space(SHIPPED / "agentic.yaml")


def test_the_command_writes_columns_by_stage(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    path, out = tmp_path / "small.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(space(rates=[5.0])))
    monkeypatch.setattr("sys.argv", ["dse", "search", str(path), "--out", str(out)])
    monkeypatch.setenv("DSE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    assert "prefill" in capsys.readouterr().out
    head = (out / "pareto.csv").read_text().splitlines()[0].split(",")
    assert {"encode_replicas", "prefill_tp", "decode_batch", "encode_transfer_ms", "usd_per_request"} <= set(head)
    assert "encode 1 x tp 1" in (out / "report.html").read_text()


@pytest.mark.parametrize("name", ["agentic", *(pytest.param(x, marks=pytest.mark.slow) for x in PIPELINES[:2])])
def test_shipped_pipelines_find_a_front(name: str, tmp_path: Path) -> None:
    found = search(load_any(SHIPPED / f"{name}.yaml"))
    assert len(found.front) > 5
    assert found.enumerated == found.legal + sum(found.cuts.values())
    assert (found.front["gpus"] <= found.run["space"]["gpus"]).all()
    assert (found.front["requests_s"] < found.front["capacity_requests_s"]).all()
    assert len(write_outputs(found, tmp_path)) == 4
