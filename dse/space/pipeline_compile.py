"""A validated pipeline as arrays: what kinds of call each stage meets, and the plans that it may have."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dse.catalog import hardware
from dse.catalog import precision as formats
from dse.catalog.align import align
from dse.catalog.model_schema import ModelEntry
from dse.catalog.models import model, to_architecture
from dse.cost.types import Architecture, Device, Plan, Topology, stack
from dse.errors import InputError
from dse.space.facts import Facts, facts
from dse.space.legal import CUT_DENSE_DP, CUT_DENSE_MOE, CUT_EXPERTS, CUT_HEADS, CUT_LAYERS, CUT_STAGE, CUT_WIDTH
from dse.space.load import together
from dse.space.machines import Machine, _machine
from dse.space.pipeline import LARGE_MODELS, PipelineSpec, StageSpec
from dse.space.pipeline_calls import Common, Kinds, commons, kinds
from dse.units import GIB


class Design(NamedTuple):
    """One plan of a stage. `machine`: row of the machines, -1 for hosts of the stage's own. `own`: tp of an encoder
    whose copies fill a pool of another's tp (0: that one)."""

    machine: int
    tp: int
    pp: int
    attention_dp: int
    cp: int
    spread: int
    ep: int
    own: int
    weights: str
    kv: str
    batch: int
    microbatching: str = "fifo"

    @property
    def place(self) -> tuple[int, ...]:
        """What stages of one pool have in common."""
        return self[:6]

    @property
    def gpus(self) -> int:
        """Of a replica."""
        return self.tp * self.pp * self.attention_dp * self.cp * self.spread

    @property
    def degree(self) -> int:
        """Its own tp."""
        return self.own or self.tp

    @property
    def copies(self) -> int:
        """Of an encoder on it, each on degree * pp GPUs."""
        return self.gpus // (self.degree * self.pp)

    @property
    def holders(self) -> int:
        """GPUs that hold a part of one call's output."""
        return self.tp * self.pp * self.cp * self.spread


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
    commons: tuple[Common, ...]
    designs: dict[str, tuple[Design, ...]]
    illegal: dict[str, int]  # reason -> designs

    def plans(self, stage: str) -> Plan:
        """Of every design of a stage with a model, stacked."""
        entry = self.entries[self.entry_of[stage]]
        large = next(s.kind for s in self.spec.pipeline if s.name == stage) in LARGE_MODELS
        return stack([self._plan(entry, d, large) for d in self.designs[stage]])

    def _plan(self, entry: ModelEntry, d: Design, large: bool) -> Plan:
        """Encoders and rerankers are copied where language models have attention DP or context parallelism."""
        precision = formats.resolve(entry, hardware.to_device(self.machines[d.machine].gpu), d.weights, d.kv)
        ranks, cp = (d.attention_dp, d.cp) if large else (1, 1)
        sharded = any(x.cp > 1 for designs in self.designs.values() for x in designs)
        return Plan(
            tp=d.degree,
            pp=d.pp,
            attention_dp=ranks,
            cp=cp,
            moe_tp=d.degree * ranks * cp / d.ep,
            moe_ep=d.ep,
            replicas=1,
            microbatches=0,
            precision=precision,
            cp_method=0.0 if sharded else None,
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
            owner, legal = pool[0], []
            of = facts([entries[stage.name]]) if stage.name in entries else None
            for d in _all(stage, owner, rows[owner.name]):
                reason = _illegal(spec, stage, of, d, found)
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
    calls = kinds(spec)
    return CompiledPipeline(
        spec=spec,
        machines=tuple(found),
        entries=unique,
        entry_of={name: distinct.index(entry.name) for name, entry in entries.items()},
        architectures=stack(align([to_architecture(e) for e in unique])),
        devices=stack([hardware.to_device(m.gpu) for m in found]),
        topologies=hardware.stacked([hardware.to_topology(m.cluster) for m in found]),
        kinds=calls,
        commons=commons(spec, calls),
        designs=designs,
        illegal=illegal,
    )


def _all(stage: StageSpec, owner: StageSpec, machines: tuple[int, ...]) -> list[Design]:
    if owner.kind == "retrieval":
        axes: tuple[tuple[Any, ...], ...] = (machines or (-1,), owner.tp, *((1,),) * 5, (0,), ("",), ("",))
    else:
        shape = machines, owner.tp, owner.pp, owner.attention_dp, owner.cp, owner.spread
        own = stage.tp if stage is not owner and "tp" in stage.model_fields_set else (0,)
        axes = *shape, stage.ep, own, stage.weights, stage.kv
    found = [Design(*x) for x in itertools.product(*axes, stage.batch, stage.microbatching)]
    return [d for d in found if d.pp > 1 or d.microbatching == stage.microbatching[0]]  # one stage has no bubbles


def _illegal(spec: PipelineSpec, stage: StageSpec, of: Facts | None, d: Design, machines: list[Machine]) -> str | None:
    """Why a plan cannot be, or None."""
    if d.machine >= 0 and d.gpus > min(spec.gpus, machines[d.machine].size):
        return f"{stage.name}: a replica has more GPUs than there are"
    if stage.kind == "retrieval":
        capacity = stage.host.capacity_gib if stage.host else machines[d.machine].gpu.capacity_gib.value
        return None if stage.index_bytes / GIB <= capacity * d.tp else f"{stage.name}: the index is larger than memory"
    wrong = None if of is None else _indivisible(of, stage, d)
    return f"{stage.name}: {wrong}" if wrong else None


def _indivisible(of: Facts, stage: StageSpec, d: Design) -> str | None:
    """Which degree does not divide the model."""
    tp, pp, ep = (np.array([x]) for x in (d.degree, d.pp, d.ep))
    if not of.tp(tp).all():
        return CUT_HEADS
    if d.tp % d.degree:
        return "its own tp does not divide its pool's"
    if not of.pp(pp, False).all():
        return CUT_LAYERS
    if stage.kind not in LARGE_MODELS:
        return None
    if d.spread > 1:
        return "a language model is not spread over copies"
    ranks, moe = d.tp * d.attention_dp * d.cp, bool(of.moe.all())
    if not moe:
        return CUT_DENSE_DP if d.attention_dp > 1 else CUT_DENSE_MOE if d.ep > 1 else None
    if not of.ep(ep).all():
        return CUT_EXPERTS
    if ranks % d.ep:
        return CUT_STAGE
    return None if of.moe_tp(ranks // ep).all() else CUT_WIDTH


__all__ = ["CompiledPipeline", "Design", "Kinds", "compile_pipeline", "kinds"]
