"""Optuna on the same space: ask 50, price them in one evaluation, tell 50.

Each axis is a coordinate in [0, 1) that is read as a rank among the values still legal after the axes before it
(`space.rank`), so every trial is a legal plan and neighbouring coordinates are neighbouring values.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import jax
import numpy as np

from dse.cost.coefficients import Coefficients
from dse.search.grid import Progress, Swept
from dse.search.kernel import Questions, compiled_points, goals, slack, tables
from dse.search.metrics import margins
from dse.search.pareto import RunningFront
from dse.space.compile import CompiledSpace
from dse.space.rank import axis_names, rank_decode
from dse.space.tables import split

BATCH = 50


def sampler_of(name: str, seed: int) -> Any:
    """The Optuna sampler by its name on the command line."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=BATCH)
        return optuna.samplers.RandomSampler(seed=seed)


def sample(
    space: CompiledSpace, c: Coefficients, name: str, trials: int, seed: int, progress: Progress | None = None
) -> Swept:
    """`trials` points chosen by Optuna. Ctrl-C returns what was found so far, marked partial."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize"] * len(space.objectives), sampler=sampler_of(name, seed))
    axes = axis_names(space)
    swept = Swept(
        front=RunningFront(margin=np.array(margins(space.objectives)), best=200),
        passed=np.zeros(1 + len(space.constraints), np.int64),
    )
    asked = Questions.of(space)
    table = jax.device_put(tables(space, c, np.float32))
    bounds, kernel = goals(space, np.float32).bounds, compiled_points(asked)
    allowed = np.array(slack(asked))
    seen: set[int] = set()
    started = time.perf_counter()
    try:
        for done in range(0, trials, BATCH):
            batch = [study.ask() for _ in range(min(BATCH, trials - done))]
            u = np.array([[trial.suggest_float(axis, 0.0, 1.0) for axis in axes] for trial in batch])
            flat = rank_decode(space, np.minimum(u.reshape(len(batch), len(axes)), np.nextafter(1.0, 0.0)))
            rows, points = split(space, np.resize(flat, BATCH))
            _, objectives, excess = kernel(table, rows.astype(np.int32), points.astype(np.int32), bounds)
            values = np.asarray(objectives, np.float64)[: len(batch)]
            over = np.asarray(excess, np.float64)[: len(batch)]
            _tell(study, batch, values, over)
            fresh = np.isin(np.arange(len(flat)), np.unique(flat, return_index=True)[1])
            fresh &= [int(i) not in seen for i in flat]
            seen.update(int(i) for i in flat)
            _absorb(swept, flat, values, over, allowed, fresh)
            if progress is not None:
                progress(done + len(batch), trials)
    except KeyboardInterrupt:
        swept.partial = True
    swept.front.compact()
    swept.evaluated = len(seen)
    swept.seconds = time.perf_counter() - started
    return swept


def _tell(study: Any, batch: list[Any], values: np.ndarray, over: np.ndarray) -> None:
    """Results of a batch; constraints as Optuna wants them, positive where broken."""
    import optuna

    for trial, value, excess in zip(batch, values, over, strict=True):
        if np.isfinite(value).all() and np.isfinite(excess).all():
            for i, amount in enumerate(excess):
                trial.set_constraint(f"c{i}", float(amount))
            study.tell(trial, [float(x) for x in value])
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _absorb(
    swept: Swept, flat: np.ndarray, values: np.ndarray, over: np.ndarray, allowed: np.ndarray, fresh: np.ndarray
) -> None:
    """Take a batch in as a tile of a sweep is."""
    swept.passed = swept.passed + np.logical_and.accumulate(over <= 0.0, axis=1)[fresh].sum(axis=0)
    feasible = (over <= allowed).all(axis=1) & fresh
    swept.front.add(values[feasible], flat[feasible], sure=np.asarray((over[feasible] <= -allowed).all(axis=1)))
    if not swept.passed[-1]:
        violation = np.where(over <= allowed, 0.0, over).sum(axis=1)
        best = int(np.argmin(np.nan_to_num(violation, nan=np.inf)))
        swept.least = min(swept.least, (float(violation[best]), int(flat[best])))
