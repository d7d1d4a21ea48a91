"""Which pairs of pools are to be met: workers that can be on a front, in blocks of one machine and size each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dse.batches import at_rows
from dse.cost.coefficients import Coefficients
from dse.cost.collectives import Line
from dse.cost.pool_sides import layer_count, link
from dse.cost.types import Load, Topology
from dse.search.kernel import Tables
from dse.search.pairs import COLUMNS, ROWS, Job
from dse.search.pool_workers import (
    DecodeWorkers,
    PrefillWorkers,
    compiled,
    dominant,
    prefill_kernel,
    price_decode,
    price_pool,
)
from dse.space.compile import CompiledSpace
from dse.space.drafts import NONE
from dse.space.pool_space import CompiledPools, draft_names

CUT_BUDGET = "more GPUs than the budget, two KV formats or two draft models"
CUT_PREFILL_MEMORY = "prefill worker does not fit in memory"
CUT_DECODE_MEMORY = "decode worker does not fit in memory"
CUT_DECODE_LIMIT = "decode worker breaks a limit by itself"
CUT_DOMINATED = "prefill worker no better in anything than another"


@dataclass(frozen=True, eq=False)
class Table:
    """Both pools priced, ordered by (machine, GPUs) so that a block has one of each; `order` leads to flat indices."""

    prefill: PrefillWorkers
    decode: DecodeWorkers
    orders: tuple[np.ndarray, np.ndarray]
    groups: tuple[list[tuple[Key, int, int]], list[tuple[Key, int, int]]]


Key = tuple[int, int, float, int]  # machine, GPUs of a worker, KV bytes an element, draft model


@dataclass(frozen=True, eq=False)
class Groups:
    """The group of each point of a pool: `of[i]` is a row of `keys`."""

    keys: tuple[Key, ...]
    of: np.ndarray

    def sizes(self, alive: np.ndarray) -> list[tuple[Key, int]]:
        """How many of the points that are left each group has."""
        counts = np.bincount(self.of[alive], minlength=len(self.keys))
        return [(key, int(n)) for key, n in zip(self.keys, counts, strict=True)]

    def arranged(self, alive: np.ndarray) -> tuple[np.ndarray, list[tuple[Key, int, int]]]:
        """The points that are left, group by group: (order, [(key, first, last)])."""
        kept = np.flatnonzero(alive)
        order = kept[np.argsort(self.of[kept], kind="stable")]
        ends = np.cumsum([n for _, n in self.sizes(alive)]).tolist()
        found = zip(self.keys, [0, *ends[:-1]], ends, strict=True)
        return order, [(key, first, last) for key, first, last in found if last > first]


def _groups(space: CompiledSpace, drafts: list[str], experts: Sequence[tuple[int, int]] = ((0, 1),)) -> Groups:
    """Groups of points x experts, the experts' own GPUs counted. `drafts`: the draft models that the pools know."""
    d, q = space.designs, len(space.operating)
    cache = np.asarray(space.precisions.kv_bytes)[d.precision_index]
    designs = np.repeat(np.stack([d.machine, d.gpus, cache], axis=1).astype(np.float64), q, axis=0)
    points = np.column_stack([designs, [drafts.index(name) for name in draft_names(space)]])
    own = np.array([[0.0, gpus, 0.0, 0.0] for gpus, _ in experts])
    each = (points[:, None, :] + own[None]).reshape(-1, 4)
    keys, of = np.unique(each, axis=0, return_inverse=True)
    return Groups(tuple((int(k[0]), int(k[1]), float(k[2]), int(k[3])) for k in keys), of.ravel())


def arrange(pools: CompiledPools, t: tuple[Tables, Tables], prune: bool) -> tuple[Table, dict[str, int], int]:
    """Both pools priced and sifted; what was cut, in points (pairs x numbers of workers within the budget)."""
    with ThreadPoolExecutor(1) as beside:  # for their programs: both pools take milliseconds
        prefill = beside.submit(_in_double, price_pool, t[0], prefill_kernel)
        d: DecodeWorkers = price_decode(t[1], pools.experts)
        p: PrefillWorkers = prefill.result()
    drafts = [NONE, *(name for name in pools.decode.spec.axes.draft_model if name != NONE)]
    groups = _groups(pools.prefill, drafts), _groups(pools.decode, drafts, pools.experts)
    alive = [np.ones(len(g.of), bool) for g in groups]
    tests: list[tuple[int, str, np.ndarray]] = []
    if prune:
        limit = np.ones(len(groups[1].of), bool)
        for c in pools.constraints:
            if c.metric == "tpot_ms" and c.op == "max":
                limit &= d.tpot * 1e3 <= c.bound
            if c.metric == "tok_s_user" and c.op == "min":
                limit &= 1.0 / d.tpot >= c.bound
        tests = [
            (0, CUT_PREFILL_MEMORY, p.excess <= 0),
            (1, CUT_DECODE_MEMORY, d.excess <= 0),
            (1, CUT_DECODE_LIMIT, limit),
        ]
    cuts: dict[str, int] = {}

    def count() -> tuple[int, int]:
        """Pairs x numbers of workers x transfers, and pairs that at least one number of workers joins."""
        sizes = [g.sizes(a) for g, a in zip(groups, alive, strict=True)]
        joined = [(n * m, len(_ratios(pools, a, b))) for a, n in sizes[0] for b, m in sizes[1]]
        return sum(n * r for n, r in joined) * len(pools.transfers), sum(n for n, r in joined if r)

    everything, (legal, pairs) = math.prod(pools.shape), count()

    def cut(side: int, reason: str, ok: np.ndarray) -> None:
        left = alive[side] & ok
        if left.any() and not left[alive[side]].all():  # where none is left, all stay: the least-violating is asked for
            before, _ = count()
            alive[side] = left
            cuts[reason] = before - count()[0]

    for test in tests:
        cut(*test)
    if prune:
        members = np.flatnonzero(alive[0])
        best = np.zeros(len(alive[0]), bool)
        best[members[dominant(at_rows(p, members), groups[0].of[members])]] = True
        cut(0, CUT_DOMINATED, best)
    arranged = [g.arranged(a) for g, a in zip(groups, alive, strict=True)]
    table = Table(
        prefill=at_rows(p, arranged[0][0]),
        decode=at_rows(d, arranged[1][0]),
        orders=(arranged[0][0], arranged[1][0]),
        groups=(arranged[0][1], arranged[1][1]),
    )
    return table, {CUT_BUDGET: everything - legal, **cuts}, pairs


