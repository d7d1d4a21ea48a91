"""Single kernels: formulas against a plain-Python oracle and their limits, coefficients, tables, fits."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle_kernels as oracle
import pandas as pd
import pytest
from typer.testing import CliRunner

from dse.calibrate import kernels as calibrate
from dse.calibrate.kernel_bounds import BOUNDS, SWITCHES
from dse.calibrate.kernel_data import FORMULAS, TOO_FAST, floor, predict, read_kernels, shapes
from dse.calibrate.kernel_fit import Fitter
from dse.calibrate.kernels import estimate_kernels, fit_kernels, kernel_accuracy
from dse.catalog import hardware
from dse.catalog.kernel_coefficients import KERNELS, KernelSet, kernel_set, path_of, read
from dse.cli import app
from dse.errors import InputError
from dse.space.kernel_cases import PRECISIONS, VENDORS, read_cases

ROOT = Path(__file__).parents[1]
MEASURED = ROOT.parent / "shared" / "measured" / "kernels"
needs_tables = pytest.mark.skipif(not MEASURED.is_dir(), reason="the measured kernel tables are not here")
OPS = tuple(KERNELS)
GPUS = [entry.name for entry in hardware.gpus() if entry.vendor in VENDORS]
TARGETS = {op: 0.12 if op == "moe" else 0.07 for op in OPS}  # medians, unseen shapes
TARGET_GPU = 0.20  # a GPU left out


def power_of_two(rng: np.random.Generator, low: int, high: int, n: int) -> np.ndarray:
    return 2 ** rng.integers(low, high + 1, n)


def random_table(op: str, n: int, seed: int, gpus: list[str] | None = None) -> pd.DataFrame:
    """Cases an operator may meet, on any GPU."""
    rng = np.random.default_rng(seed)
    kind = op if op in PRECISIONS else "attention"
    dtype = rng.choice(list(PRECISIONS[kind]), n)
    columns: dict[str, Any] = {"gpu": rng.choice(gpus or GPUS, n)}
    if op == "gemm":
        columns |= {name: power_of_two(rng, 0 if name == "m" else 6, 15, n) + rng.integers(0, 2, n) for name in "mnk"}
        return pd.DataFrame(columns | {"gemm_dtype": dtype})
    if op == "moe":
        experts = power_of_two(rng, 3, 8, n)
        columns |= {
            "num_tokens": power_of_two(rng, 0, 15, n),
            "hidden_size": 1024 * rng.integers(1, 8, n),
            "inter_size": 512 * rng.integers(1, 8, n),
            "topk": power_of_two(rng, 0, 3, n),
            "num_experts": experts,
            "moe_tp_size": power_of_two(rng, 0, 3, n),
            "moe_ep_size": np.minimum(power_of_two(rng, 0, 6, n), experts),
            "distribution": rng.choice(["balanced", "power_law_1.01", "power_law_1.2", "power_law_0.6"], n),
            "kernel_source": rng.choice(["moe_torch_flow", "moe_torch_flow_nongated"], n),
        }
        return pd.DataFrame(columns | {"moe_dtype": dtype})
    kv_heads = power_of_two(rng, 0, 3, n)
    columns |= {
        "batch_size": power_of_two(rng, 0, 9, n),
        "num_heads": kv_heads * power_of_two(rng, 0, 6, n),
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice([64, 128, 192, 256], n),
        "window_size": rng.choice([0, 0, 128, 4096], n),
        "isl": power_of_two(rng, 0, 14, n) if op.startswith("context") else 1,
        "step": power_of_two(rng, 0, 16, n) - 1,
        "kv_cache_dtype": dtype,
        "attn_dtype": rng.choice(["bfloat16", "fp8"], n),
    }
    return pd.DataFrame(columns)


# ------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("warm", [0.0, 1.0])
def test_the_formulas_are_the_oracles(op: str, warm: float) -> None:
    cases = read_cases(op, random_table(op, 600, seed=1))
    assert len(cases) > 500
    coefficients = kernel_set()
    got = predict(coefficients, cases, warm)
    for i, key in enumerate(cases.keys()):
        case = {f.name: float(getattr(cases.case, f.name)[i]) for f in fields(cases.case)}
        device = hardware.to_device(hardware.gpu(cases.gpu[i]))
        want = oracle.FORMULAS[op](asdict(coefficients.of(op, *key)), case, device, warm)
        assert got[i] == pytest.approx(want, rel=1e-9), (key, case)


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_finite_and_those_of_finite_differences(op: str) -> None:
    cases = read_cases(op, random_table(op, 40, seed=2))
    rows = kernel_set().rows(op, cases.keys())
    names = [f.name for f in fields(KERNELS[op])]
    with jax.enable_x64(True):

        def log_time(c: Any, case: Any, device: Any) -> Any:
            return jnp.log(FORMULAS[op](c, case, device, 1.0))

        slopes = jax.jit(jax.vmap(jax.grad(log_time, argnums=(0, 1, 2))))(rows, cases.case, cases.device)
        value = jax.jit(jax.vmap(log_time))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
        for name in names:
            base = np.asarray(getattr(rows, name))
            step = 1e-6 * np.maximum(np.abs(base), 1e-7)
            up, down = (
                value(type(rows)(**{**asdict(rows), name: base + sign * step}), cases.case, cases.device)
                for sign in (1, -1)
            )
            slope = np.asarray(getattr(slopes[0], name)) * np.maximum(np.abs(base), 1e-7)
            np.testing.assert_allclose(slope, (np.asarray(up) - np.asarray(down)) / 2e-6, rtol=2e-3, atol=2e-6)


def one(op: str, gpu: str, **columns: Any) -> Any:
    return read_cases(op, pd.DataFrame({"gpu": [gpu], **{k: [v] for k, v in columns.items()}}))


@pytest.mark.parametrize("gpu", GPUS)
def test_a_huge_gemm_runs_at_its_share_of_the_peak(gpu: str) -> None:
    n = 2**20
    cases = one("gemm", gpu, m=n, n=n, k=n, gemm_dtype="bfloat16")
    device, c = hardware.to_device(hardware.gpu(gpu)), kernel_set().rows("gemm", cases.keys())
    ideal = 2.0 * n**3 / device.peak_bf16
    assert predict(kernel_set(), cases, warm=0.0)[0] == pytest.approx(ideal / c.peak_share[0], rel=0.02)


def test_a_skinny_gemm_runs_at_its_share_of_the_bandwidth() -> None:
    cases = one("gemm", "h100", m=1, n=2**16, k=2**14, gemm_dtype="bfloat16")
    c = kernel_set().of("gemm", *cases.keys()[0])
    expected = c.launch + 2.0 * 2**30 / (3.35e12 * c.memory_share)
    assert predict(kernel_set(), cases, warm=0.0)[0] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("op", ["generation_attention", "generation_mla"])
def test_an_empty_cache_leaves_the_launch(op: str) -> None:
    more = {"num_key_value_heads": 8, "head_dim": 128} if op == "generation_attention" else {}
    cases = one(op, "b200", batch_size=1, num_heads=32, step=0, kv_cache_dtype="bfloat16", **more)
    c = kernel_set().of(op, *cases.keys()[0])
    assert c.launch < predict(kernel_set(), cases)[0] < c.launch + 2e-6


@pytest.mark.parametrize("op", OPS)
def test_warm_caches_never_slow_a_kernel_and_do_not_matter_once_they_overflow(op: str) -> None:
    cases = read_cases(op, random_table(op, 400, seed=3))
    warm, cold = predict(kernel_set(), cases, 1.0), predict(kernel_set(), cases, 0.0)
    assert (warm <= cold * (1 + 1e-12)).all()
    assert op == "moe" or (warm < 0.99 * cold).any()
    big = one("gemm", "h100", m=64, n=2**17, k=2**15, gemm_dtype="bfloat16")
    assert predict(kernel_set(), big, 1.0)[0] == pytest.approx(predict(kernel_set(), big, 0.0)[0], rel=1e-3)


@pytest.mark.parametrize(
    ("op", "column"),
    [
        *(("gemm", name) for name in "mnk"),
        *(("context_attention", name) for name in ("isl", "batch_size")),
        ("context_mla", "isl"),
        ("generation_mla", "step"),
        ("moe", "inter_size"),
    ],
)
def test_more_work_takes_longer(op: str, column: str) -> None:
    table = random_table(op, 300, seed=4)
    more = table.assign(**{column: table[column] * 2 + (column == "step")})
    cases, larger = read_cases(op, table), read_cases(op, more)
    assert (predict(kernel_set(), larger, 0.0) >= predict(kernel_set(), cases, 0.0) * (1 - 1e-9)).all()


def test_no_gpu_is_named_in_the_formulas_or_the_fit() -> None:
    names = {entry.name for entry in hardware.gpus()} - {"rubin"}  # also a generation
    for file in ("cost/kernels.py", "cost/attention_kernels.py", "calibrate/kernel_fit.py", "space/kernel_cases.py"):
        words = set(re.findall(r"[a-z0-9\-]+", (ROOT / "dse" / file).read_text(encoding="utf-8").lower()))
        assert not words & names, file


# --------------------------------------------------------------------------------------------- coefficients


def test_the_shipped_set_prices_every_gpu_and_precision() -> None:
    for op in OPS:
        cases = read_cases(op, random_table(op, 3000, seed=5))
        seconds = predict(kernel_set(), cases)
        assert np.isfinite(seconds).all()
        assert (seconds > 0).all()
        assert set(cases.gpu) == set(GPUS)


def test_shipped_values_are_within_their_bounds() -> None:
    for op, tables in kernel_set().tables.items():
        for levels in tables.values():
            for values in levels.values():
                for name, value in values.items():
                    low, _, high = BOUNDS[op].table.get(name) or (min(SWITCHES[op][name]), 0, max(SWITCHES[op][name]))
                    assert low - 1e-2 * abs(low) <= value <= high * 1.01, (op, name)


def test_who_was_not_measured_has_the_values_of_its_kin() -> None:
    chosen = kernel_set()
    assert path_of("hopper", "h20") == ("base", "hopper_on", "hopper", "h20")
    assert path_of("blackwell-ultra", "b300") == ("base", "hopper_on", "blackwell", "blackwell-ultra", "b300")
    assert path_of("somebody-elses", "own") == ("base", "somebody-elses", "own")
    assert chosen.of("gemm", "bfloat16", "blackwell-ultra", "b300") == chosen.of(
        "gemm", "bfloat16", "blackwell", "b200"
    )
    assert chosen.known("gemm", "bfloat16", "cdna3", "mi300x") == "hopper_on"
    assert chosen.known("gemm", "nvfp4", "hopper", "h100") == "base"


def test_a_gpu_has_a_few_dozen_numbers_of_its_own() -> None:
    count = {}
    for tables in kernel_set().tables.values():
        for levels in tables.values():
            for level, values in levels.items():
                count[level] = count.get(level, 0) + len(values)
    assert max(count.get(gpu, 0) for gpu in GPUS) <= 150, count
    assert {"base", "before_hopper", "hopper_on", "hopper", "blackwell"} <= set(count)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kernels: 3", "holds no `kernels:`"),
        ("kernels: {gem: {}}", "nearest: gemm"),
        ("kernels: {gemm: {bfloat16: {base: {launch: 1.0e-6}}}}", "lacks"),
        ("kernels: {gemm: {bfloat16: {base: {launhc: 1.0}}}}", "launch"),
        ("kernels: {gemm: {bfloat16: {base: {launch: .nan}}}}", "not a number"),
        ("kernels: [", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_one_error(text: str, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        read("own", "own.yaml", text)


# --------------------------------------------------------------------------------------------------- tables


def test_a_bad_row_gets_its_reason_and_stops_nobody() -> None:
    table = pd.DataFrame(
        {
            "note": list("abcdefgh"),
            "gpu": ["h100", "h1000", "tpu-v5e", "NVIDIA H100-SXM-80GB", "h100", "h100", "h100", None],
            "m": ["16", "16", "16", "16", "", "-3", "16", "16"],
            "n": ["4096"] * 8,
            "k": ["4096", "4096", "4096", "4096", "4096", "4096", "40.5", "4096"],
            "gemm_dtype": ["bfloat16"] * 7 + ["fp8"],
            "latency": ["junk"] * 8,
        }
    )
    result = estimate_kernels("gemm", table)
    assert list(result["note"]) == list("abcdefgh")
    assert (result["reason"] == "").tolist() == [True, False, False, True, False, False, False, False]
    assert result["predicted_ms"].notna().tolist() == (result["reason"] == "").tolist()
    assert result["predicted_ms"][0] == result["predicted_ms"][3]
    for row, says in [(1, "unknown gpu 'h1000'"), (2, "tpu-v5e"), (4, "m: "), (5, "-3"), (6, "40.5"), (7, "gpu")]:
        assert says in result["reason"][row]


def test_attention_and_expert_rows_that_make_no_sense() -> None:
    attention = random_table("context_attention", 3, seed=6).assign(
        num_heads=[12, 8, 8], num_key_value_heads=[8, 8, 8], beam_width=[1, 4, 1], kv_cache_dtype=["fp8", "fp8", "fp7"]
    )
    assert [r.split()[0] for r in estimate_kernels("context_attention", attention)["reason"]] == [
        "num_heads",
        "beam_width:",
        "unknown",
    ]
    moe = random_table("moe", 3, seed=6).assign(num_experts=8, topk=[16, 2, 2], moe_ep_size=[1, 16, 1])
    moe["distribution"] = ["balanced", "balanced", "zipf"]
    assert [r.split()[0] for r in estimate_kernels("moe", moe)["reason"]] == ["topk", "moe_ep_size", "distribution:"]


def test_unusable_tables_are_one_error() -> None:
    with pytest.raises(InputError, match="no column k"):
        estimate_kernels("gemm", pd.DataFrame({"gpu": ["h100"], "m": [1], "n": [1], "gemm_dtype": ["fp8"]}))
    with pytest.raises(InputError, match="nearest: gemm"):
        estimate_kernels("gem", pd.DataFrame())
    with pytest.raises(InputError, match="kernel coefficients"):
        estimate_kernels("nccl", pd.DataFrame(), kernel_set())
    empty = estimate_kernels("gemm", random_table("gemm", 3, seed=0).iloc[:0])
    assert len(empty) == 0
    assert {"predicted_ms", "reason"} <= set(empty)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_command_writes_what_the_function_says(tmp_path: Path, suffix: str) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    table = random_table("generation_attention", 20, seed=7)
    cases, out = tmp_path / f"cases.{suffix}", tmp_path / f"out.{suffix}"
    (table.to_csv if suffix == "csv" else table.to_parquet)(cases, index=False)
    result = CliRunner().invoke(app, ["kernels", "generation_attention", str(cases), "-o", str(out)])
    assert result.exit_code == 0, result.output
    written = pd.read_csv(out) if suffix == "csv" else pd.read_parquet(out)
    expected = estimate_kernels("generation_attention", table)["predicted_ms"].to_numpy()
    np.testing.assert_allclose(written["predicted_ms"].to_numpy(), expected, rtol=1e-8)
    assert list(written.columns[: len(table.columns)]) == list(table.columns)


# ----------------------------------------------------------------------------------------------------- fits


def synthetic(op: str, n: int = 1200, seed: int = 8) -> pd.DataFrame:
    """A table whose latencies are the shipped set's."""
    table = random_table(op, n, seed, ["a100", "h100", "h200", "b200"])
    kind = {"gemm": "gemm_dtype", "moe": "moe_dtype"}.get(op, "kv_cache_dtype")
    table[kind] = "bfloat16"
    return table.assign(latency=estimate_kernels(op, table)["predicted_ms"])


