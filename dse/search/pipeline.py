"""The search of a pipeline: every stage's plans priced by themselves, then all pools met exactly, rate by rate.

At a given rate (requests/s) what a pool adds to a request does not depend on the other pools, but for the transfer
between two of them. So TTFT, E2E, GPUs and USD are sums over pools, and pools are folded one after the other. Of
partial pipelines with the same ends (machine, GPUs of a replica, cache format), one that is no better in any sum that
is asked for can be on no front, whatever follows: it is left out (`prune`). Percentiles of TTFT are those of its
cumulants, which are sums too (stages independent), and rise with each of them (`pipeline_tails`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np

from dse.batches import at_rows
from dse.cost.coefficients import Coefficients
from dse.cost.evaluate import Scenario
from dse.cost.pipeline import Batched, Continuous, Load, Part, batched_part, pool_load, running, slowed
from dse.cost.pipeline_open import Aggregated
from dse.cost.pipeline_tails import Cumulants, of_some, of_wait, together
from dse.cost.types import replace
from dse.programs import program
from dse.search.pipeline_open import aggregated_at
from dse.search.pipeline_stages import Priced
from dse.search.pipeline_tails import cumulants
from dse.search.pool_blocks import lines_between
from dse.space.pipeline import DELAYS, PipelineSpec, StageSpec
from dse.space.pipeline_calls import answer
from dse.space.pipeline_compile import CompiledPipeline
from dse.units import MS

Array = np.ndarray
# Of a (partial) pipeline: TTFT (s), all waits and times (s), TPOT (s), cumulants of TTFT and of TPOT (s^2, s^3), GPUs,
# USD an hour. One stage has a TPOT, so that what it says is the pipeline's.
SUMS = ("ttft", "total", "tpot", "variance", "third", "tpot_variance", "tpot_third", "gpus", "usd")
ADDED = 7  # of them depend on the rate
OF_TPOT = ("tpot", "tpot_variance", "tpot_third")
GPUS = SUMS.index("gpus")


@dataclass(frozen=True, eq=False)
class Pool:
    """The options of a pool, leaves (N,); `at` has the rates as the first axis, (R, N)."""

    stages: tuple[StageSpec, ...]
    design: Array  # (N, stages) rows of the stages' designs
    replicas: Array
    gpus: Array
    usd: Array
    memory: Array  # bytes a GPU
    ends: Array  # (N, 3 + stages): machine, GPUs of a replica, bytes of a cached element, bytes each stage hands on
    at: dict[str, Array]  # the first of SUMS, utilisation, stable, and a stage's wait and time: `wait 0`


# ------------------------------------------------------------------------------------------------- pools at rates


def _load_kernel(rate: Any, stages: tuple[Batched, ...], replicas: Any) -> tuple[Load, Any]:
    load = pool_load(rate, stages, replicas)
    return load, slowed(load)


def _pool_kernel(
    shares: tuple[float, ...],
    skewness: tuple[float, ...],
    rate: Any,
    load: Load,
    stages: tuple[Batched | Continuous | Part, ...],
    replicas: Any,
) -> dict[str, Any]:
    """What a pool adds to a request; of an aggregated language model its part is known.

    The variance and third moment of TTFT are without what follows amounts in common, of that `skewness`: `slope 0`, ...

    It loses the time of the batched stages and waits for what they run; they wait out its iteration.
    """
    lone = [s for s in stages if isinstance(s, Part)]
    iteration = lone[0].tpot if lone else 0.0 * load.wait
    found: dict[str, Any] = {"utilisation": load.utilisation, "stable": load.stable}
    filled, parts = iter(load.filled), []
    for s, share in zip(stages, shares, strict=True):
        if isinstance(s, Batched):
            parts.append(batched_part(s, load, next(filled), share, iteration))
        elif isinstance(s, Part):
            wait = s.wait + load.wait
            before = of_wait(load.wait, load.delayed, load.scv)
            parts.append(replace(s, wait=wait, total=s.total + s.calls * load.wait, ttft=s.ttft + before))
        else:
            run = running(s, rate, replicas)
            found |= {"utilisation": run.utilisation, "stable": run.stable}
            parts.append(run.part)
    for i, part in enumerate(parts):
        found[f"wait {i}"], found[f"time {i}"] = part.wait, part.first
    none = (0.0,) * len(skewness)
    alone = [together(x.ttft, x.slopes or none, skewness, -1.0) for x in parts]
    ttft = sum(alone[1:], start=alone[0])
    for i in range(len(skewness)):
        found[f"slope {i}"] = sum(((x.slopes or none)[i] for x in parts), start=0.0 * load.wait)
    sums = {name: sum(getattr(x, name) for x in parts) for name in ("total", *OF_TPOT)}
    return found | sums | {"ttft": ttft.mean, "variance": ttft.variance, "third": ttft.third}


@cache
def _compiled(kernel: Any, *static: Any) -> Any:
    return program(kernel, *static)


def pools_at(p: CompiledPipeline, c: Coefficients, priced: dict[str, Priced]) -> list[Pool]:
    """Every pool's options (designs of its stages on one plan, times replicas) within the budget, at every rate."""
    return [_pool(p, c, stages, [priced[s.name] for s in stages]) for stages in p.spec.pools]


