"""The fit: robust least squares on log residuals through the whole model, by its own gradients."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import least_squares

from dse.calibrate.observations import Serving
from dse.calibrate.parameters import FREE, Layout, apply
from dse.cost.evaluate import Scenario, estimate_one

Array = np.ndarray
# Residual scales (log): what a good model leaves. TTFT carries engine settings that nobody recorded.
TPOT_SCALE, TTFT_SCALE = 0.08, 0.35
MOST_STEPS = 40


@dataclass(frozen=True)
class Fitted:
    """Fitted parameters, their covariance (Laplace: inverse of J'J, robust weights), and the residual spread."""

    layout: Layout
    theta: Array
    covariance: Array
    tpot_sigma: float
    ttft_sigma: float
    seconds: float
    cost: float


@dataclass(frozen=True)
class Problem:
    """Observations with the compiled model: predictions of every row, and their gradients by the row's coefficients."""

    layout: Layout
    data: Serving
    design: Array  # (n, blocks): parameters.Layout.design
    predict: Callable[[Any], Any]  # logs (n, F) -> (n, 2) log seconds of TTFT, TPOT
    gradient: Callable[[Any], Any]  # logs (n, F) -> (n, 2, F)

    def logs(self, theta: Array) -> Array:
        """Log coefficients of every row."""
        return self.design @ theta.reshape(-1, len(FREE))


def problem(data: Serving, layout: Layout | None = None) -> Problem:
    """Compile the model once. A row has a few dozen coefficients however many levels there are, so its gradient is
    taken by those and spread over the levels afterwards."""
    with jax.enable_x64(True):
        layout = layout or Layout.of([data.labels])
        scenarios = jax.tree.map(jnp.asarray, data.scenarios)

        def one(logs: Any, scenario: Scenario) -> Any:
            result = estimate_one(replace(scenario, coefficients=apply(logs, scenario.coefficients)))
            return jnp.log(jnp.stack([result.ttft, result.tpot]))

        batched = jax.jit(jax.vmap(one))
        # XLA's fusion emitters take minutes over a Jacobian of this size; without them it is ten seconds.
        slopes = jax.jit(jax.vmap(jax.jacfwd(one)), compiler_options={"xla_cpu_use_fusion_emitters": False})
        return Problem(
            layout=layout,
            data=data,
            design=layout.design(layout.codes(data.labels)),
            predict=lambda logs: batched(logs, scenarios),
            gradient=lambda logs: slopes(logs, scenarios),
        )


def fit(p: Problem, weight: Array | None = None, start: Array | None = None) -> Fitted:
    """Fit the rows of weight 1; rows of weight 0 are not seen at all (their residuals and gradients are zero)."""
    began = time.perf_counter()
    n = len(p.data)
    scale = (np.ones(n) if weight is None else np.asarray(weight, float))[:, None] / np.array([TTFT_SCALE, TPOT_SCALE])
    measured = np.stack([p.data.log_ttft, p.data.log_tpot], axis=1)
    centre, spread = p.layout.centre(), p.layout.spread()

    def residuals(theta: Array) -> Array:
        with jax.enable_x64(True):
            error = (np.asarray(p.predict(p.logs(theta))) - measured) * scale
        return np.concatenate([error.ravel(), (theta - centre) / spread])

    def jacobian(theta: Array) -> Array:
        with jax.enable_x64(True):
            slope = np.asarray(p.gradient(p.logs(theta))) * scale[:, :, None]
        rows = np.einsum("nb,nmf->nmbf", p.design, slope).reshape(2 * n, -1)
        return np.concatenate([rows, np.diag(1.0 / spread)])

    solution = least_squares(
        residuals,
        centre if start is None else start,
        jac=jacobian,
        method="trf",
        x_scale=np.maximum(spread, 1e-3),
        loss="soft_l1",
        max_nfev=MOST_STEPS,
        ftol=1e-5,
        xtol=1e-5,
    )
    r, jac = residuals(solution.x), jacobian(solution.x)
    robust = 1.0 / np.sqrt(1.0 + r**2)  # weights of soft_l1
    error = (r[: 2 * n] / np.maximum(scale.ravel(), 1e-12)).reshape(n, 2)[scale[:, 0] > 0]
    return Fitted(
        layout=p.layout,
        theta=solution.x,
        covariance=np.linalg.pinv(jac.T @ (jac * robust[:, None])),
        ttft_sigma=_spread(error[:, 0]),
        tpot_sigma=_spread(error[:, 1]),
        seconds=time.perf_counter() - began,
        cost=float(solution.cost),
    )


def _spread(residuals: Array) -> float:
    """Robust standard deviation: 1.48 times the median absolute residual."""
    return float(1.4826 * np.median(np.abs(residuals))) if len(residuals) else float("nan")


def predictions(p: Problem, theta: Array) -> tuple[Array, Array]:
    """(TTFT, TPOT) in seconds of every row, the unseen ones included."""
    with jax.enable_x64(True):
        both = np.exp(np.asarray(p.predict(p.logs(theta))))
    return both[:, 0], both[:, 1]


def folds(groups: Array, count: int, seed: int = 0) -> Array:
    """A fold number for every row; a group is never split. One fold a group where `count` is 0."""
    names = np.unique(groups)
    if count == 0 or len(names) <= count:
        return np.searchsorted(names, groups)
    order = np.random.default_rng(seed).permutation(len(names)) % count
    return order[np.searchsorted(names, groups)]


def cross_validate(p: Problem, fold: Array) -> tuple[Array, Array, list[Fitted]]:
    """(TTFT, TPOT) predictions of every row by a fit that never saw its fold."""
    ttft, tpot = np.zeros(len(p.data)), np.zeros(len(p.data))
    fits = []
    for k in np.unique(fold):
        held = fold == k
        fitted = fit(p, weight=(~held).astype(float))
        a, b = predictions(p, fitted.theta)
        ttft[held], tpot[held] = a[held], b[held]
        fits.append(fitted)
    return ttft, tpot, fits


__all__ = ["Fitted", "Problem", "cross_validate", "fit", "folds", "predictions", "problem"]
