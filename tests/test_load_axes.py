"""Prefix hits and acceptance as axes: a point is what the same space with that one value has, and its row says so."""

from __future__ import annotations

import io
from typing import Any

import pandas as pd
import pytest

from dse.catalog.coefficients import CoefficientSet
from dse.errors import InputError
from dse.report.files import csv
from dse.search.run import search
from dse.space import compile_space, parse_space
from dse.space.cases import estimate_cases

PHYSICS = CoefficientSet("physics")
SPACE: dict[str, Any] = {
    "models": ["Llama-3.1-8B"],
    "clusters": ["h200-hgx"],
    "gpus": [1, 2],
    "workloads": [{"isl": 3000, "osl": 400}],
    "axes": {
        "tp": [1, 2],
        "concurrency": [8, 64, 256],
        "draft_tokens": [0, 1, 3],
        "acceptance": [0.5, "80%"],
        "prefix_hit": [0, 0.5, 0.9],
    },
    "options": {"external_draft": True},
}
NUMBERS = ("ttft_ms", "tpot_ms", "memory_gib", "output_tok_s_gpu")


def found(**axes: Any) -> Any:
    return search(parse_space({**SPACE, "axes": {**SPACE["axes"], **axes}}), coefficients=PHYSICS)


def again(table: pd.DataFrame) -> pd.DataFrame:
    return estimate_cases(table, PHYSICS)


def test_rows_are_estimated_to_the_same_numbers() -> None:
    result = found()
    table = pd.read_csv(io.StringIO(csv(result.candidates)), dtype=str)
    assert {0.5, 0.9} <= set(table["prefix_hit"].astype(float))
    assert set(table["acceptance"].astype(float)) == {0.5, 0.8}
    for name in NUMBERS:
        assert again(table)[name].to_numpy(float) == pytest.approx(table[name].astype(float).to_numpy(), rel=1e-6)


def test_a_value_of_an_axis_is_the_space_that_has_it_alone() -> None:
    axes = {k: v for k, v in SPACE["axes"].items() if k not in ("acceptance", "prefix_hit")}
    fixed = {
        **SPACE,
        "axes": axes,
        "options": {"acceptance": 0.5, "external_draft": True},
        "workloads": [{"isl": 3000, "osl": 400}],
    }
    fixed["workloads"] = [{"isl": 3000, "osl": 400, "prefix_hit": 0.9}]
    plain = search(parse_space(fixed), coefficients=PHYSICS).front
    one = found(acceptance=0.5, prefix_hit=0.9).front
    assert len(plain) == len(one) > 3
    for name in NUMBERS:
        assert one[name].to_numpy(float) == pytest.approx(plain[name].to_numpy(float), rel=1e-9)


def test_samplers_reach_them() -> None:
    spec = parse_space(SPACE)
    rows = search(spec, coefficients=PHYSICS, sampler="random", trials=200).candidates
    assert rows["prefix_hit"].nunique() == 3
    assert rows["acceptance"].nunique() == 2


def test_pools_search_them_each_in_its_own() -> None:
    prefill = {"gpus": 1, "prefix_hit": [0, 0.5]}
    decode = {"gpus": 1, "concurrency": [8, 64, 256]}
    decode |= {"draft_tokens": [0, 2], "acceptance": [0.4, 0.9]}
    space = {k: v for k, v in SPACE.items() if k != "axes"}
    space["disaggregated"] = {"prefill": prefill, "decode": decode, "aggregated": False}
    table = pd.read_csv(io.StringIO(csv(search(parse_space(space), coefficients=PHYSICS).candidates)), dtype=str)
    assert set(table["prefix_hit"].astype(float)) == {0.0, 0.5}
    assert set(table["acceptance"].astype(float)) == {0.4, 0.9}
    for name in NUMBERS:
        assert again(table)[name].to_numpy(float) == pytest.approx(table[name].astype(float).to_numpy(), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workloads": [{"isl": 9, "osl": 9, "prefix_hit": 0.5}]}, ["workloads[0].prefix_hit", "axes.prefix_hit"]),
        ({"axes": {"prefix_hit": [1.5]}}, ["axes.prefix_hit", "1.5", "0 to 1"]),
        ({"axes": {"acceptance": []}}, ["axes.acceptance"]),
        (
            {
                "workloads": [{"isl": 9, "osl": 9, "slo": {"ttft_ms": 500, "tpot_ms": 50}}],
                "objectives": {"goodput_req_s_gpu": "max"},
            },
            ["axes.prefix_hit", "goodput_req_s_gpu", "leave"],
        ),
    ],
)
def test_what_contradicts_itself_is_said(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        compile_space(parse_space({**SPACE, **changes}))
    assert [word for word in words if word not in str(error.value)] == []
