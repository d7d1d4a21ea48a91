"""The compiled heart of a sweep: a tile of (designs x operating points) -> objectives, violations, counts.

A flat index is design * Q + operating point. A tile decodes its designs and operating points from the space's tables
inside jit, shards each design once, prices every load on it, and hands back objectives, the violation of each point
and which points the front so far does not already beat. Everything else stays inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from dse.cost.coefficients import Coefficients
from dse.cost.evaluate import Estimate, Scenario, estimate_open, estimate_sharded
from dse.cost.goodput import Demand
from dse.cost.shard import Sharded, shard_scenario
from dse.cost.types import Architecture, Device, Draft, Load, Number, Plan, Precision, Topology, pytree
from dse.programs import EFFORTS, Effort, program, quick
from dse.search.metrics import MARGIN, VALUE, WORST, margins, relative_excess, signed
from dse.search.pareto import spread, staircase
from dse.space.compile import CompiledSpace
from dse.space.metrics import OPEN
from dse.space.tables import draft_rows, plans

TRACES = {"tile": 0, "points": 0}  # a test counts them: one trace a sweep
REFERENCES = 32  # front members a kernel compares with, three or more objectives (or one)
BINS = 1024  # of the first objective, where there are two: one look-up tells the front's second


@dataclass(frozen=True)
class Questions:
    """What is asked of every point: hashable, because it shapes the program."""

    constraints: tuple[tuple[str, str], ...]  # (metric, "max" or "min"), in the order of the funnel
    objectives: tuple[tuple[str, str], ...]  # (metric, "min" or "max")

    @property
    def metrics(self) -> frozenset[str]:
        return frozenset(metric for metric, _ in (*self.constraints, *self.objectives))

    @classmethod
    def of(cls, space: CompiledSpace) -> Questions:
        return cls(
            constraints=tuple((c.metric, c.op) for c in space.constraints),
            objectives=tuple(space.objectives),
        )


@pytree
class Goals:
    """What decides whether a point is kept; changes as the sweep goes. Rows or bins of +inf discard nothing."""

    bounds: Number  # (C,) natural units
    threshold: Number  # signed first objective below which a point is among the best
    references: Number | None  # (REFERENCES, K) members of the front so far, signed to minimise
    stairs: Number | None  # (BINS,) with two objectives: `pareto.staircase`, its start and its bins a unit
    stairs_start: Number | None
    stairs_scale: Number | None


@pytree
class Design:
    """One legal design; the plan's precision is looked up by `precision`."""

    model: Number
    machine: Number
    precision: Number
    utilisation: Number
    plan: Plan
    draft: tuple[Number, Number, Number] | None  # row of the drafts, its TP, 1 where there is one


@pytree
class Tables:
    """A compiled space as device arrays of one float type. Leading axes: models, machines, designs, Q, W."""

    architectures: Architecture
    devices: Device
    topologies: Topology
    coefficients: Coefficients
    precisions: Precision
    drafts: Architecture | None  # None where no design has a draft model
    designs: Design
    loads: Load  # (Q,), workload fields left 0
    isl: Number
    osl: Number
    prefix_hit: Number | None  # None where it is an axis of the loads
    weights: Number
    demand: Demand | None  # None where no metric of an open loop is asked
    designs_count: Number
    loads_count: Number


@pytree
class Points:
    """What comes back of a tile; `shape` is (designs, operating points)."""

    objectives: Number  # (*shape, K) signed to minimise
    violation: Number  # (*shape,) sum of relative excesses over the bounds; 0 is feasible
    keep: Number  # (*shape,) feasible, as far as float32 tells, and not beaten
    sure: Number  # (*shape,) feasible whatever float32 rounds
    passed: Number  # (1 + C,) counts: fits in memory, and meets the first 1, 2, ... constraints


def tables(space: CompiledSpace, coefficients: Coefficients, dtype: Any) -> Tables:
    """The space's tables as arrays. Parts no point uses are None, so that the program has no term for them."""

    def real(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)

    d, o, w, options = space.designs, space.operating, space.workloads, space.spec.options
    everything, drafts = plans(space), draft_rows(space)
    q = len(o)
    load = Load(
        isl=np.zeros(q),
        osl=np.zeros(q),
        prefix_hit=o.prefix_hit,
        concurrency=o.concurrency,
        chunk=o.chunk,
        acceptance=o.acceptance,
        waves=np.full(q, options.waves),
        draft_tokens=o.draft_tokens if o.draft_tokens.any() else None,
        static_batch=o.static_batch if o.static_batch.any() else None,
    )
    kinds = (len(space.machines), len(space.models))
    return Tables(
        architectures=real(space.architectures),
        devices=real(space.devices),
        topologies=real(space.topologies),
        coefficients=real(jax.tree.map(lambda leaf: np.broadcast_to(leaf, kinds), coefficients)),
        precisions=real(space.precisions),
        drafts=None if space.drafts is None else real(space.drafts),
        designs=Design(
            model=d.model.astype(np.int32),
            machine=d.machine.astype(np.int32),
            precision=d.precision_index.astype(np.int32),
            utilisation=np.asarray(d.utilisation, dtype),
            plan=real(replace(everything, precision=cast(Any, None))),  # `scenarios` looks it up
            draft=None if drafts is None else (drafts[0].astype(np.int32), *real(drafts[1:])),
        ),
        loads=real(load),
        isl=np.asarray(w.isl, dtype),
        osl=np.asarray(w.osl, dtype),
        prefix_hit=np.asarray(w.prefix_hit, dtype) if space.spec.axes.prefix_hit is None else None,
        weights=np.asarray(w.weight, dtype),
        demand=None if w.demand is None or not Questions.of(space).metrics & set(OPEN) else real(w.demand),
        designs_count=np.int32(len(d)),
        loads_count=np.int32(q),
    )


