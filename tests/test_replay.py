"""A trace replayed on plans: rows in and out, shaping of the trace, targets, the page, bad input."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dse.catalog.coefficients import coefficient_set
from dse.errors import InputError
from dse.report.replay import html, name_of, write_replay
from dse.space.replay import COLUMNS, Replay, attained, replay, shape_trace
from dse.space.traces import Trace

PLANS = pd.DataFrame(
    [
        {"model": "Llama-3.1-8B", "gpu": "h100", "note": "<b>kept</b>"},
        {"model": "Llama-3.1-8B", "gpu": "l40s", "engine": "sglang"},
        {"model": "Llama-3.1-8B", "gpu": "h100", "replicas": "2"},
        {"model": "Llama-3.1-70B", "gpu": "h100"},
        {"model": "nobody's", "gpu": "h100"},
    ]
)


def trace(n: int = 200, rate: float = 5.0) -> Trace:
    rng = np.random.default_rng(0)
    return Trace(
        arrival_s=10.0 + np.cumsum(rng.exponential(1 / rate, n)),
        input_tokens=rng.integers(100, 3000, n).astype(float),
        output_tokens=rng.integers(1, 120, n).astype(float),
        prefix_tokens=np.zeros(n),
    )


@cache
def done() -> Replay:
    return replay(trace(), PLANS, coefficient_set("physics"), ttft_ms=200.0, tpot_ms=20.0, workers=1)


def test_one_row_in_is_one_row_out_and_a_bad_row_stops_no_other() -> None:
    frame = done().frame
    assert list(frame["note"].dropna()) == ["<b>kept</b>"]
    assert set(COLUMNS) <= set(frame.columns)
    assert frame["feasible"].tolist() == [True, True, True, False, False]
    assert "no room" in frame["reason"][3]
    assert "nobody's" in frame["reason"][4]
    assert frame["policy"].tolist()[:3] == ["mixed", "prefill", "mixed"]
    assert frame["gpus"].tolist()[:3] == [1.0, 1.0, 2.0]


def test_the_row_says_what_its_requests_felt() -> None:
    result = done()
    for row in (0, 1, 2):
        requests, line = result.requests(row), result.frame.iloc[row]
        assert len(requests) == (100 if row == 2 else 200)
        for name in ("ttft", "tpot", "e2e"):
            values = requests[f"{name}_ms"].dropna()
            assert line[f"{name}_ms"] == pytest.approx(values.mean())
            assert line[f"{name}_p90_ms"] == pytest.approx(np.percentile(values, 90))
        meets = (requests["ttft_ms"] <= 200) & ~(requests["tpot_ms"] > 20)
        assert line["attainment"] == pytest.approx(meets.mean())
        whole = requests["ttft_ms"] + requests["tpot_ms"].fillna(0.0) * (requests["output_tokens"] - 1)
        np.testing.assert_allclose(whole, requests["e2e_ms"], rtol=1e-9)
    assert attained(result.requests(0), (None, None)) is None
    assert result.requests().equals(result.requests(result.best))


def test_half_the_load_is_served_sooner_and_the_best_plan_is_named() -> None:
    frame = done().frame
    assert frame["ttft_p99_ms"][2] < frame["ttft_p99_ms"][0] < frame["ttft_p99_ms"][1]
    assert frame["attainment"][done().best] == frame["attainment"].max()
    assert done().ranking.tolist()[-1] == 1


def test_a_trace_is_cut_shifted_and_stretched() -> None:
    shaped = shape_trace(trace(), rate=20.0, limit=50)
    assert len(shaped) == 50
    assert shaped.arrival_s is not None
    assert shaped.arrival_s[0] == 0.0
    assert shaped.rate == pytest.approx(20.0)
    bare = Trace(None, *(getattr(trace(4000), name) for name in ("input_tokens", "output_tokens", "prefix_tokens")))
    poisson = shape_trace(bare, rate=3.0, seed=1)
    assert poisson.rate == pytest.approx(3.0, rel=0.05)
    assert poisson.cv == pytest.approx(1.0, rel=0.05)
    assert np.array_equal(poisson.arrival_s, shape_trace(bare, rate=3.0, seed=1).arrival_s)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"rate": 0.0}, "rate: 0 is out of range"),
        ({"limit": 0}, "limit: 0 is out of range"),
        ({"policy": "mixt"}, "mixed"),
        ({"seats": 0}, "seats: 0"),
    ],
)
def test_bad_input_is_one_message(how: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        replay(trace(), PLANS, coefficient_set("physics"), **how)  # type: ignore[arg-type]


def test_what_cannot_be_replayed_is_said() -> None:
    bare = Trace(None, *(np.ones(3) for _ in range(3)))
    with pytest.raises(InputError, match="give a rate"):
        replay(bare, PLANS, coefficient_set("physics"))
    at_once = Trace(np.zeros(3), *(np.ones(3) for _ in range(3)))
    with pytest.raises(InputError, match="at once"):
        shape_trace(at_once, rate=2.0)
    with pytest.raises(InputError, match="column gpu missing"):
        replay(trace(), PLANS[["model"]], coefficient_set("physics"))
    with pytest.raises(InputError, match="row 3 was not replayed"):
        done().requests(3)
    nothing = replay(trace(), PLANS.iloc[4:].assign(replicas="x"), coefficient_set("physics"))
    assert nothing.best == -1
    assert "replicas: &#x27;x&#x27; is out of range" in html(nothing)


def test_files_are_written_and_the_page_escapes_what_people_wrote(tmp_path: Path) -> None:
    plans = PLANS.iloc[:1].assign(cluster="<script>alert(1)</script>")
    refused = replay(trace(), plans, coefficient_set("physics"))
    assert "<script>alert" not in html(refused)
    written = write_replay(done(), tmp_path / "out", requests=1)
    assert sorted(path.name for path in written) == ["replay.csv", "replay.html", "requests.csv"]
    table = pd.read_csv(tmp_path / "out" / "replay.csv")
    assert len(table) == len(PLANS)
    requests = pd.read_csv(tmp_path / "out" / "requests.csv")
    np.testing.assert_allclose(requests["ttft_ms"], done().requests(1)["ttft_ms"], rtol=1e-8)
    page = (tmp_path / "out" / "replay.html").read_text()
    for row in done().ranking:
        assert name_of(done(), int(row)) in page
