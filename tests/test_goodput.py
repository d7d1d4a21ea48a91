"""Goodput: searches by it against brute force, rows of `dse goodput`, and where tensor parallelism beats stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dse.catalog.coefficients import coefficient_set
from dse.errors import InputError
from dse.search.kernel import Questions, tables
from dse.search.pareto import front
from dse.search.recheck import recheck
from dse.search.run import of_machines, search
from dse.space.compile import compile_space
from dse.space.goodput import Asked, crossings, goodput_cases
from dse.space.load import load_space, parse_space
from dse.space.traces import Trace

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------------------------- searches

SPACE: dict[str, Any] = {
    "name": "small",
    "models": ["Llama-3.1-8B"],
    "clusters": ["h100-dgx"],
    "gpus": [1, 2, 4],
    "workloads": [
        {
            "isl": {"mean": 1000, "cv": 0.8},
            "osl": {"mean": 200, "cv": 0.5},
            "slo": {"ttft_ms": 200, "tpot_ms": 12, "attainment": 0.9},
        }
    ],
    "axes": {"tp": [1, 2, 4], "dp": "auto", "concurrency": [16, 64, 256], "chunk": [512, 2048, 8192]},
    "constraints": {"goodput_req_s_gpu": {"min": 7.0}},
    "objectives": {"goodput_req_s_gpu": "max", "gpus": "min"},
}


@pytest.fixture(scope="module")
def everything() -> Any:
    space = compile_space(parse_space(SPACE))
    return space, recheck(space, of_machines(space, None), np.arange(space.legal))


@pytest.mark.slow
def test_a_goodput_search_equals_brute_force(everything: Any) -> None:
    _, whole = everything
    result = search(parse_space(SPACE))
    values = whole.rows["goodput_req_s_gpu"].to_numpy()
    feasible = whole.feasible
    np.testing.assert_array_equal(feasible, (whole.rows["feasible"].astype(bool)) & (values >= 7.0))
    assert 0 < feasible.sum() < len(values)
    assert result.feasible == feasible.sum()
    points = np.stack([-values, whole.rows["gpus"].to_numpy(float)], axis=1)[feasible]
    expected = {tuple(np.round(row, 9)) for row in points[front(points)]}
    got = {tuple(np.round((-g, n), 9)) for g, n in result.front[["goodput_req_s_gpu", "gpus"]].to_numpy(float)}
    assert got == expected
    assert {"ttft_p90_ms", "tpot_p90_ms", "capacity_req_s", "attainment"} <= set(result.front.columns)


def test_search_and_cases_find_the_same_goodput(everything: Any) -> None:
    _, whole = everything
    rows = whole.rows[whole.rows["replicas"] == 1][::2].reset_index(drop=True)
    assert 10 < len(rows) <= 16  # one block of cases, as in the tests below: they share its program
    table = rows[["model", "gpu", "cluster", "isl", "osl", "tp", "concurrency", "chunk", "weights", "kv"]].astype(str)
    asked = Asked(ttft_ms=200, tpot_ms=12, isl_cv=0.8, osl_cv=0.5)
    found = goodput_cases(table, coefficient_set(), asked)
    np.testing.assert_allclose(found["goodput_req_s_gpu"].astype(float), rows["goodput_req_s_gpu"], rtol=1e-6)


@pytest.mark.slow
def test_percentiles_at_a_given_rate_are_metrics_too() -> None:
    spec = {**SPACE, "constraints": {"ttft_p90_ms": {"max": 150}, "attainment": {"min": "50 %"}}}
    spec["objectives"] = {"tpot_p90_ms": "min", "gpus": "min"}
    spec["workloads"] = [{**SPACE["workloads"][0], "arrivals": {"rate": 8, "cv": 1.5}}]
    result = search(parse_space(spec))
    assert len(result.front)
    assert (result.front["ttft_p90_ms"] <= 150).all()
    assert (result.front["attainment"] >= 0.5).all()
    np.testing.assert_allclose(result.front["open_req_s"] * result.front["replicas"], 8.0)
    assert "goodput_req_s_gpu" not in result.front


def test_spaces_that_do_not_ask_have_no_open_load() -> None:
    space = compile_space(load_space(ROOT / "search_spaces" / "quickstart.yaml"))
    assert space.workloads.demand is None
    assert tables(space, of_machines(space, None), np.float32).demand is None
    plain = {**SPACE, "constraints": {}, "objectives": {"output_tok_s_gpu": "max"}}
    assert compile_space(parse_space(plain)).workloads.demand is None
    assert not Questions.of(space).metrics & {"goodput_req_s_gpu"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workloads": [{"isl": 1000, "osl": 200}]}, "workloads[0] has no slo"),
        ({"workloads": [{"isl": {"mean": 9, "sd": 1}, "osl": 5}]}, "unknown key of a distribution 'sd'"),
        ({"workloads": [{"isl": {"cv": 1}, "osl": 5}]}, "needs its 'mean'"),
        ({"workloads": [{"trace": "nothing.csv"}]}, "nothing.csv: does not exist"),
        ({"workloads": [{"trace": "nothing.csv", "isl": 5}]}, "is the trace's; leave it out"),
        ({"workloads": [{"isl": 9, "osl": 5, "slo": {"ttft_ms": 0, "tpot_ms": 5}}]}, "out of range"),
        ({"workloads": [{"isl": 9, "osl": 5, "arrivals": {"cv": 50}}]}, "out of range"),
        ({"axes": {"tp": [1], "batch": [4]}}, "a static batch (axes.batch) has no open load"),
    ],
)
def test_what_is_wrong_with_a_workload_is_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        compile_space(parse_space({**SPACE, **change}, "space.yaml"))
    assert message in str(error.value)
    assert str(error.value).startswith("space.yaml")


# ------------------------------------------------------------------------------------------------- cases


def test_rows_without_goodput_say_why_and_stop_nobody() -> None:
    rows = pd.DataFrame(
        [
            {"model": "Llama-3.1-8B", "gpu": "h100", "isl": "1000", "osl": "200", "goodput_req_s_gpu": "old"},
            {"model": "Llama-3.1-70B", "gpu": "h100", "isl": "1000", "osl": "200", "goodput_req_s_gpu": ""},
            {"model": "Llama-99", "gpu": "h100", "isl": "1000", "osl": "200", "goodput_req_s_gpu": ""},
            {"model": "Llama-3.1-8B", "gpu": "h100", "isl": "60000", "osl": "200", "goodput_req_s_gpu": ""},
        ]
    )
    found = goodput_cases(rows, coefficient_set(), Asked(ttft_ms=300, tpot_ms=30))
    assert list(found["feasible"]) == [True, False, False, False]
    assert list(found["reason"].str.split(":").str[0])[1] == "memory"
    assert "unknown model" in found["reason"][2]
    assert found["reason"][3].startswith("targets: alone on the replica")
    assert found["goodput_req_s_gpu"][0] > 0
    assert found["goodput_req_s_gpu"][3] == 0
    numbers = found.select_dtypes("number")
    assert not np.isinf(numbers.to_numpy()).any()
    with pytest.raises(InputError, match="osl missing"):
        goodput_cases(rows.drop(columns="osl"), coefficient_set(), Asked(ttft_ms=300, tpot_ms=30))
    with pytest.raises(InputError, match="attainment: 1 is out of range"):
        Asked(ttft_ms=300, tpot_ms=30, attainment=1.0)


def test_a_trace_gives_the_lengths() -> None:
    rng = np.random.default_rng(0)
    trace = Trace(
        arrival_s=None,
        input_tokens=np.round(rng.lognormal(6.5, 0.5, 500)),
        output_tokens=np.round(rng.lognormal(5.0, 0.5, 500)),
        prefix_tokens=np.zeros(500),
    )
    row = pd.DataFrame([{"model": "Llama-3.1-8B", "gpu": "h100"}])
    long = Trace(
        arrival_s=None, **{k: 4 * getattr(trace, k) for k in ("input_tokens", "output_tokens", "prefix_tokens")}
    )
    short, slow = (
        goodput_cases(row, coefficient_set(), Asked(ttft_ms=300, tpot_ms=30, trace=t)) for t in (trace, long)
    )
    assert short["goodput_req_s"][0] > 2 * slow["goodput_req_s"][0] > 0


def test_speedups_of_tensor_parallelism_and_their_crossover() -> None:
    """K grows with the GPUs and stays below them; more bandwidth-bound collectives move the crossover down."""
    rows = pd.DataFrame(
        [
            {"model": "Llama-3.1-70B", "gpu": gpu, "isl": isl, "osl": "1"}
            for gpu in ("h100", "a100")
            for isl in ("512", "8192")
        ]
    )
    for crossing in crossings(rows, coefficient_set()):
        assert all(1 < k < n for k, n in zip(crossing.speedups, crossing.gpus, strict=True))
        assert list(crossing.speedups) == sorted(crossing.speedups)
        for k, load, n, rate in zip(crossing.speedups, crossing.loads, crossing.gpus, crossing.rates, strict=True):
            assert 0 < load < k
            one = 1 / k + load / (2 * k * (k - load))
            assert one == pytest.approx(1 + load / (2 * n * (n - load)), rel=1e-6)
            assert rate == pytest.approx(load / crossing.service)
