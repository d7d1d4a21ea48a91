"""The kept pairs priced again as `dse estimate` prices them, with all its columns."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pandas as pd

from dse.batches import at_rows, in_blocks
from dse.cost.coefficients import Coefficients
from dse.cost.collectives import Line
from dse.cost.pools import Split, SplitEstimate, Transfer, estimate_split_one
from dse.cost.types import Load, Number
from dse.search.kernel import Questions, Tables, rows_of, scenarios, tables
from dse.search.metrics import signed
from dse.search.pairs import Job, Paired, meet, questions, value_of
from dse.search.pool_blocks import Table, arrange, cached_layers, ends, lines_between
from dse.search.pool_workers import DecodeWorkers, PrefillWorkers, compiled, drafting, experts_side, loaded
from dse.space.pool_space import CompiledPools, describe_pairs, unravel
from dse.space.pools import split_columns

RECHECKED = 256  # rows a call: one shape, one compilation


def _exact_kernel(
    t: tuple[Tables, Tables],
    points: tuple[tuple[Number, Number], tuple[Number, Number]],
    users: Number,
    workers: tuple[Number, Number],
    transfer: Transfer,
    apart: Number,
    experts: tuple[Number, Number] | None,
) -> SplitEstimate:
    """Pairs as `dse estimate` prices them, by their requests in flight."""
    sides = []
    for table, (rows, columns) in zip(t, points, strict=True):
        load = jax.vmap(partial(loaded, table))(rows_of(table.loads, columns))
        x = jax.vmap(drafting)(replace(scenarios(table, rows), load=load))
        sides.append(replace(x, load=replace(load, concurrency=users)))
    return jax.vmap(estimate_split_one)(
        Split(
            prefill=sides[0],
            decode=sides[1],
            prefill_workers=workers[0],
            decode_workers=workers[1],
            transfer=transfer,
            ffn=None if experts is None else experts_side(sides[1], experts[0]),
            micro_batches=None if experts is None else experts[1],
            apart=apart,
        )
    )


def _users_kernel(p: PrefillWorkers, d: DecodeWorkers, job: Job) -> Paired:
    return jax.vmap(meet)(p, d, job)


def recheck_pairs(
    pools: CompiledPools, t: tuple[Tables, Tables], table: Table, flat: np.ndarray, asked: Questions
) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows of some pairs with all of estimate's columns, and their objectives as `meet` has them."""
    k = len(asked.objectives)
    if not len(flat):
        return pd.DataFrame(), np.zeros((0, k))
    prefill, decode, ratio, transfer = unravel(pools, flat)
    users, values = _users(pools, t, table, (prefill, decode, ratio, transfer), asked)
    exact = _exact(pools, t, (prefill, decode, ratio, transfer), users)
    described = describe_pairs(pools, flat)
    priced = split_columns(exact)
    fresh = {name: value for name, value in priced.items() if name not in described}
    frame = pd.concat([described.assign(concurrency=users), pd.DataFrame(fresh)], axis=1)
    return frame, values


def _exact(
    pools: CompiledPools, t: tuple[Tables, Tables], pair: tuple[np.ndarray, ...], users: np.ndarray
) -> SplitEstimate:
    """Some pairs (prefill points, decode points, ratios, transfers) as `dse estimate` prices them."""
    prefill, decode, ratio, transfer = pair
    workers = np.array(pools.ratios, np.float64)[ratio]
    names = np.array(pools.transfers)[transfer]
    point, own = np.divmod(decode, len(pools.experts))
    points = tuple(np.divmod(x, len(s.operating)) for x, s in ((prefill, pools.prefill), (point, pools.decode)))
    clusters = [
        np.array([m.cluster.name for m in s.machines], dtype=object)[s.designs.machine[rows]]
        for s, (rows, _) in zip((pools.prefill, pools.decode), points, strict=True)
    ]
    batch = (
        jax.tree.map(lambda x: x.astype(np.int32), points),
        users,
        (workers[:, 0], workers[:, 1]),
        Transfer(layerwise=(names == "layerwise") * 1.0, first_step=np.zeros(len(users)), free=(names == "free") * 1.0),
        (clusters[0] != clusters[1]) * 1.0,
    )
    chosen = np.array(pools.experts, np.float64)[own]
    places, parts = [], []
    for split, where in ((False, np.flatnonzero(chosen[:, 0] == 0)), (True, np.flatnonzero(chosen[:, 0] > 0))):
        for start in range(0, len(where), RECHECKED):
            some = where[start : start + RECHECKED]
            index = np.resize(some, RECHECKED)
            experts = (chosen[index, 0], chosen[index, 1]) if split else None
            part = compiled(_exact_kernel)(t, *at_rows(batch, index), experts)
            places.append(some)
            parts.append(at_rows(part, slice(len(some))))
    back = np.argsort(np.concatenate(places))
    exact: SplitEstimate = jax.tree.map(lambda *leaves: np.concatenate(leaves)[back], *parts)
    return exact


