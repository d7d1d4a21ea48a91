"""The aggregated language model of a pipeline: what `dse goodput` says of it, alone, in a shared pool and in a loop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

from dse.catalog.coefficients import coefficient_set
from dse.cost import lengths as dist
from dse.cost.coefficients import Coefficients
from dse.cost.evaluate import Scenario, estimate_open
from dse.cost.goodput import Demand, Slo
from dse.cost.shard import shard
from dse.cost.types import replace
from dse.programs import QUICK
from dse.search import pipeline_open
from dse.search.pipeline_result import search_pipeline
from dse.search.pipeline_stages import price
from dse.search.result import SearchResult
from dse.space.cases import Case, parse_cases, scenarios_of
from dse.space.load import parse_pipeline
from dse.space.pipeline_compile import compile_pipeline

C = Coefficients()
MODEL = "Qwen3-0.6B"
LLM: dict[str, Any] = {"name": "llm", "kind": "llm", "model": MODEL, "tp": 2, "batch": 64, "kv": "bf16"}
REQUEST: dict[str, Any] = {"isl": {"mean": 900, "cv": 0.8}, "osl": {"mean": 120, "cv": 0.5}}


def space(*stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = {"pipeline": list(stages), "request": REQUEST, "clusters": ["h100-dgx"], "gpus": 8, "rates": [1.0]}
    return {**base, "objectives": {"gpus": "min", "ttft_ms": "min"}, **changes}


def run(data: dict[str, Any], **options: Any) -> SearchResult:
    return search_pipeline(parse_pipeline(data), C, **options)


@pytest.fixture(scope="module", autouse=True)
def _quickly_compiled() -> Iterator[None]:
    pipeline_open.compiled.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_open, "LARGE", QUICK)  # a few rows of a large program
        patch.setattr(pipeline_open, "BLOCK", 2)  # and several of them: the last one is padded
        yield
    pipeline_open.compiled.cache_clear()


@cache
def _open() -> Any:
    def one(x: Scenario, lengths: dist.Lengths, rate: Any) -> Any:
        s = shard(x.architecture, x.device, x.topology, x.plan, x.coefficients)
        return estimate_open(x, s, Demand(lengths=lengths, slo=Slo(ttft=1.0, tpot=1.0), cv=1.0, rate=rate), False).open

    return jax.jit(one, compiler_options=QUICK)


def by_goodput(rate: float) -> Any:
    """One replica of `LLM` at a rate, as `dse goodput` prices it."""
    row = {"model": MODEL, "gpu": "h100", "tp": 2, "isl": 900, "osl": 120, "concurrency": 64, "kv": "bf16"}
    (case,) = [x for x in parse_cases(pd.DataFrame([row]).astype(str)) if isinstance(x, Case)]
    lengths = dist.lognormal(900.0, 120.0, 0.8, 0.5)
    with jax.enable_x64(True):
        x = jax.tree.map(lambda leaf: np.asarray(leaf)[0], scenarios_of([case], coefficient_set()))
        return _open()(replace(x, coefficients=C), lengths, rate)


@pytest.fixture(scope="module")
def rates() -> list[float]:
    capacity = float(by_goodput(1.0).capacity)
    return [share * capacity for share in (0.02, 0.5, 0.9, 1.1)]


def test_one_llm_stage_is_what_goodput_says(rates: list[float]) -> None:
    found = run(space(LLM, rates=rates, gpus=2), best=10).candidates
    assert len(found) == 3  # the last rate is beyond its capacity
    for row, rate in zip(found.sort_values("requests_s").to_dict("records"), rates, strict=False):
        alone = by_goodput(rate)
        for name in ("ttft", "tpot", "ttft_p99", "tpot_p90", "tpot_p99"):
            assert row[f"{name}_ms"] == pytest.approx(float(getattr(alone, name)) * 1e3, rel=2e-3), name
        if rate < 0.8 * rates[2]:  # above, some requests wait for a seat, far longer than the others: P90 is late
            # idle, P90 is that of the prompts, which are lognormal: no shifted gamma has their mean, P90 and P99
            within = 1e-2 if rate == rates[0] else 2e-3
            assert row["ttft_p90_ms"] == pytest.approx(float(alone.ttft_p90) * 1e3, rel=within)
            assert row["ttft_p50_ms"] == pytest.approx(float(alone.ttft_p50) * 1e3, rel=0.02)
        assert row["ttft_p90_ms"] > float(alone.ttft_p90) * 1e3 * 0.998
        assert row["capacity_requests_s"] == pytest.approx(float(alone.capacity), rel=1e-4)
        assert row["llm_wait_ms"] == pytest.approx(float(alone.wait) * 1e3, rel=1e-3, abs=1e-6)


def test_idle_an_llm_stage_is_a_prefill_and_a_decode_stage() -> None:
    """The same plan split over two idle pools, its transfer free: TTFT and TPOT of a lone request are alike."""
    plan = {"model": MODEL, "tp": 2, "kv": "bf16"}
    alike = {"rates": [1e-5], "request": {"isl": 900, "osl": 120}}
    split = [{**plan, "name": x, "kind": x, "batch": n} for x, n in (("prefill", 1), ("decode", 64))]
    one = run(space(LLM, gpus=2, **alike)).front.iloc[0]
    two = run(space(*split, transfers="free", **alike)).front.iloc[0]
    assert one["ttft_ms"] == pytest.approx(two["ttft_ms"], rel=1e-3)
    assert one["tpot_ms"] == pytest.approx(two["tpot_ms"], rel=1e-3)


def test_replicas_share_the_rate(rates: list[float]) -> None:
    one = run(space(LLM, rates=rates[1:2], gpus=2)).front.iloc[0]
    two = run(space(LLM | {"replicas": 2}, rates=[2 * rates[1]], gpus=4)).front.iloc[0]
    for name in ("ttft_ms", "tpot_ms", "ttft_p99_ms"):
        assert two[name] == pytest.approx(one[name], rel=1e-9)


def test_an_encoder_in_the_same_pool_slows_the_llm(rates: list[float]) -> None:
    """It takes a share of the pool's time: the LLM runs at the rate that is left, and its times are as much longer."""
    encode: dict[str, Any] = {
        "name": "encode",
        "kind": "encoder",
        "encoder": {"layers": 12, "hidden": 768, "heads": 12, "ffn": 3072},
        "tokens": {"each": 4000, "share": 0.5},
        "merge": 4000,
        "pool": "llm",
    }
    rate = rates[1] / 2
    shared = run(space(encode, LLM, rates=[rate], gpus=2)).front.iloc[0]
    p = compile_pipeline(parse_pipeline(space(encode, LLM, rates=[rate], gpus=2)))
    c = jax.tree.map(lambda x: np.full((len(p.machines), len(p.entries)), x), C)
    with jax.enable_x64(True):
        taken = rate * 0.5 * float(price(p, c)["encode"].times.service[0])
    left = 1.0 - taken
    assert 0.0 < taken < 0.5
    alone = by_goodput(rate / left)
    assert shared["tpot_ms"] == pytest.approx(float(alone.tpot) / left * 1e3, rel=5e-3)  # half a token a prompt more
    assert shared["ttft_ms"] > float(alone.ttft) / left * 1e3
    assert shared["llm_utilisation"] == pytest.approx(taken + left * rate / left / float(alone.capacity), rel=5e-3)


@pytest.mark.slow
def test_the_first_turn_of_a_loop_is_what_users_wait_for(rates: list[float]) -> None:
    """Turns after it prefill little: its TTFT is longer than the mean, and all turns load the replica."""
    loop = {"turns": 3, "growth": 100, "hit": 1.0, "tool_latency_ms": 500}
    once = run(space(LLM, rates=[1e-3], gpus=2)).front.iloc[0]
    looped = run(space(LLM, rates=[1e-3], gpus=2, loop=loop)).front.iloc[0]
    assert looped["ttft_ms"] == pytest.approx(once["ttft_ms"], rel=0.02)
    assert looped["e2e_ms"] < 3 * once["e2e_ms"] + 1000
    assert looped["e2e_ms"] > 3 * 119 * once["tpot_ms"] + looped["ttft_ms"] + 1000
    assert looped["capacity_requests_s"] < once["capacity_requests_s"] / 2