def test_what_cannot_serve_a_fit_is_listed() -> None:
    table = synthetic("gemm", 60)
    table.loc[0, "latency"] = np.nan
    table.loc[1, "latency"] = -1.0
    table.loc[2, ["m", "n", "k", "latency"]] = [8192, 8192, 8192, 1e-4]
    table.loc[3, "gpu"] = "h1000"
    table = pd.concat([table, table.iloc[[10]].assign(latency=5.0)], ignore_index=True)
    refused = read_kernels("gemm", table).refused
    assert sorted(refused) == [0, 1, 2, 3, 60]
    assert "data sheet" in refused[2]
    assert "unknown gpu" in refused[3]
    assert "earlier row" in refused[60]


@pytest.mark.parametrize("op", OPS)
def test_no_prediction_is_refused_as_too_fast(op: str) -> None:
    cases = read_cases(op, random_table(op, 800, seed=9))
    assert (TOO_FAST * floor(cases) <= predict(kernel_set(), cases)).all()


@pytest.mark.parametrize("op", ["gemm", "context_mla"])
def test_a_fit_finds_what_made_the_data_and_is_reproducible(op: str) -> None:
    table = synthetic(op)
    fitted = fit_kernels(op, table)
    assert fitted.median < 0.02
    assert fit_kernels(op, table).tables == fitted.tables
    assert estimate_kernels(op, table, fitted.coefficients())["predicted_ms"].notna().all()


