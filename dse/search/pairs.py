"""What one prefill worker and one decode worker deliver together, and blocks of such pairs through the grid's sieve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp

from dse.cost.collectives import Line
from dse.cost.pool_queue import in_flight
from dse.cost.pool_sides import journey
from dse.cost.pools import Delivered, delivered
from dse.cost.types import Load, Number, pytree
from dse.errors import InputError
from dse.programs import program
from dse.search.kernel import Goals, Points, Questions, rows_of, sift
from dse.search.metrics import VALUE, relative_excess, signed
from dse.search.pool_workers import DecodeWorkers, PrefillWorkers
from dse.space.pool_space import CompiledPools

TRACES = {"pairs": 0}
ROWS, COLUMNS = 32, 2048  # prefill x decode workers of a block
# Metrics that a pair has; others need more than means.
METRICS = (
    *("ttft_ms", "tpot_ms", "e2e_ms", "output_tok_s_gpu", "total_tok_s_gpu", "tok_s_user", "gpus", "usd_per_mtok"),
    "memory_gib",
)


@pytree
class _Peak:
    total: Number


@pytree
class Paired(Delivered):
    """What a pair delivers, `concurrency` requests in flight; `supply`: requests/s over what prefill and link bear."""

    concurrency: Number
    memory: _Peak
    supply: Number


@pytree
class Job:
    """A block of pairs: rows and columns from `first` up to `last`, and what all its pairs share."""

    first: tuple[Number, Number]
    last: tuple[Number, Number]
    workers: tuple[Number, Number]
    line: Line
    layerwise: Number
    layers: Number
    load: Load


def questions(pools: CompiledPools) -> Questions:
    asked = Questions(tuple((c.metric, c.op) for c in pools.constraints), tuple(pools.objectives))
    for metric, _ in (*asked.constraints, *asked.objectives):
        if metric not in METRICS:
            raise InputError(f"{pools.spec.where}: {metric} is not known of pools (allowed: {', '.join(METRICS)})")
    return asked


def value_of(metric: str, found: Paired) -> Number:
    """A metric of a pair in its natural unit."""
    return VALUE[metric](cast(Any, found))


def meet(p: PrefillWorkers, d: DecodeWorkers, job: Job) -> Paired:
    """One prefill point, one decode point, numbers of workers: the operating point at which both are as priced."""
    trip, most = journey(p.side, d.side, job.line, job.workers, job.layers, job.layerwise)
    rate, decoding = job.workers[1] * d.rate, job.workers[1] * d.running
    users, ttft = in_flight(replace(trip, half=d.half), jnp.minimum(rate, most), decoding)
    out = delivered(p.side, d.side, job.workers, job.load, rate, ttft, d.tpot)
    return Paired(
        **vars(out),
        concurrency=users,
        memory=_Peak(total=jnp.maximum(p.memory, d.memory)),
        supply=rate / most - 1.0,
    )


def pair_kernel(asked: Questions, p: PrefillWorkers, d: DecodeWorkers, job: Job, target: Goals) -> Points:
    """A block of pairs through the sieve of the grid's kernel: (ROWS, COLUMNS)."""
    TRACES["pairs"] += 1
    rows = job.first[0] + jnp.arange(ROWS, dtype=jnp.int32)
    columns = job.first[1] + jnp.arange(COLUMNS, dtype=jnp.int32)
    inside = (rows < job.last[0])[:, None] & (columns < job.last[1])[None, :]
    down = rows_of(p, jnp.minimum(rows, job.last[0] - 1))
    across = rows_of(d, jnp.minimum(columns, job.last[1] - 1))

    def point(one: PrefillWorkers, other: DecodeWorkers) -> tuple[Number, Number]:
        found = meet(one, other, job)
        values = [
            sign * value_of(metric, found)
            for (metric, _), sign in zip(asked.objectives, signed(asked.objectives), strict=True)
        ]
        excess = [jnp.maximum(jnp.maximum(one.excess, other.excess), found.supply)]
        for i, (metric, op) in enumerate(asked.constraints):
            excess.append(relative_excess(value_of(metric, found), op, target.bounds[i], jnp.where))
        return jnp.stack(values), jnp.stack(excess)

    objectives, excess = jax.vmap(jax.vmap(point, (None, 0)), (0, None))(down, across)
    return sift(objectives, excess, inside, target, asked)


@lru_cache(maxsize=32)
def compiled_pairs(asked: Questions) -> Callable[..., Points]:
    return program(pair_kernel, asked)


__all__ = ["COLUMNS", "METRICS", "ROWS", "Job", "Paired", "compiled_pairs", "meet", "questions", "value_of"]
