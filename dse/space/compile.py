"""A validated space as arrays: tables of models, machines and precisions, legal designs, operating points, workloads.

A point of the space has the flat index `design * Q + q`: D legal designs (what is deployed) times Q operating points
(how it is loaded). Nothing of size D * Q is ever made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from dse.catalog import hardware
from dse.catalog import precision as formats
from dse.catalog.align import align
from dse.catalog.model_schema import ModelEntry
from dse.catalog.models import model, to_architecture
from dse.cost.goodput import Demand
from dse.cost.types import CP_METHODS, DISPATCHES, OVERLAPS, Architecture, Device, Precision, Topology, stack
from dse.errors import InputError
from dse.space.degrees import degrees
from dse.space.drafts import NONE, draft_problems, draft_table, sharing
from dse.space.facts import Facts, facts
from dse.space.legal import Degrees, Enumeration, Rules, enumerate_designs
from dse.space.load import together
from dse.space.machines import Machine, machines
from dse.space.metrics import OPEN
from dse.space.open_load import demand_of, open_problems
from dse.space.schema import Bound, SpaceSpec

Array = np.ndarray
MOST_OPERATING = 4_000_000
DEFAULT_CONCURRENCY = tuple(2**k for k in range(11))


class PrecisionName(NamedTuple):
    """The formats of one row of the precision table, "native" and "auto" resolved."""

    weights: str
    activations: str
    kv: str


@dataclass(frozen=True, kw_only=True)
class Designs:
    """What is deployed, one element a legal design, in the order of the axes (int32; utilisation float64)."""

    model: Array  # row of `models`
    machine: Array  # row of `machines`
    gpus: Array  # of the whole deployment
    pp: Array
    tp: Array
    cp: Array
    attention_dp: Array
    moe_ep: Array
    moe_tp: Array
    replicas: Array
    weights: Array  # index of the axis's values, as are activations and kv
    activations: Array
    kv: Array
    precision_index: Array  # row of `precisions`
    overlap_prefill: Array  # code in OVERLAPS
    overlap_decode: Array
    dispatch: Array  # code in DISPATCHES
    eplb_replicas: Array  # redundant experts a layer of an expert group
    cp_method: Array  # code in CP_METHODS
    sequence_parallel: Array  # 0 or 1
    microbatches: Array  # 0: pp
    utilisation: Array  # share of the capacity that may be used
    draft_model: Array  # index of the axis's values
    draft_tp: Array

    def __len__(self) -> int:
        return len(self.model)


@dataclass(frozen=True, kw_only=True)
class Operating:
    """How it is loaded, one element an operating point: the product of the load axes."""

    concurrency: Array
    chunk: Array
    draft_tokens: Array
    acceptance: Array
    prefix_hit: Array  # read where the axis is searched; else each workload has its own
    static_batch: Array
    shape: tuple[int, ...]  # values of concurrency (or batch), chunk, ...: the last of `rank.LOAD_AXES` changes fastest

    def __len__(self) -> int:
        return len(self.concurrency)


@dataclass(frozen=True, kw_only=True)
class Workloads:
    """What is asked of it; the weights sum to 1."""

    isl: Array
    osl: Array
    prefix_hit: Array
    weight: Array
    demand: Demand | None = None  # leaves (W,) and (W, n): open load, where a metric of it is asked

    def __len__(self) -> int:
        return len(self.isl)


class Constraint(NamedTuple):
    """At most (`max`) or at least (`min`) `bound`, in the unit of the metric's name."""

    metric: str
    op: str  # "max" or "min"
    bound: float


@dataclass(frozen=True, kw_only=True, eq=False)
class CompiledSpace:
    """A search space ready to be priced, equal to itself only. In points, `enumerated = legal + sum(cuts.values())`."""

    spec: SpaceSpec
    models: tuple[ModelEntry, ...]
    machines: tuple[Machine, ...]
    architectures: Architecture  # leading axis: models
    devices: Device  # leading axis: machines
    topologies: Topology
    precisions: Precision  # leading axis: precision rows
    precision_names: tuple[PrecisionName, ...]
    drafts: Architecture | None  # leading axis: models x values of draft_model; None where none drafts
    designs: Designs
    operating: Operating
    workloads: Workloads
    constraints: tuple[Constraint, ...]
    objectives: tuple[tuple[str, str], ...]
    enumerated: int
    cuts: dict[str, int]

    @property
    def legal(self) -> int:
        """Points of the space: D * Q."""
        return len(self.designs) * len(self.operating)


