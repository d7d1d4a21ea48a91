"""Measurements in, a coefficient set out; and how well it predicts what it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import pandas as pd
import yaml

from dse.calibrate.fit import Fitted, Problem, cross_validate, fit, folds, predictions, problem
from dse.calibrate.observations import Refusal, Serving, read_serving, series
from dse.catalog.coefficients import CoefficientSet

Array = np.ndarray
# Who is left out: a series (five folds), each model, each GPU.
SPLITS = (("unseen series", None, 5), ("a model left out", ("model",), 0), ("a GPU left out", ("gpu",), 0))


@dataclass(frozen=True)
class Calibration:
    """A fitted set with its problem, for predictions and their intervals."""

    set: CoefficientSet
    fitted: Fitted
    problem: Problem
    refused: tuple[Refusal, ...]


def calibrate(table: pd.DataFrame, name: str = "fitted", source: str = "") -> Calibration:
    """Fit serving measurements (columns of `dse estimate` and measured_ttft_ms, measured_tpot_ms)."""
    data = read_serving(table)
    p = problem(data)
    fitted = fit(p)
    ttft, tpot = predictions(p, fitted.theta)
    about = {
        "date": date.today().isoformat(),
        "data": source,
        "rows": len(data),
        "refused": len(data.refused),
        "seconds": round(fitted.seconds, 1),
        "error_in_sample": {
            "tpot": _errors(tpot, data.log_tpot),
            "ttft": _errors(ttft, data.log_ttft),
        },
        "sigma_log": {"tpot": round(fitted.tpot_sigma, 4), "ttft": round(fitted.ttft_sigma, 4)},
    }
    return Calibration(fitted.layout.to_set(fitted.theta, name, about), fitted, p, data.refused)


@dataclass(frozen=True)
class Accuracy:
    """Errors on rows that the fit never saw, by split; `rows` has every held-out prediction."""

    table: pd.DataFrame
    rows: dict[str, pd.DataFrame]
    refused: tuple[Refusal, ...]


def accuracy(table: pd.DataFrame, seed: int = 0) -> Accuracy:
    """Cross-validate: rows of one series (or model, or GPU) are never on both sides."""
    data = read_serving(table)
    p = problem(data)
    lines, rows = [], {}
    for name, columns, count in SPLITS:
        groups = series(data.frame) if columns is None else series(data.frame, columns)
        if len(np.unique(groups)) < 2:
            continue
        ttft, tpot, _ = cross_validate(p, folds(groups, count, seed))
        lines.append(_line(name, ttft, tpot, data))
        rows[name] = _rows(ttft, tpot, data)
    return Accuracy(pd.DataFrame(lines), rows, data.refused)


def worst(rows: pd.DataFrame, factor: float = 2.0) -> pd.DataFrame:
    """Held-out rows wrong by more than `factor` in TPOT, worst first."""
    off = np.abs(np.log(rows["tpot_ms"] / rows["measured_tpot_ms"].astype(float)))
    return rows[off > np.log(factor)].iloc[np.argsort(-off[off > np.log(factor)])]


def interval(c: Calibration, share: float = 0.9) -> tuple[Array, Array]:
    """Half-widths of the log TTFT and TPOT intervals of every row: parameters (Laplace) and residual spread."""
    import jax
    from scipy.stats import norm

    p = c.problem
    with jax.enable_x64(True):
        slope = np.asarray(p.gradient(p.logs(c.fitted.theta)))
    rows = np.einsum("nb,nmf->nmbf", p.design, slope).reshape(len(p.data), 2, -1)
    spread = np.einsum("nmi,ij,nmj->nm", rows, c.fitted.covariance, rows)
    z = norm.ppf(0.5 + share / 2.0)
    sigma = np.array([c.fitted.ttft_sigma, c.fitted.tpot_sigma])
    both = z * np.sqrt(spread + sigma**2)
    return both[:, 0], both[:, 1]


def to_yaml(chosen: CoefficientSet, header: Sequence[str] = ()) -> str:
    """A set as a file that `--coefficients` reads."""
    data: dict[str, Any] = {
        "about": dict(chosen.about),
        "base": dict(chosen.base),
        "factors": {
            level: {key: dict(values) for key, values in table.items()} for level, table in chosen.factors.items()
        },
    }
    top = "".join(f"# {line}\n" for line in header)
    return top + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def _line(name: str, ttft: Array, tpot: Array, data: Serving) -> dict[str, Any]:
    line: dict[str, Any] = {"split": name, "rows": len(data)}
    for metric, predicted, measured in (("tpot", tpot, data.log_tpot), ("ttft", ttft, data.log_ttft)):
        for kind, value in _errors(predicted, measured).items():
            line[f"{metric}_{kind}"] = value
    return line


def _errors(predicted: Array, measured: Array) -> dict[str, float]:
    error = np.abs(predicted / np.exp(measured) - 1.0)
    return {"mean": round(float(error.mean()), 4), "median": round(float(np.median(error)), 4)}


def _rows(ttft: Array, tpot: Array, data: Serving) -> pd.DataFrame:
    return data.frame.assign(ttft_ms=ttft * 1e3, tpot_ms=tpot * 1e3)
