"""Goodput of deployments, one a row: the largest rate at which enough requests meet their targets, what they see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pandas as pd

from dse.batches import in_blocks
from dse.catalog.coefficients import CoefficientSet
from dse.cost import lengths as dist
from dse.cost.evaluate import Scenario, estimate_open
from dse.cost.goodput import Demand, Slo
from dse.cost.intraop import IntraOp, against_stages
from dse.cost.lengths import Lengths
from dse.cost.queueing import crossover
from dse.cost.shard import shard_scenario
from dse.cost.types import stack
from dse.errors import InputError
from dse.programs import program
from dse.space.cases import Case, parse_cases, scenarios_of
from dse.space.columns import open_columns
from dse.space.traces import Trace
from dse.units import GIB, MS

Array = np.ndarray
SEATS = 256  # requests that an engine runs on a rank, where the row does not say: vLLM's long-time default
BLOCK = 1024  # rows a call
TEXT = ("feasible", "reason", "coefficients")


@dataclass(frozen=True)
class Asked:
    """What users send and expect, of every row. Lengths: a trace's, or lognormal about the row's isl and osl."""

    ttft_ms: float
    tpot_ms: float
    attainment: float = 0.9
    trace: Trace | None = None
    isl_cv: float = 0.0
    osl_cv: float = 0.0
    correlation: float = 0.0
    cv: float = 1.0  # of the gaps between arrivals

    def __post_init__(self) -> None:
        for name, low, high in (
            ("ttft_ms", 0.0, 1e9),
            ("tpot_ms", 0.0, 1e9),
            ("attainment", 0.0, 1.0),
            ("isl_cv", -1e-9, 3.0),
            ("osl_cv", -1e-9, 3.0),
            ("correlation", -1.0 - 1e-9, 1.0),
            ("cv", 0.29, 5.0),
        ):
            value = getattr(self, name)
            if not low < value <= high or (name == "attainment" and value == 1.0):
                span = (
                    f"above {low:g}, up to {high:g}"
                    if low >= 0
                    else f"{max(low, -1.0) if low < -1 else 0:g} to {high:g}"
                )
                raise InputError(f"{name}: {value:g} is out of range (allowed: {span})")

    def lengths(self, case: Case) -> Lengths:
        if self.trace is not None:
            t = self.trace
            return dist.empirical(t.input_tokens, t.output_tokens, t.prefix_tokens)
        load = case.load
        return dist.lognormal(load.isl, load.osl, self.isl_cv, self.osl_cv, self.correlation, load.prefix_hit)

    @property
    def slo(self) -> Slo:
        return Slo(ttft=self.ttft_ms * MS, tpot=self.tpot_ms * MS, attainment=self.attainment)


def goodput_cases(cases: pd.DataFrame, coefficients: CoefficientSet, asked: Asked) -> pd.DataFrame:
    """The input columns, then goodput: one row in, one row out, same order (float64).

    `concurrency` of a row is the most requests its replica runs at once (left out: 256 an attention-DP rank). With a
    trace `isl` and `osl` are not needed. A row that has no goodput says why in `reason`. Raises InputError where
    required columns are missing.
    """
    table = cases.copy()
    if asked.trace is not None:
        table["isl"] = str(max(round(float(asked.trace.input_tokens.mean())), 1))
        table["osl"] = str(max(round(float(asked.trace.output_tokens.mean())), 1))
    rows = [_seated(row, given) for row, given in zip(parse_cases(table), _given(table), strict=True)]
    valid = [i for i, row in enumerate(rows) if isinstance(row, Case)]
    found = _price([row for row in rows if isinstance(row, Case)], coefficients, asked) if valid else {}
    names = [*found] or ["goodput_req_s_gpu", *TEXT]
    result: dict[str, Any] = {}
    for name in names:
        filled = np.full(len(rows), np.nan, dtype=object if name in TEXT else float)
        if valid:
            filled[valid] = found[name]
        result[name] = filled
    for i, row in enumerate(rows):
        if isinstance(row, str):
            result["feasible"][i], result["reason"][i] = False, row
    kept = cases.drop(columns=[name for name in result if name in cases.columns])
    return pd.concat([kept.reset_index(drop=True), pd.DataFrame(result)], axis=1)


def _given(table: pd.DataFrame) -> list[bool]:
    """Whether each row says how many requests run at once."""
    if "concurrency" not in table.columns:
        return [False] * len(table)
    return [bool(x) for x in table["concurrency"].notna() & (table["concurrency"].astype(str).str.strip() != "")]


def _seated(row: Case | str, given: bool) -> Case | str:
    if isinstance(row, str) or given:
        return row
    return replace(row, load=replace(row.load, concurrency=SEATS * row.plan["attention_dp"]))


def _one(x: Scenario, demand: Demand) -> Any:
    sharded = shard_scenario(x)
    return estimate_open(x, sharded, demand)


@lru_cache(maxsize=1)
def _batched() -> Any:
    return program(_one, in_axes=0)


def _crossings(x: Scenario, gpus: Any) -> IntraOp:
    """Every scenario with every number of GPUs."""
    return jax.vmap(jax.vmap(against_stages, (None, 0)), (0, None))(x, gpus)


_crossed = program(_crossings)


def _price(cases: list[Case], coefficients: CoefficientSet, asked: Asked) -> dict[str, Array]:
    nodes = [dist.padded(asked.lengths(case), dist.NODES) for case in cases]  # one shape, one program
    with jax.enable_x64(True):
        scenarios = scenarios_of(cases, coefficients)
        demand = stack([Demand(lengths=x, slo=asked.slo, cv=asked.cv) for x in nodes])
        whole = in_blocks(_batched(), scenarios, demand, block=BLOCK)
    return _columns(cases, whole, coefficients, asked)


def _columns(cases: list[Case], e: Any, coefficients: CoefficientSet, asked: Asked) -> dict[str, Array]:
    held = e.memory.requests
    served = (held >= 1.0) & (e.goodput > 0.0)
    reason = np.full(len(cases), "", dtype=object)
    for i in np.flatnonzero(~served):
        if held[i] < 1.0:
            free = (e.memory.usable - e.memory.total + e.memory.kv)[i] / GIB
            reason[i] = (
                f"memory: {free:.1f} GiB free for KV cache, one request takes {e.memory.kv_request[i] / GIB:.1f} GiB"
            )
        else:
            reason[i] = (
                f"targets: alone on the replica {e.open.attainment[i]:.0%} of requests meet them"
                f" (TTFT P90 {e.open.ttft_p90[i] / MS:.0f} ms, TPOT P90 {e.open.tpot_p90[i] / MS:.1f} ms)"
            )
    found = open_columns(e.open)
    del found["stable"]  # a goodput is
    values = {
        "goodput_req_s_gpu": e.goodput,
        "goodput_req_s": e.open.rate,
        **{name: column for name, column in found.items() if name != "open_req_s"},
        "gpus": np.asarray(e.gpus),
        "memory_gib": (e.memory.total - e.memory.kv) / GIB
        + np.minimum(found["open_running"] * e.memory.kv_request, np.maximum(held, 0.0) * e.memory.kv_request) / GIB,
    }
    known = [coefficients.known(**case.keys) for case in cases]
    blank = held < 1.0
    return {
        **{name: np.where(blank, np.nan, np.asarray(column, float)) for name, column in values.items()},
        "feasible": served.astype(object),
        "reason": reason,
        "coefficients": np.array(known, dtype=object),
    }


@dataclass(frozen=True)
class Crossing:
    """Tensor parallelism against pipeline stages for one model on one machine. `rates` in requests/s, D in seconds."""

    name: str
    gpus: tuple[int, ...]
    service: float
    speedups: tuple[float, ...]
    loads: tuple[float, ...]
    rates: tuple[float, ...]


def crossings(
    cases: pd.DataFrame, coefficients: CoefficientSet, gpus: tuple[int, ...] = (2, 4, 8)
) -> tuple[Crossing, ...]:
    """K and the crossover of every distinct model, GPU, cluster, format and prompt of the cases (bad rows are left)."""
    first: dict[str, Case] = {}
    for row in parse_cases(cases):
        if isinstance(row, Case):
            text = f"{row.entry.name} on {row.gpu.name} ({row.cluster}), prompts of {row.load.isl:g} tokens"
            first.setdefault(text, row)
    if not first:
        raise InputError("cases: no row can be priced; see `reason` in the table")
    with jax.enable_x64(True):
        scenarios = scenarios_of(list(first.values()), coefficients)
        found: IntraOp = jax.tree.map(np.asarray, _crossed(scenarios, np.array(gpus, float)))
    return tuple(
        Crossing(
            name=name,
            gpus=gpus,
            service=float(found.service[i, 0]),
            speedups=tuple(found.speedup[i].tolist()),
            loads=tuple(found.load[i].tolist()),
            rates=tuple(found.rate[i].tolist()),
        )
        for i, name in enumerate(first)
    )


def crossover_curve(gpus: int) -> tuple[tuple[float, float], ...]:
    """(K/n, R D/n at the crossover) over K from 1 to n GPUs."""
    with jax.enable_x64(True):
        speedups = 1.0 + np.linspace(0.02, 0.98, 49) * (gpus - 1.0)
        loads = np.asarray(jax.vmap(lambda k: crossover(k, float(gpus)))(speedups))
    return tuple(zip((speedups / gpus).tolist(), (loads / gpus).tolist(), strict=True))


__all__ = ["Asked", "Crossing", "crossings", "crossover_curve", "goodput_cases"]
