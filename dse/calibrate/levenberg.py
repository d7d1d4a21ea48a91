"""Many small bounded robust fits of one smooth formula: Levenberg-Marquardt on log residuals, compiled once.

Parameters live on the whole line and are squeezed into their bounds by a logistic curve, so no step leaves them. Loss:
sum w 2 (sqrt(1 + (r/SCALE)^2) - 1), linear in bad rows, plus stiffness |x - centre|^2 that pulls a fit with few rows,
or a parameter that its rows cannot tell, towards the values of the level above.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray
SCALE = 0.05  # log residual from which a row counts linearly
MOST_STEPS = 120
ENOUGH, OFTEN = 1e-6, 4  # a fit ends when so many steps in a row gain less than this share


@dataclass(frozen=True)
class Bounds:
    """Least, starting and greatest value by parameter; `linear` ones may be zero or negative."""

    table: Mapping[str, tuple[float, float, float]]
    linear: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.table)

    def _ends(self) -> tuple[Array, Array, Array]:
        log = np.array([name not in self.linear for name in self.table])
        low, high = (_logs(np.array([row[i] for row in self.table.values()]), log) for i in (0, 2))
        return low, high, log

    def values(self, x: Any) -> dict[str, Any]:
        """Parameters of the free coordinates x (P, ...)."""
        low, high, log = self._ends()
        inner = [low[i] + (high[i] - low[i]) * jax.nn.sigmoid(x[i]) for i in range(len(low))]
        return {name: jnp.exp(v) if log[i] else v for i, (name, v) in enumerate(zip(self.table, inner))}

    def free(self, values: Mapping[str, float]) -> Array:
        """The coordinates of some values: the inverse, kept a little off the bounds."""
        low, high, log = self._ends()
        v = np.array([values[name] for name in self.table], float)
        share = np.clip((_logs(v, log) - low) / (high - low), 1e-3, 1.0 - 1e-3)
        return np.log(share / (1.0 - share))

    def start(self) -> Array:
        return self.free({name: row[1] for name, row in self.table.items()})


def _logs(values: Array, log: Array) -> Array:
    """Logarithms of those that are on a logarithmic scale."""
    return np.where(log, np.log(np.where(log, values, 1.0)), values)


def solve(
    log_time: Callable[[dict[str, Any], Any], Any],
    bounds: Bounds,
    rows: Any,
    measured: Any,
    weight: Any,
    start: Any,
    centre: Any,
    stiffness: Any,
) -> tuple[Any, Any]:
    """(x, loss) of a formula of one row. To be compiled: equal shapes share a program, so pad rows with weight 0.

    `log_time(values, row)` -> log seconds, `values` scalars by name; `rows` a pytree of arrays (n, ...), `measured` log
    seconds (n,).
    """

    def residuals(x: Any) -> Any:
        values = bounds.values(x)
        return (jax.vmap(lambda row: log_time(values, row))(rows) - measured) / SCALE

    def loss(r: Any, x: Any) -> Any:
        return jnp.sum(weight * 2.0 * (jnp.sqrt(1.0 + r * r) - 1.0)) + stiffness * jnp.sum((x - centre) ** 2)

    def step(state: Any) -> Any:
        x, damping, best, small, count = state
        r, slope = residuals(x), jax.jacfwd(residuals)(x)
        robust = weight / jnp.sqrt(1.0 + r * r)
        curvature = (slope * robust[:, None]).T @ slope + stiffness * jnp.eye(len(x))
        gradient = slope.T @ (robust * r) + stiffness * (x - centre)
        damped = curvature + jnp.diag(damping * jnp.diag(curvature) + 1e-9)
        trial = x - jnp.clip(jnp.linalg.solve(damped, gradient), -2.0, 2.0)
        now = loss(residuals(trial), trial)
        better = jnp.isfinite(now) & (now < best)
        small = jnp.where(better, jnp.where(best - now < ENOUGH * best, small + 1, 0), small)
        damping = jnp.clip(jnp.where(better, damping * 0.3, damping * 4.0), 1e-7, 1e9)
        return jnp.where(better, trial, x), damping, jnp.where(better, now, best), small, count + 1

    def going(state: Any) -> Any:
        _, damping, _, small, count = state
        return (count < MOST_STEPS) & (small < OFTEN) & (damping < 1e8)

    first = (start, jnp.asarray(1e-2), loss(residuals(start), start), 0, 0)
    x, _, best, _, _ = jax.lax.while_loop(going, step, first)
    return x, best


__all__ = ["Bounds", "solve"]
