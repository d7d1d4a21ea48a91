"""Language models of a pipeline with experts, encoders over copies, and loops of an agent whose context grows."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from dse.cost.coefficients import Coefficients
from dse.cost.evaluate import gpus_of_replica
from dse.errors import InputError
from dse.search.pipeline_result import search_pipeline
from dse.search.pipeline_stages import Priced, price
from dse.space.load import parse_pipeline
from dse.space.pipeline_calls import call_lengths, kinds
from dse.space.pipeline_compile import CompiledPipeline, compile_pipeline

C = Coefficients()
MODEL = "Qwen3-0.6B"


def space(*stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = {"pipeline": list(stages), "request": {"isl": 900, "osl": 120}, "clusters": ["h100-dgx"], "gpus": 8}
    return {**base, "rates": [1.0], "objectives": {"gpus": "min", "ttft_ms": "min"}, **changes}


def compiled(*stages: dict[str, Any], **changes: Any) -> CompiledPipeline:
    return compile_pipeline(parse_pipeline(space(*stages, **changes)))


def priced(p: CompiledPipeline) -> dict[str, Priced]:
    with jax.enable_x64(True):
        return price(p, jax.tree.map(lambda leaf: np.full((len(p.machines), len(p.entries)), leaf), C))


def test_percentiles_as_objective_are_those_of_all_pipelines() -> None:
    """The front by percentiles is that of every pipeline, none left out."""
    stages = [
        {"name": "prefill", "kind": "prefill", "model": MODEL, "tp": [1, 2], "replicas": [1, 2], "batch": [1, 4]},
        {"name": "decode", "kind": "decode", "model": MODEL, "tp": [1, 2], "replicas": [1, 2], "batch": [8, 64]},
    ]
    for goal in ("ttft_p90_ms", "ttft_p99_ms", "tpot_p99_ms"):
        data = space(*stages, rates=[5.0, 40.0], objectives={"requests_s_gpu": "max", goal: "min"})
        columns = ["requests_s_gpu", goal]
        spec = parse_pipeline(data)
        kept, every = (search_pipeline(spec, C, prune=x).front[columns].to_numpy() for x in (True, False))
        assert kept == pytest.approx(every, rel=1e-12)
        assert len(kept) > 1


# ------------------------------------------------------------------------------------------------------- experts

EXPERTS: dict[str, Any] = {"model": "Qwen3-30B-A3B", "attention_dp": [1, 4], "ep": [1, 4], "cp": [1, 2]}


def test_degrees_of_experts_are_those_that_divide() -> None:
    stages = [
        {"name": "prefill", "kind": "prefill", **EXPERTS, "tp": [1, 2]},
        {"name": "decode", "kind": "decode", **EXPERTS, "cp": 1, "batch": 16},
    ]
    p = compiled(*stages)
    legal = {(d.tp, d.attention_dp, d.cp, d.ep) for d in p.designs["prefill"]}
    expected = {
        (tp, ranks, cp, ep)
        for tp in (1, 2)
        for ranks in (1, 4)
        for cp in (1, 2)
        for ep in (1, 4)
        if tp * ranks * cp % ep == 0 and tp * ranks * cp <= 8
    }
    assert legal == expected
    plan = p.plans("prefill")
    assert (plan.tp * plan.attention_dp * plan.cp == plan.moe_ep * plan.moe_tp).all()
    assert gpus_of_replica(plan).max() == 8
    with pytest.raises(InputError, match="without experts"):
        compiled({**stages[0], "model": MODEL, "attention_dp": 2, "ep": 1})
    with pytest.raises(InputError, match="same axis"):
        parse_pipeline(space({**stages[0], "ep": 2, "moe_ep": 2}))


def test_attention_dp_computes_a_lone_prompt_on_one_rank() -> None:
    """Four ranks take four prompts in the time of one (its experts meet four times the tokens), and a lone one too."""
    prefill = {"name": "prefill", "kind": "prefill", "model": "Qwen3-30B-A3B", "attention_dp": 4, "ep": 4}
    times, single = (
        priced(compiled(x, request={"isl": 4000, "osl": 1}))["prefill"].times
        for x in ({**prefill, "batch": [1, 4]}, {**prefill, "attention_dp": 1, "ep": 1})
    )
    assert times.alone[0] == pytest.approx(times.alone[1])
    assert times.alone[1] < times.together[1] < 2.0 * times.alone[1]
    assert times.alone[0] > 0.5 * single.alone[0]  # attention is not split
    assert times.alone[0] < single.alone[0]  # experts are


def test_an_encoder_is_spread_over_copies() -> None:
    """Images of one call over copies: as many GPUs as copies, and a time that is that of its share of the images."""
    encode: dict[str, Any] = {
        "name": "encode",
        "kind": "encoder",
        "encoder": {"layers": 24, "hidden": 1024, "heads": 16, "ffn": 4096},
        "tokens": {"each": 1024, "items": 8},
        "spread": [1, 2, 8, 16],
    }
    p = compiled(encode, gpus=16)
    whole, half, each, idle = priced(p)["encode"].times.alone
    few = {**encode, "tokens": {"each": 1024, "items": 4}, "spread": 1}
    four = priced(compiled(few, gpus=16))["encode"].times.alone[0]
    assert half == pytest.approx(four, rel=1e-9)
    assert whole > half > each
    assert each == idle  # an image is not cut
    assert [d.gpus for d in p.designs["encode"]] == [1, 2, 8, 16]
    pool = {"name": "prefill", "kind": "prefill", "model": MODEL, "tp": 8}
    del encode["spread"]
    shared = compiled({**encode, "pool": "prefill", "tp": [1, 8]}, pool)
    copies, cut = priced(shared)["encode"].times.alone  # eight copies of one image each, or each image cut in 8
    assert copies == pytest.approx(each, rel=1e-9)
    assert cut != copies


# --------------------------------------------------------------------------------------------------------- loops


def test_turns_hold_what_came_before() -> None:
    """Means and variances of the contexts, against a sample of whole conversations in plain numpy."""
    loop = {"turns": 4, "growth": {"mean": 600, "cv": 1.0}, "hit": 0.9}
    request = {"isl": {"mean": 2000, "cv": 0.6}, "osl": {"mean": 150, "cv": 0.5}, "prefix_hit": 0.3}
    stage = {"name": "prefill", "kind": "prefill", "model": MODEL}
    spec = parse_pipeline(space(stage, request=request, loop=loop))
    k = kinds(spec)["prefill"]
    rng = np.random.default_rng(3)

    def draws(mean: float, cv: float) -> Any:
        sigma = np.sqrt(np.log1p(cv**2))
        return mean * np.exp(sigma * rng.standard_normal(400_000) - sigma**2 / 2)

    context = draws(2000, 0.6)
    new = [0.7 * context]
    contexts = [context]
    for _ in range(3):
        before = context + draws(150, 0.5)
        grown = draws(600, 1.0)
        context = before + grown
        contexts.append(context)
        new.append(context - 0.9 * before)
    for found, sample in ((k.prompt, contexts), (k.tokens, new)):
        every = np.concatenate(sample)
        mean = k.weight @ found
        assert mean == pytest.approx(every.mean(), rel=5e-3)
        assert np.sqrt(k.weight @ (found - mean) ** 2) == pytest.approx(every.std(), rel=0.05)
    assert k.first @ k.tokens == pytest.approx(new[0].mean(), rel=5e-3)
    lengths, first = call_lengths(spec, spec.pipeline[0], k)
    assert lengths.weight.sum() == pytest.approx(1.0)
    assert first is not None
    assert first.sum() == pytest.approx(1.0)
    assert lengths.weight @ lengths.isl == pytest.approx(k.weight @ k.prompt)


def test_the_spread_of_contexts_enters_decode() -> None:
    """Memory holds two deviations of what the seats hold; where a window caps what is read, a step is the mean over
    contexts, below that at their mean."""
    stages = [
        {"name": "prefill", "kind": "prefill", "model": "gpt-oss-20b"},
        {"name": "decode", "kind": "decode", "model": "gpt-oss-20b", "batch": 32},
    ]

    def decode(cv: float) -> Any:
        return priced(compiled(*stages, request={"isl": {"mean": 300, "cv": cv}, "osl": 100}))["decode"]

    alike, spread = decode(0.0), decode(1.5)
    assert spread.times.tpot[0, -1] < alike.times.tpot[0, -1]
    stages = [{**s, "model": MODEL} for s in stages]
    alike, spread = decode(0.0), decode(1.5)
    assert spread.times.tpot[0, -1] == pytest.approx(alike.times.tpot[0, -1], rel=1e-3)
    one_token = 2 * 28 * 8 * 128 * 2  # bytes: keys and values, layers, KV heads, head dimension, bf16
    more = (spread.held - alike.held)[0] / (2 * np.sqrt(32) * one_token)
    assert more == pytest.approx(300 * 1.5, rel=0.1)  # a deviation of the contexts


# --------------------------------------------------------------------------------------------------- micro-batches


def test_balanced_micro_batches_of_whole_prompts_give_a_pipeline_more() -> None:
    """Uneven prompts through four stages; one stage, or prompts that are alike, gain nothing."""
    stage = {"name": "prefill", "kind": "prefill", "model": "Qwen3-32B", "batch": 4, "weights": "fp8"}
    ways = {"microbatching": ["fifo", "balanced"]}
    most = {}
    for pp, cv in ((4, 0.8), (4, 0.0), (1, 0.8)):
        data = space(stage | ways | {"pp": pp}, request={"isl": {"mean": 2000, "cv": cv}, "osl": 1})
        p = compile_pipeline(parse_pipeline(data))
        times = priced(p)["prefill"].times
        each = np.asarray(times.capacity, float).tolist()
        most[pp, cv] = dict(zip([d.microbatching for d in p.designs["prefill"]], each, strict=True))
    assert set(most[4, 0.8]) == {"fifo", "balanced"}
    assert most[4, 0.8]["balanced"] > 1.15 * most[4, 0.8]["fifo"]
    assert most[4, 0.0]["balanced"] == pytest.approx(most[4, 0.0]["fifo"], rel=1e-6)
    assert set(most[1, 0.8]) == {"fifo"}
    alike = compile_pipeline(parse_pipeline(space(stage | {"pp": 4}, request={"isl": 2000, "osl": 1})))
    assert float(priced(alike)["prefill"].times.capacity[0]) == pytest.approx(most[4, 0.0]["fifo"], rel=1e-9)


def test_the_way_to_fill_micro_batches_is_searched_and_named() -> None:
    stage = {"name": "prefill", "kind": "prefill", "model": MODEL, "pp": [1, 2], "batch": 4}
    request = {"isl": {"mean": 4000, "cv": 1.0}, "osl": 1}
    data = space(stage | {"microbatching": ["fifo", "balanced"]}, request=request)
    found = search_pipeline(parse_pipeline(data), Coefficients(), prune=False, best=100).candidates
    assert {(1, "fifo"), (2, "fifo"), (2, "balanced")} == set(
        zip(found["prefill_pp"], found["prefill_microbatching"], strict=True)
    )
    text = found.loc[found["prefill_microbatching"] == "balanced", "pipeline"].iloc[0]
    assert text.endswith("batch 4 balanced")
    llm = {"name": "llm", "kind": "llm", "model": MODEL, "microbatching": "balanced"}
    with pytest.raises(InputError, match="microbatching"):
        parse_pipeline(space(llm))
