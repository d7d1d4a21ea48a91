"""Diagnosis finds what was planted; the next runs are the most informative ones; their files can be run."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from dse import cli
from dse.calibrate.causes import NONE
from dse.calibrate.diagnose import AT_BOUND, UNIDENTIFIED, WIDE, Diagnosis, diagnose, health
from dse.calibrate.experiment_files import MOST_IN_FLIGHT, SCRIPT, files_of, profiles
from dse.calibrate.experiments import (
    Candidates,
    belief_of,
    gains_of,
    kernel_of,
    narrowed,
    next_experiments,
    observed,
    prior,
    read_candidates,
    select,
)
from dse.calibrate.parameters import FREE
from dse.calibrate.run import Calibration, calibrate
from dse.catalog.coefficients import LEVELS, CoefficientSet, coefficient_set
from dse.catalog.uncertainty import BASE, Uncertainty
from dse.errors import InputError
from dse.space.cases import estimate_cases

PHYSICS = CoefficientSet("physics")
TRUE = CoefficientSet("true", base={"memory": 0.75, "step_overhead": 0.001, "arrival_overhead": 0.02})
PLANTED = {  # row -> what it really was, and the words for it
    29: ({"tp": 2}, "tp is twice as large"),  # long contexts, whose KV tp divides and fp8 weights do not
    17: ({"weights": "fp8"}, "weights are fp8"),
    30: ({"speculation": "1"}, "speculation: 1 drafted token a step"),
}


def grid(tps: tuple[int, ...] = (1, 2), model: str = "Llama-3.1-8B") -> pd.DataFrame:
    rows = [
        {"model": model, "gpu": "h100", "engine": "vllm", "weights": "bf16", "tp": tp, "isl": isl, "osl": osl}
        | {"concurrency": c}
        for tp in tps
        for isl in (512, 4096)
        for osl in (128, 1024)
        for c in (1, 4, 16, 64)
    ]
    return pd.DataFrame(rows)


def measured(rows: pd.DataFrame, noise: float = 0.02) -> pd.DataFrame:
    """What the true machine shows."""
    told = estimate_cases(rows, TRUE)
    factor = np.exp(np.random.default_rng(0).normal(0, noise, (len(rows), 2)))
    return rows.assign(
        measured_ttft_ms=told["ttft_ms"].astype(float) * factor[:, 0],
        measured_tpot_ms=told["tpot_ms"].astype(float) * factor[:, 1],
    )


@pytest.fixture(scope="module")
def one_gpu() -> Calibration:
    """A fit to runs that say one GPU each, three of which are not what their rows say."""
    rows = pd.concat([grid((1,)), grid((1,)).assign(isl=lambda x: x["isl"] * 2)], ignore_index=True)
    rows = rows.assign(speculation="no").astype(object)
    really = rows.copy()
    for i, (changed, _) in PLANTED.items():
        for name, value in changed.items():
            really.loc[i, name] = value
    told = measured(really)
    found = calibrate(rows.assign(**told[["measured_ttft_ms", "measured_tpot_ms"]]), intervals=False)
    assert not found.refused
    return found


@pytest.fixture(scope="module")
def runs() -> Candidates:
    return read_candidates(grid(), PHYSICS)


# ------------------------------------------------------------------------------------------------ diagnosis


@pytest.mark.slow
def test_what_the_data_cannot_tell_is_flagged(one_gpu):
    found = diagnose(one_gpu, worst=0).coefficients
    flags = found[found["level"] == BASE].set_index("coefficient")["flags"]
    unseen = [name for name in flags.index if name.startswith(("collective_", "hop_", "dispatch_", "expert_"))]
    assert len(unseen) > 10
    assert all(UNIDENTIFIED in flags[name] for name in unseen)
    own = found[found["level"] == "deployment"].set_index("coefficient")["flags"]
    assert UNIDENTIFIED not in own["arrival_overhead"]  # one deployment's, and no more than that
    assert (found["sd"] <= found["prior_sd"] * (1 + 1e-9)).all()
    wide = found["flags"].str.contains(WIDE)
    np.testing.assert_array_equal(wide, found["sd"] > np.log(2) / 1.645)


@pytest.mark.slow
def test_a_coefficient_at_its_bound_is_flagged(one_gpu):
    """One that was pushed there, not one whose default is its limit (reserved_output)."""
    theta = one_gpu.fitted.theta.copy()
    theta[[f.name for f in FREE].index("memory")] = np.log(1.05)
    found = health(replace(one_gpu, fitted=replace(one_gpu.fitted, theta=theta)))
    at_bound = found[found["flags"].str.contains(AT_BOUND) & (found["level"] == BASE)]
    assert set(at_bound["coefficient"]) == {"memory"}
    assert not health(one_gpu)["flags"].str.contains(AT_BOUND).any()


@pytest.mark.slow
def test_buckets_hold_every_row_once_and_say_the_error(one_gpu):
    found = diagnose(one_gpu, worst=0).buckets
    rows = len(one_gpu.sources[0])
    counts = found.groupby(["phase", "by"])["rows"].sum()
    assert (counts == rows).all()
    assert {"all", "model", "gpu", "engine", "weights", "concurrency", "isl", "osl"} <= set(found["by"])
    assert set(found[found["by"] == "concurrency"]["bucket"]) == {"1-3", "4-15", "16-63", "64-255"}
    whole = found[(found["by"] == "all") & (found["phase"] == "tpot")].iloc[0]
    assert whole["mean_error"] == one_gpu.set.about["error_in_sample"]["serving"]["tpot"]["mean"]
    assert set(found["rows_are"]) == {"in sample"}


@pytest.mark.slow
def test_planted_causes_are_named(one_gpu):
    """TP doubled, fp8 for bf16, a drafted token: the worst rows, each named, with both times explained."""
    found = diagnose(one_gpu, worst=len(PLANTED) + 3).worst
    frame = one_gpu.sources[0].frame
    for i, (_, words) in PLANTED.items():
        load = frame.loc[i, ["isl", "osl", "concurrency"]]
        row = found[(found[["isl", "osl", "concurrency"]] == load).all(axis=1)]
        assert len(row) == 1, f"row {i} is not among the worst"
        assert row["cause"].iloc[0] == words
        for time in ("ttft", "tpot"):
            assert row[f"cause_{time}_ms"].iloc[0] == pytest.approx(row[f"measured_{time}_ms"].iloc[0], rel=0.15)


@pytest.mark.slow
def test_honest_rows_get_no_cause(one_gpu):
    found = diagnose(one_gpu, worst=len(PLANTED) + 3).worst
    assert (found["cause"].iloc[-3:] == NONE).all()


# ------------------------------------------------------------------------------------------------ selection


def dense(runs: Candidates, belief: Uncertainty, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Jacobian (2n, parameters) and prior precision, parameter by parameter."""
    blocks = sorted({(BASE, ""), *((level, key) for k in runs.keys for level, key in k.items() if key)})
    jacobian = np.zeros((len(runs), 2, len(blocks), len(FREE)))
    for i, keys in enumerate(runs.keys):
        for b, (level, key) in enumerate(blocks):
            if level == BASE or keys[level] == key:
                jacobian[i, :, b] = runs.slopes[i] / scale[:, None]
    spread = np.array([[belief.spread[f.name][level] for f in FREE] for level, _ in blocks])
    return jacobian.reshape(2 * len(runs), -1), np.diag(spread.ravel() ** -2.0)


