"""The fit of one operator's formula, level by level: base, family, generation, GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dse.batches import at_rows
from dse.calibrate.kernel_bounds import BOUNDS, SWITCHES
from dse.calibrate.kernel_data import FORMULAS, KernelData
from dse.calibrate.levenberg import solve
from dse.catalog.kernel_coefficients import BASE, KERNELS, PARENTS, path_of
from dse.programs import LARGE, program
from dse.space.kernel_cases import KernelCases

Array = np.ndarray
ROWS = 4096  # of one fit, drawn evenly from its GPUs: a fit's coefficients are settled long before
TRIAL_ROWS = 1024  # of a fit that only picks a switch
# How strongly a level is held to the one above it (loss of one unit of logit), and the base to its start.
BASE_STIFFNESS, STIFFNESS = 0.01, 0.2
ELSEWHERE = 0.1  # weight of other families' GPUs in a family's fit: what few GPUs cannot tell apart, many can
SAME = 0.03  # a value within this share of the level above's is not written down
WORKERS = 2


@dataclass(frozen=True)
class Level:
    """A level of one precision, the GPUs it speaks for, and the kept level above it."""

    precision: str
    name: str
    above: str | None
    gpus: frozenset[str]
    depth: int


def levels(cases: KernelCases, rows: Array) -> list[Level]:
    """Levels to fit, the general ones first. One that has the same GPUs as a level above says nothing of its own."""
    found: list[Level] = []
    seen = dict.fromkeys(zip(cases.precision[rows], cases.generation[rows], cases.gpu[rows]))
    for precision in dict.fromkeys(key[0] for key in seen):
        paths = {key[2]: path_of(key[1], key[2]) for key in seen if key[0] == precision}
        kept: dict[str, Level] = {}
        order = {level: depth for path in paths.values() for depth, level in enumerate(path)}
        for name in sorted(order, key=lambda level: (order[level], level)):
            members = frozenset(gpu for gpu, path in paths.items() if name in path)
            path = next(path for path in paths.values() if name in path)
            above = next((kept[level] for level in reversed(path[: path.index(name)]) if level in kept), None)
            if above is None or members != above.gpus:
                kept[name] = Level(precision, name, above.name if above else None, members, order[name])
        found += kept.values()
    return sorted(found, key=lambda level: level.depth)


# `solve(rows, log_measured, weight, start, centre, stiffness) -> (x, loss)`
Solver = Callable[..., tuple[Array, float]]
Tables = dict[str, dict[str, dict[str, float]]]  # precision -> level -> coefficients, complete at each level


@dataclass(frozen=True)
class Fitter:
    """One operator's data with its compiled solver."""

    data: KernelData
    solve: Solver
    seed: int = 0

    @staticmethod
    def of(data: KernelData, seed: int = 0) -> Fitter:
        return Fitter(data=data, solve=_solver(data.op), seed=seed)

    def fit(self, masks: list[Array]) -> list[Tables]:
        """Tables for each mask (True: the row may be seen), all fits of one depth side by side."""
        switches = self._switches(masks)
        tables: list[Tables] = [{} for _ in masks]
        jobs = [(i, level) for i, mask in enumerate(masks) for level in levels(self.data.cases, np.flatnonzero(mask))]
        bounds = BOUNDS[self.data.op]
        for depth in sorted({level.depth for _, level in jobs}):
            now = [(i, level) for i, level in jobs if level.depth == depth]

            def run(job: tuple[int, Level]) -> dict[str, float]:
                i, level = job
                above = tables[i][level.precision][level.above] if level.above else None
                centre = bounds.start() if above is None else bounds.free(above)
                family = PARENTS.get(level.name) == BASE
                seen = frozenset(self.data.cases.gpu) if family else level.gpus
                rows = self._rows(masks[i], level.precision, seen, ROWS)
                share = np.where(np.isin(self.data.cases.gpu[rows], list(level.gpus)), 1.0, ELSEWHERE)
                held = self._held(switches[i], rows)
                stiffness = BASE_STIFFNESS if above is None else STIFFNESS
                # What is above may lie in another valley (a kernel that splits nothing): the usual start is tried too.
                starts = [centre] if above is None else [centre, bounds.start()]
                found = [self._solve(rows, held, share, start, centre, stiffness, ROWS) for start in starts]
                x, _ = min(found, key=lambda fit: fit[1])
                return {k: float(v) for k, v in bounds.values(x).items()} | self._usual(switches[i], level)

            for (i, level), values in zip(now, _spread(run, now)):
                tables[i].setdefault(level.precision, {})[level.name] = values
        return tables

    def _switches(self, masks: list[Array]) -> list[dict[tuple[str, str], dict[str, float]]]:
        """For each mask, (precision, gpu) -> values of the switches, picked by the loss of each generation's rows."""
        options = self._options()
        picked: list[dict[tuple[str, str], dict[str, float]]] = [{} for _ in masks]
        cases = self.data.cases
        jobs = [
            (i, precision, generation, choice)
            for i, mask in enumerate(masks)
            for precision, generation in dict.fromkeys(zip(cases.precision[mask], cases.generation[mask]))
            for choice in product(*options.values())
        ]
        if not options:
            return picked

        def run(job: tuple[int, str, str, tuple[float, ...]]) -> float:
            i, precision, generation, choice = job
            gpus = frozenset(cases.gpu[cases.generation == generation])
            rows = self._rows(masks[i], precision, gpus, TRIAL_ROWS)
            held = {name: np.full(len(rows), value) for name, value in zip(options, choice)}
            start = BOUNDS[self.data.op].start()
            return self._solve(rows, held, np.ones(len(rows)), start, start, BASE_STIFFNESS, TRIAL_ROWS)[1]

        best: dict[tuple[int, str, str], float] = {}
        for (i, precision, generation, choice), loss in zip(jobs, _spread(run, jobs)):
            if loss < best.get((i, precision, generation), np.inf):
                best[i, precision, generation] = loss
                for gpu in dict.fromkeys(cases.gpu[cases.generation == generation]):
                    picked[i][precision, gpu] = dict(zip(options, choice))
        return picked

    def _usual(self, switches: Mapping[tuple[str, str], dict[str, float]], level: Level) -> dict[str, float]:
        """The switches of a generation or GPU; for the levels above, what most GPUs of all have (ties: the first
        option), since a library's choice says nothing about its neighbours'."""
        shared = level.name == BASE or PARENTS.get(level.name) == BASE
        gpus = [gpu for precision, gpu in switches if precision == level.precision and (shared or gpu in level.gpus)]
        votes = {name: Counter(switches[level.precision, gpu][name] for gpu in gpus) for name in self._options()}
        return {name: max(options, key=lambda o: votes[name][o]) for name, options in self._options().items()}

    def _options(self) -> Mapping[str, tuple[float, ...]]:
        return SWITCHES.get(self.data.op, {})

    def _held(self, switches: Mapping[tuple[str, str], dict[str, float]], rows: Array) -> dict[str, Array]:
        """The switches of each row, by its own GPU."""
        names = self._options()
        keys = list(zip(self.data.cases.precision[rows], self.data.cases.gpu[rows]))
        return {name: np.array([switches[key][name] for key in keys]) for name in names}

    def _rows(self, mask: Array, precision: str, gpus: frozenset[str], most: int) -> Array:
        """Rows of a fit: as many of each GPU, at most `most`, drawn by the seed."""
        rng = np.random.default_rng(self.seed)
        own = mask & (self.data.cases.precision == precision)
        parts = [np.flatnonzero(own & (self.data.cases.gpu == gpu)) for gpu in sorted(gpus)]
        parts = sorted((part for part in parts if len(part)), key=lambda part: len(part))
        chosen: list[Array] = []
        for i, part in enumerate(parts):
            room = (most - sum(len(c) for c in chosen)) // (len(parts) - i)
            chosen.append(part if len(part) <= room else rng.choice(part, room, replace=False))
        return np.concatenate(chosen)

    def _solve(
        self,
        rows: Array,
        held: Mapping[str, Array],
        share: Array,
        start: Array,
        centre: Array,
        stiffness: float,
        size: int,
    ) -> tuple[Array, float]:
        """Pad to `size` rows, weight GPUs equally but for `share`, and solve."""
        padded = np.concatenate([rows, np.full(size - len(rows), rows[0])])
        gpu = self.data.cases.gpu[rows]
        count = Counter(gpu)
        weight = np.zeros(size)
        weight[: len(rows)] = share * [len(rows) / len(count) / count[name] for name in gpu]
        switch = {name: np.concatenate([v, np.full(size - len(rows), v[0])]) for name, v in held.items()}
        case, device = at_rows((self.data.cases.case, self.data.cases.device), padded)
        with jax.enable_x64(True):
            return self.solve((switch, case, device), self.data.log_time[padded], weight, start, centre, stiffness)


