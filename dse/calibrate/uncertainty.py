"""How sure a fit is: its covariance in compact form, and what held-out rows show beyond it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from dse.calibrate.fit import Fitted, HeldOut, row_logs
from dse.calibrate.parameters import FREE
from dse.calibrate.sources import Source
from dse.catalog.coefficients import LEVELS
from dse.catalog.uncertainty import BASE, METRICS, Residual, Uncertainty, directions_of

Array = np.ndarray
RANK = 32  # directions that a file keeps
SHARES = (0.5, 0.68, 0.8, 0.9, 0.95, 0.99)
MEDIAN = 0.6745  # of the absolute value of a standard normal variable
SPLITS = ("series", "model", "gpu")


@dataclass(frozen=True)
class Standing:
    """Held-out rows of one split: log errors (n, 3) of TTFT, TPOT, rate, and their variance by the coefficients."""

    error: Array
    variance: Array
    fold: Array


def compact(fitted: Fitted, rank: int = RANK) -> Uncertainty:
    """The fit's covariance along its best-known directions (no residuals yet)."""
    layout = fitted.layout
    spread = layout.spread()
    directions = directions_of(fitted.information, spread, rank).reshape(-1, len(FREE), min(rank, layout.size))
    first = spread[: len(FREE)]
    return Uncertainty(
        spread={
            f.name: {BASE: float(first[i]), **{level: f.spread(level) for level in LEVELS}} for i, f in enumerate(FREE)
        },
        directions={
            block: {f.name: directions[b, i] for i, f in enumerate(FREE) if np.abs(directions[b, i]).max() > 5e-3}
            for b, block in enumerate(layout.blocks)
        },
        residual={},
    )


def three(log_seconds: Array, osl: Array) -> Array:
    """(n, 2) log TTFT and TPOT -> (n, 3) with the log output rate, up to a constant of the row."""
    ttft, tpot = np.exp(log_seconds).T
    return np.column_stack([log_seconds, -np.log(ttft + np.maximum(osl - 1.0, 0.0) * tpot)])


def standing(source: Source, held: HeldOut) -> Standing:
    """Errors of rows that their fit had not seen, beside the variance that the same fit's file would have told."""
    osl = source.frame["osl"].astype(float).to_numpy()
    error = three(held.predicted, osl) - three(source.measured, osl)
    variance = np.zeros_like(error)
    for number, fitted in zip(np.unique(held.fold), held.fits, strict=True):
        rows = np.flatnonzero(held.fold == number)
        variance[rows] = _variance(source, fitted, rows, osl)
    return Standing(error, variance, held.fold)


def _variance(source: Source, fitted: Fitted, rows: Array, osl: Array) -> Array:
    """(rows, 3) variance of the log metrics by the compact covariance of a fit."""
    logs = row_logs(source, fitted.layout, fitted.theta)
    two = source.slopes(logs)[rows]
    seconds = np.exp(source.log_seconds(logs)[rows])
    decode = np.maximum(osl[rows] - 1.0, 0.0) * seconds[:, 1]
    share = (seconds[:, 0] / (seconds[:, 0] + decode))[:, None]
    slopes = np.stack([two[:, 0], two[:, 1], -(share * two[:, 0] + (1.0 - share) * two[:, 1])], axis=1)
    sure = compact(fitted)
    keys = [{level: source.labels[level][i] for level in LEVELS} for i in rows]
    result = np.zeros(slopes.shape[:2])
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(tuple(key.values()), []).append(i)
    for members in groups.values():
        result[members] = sure.variance(slopes[members], keys[members[0]])
    return result


def residuals(splits: Mapping[str, Standing]) -> dict[str, Residual]:
    """Residual spread and quantiles of each metric by rows that no fit had seen.

    `sigma` puts the median of unseen series where a normal variable has it; the quantiles are those of the same rows,
    so heavy tails are in them. What models and GPUs left out need beyond that, at 90%, is `new_model`, `new_gpu`.
    """
    result = {}
    for i, metric in enumerate(METRICS):
        base = splits["series"]
        error, variance = _finite(base, i)
        sigma = _extra(error, variance, 0.5, MEDIAN)
        z = error / np.sqrt(variance + sigma**2)
        quantiles = {share: round(float(np.quantile(z, share)), 3) for share in SHARES}
        more = {}
        for split in ("model", "gpu"):
            more[split] = 0.0
            if split in splits:
                e, v = _finite(splits[split], i)
                more[split] = _extra(e, v + sigma**2, 0.9, quantiles[0.9])
        result[metric] = Residual(
            sigma=round(sigma, 4), new_model=round(more["model"], 4), new_gpu=round(more["gpu"], 4), quantiles=quantiles
        )
    return result


def _finite(s: Standing, metric: int) -> tuple[Array, Array]:
    keep = np.isfinite(s.error[:, metric])
    return np.abs(s.error[keep, metric]), s.variance[keep, metric]


def _extra(error: Array, variance: Array, share: float, at: float) -> float:
    """The deviation that, added to `variance`, puts the `share` quantile of standardised errors at `at` (or 0)."""

    def off(extra: float) -> float:
        return float(np.quantile(error / np.sqrt(variance + extra**2), share) - at)

    if off(1e-6) <= 0.0:
        return 0.0
    return float(brentq(off, 1e-6, 1e3))


def coverage(splits: Mapping[str, Standing], share: float = 0.9) -> dict[str, dict[str, float]]:
    """Share of held-out rows inside their intervals, by split and metric; the residuals never from the row's own fold.

    For a split that leaves out models (GPUs), each one's rows are judged by residuals of the others.
    """
    result: dict[str, dict[str, float]] = {}
    for name, s in splits.items():
        inside = np.full(s.error.shape, np.nan)
        for number in np.unique(s.fold):
            rows = s.fold == number
            known = residuals({k: _without(v, rows) for k, v in splits.items()})
            for i, metric in enumerate(METRICS):
                r = known[metric]
                extra = r.sigma**2 + (name == "model") * r.new_model**2 + (name == "gpu") * r.new_gpu**2
                half = r.factor(share) * np.sqrt(s.variance[rows, i] + extra)
                inside[rows, i] = np.where(np.isfinite(s.error[rows, i]), np.abs(s.error[rows, i]) <= half, np.nan)
        result[name] = {metric: round(float(np.nanmean(inside[:, i])), 4) for i, metric in enumerate(METRICS)}
    return result


def _without(s: Standing, rows: Array) -> Standing:
    return Standing(s.error[~rows], s.variance[~rows], s.fold[~rows])


__all__ = ["RANK", "SHARES", "Standing", "compact", "coverage", "residuals", "standing", "three"]