def test_gains_are_those_of_the_whole_log_determinant(runs):
    """Rank-two updates in data space equal log det of the dense information before and after each choice."""
    kernel, scale = kernel_of(runs, prior())
    found = select(kernel, runs.minutes, 1e9, scale, most=6)
    jacobian, precision = dense(runs, prior(), scale)
    for k in range(1, 7):
        rows = [r for i in found.order[:k] for r in (2 * i, 2 * i + 1)]
        whole = precision + jacobian[rows].T @ jacobian[rows]
        gain = 0.5 * (np.linalg.slogdet(whole)[1] - np.linalg.slogdet(precision)[1])
        assert found.gain[:k].sum() == pytest.approx(gain, rel=1e-8)
        left = np.einsum("ip,pq,iq->i", jacobian, np.linalg.inv(whole), jacobian).reshape(-1, 2).mean(axis=0)
        np.testing.assert_allclose(found.deviation[k], scale * np.sqrt(left), rtol=1e-6)


def test_each_choice_is_the_best_there_is(runs):
    kernel, scale = kernel_of(runs, prior())
    equal = np.ones(len(runs))
    found = select(kernel, equal, 3.0, scale)
    assert len(found.order) == 3
    left, taken = kernel, []
    for i, gain in zip(found.order, found.gain, strict=True):
        others = [k for k in range(len(runs)) if k not in taken]
        assert gain == pytest.approx(gains_of(left)[others].max())
        left = observed(left, i)
        taken.append(i)
    assert (np.diff(found.gain) <= 1e-12).all()  # information has diminishing returns


