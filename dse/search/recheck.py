"""Survivors of a float32 sweep, priced again in float64: exact objectives, exact feasibility, all columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pandas as pd

from dse.batches import in_blocks
from dse.cost.coefficients import Coefficients
from dse.search.kernel import Questions, compiled_points, goals, tables
from dse.space.columns import columns, mean_over_mix
from dse.space.compile import CompiledSpace
from dse.space.tables import describe, split

BLOCK = 256  # rows a call: one shape, one compilation
DIGITS = 12  # objectives equal to this many digits are a tie: float64 rounding is not a reason to prefer


@dataclass(frozen=True)
class Rechecked:
    """Exact values of some points: objectives signed to minimise, excess of memory and of each constraint."""

    indices: np.ndarray
    objectives: np.ndarray
    excess: np.ndarray
    rows: pd.DataFrame

    @property
    def feasible(self) -> np.ndarray:
        return np.asarray((self.excess <= 1e-12).all(axis=1))


def recheck(space: CompiledSpace, coefficients: Coefficients, flat: np.ndarray) -> Rechecked:
    """Price points by flat index in float64."""
    if not len(flat):
        empty = np.zeros((0, 0))
        return Rechecked(indices=flat, objectives=empty, excess=empty, rows=pd.DataFrame())
    asked = Questions.of(space)
    rows, points = split(space, flat)
    with jax.enable_x64(True):
        table = jax.device_put(tables(space, coefficients, np.float64))
        bounds = goals(space, np.float64).bounds
        kernel = compiled_points(asked)
        where = rows.astype(np.int32), points.astype(np.int32)
        estimate, objectives, excess = in_blocks(
            lambda row, point: kernel(table, row, point, bounds), *where, block=BLOCK, least=BLOCK
        )
    return Rechecked(
        indices=flat, objectives=rounded(objectives), excess=excess, rows=_frame(space, flat, estimate, points, rows)
    )


def _frame(space: CompiledSpace, flat: np.ndarray, estimate: Any, points: np.ndarray, rows: np.ndarray) -> pd.DataFrame:
    """What was chosen, then what it delivers."""
    chosen = describe(space, flat)
    mixed = mean_over_mix(estimate, np.asarray(space.workloads.weight))
    priced = columns(mixed, space.operating.concurrency[points], space.designs.attention_dp[rows])
    fresh = {name: values for name, values in priced.items() if name not in chosen}
    return pd.concat([chosen, pd.DataFrame(fresh, index=chosen.index)], axis=1)


def rounded(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.abs(values))))
    return np.where((values == 0) | ~np.isfinite(values), values, np.round(values * scale) / scale)