def compile_space(spec: SpaceSpec) -> CompiledSpace:
    """Look up every name, find the legal designs, and lay everything out as arrays."""
    found, problems = machines(spec)
    entries, more = _models(spec)
    problems += more
    if problems:
        raise together(spec.where, problems)
    shapes = facts(entries)
    fits, problems = _contexts(spec, shapes)
    pairs = [(name, entry) for entry in entries for name in spec.axes.draft_model]
    problems += draft_problems(spec, shapes, pairs) + _hits(spec)
    problems += open_problems(spec)
    values, more = degrees(spec, shapes, found)
    if problems or more:
        raise together(spec.where, problems + more)
    devices = [hardware.to_device(m.gpu) for m in found]
    combinations, rows, names, precisions = _precisions(spec, entries, devices)
    sizes = np.array([m.size for m in found], np.int64)
    rules = _rules(spec, combinations, rows, sharing(spec.axes.draft_model, entries, int(values.tp.max())))
    try:
        result = enumerate_designs(shapes, sizes, fits, values, rules, spec.options.uneven_pp)
    except InputError as error:
        raise InputError(f"{spec.where}: {error}") from None
    if not result.size:
        raise _nothing_legal(spec, values, result)
    operating = _operating(spec)
    return CompiledSpace(
        spec=spec,
        models=tuple(entries),
        machines=tuple(found),
        architectures=stack(align([to_architecture(e) for e in entries])),
        devices=stack(devices),
        topologies=hardware.stacked([hardware.to_topology(m.cluster) for m in found]),
        precisions=stack(precisions),
        precision_names=tuple(names),
        drafts=draft_table(pairs) if any(name != NONE for name, _ in pairs) else None,
        designs=Designs(**{f.name: result.columns[f.name] for f in fields(Designs)}),
        operating=operating,
        workloads=_workloads(spec),
        constraints=constraints_of(spec.constraints),
        objectives=spec.objectives,
        enumerated=result.enumerated * len(operating),
        cuts={reason: count * len(operating) for reason, count in result.cuts.items()},
    )


# --------------------------------------------------------------------------------------------- the tables


def _models(spec: SpaceSpec) -> tuple[list[ModelEntry], list[str]]:
    entries: list[ModelEntry] = []
    problems: list[str] = []
    for i, name in enumerate(spec.models):
        place = f"models[{i}]" if len(spec.models) > 1 else "models"
        try:
            entry = model(name)
        except InputError as error:
            problems.append(f"{place}: {error}")
            continue
        if entry in entries:
            problems.append(f"{place}: {name!r} is {entry.name}, which is listed twice; name each once")
        entries.append(entry)
    return entries, problems


def _contexts(spec: SpaceSpec, shapes: Facts) -> tuple[Array, list[str]]:
    """Which models hold every workload; a workload that none holds is an error."""
    lengths = [w.isl + w.osl for w in spec.workloads]
    fits = (shapes.context >= max(lengths)) | spec.options.extended_context
    longest, best = int(np.argmax(lengths)), int(np.argmax(shapes.context))
    if fits.any():
        return fits, []
    return fits, [
        f"workloads[{longest}]: isl + osl = {lengths[longest]} is more than the context of"
        f" {shapes.names[best]} (allowed: up to {shapes.context[best]}); options.extended_context: true lifts the limit"
    ]


def _hits(spec: SpaceSpec) -> list[str]:
    """Prefix hits are the axis's or the workloads'; an open loop has its own, by request."""
    if spec.axes.prefix_hit is None:
        return []
    known = [i for i, w in enumerate(spec.workloads) if w.prefix_hit or w.trace]
    if known:
        return [f"workloads[{known[0]}].prefix_hit: is searched as axes.prefix_hit; leave one of them out"]
    asked = [m for m in (*spec.constraints, *(name for name, _ in spec.objectives)) if m in OPEN]
    what = "its requests have the workload's prefix_hit; leave axes.prefix_hit out"
    return [f"axes.prefix_hit: {asked[0]} is of an open loop; {what}"] if asked else []


def _precisions(
    spec: SpaceSpec, entries: list[ModelEntry], devices: list[Device]
) -> tuple[Array, Array, list[PrecisionName], list[Precision]]:
    """All (weights, activations, kv) triples; for each model and machine the table row of each, -1 for a copy."""
    axes = spec.axes
    triples = list(itertools.product(axes.weights, axes.activations, axes.kv))
    table: dict[tuple[Any, ...], int] = {}
    precisions: list[Precision] = []
    rows = np.full((len(entries), len(devices), len(triples)), -1, np.int64)
    for i, entry in enumerate(entries):
        moe = any(f.routed is not None for f in entry.ffns)
        for j, device in enumerate(devices):
            seen: set[tuple[Any, ...]] = set()
            for k, (weights, activations, kv) in enumerate(triples):
                precision = formats.resolve(entry, device, weights, kv, activations)
                numbers = vars(precision) if moe else {**vars(precision), **_WITHOUT_EXPERTS}
                name = PrecisionName(*formats.served_formats(entry, device, weights, kv, activations))
                if tuple(numbers.values()) in seen:
                    continue
                seen.add(tuple(numbers.values()))
                rows[i, j, k] = table.setdefault((name, *numbers.values()), len(table))
                if len(table) > len(precisions):
                    precisions.append(replace(precision, **numbers))
    indices = np.array(list(itertools.product(*(range(len(x)) for x in (axes.weights, axes.activations, axes.kv)))))
    return indices, rows, [key[0] for key in table], precisions