def _in_double(price: Callable[..., Any], *args: Any) -> Any:
    """The same in this thread, which has a precision of its own."""
    with jax.enable_x64(True):
        return price(*args)


def _ratios(pools: CompiledPools, a: Key, b: Key) -> list[int]:
    """Numbers of workers that may join two groups: one KV format and draft model, within the budget."""
    return [r for r, (p, d) in enumerate(pools.ratios) if a[2:] == b[2:] and p * a[1] + d * b[1] <= pools.budget]


def cached_layers(t: tuple[Tables, Tables]) -> float:
    """Layers whose cache travels: of the one model that pools serve."""
    return float(compiled(layer_count)(at_rows(t[1].architectures, 0)))


def _line_kernel(
    ends: tuple[Topology, Topology], c: tuple[Coefficients, Coefficients], gpus: Any, apart: Any, free: Any
) -> Line:
    return jax.vmap(link)(ends, c, gpus, apart, free)


def lines_between(
    topologies: tuple[Topology, Topology],
    coefficients: tuple[Coefficients, Coefficients],
    wanted: list[tuple[int, int, int, bool, bool]],
) -> list[tuple[float, float]]:
    """(fixed, a byte) of the way between two machines for a deployment's GPUs, each asked for once.

    Of both sides, topologies (machines,) and coefficients (machines, models); `wanted`: machines of both sides, GPUs,
    whether in two clusters, whether transfers are free.
    """
    distinct = list(dict.fromkeys(wanted))
    a, b, gpus, apart, free = (np.array(x) for x in zip(*distinct, strict=True))
    ends = (at_rows(topologies[0], a), at_rows(topologies[1], b))
    c = (at_rows(coefficients[0], (a, 0)), at_rows(coefficients[1], (b, 0)))  # what a link costs is no model's
    found = compiled(_line_kernel)(ends, c, gpus * 1.0, apart * 1.0, free * 1.0)
    known = dict(
        zip(
            distinct,
            zip(np.asarray(found.fixed).tolist(), np.asarray(found.per_byte).tolist(), strict=True),
            strict=True,
        )
    )
    return [known[key] for key in wanted]


def ends(t: tuple[Tables, Tables]) -> tuple[tuple[Topology, Topology], tuple[Coefficients, Coefficients]]:
    """What `lines_between` needs of two pools' tables."""
    return (t[0].topologies, t[1].topologies), (t[0].coefficients, t[1].coefficients)


def jobs(pools: CompiledPools, table: Table, t: tuple[Tables, Tables]) -> list[tuple[Job, int]]:
    """The blocks, each with its (ratio, transfer) code; groups whose workers exceed the budget have none."""
    same = [m.cluster.name for m in pools.prefill.machines], [m.cluster.name for m in pools.decode.machines]
    plan = [
        (a, b, r, k)
        for a in table.groups[0]
        for b in table.groups[1]
        for r in _ratios(pools, a[0], b[0])
        for k in range(len(pools.transfers))
    ]
    if not plan:
        return []
    wanted = [
        (
            *(a[0][0], b[0][0], pools.ratios[r][0] * a[0][1] + pools.ratios[r][1] * b[0][1]),
            *(same[0][a[0][0]] != same[1][b[0][0]], pools.transfers[k] == "free"),
        )
        for a, b, r, k in plan
    ]
    load = Load(isl=float(t[1].isl[0]), osl=float(t[1].osl[0]), concurrency=0.0, chunk=0.0)
    layers = cached_layers(t)
    found = []
    for (a, b, r, k), (fixed, per_byte) in zip(plan, lines_between(*ends(t), wanted), strict=True):
        for row in range(a[1], a[2], ROWS):
            for column in range(b[1], b[2], COLUMNS):
                job = Job(
                    first=(np.int32(row), np.int32(column)),
                    last=(np.int32(a[2]), np.int32(b[2])),
                    workers=(float(pools.ratios[r][0]), float(pools.ratios[r][1])),
                    line=Line(fixed=fixed, per_byte=per_byte),
                    layerwise=float(pools.transfers[k] == "layerwise"),
                    layers=layers,
                    load=load,
                )
                found.append((job, r * len(pools.transfers) + k))
    return found


__all__ = ["Table", "arrange", "cached_layers", "ends", "jobs", "lines_between"]
