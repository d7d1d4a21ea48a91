"""Single kernels: fit a table, say how well the fit does on rows it never saw, and estimate tables."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from dse.calibrate.kernel_data import Array, KernelData, predict, read_kernels, shapes, subset
from dse.calibrate.kernel_fit import Fitter, Tables, thinned
from dse.catalog.coefficients import CoefficientSet
from dse.catalog.kernel_coefficients import KERNELS, KernelSet, kernel_set
from dse.errors import InputError, unknown
from dse.space.kernel_cases import KernelCases, read_cases
from dse.units import MS

if TYPE_CHECKING:
    import pandas as pd

COLLECTIVES = ("nccl", "custom_allreduce", "wideep_deepep_normal", "wideep_deepep_ll")
OPERATORS = (*KERNELS, *COLLECTIVES)
FOLDS = 3


@dataclass(frozen=True)
class FittedKernel:
    """One operator's tables as they are shipped (thinned), and what they were fitted to."""

    op: str
    tables: Tables
    data: KernelData
    seconds: float
    median: float  # error in sample

    def coefficients(self) -> KernelSet:
        return KernelSet(self.op, {self.op: self.tables})


def estimate_kernels(
    op: str, table: pd.DataFrame, coefficients: KernelSet | CoefficientSet | str | Path | None = None
) -> pd.DataFrame:
    """The table with `predicted_ms` (DeepEP: `predicted_dispatch_us`, `predicted_combine_us`) and, where a row cannot
    be priced, its `reason`. Times are a benchmark's: buffers warm in the cache where they fit."""
    if op in COLLECTIVES:
        from dse.calibrate.collectives import estimate_collectives

        if isinstance(coefficients, KernelSet):
            raise InputError(f"{op}: has no kernel coefficients; give a coefficient set of `dse calibrate`")
        return estimate_collectives(op, table, coefficients)
    if op not in KERNELS:
        raise unknown("operator", op, OPERATORS)
    if isinstance(coefficients, CoefficientSet):
        raise InputError(f"{op}: has coefficients of its own; give a file like catalog/coefficients/kernels.yaml")
    chosen = coefficients if isinstance(coefficients, KernelSet) else kernel_set(coefficients)
    if op not in chosen.tables:
        raise InputError(f"{chosen.name}: has no coefficients of {op} (it has {', '.join(chosen.tables)})")
    cases = read_cases(op, table)
    predicted, reasons = np.full(len(table), np.nan), cases.reasons.copy()
    known = np.isin(cases.precision, list(chosen.tables[op]))
    for row, precision in zip(cases.rows[~known], cases.precision[~known]):
        reasons[row] = f"{chosen.name}: has no coefficients of {op} in {precision}"
    if known.any():
        predicted[cases.rows[known]] = predict(chosen, subset(cases, known)) / MS
    return table.assign(predicted_ms=predicted, reason=reasons)


def fit_kernels(op: str, table: pd.DataFrame, seed: int = 0) -> FittedKernel:
    """Fit an operator's table (as `estimate_kernels` reads it, with `latency` in ms). Reproducible by seed."""
    began = time.perf_counter()
    data = read_kernels(op, table)
    if not len(data):
        first = next(iter(data.refused.values()), "the table is empty")
        raise InputError(f"{op}: no row can serve a fit ({first}); give measured rows of known GPUs")
    tables = thinned(Fitter.of(data, seed).fit([np.ones(len(data), bool)])[0], data.cases)
    error = np.abs(predict(KernelSet(op, {op: tables}), data.cases) / np.exp(data.log_time) - 1.0)
    return FittedKernel(op, tables, data, time.perf_counter() - began, float(np.median(error)))


def kernel_errors(op: str, table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """log(predicted/measured) of each usable row by fits that never saw it: `unseen shapes` (equal shapes are on one
    side, whatever their GPU and precision) and `a GPU left out` (NaN for a precision that one GPU alone has)."""
    import pandas as pd

    data = read_kernels(op, table)
    shape = shapes(data.cases)
    fold = np.random.default_rng(seed).integers(0, FOLDS, shape.max() + 1)[shape]
    gpus = list(dict.fromkeys(data.cases.gpu))
    of_gpus = [data.cases.gpu == gpu for gpu in gpus]
    splits = {"unseen shapes": [fold == k for k in range(FOLDS)], "a GPU left out": of_gpus}
    held = [rows for parts in splits.values() for rows in parts if not rows.all()]
    fits = iter(Fitter.of(data, seed).fit([~rows for rows in held]))
    errors = {name: np.full(len(data), np.nan) for name in splits}
    for name, parts in splits.items():
        for rows in parts:
            if not rows.all():
                errors[name][rows] = _errors(op, next(fits), data, rows)
    return pd.DataFrame({"row": data.cases.rows, "gpu": data.cases.gpu, "precision": data.cases.precision, **errors})


def _errors(op: str, tables: Tables, data: KernelData, rows: Array) -> Array:
    """Log errors of some rows by a fit; NaN in a precision it does not know."""
    known = data.cases.precision[rows]
    result = np.full(int(rows.sum()), np.nan)
    priced = np.isin(known, list(tables))
    if priced.any():
        chosen = np.flatnonzero(rows)[priced]
        part: KernelCases = subset(data.cases, chosen)
        result[priced] = np.log(predict(KernelSet(op, {op: tables}), part)) - data.log_time[chosen]
    return result


def kernel_accuracy(op: str, table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """|predicted/measured - 1| on rows no fit saw: `split, gpu, precision, rows, median, mean, off_2x`.

    The first line of a split is its total. `off_2x`: share off by more than a factor of two either way."""
    import pandas as pd

    errors = kernel_errors(op, table, seed)
    lines = []
    for split in ("unseen shapes", "a GPU left out"):
        known = errors[errors[split].notna()]
        lines.append(_line(split, "all", "all", known[split]))
        cells = known.groupby(["gpu", "precision"])[split]
        lines += [_line(split, str(gpu), str(precision), cell) for (gpu, precision), cell in cells]
    return pd.DataFrame(lines)


def _line(split: str, gpu: str, precision: str, log_errors: pd.Series) -> dict[str, Any]:
    error = np.abs(np.expm1(log_errors))
    far = (np.abs(log_errors) > np.log(2.0)).mean()
    numbers = {"rows": len(error), "median": error.median(), "mean": error.mean(), "off_2x": far}
    return {"split": split, "gpu": gpu, "precision": precision, **numbers}


def kernels_yaml(fits: Iterable[FittedKernel], about: Mapping[str, Any]) -> str:
    """The file that `kernel_set` reads: all operators, with rows, refusals, errors and the day."""
    fits = list(fits)
    operators = {
        fit.op: {
            "rows": len(fit.data),
            "refused": len(fit.data.refused),
            "gpus": sorted(set(map(str, fit.data.cases.gpu))),
            "median_error_in_sample": round(fit.median, 4),
        }
        for fit in fits
    }
    header = {"fitted": date.today().isoformat(), "units": "s, cycles, shares, elements", **about}
    header["operators"] = operators
    whole = {"about": header, "kernels": {fit.op: fit.tables for fit in fits}}
    return str(yaml.safe_dump(whole, sort_keys=False, default_flow_style=None, width=120))


__all__ = [
    "COLLECTIVES",
    "OPERATORS",
    "FittedKernel",
    "estimate_kernels",
    "fit_kernels",
    "kernel_accuracy",
    "kernel_errors",
    "kernels_yaml",
]
