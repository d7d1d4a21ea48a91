"""The main job: a search space in, a `SearchResult` out, whichever sampler and engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dse.catalog.coefficients import CoefficientSet, coefficient_set
from dse.cost.coefficients import Coefficients
from dse.cost.types import stack
from dse.errors import InputError
from dse.search.grid import Progress, Swept, Tiling, sweep
from dse.search.intervals import with_intervals
from dse.search.metrics import signed
from dse.search.pareto import foremost, front, hypervolume, on_front
from dse.search.recheck import Rechecked, recheck
from dse.search.result import Binding, SearchResult, funnel_of, provenance
from dse.space.compile import CompiledSpace, compile_space
from dse.space.intervals import uncertainty_of
from dse.space.pipeline import PipelineSpec
from dse.space.schema import SpaceSpec

SAMPLERS = ("grid", "tpe", "nsga2", "random")
ENGINES = ("local", "dask")
FIRST = np.zeros(1, np.int64)  # a point to price for its program's sake: XLA compiles outside the interpreter's lock
BEST = 200  # rows of the list of the best feasible plans
COMPARABLE = 20_000_000  # spaces small enough for a sampled front to be compared with the exhaustive one


def search(
    spec: SpaceSpec | PipelineSpec,
    sampler: str = "grid",
    trials: int = 1000,
    engine: str = "local",
    seed: int = 0,
    coefficients: CoefficientSet | Coefficients | None = None,
    compare: bool = True,
    progress: Progress | None = None,
    intervals: bool = False,
) -> SearchResult:
    """Search a space. `grid` prices every legal point; the others sample `trials` of them with Optuna.

    A sampled front is compared with the exhaustive one where the space has at most 20 million points (`compare`).
    `coefficients`: a set (by default the best one that is shipped), or plain coefficients for every machine.
    `intervals`: rows also have the ends between which 90% of measurements are to lie (`ttft_ms_low`, ...).
    Raises InputError for an unknown sampler or engine, a space with no legal plan, or intervals asked of coefficients
    that do not say how sure they are.
    """
    for value, allowed, what in ((sampler, SAMPLERS, "sampler"), (engine, ENGINES, "engine")):
        if value not in allowed:
            raise InputError(f"--{what}: {value!r} is not known (allowed: {', '.join(allowed)})")
    if isinstance(spec, PipelineSpec):
        return _pipeline(spec, sampler, engine, coefficients, intervals)
    if spec.disaggregated is not None:
        return _with_pools(spec, sampler, engine, seed, coefficients, progress, intervals)
    sure = _sure(coefficients) if intervals else None
    space = compile_space(spec)
    c = of_machines(space, coefficients)
    started = time.perf_counter()
    if sampler == "grid":
        with ThreadPoolExecutor() as beside:
            beside.submit(recheck, space, c, FIRST)
            found = _exhaustive(space, c, engine, progress)
        return _named(finish(space, c, found, "grid", time.perf_counter() - started, sure=sure), coefficients)
    from dse.search.sample import sample

    found = sample(space, c, sampler, trials, seed, progress)
    result = finish(space, c, found, sampler, time.perf_counter() - started, seed=seed, sure=sure)
    if compare and space.legal <= COMPARABLE and not found.partial and len(result.front):
        whole = recheck(space, c, sweep(space, c).front.indices)
        result = replace(result, hypervolume_ratio=_ratio(result, whole))
    return _named(result, coefficients)


def _pipeline(
    spec: PipelineSpec,
    sampler: str,
    engine: str,
    coefficients: CoefficientSet | Coefficients | None,
    intervals: bool,
) -> SearchResult:
    """Pipelines exhaustively, here: they are few once each stage's plans are priced."""
    from dse.search.pipeline_result import search_pipeline

    for wrong, text in (
        (sampler != "grid", f"--sampler: {sampler!r} does not search a pipeline (allowed: grid)"),
        (engine != "local", f"--engine: {engine!r} does not search a pipeline (allowed: local)"),
        (intervals, "--intervals: are not known of a pipeline; leave them out"),
    ):
        if wrong:
            raise InputError(f"{spec.where}: {text}")
    return search_pipeline(spec, coefficients, BEST)