def test_aiming_at_predictions_narrows_them_most(runs):
    """Each run's promise is what observing it does; of the targets named, more than D-optimality does."""
    kernel, scale = kernel_of(runs, prior())
    targets = np.array([29, 31])
    rows = np.stack([2 * targets, 2 * targets + 1], axis=1).ravel()

    def deviation(k: np.ndarray) -> float:
        return float((np.sqrt(np.diag(k)[rows]) * np.tile(scale, 2)).mean())

    promised = narrowed(kernel, scale, targets)
    found = [deviation(kernel) - deviation(observed(kernel, i)) for i in range(len(runs))]
    np.testing.assert_allclose(promised, found, rtol=1e-9, atol=1e-12)
    left = {}
    for name, aim in (("aimed", targets), ("d-optimal", None)):
        left[name] = kernel
        for i in select(kernel, np.ones(len(runs)), 4.0, scale, targets=aim).order:
            left[name] = observed(left[name], i)
    assert deviation(left["aimed"]) < deviation(left["d-optimal"])


@pytest.mark.slow
def test_greedy_beats_random_sets_of_the_same_cost(runs):
    kernel, scale = kernel_of(runs, prior())
    budget = float(np.sort(runs.minutes)[::-1][:6].sum())
    found = select(kernel, runs.minutes, budget, scale)
    assert runs.minutes[list(found.order)].sum() <= budget
    assert len(set(found.order)) == len(found.order)
    rng = np.random.default_rng(0)
    told = []
    for _ in range(100):
        order = rng.permutation(len(runs))
        order = order[np.cumsum(runs.minutes[order]) <= budget]
        rows = np.stack([2 * order, 2 * order + 1], axis=1).ravel()
        told.append(0.5 * np.linalg.slogdet(np.eye(len(rows)) + kernel[np.ix_(rows, rows)])[1])
    assert found.gain.sum() > max(told)


