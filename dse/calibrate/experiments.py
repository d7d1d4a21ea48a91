"""Which runs to measure next: the ones that tell most about the coefficients, for the GPU time that they take.

A run measures log TTFT and log TPOT; their gradient J by the log coefficients comes from the model itself. With the
belief N(c, C) about the logs and measurement spreads s, n candidates have the kernel K = (J/s) C (J/s)' (2n, 2n), and
measuring a set A of them raises the information's determinant by log det(I + K_AA) (D-optimality, in data space: no
matrix of the coefficients' size is ever formed). After a run, K <- K - K_:i (I + K_ii)^-1 K_i:, whose diagonal is the
variance that predictions of the candidates keep. Ignored: that a run may show the model itself to be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
import pandas as pd

from dse.batches import in_blocks
from dse.calibrate.observations import TPOT_SCALE, TTFT_SCALE, log_ttft_tpot
from dse.calibrate.parameters import FREE
from dse.calibrate.run import Calibration
from dse.calibrate.uncertainty import compact
from dse.catalog.coefficients import LEVELS, CoefficientSet, coefficient_set
from dse.catalog.uncertainty import BASE, Block, Uncertainty
from dse.cost.evaluate import estimate
from dse.errors import InputError, unknown
from dse.programs import derivative, quick
from dse.space.cases import Case, parse_cases, scenarios_of

Array = np.ndarray
REQUESTS_A_CLIENT = 10  # of a closed-loop run whose table says no `requests`
AIMS = ("information", "predictions")
LEAST_GAIN = 1e-3  # nats: a run that would tell less is not proposed
LEAST_ROWS = 64  # that gradients are taken of: fewer are padded, so that few shapes are ever compiled
MOST = 4000  # candidates: their kernel is (2n, 2n)


@dataclass(frozen=True)
class Candidates:
    """n runs that can be priced: their rows, gradients (n, 2, F) by log coefficient (0 for what a run cannot show),
    level -> key of each, and GPU-minutes (n,)."""

    frame: pd.DataFrame
    slopes: Array
    keys: tuple[dict[str, str], ...]
    minutes: Array
    refused: pd.DataFrame

    def __len__(self) -> int:
        return len(self.minutes)


@dataclass(frozen=True)
class Chosen:
    """Runs in the order of choice: their numbers, gains in nats, and root mean predictive variance of all candidates
    before any (first) and after each of them, by metric: (chosen + 1, 2) of the log."""

    order: tuple[int, ...]
    gain: Array
    deviation: Array


@dataclass(frozen=True)
class Experiments:
    """`table`: the runs to do, best first. `minutes`: their sum. `refused`: candidates that cannot be priced."""

    table: pd.DataFrame
    minutes: float
    refused: pd.DataFrame


def next_experiments(
    candidates: pd.DataFrame,
    budget: float,
    known: Calibration | CoefficientSet | None = None,
    most: int | None = None,
    aim: str = "information",
) -> Experiments:
    """The candidates to measure within `budget` GPU-minutes, by what each is expected to tell a GPU-minute.

    `aim`: "information" about all coefficients (D-optimality), or narrower "predictions" of the candidates themselves.

    `candidates`: rows in estimate's columns (one replica each); `requests` or `seconds` says how long a run lasts
    (default: 10 requests a client). `known`: what is believed already: a fit, or a set with its uncertainty (a set
    without one: the cited priors). Table: the rows, `gpu_minutes`, `gain_nats`, `ttft_sd_before/after`,
    `tpot_sd_before/after`: the log spread of predictions over all candidates before any run and after this one.
    InputError: nothing can be priced, nothing fits the budget.
    """
    if aim not in AIMS:
        raise unknown("aim", aim, AIMS, "--aim")
    chosen_set = known.set if isinstance(known, Calibration) else known or coefficient_set()
    runs = read_candidates(candidates, chosen_set)
    kernel, scale = kernel_of(runs, belief_of(known or chosen_set))
    if not (runs.minutes <= budget).any():
        raise InputError(
            f"--budget: {budget:g} GPU-minutes pay for no candidate; the cheapest takes {runs.minutes.min():.3g}"
        )
    targets = np.arange(len(runs)) if aim == "predictions" else None
    found = select(kernel, runs.minutes, budget, scale, most, targets)
    if not found.order:
        raise InputError("experiments: no candidate would tell anything that is not known already; give others")
    order = list(found.order)
    deviation = np.round(found.deviation, 4)
    table = runs.frame.iloc[order].reset_index(drop=True)
    table.insert(0, "run", np.arange(1, len(order) + 1))
    return Experiments(
        table.assign(
            gpu_minutes=np.round(runs.minutes[order], 2),
            gain_nats=np.round(found.gain, 3),
            nats_a_minute=np.round(found.gain / runs.minutes[order], 4),
            **{
                f"{metric}_sd_{when}": values
                for i, metric in enumerate(("ttft", "tpot"))
                for when, values in (("before", deviation[0, i]), ("after", deviation[1:, i]))
            },
        ),
        float(runs.minutes[order].sum()),
        runs.refused,
    )


def read_candidates(table: pd.DataFrame, known: CoefficientSet) -> Candidates:
    """Price the rows and their gradients. Rows that cannot be priced, or do not fit, are refused with a reason."""
    parsed = parse_cases(table)
    reasons = {i: case for i, case in enumerate(parsed) if isinstance(case, str)}
    cases = {i: case for i, case in enumerate(parsed) if isinstance(case, Case)}
    if cases:
        with jax.enable_x64(True):
            priced = estimate(scenarios_of(list(cases.values()), known))
        e2e, gpus, held = (np.asarray(x) for x in (priced.e2e, priced.gpus, priced.memory.requests))
        reasons |= {
            i: "memory: not one request fits" for i, requests in zip(cases, held, strict=True) if requests < 1.0
        }
        minutes = dict(zip(cases, _minutes(table.iloc[list(cases)], list(cases.values()), e2e, gpus), strict=True))
        for i, cost in minutes.items():
            if not (np.isfinite(cost) and cost > 0.0):
                reasons[i] = f"takes {cost:g} GPU-minutes: `requests` and `seconds` must be positive numbers"
    kept = [i for i in cases if i not in reasons]
    refused = pd.DataFrame([{"row": i + 1, "reason": reason} for i, reason in sorted(reasons.items())])
    if not kept:
        raise InputError(
            "experiments: no candidate can be priced; " + (str(refused["reason"].iloc[0]) if reasons else "empty")
        )
    if len(kept) > MOST:
        raise InputError(f"experiments: {len(kept)} candidates are more than {MOST}; thin them out")
    some = [cases[i] for i in kept]
    return Candidates(
        frame=table.iloc[kept].reset_index(drop=True),
        slopes=_slopes(some, known),
        keys=tuple(case.keys for case in some),
        minutes=np.array([minutes[i] for i in kept]),
        refused=refused,
    )


# As `sources.compiled`, but of scenarios that are arguments: one program serves every table of a size.
_gradient = quick(derivative, log_ttft_tpot, in_axes=0)


def _slopes(cases: Sequence[Case], known: CoefficientSet) -> Array:
    """d log (TTFT, TPOT) / d log coefficient (n, 2, F); an answer of one token has no TPOT."""
    values = [known.of(**case.keys) for case in cases]
    logs = np.log([[float(getattr(c, f.name)) for f in FREE] for c in values])
    with jax.enable_x64(True):
        slopes: Array = in_blocks(_gradient, logs, scenarios_of(cases, known), least=LEAST_ROWS)
    slopes[np.array([case.load.osl for case in cases]) <= 1.0, 1] = 0.0
    return slopes


def _minutes(rows: pd.DataFrame, cases: Sequence[Case], e2e: Array, gpus: Array) -> Array:
    """GPU-minutes of each run: `seconds` where a row says it, else requests x e2e / concurrency; times its GPUs."""
    concurrency = np.array([float(case.load.concurrency) for case in cases])

    def told(name: str) -> Array:
        if name not in rows:
            return np.full(len(rows), np.nan)
        return pd.to_numeric(rows[name], errors="coerce").to_numpy(float)

    requests = np.where(np.isnan(told("requests")), REQUESTS_A_CLIENT * concurrency, told("requests"))
    seconds = np.where(np.isnan(told("seconds")), requests * e2e / concurrency, told("seconds"))
    return np.asarray(seconds * gpus / 60.0)


# ----------------------------------------------------------------------------------------------- belief and kernel


def belief_of(known: Calibration | CoefficientSet) -> Uncertainty:
    """What is known of the logs: a fit's whole covariance, a set's own, or else the cited priors."""
    if isinstance(known, Calibration):
        return compact(known.fitted, known.fitted.layout.size)
    return known.uncertainty or prior()


def prior() -> Uncertainty:
    """The cited priors alone."""
    return Uncertainty(
        spread={f.name: {level: f.spread(level) for level in (BASE, *LEVELS)} for f in FREE}, directions={}, residual={}
    )


def kernel_of(runs: Candidates, belief: Uncertainty, scale: Array | None = None) -> tuple[Array, Array]:
    """(K, s): covariance (2n, 2n) of the candidates' log TTFT and TPOT in units of their spreads s (2,).

    `scale`: those spreads, where known; else what the belief leaves, else what a good model leaves. A
    coefficient that the belief does not name has its cited prior. Runs of one key share its
    offset; a version that is not said has none.
    """
    if scale is None and belief.residual:
        scale = np.array([max(belief.residual[name].sigma, 1e-3) for name in ("ttft", "tpot")])
    elif scale is None:
        scale = np.array([TTFT_SCALE, TPOT_SCALE])
    slopes = runs.slopes / scale[:, None]
    n, rank, both = len(slopes), belief.rank, np.arange(2)
    total, along = np.zeros((n, 2, n, 2)), np.zeros((n, 2, rank))
    for block, members in _blocks(runs.keys).items():
        spread = np.array([belief.spread.get(f.name, {}).get(block[0], f.spread(block[0])) for f in FREE])
        part = slopes[members] * spread
        total[np.ix_(members, both, members, both)] += np.einsum("ikf,jlf->ikjl", part, part, optimize=True)
        table = belief.directions.get(block, {})
        if table:
            nothing = np.zeros(rank)
            along[members] += part @ np.stack([table.get(f.name, nothing) for f in FREE])
    flat = along.reshape(2 * n, rank)
    return total.reshape(2 * n, 2 * n) - flat @ flat.T, scale


def _blocks(keys: Sequence[Mapping[str, str]]) -> dict[Block, Array]:
    """Block of offsets -> numbers of the runs that it moves."""
    found: dict[Block, list[int]] = {(BASE, ""): list(range(len(keys)))}
    for i, row in enumerate(keys):
        for level, key in row.items():
            if key:
                found.setdefault((level, key), []).append(i)
    return {block: np.array(members) for block, members in found.items()}


# ------------------------------------------------------------------------------------------------------ selection


def select(
    kernel: Array,
    minutes: Array,
    budget: float,
    scale: Array,
    most: int | None = None,
    targets: Array | None = None,
) -> Chosen:
    """Greedy choice within a budget: each run at most once; one of infinite minutes never.

    By information (D-optimality), or where `targets` (numbers of runs) are given by the standard deviations of their
    predicted log times (mean over targets and metrics). Taken by gain a minute, and again by gain alone; the set that
    gains more is kept (neither alone has a bound on how much it may miss).
    """
    both = [_greedy(kernel, minutes, budget, scale, most, targets, cost) for cost in (minutes, np.ones(len(minutes)))]
    return max(both, key=lambda found: found[1])[0]


def _greedy(
    kernel: Array,
    minutes: Array,
    budget: float,
    scale: Array,
    most: int | None,
    targets: Array | None,
    cost: Array,
) -> tuple[Chosen, float]:
    k, n, left, total = kernel.copy(), len(minutes), budget, 0.0
    free = np.ones(n, bool)
    order: list[int] = []
    gains: list[float] = []
    shown = np.diag(k).reshape(-1, 2) > 0.0
    deviation = [_deviation(k, scale, shown)]
    while len(order) < (n if most is None else most):
        told = np.where(free & (minutes <= left), gains_of(k), 0.0)
        score = told if targets is None else np.where(told > 0.0, narrowed(k, scale, targets), 0.0)
        i = int(np.argmax(score / cost))
        if not told[i] > LEAST_GAIN:
            break
        order.append(i)
        gains.append(float(told[i]))
        total += float(score[i])
        k = observed(k, i)
        free[i] = False
        left -= minutes[i]
        deviation.append(_deviation(k, scale, shown))
    return Chosen(tuple(order), np.array(gains), np.array(deviation)), total


def narrowed(kernel: Array, scale: Array, targets: Array) -> Array:
    """By how much each run (n,) would lessen the mean standard deviation of the targets' predicted log times."""
    n = len(kernel) // 2
    rows = np.stack([2 * targets, 2 * targets + 1], axis=1).ravel()
    here = np.arange(n)
    part = kernel[rows].reshape(len(rows), n, 2)
    own = kernel.reshape(n, 2, n, 2)[here, :, here] + np.eye(2)
    gone = np.einsum("tia,iab,tib->ti", part, np.linalg.inv(own), part, optimize=True)
    before = np.clip(np.diag(kernel)[rows], 0.0, None)[:, None]
    after = np.clip(before - gone, 0.0, None)
    return np.asarray(np.tile(scale, len(targets)) @ (np.sqrt(before) - np.sqrt(after)) / len(rows))


