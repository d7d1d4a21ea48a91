"""What ails a calibration: coefficients that the data do not tell, errors by bucket, the worst rows with a cause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dse.calibrate.causes import explain
from dse.calibrate.fit import LEAST_SPREAD, predictions, row_logs
from dse.calibrate.parameters import FREE
from dse.calibrate.run import Calibration
from dse.calibrate.sources import Source
from dse.catalog.coefficients import BOUNDS
from dse.catalog.uncertainty import BASE
from dse.units import PRECISIONS

Array = np.ndarray
AT_BOUND, UNIDENTIFIED, WIDE = "at bound", "unidentified", "wide"
NO_NARROWER = 0.9  # of the prior's standard deviation: a posterior above says what the prior said
FACTOR_TWO = float(np.log(2.0) / 1.645)  # a standard deviation of the log whose 90% interval is a factor of two
LABELS = ("model", "gpu", "engine")
EXACT = ("weights", "kv", "tp", "moe_ep")  # buckets of their own values
BINNED = ("concurrency", "isl", "osl")  # buckets by powers of four
LEAST_SIGMA = 0.02  # of log residuals: below it the model is not the question


@dataclass(frozen=True)
class Diagnosis:
    """Three tables.

    `coefficients`: a line for each fitted number (level, key, coefficient): value (a factor, except at the base),
    prior, standard deviations of the log before and after, `flags`. `buckets`: source, phase, by, bucket, rows, bias
    and mean |error| as shares, `rows_are` held out or in sample. `worst`: serving rows, most standard deviations off
    first, with the cause that explains both times.
    """

    coefficients: pd.DataFrame
    buckets: pd.DataFrame
    worst: pd.DataFrame

    @property
    def flagged(self) -> pd.DataFrame:
        """Coefficients with a flag."""
        return self.coefficients[self.coefficients["flags"] != ""]


def diagnose(calibration: Calibration, worst: int = 20) -> Diagnosis:
    """Health of each coefficient, residuals by bucket, and the `worst` serving rows with their likely cause."""
    return Diagnosis(health(calibration), buckets(calibration), worst_rows(calibration, worst))


def health(calibration: Calibration) -> pd.DataFrame:
    """A line for each fitted number; offsets whose prior is too narrow to be fitted have none."""
    fitted = calibration.fitted
    layout, count = fitted.layout, len(FREE)
    deviation = np.sqrt(np.clip(np.diag(fitted.covariance), 0.0, None)).reshape(-1, count)
    theta, centre, spread = (x.reshape(-1, count) for x in (fitted.theta, layout.centre(), layout.spread()))
    lines = []
    for b, (level, key) in enumerate(layout.blocks):
        for i, f in enumerate(FREE):
            if spread[b, i] <= LEAST_SPREAD:
                continue
            whole = float(np.exp(theta[b, i] + (0.0 if level == BASE else theta[0, i])))
            lines.append(
                {
                    "level": level,
                    "key": key,
                    "coefficient": f.name,
                    "value": float(np.exp(theta[b, i])),
                    "prior": float(np.exp(centre[b, i])),
                    "prior_sd": float(spread[b, i]),
                    "sd": float(deviation[b, i]),
                    "flags": ", ".join(
                        _flags(f.name, whole, float(np.exp(centre[0, i])), float(deviation[b, i]), float(spread[b, i]))
                    ),
                }
            )
    return pd.DataFrame(lines)


def _flags(name: str, value: float, centre: float, deviation: float, prior: float) -> list[str]:
    """`value`, `centre`: of the base times the offset, fitted and before; a default at its limit is no complaint."""
    found = []
    if _at_limit(name, value) and not _at_limit(name, centre):
        found.append(AT_BOUND)
    if deviation > NO_NARROWER * prior:
        found.append(UNIDENTIFIED)
    if deviation > FACTOR_TWO:
        found.append(WIDE)
    return found


def _at_limit(name: str, value: float) -> bool:
    low, high = BOUNDS.get(name, (0.0, np.inf))
    return value <= low * 1.001 or value >= high * 0.999


def residuals(calibration: Calibration) -> list[tuple[Source, Array, bool]]:
    """Log errors (n, k) of each source's rows; True where no fit had seen the row."""
    fitted, held = calibration.fitted, calibration.held.get("series")
    result = []
    for source in calibration.sources:
        if source.name == "serving" and held is not None:
            result.append((source, held.error[:, :2], True))
        else:
            result.append((source, predictions(source, fitted.layout, fitted.theta) - source.measured, False))
    return result