def goals(space: CompiledSpace, dtype: Any, front: np.ndarray | None = None, threshold: float = np.inf) -> Goals:
    """Goals that discard what `front` (n, K) beats."""
    bounds = np.array([c.bound for c in space.constraints], dtype)
    limit = np.asarray(threshold, dtype)
    if len(space.objectives) == 2:
        table, start, scale = np.full(BINS, np.inf), 0.0, 0.0
        if front is not None and len(front):
            table, start, scale = staircase(front, np.array(margins(space.objectives)), BINS)
        numbers = (np.asarray(x, dtype) for x in (table, start, scale))
        return Goals(
            bounds=bounds,
            threshold=limit,
            references=None,
            **dict(zip(("stairs", "stairs_start", "stairs_scale"), numbers, strict=True)),
        )
    padded = np.full((REFERENCES, len(space.objectives)), np.inf, dtype)
    if front is not None and len(front):
        some = front[spread(front, REFERENCES)]
        padded[: len(some)] = some
    return Goals(bounds=bounds, threshold=limit, references=padded, stairs=None, stairs_start=None, stairs_scale=None)


def rows_of(table: Any, *index: Number) -> Any:
    """Rows of every leaf by one or more integer vectors (n,), which index its leading axes and are all in range.

    One gather a leaf, before any `vmap`: indexing leaf by leaf inside it traces for longer than the model.
    """
    where, d = jnp.stack(index, axis=-1), len(index)

    def take(leaf: Number) -> Number:
        dims = jax.lax.GatherDimensionNumbers(
            offset_dims=tuple(range(1, 1 + leaf.ndim - d)),
            collapsed_slice_dims=tuple(range(d)),
            start_index_map=tuple(range(d)),
        )
        sizes = (*[1] * d, *leaf.shape[d:])
        return jax.lax.gather(leaf, where, dims, sizes, mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)

    return jax.tree.map(take, table)


def scenarios(t: Tables, rows: Number) -> Scenario:
    """Designs (n,) with their row of every table: leaves (n,), the load left out."""
    design = rows_of(t.designs, rows)
    plan = replace(design.plan, precision=rows_of(t.precisions, design.precision))
    if design.draft is not None:
        row, tp, present = design.draft
        plan = replace(plan, draft=Draft(architecture=rows_of(t.drafts, row), tp=tp, present=present))
    coefficients = rows_of(t.coefficients, design.machine, design.model)
    return Scenario(
        architecture=rows_of(t.architectures, design.model),
        device=rows_of(t.devices, design.machine),
        topology=rows_of(t.topologies, design.machine),
        plan=plan,
        load=None,  # type: ignore[arg-type]
        coefficients=replace(coefficients, utilisation=design.utilisation),
    )


def price(t: Tables, x: Scenario, sharded: Sharded, load: Load, asked: Questions) -> Estimate:
    """Estimate of one design and operating point for every workload of the mix: leaves (W,)."""

    def one(isl: Number, osl: Number, prefix_hit: Number | None, demand: Demand | None) -> Estimate:
        hit = load.prefix_hit if prefix_hit is None else prefix_hit
        full = replace(x, load=replace(load, isl=isl, osl=osl, prefix_hit=hit))
        if demand is None:
            return estimate_sharded(full, sharded)
        return estimate_open(full, sharded, demand, best="goodput_req_s_gpu" in asked.metrics)

    return jax.vmap(one)(t.isl, t.osl, t.prefix_hit, t.demand)


def judge(estimate: Estimate, weights: Number, bounds: Number, asked: Questions) -> tuple[Number, Number]:
    """Signed objectives (list of K) and relative excesses (list of 1 + C, memory first) of one point.

    Objectives are means over the mix of workloads by weight (memory: the most demanding one's); a constraint must hold
    for every workload of it.
    """
    objectives = [
        sign * (jnp.max(VALUE[metric](estimate)) if metric in WORST else jnp.sum(VALUE[metric](estimate) * weights))
        for (metric, _), sign in zip(asked.objectives, signed(asked.objectives), strict=True)
    ]
    excess = [jnp.max(estimate.memory.total / estimate.memory.usable) - 1.0]
    for i, (metric, op) in enumerate(asked.constraints):
        excess.append(jnp.max(relative_excess(VALUE[metric](estimate), op, bounds[i], jnp.where)))
    return jnp.stack(objectives), jnp.stack(excess)