def _pool(p: CompiledPipeline, c: Coefficients, stages: tuple[StageSpec, ...], priced: list[Priced]) -> Pool:
    owner = stages[0]
    of_place: dict[Any, list[list[int]]] = {}
    for i, s in enumerate(stages):
        for row, d in enumerate(p.designs[s.name]):
            of_place.setdefault(d.place, [[] for _ in stages])[i].append(row)
    chosen = np.array([x for rows in of_place.values() for x in itertools.product(*rows)], np.int64)
    first = [p.designs[owner.name][i] for i in chosen[:, 0]]
    machine, lanes = np.array([d.machine for d in first]), np.array([d.gpus for d in first], float)
    holders = np.array([d.holders for d in first], float)
    each = [x.held[chosen[:, i]] - (x.reserve[chosen[:, i]] if i else 0.0) for i, x in enumerate(priced)]
    held = np.sum(each, axis=0)
    if owner.host is not None:
        price_of, gpus, fits = np.full(len(first), owner.host.usd_per_hour), 0.0 * lanes, np.ones(len(first), bool)
    else:
        price_of, gpus = np.asarray(p.devices.price)[machine], lanes
        fits = held <= np.asarray(p.devices.capacity)[machine] * np.asarray(c.utilisation)[machine, 0]
    row, copies = (x.ravel() for x in np.meshgrid(np.arange(len(chosen)), np.array(owner.replicas), indexing="ij"))
    keep = fits[row] & (gpus[row] * copies <= p.spec.gpus)
    row, copies = row[keep], copies[keep].astype(float)
    design = chosen[row]
    cached = np.max([x.cache[design[:, i]] for i, x in enumerate(priced)], axis=0)
    handed = [x.handed[design[:, i]] for i, x in enumerate(priced)]
    ends = np.stack([machine[row], holders[row], cached, *handed], axis=1)
    at = _at_rates(p, stages, [at_rows(x.times, design[:, i]) for i, x in enumerate(priced)], priced, design, copies)
    usd = price_of[row] * lanes[row] * copies
    return Pool(stages, design, copies, gpus[row] * copies, usd, held[row], ends, at)


def _at_rates(
    p: CompiledPipeline,
    stages: tuple[StageSpec, ...],
    times: list[Any],
    priced: list[Priced],
    design: Array,
    copies: Array,
) -> dict[str, Array]:
    """Every option at every rate, (R, N)."""
    shape = len(p.spec.rates), len(copies)
    if not len(copies):
        names = (*SUMS[:ADDED], *slopes(p), "utilisation", "stable")
        return {name: np.zeros(shape) for name in names}
    rates = np.array(p.spec.rates)[:, None]
    batched = tuple(x for x in times if isinstance(x, Batched))
    load, slower = jax.tree.map(
        lambda x: np.broadcast_to(np.asarray(x), shape), _compiled(_load_kernel)(rates, batched, copies)
    )
    known: dict[str, Array] = {}
    for i, (s, x) in enumerate(zip(stages, priced, strict=True)):
        if isinstance(x.times, Scenario):
            calls = p.kinds[s.name].calls
            each = rates * calls / copies * slower
            found = aggregated_at(p, x.times, s, design[:, i], each)
            written = answer(p.spec, s) if s.writes else (1.0, 0.0)
            times[i] = _part(found, slower, calls, p.kinds[s.name].share, written)
            beside = np.asarray(load.utilisation)
            known = {
                "utilisation": beside + (1.0 - beside) * each / found.capacity,
                "stable": found.stable & np.asarray(load.stable),
            } | (dict.fromkeys(OF_TPOT, np.zeros(shape)) if s.writes else {})
    shares = tuple(float(p.kinds[s.name].share) for s in stages)
    skewness = tuple(float(x.skewness) for x in p.commons)
    at = _compiled(_pool_kernel, shares, skewness)(rates, load, tuple(times), copies)
    return {k: np.broadcast_to(np.asarray(v), shape) for k, v in {**at, **known}.items()}


