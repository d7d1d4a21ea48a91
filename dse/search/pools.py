"""The joint search of prefill and decode pools: each worker is priced once, then all pairs are met in blocks.

What a pair delivers follows from a few numbers of either worker (`cost.pool_sides.Sender`, `Receiver`), so a pair costs
some eighty operations: blocks of (prefill workers x decode workers) for every number of workers that the budget allows,
with the same sieve and running front as the grid's. All in float64.

Prefill workers that cannot be on a front are left out before (`dominant`): on the same machine and of the same size,
one that is no better in any of `cost.pool_sides.burdens`, nor in memory, only ever raises TTFT, at equal throughput,
TPOT, GPUs and cost: N = X TTFT(N) + n has a smaller solution where TTFT(N) is smaller for every N. Decode workers are
all kept but those that break a limit by themselves: more requests/s is not always better, for they queue longer.
Pairs keep the KV cache in one format.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
import pandas as pd

from dse.cost.coefficients import Coefficients
from dse.search.kernel import Goals, Points, Questions, Tables, goals, tables
from dse.search.pairs import COLUMNS, ROWS, Job, compiled_pairs, questions
from dse.search.pareto import RunningFront
from dse.search.pool_blocks import Table, arrange, jobs
from dse.search.pool_recheck import recheck_pairs
from dse.space.pool_space import CompiledPools


@dataclass
class Met:
    """What the joint search found: flat indices of pairs and exact values."""

    front: RunningFront
    passed: np.ndarray
    enumerated: int
    cuts: dict[str, int]
    evaluated: int = 0
    pairs: int = 0  # prefill points x decode points that some number of workers joins
    seconds: float = 0.0
    partial: bool = False
    least: tuple[float, int] = (np.inf, -1)


def pair_all(
    pools: CompiledPools, c: tuple[Coefficients, Coefficients], best: int = 200, prune: bool = True
) -> tuple[Met, pd.DataFrame, np.ndarray]:
    """Meet every pair: what was found, and the kept pairs' exact values (rows, objectives signed to minimise).

    `prune` false prices all of them: the same front, for tests. Ctrl-C returns what was found so far, marked partial.
    """
    asked, started = questions(pools), time.perf_counter()
    with jax.enable_x64(True):
        t = (tables(pools.prefill, c[0], np.float64), tables(pools.decode, c[1], np.float64))
        table, cuts, pairs = arrange(pools, t, prune)
        met = Met(
            front=RunningFront(margin=np.zeros(len(asked.objectives)), best=best),
            passed=np.zeros(1 + len(asked.constraints), np.int64),
            enumerated=math.prod(pools.shape),
            cuts=cuts,
            pairs=pairs,
        )
        try:
            for job, code, points in _in_flight(pools, table, t, asked, met):
                _absorb(pools, table, met, job, code, points)
        except KeyboardInterrupt:
            met.partial = True
        met.front.compact()
        rows, values = recheck_pairs(pools, t, table, met.front.indices, asked)
    met.seconds = time.perf_counter() - started
    return met, rows, values


def _target(pools: CompiledPools, front: np.ndarray | None = None, threshold: float = np.inf) -> Goals:
    return goals(pools, np.float64, front, threshold)  # type: ignore[arg-type]


def _in_flight(
    pools: CompiledPools, table: Table, t: tuple[Tables, Tables], asked: Questions, met: Met
) -> Iterator[tuple[Job, int, Points]]:
    """Finished blocks; the next one already runs while the host takes in the last."""
    kernel, target = compiled_pairs(asked), _target(pools)
    sides = jax.device_put((table.prefill, table.decode))
    waiting: list[tuple[Job, int, Points]] = []
    for n, (job, code) in enumerate(jobs(pools, table, t)):
        if met.front.compact(at_least=1 if n & (n - 1) == 0 else 4096):
            target = _target(pools, met.front.members(), met.front.threshold())
        waiting.append((job, code, kernel(*sides, job, target)))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def _absorb(pools: CompiledPools, table: Table, met: Met, job: Job, code: int, points: Points) -> None:
    """Take a block's survivors into the front; remember the least-violating pair while nothing is feasible."""
    row, column = int(job.first[0]), int(job.first[1])
    met.passed = met.passed + np.asarray(points.passed, np.int64)
    met.evaluated += min(ROWS, int(job.last[0]) - row) * min(COLUMNS, int(job.last[1]) - column)
    _, decode_points, codes = pools.shape

    def flat(where: np.ndarray) -> np.ndarray:
        down, across = np.divmod(where, COLUMNS)
        first, second = table.orders[0][row + down], table.orders[1][column + across]
        return (first.astype(np.int64) * decode_points + second) * codes + code

    kept = np.flatnonzero(np.asarray(points.keep).ravel())
    if len(kept):
        values = np.asarray(points.objectives).reshape(-1, points.objectives.shape[-1])[kept]
        met.front.add(values, flat(kept), sure=np.asarray(points.sure).ravel()[kept])
    if not met.passed[-1]:
        violation = np.nan_to_num(np.asarray(points.violation).ravel(), nan=np.inf, posinf=np.inf)
        worst = int(np.argmin(violation))
        if np.isfinite(violation[worst]):
            met.least = min(met.least, (float(violation[worst]), int(flat(np.array([worst]))[0])))


__all__ = ["Met", "pair_all"]
