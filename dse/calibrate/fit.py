"""The fit: robust least squares on the log residuals of all sources through the whole model, by its own gradients."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import OptimizeResult, minimize

from dse.calibrate.parameters import FREE, Layout
from dse.calibrate.sources import Source

Array = np.ndarray
MOST_STEPS = 60
LEAST_SPREAD = 2e-3  # of a prior below which a parameter is not fitted: it would move by less than 0.2%
LEAST_TOLD = 1e-6  # information in units of the prior's, below which the data say nothing of a parameter
WORKERS = 2  # fits side by side: models release the interpreter, factorisations do not, so more gain nothing
START_SPREAD = 0.3  # of a random start, in prior standard deviations


@dataclass(frozen=True)
class Fitted:
    """Fitted parameters, what the data say of them (J'WJ with robust weights), and the residual spread.

    `sigma`: source -> robust standard deviation of each metric's log residuals (k,).
    """

    layout: Layout
    theta: Array
    information: Array
    sigma: dict[str, Array]
    seconds: float
    cost: float

    @property
    def covariance(self) -> Array:
        """Laplace: the inverse of the data's and the prior's information."""
        return np.asarray(np.linalg.inv(self.information + np.diag(self.layout.spread() ** -2.0)))


@dataclass(frozen=True)
class _Problem:
    """The sources' residuals, stacked, the prior's last."""

    sources: tuple[Source, ...]
    layout: Layout
    designs: tuple[Array, ...]  # (n, blocks) of each source
    alike: tuple[tuple[tuple[Array, tuple[int, ...]], ...], ...]  # of each source: rows of the same blocks, the blocks
    seen: tuple[Array, ...]  # (n, k) of each source: measured, and of a row that the fit may see
    weights: tuple[Array, ...]  # (n, k) of each source: of the residual's loss
    centre: Array
    spread: Array

    def logs(self, i: int, theta: Array) -> Array:
        """Log coefficients of every row of source i."""
        return np.asarray(self.designs[i] @ theta.reshape(-1, len(FREE)))

    def errors(self, i: int, theta: Array) -> Array:
        """Scaled log residuals (n, k) of source i; 0 where nothing may be seen."""
        s = self.sources[i]
        predicted = s.log_seconds(self.logs(i, theta))
        return np.where(self.seen[i], predicted - np.where(self.seen[i], s.measured, 0.0), 0.0) / s.scale

    def objective(self, x: Array) -> tuple[float, Array]:
        """Loss and its gradient at `x`, parameters in prior standard deviations from the prior's centre."""
        theta = self.centre + self.spread * x
        value = float(np.sum(_soft_l1(x)))
        slope = x / np.sqrt(1.0 + x**2)
        for i in range(len(self.sources)):
            error, weight = self.errors(i, theta), self.weights[i]
            value += float(np.sum(weight * _soft_l1(error)))
            slope += self.spread * self._back(i, self._slopes(i, theta), weight * error / np.sqrt(1.0 + error**2))
        return value, slope

    def curvature(self, x: Array, some: Array) -> Array:
        """Gauss-Newton Hessian of the loss by `some` parameters: J' W J, the prior's with it."""
        spread = self.spread[some]
        information = self.information(self.centre + self.spread * x, some) * spread[:, None] * spread[None, :]
        information[np.diag_indices(len(some))] += 1.0 / np.sqrt(1.0 + x[some] ** 2)
        return information

    def information(self, theta: Array, some: Array | None = None) -> Array:
        """J' W J of the data alone, by the parameters numbered `some` (ascending; None: all).

        Rows of the same levels share their blocks: their coefficients' part (F, F) is summed once and added wherever
        two of the blocks meet.
        """
        blocks = self.layout.size // len(FREE)
        asked = np.ones((blocks, len(FREE)), bool)
        if some is not None:
            asked = np.isin(np.arange(self.layout.size), some).reshape(asked.shape)
        met: dict[tuple[int, int], Array] = {}
        for i, alike in enumerate(self.alike):
            slopes, weight = self._slopes(i, theta), self.weights[i] / np.sqrt(1.0 + self.errors(i, theta) ** 2)
            for rows, own in alike:
                part = np.einsum("nkf,nk,nkg->fg", slopes[rows], weight[rows], slopes[rows], optimize=True)
                for pair in product(own, own):
                    met[pair] = met[pair] + part if pair in met else part
        end = np.concatenate([[0], np.cumsum(asked.sum(axis=1))])
        total = np.zeros((end[-1], end[-1]))
        for (a, b), part in met.items():
            total[end[a] : end[a + 1], end[b] : end[b + 1]] = part[np.ix_(asked[a], asked[b])]
        return total

    def _slopes(self, i: int, theta: Array) -> Array:
        """d scaled residual / d log coefficient (n, k, F) of source i; 0 where nothing may be seen."""
        s = self.sources[i]
        slopes = s.slopes(self.logs(i, theta)) / s.scale[:, None]
        return np.where(self.seen[i][:, :, None], slopes, 0.0)

    def _back(self, i: int, slopes: Array, residual: Array) -> Array:
        """Gradient by the parameters: each row's, spread over the blocks that it has."""
        each = np.einsum("nkf,nk->nf", slopes, np.where(self.seen[i], residual, 0.0))
        return np.asarray((self.designs[i].T @ each).ravel())

    def solve(self, start: Array) -> tuple[Array, float]:
        """From a start in prior standard deviations: (parameters, loss).

        A trust region on the Gauss-Newton Hessian, parameters by parameters: with a few hundred of them and thousands
        of residuals the singular values of the whole Jacobian (`least_squares`) cost a hundred times as much.
        """
        free = self._free()

        def whole(part: Array) -> Array:
            x = np.zeros(self.layout.size)
            x[free] = part
            return x

        def objective(part: Array) -> tuple[float, Array]:
            value, slope = self.objective(whole(part))
            return value, slope[free]

        found = minimize(
            objective,
            start[free],
            jac=True,
            hess=lambda part: self.curvature(whole(part), free),
            method="trust-exact",
            callback=_Settled(),
            options={"initial_trust_radius": 3.0, "max_trust_radius": 30.0, "gtol": 0.03, "maxiter": MOST_STEPS},
        )
        return self.centre + self.spread * whole(found.x), float(found.fun)

    def _free(self) -> Array:
        """Numbers of the parameters worth fitting: with a prior that leaves them room, and data that tell of them."""
        room = np.flatnonzero(self.spread > LEAST_SPREAD)
        told = np.diag(self.information(self.centre, room)) * self.spread[room] ** 2
        return room[told > LEAST_TOLD]

    def sigma(self, theta: Array) -> dict[str, Array]:
        """Robust standard deviation (1.48 times the median absolute residual) of each metric of each source."""
        result = {}
        for i, s in enumerate(self.sources):
            error = np.where(self.seen[i], np.abs(self.errors(i, theta)), np.nan) * s.scale
            anything = [bool(column.any()) for column in self.seen[i].T]
            result[s.name] = np.array(
                [1.4826 * np.nanmedian(e) if a else np.nan for e, a in zip(list(error.T), anything, strict=True)]
            )
        return result


def fit(
    sources: Sequence[Source],
    layout: Layout,
    weights: Sequence[Array | None] | None = None,
    restarts: int = 0,
    seed: int = 0,
) -> Fitted:
    """Fit all sources over one parameter vector.

    `weights`: for each source a weight of each row (None: 1); a row of weight 0 is not seen at all. Loss: soft_l1 of
    (log predicted - log measured) / scale, each row by its source's weight; prior residuals likewise. `restarts` random
    starts from the prior beside its centre, the best of them kept: the same seed gives the same answer.
    """
    began = time.perf_counter()
    problem = _problem(sources, layout, weights or [None] * len(sources))
    rng = np.random.default_rng(seed)
    starts = [np.zeros(layout.size)]
    starts += [START_SPREAD * rng.standard_normal(layout.size) for _ in range(restarts)]
    with ThreadPoolExecutor(WORKERS) as side_by_side:
        theta, cost = min(side_by_side.map(problem.solve, starts), key=lambda found: found[1])
    return Fitted(
        layout=layout,
        theta=theta,
        information=problem.information(theta),
        sigma=problem.sigma(theta),
        seconds=time.perf_counter() - began,
        cost=cost,
    )


class _Settled:
    """Stops a minimisation once three steps together have gained less than 1e-4 of the loss.

    The model has corners (the larger of two times, the least of several algorithms), at which no gradient vanishes.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []

    def __call__(self, intermediate_result: OptimizeResult) -> None:
        self.losses.append(float(intermediate_result.fun))
        if len(self.losses) > 3 and self.losses[-4] - self.losses[-1] < 1e-4 * self.losses[-1]:
            raise StopIteration


def _soft_l1(residual: Array) -> Array:
    """sqrt(1 + r^2) - 1: half the square of a small residual, the absolute value of a large one."""
    return np.sqrt(1.0 + residual**2) - 1.0


def _problem(sources: Sequence[Source], layout: Layout, weights: Sequence[Array | None]) -> _Problem:
    rows = [np.ones(len(s)) if w is None else np.asarray(w, float) for s, w in zip(sources, weights, strict=True)]
    seen = [(w[:, None] > 0) & np.isfinite(s.measured) for s, w in zip(sources, rows, strict=True)]
    each = [np.where(x, (s.weight * w)[:, None], 0.0) for s, w, x in zip(sources, rows, seen, strict=True)]
    designs = tuple(layout.design(layout.codes(s.labels)) for s in sources)
    return _Problem(
        sources=tuple(sources),
        layout=layout,
        designs=designs,
        alike=tuple(map(_alike, designs)),
        seen=tuple(seen),
        weights=tuple(each),
        centre=layout.centre(),
        spread=layout.spread(),
    )


def _alike(design: Array) -> tuple[tuple[Array, tuple[int, ...]], ...]:
    kinds, kind = np.unique(design, axis=0, return_inverse=True)
    found = [tuple(np.flatnonzero(blocks).tolist()) for blocks in kinds]
    return tuple((np.flatnonzero(kind.ravel() == k), blocks) for k, blocks in enumerate(found))


def predictions(source: Source, layout: Layout, theta: Array) -> Array:
    """Log seconds (n, k) of every row, the unseen ones included."""
    return source.log_seconds(row_logs(source, layout, theta))


def row_logs(source: Source, layout: Layout, theta: Array) -> Array:
    """Log coefficients (n, F) of every row; keys that the layout does not know add nothing."""
    return np.asarray(layout.design(layout.codes(source.labels)) @ theta.reshape(-1, len(FREE)))


def folds(groups: Array, count: int, seed: int = 0) -> Array:
    """A fold number for every row; a group is never split. One fold a group where `count` is 0."""
    names = np.unique(groups)
    if count == 0 or len(names) <= count:
        return np.searchsorted(names, groups)
    order = np.random.default_rng(seed).permutation(len(names)) % count
    return order[np.searchsorted(names, groups)]


@dataclass(frozen=True)
class HeldOut:
    """Predictions (n, k) of every row by a fit that never saw its fold, in log seconds; and the folds' fits."""

    predicted: Array
    fold: Array
    fits: tuple[Fitted, ...]


def cross_validate(sources: Sequence[Source], layout: Layout, which: int, fold: Array) -> HeldOut:
    """Leave out each fold of source number `which` in turn; the other sources are seen whole.

    Every fit starts from the prior: a start from a fit of all rows would have seen the fold.
    """
    target = sources[which]
    predicted = np.full(target.measured.shape, np.nan)

    def without(number: int) -> Fitted:
        weights: list[Array | None] = [None] * len(sources)
        weights[which] = (fold != number).astype(float)
        return fit(sources, layout, weights)

    numbers = np.unique(fold)
    with ThreadPoolExecutor(WORKERS) as side_by_side:
        fits = tuple(side_by_side.map(without, numbers))
    for number, fitted in zip(numbers, fits, strict=True):
        held = fold == number
        predicted[held] = predictions(target, layout, fitted.theta)[held]
    return HeldOut(predicted, fold, fits)


__all__ = ["Fitted", "HeldOut", "cross_validate", "fit", "folds", "predictions", "row_logs"]