def _part(x: Aggregated, slower: Array, calls: float, share: float, written: tuple[float, float]) -> Part:
    """Of an aggregated language model that a `share` of the requests calls, all `slower` by what shares its pool.

    `written`: tokens (mean, coefficient of variation) that the next stage waits for, the first among them; those of a
    lognormal answer have the third moment mean^3 cv^4 (3 + cv^2). Answers vary, their TPOT does not.
    """
    mean, p90, p99 = (np.asarray(t) * slower for t in (x.first, x.first_p90, x.first_p99))
    variance, third = cumulants(mean, p90, p99)
    tpot, slow, slowest = (np.asarray(t) * slower for t in (x.tpot, x.tpot_p90, x.tpot_p99))
    spread = cumulants(tpot, slow, slowest)
    wait, (tokens, cv) = np.asarray(x.wait) * slower, written
    rest, whole = (tokens - 1.0) * tpot, tokens * tpot
    return Part(
        wait=wait,
        first=mean - wait + rest,
        total=calls * (np.asarray(x.ttft) * slower + rest),
        ttft=of_some(
            Cumulants(
                mean=mean + rest, variance=variance + (cv * whole) ** 2, third=third + whole**3 * cv**4 * (3.0 + cv**2)
            ),
            share,
        ),
        calls=calls,
        tpot=tpot,
        tpot_variance=spread[0],
        tpot_third=spread[1],
    )


# ------------------------------------------------------------------------------------------------ pools together


@dataclass(frozen=True)
class Edge:
    """A hand-over of a stage (the `slot`-th of its pool) to another pool: share of requests, calls a request.

    `caches`: both ends must keep the cache in one format.
    """

    stage: str
    slot: int
    caches: bool
    source: int
    target: int
    share: float
    calls: float


def edges(p: CompiledPipeline) -> list[Edge]:
    """Between neighbours that run on GPUs of different pools, and hand something on."""
    of = {s.name: (i, k) for i, stages in enumerate(p.spec.pools) for k, s in enumerate(stages)}
    staged = [s for s in p.spec.pipeline if s.kind not in DELAYS]
    found = []
    for a, b in itertools.pairwise(staged):
        (source, slot), (target, _) = of[a.name], of[b.name]
        if source != target and a.kind != "retrieval" and a.host is None and b.host is None:
            k = p.kinds[a.name]
            found.append(Edge(a.name, slot, a.kind == "prefill", source, target, k.share, k.calls))
    return found


Ways = dict[tuple[int, int], tuple[float, float]]


def lines(p: CompiledPipeline, c: Coefficients) -> Ways:
    """(fixed, a byte) between two machines, by the slowest level that a deployment of the whole budget spans."""
    clusters = [m.cluster.name for m in p.machines]
    machines = range(len(clusters))
    pairs = list(itertools.product(machines, machines))
    free = p.spec.transfers == "free"
    wanted = [(a, b, p.spec.gpus, clusters[a] != clusters[b], free) for a, b in pairs]
    return dict(zip(pairs, lines_between((p.topologies,) * 2, (c, c), wanted), strict=True))


def transfer(e: Edge, ways: Ways, source: Array, target: Array) -> float:
    """Seconds of a hand-over between two ends: all GPUs of the smaller replica send or take in at once."""
    fixed, per_byte = ways[int(source[0]), int(target[0])]
    handed = source[3 + e.slot]
    return float(fixed + per_byte * handed / min(source[1], target[1])) if handed > 0 else 0.0


def delays(spec: PipelineSpec) -> tuple[float, float]:
    """(seconds before the first token, seconds of the whole request) that no queue is part of."""
    turns = spec.loop.turns
    each = [(s.time_ms * MS, turns if s.every_turn else 1) for s in spec.pipeline if s.kind in DELAYS]
    tools = (turns - 1) * spec.loop.tool_latency_ms * MS
    return sum(t for t, _ in each), sum(t * n for t, n in each) + tools


def slopes(p: CompiledPipeline) -> tuple[str, ...]:
    """The sums behind SUMS: of each amount that several stages see, what TTFT grows by (s a standard deviation)."""
    return tuple(f"slope {i}" for i in range(len(p.commons)))