def gains_of(kernel: Array) -> Array:
    """Half of log det(I + K_ii) of every run (n,): nats that measuring it alone would tell now."""
    n = len(kernel) // 2
    here = 2 * np.arange(n)
    a, b, c = kernel[here, here], kernel[here + 1, here + 1], kernel[here, here + 1]
    return np.asarray(0.5 * np.log(np.maximum((1.0 + a) * (1.0 + b) - c * c, 1.0)))


def observed(kernel: Array, i: int) -> Array:
    """The kernel once run i is measured."""
    rows = [2 * i, 2 * i + 1]
    part = kernel[:, rows]
    return np.asarray(kernel - part @ np.linalg.solve(np.eye(2) + kernel[np.ix_(rows, rows)], part.T))


def _deviation(kernel: Array, scale: Array, shown: Array) -> Array:
    """(2,) root of the mean predictive variance of log TTFT and TPOT over the runs that show them (n, 2)."""
    variance = np.where(shown, np.clip(np.diag(kernel), 0.0, None).reshape(-1, 2), 0.0)
    return np.asarray(scale * np.sqrt(variance.sum(axis=0) / np.maximum(shown.sum(axis=0), 1)))


__all__ = [
    "AIMS",
    "Candidates",
    "Chosen",
    "Experiments",
    "belief_of",
    "gains_of",
    "kernel_of",
    "narrowed",
    "next_experiments",
    "observed",
    "prior",
    "read_candidates",
    "select",
]
