"""Distributions of prompt and output lengths as a fixed number of nodes, so that what is nonlinear in them is a sum.

A `Lengths` is made on the host, once a workload, and is a plain pytree inside jit. Strata are narrow where the tail is:
percentiles of TTFT are percentiles of prompts at low load. Means and variances of both lengths are kept exactly
(lognormal), or to the stretch of a power (empirical); the correlation to what the strata resolve.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr, ndtri

from dse.cost.types import Number, pytree

Array = np.ndarray

ROWS = 8  # strata of the prompt
COLUMNS = 3  # of the output, given the prompt
NODES = ROWS * COLUMNS
# Cumulative shares at which prompts are cut: such that P50, P90 and P99 are each near the mean of its stratum.
CUTS = (0.0, 0.15, 0.40, 0.65, 0.85, 0.95, 0.982, 0.9965, 1.0)
# Three-point Gauss-Hermite: normal deviates and their weights.
DEVIATES = (-(3.0**0.5), 0.0, 3.0**0.5)
SHARES = (1.0 / 6.0, 2.0 / 3.0, 1.0 / 6.0)
OBSERVED = (0.5, 0.38, 0.12)  # shares of the outputs of an empirical stratum


@pytree
class Lengths:
    """n kinds of request; leaves of shape (n,), any leading axes outside. Weights sum to 1."""

    isl: Number  # prompt tokens
    osl: Number
    cached: Number  # of the prompt, found in the prefix cache
    weight: Number


def plain(isl: float, osl: float, prefix_hit: float = 0.0) -> Lengths:
    """One kind of request."""
    return Lengths(
        isl=np.array([float(isl)]),
        osl=np.array([float(osl)]),
        cached=np.array([float(isl) * prefix_hit]),
        weight=np.ones(1),
    )


def lognormal(
    isl: float, osl: float, isl_cv: float = 0.0, osl_cv: float = 0.0, correlation: float = 0.0, prefix_hit: float = 0.0
) -> Lengths:
    """Lognormal lengths of the given means and coefficients of variation (standard deviation over mean; 0: a number).

    `correlation`: of their logarithms. A share `prefix_hit` of every prompt is cached. Nodes: strata of the prompt at
    their conditional means, times three Gauss-Hermite nodes of the output given the stratum's mean deviate.
    """
    if isl_cv == 0.0 and osl_cv == 0.0:
        return plain(isl, osl, prefix_hit)
    edges = ndtri(np.array(CUTS))
    share = np.diff(CUTS)
    sigma_in, sigma_out = (float(np.sqrt(np.log1p(cv**2))) for cv in (isl_cv, osl_cv))
    prompt = np.diff(ndtr(edges - sigma_in)) / share * isl
    deviate = -np.diff(np.exp(-0.5 * edges**2)) / np.sqrt(2.0 * np.pi) / share  # E[z | stratum]
    spread = np.sqrt(np.maximum(1.0 - correlation**2, 0.0))
    z = correlation * deviate[:, None] + spread * np.array(DEVIATES)
    weight = (share[:, None] * np.array(SHARES)).ravel()
    answer = np.exp(sigma_out * z).ravel()
    prompts = np.repeat(prompt, COLUMNS)
    prompts = _stretched(prompts, weight, isl, isl_cv)
    return Lengths(isl=prompts, osl=_stretched(answer, weight, osl, osl_cv), cached=prompts * prefix_hit, weight=weight)


def empirical(isl: Array, osl: Array, cached: Array | None = None) -> Lengths:
    """The joint distribution of observed requests (n,): strata of the prompt, then of the output within each.

    Nodes are stratum means, then stretched by a power to the observed variances. Fewer requests than nodes are kept.
    """
    found = np.zeros(len(isl)) if cached is None else np.asarray(cached, np.float64)
    table = np.stack([np.asarray(isl, np.float64), np.asarray(osl, np.float64), found])
    n = table.shape[1]
    if n <= NODES:
        return Lengths(isl=table[0], osl=table[1], cached=table[2], weight=np.full(n, 1.0 / n))
    order = np.argsort(table[0], kind="stable")
    cuts = np.cumsum((0.0, *OBSERVED))
    nodes, weights = [], []
    for rows in np.split(order, np.round(np.array(CUTS[1:-1]) * n).astype(int)):
        inside = rows[np.argsort(table[1, rows], kind="stable")]
        for cell in np.split(inside, np.round(cuts[1:-1] * len(rows)).astype(int)):
            if len(cell):
                nodes.append(table[:, cell].mean(axis=1))
                weights.append(len(cell) / n)
    prompt, answer, hit = np.array(nodes).T
    weight = np.array(weights)
    wide = _stretched(prompt, weight, table[0].mean(), table[0].std() / table[0].mean())
    return Lengths(
        isl=wide,
        osl=_stretched(answer, weight, table[1].mean(), table[1].std() / table[1].mean()),
        cached=np.minimum(hit * wide / prompt, wide),
        weight=weight,
    )


def padded(lengths: Lengths, count: int) -> Lengths:
    """With `count` nodes: the ones added weigh nothing, and are the first one again."""
    more = count - len(lengths.weight)

    def longer(values: Array) -> Array:
        return np.concatenate([values, np.full(more, values[0])])

    return Lengths(
        isl=longer(lengths.isl),
        osl=longer(lengths.osl),
        cached=longer(lengths.cached),
        weight=np.concatenate([lengths.weight, np.zeros(more)]),
    )


def _stretched(values: Array, weight: Array, mean: float, cv: float) -> Array:
    """values^a, scaled: mean and coefficient of variation as asked (a by bisection; alike values stay alike)."""
    if cv == 0.0 or np.ptp(values) == 0.0:
        return np.full(len(values), float(mean))
    logs = np.log(values / values.max())

    def of(power: float) -> Array:
        raised = np.exp(power * logs)
        return raised * (mean / float(weight @ raised))

    low, high = 0.0, 8.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        wide = float(weight @ of(middle) ** 2) / mean**2 - 1.0 > cv**2
        low, high = (low, middle) if wide else (middle, high)
    return of(0.5 * (low + high))


__all__ = ["NODES", "Lengths", "empirical", "lognormal", "padded", "plain"]
