"""Draft models: their steps added by hand, memory, limits, and the axis of a search."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

from dse.catalog.coefficients import CoefficientSet
from dse.catalog.models import model, parameter_count
from dse.cost.evaluate import estimate_one
from dse.cost.memory import kv_bytes, weights
from dse.cost.shard import draft_plan, shard
from dse.cost.step import Batch, Segment, step
from dse.errors import InputError
from dse.report.files import csv
from dse.search.run import search
from dse.space import compile_space, parse_space
from dse.space.cases import estimate_cases, parse_cases, scenarios_of
from dse.space.drafts import head_of

PHYSICS = CoefficientSet("physics")
ROW: dict[str, Any] = {"model": "Llama-3.1-70B", "gpu": "h100", "isl": 2000, "osl": 300, "tp": 4, "weights": "fp8"}
ROW |= {"concurrency": 8, "speculation": 3, "acceptance": 0.8}
SMALL = "Llama-3.2-1B"
SPACE: dict[str, Any] = {
    "models": ["Llama-3.1-70B"],
    "clusters": ["h100-dgx"],
    "gpus": [2, 4, 8],
    "workloads": [{"isl": 2000, "osl": 300}],
    "axes": {
        "tp": [2, 4, 8],
        "weights": ["fp8"],
        "concurrency": [1, 8, 64],
        "draft_tokens": [0, 2, 4],
        "draft_model": [SMALL, "Llama-3.1-8B", "0.9B"],
    },
}


def rows(*changes: dict[str, Any]) -> pd.DataFrame:
    return estimate_cases(pd.DataFrame([{**ROW, **c} for c in changes]).astype(object), PHYSICS)


def scenario(**changes: Any) -> Any:
    cases = parse_cases(pd.DataFrame([{**ROW, **changes}]).astype(object))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[0], scenarios_of(cases, PHYSICS))


@pytest.mark.parametrize("pp", [1, 4])
def test_a_drafted_token_costs_a_step_of_the_draft_model(pp: int) -> None:
    """A request by itself: TPOT = (verification + n drafts, each through all stages) / accepted tokens."""
    with jax.enable_x64(True):
        x = scenario(draft_model=SMALL, pp=pp, concurrency=1)
        draft = x.plan.draft
        segment = Segment(requests=1.0, tokens=4.0, start=x.load.isl, span=x.load.osl)
        parts = (x.device, x.topology)
        big = shard(x.architecture, *parts, replace(x.plan, draft=None), x.coefficients)
        small = shard(draft.architecture, *parts, draft_plan(x.plan), x.coefficients)
        verify = step(big, Batch(prefill=None, decode=segment), 0.0)
        token = step(small, Batch(prefill=None, decode=replace(segment, tokens=1.0)), 0.0)
        hops = (pp - 1.0) * float(big.boundary(verify.tokens * big.boundary_bytes))
        whole = pp * verify.body + hops + verify.head + verify.overhead + 3.0 * (pp * token.body + token.head)
        found = float(estimate_one(x).served.tpot)
    accepted = (1 - 0.8**4) / 0.2
    assert found == pytest.approx(float(whole) / accepted, rel=1e-3)


def test_memory_holds_the_draft_model_and_its_cache() -> None:
    with jax.enable_x64(True):
        x = scenario(draft_model=SMALL)
        plain = estimate_one(replace(x, plan=replace(x.plan, draft=None))).memory
        both = estimate_one(x).memory
        own = draft_plan(x.plan)
        small = x.plan.draft.architecture
        assert float(both.weights - plain.weights) == pytest.approx(float(weights(small, own, 0.0)), rel=1e-9)
        more = kv_bytes(small, own, x.load.isl + x.coefficients.reserved_output * x.load.osl)
        assert float(both.kv_request - plain.kv_request) == pytest.approx(float(more), rel=1e-6)


def test_the_larger_the_draft_model_the_dearer_its_tokens() -> None:
    out = rows({}, {"draft_model": "0.9B"}, {"draft_model": SMALL}, {"draft_model": "Llama-3.2-3B"})
    tpot, memory, ttft = (out[name].to_numpy(float) for name in ("tpot_ms", "memory_gib", "ttft_ms"))
    assert (np.diff(tpot[1:]) > 0).all()
    assert (np.diff(memory) > 0).all()
    assert (np.diff(ttft) > 0).all()  # prompts go through it too


def test_a_draft_model_may_lie_on_one_gpu() -> None:
    out = rows({"draft_model": SMALL, "draft_tp": 4}, {"draft_model": SMALL}, {"draft_model": SMALL, "draft_tp": 1})
    assert out["tpot_ms"].iloc[0] == out["tpot_ms"].iloc[1] != out["tpot_ms"].iloc[2]
    assert out["weights_gib"].iloc[2] > out["weights_gib"].iloc[1]


def test_none_and_no_drafted_tokens_leave_every_number_as_it_is() -> None:
    plain = rows({}, {"speculation": ""})
    named = rows({"draft_model": "none"}, {"speculation": 0, "draft_model": SMALL})
    for name in ("ttft_ms", "tpot_ms", "memory_gib", "mixed_step_ms", "prefill_attention_ms", "kv_requests"):
        assert (plain[name].to_numpy() == named[name].to_numpy()).all()


def test_a_head_has_the_parameters_it_is_given() -> None:
    target = model("Llama-3.1-70B")
    head = head_of(0.9e9, target)
    own = parameter_count(head).total - head.embeddings * head.vocab * head.hidden  # shared with the target
    assert own == pytest.approx(0.9e9, rel=1e-3)
    assert head.layers == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"draft_model": "Qwen3-0.6B"}, ["151936", "tokenizer"]),
        ({"draft_model": "Mixtral-8x7B"}, ["has experts", "0.8B"]),
        ({"draft_model": "Llama-3.1-405B"}, ["no smaller"]),
        ({"draft_model": "0.01B"}, ["10M", "attention"]),
        ({"draft_model": SMALL, "speculation": ""}, ["speculation", "how many tokens"]),
        ({"draft_model": SMALL, "draft_tp": 2}, ["draft_tp: 2", "1 or 4"]),
    ],
)
def test_a_wrong_draft_model_says_why(change: dict[str, Any], words: list[str]) -> None:
    reason = rows(change)["reason"].iloc[0]
    assert [word for word in words if word not in reason] == []


def test_the_axis_is_searched_and_its_rows_are_estimated_to_the_same_numbers() -> None:
    found = search(parse_space(SPACE), coefficients=PHYSICS)
    assert found.enumerated == found.legal + sum(found.cuts.values())
    table = pd.read_csv(io.StringIO(csv(found.candidates)), dtype=str)
    assert set(table["draft_model"]) == set(SPACE["axes"]["draft_model"])
    again = estimate_cases(table, PHYSICS)
    for name in ("ttft_ms", "tpot_ms", "memory_gib", "output_tok_s_gpu"):
        assert again[name].to_numpy(float) == pytest.approx(table[name].astype(float).to_numpy(), rel=1e-6)


def test_the_tp_of_a_draft_model_is_an_axis() -> None:
    """Each plan of it is what a row with the same draft_tp gives; `auto` and the target's own TP are one plan."""
    axes = {"draft_tp": ["auto", 1, 4], "draft_model": [SMALL], "draft_tokens": [2], "tp": [2, 4]}
    found = search(parse_space({**SPACE, "gpus": [4], "axes": {**SPACE["axes"], **axes}}), coefficients=PHYSICS)
    assert found.enumerated == found.legal + sum(found.cuts.values())
    assert {(2, 1), (2, 2), (4, 1), (4, 4)} == set(
        zip(found.candidates["tp"], found.candidates["draft_tp"], strict=True)
    )
    table = pd.read_csv(io.StringIO(csv(found.candidates)), dtype=str)
    again = estimate_cases(table, PHYSICS)
    for name in ("ttft_ms", "tpot_ms", "memory_gib"):
        assert again[name].to_numpy(float) == pytest.approx(table[name].astype(float).to_numpy(), rel=1e-6)


def test_a_space_without_the_axis_has_no_table_of_drafts() -> None:
    axes = {k: v for k, v in SPACE["axes"].items() if k != "draft_model"}
    assert compile_space(parse_space({**SPACE, "axes": {**axes, "draft_tokens": 0}})).drafts is None
    assert compile_space(parse_space(SPACE)).drafts is not None


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"draft_model": ["none", SMALL]}, ["draft_tokens", "MTP", "draft_model: [NAME]"]),
        ({"draft_model": ["Qwen3-0.6B"]}, ["axes.draft_model", "tokenizer"]),
        ({"draft_tokens": [0]}, ["axes.draft_tokens", "drafts nothing"]),
        ({"draft_tp": [3]}, ["none of", "draft_tp is neither 1 nor"]),
        ({"draft_tp": ["some"]}, ["axes.draft_tp", "'some'"]),
    ],
)
def test_a_wrong_axis_says_why(axes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        compile_space(parse_space({**SPACE, "axes": {**SPACE["axes"], **axes}}))
    assert [word for word in words if word not in str(error.value)] == []
