"""The search of a pipeline from end to end: a validated pipeline in, a `SearchResult` out, columns by stage."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pandas as pd

from dse.catalog import hardware
from dse.catalog.coefficients import CoefficientSet, coefficient_set
from dse.catalog.precision import served_formats
from dse.cost.coefficients import Coefficients
from dse.cost.pipeline_tails import Cumulants, together
from dse.cost.types import stack
from dse.errors import InputError
from dse.search.metrics import relative_excess, signed
from dse.search.pareto import foremost, on_front
from dse.search.pipeline import Met, Pool, edges, lines, meet, pools_at, transfer
from dse.search.pipeline_stages import Priced, price
from dse.search.pipeline_tails import percentile
from dse.search.result import Binding, SearchResult, funnel_of, provenance
from dse.space.compile import constraints_of
from dse.space.pipeline import DELAYS, LARGE_MODELS, PipelineSpec, StageSpec
from dse.space.pipeline_compile import CompiledPipeline, Design, compile_pipeline
from dse.units import GIB, HOUR, MS

Array = np.ndarray
CUT_MEMORY = "a stage does not fit in memory, or its pool in the budget"
CUT_BEATEN = "beaten stage by stage, over the budget together, unstable at the rate, or of different caches"


def search_pipeline(
    spec: PipelineSpec,
    coefficients: CoefficientSet | Coefficients | None = None,
    best: int = 200,
    prune: bool = True,
) -> SearchResult:
    """Every plan of every stage, at every rate. `candidates` are the best of those on the front of their own rate.

    `prune` false keeps every pipeline, for tests. Raises InputError where no stage's plans serve even the lowest rate.
    """
    started = time.perf_counter()
    with jax.enable_x64(True):
        p = compile_pipeline(spec)
        c = coefficients_of(p, coefficients)
        priced = price(p, c)
        pools, ways = pools_at(p, c, priced), lines(p, c)
        met = [meet(p, pools, r, ways, prune) for r in range(len(spec.rates))]
    if not any(len(m.sums) for m in met):
        raise InputError(f"{spec.where}: {_why_none(p, pools)}")
    result = _result(p, pools, priced, ways, met, best, time.perf_counter() - started)
    name = "given" if isinstance(coefficients, Coefficients) else (coefficients or coefficient_set()).name
    return replace(result, run={**result.run, "coefficients": name})


def coefficients_of(p: CompiledPipeline, coefficients: CoefficientSet | Coefficients | None) -> Coefficients:
    """Of every machine with every model, leaves (machines, models); of hosts alone none are asked."""
    if isinstance(coefficients, Coefficients):
        one = replace(coefficients, prefill_priority=None)
        return stack([stack([one for _ in p.entries]) for _ in p.machines])
    chosen = coefficients or coefficient_set()
    rows = [stack([chosen.of(m.gpu.generation, m.gpu.name, model=e.name) for e in p.entries]) for m in p.machines]
    return replace(stack(rows), prefill_priority=None)


def _why_none(p: CompiledPipeline, pools: list[Pool]) -> str:
    """Which pool holds nothing, or is too slow for the lowest rate by itself."""
    for pool in pools:
        names = " + ".join(s.name for s in pool.stages)
        if not len(pool.gpus):
            return (
                f"pipeline: no plan of {names} fits in memory within {p.spec.gpus} GPUs; give more tp, or fewer batch"
            )
        if not pool.at["stable"].any():
            most = max(r / u for r, u in zip(p.spec.rates, pool.at["utilisation"].min(axis=1), strict=True))
            return (
                f"rates: {names} serves at most {most:.3g} requests/s with the plans given, less than the lowest of"
                f" {min(p.spec.rates):g}; lower rates, or give more replicas, tp or batch"
            )
    return (
        f"gpus: no pipeline within {p.spec.gpus} GPUs serves even {min(p.spec.rates):g} requests/s with one format of"
        " cache; raise gpus, lower rates, or give both pools the same kv"
    )


# ---------------------------------------------------------------------------------------------------- the table


def frame(
    p: CompiledPipeline,
    pools: list[Pool],
    priced: dict[str, Priced],
    ways: Any,
    rates: Array,
    options: Array,
    sums: Array,
) -> pd.DataFrame:
    """One row a pipeline: what it delivers, then each stage's plan and part. `rates` (n,) rows of the spec's."""
    spec, osl, turns = p.spec, p.spec.request.osl, p.spec.loop.turns
    rate = np.array(spec.rates)[rates]
    ttft, total, tpot, variance, third, tpot_variance, tpot_third, gpus, usd, *common = sums.T
    alone = Cumulants(mean=ttft, variance=variance, third=third)
    whole = together(alone, tuple(common), tuple(x.skewness for x in p.commons))
    tokens = rate * turns * osl
    n = np.arange(len(options))
    columns: dict[str, Any] = {
        "pipeline": "",
        "model": " + ".join(dict.fromkeys(e.name for s, i in p.entry_of.items() for e in [p.entries[i]])),
        "gpu": "",
        "cluster": "",
        "gpus": gpus.astype(int),
        "requests_s": rate,
        "capacity_requests_s": np.full(len(options), np.inf),
        "bottleneck": "",
        "ttft_ms": ttft / MS,
        **{f"ttft_p{q:.0f}_ms": percentile(q / 100, ttft, whole.variance, whole.third) / MS for q in (50, 90, 99)},
        "tpot_ms": tpot / MS,
        **{f"tpot_p{q:.0f}_ms": percentile(q / 100, tpot, tpot_variance, tpot_third) / MS for q in (50, 90, 99)},
        "e2e_ms": (total + turns * max(osl - 1.0, 0.0) * tpot) / MS,
        "requests_s_gpu": rate / gpus,
        "output_tok_s_gpu": tokens / gpus,
        "tok_s_user": np.divide(1.0, tpot, out=np.zeros_like(tpot), where=tpot > 0),
        "usd_per_request": usd / HOUR / rate,
        "usd_per_mtok": usd / HOUR / tokens * 1e6,
        "memory_gib": np.zeros(len(options)),
        "feasible": True,
        "reason": "",
    }
    texts, gpu, cluster = [], [], []
    for i, pool in enumerate(pools):
        chosen = options[:, i]
        use = pool.at["utilisation"][rates, chosen]
        capacity = rate / np.maximum(use, 1e-12)
        slowest = capacity < columns["capacity_requests_s"]
        columns["bottleneck"] = np.where(slowest, pool.stages[0].name, columns["bottleneck"])
        columns["capacity_requests_s"] = np.minimum(capacity, columns["capacity_requests_s"])
        columns["memory_gib"] = np.maximum(columns["memory_gib"], pool.memory[chosen] / GIB * (pool.gpus[chosen] > 0))
        for k, s in enumerate(pool.stages):
            designs = [p.designs[s.name][j] for j in pool.design[chosen, k]]
            machines = [p.machines[d.machine] if d.machine >= 0 else None for d in designs]
            own = {
                "gpu": [m.gpu.name if m else "host" for m in machines],
                "tp": [d.degree for d in designs],
                **{name: [getattr(d, name) for d in designs] for name in (*_degrees(s), *_fills(s))},
                "replicas": pool.replicas[chosen].astype(int),
                "gpus": pool.gpus[chosen].astype(int) if k == 0 else np.zeros(len(n), int),
                "weights": [_format(p, s.name, d)[0] for d in designs],
                "kv": [_format(p, s.name, d)[2] for d in designs],
                "batch": [d.batch for d in designs],
                "utilisation": use,
                "wait_ms": pool.at[f"wait {k}"][rates, chosen] / MS,
                "time_ms": pool.at[f"time {k}"][rates, chosen] / MS,
                "memory_gib": pool.memory[chosen] / GIB,
            }
            columns |= {f"{s.name}_{name}": values for name, values in own.items()}
            if k == 0:
                gpu.append(own["gpu"])
                cluster.append([m.cluster.name if m else "" for m in machines])
            texts.append([_text(s, d, int(r), k > 0) for d, r in zip(designs, pool.replicas[chosen], strict=True)])
    for e in edges(p):
        ends = [pools[q].ends[options[:, q]] for q in (e.source, e.target)]
        columns[f"{e.stage}_transfer_ms"] = [transfer(e, ways, a, b) / MS for a, b in zip(*ends, strict=True)]
    for name, lists in (("gpu", gpu), ("cluster", cluster)):
        columns[name] = [" + ".join(x for x in dict.fromkeys(row) if x) for row in zip(*lists, strict=True)]
    columns["pipeline"] = ["; ".join(parts) for parts in zip(*texts, strict=True)]
    return pd.DataFrame(columns, index=pd.RangeIndex(len(options)))


def _format(p: CompiledPipeline, stage: str, d: Design) -> tuple[str, str, str]:
    """(weights, activations, cache) as served; of an index nothing."""
    if stage not in p.entry_of:
        return "", "", ""
    device = hardware.to_device(p.machines[d.machine].gpu)
    return served_formats(p.entries[p.entry_of[stage]], device, d.weights, d.kv)


def _degrees(s: StageSpec) -> tuple[str, ...]:
    """The axes beside tp that a stage of this kind has."""
    if s.kind == "retrieval":
        return ("pp",)
    return ("pp", "attention_dp", "cp", "ep") if s.kind in LARGE_MODELS else ("pp", "spread")


def _fills(s: StageSpec) -> tuple[str, ...]:
    """`microbatching`, where a stage of a pipeline of GPUs has a choice of it."""
    return ("microbatching",) if len(s.microbatching) > 1 and max(s.pp) > 1 else ()


def _text(s: StageSpec, d: Design, replicas: int, shares: bool) -> str:
    """`prefill 2 x tp 4 fp8 batch 2`; a stage that shares a pool has its batch alone."""
    own = {name: getattr(d, name) for name in _degrees(s) if getattr(d, name) > 1}
    if shares:
        own = {name: n for name, n in (("tp", d.own), ("ep", d.ep)) if n > (name == "ep")}
    degrees = "".join(f" {name} {n}" for name, n in own.items())
    place = f" in it{degrees}" if shares else f" {replicas} x tp {d.tp}{degrees}"
    filled = "".join(f" {getattr(d, name)}" for name in _fills(s) if d.pp > 1)
    weights = f" {d.weights}" if d.weights not in ("", "native") else ""
    return f"{s.name}{place}{weights} batch {d.batch}{filled}"


# --------------------------------------------------------------------------------------------------- the result


def _result(
    p: CompiledPipeline, pools: list[Pool], priced: Any, ways: Any, met: list[Met], best: int, seconds: float
) -> SearchResult:
    spec = p.spec
    rates = np.concatenate([np.full(len(m.sums), r) for r, m in enumerate(met)])
    options, sums = (np.concatenate([getattr(m, name) for m in met]) for name in ("options", "sums"))
    rows = frame(p, pools, priced, ways, rates, options, sums)
    limits = constraints_of(spec.constraints)
    over = np.array([relative_excess(rows[name].to_numpy(float), op, bound) for name, op, bound in limits]).reshape(
        -1, len(rows)
    )
    passed = np.cumprod(over <= 1e-12, axis=0).sum(axis=1) if limits else np.zeros(0)
    ok = (over <= 1e-12).all(axis=0)
    names = [name for name, _ in spec.objectives]
    values = rows[names].to_numpy(float)[ok] * np.array(signed(spec.objectives))
    feasible = rows.iloc[np.flatnonzero(ok)].reset_index(drop=True)
    on = on_front(values, np.arange(len(values)))
    least: pd.DataFrame | None = None
    binding: tuple[Binding, ...] = ()
    if not len(feasible):
        worst = int(np.maximum(over, 0.0).sum(axis=0).argmin())
        least = rows.iloc[[worst]].reset_index(drop=True)
        binding = tuple(
            Binding(metric=name, value=float(least[name].iloc[0]), op=op, bound=bound)
            for (name, op, bound), x in zip(limits, over[:, worst], strict=True)
            if x > 0
        )
    everything = len(spec.rates) * math.prod(
        sum(1 for _ in _places(p, stages)) * len(stages[0].replicas) for stages in spec.pools
    )
    fitting = len(spec.rates) * math.prod(len(pool.gpus) for pool in pools)
    return SearchResult(
        name=spec.name,
        sampler="grid",
        objectives=tuple(spec.objectives),
        constraints=tuple((x.metric, x.op, x.bound) for x in limits),
        front=feasible.iloc[on].reset_index(drop=True),
        candidates=feasible.iloc[foremost(values, best)].reset_index(drop=True),
        funnel=funnel_of(everything, len(rows), len(rows), limits, (len(rows), *passed)),
        cuts={CUT_MEMORY: everything - fitting, CUT_BEATEN: fitting - len(rows)},
        enumerated=everything,
        legal=len(rows),
        evaluated=len(rows),
        feasible=len(feasible),
        seconds=seconds,
        rate=everything / seconds,
        least=least,
        binding=binding,
        run={
            **provenance({**spec.model_dump(mode="json"), "workloads": [_workload(spec)]}, seed=None),
            "stages": [s.name for s in spec.pipeline if s.kind not in DELAYS],
        },
    )


def _places(p: CompiledPipeline, stages: Any) -> Any:
    """All combinations of the designs of a pool's stages."""
    for designs in itertools.product(*(p.designs[s.name] for s in stages)):
        if len({d.place for d in designs}) == 1:
            yield designs


def _workload(spec: PipelineSpec) -> dict[str, float]:
    return {"isl": spec.request.isl, "osl": spec.request.osl, "prefix_hit": spec.request.prefix_hit}


__all__ = ["coefficients_of", "frame", "search_pipeline"]
