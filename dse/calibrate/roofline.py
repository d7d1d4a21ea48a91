"""The corrected roofline's betas and alphas fitted by gradients to the same observations as this project's own model.

Every measured time is a row of amounts (roofline_rows.py), times = amounts @ (beta, alpha), fitted as this project's
model is: robust loss on log residuals, bounds, and a ridge toward 1 (beta) in place of priors. Its authors fit by
non-negative least squares with the same ridge; their health checks follow (published_models C).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy.optimize import least_squares
from scipy.stats import norm

from dse.calibrate.fit import folds
from dse.calibrate.observations import SERIES
from dse.calibrate.roofline_rows import COUNT, NAMES, Observed, serving_rows, step_rows
from dse.calibrate.sources import Refusal, series
from dse.programs import derivative, program
from dse.published import corrected_roofline as cr
from dse.units import US

Array = np.ndarray
_PHYSICAL = 5  # the first betas multiply physical times and should be near 1
# Ridge (standard deviations): physical betas about 1; overheads about 0, wide enough for any engine (seconds).
RIDGE = np.array([1.0] * _PHYSICAL + [200 * US, 20e-3, 100e-3, 20e-3, 2e-3])
CENTRE = np.array([1.0] * _PHYSICAL + [0.0] * (COUNT - _PHYSICAL))
MOST = np.array([20.0] * _PHYSICAL + [10e-3, 1.0, 10.0, 1.0, 0.1])
START = np.array([1.0] * _PHYSICAL + [10 * US, 1e-3, 5e-3, 1e-4, 1e-5])
HEALTHY = (0.3, 5.0)  # of the physical betas
FLAGGED = 0.15  # mean error of a bucket of residuals
STOP = 0.10  # validation error below which calibration is done
# The workload that identifies a parameter best (workloads.py).
IDENTIFIED_BY = dict(
    zip(
        NAMES,
        (
            *("W1 prefill sweep", "W2 decode sweep", "W2 at batch 1", "W2 of a MoE model", "W5 TP 1, 2, 4"),
            *(
                "W3 batch at rising rates",
                "W2 at batch 1",
                "W1 at a low rate",
                "latencies of whole requests",
                "W4 mixes",
            ),
        ),
        strict=True,
    )
)


@dataclass(frozen=True)
class Roofline:
    """Fitted parameters (beta, then alpha; the overheads in seconds) with their Laplace covariance."""

    theta: Array
    covariance: Array

    @property
    def beta(self) -> cr.Beta:
        return cr.Beta(**{f.name: float(x) for f, x in zip(fields(cr.Beta), self.theta)})

    @property
    def alpha(self) -> cr.Alpha:
        return cr.Alpha(**{f.name: float(x) for f, x in zip(fields(cr.Alpha), self.theta[len(fields(cr.Beta)) :])})


@dataclass(frozen=True)
class Health:
    """One parameter: its value, its 95% interval, and what is wrong with it ("" where nothing is)."""

    name: str
    value: float
    low: float
    high: float
    complaint: str = ""


# --------------------------------------------------------------------------------------------------- fit


def fit_roofline(data: Observed, seen: Array | None = None) -> Roofline:
    """Fit the rows of `seen` (all by default): min sum soft_l1((log amounts @ theta - log measured)/scale) + ridge.

    Twice: the second time each metric's scale is the spread that the first one left, so that a metric counts by what it
    says and intervals are the data's own.
    """
    rows = np.ones(len(data), bool) if seen is None else np.asarray(seen, bool)
    use = rows[:, None] & np.isfinite(data.measured)
    measured = np.where(use, data.measured, 0.0)
    theta, scale = START, data.scale
    for _ in range(2):
        # What may not be seen has an infinite scale: no residual, no slope, and one compiled shape for every fold.
        theta, information = _solved(theta, data.amounts, measured, np.where(use, scale, np.inf))
        error = np.where(use, np.abs(np.log(predicted(data, theta)) - measured), np.nan)
        scale = 1.4826 * np.nanmedian(error, axis=0).clip(1e-4)
    return Roofline(theta=theta, covariance=np.linalg.pinv(information))


def _solved(start: Array, amounts: Array, measured: Array, scale: Array) -> tuple[Array, Array]:
    """(theta, J'WJ of data and ridge with the weights of the robust loss)."""
    with jax.enable_x64(True):
        inputs = tuple(jnp.asarray(x) for x in (amounts, measured, scale, CENTRE))

    def residuals(theta: Array) -> Array:
        with jax.enable_x64(True):
            return np.asarray(_residuals(theta, *inputs))

    def jacobian(theta: Array) -> Array:
        with jax.enable_x64(True):
            return np.asarray(_jacobian(theta, *inputs))

    inside = np.clip(start, 1e-9 * RIDGE, MOST)
    found = least_squares(
        residuals,
        inside,
        jac=jacobian,
        bounds=(np.zeros(COUNT), MOST),
        x_scale=RIDGE,
        loss="soft_l1",
        ftol=1e-7,
        xtol=1e-7,
        max_nfev=100,
    )
    jac, r = jacobian(found.x), residuals(found.x)
    return found.x, jac.T @ (jac / np.sqrt(1.0 + r**2)[:, None])


def _scaled(theta: Any, amounts: Any, measured: Any, scale: Any, centre: Any) -> Any:
    error = (jnp.log(amounts @ theta) - measured) / scale
    return jnp.concatenate([error.ravel(), (theta - centre) / RIDGE])


_residuals, _jacobian = program(_scaled), program(derivative, _scaled)


def predicted(data: Observed, theta: Array) -> Array:
    """Seconds (n, k)."""
    return np.asarray(data.amounts @ theta)


def held_out(data: Observed, fold: Array) -> Array:
    """Seconds (n, k) of every row by a fit that never saw its fold."""
    result = np.full(data.measured.shape, np.nan)
    for k in np.unique(fold):
        held = fold == k
        result[held] = predicted(data, fit_roofline(data, ~held).theta)[held]
    return result


# ------------------------------------------------------------------------------------------------- health


def health(data: Observed, fitted: Roofline) -> tuple[Health, ...]:
    """The method's own checks of each parameter that the data can show at all."""
    z = norm.ppf(0.975)
    sd = np.sqrt(np.clip(np.diag(fitted.covariance), 0.0, None))
    result = []
    for i, name in enumerate(NAMES):
        value, half = float(fitted.theta[i]), float(z * sd[i])
        complaint = ""
        if not (data.amounts[:, :, i] > 0).any():
            complaint = "not in these data at all"
        elif half > 0.9 * z * RIDGE[i]:
            complaint = "unidentified: these data say no more than the ridge does"
        elif value <= 1e-3 * RIDGE[i]:
            complaint = "at its bound, 0"
        elif i < _PHYSICAL and not HEALTHY[0] <= value <= HEALTHY[1]:
            complaint = f"outside {HEALTHY[0]:g} to {HEALTHY[1]:g}"
        elif half > value:
            complaint = "interval wider than twice its value"
        if complaint:
            complaint += f"; measure more of {IDENTIFIED_BY[name]}"
        result.append(Health(name, value, max(value - half, 0.0), value + half, complaint))
    return tuple(result)


def flagged(data: Observed, seconds: Array, by: Sequence[str], least_rows: int = 5) -> pd.DataFrame:
    """Buckets of rows whose mean error is above FLAGGED, worst first: metric, bucket, rows, error."""
    error = np.abs(np.asarray(seconds) / np.exp(data.measured) - 1.0)
    lines = []
    for column in by:
        if column not in data.frame:
            continue
        for value, index in data.frame.groupby(column).indices.items():
            for k, metric in enumerate(data.metrics):
                mean = float(np.nanmean(error[index, k])) if len(index) >= least_rows else 0.0
                if mean > FLAGGED:
                    lines.append({"metric": metric, "bucket": f"{column} {value}", "rows": len(index), "error": mean})
    table = pd.DataFrame(lines, columns=["metric", "bucket", "rows", "error"])
    return table.sort_values("error", ascending=False, ignore_index=True)


# ----------------------------------------------------------------------------------------------- beside ours


@dataclass(frozen=True)
class Beside:
    """The method against ours on the rows that both can price, held out by the same folds.

    `table`: metric, rows, the two means and medians of |error|. `health` and `flagged` are of the fit to all rows.
    """

    table: pd.DataFrame
    fitted: Roofline
    health: tuple[Health, ...]
    flagged: pd.DataFrame
    refused: tuple[Refusal, ...]

    @property
    def done(self) -> bool:
        """The method's stopping rule: every metric's mean validation error below 10%."""
        return bool((self.table["roofline_mean"] < STOP).all())


def beside(ours: pd.DataFrame, seed: int = 0, count: int = 5) -> Beside:
    """Serving rows with our held-out predictions (`ttft_ms`, `tpot_ms`, as `accuracy` returns of unseen series).

    The folds are drawn over these very rows, by series, so no row's series is seen by the fit that predicts it.
    """
    own = ours[["ttft_ms", "tpot_ms"]].to_numpy(float) * 1e-3
    data = serving_rows(ours.drop(columns=["ttft_ms", "tpot_ms"]).assign(_row=np.arange(len(ours))))
    place = data.frame["_row"].astype(int).to_numpy()
    data = replace(data, frame=data.frame.drop(columns="_row"))
    whole = folds(series(ours, SERIES), count, seed)
    return _compared(data, held_out(data, whole[place]), own[place])


def beside_steps(table: pd.DataFrame, seed: int = 0, count: int = 5) -> Beside:
    """Engine steps in random folds, with ours beside where `predicted_us` has our held-out predictions."""
    own = table.get("predicted_us", pd.Series(np.nan, index=table.index)).to_numpy(float) * US
    data = step_rows(table.drop(columns="predicted_us", errors="ignore").assign(_row=np.arange(len(table))))
    place = data.frame["_row"].to_numpy(int)
    data = replace(data, frame=data.frame.drop(columns="_row"))
    fold = folds(np.arange(len(table)), count, seed)[place]
    return _compared(data, held_out(data, fold), own[place][:, None])


def beside_accuracy(rows: Mapping[str, pd.DataFrame], seed: int = 0) -> tuple[Beside, ...]:
    """The splits of `accuracy` that have folds to share: serving by series, steps at random."""
    found = []
    if "unseen series" in rows:
        found.append(beside(rows["unseen series"], seed))
    if "random folds" in rows:
        found.append(beside_steps(rows["random folds"], seed))
    return tuple(found)


def _compared(data: Observed, theirs: Array, own: Array) -> Beside:
    truth = np.exp(data.measured)
    lines = []
    for k, metric in enumerate(data.metrics):
        line: dict[str, object] = {"metric": metric, "rows": int(np.isfinite(truth[:, k]).sum())}
        for name, values in (("roofline", theirs), ("ours", own)):
            error = np.abs(values[:, k] / truth[:, k] - 1.0)
            empty = not np.isfinite(error).any()
            line[f"{name}_mean"] = np.nan if empty else float(np.nanmean(error))
            line[f"{name}_median"] = np.nan if empty else float(np.nanmedian(error))
        lines.append(line)
    fitted = fit_roofline(data)
    return Beside(
        table=pd.DataFrame(lines),
        fitted=fitted,
        health=health(data, fitted),
        flagged=flagged(data, predicted(data, fitted.theta), ("model", "gpu", "engine", "weights", "workload", "tp")),
        refused=data.refused,
    )


__all__ = [
    "NAMES",
    "Beside",
    "Health",
    "Observed",
    "Roofline",
    "beside",
    "beside_accuracy",
    "beside_steps",
    "fit_roofline",
    "flagged",
    "health",
    "held_out",
    "predicted",
    "serving_rows",
    "step_rows",
]