def slack(asked: Questions) -> list[float]:
    """Excess that float32 rounding may cause, let through to the float64 recheck."""
    return [MARGIN["memory_gib"], *(MARGIN[metric] for metric, _ in asked.constraints)]


def tile_kernel(
    asked: Questions, designs: int, points: int, t: Tables, first_design: Number, first_point: Number, target: Goals
) -> Points:
    """Price `designs` x `points` from (first_design, first_point) on; what lies past the end is masked."""
    TRACES["tile"] += 1
    rows = first_design + jnp.arange(designs, dtype=jnp.int32)
    columns = first_point + jnp.arange(points, dtype=jnp.int32)
    inside = (rows < t.designs_count)[:, None] & (columns < t.loads_count)[None, :]
    x = scenarios(t, jnp.minimum(rows, t.designs_count - 1))
    load = rows_of(t.loads, jnp.minimum(columns, t.loads_count - 1))
    # Without the barriers XLA fuses a design's own numbers into each of its points, and the model into each output.
    x, sharded = jax.lax.optimization_barrier((x, jax.vmap(shard_scenario)(x)))

    def point(x: Scenario, s: Sharded, one: Load) -> tuple[Number, Number]:
        return judge(price(t, x, s, one, asked), t.weights, target.bounds, asked)

    objectives, excess = jax.vmap(jax.vmap(point, (None, None, 0)), (0, 0, None))(x, sharded, load)
    objectives, excess = jax.lax.optimization_barrier((objectives, excess))
    return sift(objectives, excess, inside, target, asked)


def sift(objectives: Number, excess: Number, inside: Number, target: Goals, asked: Questions) -> Points:
    """Violations, the kept points, and the funnel's counts (dominance as in `pareto.dominated_by`)."""
    allowed = slack(asked)
    so_far = sure = counted = inside
    passed = []
    violation: Number = 0.0
    for i, limit in enumerate(allowed):
        over = excess[..., i]
        within = over <= limit
        so_far, sure, counted = so_far & within, sure & (over <= -limit), counted & (over <= 0.0)
        passed.append(jnp.sum(counted.astype(jnp.int32)))
        violation = violation + jnp.where(within, 0.0, over)
    beaten = _beaten(objectives, target, margins(asked.objectives))
    return Points(
        objectives=objectives,
        violation=jnp.where(inside, violation, jnp.inf),
        keep=so_far & (~beaten | (objectives[..., 0] <= target.threshold)),
        sure=sure,
        passed=jnp.stack(passed),
    )


def _beaten(objectives: Number, target: Goals, margin: list[float]) -> Number:
    """Points that the front so far beats by the margin (never too many: what is left goes to the host)."""
    if target.stairs is not None:
        first, second = objectives[..., 0], objectives[..., 1]
        place = jnp.clip((first - target.stairs_start) * target.stairs_scale, 0.0, BINS - 1.0)
        # One bin back: rounding may put a point one bin too far.
        best = target.stairs[jnp.maximum(place.astype(jnp.int32) - 1, 0)]
        return (second > best + margin[1] * jnp.abs(best)) | (second == best)
    references = jnp.asarray(target.references)
    beaten = jnp.zeros(objectives.shape[:-1], bool)
    for r in range(REFERENCES):
        no_better, better = jnp.ones(beaten.shape, bool), jnp.zeros(beaten.shape, bool)
        for k, m in enumerate(margin):
            reference, value = references[r, k], objectives[..., k]
            worse = value > reference + m * jnp.abs(reference)
            no_better, better = no_better & (worse | (value == reference)), better | worse
        beaten = beaten | (no_better & better)
    return beaten


def point_kernel(asked: Questions, t: Tables, rows: Number, columns: Number, bounds: Number) -> Any:
    """The same, point by point, for lists of designs and operating points: (Estimate, objectives, excess)."""
    TRACES["points"] += 1

    def one(x: Scenario, load: Load) -> Any:
        estimate = price(t, x, shard_scenario(x), load, asked)
        objectives, excess = judge(estimate, t.weights, bounds, asked)
        return estimate, objectives, excess

    return jax.vmap(one)(scenarios(t, rows), rows_of(t.loads, columns))


@lru_cache(maxsize=32)
def compiled_tile(asked: Questions, designs: int, points: int, effort: Effort = "full") -> Callable[..., Points]:
    """The kernel of a sweep. A small one is over before an optimised program would be compiled."""
    return program(tile_kernel, asked, designs, points, options=EFFORTS[effort])


@lru_cache(maxsize=32)
def compiled_points(asked: Questions) -> Callable[..., Any]:
    return quick(point_kernel, asked)
