"""A validated pipeline as arrays: what kinds of call each stage meets, and the plans that it may have."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dse.catalog import hardware
from dse.catalog import precision as formats
from dse.catalog.align import align
from dse.catalog.model_schema import ModelEntry
from dse.catalog.models import model, to_architecture
from dse.cost.lengths import lognormal
from dse.cost.types import Architecture, Device, Plan, Topology, stack
from dse.errors import InputError
from dse.space.load import together
from dse.space.machines import Machine, _machine
from dse.space.pipeline import CONTINUOUS, LARGE_MODELS, PipelineSpec, StageSpec

Array = np.ndarray
STRATA = 16  # of the prompt, once the stages' tokens are added


@dataclass(frozen=True)
class Kinds:
    """The calls of a stage, by kind (leaves (K,)): sequences of `tokens` new tokens behind `cached` ones.

    `weight` sums to 1 over all calls, `first` over those of the first turn. `calls` a request; `share` of the requests
    call it in their first turn; `output`: tokens that a call hands on, mean.
    """

    sequences: Array
    tokens: Array
    cached: Array
    weight: Array
    first: Array
    calls: float
    share: float
    output: float

    @property
    def prompt(self) -> Array:
        return self.tokens + self.cached


class Design(NamedTuple):
    """One plan of a stage. `machine`: row of the machines, -1 for hosts of the stage's own."""

    machine: int
    tp: int
    pp: int
    weights: str
    kv: str
    batch: int

    @property
    def place(self) -> tuple[int, int, int]:
        """What stages of one pool have in common."""
        return self.machine, self.tp, self.pp


@dataclass(frozen=True, kw_only=True, eq=False)
class CompiledPipeline:
    """`designs` by stage, delays without; tables have a leading axis of machines or of models."""

    spec: PipelineSpec
    machines: tuple[Machine, ...]
    entries: tuple[ModelEntry, ...]
    entry_of: dict[str, int]  # stage -> row of entries
    architectures: Architecture
    devices: Device
    topologies: Topology
    kinds: dict[str, Kinds]
    designs: dict[str, tuple[Design, ...]]
    illegal: dict[str, int]  # reason -> designs

    def plans(self, stage: str) -> Plan:
        """Of every design of a stage with a model, stacked."""
        entry = self.entries[self.entry_of[stage]]
        return stack([self._plan(entry, d) for d in self.designs[stage]])

    def _plan(self, entry: ModelEntry, d: Design) -> Plan:
        precision = formats.resolve(entry, hardware.to_device(self.machines[d.machine].gpu), d.weights, d.kv)
        return Plan(
            tp=d.tp,
            pp=d.pp,
            attention_dp=1,
            cp=1,
            moe_tp=d.tp,
            moe_ep=1,
            replicas=1,
            microbatches=0,
            precision=precision,
        )


def compile_pipeline(spec: PipelineSpec) -> CompiledPipeline:
    """Look up every name, and list each stage's legal plans. Raises InputError for all that is wrong at once."""
    problems: list[str] = []
    entries: dict[str, ModelEntry] = {}
    found: list[Machine] = []
    rows: dict[str, tuple[int, ...]] = {}
    for i, stage in enumerate(spec.pipeline):
        place = f"pipeline[{i}] ({stage.name})"
        try:
            if stage.encoder is not None:
                entries[stage.name] = stage.encoder.entry(stage.name, stage.merge)
            elif stage.model is not None:
                entries[stage.name] = model(stage.model)
            choices = () if stage.host else (stage.clusters or spec.clusters or ())
            chosen = [_machine(choice, [], []) for choice in choices]
        except InputError as error:
            problems.append(f"{place}: {error}")
            continue
        found += [m for m in chosen if m not in found]
        rows[stage.name] = tuple(found.index(m) for m in chosen)
    if problems:
        raise together(spec.where, problems)
    distinct = list(dict.fromkeys(e.name for e in entries.values()))
    unique = tuple(next(e for e in entries.values() if e.name == name) for name in distinct)
    designs: dict[str, tuple[Design, ...]] = {}
    illegal: dict[str, int] = {}
    for pool in spec.pools:
        for stage in pool:
            owner = pool[0]
            legal = []
            for d in _all(stage, owner, rows[owner.name]):
                reason = _illegal(spec, stage, entries.get(stage.name), d, found)
                if reason:
                    illegal[reason] = illegal.get(reason, 0) + 1
                else:
                    legal.append(d)
            if not legal:
                why = "; ".join(sorted(r for r in illegal if r.startswith(stage.name)))
                raise InputError(
                    f"{spec.where}: pipeline: no plan of stage {stage.name!r} is legal: {why}; give other tp, pp"
                )
            designs[stage.name] = tuple(legal)
    depth = max([len(hardware.to_topology(m.cluster).levels) for m in found], default=1)
    topologies = [hardware.pad_levels(hardware.to_topology(m.cluster), depth) for m in found]
    return CompiledPipeline(
        spec=spec,
        machines=tuple(found),
        entries=unique,
        entry_of={name: distinct.index(entry.name) for name, entry in entries.items()},
        architectures=stack(align([to_architecture(e) for e in unique])),
        devices=stack([hardware.to_device(m.gpu) for m in found]),
        topologies=stack(topologies),
        kinds=kinds(spec),
        designs=designs,
        illegal=illegal,
    )


