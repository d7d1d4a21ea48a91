"""`dse estimate`: one row in, one row out; bad rows get a reason; physics before fitting."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dse.catalog.coefficients import CoefficientSet, coefficient_set
from dse.errors import InputError
from dse.space.cases import estimate_cases
from dse.space.columns import STEP_PARTS

SHARED = Path(__file__).parents[2] / "shared"
CONTRACT = ["ttft_ms", "tpot_ms", "output_tok_s_gpu", "tok_s_user", "e2e_ms", "memory_gib", "feasible", "reason"]


PHYSICS = CoefficientSet("physics")


def frame(*rows: dict) -> pd.DataFrame:
    return pd.DataFrame(rows).astype(object)


GOOD = {"model": "meta-llama/Llama-3.1-70B", "gpu": "h100", "isl": 2048, "osl": 512, "tp": 4, "concurrency": 32}


@pytest.fixture(scope="module")
def mixed() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Good and bad rows, of several models and GPUs, in one table."""
    cases = frame(
        {**GOOD, "weights": "fp8", "note": "kept"},
        {**GOOD, "model": "no-such-model"},
        {**GOOD, "model": "deepseek-ai/DeepSeek-V3", "gpu": "NVIDIA H200", "tp": 8, "moe_ep": 8},
        {**GOOD, "isl": "many"},
        {**GOOD, "osl": -1},
        {**GOOD, "tp": 3},
        {**GOOD, "gpu": "h10"},
        {**GOOD, "weights": "fp9"},
        {**GOOD, "overlap": "fulll"},
        {**GOOD, "model": "deepseek-ai/DeepSeek-V3", "tp": 8, "moe_ep": 3, "moe_tp": 2},
        {**GOOD, "tp": 1, "weights": "bf16"},
        {**GOOD, "prefix_hit": 1.5},
        {**GOOD, "isl": np.nan},
        {**GOOD, "weights": "fp8", "note": "again"},
    )
    return cases, estimate_cases(cases, PHYSICS)


def test_rows_keep_their_order_and_their_other_columns(mixed):
    cases, out = mixed
    assert len(out) == len(cases)
    assert list(out["model"]) == list(cases["model"])
    assert out["note"].iloc[0] == "kept"
    assert [c for c in CONTRACT if c not in out] == []


def test_bad_rows_say_why_and_stop_nobody(mixed):
    _, out = mixed
    reasons = out["reason"]
    for row, words in {
        1: ["no-such-model"],
        3: ["isl", "'many'", "not a number"],
        4: ["osl", "-1", "out of range"],
        5: ["tp", "3", "allowed: 1, 2, 4, 8"],
        6: ["h10", "h100"],
        7: ["fp9", "fp8"],
        8: ["fulll", "full"],
        9: ["moe_ep * moe_tp = 6", "= 8"],
        11: ["prefix_hit", "1.5"],
        12: ["isl", "empty"],
    }.items():
        assert np.isnan(out["ttft_ms"].iloc[row]), row
        assert not out["feasible"].iloc[row]
        for word in words:
            assert word in reasons.iloc[row]
    assert out["ttft_ms"].iloc[[0, 2, 10, 13]].notna().all()


def test_a_plan_that_does_not_fit_is_priced_and_refused(mixed):
    _, out = mixed
    assert not out["feasible"].iloc[10]
    assert "memory" in out["reason"].iloc[10]
    assert out["weights_gib"].iloc[10] > out["usable_gib"].iloc[10]


def test_equal_rows_get_equal_numbers_whatever_stands_between(mixed):
    _, out = mixed
    numbers = out.select_dtypes("number").drop(columns=["isl", "osl", "tp", "concurrency"], errors="ignore")
    pd.testing.assert_series_equal(numbers.iloc[0], numbers.iloc[13], check_names=False)
    alone = estimate_cases(frame({**GOOD, "weights": "fp8"}), PHYSICS)
    for name in ("ttft_ms", "tpot_ms", "memory_gib", "usd_per_mtok"):
        np.testing.assert_allclose(alone[name].iloc[0], out[name].iloc[0], rtol=1e-12)


