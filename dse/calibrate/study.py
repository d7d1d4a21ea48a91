"""A simulated study: does asking for the most informative run next pay? Machines are drawn from the prior itself.

A true machine (log coefficients from the prior) is measured with noise. One engineer runs a fixed sweep and fits; the
other runs a few, fits, asks `experiments.select` with what the fit left in doubt of such loads, and repeats. Compared:
the error on loads that neither ran, against the noise-free truth. Not shown: a machine that the model cannot describe,
and runs set up otherwise than the prior's centre says (host, seats, how far ahead the engine schedules), which the
engineers do not know either but could.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd

from dse.calibrate.experiment_files import profiles
from dse.calibrate.experiments import Candidates, kernel_of, select
from dse.calibrate.fit import Fitted, fit, predictions, row_logs
from dse.calibrate.observations import read_serving
from dse.calibrate.parameters import FREE, Layout
from dse.calibrate.sources import Source
from dse.calibrate.uncertainty import compact
from dse.catalog.coefficients import LEVELS, CoefficientSet
from dse.space.cases import estimate_cases

Array = np.ndarray
NOISE = np.array([0.1, 0.03])  # of log TTFT and TPOT
BATCH = 3  # runs between two fits
DEPLOYMENT = {"model": "Llama-3.1-8B", "gpu": "h100", "engine": "vllm", "weights": "bf16"}
SWEEP = {"isl": (128, 1024, 4096), "osl": (128, 1024), "concurrency": (1, 16, 128), "tp": (1, 4)}
POOL = {"isl": (128, 1024, 4096, 16384), "osl": (16, 128, 1024), "concurrency": (1, 4, 16, 64, 256), "tp": (1, 2, 4)}


@dataclass(frozen=True)
class Setting:
    """Rows of one source by their use: the sweep's, the pool's (the sweep among them), and held out.

    `targets`: loads drawn as the held-out ones are, but others: what somebody who asks knows of what will be asked.
    """

    source: Source
    layout: Layout
    sweep: Array
    pool: Array
    held: Array
    targets: Array


@dataclass(frozen=True)
class Race:
    """One machine: held-out error (mean |log|) before any run and by the sweep; runs -> error by each way of choosing.

    `needed`: way -> runs until its error was first no larger than the sweep's; the most it was given where never.
    """

    before: float
    swept: float
    sweep_runs: int
    curves: dict[str, dict[int, float]]
    needed: dict[str, int]

    @property
    def ratio(self) -> float:
        """Runs that asking needed, as a share of the sweep's."""
        return self.needed["asked"] / self.sweep_runs


