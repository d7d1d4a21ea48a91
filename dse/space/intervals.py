"""Intervals of estimates: the delta method through the whole model, on the uncertainty that a coefficient set carries.

var(log y) = s' C s + residual^2 with s = d log y / d log coefficient and C the covariance of the case's coefficients
(catalog.uncertainty); the half-width is a quantile of held-out residuals in units of that deviation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dse.batches import in_blocks
from dse.catalog.coefficients import CoefficientSet
from dse.catalog.uncertainty import METRICS, Uncertainty
from dse.cost.evaluate import Scenario, estimate_one
from dse.errors import InputError
from dse.programs import quick

Array = np.ndarray
COLUMNS = {"ttft": "ttft_ms", "tpot": "tpot_ms", "rate": "output_tok_s_gpu"}
SHARE = 0.9  # of measurements that an interval is to hold
BLOCK = 512  # rows a call: one shape, one compilation


@dataclass(frozen=True)
class Known:
    """What tells how well a case is known: its model, and the key of each level of a coefficient set."""

    model: str
    keys: Mapping[str, str]


def uncertainty_of(chosen: CoefficientSet) -> Uncertainty:
    """The set's uncertainty, or one InputError with the remedy."""
    if chosen.uncertainty is None:
        raise InputError(
            f"--intervals: the coefficient set {chosen.name!r} does not say how sure it is (no `uncertainty`); "
            "use one that `dse calibrate` wrote"
        )
    return chosen.uncertainty


def half_widths(scenarios: Scenario, known: Sequence[Known], chosen: CoefficientSet, share: float = SHARE) -> Array:
    """Half-widths (n, 3) of the logs of TTFT, TPOT and output rate: intervals hold `share` of measurements."""
    u = uncertainty_of(chosen)
    slopes = log_slopes(scenarios, u.names)
    variance = np.zeros(slopes.shape[:2])
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, one in enumerate(known):
        groups.setdefault(tuple(one.keys.values()), []).append(i)
    for rows in groups.values():
        variance[rows] = u.variance(slopes[rows], known[rows[0]].keys)
    new_model = np.array([one.model not in u.models for one in known])
    new_gpu = np.array([("gpu", one.keys["gpu"]) not in u.directions for one in known])
    widths = [u.half_width(m, variance[:, i], new_model, new_gpu, share) for i, m in enumerate(METRICS)]
    return np.stack(widths, axis=1)


def interval_columns(
    values: Mapping[str, Array], scenarios: Scenario, known: Sequence[Known], chosen: CoefficientSet
) -> dict[str, Array]:
    """`ttft_ms_low`, `ttft_ms_high`, ... of estimates whose columns are `values`."""
    half = half_widths(scenarios, known, chosen)
    result = {}
    for i, metric in enumerate(METRICS):
        name = COLUMNS[metric]
        result[f"{name}_low"] = values[name] * np.exp(-half[:, i])
        result[f"{name}_high"] = values[name] * np.exp(half[:, i])
    return result


def log_slopes(scenarios: Scenario, names: tuple[str, ...]) -> Array:
    """d log (TTFT, TPOT, output rate) / d log coefficient of every row: (n, 3, names), float64."""
    if not len(np.asarray(scenarios.load.concurrency)):
        return np.zeros((0, len(METRICS), len(names)))
    with jax.enable_x64(True):
        whole = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), scenarios)
        slopes: Array = in_blocks(_slopes(names), whole, block=BLOCK, least=BLOCK)
    return slopes


@lru_cache(maxsize=4)
def _slopes(names: tuple[str, ...]) -> Any:
    # XLA's fusion emitters take minutes over a Jacobian of this size; compiled quickly it is seconds.
    return quick(_slopes_one, names, in_axes=0)


def _slopes_one(names: tuple[str, ...], scenario: Scenario) -> Any:
    def logs(change: Any) -> Any:
        c = scenario.coefficients
        scaled = {name: getattr(c, name) * jnp.exp(change[i]) for i, name in enumerate(names)}
        e = estimate_one(replace(scenario, coefficients=replace(c, **scaled)))
        return jnp.log(jnp.stack([e.ttft, e.tpot, e.output_rate]))

    return jax.jacfwd(logs)(jnp.zeros(len(names)))


__all__ = ["COLUMNS", "SHARE", "Known", "half_widths", "interval_columns", "log_slopes", "uncertainty_of"]
