"""Intervals: what a coefficient file says of itself, wider where nobody measured, honest on rows no fit saw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dse.calibrate.fit import fit
from dse.calibrate.observations import read_serving
from dse.calibrate.parameters import FREE, Layout
from dse.calibrate.run import calibrate, to_yaml
from dse.calibrate.sources import Source, series
from dse.calibrate.uncertainty import Standing, compact, coverage, residuals, three
from dse.catalog.coefficients import LEVELS, CoefficientSet, coefficient_set, read
from dse.catalog.uncertainty import Residual, Uncertainty, directions_of
from dse.errors import InputError
from dse.search.run import search
from dse.space.cases import estimate_cases
from dse.space.intervals import log_slopes
from dse.space.load import parse_space

SHARED = Path(__file__).parents[2] / "shared" / "measured"
ENDS = [f"{name}_{end}" for name in ("ttft_ms", "tpot_ms", "output_tok_s_gpu") for end in ("low", "high")]


@pytest.fixture(scope="module")
def sure() -> CoefficientSet:
    """A set that knows vllm on an H100 well, by hand: two directions, a residual with heavy tails."""
    spread = {
        name: dict.fromkeys(("generation", "gpu", "engine"), 0.2)
        | dict.fromkeys(("version", "model", "deployment"), 0.1)
        | {"base": 0.3}
        for name in NAMES
    }
    known = {name: np.array([0.5, 0.0 if name == "memory" else 0.3]) for name in NAMES}
    return CoefficientSet(
        "sure",
        base={"memory": 0.8},
        factors={"gpu": {"h100": {"memory": 1.0}}},
        uncertainty=Uncertainty(
            spread=spread,
            directions={("base", ""): known, ("generation", "hopper"): known, ("gpu", "h100"): known},
            residual={m: Residual(0.05, 0.1, 0.1, {0.5: 0.7, 0.9: 2.0, 0.99: 5.0}) for m in ("ttft", "tpot", "rate")},
            models=frozenset(["Llama-3.1-8B"]),
        ),
    )


NAMES = ("memory", "step_overhead")
CASE = {"model": "Llama-3.1-8B", "gpu": "h100", "isl": 1024, "osl": 256, "concurrency": 8}


def width(sure: CoefficientSet, **changes: object) -> float:
    row = estimate_cases(pd.DataFrame([{**CASE, **changes}]).astype(str), sure, intervals=True).iloc[0]
    assert row["tpot_ms_low"] < row["tpot_ms"] < row["tpot_ms_high"]
    assert row["ttft_ms_low"] < row["ttft_ms"] < row["ttft_ms_high"]
    assert row["output_tok_s_gpu_low"] < row["output_tok_s_gpu"] < row["output_tok_s_gpu_high"]
    return float(np.log(row["tpot_ms_high"] / row["tpot_ms_low"]))


def test_what_nobody_measured_has_wider_intervals(sure):
    known = width(sure)
    assert width(sure, model="Llama-3.1-70B", tp=4) > known
    assert width(sure, gpu="h200") > known
    assert width(sure, gpu="b200") > known


def test_estimates_do_not_change_by_asking_for_intervals(sure):
    cases = pd.DataFrame([CASE, {**CASE, "model": "no-such"}]).astype(str)
    plain, asked = estimate_cases(cases, sure), estimate_cases(cases, sure, intervals=True)
    assert set(asked.columns) - set(plain.columns) == set(ENDS)
    pd.testing.assert_frame_equal(plain, asked[plain.columns])
    assert asked[ENDS].iloc[1].isna().all()


def test_a_set_that_does_not_know_says_so():
    with pytest.raises(InputError, match="how sure"):
        estimate_cases(pd.DataFrame([CASE]).astype(str), CoefficientSet("physics"), intervals=True)


def test_uncertainty_lives_in_the_file(sure):
    again = read("sure", "sure.yaml", to_yaml(sure))
    assert again.uncertainty is not None
    assert again.uncertainty.names == NAMES
    assert width(again) == pytest.approx(width(sure), rel=1e-9)
    broken = to_yaml(sure).replace("sigma: 0.05", "sigma: much")
    with pytest.raises(InputError, match="uncertainty"):
        read("sure", "sure.yaml", broken)


def test_variance_of_a_case_is_the_quadratic_form(sure):
    """s'Cs over the case's blocks, against the dense covariance; an unknown level adds its whole prior."""
    u = sure.uncertainty
    slopes = np.array([[0.4, -0.3], [0.1, 0.9]])
    keys = {"generation": "hopper", "gpu": "h100", "engine": "", "version": "", "model": "", "deployment": ""}
    spread = np.concatenate([[u.spread[n][level] for n in NAMES] for level in ("base", *LEVELS)])
    v = np.zeros((14, 2))
    for block in range(3):
        for i, name in enumerate(NAMES):
            v[2 * block + i] = u.directions["base", ""][name]
    covariance = spread[:, None] * (np.eye(14) - v @ v.T) * spread
    each = np.tile(slopes, 7)
    expected = np.einsum("mi,ij,mj->m", each, covariance, each)
    np.testing.assert_allclose(u.variance(slopes, keys), expected, rtol=1e-12)


def test_directions_of_full_rank_are_the_exact_covariance():
    rng = np.random.default_rng(0)
    jac = rng.normal(size=(40, 6))
    spread = rng.uniform(0.1, 1.0, 6)
    information = jac.T @ jac
    v = directions_of(information, spread, 6)
    exact = np.linalg.inv(information + np.diag(spread**-2))
    np.testing.assert_allclose(spread[:, None] * (np.eye(6) - v @ v.T) * spread, exact, rtol=1e-9)
    for rank in range(6):  # fewer directions are never narrower
        v = directions_of(information, spread, rank)
        wider = spread[:, None] * (np.eye(6) - v @ v.T) * spread - exact
        assert np.linalg.eigvalsh(wider).min() > -1e-12


def test_heavy_tails_are_in_the_quantiles():
    """Student t errors, three degrees of freedom: intervals from some folds hold 90% of another's."""
    rng = np.random.default_rng(0)
    error = 0.1 * rng.standard_t(3, (4000, 3))
    known = Standing(error, np.full_like(error, 1e-4), np.arange(4000) % 5)
    found = coverage({"series": known})["series"]
    assert all(0.87 <= share <= 0.93 for share in found.values())
    r = residuals({"series": known})["tpot"]
    assert r.factor(0.9) * r.sigma > 1.645 * r.sigma  # a normal variable would need 1.645
    assert residuals({"series": known, "model": replace(known, error=3 * error)})["tpot"].new_model > 0.1