def test_a_written_fit_reads_back(tmp_path: Path) -> None:
    fitted = fit_kernels("gemm", synthetic("gemm", 400))
    path = tmp_path / "own.yaml"
    path.write_text(calibrate.kernels_yaml([fitted], {"data": "made up"}))
    assert kernel_set(path).tables == {"gemm": fitted.tables}
    assert kernel_set(path).about["operators"]["gemm"]["rows"] == len(fitted.data)


def test_nothing_held_out_reaches_a_fit() -> None:
    table = synthetic("gemm", 600)
    table = table.drop_duplicates(["gpu", "m", "n", "k"], ignore_index=True)
    seen = np.asarray(table["gpu"] != "b200") & (np.arange(len(table)) % 3 > 0)
    spoilt = table.assign(latency=np.where(seen, table["latency"], table["latency"] * 7.0))
    fits = [Fitter.of(read_kernels("gemm", t)).fit([seen])[0] for t in (table, spoilt)]
    assert fits[0] == fits[1]
    assert "blackwell" not in fits[0]["bfloat16"]


def test_equal_shapes_share_a_fold() -> None:
    table = random_table("gemm", 50, seed=10)
    both = pd.concat([table.assign(gpu="h100"), table.assign(gpu="b200", gemm_dtype="bfloat16")], ignore_index=True)
    both["gemm_dtype"] = "bfloat16"
    shape = shapes(read_cases("gemm", both))
    assert (shape[:50] == shape[50:]).all()
    assert len(set(shape)) == len(table[["m", "n", "k"]].drop_duplicates())


