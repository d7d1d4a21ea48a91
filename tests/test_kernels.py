"""Single kernels: formulas against a plain-Python oracle and their limits, coefficients, tables."""

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
from kernel_tables import GPUS, OPS, random_table
from typer.testing import CliRunner

from dse.calibrate.kernel_bounds import BOUNDS, SWITCHES
from dse.calibrate.kernel_data import FORMULAS, predict
from dse.calibrate.kernels import estimate_kernels
from dse.catalog import hardware
from dse.catalog.kernel_coefficients import KERNELS, KernelSet, kernel_set, path_of, read
from dse.cli import app
from dse.errors import InputError
from dse.space.kernel_cases import read_cases

ROOT = Path(__file__).parents[1]


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
        ("kernels: [", "own.yaml: line 2: not valid YAML"),
        (
            "kernels: 3\nkernels: {}",
            "own.yaml: line 2: not valid YAML: key 'kernels' is written twice (also on",
        ),
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


def test_a_set_of_one_operator_prices_no_other() -> None:
    own = KernelSet("own", {"gemm": kernel_set().tables["gemm"]})
    with pytest.raises(InputError, match="moe"):
        estimate_kernels("moe", random_table("moe", 2, seed=0), own)


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