def setting(sweep: str = "profiles", held: int = 40, seed: int = 0) -> Setting:
    """The rows of the study, compiled once for any number of machines.

    `sweep`: the W1 to W5 "profiles" at TP 1, 2 and 4, or a "factorial" of 36 runs at the corners of what is asked.
    """
    rng = np.random.default_rng(seed)

    def grid(axes: dict[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
        return list(product(*axes.values()))

    fixed = grid(SWEEP) if sweep == "factorial" else _profiles()
    pool = list(dict.fromkeys([*fixed, *grid(POOL)]))
    low, high = np.log([[100.0, 100.0, 1.0], [8000.0, 1500.0, 200.0]])  # isl, osl, concurrency
    lengths = np.exp(low + (high - low) * rng.random((2 * held, 3))).round().astype(int)
    others = [(*map(int, row), int(tp)) for row, tp in zip(lengths, rng.choice([1, 2, 4], 2 * held), strict=True)]
    frame = pd.DataFrame([*pool, *others], columns=list(SWEEP)).assign(**DEPLOYMENT)
    told = estimate_cases(frame, CoefficientSet("physics"))
    tpot = told["tpot_ms"].astype(float).where(frame["osl"] > 1)
    source = read_serving(frame.assign(measured_ttft_ms=told["ttft_ms"].astype(float), measured_tpot_ms=tpot))
    place = {tuple(row): i for i, row in enumerate(source.frame[list(SWEEP)].itertuples(index=False, name=None))}

    def numbers(rows: list[tuple[int, ...]]) -> Array:
        return np.array([place[row] for row in rows if row in place])

    source = replace(source, scale=NOISE)
    return Setting(
        source,
        Layout.of([source.labels]),
        numbers(fixed),
        numbers(pool),
        numbers(others[:held]),
        numbers(others[held:]),
    )


def _profiles() -> list[tuple[int, ...]]:
    """The published training profiles at the concurrency that their rates come to, alike ones once."""
    table = profiles(DEPLOYMENT["model"], DEPLOYMENT["gpu"], known=CoefficientSet("physics"))
    rows = table[table["profile"] != "V1"][list(SWEEP)].astype(int)
    return [tuple(map(int, row)) for row in rows.drop_duplicates().itertuples(index=False, name=None)]


def race(where: Setting, seed: int) -> Race:
    """Draw a machine, sweep it, then reach the sweep's error by asking, and by runs picked at random from the pool."""
    rng = np.random.default_rng(seed)
    layout = where.layout
    machine = np.tile([f.kind != "setting" for f in FREE], layout.size // len(FREE))
    truth = layout.centre() + machine * layout.spread() * rng.standard_normal(layout.size)
    exact = predictions(where.source, layout, truth)
    noisy = exact + NOISE * rng.standard_normal(exact.shape)
    source = replace(where.source, measured=np.where(np.isnan(where.source.measured), np.nan, noisy))

    def fitted_to(rows: Array) -> Fitted:
        weight = np.zeros(len(source))
        weight[rows] = 1.0
        return fit([source], layout, [weight])

    def error(theta: Array) -> float:
        return float(np.abs(predictions(source, layout, theta) - exact)[where.held].mean())

    swept = error(fitted_to(where.sweep).theta)
    shuffled = rng.permutation(where.pool)
    ways: dict[str, Callable[[Fitted | None, Array], Array]] = {
        "asked": lambda now, done: asked(where, source, now, done, where.targets),
        "d-optimal": lambda now, done: asked(where, source, now, done),
        "random": lambda now, done: shuffled[len(done) : len(done) + BATCH],
    }
    curves: dict[str, dict[int, float]] = {}
    for way, choose in ways.items():
        done, now, curve = np.zeros(0, int), None, {}
        while len(done) < len(where.sweep):
            done = np.concatenate([done, choose(now, done)])
            now = fitted_to(done)
            curve[len(done)] = error(now.theta)
            if curve[len(done)] <= swept:
                break
        curves[way] = curve
    needed = {way: max(curve) for way, curve in curves.items()}
    return Race(error(layout.centre()), swept, len(where.sweep), curves, needed)


def asked(where: Setting, source: Source, now: Fitted | None, done: Array, targets: Array | None = None) -> Array:
    """The next `BATCH` runs of the pool, given what a fit has left in doubt: about the targets, or about anything."""
    layout = where.layout
    start = Fitted(layout, layout.centre(), np.zeros((layout.size, layout.size)), {}, 0.0, 0.0)
    belief = now or start
    free = np.setdiff1d(where.pool, done)
    rows = np.concatenate([free, np.zeros(0, int) if targets is None else targets])
    slopes = source.slopes(row_logs(source, layout, belief.theta))[rows]
    slopes[np.isnan(source.measured[rows])] = 0.0
    keys = tuple({level: source.labels[level][i] for level in LEVELS} for i in rows)
    minutes = np.where(np.arange(len(rows)) < len(free), 1.0, np.inf)
    runs = Candidates(source.frame.iloc[rows], slopes, keys, minutes, pd.DataFrame())
    kernel, scale = kernel_of(runs, compact(belief, layout.size), NOISE)
    aims = None if targets is None else np.arange(len(free), len(rows))
    return rows[list(select(kernel, minutes, float(BATCH), scale, targets=aims).order)]


__all__ = ["Race", "Setting", "asked", "race", "setting"]
