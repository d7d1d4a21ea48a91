"""How sure a fitted coefficient set is, small enough to live in its file.

Prior of the logs: independent, `spread` by coefficient and level. The data narrow it along a few directions v_i:

    C = P^(1/2) (I - sum_i v_i v_i') P^(1/2),  P = diag(spread^2),  v_i scaled by sqrt(l_i / (1 + l_i)),

l_i the information (in units of the prior's) of the fit along its i-th direction. Directions left out keep the prior's
width, so a truncated file is wider than the fit, never narrower; a level that nobody measured has no entry in any
direction and adds its whole prior spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.linalg import eigh

Array = np.ndarray
BASE = "base"  # the block of the base values; others are (level, key)
METRICS = ("ttft", "tpot", "rate")
Block = tuple[str, str]


@dataclass(frozen=True)
class Residual:
    """What is left of a metric's log error beside the coefficients: from rows that no fit had seen.

    `sigma`: spread on known models and GPUs; `new_model`, `new_gpu`: more of it (added in squares) for others.
    `quantiles`: share of rows -> how many standard deviations hold it (heavier than normal tails).
    """

    sigma: float
    new_model: float
    new_gpu: float
    quantiles: Mapping[float, float]

    def factor(self, share: float) -> float:
        """Standard deviations that hold `share` of rows: between the known shares a straight line, beyond the last."""
        known = sorted(self.quantiles)
        return float(np.interp(share, known, [self.quantiles[k] for k in known]))


@dataclass(frozen=True)
class Uncertainty:
    """Priors and directions of the coefficients' logs, and the residual of each metric.

    `spread`: coefficient -> level ("base", "generation", ...) -> standard deviation. `directions`: block -> coefficient
    -> entries of every direction (r,). `models`: the ones measured, by catalogue name.
    """

    spread: Mapping[str, Mapping[str, float]]
    directions: Mapping[Block, Mapping[str, Array]]
    residual: Mapping[str, Residual]
    models: frozenset[str] = field(default_factory=frozenset)

    @property
    def names(self) -> tuple[str, ...]:
        """Coefficients that were fitted."""
        return tuple(self.spread)

    @property
    def rank(self) -> int:
        return max((len(v) for table in self.directions.values() for v in table.values()), default=0)

    def variance(self, slopes: Array, keys: Mapping[str, str]) -> Array:
        """Variance of log metrics from the coefficients, for cases of the same keys.

        `slopes` (..., names): d log metric / d log coefficient; `keys`: level -> the cases' key ("" or an unknown one
        adds the level's prior spread). Returns (...).
        """
        total = np.zeros(slopes.shape[:-1])
        along = np.zeros((*slopes.shape[:-1], self.rank))
        for level, key in {BASE: "", **keys}.items():
            scaled = slopes * np.array([self.spread[name].get(level, 0.0) for name in self.names])
            total += (scaled**2).sum(axis=-1)
            table = self.directions.get((level, key), {})
            nothing = np.zeros(self.rank)
            along += scaled @ np.stack([table.get(name, nothing) for name in self.names])
        return np.maximum(total - (along**2).sum(axis=-1), 0.0)

    def half_width(self, metric: str, variance: Array, new_model: Array, new_gpu: Array, share: float) -> Array:
        """Half-widths of the interval of a log metric that holds `share` of rows: (n,)."""
        r = self.residual[metric]
        extra = r.sigma**2 + new_model * r.new_model**2 + new_gpu * r.new_gpu**2
        return np.asarray(r.factor(share) * np.sqrt(variance + extra))

    def to_data(self) -> dict[str, Any]:
        """As a coefficient file writes it."""
        directions: dict[str, Any] = {}
        for (level, key), table in self.directions.items():
            lines = {name: _text(values) for name, values in table.items()}
            if level == BASE:
                directions[BASE] = lines
            else:
                directions.setdefault(level, {})[key] = lines
        return {
            "models": sorted(self.models),
            "residual": {
                metric: {
                    "sigma": r.sigma,
                    "new_model": r.new_model,
                    "new_gpu": r.new_gpu,
                    "quantiles": dict(r.quantiles),
                }
                for metric, r in self.residual.items()
            },
            "spread": {name: dict(levels) for name, levels in self.spread.items()},
            "directions": directions,
        }


def directions_of(information: Array, spread: Array, rank: int) -> Array:
    """The `rank` most informed directions of a fit: (parameters, rank), in units of the prior.

    `information`: J'WJ of the data alone, (parameters, parameters); `spread`: the prior's standard deviations.
    """
    told = np.flatnonzero(np.diag(information) > 0)  # of the others the data say nothing: zeros in every direction
    result = np.zeros((len(information), min(rank, len(information))))
    if not len(told) or not rank:
        return result
    scaled = information[np.ix_(told, told)] * spread[told, None] * spread[None, told]
    most = [max(len(told) - rank, 0), len(told) - 1]
    values, vectors = eigh(0.5 * (scaled + scaled.T), subset_by_index=most)
    gain = np.maximum(values[::-1], 0.0)
    result[told, : len(gain)] = vectors[:, ::-1] * np.sqrt(gain / (1.0 + gain))
    return result


def _text(values: Array) -> str:
    return " ".join(f"{x:.3g}" for x in values)


def read_uncertainty(data: Any, names: Sequence[str], problems: list[str]) -> Uncertainty | None:
    """`uncertainty` of a coefficient file; what is wrong with it is added to `problems`."""
    try:
        directions: dict[Block, dict[str, Array]] = {}
        for level, table in data["directions"].items():
            for key, lines in ({"": table} if level == BASE else table).items():
                directions[level, str(key)] = {name: np.array(line.split(), float) for name, line in lines.items()}
        result = Uncertainty(
            spread={n: {level: float(x) for level, x in levels.items()} for n, levels in data["spread"].items()},
            directions=directions,
            residual={metric: _residual(data["residual"][metric]) for metric in METRICS},
            models=frozenset(data["models"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problems.append(f"uncertainty: cannot be read ({type(error).__name__}: {error}); take it from `dse calibrate`")
        return None
    ranks = {len(v) for table in result.directions.values() for v in table.values()}
    if len(ranks) > 1:
        problems.append(f"uncertainty.directions: lines have {sorted(ranks)} numbers; all must have as many")
    strange = (set(result.spread) | {n for t in result.directions.values() for n in t}) - set(names)
    if strange:
        problems.append(f"uncertainty: {', '.join(sorted(strange))}: no such coefficient")
    return result


def _residual(data: Mapping[str, Any]) -> Residual:
    numbers = {name: float(data[name]) for name in ("sigma", "new_model", "new_gpu")}
    quantiles = {float(share): float(value) for share, value in data["quantiles"].items()}
    if not all(math.isfinite(x) and x >= 0 for x in (*numbers.values(), *quantiles.values())):
        raise ValueError("residual has a number that is not finite or below 0")
    return Residual(**numbers, quantiles=quantiles)


__all__ = ["BASE", "METRICS", "Residual", "Uncertainty", "directions_of", "read_uncertainty"]