def test_slopes_agree_with_finite_differences():
    """Of a case where no two of the model's times are equal."""
    import jax

    from dse.space.cases import parse_cases, scenarios_of

    base = CoefficientSet("x", base={"memory": 0.7, "step_overhead": 1e-3})
    cases = parse_cases(pd.DataFrame([CASE]).astype(str))
    with jax.enable_x64(True):
        slopes = log_slopes(scenarios_of(cases, base), NAMES)[0]
    for i, name in enumerate(NAMES):
        ends = []
        for sign in (1.0, -1.0):
            moved = CoefficientSet("x", base={**base.base, name: base.base[name] * np.exp(sign * 1e-4)})
            row = estimate_cases(pd.DataFrame([CASE]).astype(str), moved).iloc[0]
            ends.append(np.log([float(row[c]) for c in ("ttft_ms", "tpot_ms", "output_tok_s_gpu")]))
        np.testing.assert_allclose(slopes[:, i], (ends[0] - ends[1]) / 2e-4, rtol=1e-3, atol=1e-6)


def test_rows_of_a_search_have_intervals(sure):
    spec = parse_space(
        {
            "name": "small",
            "models": ["Llama-3.1-8B"],
            "clusters": ["h100-dgx"],
            "gpus": [1, 2],
            "workloads": [{"isl": 1024, "osl": 256, "weight": 3}, {"isl": 4096, "osl": 128}],
            "axes": {"tp": "auto", "concurrency": [1, 8, 32]},
            "objectives": {"output_tok_s_gpu": "max", "tpot_ms": "min"},
        }
    )
    plain = search(spec, coefficients=sure)
    asked = search(spec, coefficients=sure, intervals=True)
    pd.testing.assert_frame_equal(asked.front[plain.front.columns], plain.front)
    for frame in (asked.front, asked.candidates):
        for name in ("ttft_ms", "tpot_ms", "output_tok_s_gpu"):
            assert (frame[f"{name}_low"] < frame[name]).all()
            assert (frame[name] < frame[f"{name}_high"]).all()
    with pytest.raises(InputError, match="how sure"):
        search(spec, coefficients=CoefficientSet("physics"), intervals=True)


