"""Measurements in, a coefficient set out; and how well it predicts what it never saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

import numpy as np
import pandas as pd
import yaml

from dse.calibrate.collectives import KINDS, collective_source, read_collectives
from dse.calibrate.fit import Fitted, HeldOut, cross_validate, fit, folds, predictions
from dse.calibrate.kernel_priors import kernel_priors
from dse.calibrate.observations import SERIES, read_serving
from dse.calibrate.parameters import FREE, Layout
from dse.calibrate.read import Tables
from dse.calibrate.sources import Refusal, Source, series
from dse.calibrate.steps import read_steps
from dse.calibrate.uncertainty import Standing, compact, coverage, residuals, standing
from dse.catalog.coefficients import CoefficientSet
from dse.errors import InputError

Array = np.ndarray
WORKERS = 2  # threads that compile beside the fits of kernels, which have two
Priors = Mapping[str, tuple[float, float]]  # coefficient -> (log centre, spread)
# Who is left out: a series (five folds), each model, each GPU; of engine steps random fifths, each experiment.
SPLITS = (("unseen series", SERIES, 5), ("a model left out", ("model",), 0), ("a GPU left out", ("gpu",), 0))
STEP_SPLITS = (("random folds", None, 5), ("an experiment left out", ("experiment_id",), 0))
# For intervals: models in five folds, which is enough to see what an unknown one adds.
STANDING = {"series": (SERIES, 5), "model": (("model",), 5), "gpu": (("gpu",), 0)}


@dataclass(frozen=True)
class Calibration:
    """A fitted set with its sources, for predictions and diagnosis. `held`: split -> held-out serving rows' errors."""

    set: CoefficientSet
    fitted: Fitted
    sources: tuple[Source, ...]
    refused: tuple[Refusal, ...]
    held: dict[str, Standing] = field(default_factory=dict)


def sources_of(tables: Tables | pd.DataFrame, rest: CoefficientSet | None = None) -> tuple[Source, ...]:
    """The sources that a set of tables holds (a plain frame: serving runs), serving first.

    `rest`: the set whose values coefficients that are not fitted keep (physics). Kernel tables that are no collectives
    are not among them: `calibrate.kernels` fits those, and what it knows comes in as priors.
    """
    if isinstance(tables, pd.DataFrame):
        tables = Tables(serving=tables)
    found: list[Source] = []
    if tables.serving is not None:
        found.append(read_serving(tables.serving, rest=rest))
    if tables.steps is not None:
        found.append(read_steps(tables.steps, rest))
    for kind, frame in _collectives(tables).items():
        found.append(collective_source(read_collectives(frame, kind), rest))
    if not found:
        raise InputError(
            "calibrate: no table of serving runs, engine steps or collectives; single kernels alone fit no engine"
        )
    return tuple(found)


def _priors(
    sources: Sequence[Source], tables: Tables | pd.DataFrame, seed: int, given: Priors | None
) -> dict[str, tuple[float, float]]:
    """What tables of single kernels say of shared coefficients, and over it what is given.

    Beside those fits the sources' own programs compile: each prices its rows once, for the program's sake.
    """
    with ThreadPoolExecutor(WORKERS) as beside:
        for s in sources:
            logs = np.zeros((len(s), len(FREE)))
            beside.submit(s.slopes, logs)
            beside.submit(s.log_seconds, logs)
        known = {} if isinstance(tables, pd.DataFrame) else kernel_priors(tables.kernels, seed)
    return {**known, **(given or {})}


def _collectives(tables: Tables) -> dict[str, pd.DataFrame]:
    """Kind of collective table -> its rows."""
    found = {kind: frame for kind, frame in tables.kernels.items() if kind in KINDS}
    if tables.collectives is not None:
        for kind, column in (("dgx", "num_workers"), ("multinode", "n_ranks")):
            if column in tables.collectives:
                rows = tables.collectives[tables.collectives[column].notna()].dropna(axis=1, how="all")
                if len(rows):
                    found[kind] = rows.reset_index(drop=True)
    return found