def test_a_row_alone_is_what_it_is_among_others():
    """Coefficients are those of the row's own model, engine and version, whoever comes before it."""
    engine = {"gpu": "h100", "engine": "vllm", "engine_version": "0.12.0", "weights": "bf16"}
    cases = frame(
        {**GOOD, **engine},
        {**GOOD, **engine, "model": "Qwen3-32B"},
        {**GOOD, **engine, "model": "Llama-3.1-8B"},
        {**GOOD, **engine, "engine_version": "0.18.0"},
        {**GOOD, **engine, "engine": "sglang", "engine_version": "0.5.9"},
    )
    together = estimate_cases(cases, coefficient_set())
    alone = pd.concat([estimate_cases(cases.iloc[[i]], coefficient_set()) for i in range(len(cases))])
    for name in ("ttft_ms", "tpot_ms"):
        np.testing.assert_allclose(together[name].astype(float), alone[name].astype(float), rtol=1e-12, err_msg=name)
    assert list(together.coefficients) == list(alone.coefficients)


def test_tokens_sent_many_at_a_time_come_later_and_end_as_before():
    one, many, none = (
        estimate_cases(frame(GOOD | extra), PHYSICS).iloc[0]
        for extra in ({}, {"stream_interval": 20}, {"stream_interval": 1})
    )
    assert many.ttft_ms == pytest.approx(one.ttft_ms + 19 * one.tpot_ms)
    assert many.e2e_ms == pytest.approx(one.e2e_ms)
    assert many.output_tok_s_gpu == pytest.approx(one.output_tok_s_gpu)
    assert none.ttft_ms == one.ttft_ms


def test_throughput_is_what_closed_loop_benchmarks_report(mixed):
    _, out = mixed
    row = out.iloc[0]
    seconds = (row.ttft_ms + 511 * row.tpot_ms) / 1e3
    assert row.output_tok_s_gpu == pytest.approx(32 * 512 / seconds / 4)
    assert row.e2e_ms == pytest.approx(seconds * 1e3)
    shown = [part for part in STEP_PARTS if part != "hidden"]
    total = row[[f"decode_{part}_ms" for part in shown]].sum() - row["decode_hidden_ms"]
    assert row.decode_step_ms == pytest.approx(total)


def test_missing_columns_and_empty_tables():
    with pytest.raises(InputError, match=r"columns? gpu, osl missing"):
        estimate_cases(pd.DataFrame({"model": ["x"], "isl": [1]}), PHYSICS)
    empty = estimate_cases(pd.DataFrame(columns=["model", "gpu", "isl", "osl"]), PHYSICS)
    assert len(empty) == 0
    assert set(CONTRACT) <= set(empty.columns)


def test_measured_columns_are_never_read(mixed):
    cases, out = mixed
    poisoned = estimate_cases(cases.assign(measured_tpot_ms=1e9, latency="x", cycle_us=-3), PHYSICS)
    assert poisoned["tpot_ms"].iloc[0] == out["tpot_ms"].iloc[0]


def test_coefficients_from_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("gemm_bf16: 0.5\nstep_overhead: 0.001\n")
    assert coefficient_set(str(path)).of("hopper", "h100", "vllm").gemm_bf16 == 0.5
    path.write_text("gemm_bf: 0.5\nmemory: nan\n")
    with pytest.raises(InputError, match=r"gemm_bf16.*\n?.*memory"):
        coefficient_set(str(path))
    with pytest.raises(InputError, match="physics"):
        coefficient_set("physic")


@pytest.mark.skipif(not SHARED.exists(), reason="shared measurements are not here")
def test_physics_before_fitting_against_measured_serving():
    """Cited constants, nothing fitted: every row answered, TPOT within 40% in the mean where nothing speculates."""
    measured = pd.read_csv(SHARED / "measured" / "serving_calibration.csv", dtype=str)
    out = estimate_cases(measured, PHYSICS)
    assert out["tpot_ms"].notna().all()
    assert out["ttft_ms"].notna().all()
    plain = (measured["speculation"] == "no").to_numpy()
    error = (out["tpot_ms"] / measured["measured_tpot_ms"].astype(float) - 1).abs()[plain]
    assert error.mean() <= 0.40