def recheck_first(pools: CompiledPools, c: tuple[Coefficients, Coefficients]) -> None:
    """Price the first pair for its program's sake, beside other work."""
    first = np.zeros(1, np.int64)
    with jax.enable_x64(True):
        t = (tables(pools.prefill, c[0], np.float64), tables(pools.decode, c[1], np.float64))
        _exact(pools, t, (first, first, first, first), np.ones(1))


def recheck_flat(
    pools: CompiledPools, c: tuple[Coefficients, Coefficients], flat: np.ndarray
) -> tuple[pd.DataFrame, np.ndarray]:
    """The same for any pairs of a space."""
    with jax.enable_x64(True):
        t = (tables(pools.prefill, c[0], np.float64), tables(pools.decode, c[1], np.float64))
        table, _, _ = arrange(pools, t, prune=False)
        return recheck_pairs(pools, t, table, flat, questions(pools))


def _users(
    pools: CompiledPools, t: tuple[Tables, Tables], table: Table, pair: tuple[np.ndarray, ...], asked: Questions
) -> tuple[np.ndarray, np.ndarray]:
    """Requests in flight and signed objectives of some pairs, point by point."""
    place = [np.argsort(order) for order in table.orders]
    at = [
        place[i][np.searchsorted(table.orders[i], pair[i], sorter=place[i])] for i in range(2)
    ]  # positions in the arranged tables
    sides = at_rows(table.prefill, at[0]), at_rows(table.decode, at[1])
    machine = [
        s.designs.machine[pair[i] // (len(s.operating) * own)].tolist()
        for i, (s, own) in enumerate(((pools.prefill, 1), (pools.decode, len(pools.experts))))
    ]
    clusters = [m.cluster.name for m in pools.prefill.machines], [m.cluster.name for m in pools.decode.machines]
    workers = np.array(pools.ratios, np.float64)[pair[2]]
    gpus = (workers[:, 0] * sides[0].side.gpus + workers[:, 1] * sides[1].side.gpus).astype(int).tolist()
    names = [pools.transfers[k] for k in pair[3]]
    wanted = [
        (a, b, g, clusters[0][a] != clusters[1][b], name == "free")
        for a, b, g, name in zip(*machine, gpus, names, strict=True)
    ]
    fixed, per_byte = np.array(lines_between(*ends(t), wanted)).T
    n = np.ones(len(workers))
    job = Job(
        first=(n, n),
        last=(n, n),
        workers=(workers[:, 0], workers[:, 1]),
        line=Line(fixed=fixed, per_byte=per_byte),
        layerwise=np.array([float(name == "layerwise") for name in names]),
        layers=n * cached_layers(t),
        load=Load(isl=n * t[1].isl[0], osl=n * t[1].osl[0], concurrency=n, chunk=n),
    )
    each = jax.tree.map(lambda leaf: np.broadcast_to(leaf, len(n)), (*sides, job))
    found = in_blocks(compiled(_users_kernel), *each)
    values = [
        sign * value_of(metric, found)
        for (metric, _), sign in zip(asked.objectives, signed(asked.objectives), strict=True)
    ]
    return found.concurrency, np.stack(values, axis=1)


__all__ = ["recheck_first", "recheck_flat", "recheck_pairs"]