def calibrate(
    tables: Tables | pd.DataFrame,
    name: str = "fitted",
    source: str = "",
    restarts: int = 0,
    seed: int = 0,
    priors: Priors | None = None,
    intervals: bool = True,
) -> Calibration:
    """Fit all measurements jointly. `intervals`: also fit without each fold, so that the set knows how sure it is.

    The same tables and seed give the same set.
    """
    sources = sources_of(tables)
    layout = Layout.of([s.labels for s in sources], _priors(sources, tables, seed, priors))
    fitted = fit(sources, layout, restarts=restarts, seed=seed)
    about: dict[str, Any] = {
        "date": date.today().isoformat(),
        "data": source,
        "rows": {s.name: len(s) for s in sources},
        "refused": sum(len(s.refused) for s in sources),
        "seconds": round(fitted.seconds, 1),
        "error_in_sample": {
            s.name: {
                metric: errors(predicted, measured)
                for metric, predicted, measured in zip(
                    s.metrics, predictions(s, layout, fitted.theta).T, s.measured.T, strict=True
                )
            }
            for s in sources
        },
    }
    chosen = layout.to_set(fitted.theta, name, about)
    held = held_out(sources, layout, seed) if intervals and sources[0].name == "serving" else {}
    if held:
        about["coverage_of_90"] = coverage(held)
        sure = replace(
            compact(fitted),
            residual=residuals(held),
            models=frozenset(sources[0].labels["model"]),
        )
        chosen = replace(chosen, about=about, uncertainty=sure)
    before = tables.refused if isinstance(tables, Tables) else ()
    return Calibration(chosen, fitted, sources, (*before, *(r for s in sources for r in s.refused)), held)


def held_out(sources: Sequence[Source], layout: Layout, seed: int = 0) -> dict[str, Standing]:
    """Errors of serving rows that no fit had seen, by who was left out; splits of one group only are left out."""
    serving = sources[0]
    found = {}
    for split, (columns, count) in STANDING.items():
        fold = folds(series(serving.frame, columns), count, seed)
        if len(np.unique(fold)) > 1:
            found[split] = standing(serving, cross_validate(sources, layout, 0, fold))
    return found


@dataclass(frozen=True)
class Accuracy:
    """Errors on rows that the fit never saw, by split; `rows` has every held-out prediction."""

    table: pd.DataFrame
    rows: dict[str, pd.DataFrame]
    refused: tuple[Refusal, ...]


def accuracy(tables: Tables | pd.DataFrame, seed: int = 0, priors: Priors | None = None) -> Accuracy:
    """Cross-validate the joint fit: rows of one series (or model, or GPU, or experiment) are never on both sides."""
    sources = sources_of(tables)
    layout = Layout.of([s.labels for s in sources], _priors(sources, tables, seed, priors))
    lines, rows = [], {}
    for which, source in enumerate(sources):
        for split, columns, count in {"serving": SPLITS, "steps": STEP_SPLITS}.get(source.name, ()):
            groups = np.arange(len(source)) if columns is None else series(source.frame, columns)
            if len(np.unique(groups)) < 2:
                continue
            held = cross_validate(sources, layout, which, folds(groups, count, seed))
            lines.append(_line(split, source, held))
            rows[split] = _WRITTEN[source.name](source.frame, np.exp(held.predicted))
    return Accuracy(pd.DataFrame(lines), rows, tuple(r for s in sources for r in s.refused))


def worst(rows: pd.DataFrame, factor: float = 2.0) -> pd.DataFrame:
    """Held-out rows wrong by more than `factor` in TPOT, worst first."""
    off = np.abs(np.log(rows["tpot_ms"] / rows["measured_tpot_ms"].astype(float)))
    return rows[off > np.log(factor)].iloc[np.argsort(-off[off > np.log(factor)])]


def errors(predicted: Array, measured: Array) -> dict[str, float]:
    """Mean and median relative error of log seconds, of the rows that were measured."""
    seen = np.isfinite(measured)
    error = np.abs(np.exp(predicted[seen] - measured[seen]) - 1.0)
    return {"mean": round(float(error.mean()), 4), "median": round(float(np.median(error)), 4)}


def to_yaml(chosen: CoefficientSet, header: Sequence[str] = ()) -> str:
    """A set as a file that `--coefficients` reads."""
    data: dict[str, Any] = {
        "about": dict(chosen.about),
        "base": dict(chosen.base),
        "factors": {
            level: {key: dict(values) for key, values in table.items()} for level, table in chosen.factors.items()
        },
    }
    if chosen.uncertainty is not None:
        data["uncertainty"] = chosen.uncertainty.to_data()
    top = "".join(f"# {line}\n" for line in header)
    return top + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=2000)


def _line(split: str, source: Source, held: HeldOut) -> dict[str, Any]:
    line: dict[str, Any] = {"source": source.name, "split": split, "rows": len(source)}
    order = reversed(range(len(source.metrics)))  # TPOT first
    for i in order:
        for kind, value in errors(held.predicted[:, i], source.measured[:, i]).items():
            line[f"{source.metrics[i]}_{kind}"] = value
    return line


_WRITTEN: dict[str, Callable[[pd.DataFrame, Array], pd.DataFrame]] = {
    "serving": lambda frame, seconds: frame.assign(ttft_ms=seconds[:, 0] * 1e3, tpot_ms=seconds[:, 1] * 1e3),
    "steps": lambda frame, seconds: frame.assign(predicted_us=seconds[:, 0] * 1e6),
}