def buckets(calibration: Calibration) -> pd.DataFrame:
    """Bias (the median error) and mean |error| of each source's times, as shares, by what the rows have in common."""
    lines = []
    for source, error, held in residuals(calibration):
        groups = {"all": pd.Series("", index=range(len(source))), **_groups(source)}
        for k, phase in enumerate(source.metrics):
            relative = np.exp(error[:, k]) - 1.0
            for by, bucket in groups.items():
                for name, rows in bucket.groupby(bucket, sort=False).groups.items():
                    some = relative[np.asarray(rows)]
                    some = some[np.isfinite(some)]
                    if len(some):
                        lines.append(
                            {
                                "source": source.name,
                                "phase": phase,
                                "by": by,
                                "bucket": str(name),
                                "rows": len(some),
                                "bias": round(float(np.median(some)), 4),
                                "mean_error": round(float(np.abs(some).mean()), 4),
                                "rows_are": "held out" if held else "in sample",
                            }
                        )
    return pd.DataFrame(lines)


def _groups(source: Source) -> dict[str, pd.Series]:
    """What to group by -> each row's bucket."""
    found = {name: pd.Series(source.labels[name]) for name in LABELS if any(source.labels.get(name, ()))}
    frame = source.frame.reset_index(drop=True)
    for name in (*EXACT, *BINNED):
        if name in frame and frame[name].notna().any():
            found[name] = frame[name].map(_bin if name in BINNED else _exact)
    return found


def _exact(value: Any) -> str:
    text = str(value).strip().lower()
    return text if text in PRECISIONS else text.removesuffix(".0").replace("nan", "")


def _bin(value: Any) -> str:
    """The power-of-four range of a count: `64-255`."""
    number = float(value)
    if not number >= 1.0:
        return ""
    low = 4 ** int(np.floor(np.log(number) / np.log(4.0) + 1e-9))
    return f"{low}-{4 * low - 1}"


_SAID = ("model", "gpu", "engine", "engine_version", "weights", "tp", "moe_ep", "isl", "osl", "concurrency")


def worst_rows(calibration: Calibration, most: int = 20) -> pd.DataFrame:
    """The serving rows that are most standard deviations off in either time, worst first, each with its cause."""
    found = [(s, e) for s, e, _ in residuals(calibration) if s.name == "serving"]
    if not found or most < 1:
        return pd.DataFrame()
    (source, error), fitted = found[0], calibration.fitted
    sigma = np.maximum(fitted.sigma["serving"], LEAST_SIGMA)
    off = np.nanmax(np.abs(np.where(np.isnan(error), 0.0, error)) / np.where(np.isnan(sigma), 1.0, sigma), axis=1)
    rows = [int(i) for i in np.argsort(-off, kind="stable")[:most]]
    logs = row_logs(source, fitted.layout, fitted.theta)
    said = source.frame.iloc[rows][[name for name in _SAID if name in source.frame]].reset_index(drop=True)
    measured, predicted = np.exp(source.measured[rows]) * 1e3, np.exp(source.measured[rows] + error[rows]) * 1e3
    table = said.assign(
        standard_deviations=np.round(off[rows], 1),
        measured_ttft_ms=measured[:, 0],
        ttft_ms=predicted[:, 0],
        measured_tpot_ms=measured[:, 1],
        tpot_ms=predicted[:, 1],
    )
    return pd.concat([table, explain(source, rows, logs, np.where(np.isnan(sigma), 1.0, sigma))], axis=1)


__all__ = ["AT_BOUND", "UNIDENTIFIED", "WIDE", "Diagnosis", "buckets", "diagnose", "health", "residuals", "worst_rows"]