def _all(stage: StageSpec, owner: StageSpec, machines: tuple[int, ...]) -> list[Design]:
    if owner.kind == "retrieval":
        return [Design(m, tp, 1, "", "", b) for m in machines or (-1,) for tp in owner.tp for b in stage.batch]
    axes = machines, owner.tp, owner.pp, stage.weights, stage.kv, stage.batch
    return [Design(*x) for x in itertools.product(*axes)]


def _illegal(
    spec: PipelineSpec, stage: StageSpec, entry: ModelEntry | None, d: Design, machines: list[Machine]
) -> str | None:
    """Why a plan cannot be, or None."""
    if d.machine >= 0 and d.tp * d.pp > min(spec.gpus, machines[d.machine].size):
        return f"{stage.name}: tp x pp is more than the GPUs there are"
    if stage.kind == "retrieval":
        capacity = stage.host.capacity_gib if stage.host else machines[d.machine].gpu.capacity_gib.value
        index = float(stage.vectors or 0.0) * float(stage.vector_bytes or 0.0) / 2**30
        return None if index <= capacity * d.tp else f"{stage.name}: the index is larger than memory"
    if entry is None:
        return None
    heads = [m.core.heads for m in entry.mixers if m.core is not None]
    if any(h % d.tp for h in heads):
        return f"{stage.name}: tp does not divide the heads"
    return f"{stage.name}: pp does not divide the layers" if entry.layers % d.pp else None


# ---------------------------------------------------------------------------------------- what a request brings


def _strata(mean: float, cv: float) -> tuple[Array, Array]:
    """Values and weights of a lognormal amount."""
    nodes = lognormal(mean, 1.0, isl_cv=cv)
    values, of = np.unique(np.asarray(nodes.isl), return_inverse=True)
    return values, np.bincount(of.ravel(), weights=np.asarray(nodes.weight))


def _merged(values: Array, weight: Array, most: int = STRATA) -> tuple[Array, Array]:
    """At most `most` kinds of equal weight, each the mean of those it stands for: the mean is kept."""
    if len(values) <= most:
        return values, weight
    order = np.argsort(values, kind="stable")
    values, weight = values[order], weight[order]
    cell = np.minimum(((np.cumsum(weight) - 0.5 * weight) * most).astype(int), most - 1)
    total = np.bincount(cell, weights=weight, minlength=most)
    mean = np.bincount(cell, weights=weight * values, minlength=most)
    return mean[total > 0] / total[total > 0], total[total > 0]


def kinds(spec: PipelineSpec) -> dict[str, Kinds]:
    """What each stage meets of a request: its own tokens; of the language model, the prompts of all turns.

    A prompt is the request's own tokens, what the stages before add, and the encoders' tokens merged: independent
    amounts, so kinds of prompt are their sums.
    """
    turns, result = spec.loop.turns, {}
    prompt, weight = _strata(spec.request.isl, spec.request.isl_cv)
    for stage in spec.pipeline:
        often = float(turns if stage.every_turn else 1)
        if stage.kind in LARGE_MODELS:
            continue
        if stage.tokens is None:
            one = np.ones(1)
            result[stage.name] = Kinds(one, one, 0 * one, one, one, often, 1.0, stage.adds)
        else:
            t = stage.tokens
            amount, share = _strata(t.mean, t.cv)
            each = np.minimum(amount, t.each)
            result[stage.name] = Kinds(
                sequences=amount / each,
                tokens=each,
                cached=np.zeros_like(each),
                weight=share,
                first=share,
                calls=often * t.share,
                share=t.share,
                output=t.mean / stage.merge if stage.kind == "encoder" else stage.adds,
            )
            if stage.kind == "encoder":
                some = np.append(amount / stage.merge, 0.0), np.append(share * t.share, 1.0 - t.share)
                sums = (prompt[:, None] + some[0][None]).ravel(), (weight[:, None] * some[1][None]).ravel()
                prompt, weight = _merged(sums[0][sums[1] > 0], sums[1][sums[1] > 0])
        prompt = prompt + stage.adds
    large = _turns(spec, prompt, weight)
    return {**result, **{s.name: large for s in spec.pipeline if s.kind in LARGE_MODELS}}


def _turns(spec: PipelineSpec, prompt: Array, weight: Array) -> Kinds:
    """Turn j has a context of L_j = prompt + j (osl + growth) tokens, of which hit (L_{j-1} + osl) are still cached."""
    turns, osl = spec.loop.turns, spec.request.osl
    turn = np.repeat(np.arange(turns), len(prompt))
    context = np.tile(prompt, turns) + turn * (osl + spec.loop.growth)
    before = spec.loop.hit * (context - spec.loop.growth)
    cached = np.where(turn == 0, spec.request.prefix_hit * context, before)
    cached = np.minimum(cached, context - 1.0)
    share = np.tile(weight, turns)
    return Kinds(
        sequences=np.ones_like(context),
        tokens=context - cached,
        cached=cached,
        weight=share / turns,
        first=np.where(turn == 0, share, 0.0),
        calls=float(turns),
        share=1.0,
        output=float(share @ context) / turns,
    )


__all__ = ["CONTINUOUS", "CompiledPipeline", "Design", "Kinds", "compile_pipeline", "kinds"]
