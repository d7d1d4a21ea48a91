"""Pools and undivided serving as one result: one front, and whether splitting pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dse.cost.coefficients import Coefficients
from dse.errors import InputError
from dse.search.metrics import relative_excess, signed
from dse.search.pareto import foremost, on_front
from dse.search.pool_recheck import recheck_flat
from dse.search.pools import Met, pair_all
from dse.search.recheck import rounded
from dse.search.result import Binding, SearchResult, funnel_of, provenance
from dse.space.pool_space import CompiledPools

SPLIT, WHOLE = "disaggregated", "aggregated"


def search_pools(pools: CompiledPools, c: tuple[Coefficients, Coefficients], best: int) -> SearchResult:
    """Every pair of workers and every number of them within the budget. Raises InputError where none can be joined."""
    met, rows, values = pair_all(pools, c, best)
    if not met.evaluated and not met.partial:
        raise InputError(
            f"{pools.spec.where}: disaggregated: no prefill worker and decode worker can be joined: none keep the KV"
            f" cache in one format within {pools.budget} GPUs; give both pools the same kv, smaller gpus, fewer workers"
        )
    return _result(pools, c, met, rows, values, best)


def _result(
    pools: CompiledPools,
    c: tuple[Coefficients, Coefficients],
    met: Met,
    rows: pd.DataFrame,
    values: np.ndarray,
    best: int,
) -> SearchResult:
    ok = np.ones(len(rows), bool)
    if len(rows):
        broken = [relative_excess(rows[x.metric].to_numpy(float), x.op, x.bound) > 1e-12 for x in pools.constraints]
        ok = rows["feasible"].to_numpy(bool) & ~np.any([~ok, *broken], axis=0)
    rows = rows[ok].assign(ties=met.front.ties[ok], serving=SPLIT).reset_index(drop=True)
    values = rounded(values[ok])
    least: pd.DataFrame | None = None
    binding: tuple[Binding, ...] = ()
    if not len(rows) and met.least[1] >= 0:
        least, binding = _least(pools, c, met.least[1])
    legal = met.enumerated - sum(met.cuts.values())
    return SearchResult(
        name=pools.spec.name,
        sampler="grid",
        objectives=tuple(pools.objectives),
        constraints=tuple((x.metric, x.op, x.bound) for x in pools.constraints),
        front=rows.iloc[on_front(values, met.front.indices[ok])].reset_index(drop=True),
        candidates=rows.iloc[foremost(values, best)].reset_index(drop=True),
        funnel=funnel_of(met.enumerated, legal, met.evaluated, pools.constraints, met.passed),
        cuts=dict(met.cuts),
        enumerated=met.enumerated,
        legal=legal,
        evaluated=met.evaluated,
        feasible=int(met.passed[-1]) if len(rows) else 0,
        seconds=met.seconds,
        rate=met.evaluated / met.seconds if met.seconds else 0.0,
        partial=met.partial,
        least=least,
        binding=binding,
        run={
            **provenance(pools.spec.model_dump(mode="json"), seed=None),
            SPLIT: {"pairs": met.pairs, "seconds": round(met.seconds, 3)},
        },
    )


def _least(
    pools: CompiledPools, c: tuple[Coefficients, Coefficients], flat: int
) -> tuple[pd.DataFrame, tuple[Binding, ...]]:
    """The least-violating pair and each limit that it breaks."""
    row, _ = recheck_flat(pools, c, np.array([flat]))
    limits: Sequence[tuple[str, str, float]] = (
        ("memory_gib", "max", float(row["usable_gib"].iloc[0])),
        *((x.metric, x.op, x.bound) for x in pools.constraints),
    )
    broken = [
        Binding(metric=metric, value=float(row[metric].iloc[0]), op=op, bound=bound)
        for metric, op, bound in limits
        if relative_excess(row[metric].to_numpy(float), op, bound)[0] > 0
    ]
    return row.assign(serving=SPLIT), tuple(broken)


# -------------------------------------------------------------------------------------- against undivided serving


def joined(split: SearchResult, whole: SearchResult, best: int) -> SearchResult:
    """One front of both ways of serving (column `serving`), and `run["disaggregated"]` with what splitting brings."""
    whole = replace(whole, front=_labelled(whole.front), candidates=_labelled(whole.candidates))
    names = [name for name, _ in split.objectives]
    sign = np.array(signed(split.objectives))

    def values(frame: pd.DataFrame) -> np.ndarray:
        return rounded(frame[names].to_numpy(float) * sign) if len(frame) else np.zeros((0, len(names)))

    fronts = pd.concat([f for f in (split.front, whole.front) if len(f)] or [split.front], ignore_index=True)
    candidates = pd.concat(
        [f for f in (split.candidates, whole.candidates) if len(f)] or [split.candidates], ignore_index=True
    )
    counts = dict(split.funnel), dict(whole.funnel)
    stages = [name for name, _ in (whole.funnel if len(whole.funnel) > len(split.funnel) else split.funnel)]
    evaluated = split.evaluated + whole.evaluated
    nearest = whole if split.least is None or _broken(whole) < _broken(split) else split
    nothing = not len(fronts)
    brought = gain(split, values(split.front), values(whole.front))
    on = on_front(values(fronts), np.arange(len(fronts)))
    return replace(
        split,
        sampler=whole.sampler,
        front=fronts.iloc[on].reset_index(drop=True),
        candidates=candidates.iloc[foremost(values(candidates), best)].reset_index(drop=True),
        funnel=tuple((s, sum(c.get(s, c["legal"]) for c in counts)) for s in stages),
        cuts={name: split.cuts.get(name, 0) + whole.cuts.get(name, 0) for name in {**whole.cuts, **split.cuts}},
        enumerated=split.enumerated + whole.enumerated,
        legal=split.legal + whole.legal,
        evaluated=evaluated,
        feasible=split.feasible + whole.feasible,
        seconds=split.seconds + whole.seconds,
        rate=evaluated / (split.seconds + whole.seconds),
        partial=split.partial or whole.partial,
        least=nearest.least if nothing else None,
        binding=nearest.binding if nothing else (),
        run={**whole.run, **split.run, SPLIT: {**split.run[SPLIT], **brought}},
    )


def _labelled(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(serving=WHOLE) if len(frame) else frame


def _broken(result: SearchResult) -> float:
    return sum(abs(b.value / b.bound - 1.0) if b.bound else 1.0 for b in result.binding) if result.binding else np.inf


def gain(split: SearchResult, pools: np.ndarray, whole: np.ndarray) -> dict[str, Any]:
    """What splitting brings of the first objective at the same targets; with two objectives also where it pays.

    `gain`: relative, positive where split serving is better. `levels`: (second objective at most, gain) along both
    fronts, at levels that both reach.
    """
    metric, direction = split.objectives[0]

    def relative(a: float, b: float) -> float:
        return float(a / b - 1.0) if direction == "max" else float(b / a - 1.0)

    found: dict[str, Any] = {"metric": metric}
    for name, values in ((SPLIT, pools), (WHOLE, whole)):
        found[name] = abs(float(values[:, 0].min())) if len(values) else None
    if len(pools) and len(whole):
        found["gain"] = relative(found[SPLIT], found[WHOLE])
        if pools.shape[1] == 2:
            sign = signed(split.objectives)[1]
            start = max(pools[:, 1].min(), whole[:, 1].min())
            levels = np.unique(np.concatenate([pools[:, 1], whole[:, 1]]))
            found["second"] = split.objectives[1][0]
            found["levels"] = [
                (
                    float(sign * x),
                    relative(*(abs(float(v[v[:, 1] <= x, 0].min())) for v in (pools, whole))),
                )
                for x in levels[levels >= start]
            ]
    return found


__all__ = ["SPLIT", "WHOLE", "gain", "joined", "search_pools"]