def _with_pools(
    spec: SpaceSpec,
    sampler: str,
    engine: str,
    seed: int,
    coefficients: CoefficientSet | Coefficients | None,
    progress: Progress | None,
    intervals: bool,
) -> SearchResult:
    """Pools exhaustively, against undivided serving at the same targets unless the space says otherwise."""
    from dse.search.pool_recheck import recheck_first
    from dse.search.pool_result import joined, search_pools
    from dse.space.pool_space import compile_pools

    for wrong, text in (
        (sampler != "grid", f"--sampler: {sampler!r} does not search `disaggregated` (allowed: grid)"),
        (intervals, "--intervals: are not known of `disaggregated`; leave one of them out"),
    ):
        if wrong:
            raise InputError(f"{spec.where}: {text}")
    pools = compile_pools(spec)
    c = of_machines(pools.prefill, coefficients), of_machines(pools.decode, coefficients)
    compared = spec.disaggregated is not None and spec.disaggregated.aggregated
    undivided = spec.model_copy(update={"disaggregated": None})
    with ThreadPoolExecutor() as beside:
        beside.submit(recheck_first, pools, c)
        if compared and engine == "local":
            space = compile_space(undivided)
            priced = space, of_machines(space, coefficients)
            beside.submit(sweep, *priced, tiles=range(1))
            beside.submit(recheck, *priced, FIRST)
        split = _named(search_pools(pools, c, BEST), coefficients)
    if not compared:
        return split
    whole = search(undivided, engine=engine, seed=seed, coefficients=coefficients, progress=progress)
    return joined(split, whole, BEST)


def _named(result: SearchResult, coefficients: CoefficientSet | Coefficients | None) -> SearchResult:
    """The result says by which coefficients it was priced."""
    name = "given" if isinstance(coefficients, Coefficients) else (coefficients or coefficient_set()).name
    return replace(result, run={**result.run, "coefficients": name})


def of_machines(space: CompiledSpace, coefficients: CoefficientSet | Coefficients | None) -> Coefficients:
    """Coefficients of every machine with every model, leaves (machines, models); by default of the best set."""
    if isinstance(coefficients, Coefficients):
        return coefficients
    chosen = coefficients or coefficient_set()
    of = [
        stack([chosen.of(machine.gpu.generation, machine.gpu.name, model=model.name) for model in space.models])
        for machine in space.machines
    ]
    stacked = stack(of)
    # Without an engine no prompt goes first: None spares the program the step that prices it.
    first = stacked.prefill_priority is not None and np.any(stacked.prefill_priority)
    return stacked if first else replace(stacked, prefill_priority=None)


def _exhaustive(space: CompiledSpace, c: Coefficients, engine: str, progress: Progress | None) -> Swept:
    if engine == "local":
        return sweep(space, c, best=BEST, progress=progress)
    from dse.search.distribute import sweep_dask

    return sweep_dask(space.spec, c, Tiling.of(space), BEST, progress)


def _sure(coefficients: CoefficientSet | Coefficients | None) -> CoefficientSet:
    """The set that intervals are taken from."""
    if isinstance(coefficients, Coefficients):
        raise InputError("intervals: plain coefficients do not say how sure they are; give a coefficient set")
    chosen = coefficients or coefficient_set()
    uncertainty_of(chosen)  # before the work, not after
    return chosen