# ------------------------------------------------------------------------------------------------- measured


def measured(op: str) -> pd.DataFrame:
    return pd.read_parquet(MEASURED / f"{op}.parquet")


@needs_tables
@pytest.mark.parametrize("op", OPS)
def test_the_shipped_set_agrees_with_the_tables(op: str) -> None:
    """In sample: that shipped values are those of the fit, not that they generalise (see below)."""
    table = measured(op).sample(2500, random_state=0)
    result = estimate_kernels(op, table.drop(columns="latency"))
    error = np.abs(result["predicted_ms"] / table["latency"] - 1.0)
    assert (result["reason"] == "").all()
    assert error.median() < TARGETS[op]


@needs_tables
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_rows_no_fit_saw(op: str) -> None:
    errors = kernel_accuracy(op, measured(op))
    totals = errors[errors["gpu"] == "all"].set_index("split")["median"]
    assert totals["unseen shapes"] < TARGETS[op]
    assert totals["a GPU left out"] < TARGET_GPU


@needs_tables
def test_rows_no_fit_saw_of_one_operator() -> None:
    """The same, quickly: a part of one table."""
    errors = kernel_accuracy("context_mla", measured("context_mla").sample(3000, random_state=1))
    totals = errors[errors["gpu"] == "all"].set_index("split")["median"]
    assert totals["unseen shapes"] < TARGETS["context_mla"]
    assert totals["a GPU left out"] < TARGET_GPU


def test_a_set_of_one_operator_prices_no_other() -> None:
    own = KernelSet("own", {"gemm": kernel_set().tables["gemm"]})
    with pytest.raises(InputError, match="moe"):
        estimate_kernels("moe", random_table("moe", 2, seed=0), own)