def test_the_rate_follows_from_ttft_and_tpot():
    logs = np.log([[0.5, 0.01], [2.0, 0.03]])
    rate = three(logs, np.array([101.0, 1.0]))[:, 2]
    np.testing.assert_allclose(np.exp(-rate), [0.5 + 100 * 0.01, 2.0])


@pytest.fixture(scope="module")
def serving() -> Source:
    if not SHARED.exists():
        pytest.skip("shared measurements are not here")
    return read_serving(pd.read_csv(SHARED / "serving_calibration.csv", dtype=str))


@dataclass(frozen=True)
class Shifted(Layout):
    """A layout whose prior has another centre."""

    shift: np.ndarray | float = 0.0

    def centre(self) -> np.ndarray:
        return super().centre() + self.shift


@pytest.mark.slow
def test_laplace_agrees_with_a_bootstrap_over_series(serving):
    """Spread of predicted TPOT by refitting resampled series, against the Laplace covariance in its compact form.

    Each refit's prior is centred on a draw of the prior: else what the data do not tell would have no spread at all.
    """
    layout = Layout.of([serving.labels])
    fitted = fit([serving], layout)
    groups = series(serving.frame, ("model", "gpu", "engine", "weights", "tp", "moe_ep", "isl", "osl"))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(12):
        count = np.bincount(rng.choice(groups.max() + 1, groups.max() + 1), minlength=groups.max() + 1)
        prior = Shifted(keys=layout.keys, priors=layout.priors, shift=rng.normal(0.0, layout.spread()))
        again = fit([serving], prior, [count[groups].astype(float)])
        logs = layout.design(layout.codes(serving.labels)) @ again.theta.reshape(-1, len(FREE))
        drawn.append(serving.log_seconds(logs)[:, 1])
    bootstrap = np.std(drawn, axis=0)
    logs = layout.design(layout.codes(serving.labels)) @ fitted.theta.reshape(-1, len(FREE))
    slopes = serving.slopes(logs)[:, 1:]
    sure = compact(fitted)
    keys = [{level: serving.labels[level][i] for level in LEVELS} for i in range(len(serving))]
    laplace = np.array([np.sqrt(sure.variance(s, k))[0] for s, k in zip(slopes, keys, strict=True)])
    ratio = np.median(bootstrap) / np.median(laplace)
    assert 0.4 < ratio < 2.5, ratio


@pytest.mark.slow
def test_nominal_90_holds_85_to_95_percent_of_held_out_rows(serving):
    """Of unseen series; the residuals that set a row's interval are those of other folds."""
    table = serving.frame
    found = calibrate(table).set.about["coverage_of_90"]
    assert all(0.85 <= found["series"][metric] <= 0.95 for metric in ("ttft", "tpot", "rate"))
    assert all(0.80 <= found["model"][metric] <= 0.97 for metric in ("ttft", "tpot", "rate"))


def test_the_shipped_set_answers_with_intervals():
    best = coefficient_set()
    if best.uncertainty is None:
        pytest.skip("the shipped set carries no uncertainty yet")
    assert width(best) > 0
