"""ShallowSim against its published table (printed digits) and every golden row (1e-9)."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from dse.published import shallowsim as ss
from dse.published.shallowsim_gpus import FIELDS, GPUS, Gpu, gpu
from dse.published.tables import published

GOLDENS = Path(__file__).parents[2] / "shared" / "goldens"
golden_files = pytest.mark.skipif(not GOLDENS.exists(), reason="golden tables are not beside this checkout")

# The published prefill table: S = 4383, c = .563, tp = 4, dp = 8, ms. Its B300 has 9600 GB/s.
COLUMNS = ("DGX-B300", "DGX-B200", "H200", "H800")
PREFILL = {
    "MLA": ("1.534450", "2.310493", "5.848370", "5.857117"),
    "DenseMLP": ("0.357764", "0.574656", "2.527005", "2.545534"),
    "TP_MLA": ("0.526944", "0.720955", "1.683756", "1.881772"),
    "SharedExpert": ("0.013798", "0.020595", "0.077915", "0.079974"),
    "Combine": ("0.578740", "0.578740", "1.107479", "1.107479"),
    "Overlap1": ("0.037997", "-0.162811", "-0.654192", "-0.854267"),
    "RoutedExpert": ("0.110385", "0.164760", "0.623321", "0.639792"),
    "Dispatch": ("0.182185", "0.182185", "0.314370", "0.314370"),
    "Overlap2": ("0.071799", "0.017425", "-0.308951", "-0.325422"),
}
REPORTED = (
    *("H800", "H20", "H200", "DGX-B200", "DGX-B300", "GB200-NVL72", "GB300-NVL72", "Rubin-NVL144", "RubinU-NVL576"),
    *("Rubin-NVL576", "H20-3E", "MI300X", "MI308X"),
)


def rows(name: str) -> pd.DataFrame:
    return pd.read_csv(GOLDENS / name)


def published_cases() -> pd.DataFrame:
    cases = pd.DataFrame({"gpu": COLUMNS, "seq_len": 4383, "kv_cache_rate": 0.563, "tp": 4, "dp": 8})
    return cases.assign(mem_bw_GBs=[9600.0, np.nan, np.nan, np.nan])


@pytest.mark.parametrize("column", PREFILL)
def test_published_prefill_table_to_the_printed_digits(column: str) -> None:
    computed = published("shallowsim-prefill", published_cases())[column]
    assert tuple(f"{value:.6f}" for value in computed) == PREFILL[column]


@golden_files
@pytest.mark.parametrize(("method", "count"), [("prefill", 37), ("decode", 511)])
@pytest.mark.parametrize("as_text", [False, True])
def test_every_golden_row(method: str, count: int, as_text: bool) -> None:
    golden = rows(f"shallowsim_{method}.csv")
    given = golden.astype(str) if as_text else golden
    table = ss.PrefillTable if method == "prefill" else ss.DecodeTable
    results = [field.name for field in fields(table)]
    computed = published(f"shallowsim-{method}", given)
    assert len(golden) == count
    assert list(computed.columns) == [*golden.columns, "reason"]
    assert (computed["reason"] == "").all()
    np.testing.assert_allclose(
        computed[results].to_numpy(float), golden[results].to_numpy(float), rtol=1e-9, atol=1e-12
    )
    kept = [name for name in golden.columns if name not in results]
    pd.testing.assert_frame_equal(computed[kept], given[kept])


@golden_files
@pytest.mark.parametrize("method", ["prefill", "decode"])
def test_golden_hardware_is_the_catalogued_gpus(method: str) -> None:
    """Every GPU of the goldens is known by name; only the B300s' and GB300s' bandwidth differs, by case."""
    golden = rows(f"shallowsim_{method}.csv")
    for _, row in golden.iterrows():
        known = gpu(row["gpu" if method == "prefill" else "GPU"])
        for field in FIELDS:
            if field in golden and not (field == "mem_bw_GBs" and row[field] == 9600):
                assert getattr(known, field) == row[field]


@golden_files
def test_hardware_by_name_gives_the_golden_row() -> None:
    golden = rows("shallowsim_decode.csv")
    own = golden[golden["mem_bw_GBs"] != 9600]
    by_name = published("shallowsim-decode", own.drop(columns=list(FIELDS)))
    np.testing.assert_allclose(by_name["TPOT"], own["TPOT"], rtol=1e-9)


@pytest.mark.parametrize("name", REPORTED)
def test_gpus_of_the_decode_report(name: str) -> None:
    assert gpu(name) is gpu(name.lower())


def test_the_h20_table_is_chosen_by_name() -> None:
    assert {name for name, entry in GPUS.items() if entry.h20} == {"H20", "H20-3E", "H200"}


def test_efficiency_is_that_of_the_least_power_of_two_strictly_above() -> None:
    def oracle(m: float, table: tuple[tuple[int | None, float], ...]) -> float:
        power = 1
        while power <= int(m):
            power *= 2
        return next(e for bound, e in table if bound is None or power <= bound)

    for table in (ss._EFFICIENCY, ss._EFFICIENCY_H20):
        for m in (0.0, 0.9, 1.0, 3.99, 4.0, 7.9, 8.0, 15.0, 16.0, 100.0, 127.9, 128.0, 255.0, 256.0, 511.9, 512.0, 9e4):
            assert float(ss._step(np.float32(m), table)) == pytest.approx(oracle(m, table))


DECODE = pd.DataFrame(
    {"GPU": ["H200"], "seq_len": [4383], "decode_len": [1210], "BatchSize": [64], "TP": [4], "EP": [16], "model": [""]}
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "meta-llama/Llama-3.1-8B"}, "DeepSeek-V3/R1 only"),
        ({"model": "DeepSeek-R1-Distill-Llama-70B"}, "DeepSeek-V3/R1 only"),
        ({"model": "DeepSeek-V3.2"}, "DeepSeek-V3/R1 only"),
        ({"GPU": "H210"}, "unknown GPU 'H210' (nearest: "),
        ({"GPU": ""}, "gpu: is empty"),
        ({"seq_len": np.nan}, "seq_len: is empty"),
        ({"seq_len": -1}, "seq_len: -1 is out of range"),
        ({"BatchSize": 0}, "BatchSize: 0 is out of range"),
        ({"TP": "four"}, "TP: 'four' is not a number"),
        ({"TP": 1.5}, "TP: 1.5 is out of range (allowed: whole numbers from 1)"),
        ({"EP": np.inf}, "EP: inf is out of range"),
    ],
)
def test_a_case_outside_the_domain_is_refused_alone(change: dict[str, object], reason: str) -> None:
    cases = pd.concat([DECODE] * 3, ignore_index=True).astype(object)
    for name, value in change.items():
        cases.loc[1, name] = value
    computed = published("shallowsim-decode", cases)
    assert reason in computed["reason"][1]
    assert np.isnan(computed["TPOT"][1])
    assert list(computed["reason"][[0, 2]]) == ["", ""]
    assert computed["TPOT"][[0, 2]].notna().all()


def test_names_of_deepseek_are_accepted() -> None:
    names = [
        "deepseek-ai/DeepSeek-V3",
        "DeepSeek-R1-0528",
        "deepseek-v3.1",
        "nvidia/DeepSeek-R1-0528-NVFP4",
        "DeepSeek-R1-FP8",
    ]
    cases = pd.concat([DECODE] * len(names), ignore_index=True).assign(model=names)
    assert (published("shallowsim-decode", cases)["reason"] == "").all()


def test_a_gpu_of_ones_own_by_its_numbers() -> None:
    numbers = {field: getattr(GPUS["H800"], field) for field in FIELDS}
    computed = published("shallowsim-decode", DECODE.assign(GPU="mine", **numbers))
    assert computed["reason"][0] == ""
    assert computed["TPOT"][0] == published("shallowsim-decode", DECODE.assign(GPU="H800"))["TPOT"][0]


def test_all_rows_refused() -> None:
    computed = published("shallowsim-decode", DECODE.assign(TP=-1))
    assert computed["TPOT"].isna().all()
    assert published("shallowsim-decode", DECODE.head(0)).empty


def _decode(batch: np.ndarray, device: Gpu) -> tuple[Gpu, ss.DecodeCase]:
    one = np.ones_like(batch)
    spread = jax.tree.map(lambda v: v * one, device)
    case = ss.DecodeCase(
        seq_len=4383 * one,
        decode_len=1210 * one,
        BatchSize=batch,
        TP=4 * one,
        EP=16 * one,
        fp8_combine=0 * one,
        mbs=2 * one,
        discount_rate=0.85 * one,
    )
    return spread, case


def test_batched_is_looped() -> None:
    batch = np.geomspace(1, 3000, 37)
    with jax.enable_x64(True):
        device, cases = _decode(batch, GPUS["GB200-NVL72"])
        together = ss.decode(device, cases)
        for i in range(len(batch)):
            alone = ss.decode_one(*jax.tree.map(lambda leaf, i=i: leaf[i], (device, cases)))
            for field in fields(alone):
                assert float(getattr(alone, field.name)) == pytest.approx(
                    float(getattr(together, field.name)[i]), rel=1e-12
                )


def test_float32_is_close_to_float64() -> None:
    device, cases = _decode(np.geomspace(1.5, 3000, 200).round() + 0.25, GPUS["H200"])
    single = ss.decode(*jax.tree.map(np.float32, (device, cases)))
    with jax.enable_x64(True):
        double = ss.decode(device, cases)
    np.testing.assert_allclose(single.TPOT, double.TPOT, rtol=2e-5)


@pytest.mark.parametrize("name", sorted(GPUS))
def test_gradients_are_finite_and_right(name: str) -> None:
    with jax.enable_x64(True):
        case = ss.DecodeCase(seq_len=4383.0, decode_len=1210.0, BatchSize=70.0, TP=4.0, EP=16.0)
        prompt = ss.PrefillCase(seq_len=4383.0, kv_cache_rate=0.5, tp=4.0, dp=8.0)
        slope = jax.grad(lambda g, c: ss.decode_one(g, c).TPOT)(GPUS[name], case)
        steep = jax.grad(lambda g, c: ss.prefill_one(g, c).Sum)(GPUS[name], prompt)
        for leaf in jax.tree.leaves((slope, steep)):
            assert np.isfinite(leaf)
        h = 1e-3 * GPUS[name].mem_bw_GBs
        faster, slower = (
            ss.decode_one(Gpu(**{**vars(GPUS[name]), "mem_bw_GBs": GPUS[name].mem_bw_GBs + s * h}), case).TPOT
            for s in (1, -1)
        )
        assert float(slope.mem_bw_GBs) == pytest.approx(float(faster - slower) / (2 * h), rel=1e-4)