# What the experts' part of a precision says does not matter to a model without them.
_WITHOUT_EXPERTS = {
    "expert_bytes": 2.0,
    "expert_act": 2.0,
    "expert_rate": 0.0,
    "dispatch_bytes": 2.0,
    "combine_bytes": 2.0,
}


def _rules(spec: SpaceSpec, combinations: Array, rows: Array, draft_over: Array) -> Rules:
    axes = spec.axes
    none = ("none",)
    pairs = (
        [(rule, rule) for rule in axes.overlap]
        if axes.overlap
        else list(itertools.product(axes.overlap_prefill or none, axes.overlap_decode or none))
    )
    return Rules(
        formats=combinations,
        format_rows=rows,
        overlaps=np.array([[OVERLAPS.index(rule) for rule in pair] for pair in pairs], np.int64),
        dispatch=np.array([DISPATCHES.index(x) for x in axes.dispatch], np.int64),
        eplb_replicas=np.array(axes.eplb_replicas, np.int64),
        cp_method=np.array([CP_METHODS.index(x) for x in axes.cp_method], np.int64),
        sequence_parallel=np.array(axes.sequence_parallel, np.int64),
        microbatches=np.array(axes.microbatches, np.int64),
        utilisation=np.array(axes.utilisation, np.float64),
        draft_model=np.arange(len(axes.draft_model)),
        draft_over=draft_over,
        draft_tp=np.array(axes.draft_tp, np.int64),
    )


def _operating(spec: SpaceSpec) -> Operating:
    axes = spec.axes
    lanes: tuple[Sequence[float], ...] = (
        axes.batch or axes.concurrency or DEFAULT_CONCURRENCY,
        axes.chunk,
        axes.draft_tokens,
        axes.acceptance or (spec.options.acceptance,),
        axes.prefix_hit or (0.0,),
    )
    shape = tuple(len(lane) for lane in lanes)
    if math.prod(shape) > MOST_OPERATING:
        raise InputError(
            f"{spec.where}: axes.concurrency and the load's other axes multiply to {math.prod(shape)} operating points"
            f" (allowed: {MOST_OPERATING}); use a larger step or factor"
        )
    grid = np.meshgrid(*(np.array(lane, np.float64) for lane in lanes), indexing="ij")
    names = ("concurrency", "chunk", "draft_tokens", "acceptance", "prefix_hit")
    columns = dict(zip(names, (x.ravel() for x in grid), strict=True))
    static = np.full(len(columns["chunk"]), 1.0 if axes.batch else 0.0)
    return Operating(**columns, static_batch=static, shape=shape)


def _workloads(spec: SpaceSpec) -> Workloads:
    weight = np.array([w.weight for w in spec.workloads], np.float64)
    return Workloads(
        isl=np.array([w.isl for w in spec.workloads], np.float64),
        osl=np.array([w.osl for w in spec.workloads], np.float64),
        prefix_hit=np.array([w.prefix_hit for w in spec.workloads], np.float64),
        weight=weight / weight.sum(),
        demand=demand_of(spec),
    )


def constraints_of(bounds: Mapping[str, Bound]) -> tuple[Constraint, ...]:
    """What a space asks of its metrics, in order; of a metric with both, the most before the least."""
    result = []
    for metric, bound in bounds.items():
        if bound.max is not None:
            result.append(Constraint(metric, "max", bound.max))
        if bound.min is not None:
            result.append(Constraint(metric, "min", bound.min))
    return tuple(result)


def _nothing_legal(spec: SpaceSpec, values: Degrees, result: Enumeration) -> InputError:
    top = sorted(result.cuts.items(), key=lambda item: -item[1])[:3]
    why = "; ".join(f"{reason} ({count / result.enumerated:.0%})" for reason, count in top)
    least = math.prod(int(x.min()) for x in (values.tp, values.pp, values.cp, values.attention_dp))
    remedy = "give the axes that these name more values, or `auto`"
    if least > values.gpus.max():
        remedy = f"the smallest replica takes {least} GPUs, more than gpus allows; raise gpus or lower a degree"
    return InputError(f"{spec.where}: axes: none of {result.enumerated} plans is legal: {why}; {remedy}")


__all__ = [
    "CompiledSpace",
    "Constraint",
    "Designs",
    "Operating",
    "PrecisionName",
    "Workloads",
    "compile_space",
    "constraints_of",
]
