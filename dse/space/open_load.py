"""Workloads under open load: which metrics ask for one, and what users send and expect, as arrays."""

from __future__ import annotations

from dse.cost import lengths as dist
from dse.cost.goodput import Demand, Slo
from dse.cost.lengths import Lengths
from dse.cost.types import stack
from dse.errors import InputError
from dse.space.metrics import OPEN
from dse.space.schema import SpaceSpec, Workload
from dse.space.traces import read_trace
from dse.units import MS

UNBOUND = 1e9  # seconds: a target that every request meets, where only percentiles at a rate are asked


def open_metrics(spec: SpaceSpec) -> list[tuple[str, str]]:
    """(place, metric) of everything that only an open loop has."""
    named = [(f"constraints.{name}", name) for name in spec.constraints]
    named += [(f"objectives.{name}", name) for name, _ in spec.objectives]
    return [(place, name) for place, name in named if name in OPEN]


def open_problems(spec: SpaceSpec) -> list[str]:
    """What a workload lacks for the metrics that are asked of it."""
    asked = open_metrics(spec)
    if not asked:
        return []
    place, _ = asked[0]
    if spec.axes.batch is not None:
        return [f"{place}: a static batch (axes.batch) has no open load; write axes.concurrency, the most it runs"]
    rated = [w.arrivals is not None and w.arrivals.rate is not None for w in spec.workloads]
    if any(rated) and not all(rated):
        i = rated.index(False)
        return [f"workloads[{i}]: has no arrivals.rate, others have; give all of them one, or none"]
    problems = []
    for i, w in enumerate(spec.workloads):
        for place, name in asked:
            if w.slo is None and (not rated[i] or name in ("goodput_req_s_gpu", "attainment")):
                problems.append(f"{place}: workloads[{i}] has no slo; write slo: {{ttft_ms: 1000, tpot_ms: 50}}")
        if w.arrivals is not None and w.arrivals.cv == "trace" and (w.trace is None or read_trace(w.trace).cv is None):
            problems.append(f"workloads[{i}].arrivals.cv: there is no trace with arrivals; give a number (1: Poisson)")
    return list(dict.fromkeys(problems))


def lengths_of(w: Workload) -> Lengths:
    """A workload's lengths as nodes."""
    if w.trace is not None:
        trace = read_trace(w.trace)
        return dist.empirical(trace.input_tokens, trace.output_tokens, trace.prefix_tokens)
    return dist.lognormal(w.isl, w.osl, w.isl_cv, w.osl_cv, w.correlation, w.prefix_hit)


def _burstiness(w: Workload) -> float:
    if w.arrivals is None:
        return 1.0
    if w.arrivals.cv != "trace":
        return float(w.arrivals.cv)
    cv = read_trace(str(w.trace)).cv
    if cv is None:
        raise InputError(f"{w.trace}: has no arrivals; give arrivals.cv a number")
    return cv


def demand_of(spec: SpaceSpec) -> Demand | None:
    """Open load of every workload: leaves (W,), lengths (W, n) with as many nodes as the widest needs."""
    if not open_metrics(spec):
        return None
    found = [lengths_of(w) for w in spec.workloads]
    most = max(len(x.weight) for x in found)
    demands = []
    for w, lengths in zip(spec.workloads, found, strict=True):
        slo = (
            Slo(ttft=UNBOUND, tpot=UNBOUND)
            if w.slo is None
            else Slo(ttft=w.slo.ttft_ms * MS, tpot=w.slo.tpot_ms * MS, attainment=w.slo.attainment)
        )
        rate = None if w.arrivals is None else w.arrivals.rate
        demands.append(Demand(lengths=dist.padded(lengths, most), slo=slo, cv=_burstiness(w), rate=rate))
    return stack(demands)


__all__ = ["demand_of", "lengths_of", "open_metrics", "open_problems"]