def asked(p: CompiledPipeline) -> tuple[int, ...]:
    """Positions among the sums that an objective or a limit depends on. GPUs always: the budget."""
    spec = p.spec
    names = {name for name, _ in spec.objectives} | set(spec.constraints)
    needs = {"gpus"}
    needs |= {"usd"} if names & {"usd_per_request", "usd_per_mtok"} else set()
    needs |= {"ttft"} if names & {"ttft_ms", "ttft_p90_ms", "ttft_p99_ms"} else set()
    needs |= {"variance", "third", *slopes(p)} if names & {"ttft_p90_ms", "ttft_p99_ms"} else set()
    needs |= {"tpot"} if names & {"tpot_ms", "e2e_ms"} else set()
    needs |= set(OF_TPOT) if names & {"tpot_p90_ms", "tpot_p99_ms"} else set()
    needs |= {"total"} if "e2e_ms" in names else set()
    return tuple(i for i, name in enumerate((*SUMS, *slopes(p))) if name in needs)


def _best(values: Array, dims: tuple[int, ...]) -> Array:
    """Positions that no other row beats or equals; of equal rows the first."""
    import moocore

    if len(values) < 2:
        return np.arange(len(values))
    columns = np.ascontiguousarray(values[:, dims], float)
    if len(dims) == 1:
        return np.array([int(np.argmin(columns[:, 0]))])
    return np.flatnonzero(moocore.is_nondominated(columns, keep_weakly=False))


@dataclass(frozen=True)
class Met:
    """Whole pipelines at one rate: options by pool (n, pools), and their SUMS and `slopes`."""

    options: Array
    sums: Array


def meet(p: CompiledPipeline, pools: list[Pool], r: int, ways: Ways, prune: bool = True) -> Met:
    """All pipelines at rate `r` within the budget, every pool stable, but for those that can be on no front."""
    joins, dims, more_sums = edges(p), asked(p), slopes(p)
    width = len(SUMS) + len(more_sums)
    start = np.zeros((1, width))
    start[0, :2] = delays(p.spec)
    partial: list[tuple[Array, Array]] = [(np.zeros((1, 0), np.int64), start)]  # alike in their ends
    for i, pool in enumerate(pools):
        stable = np.flatnonzero(pool.at["stable"][r])
        adds = np.stack(
            [
                *(pool.at[name][r, stable] for name in SUMS[:ADDED]),
                *(pool.gpus[stable], pool.usd[stable]),
                *(pool.at[name][r, stable] for name in more_sums),
            ],
            axis=1,
        )
        groups: dict[Any, tuple[Array, Array]] = {}
        alike, of = np.unique(pool.ends[stable], axis=0, return_inverse=True)
        for (options, sums), e in itertools.product(partial, range(len(alike))):
            members = np.flatnonzero(of.ravel() == e)
            members = members[_best(adds[members], dims)] if prune else members
            more = _hand_over(pools, options[0], i, alike[e], joins, ways)
            if more is None or not len(members):
                continue
            total = (sums[:, None] + adds[members][None]).reshape(-1, width)
            total[:, :2] += more
            names = np.column_stack([np.repeat(options, len(members), 0), np.tile(stable[members], len(options))])
            keep = total[:, GPUS] <= p.spec.gpus
            key = _open_ends(pools, names[0], i, joins)
            a, b = groups.get(key, (names[:0], total[:0]))
            groups[key] = np.concatenate([a, names[keep]]), np.concatenate([b, total[keep]])
        partial = []
        for options, sums in groups.values():
            if len(options):
                kept = _best(sums, dims) if prune else np.arange(len(options))
                partial.append((options[kept], sums[kept]))
    if not partial:
        return Met(np.zeros((0, len(pools)), np.int64), np.zeros((0, width)))
    return Met(*(np.concatenate(x) for x in zip(*partial, strict=True)))


def _hand_over(
    pools: list[Pool], options: Array, i: int, end: Array, joins: list[Edge], ways: Any
) -> tuple[float, float] | None:
    """What joining pool `i` adds to (TTFT, whole request); None where two caches differ."""
    first = whole = 0.0
    for e in joins:
        if max(e.source, e.target) != i:
            continue
        other = pools[min(e.source, e.target)].ends[options[min(e.source, e.target)]]
        a, b = (other, end) if e.source < e.target else (end, other)
        if e.caches and a[2] != b[2]:
            return None
        t = transfer(e, ways, a, b)
        first, whole = first + e.share * t, whole + e.calls * t
    return first, whole


def _open_ends(pools: list[Pool], options: Array, i: int, joins: list[Edge]) -> Any:
    """The ends that later pools will still meet."""
    left = {min(e.source, e.target) for e in joins if max(e.source, e.target) > i}
    return tuple((q, *pools[q].ends[options[q]].tolist()) for q in sorted(left) if q <= i)


__all__ = ["Edge", "Met", "Pool", "asked", "delays", "edges", "lines", "meet", "pools_at", "transfer"]