@cache
def _solver(op: str) -> Solver:
    compiled = program(_solve, op, options=LARGE)

    def run(*arguments: Any) -> tuple[Array, float]:
        x, best = compiled(*arguments)
        return np.asarray(x), float(best)

    return run


def _solve(op: str, *arguments: Any) -> tuple[Any, Any]:
    return solve(partial(_log_time, op), BOUNDS[op], *arguments)


def _log_time(op: str, values: dict[str, Any], row: Any) -> Any:
    switch, case, device = row
    return jnp.log(FORMULAS[op](KERNELS[op](**values, **switch), case, device, 1.0))


def _spread(run: Callable[[Any], Any], jobs: list[Any]) -> list[Any]:
    """Results of independent jobs, in order: compiled solves release the interpreter, so threads share the cores."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(run, jobs))


def thinned(tables: Tables, cases: KernelCases) -> Tables:
    """Only what a level says anew: values more than `SAME` off what the levels above say, in three digits."""
    result: Tables = {}
    everything: dict[tuple[str, str], dict[str, float]] = {}  # (precision, level) -> what holds there
    for level in levels(cases, np.flatnonzero(np.isin(cases.precision, list(tables)))):
        above = everything[level.precision, level.above] if level.above else {}
        values = tables[level.precision][level.name]
        own = {k: v for k, v in values.items() if k not in above or abs(v - above[k]) > SAME * abs(above[k])}
        own = {name: float(f"{value:.3g}") for name, value in own.items()}
        everything[level.precision, level.name] = above | own
        if own:
            result.setdefault(level.precision, {})[level.name] = own
    return result


__all__ = ["Fitter", "Level", "Tables", "levels", "thinned"]