def test_the_kernel_holds_the_variance_that_intervals_use(runs):
    """On the shipped set's own uncertainty, directions included."""
    belief = belief_of(coefficient_set())
    runs = replace(runs, keys=tuple({**keys, "version": "vllm 0.10"} for keys in runs.keys))
    kernel, scale = kernel_of(runs, belief)
    place = [[f.name for f in FREE].index(name) for name in belief.names if name in {f.name for f in FREE}]
    assert len(place) == len(belief.names)
    absent = [i for i in range(len(FREE)) if i not in place]
    expected = np.stack([belief.variance(runs.slopes[i][:, place], keys) for i, keys in enumerate(runs.keys)])
    for i in absent:  # not in the file: its cited prior
        own = sum(FREE[i].spread(level) ** 2 for level in (BASE, *LEVELS))
        expected += runs.slopes[:, :, i] ** 2 * own
    np.testing.assert_allclose(np.diag(kernel).reshape(-1, 2) * scale**2, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_fit_knows_what_it_measured(one_gpu):
    """Runs like those of the fit tell less than runs on several GPUs, which it never saw."""
    table = next_experiments(grid(), 1e9, one_gpu, most=4).table
    assert (table["tp"].astype(int) == 2).sum() >= 3
    again = next_experiments(grid(), 1e9, PHYSICS, most=4).table
    assert again["gain_nats"].sum() > table["gain_nats"].sum()


def test_an_answer_of_one_token_shows_no_tpot():
    some = read_candidates(grid((1,)).head(2).assign(osl=[1, 128]), PHYSICS)
    assert not some.slopes[0, 1].any()
    assert some.slopes[0, 0].any()
    assert some.slopes[1, 1].any()


def test_costs_are_gpu_minutes():
    rows = grid((2,)).head(3).assign(requests=["", "100", ""], seconds=["", "", "90"])
    told = estimate_cases(rows, PHYSICS)
    found = read_candidates(rows, PHYSICS).minutes
    e2e = told["e2e_ms"].astype(float).to_numpy() * 1e-3 / rows["concurrency"].to_numpy(float)
    np.testing.assert_allclose(found, [10 * e2e[0] * 2 / 60, 100 * e2e[1] * 2 / 60, 90 * 2 / 60], rtol=1e-9)


def test_bad_candidates_have_a_reason_and_stop_no_other():
    rows = grid((1,)).head(4).astype(object)
    rows.loc[1, "tp"], rows.loc[2, "model"] = 3, "Llama-3.1-405B"
    found = next_experiments(rows, 100.0, PHYSICS)
    assert set(found.refused["row"]) == {2, 3}
    assert "tp: 3 does not divide" in found.refused["reason"].iloc[0]
    assert "memory" in found.refused["reason"].iloc[1]


@pytest.mark.parametrize(
    ("rows", "budget", "words"),
    [
        (grid((1,)).assign(tp=3), 10.0, "no candidate can be priced"),
        (grid((1,)), 1e-6, "pay for no candidate"),
        (grid((1,)).assign(requests=-1), 10.0, "must be positive"),
    ],
)
def test_what_cannot_be_is_one_message(rows, budget, words):
    with pytest.raises(InputError, match=words):
        next_experiments(rows, budget, PHYSICS)


# ---------------------------------------------------------------------------------------------------- files


def test_profiles_are_the_published_ones():
    table = profiles("Llama-3.1-8B", "h100", tps=(1, 2), known=PHYSICS)
    assert set(table["profile"]) == {"W1", "W2", "W3", "W4", "V1"}
    steady = table[table["rate"].notna()]
    told = estimate_cases(steady, PHYSICS)
    rate = steady["concurrency"].astype(float) / (told["e2e_ms"].astype(float) * 1e-3).to_numpy()
    busy = steady["concurrency"] >= 16
    np.testing.assert_allclose(rate[busy], steady["rate"][busy], rtol=0.15)  # of Little's law, by interpolation
    assert (table[table["rate"].isna()]["concurrency"] == MOST_IN_FLIGHT).all()


def test_files_parse_and_say_the_runs():
    table = pd.concat([profiles("Llama-3.1-8B", "h100", tps=(1,), known=PHYSICS).head(8), grid((2,))])
    found = next_experiments(table, 200.0, PHYSICS)
    files = files_of(found)
    assert len(files) == len(found.table) + 1
    kinds = set()
    for name, row in zip(list(files)[:-1], found.table.to_dict("records"), strict=True):
        data = yaml.safe_load(files[name])
        kinds.add(data["load"]["type"])
        assert data["data"]["input_distribution"]["mean"] == row["isl"]
        assert data["data"]["output_distribution"]["mean"] == row["osl"]
        assert data["server"]["model_name"] == "meta-llama/Llama-3.1-8B"
        if data["load"]["type"] == "concurrent":
            assert data["load"]["stages"][0]["concurrency_level"] == row["concurrency"]
    assert kinds == {"concurrent", "constant"}
    lines = [shlex.split(line) for line in files[SCRIPT].splitlines() if line.startswith("vllm bench serve")]
    assert len(lines) == len(found.table)
    for words in lines:
        assert words[words.index("--result-filename") + 1].removesuffix(".json") + ".yaml" in files
        assert "gpu=h100" in words[words.index("--metadata") :]


def run_cli(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dse", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_commands(monkeypatch, tmp_path: Path, capsys):
    rows = tmp_path / "runs.csv"
    grid((1,)).to_csv(rows, index=False)
    out = tmp_path / "next"
    words = ["experiments", str(rows), "--budget", "5", "--coefficients", "physics", "--out", str(out)]
    assert run_cli(monkeypatch, *words) == 0
    plan = pd.read_csv(out / "plan.csv")
    assert plan["gpu_minutes"].sum() <= 5.01
    assert len(list(out.glob("*.yaml"))) == len(plan)
    seen = tmp_path / "measured.csv"
    measured(grid((1,))).to_csv(seen, index=False)
    assert run_cli(monkeypatch, "diagnose", str(seen), "--no-held-out", "--worst", "2", "-o", str(tmp_path / "d")) == 0
    assert "unidentified" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "d").iterdir()} == {"coefficients.csv", "buckets.csv", "worst.csv"}
    assert run_cli(monkeypatch, "experiments", "--budget", "5", "--out", str(out)) == 2
    assert "--model and --gpu" in capsys.readouterr().err


def test_diagnosis_is_public():
    import dse

    assert dse.diagnose_calibration is diagnose
    assert dse.Diagnosis is Diagnosis
    assert dse.next_experiments is next_experiments


# ------------------------------------------------------------------------------------------------------ study


@pytest.mark.slow
def test_asking_reaches_a_sweeps_error_with_half_its_runs():
    """Machines drawn from the prior, enough of them that their median is known to a tenth; the same pool at random is
    the control."""
    from dse.calibrate.study import race, setting

    where = setting()
    races = [race(where, seed) for seed in range(21)]
    assert all(r.swept < r.before for r in races)
    assert np.median([r.ratio for r in races]) <= 0.5
    assert np.mean([r.needed["asked"] for r in races]) < np.mean([r.needed["random"] for r in races])