def finish(
    space: CompiledSpace,
    c: Coefficients,
    found: Swept,
    sampler: str,
    seconds: float,
    seed: int | None = None,
    sure: CoefficientSet | None = None,
) -> SearchResult:
    """Recheck survivors in float64 and lay out the result; with intervals by the set `sure`."""
    kept = recheck(space, c, found.front.indices)
    feasible = kept.feasible if len(kept.indices) else np.zeros(0, bool)
    rows = kept.rows[feasible].assign(ties=found.front.ties[feasible]) if len(kept.indices) else kept.rows
    values = kept.objectives[feasible]

    def written(which: np.ndarray) -> pd.DataFrame:
        frame = rows.iloc[which].reset_index(drop=True)
        flat = kept.indices[feasible][which]
        return frame if sure is None else with_intervals(frame, flat, space, c, sure)

    least: pd.DataFrame | None = None
    binding: tuple[Binding, ...] = ()
    if not len(values) and (len(kept.indices) or found.least[1] >= 0):
        # What float32 took for feasible is nearer than anything else.
        nearest = np.maximum(kept.excess, 0.0).sum(axis=1)
        least, binding = _least(space, c, int(kept.indices[nearest.argmin()]) if len(nearest) else found.least[1])
    return SearchResult(
        name=space.spec.name,
        sampler=sampler,
        objectives=tuple(space.objectives),
        constraints=tuple((x.metric, x.op, x.bound) for x in space.constraints),
        front=written(on_front(values, kept.indices[feasible])),
        candidates=written(foremost(values, BEST)),
        funnel=funnel_of(space.enumerated, space.legal, found.evaluated, space.constraints, found.passed),
        cuts=dict(space.cuts),
        enumerated=space.enumerated,
        legal=space.legal,
        evaluated=found.evaluated,
        feasible=int(found.passed[-1]) if len(values) else 0,
        seconds=seconds,
        rate=found.evaluated / found.seconds if found.seconds else 0.0,
        partial=found.partial,
        least=least,
        binding=binding,
        run=provenance(space.spec.model_dump(mode="json"), seed),
    )


def _least(space: CompiledSpace, c: Coefficients, index: int) -> tuple[pd.DataFrame, tuple[Binding, ...]]:
    """The least-violating plan and each limit that it breaks."""
    row = recheck(space, c, np.array([index]))
    frame, excess = row.rows, row.excess[0]
    usable = float(frame["usable_gib"].iloc[0])
    limits: Sequence[tuple[str, str, float]] = (("memory_gib", "max", usable), *space.constraints)
    broken = []
    for (metric, op, bound), over in zip(limits, excess, strict=True):
        if over > 0:
            value = bound + over * (bound or 1.0) if op == "max" else bound / (1.0 + over)
            broken.append(Binding(metric=metric, value=float(value), op=op, bound=float(bound)))
    return frame, tuple(broken)


def _ratio(result: SearchResult, whole: Rechecked) -> float:
    """Hypervolume of a sampled front over the exhaustive front's, from the corner of the latter's worst values."""
    names = [name for name, _ in result.objectives]
    sign = np.array(signed(result.objectives))
    exact = whole.objectives[whole.feasible]
    sampled = result.front[names].to_numpy(float) * sign
    everything = np.concatenate([exact[front(exact)], sampled])
    reference = everything.max(axis=0) + 0.01 * np.maximum(np.ptp(everything, axis=0), np.abs(everything.max(axis=0)))
    volume = hypervolume(exact, reference)
    return hypervolume(sampled, reference) / volume if volume > 0 else 1.0


def describe_run(result: SearchResult) -> dict[str, Any]:
    """run.json: everything needed to repeat or to judge a run."""
    return {
        "name": result.name,
        "sampler": result.sampler,
        "objectives": dict(result.objectives),
        "constraints": [list(x) for x in result.constraints],
        "enumerated": result.enumerated,
        "legal": result.legal,
        "evaluated": result.evaluated,
        "feasible": result.feasible,
        "funnel": [list(stage) for stage in result.funnel],
        "cuts": result.cuts,
        "seconds": round(result.seconds, 3),
        "points_per_second": round(result.rate),
        "partial": result.partial,
        "hypervolume_ratio": result.hypervolume_ratio,
        "binding": [b.text for b in result.binding],
        **result.run,
    }


__all__ = ["BEST", "COMPARABLE", "ENGINES", "SAMPLERS", "describe_run", "finish", "search"]
