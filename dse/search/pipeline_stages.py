"""Every plan of every stage of a pipeline, priced by itself: all jobs in one vectorised call, decode in another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np

from dse.cost.coefficients import Coefficients
from dse.cost.evaluate import Scenario, estimate_one
from dse.cost.memory import kv_bytes, memory
from dse.cost.pipeline import Batched, Continuous, Job, batched, decode_time, job_times, scan_time
from dse.cost.types import Load, Plan, replace
from dse.space.pipeline import DELAYS, StageSpec
from dse.space.pipeline_compile import CompiledPipeline, Kinds
from dse.units import GB, MS

Array = np.ndarray
KNOTS = 6  # numbers of running calls at which a continuous stage is priced
WAVES = 1e9  # requests a client: no first wave, the load is open


@dataclass(frozen=True, eq=False)
class Priced:
    """A stage's designs, leaves (D,): times, bytes a GPU (`held`; `reserve` of them once a GPU), what is handed on."""

    times: Batched | Continuous
    held: Array
    reserve: Array
    handed: Array  # bytes that a call sends to the next stage
    cache: Array  # bytes of a cached element, which two pools must agree on; 0: no cache


def at_rows(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


@cache
def _compiled(function: Any) -> Any:
    return jax.jit(jax.vmap(function))


def _each(function: Any, *trees: Any) -> Any:
    """`function` of every row, rows padded to a power of two: few shapes, few compilations."""
    count = len(jax.tree.leaves(trees)[0])
    index = np.minimum(np.arange(max(256, 1 << (count - 1).bit_length())), count - 1)
    return at_rows(_compiled(function)(*at_rows(trees, index)), np.arange(count))


def _machine_parts(p: CompiledPipeline, c: Coefficients, stage: str, index: Array) -> dict[str, Any]:
    """What a scenario and a job have in common, for rows of a stage's designs."""
    machine = np.array([d.machine for d in p.designs[stage]])[index]
    entry = np.full(len(index), p.entry_of[stage])
    return {
        "architecture": at_rows(p.architectures, entry),
        "device": at_rows(p.devices, machine),
        "topology": at_rows(p.topologies, machine),
        "plan": at_rows(p.plans(stage), index),
        "coefficients": at_rows(c, (machine, entry)),
    }


def price(p: CompiledPipeline, c: Coefficients) -> dict[str, Priced]:
    """Every design of every stage; all jobs in one call, all decode steps in one. `c`: leaves (machines, models)."""
    jobs, found = [], {}
    stages = [s for s in p.spec.pipeline if s.kind not in DELAYS]
    for s in stages:
        if s.kind in ("encoder", "rerank", "prefill"):
            jobs.append((s, _jobs(p, c, s)))
    if jobs:
        sizes = np.cumsum([len(np.asarray(j.tokens)) for _, j in jobs])
        whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(j for _, j in jobs))
        through, occupied = (np.split(np.asarray(x), sizes[:-1]) for x in _each(job_times, whole))
        for (s, _), a, b in zip(jobs, through, occupied, strict=True):
            found[s.name] = _of_jobs(p, c, s, a, b)
    for s in stages:
        if s.kind == "retrieval":
            found[s.name] = _retrieval(p, c, s)
        elif s.kind in ("decode", "llm"):
            found[s.name] = _continuous(p, c, s)
    return found


def _jobs(p: CompiledPipeline, c: Coefficients, s: StageSpec) -> Job:
    """Rows: (alone, full batch) x designs x kinds."""
    k = p.kinds[s.name]
    count, width = len(p.designs[s.name]), len(k.tokens)
    index = np.tile(np.repeat(np.arange(count), width), 2)
    batch = np.array([d.batch for d in p.designs[s.name]], float)
    many = np.concatenate([np.ones(count * width), np.repeat(batch, width)])
    return Job(
        **_machine_parts(p, c, s.name, index),
        sequences=np.tile(k.sequences, 2 * count) * many,
        tokens=np.tile(k.tokens, 2 * count),
        cached=np.tile(k.cached, 2 * count),
        bidirectional=np.full(len(index), 1.0 if s.kind == "encoder" else 0.0),
    )


def _of_jobs(p: CompiledPipeline, c: Coefficients, s: StageSpec, through: Array, occupied: Array) -> Priced:
    k, designs = p.kinds[s.name], p.designs[s.name]
    shape = (2, len(designs), len(k.tokens))
    alone, full = through.reshape(shape)
    machine = np.array([d.machine for d in designs])
    # what an engine adds once a request: HTTP, tokenisation, first scheduling
    arrival = (
        at_rows(c, (machine, p.entry_of[s.name])).arrival_overhead if s.kind == "prefill" else np.zeros(len(designs))
    )
    times = batched(
        (alone + arrival[:, None], full + arrival[:, None]),
        (occupied.reshape(shape)[0], occupied.reshape(shape)[1]),
        k.weight,
        k.first,
        np.array([d.batch for d in designs], float),
        np.full(len(designs), k.calls),
    )
    return _priced(p, c, s, jax.tree.map(np.asarray, times), k)


def _retrieval(p: CompiledPipeline, c: Coefficients, s: StageSpec) -> Priced:
    """Queries are alike; a GPU's memory is read at the coefficients' share of its bandwidth."""
    designs, k = p.designs[s.name], p.kinds[s.name]
    tp, batch = (np.array([getattr(d, name) for d in designs], float) for name in ("tp", "batch"))
    machine = np.array([d.machine for d in designs])
    if s.host is not None:
        bandwidth = s.host.memory_gb_s * GB * tp
    else:
        bandwidth = np.asarray(p.devices.bandwidth)[machine] * np.asarray(c.memory)[machine, 0] * tp
    index = float(s.vectors or 0.0) * float(s.vector_bytes or 0.0)
    alone, full = (
        np.asarray(scan_time(index, s.scan, n, bandwidth, s.time_ms * MS))[:, None]
        for n in (np.ones_like(batch), batch)
    )
    both = alone, full
    one = np.ones(1)
    times = batched(both, both, one, one, batch, np.full(len(designs), k.calls))
    nothing = np.zeros(len(designs))
    held = nothing if s.host is not None else index / tp
    return Priced(jax.tree.map(np.asarray, times), held, nothing, nothing, nothing)


def _continuous(p: CompiledPipeline, c: Coefficients, s: StageSpec) -> Priced:
    """Rows: designs x numbers of running calls. At the mean context of all turns, which a decode step is linear in."""
    k, designs, r = p.kinds[s.name], p.designs[s.name], p.spec.request
    index = np.repeat(np.arange(len(designs)), KNOTS)
    batch = np.array([d.batch for d in designs], float)
    alive = batch[:, None] ** np.linspace(0.0, 1.0, KNOTS)
    x = Scenario(**_machine_parts(p, c, s.name, index), load=_load(s, k, r.osl, alive.ravel()))
    after = max(r.osl - 1.0, 1e-3)
    if s.kind == "decode":
        tpot = np.asarray(_each(decode_time, x)).reshape(alive.shape)
        ttft, stay = np.zeros_like(tpot), after * tpot
    else:
        e = _each(estimate_one, x)
        ttft, tpot, stay = (np.asarray(v).reshape(alive.shape) for v in (e.ttft, e.tpot, e.e2e))
    times = Continuous(
        rate=np.maximum.accumulate(alive / stay, axis=1),
        ttft=ttft,
        tpot=tpot,
        seats=batch,
        scv=np.full(len(designs), r.osl_cv**2),
        calls=np.full(len(designs), k.calls),
    )
    return _priced(p, c, s, times, k)


def _load(s: StageSpec, k: Kinds, osl: float, requests: Array) -> Load:
    """Of the mean call, `requests` at once."""
    prompt, new = float(k.weight @ k.prompt), float(k.weight @ k.tokens)
    full = np.ones_like(requests)
    return Load(
        isl=prompt * full,
        osl=osl * full,
        concurrency=requests,
        chunk=(0.0 if s.kind == "decode" else float(s.chunk)) * full,
        prefix_hit=(1.0 - new / prompt) * full,
        waves=WAVES * full,
        acceptance=0.7 * full,
    )


def _priced(p: CompiledPipeline, c: Coefficients, s: StageSpec, times: Batched | Continuous, k: Kinds) -> Priced:
    """With memory: a batch of the longest kind (batched), or all seats at the mean context (continuous)."""
    designs = p.designs[s.name]
    index = np.arange(len(designs))
    parts = _machine_parts(p, c, s.name, index)
    batch = np.array([d.batch for d in designs], float)
    if isinstance(times, Continuous):
        load = _load(s, k, p.spec.request.osl, batch)
    else:
        longest = int(np.argmax(k.sequences * k.prompt))
        full = np.ones_like(batch)
        load = replace(
            _load(s, k, 0.0, batch * k.sequences[longest]),
            isl=float(k.prompt[longest]) * full,
            prefix_hit=float(k.cached[longest] / k.prompt[longest]) * full,
            chunk=1e12 * full,
        )
    m = _each(memory, parts["architecture"], parts["device"], parts["plan"], load, parts["coefficients"])
    handed, cache_bytes = np.zeros(len(designs)), np.zeros(len(designs))
    plan: Plan = parts["plan"]
    if s.kind in ("prefill", "decode"):
        cache_bytes = np.asarray(plan.precision.kv_bytes, float)
    following = [x for x in p.spec.pipeline[p.spec.pipeline.index(s) + 1 :] if x.name in p.entry_of]
    if s.transfer_bytes is not None:
        handed = np.full(len(designs), s.transfer_bytes * k.output)
    elif s.kind == "prefill":
        whole = replace(plan, tp=np.ones_like(batch), pp=np.ones_like(batch))
        handed = np.asarray(_each(kv_bytes, parts["architecture"], whole, np.full(len(designs), k.output)))
    elif s.kind == "encoder" and following:
        handed = np.full(len(designs), 2.0 * p.entries[p.entry_of[following[0].name]].hidden * k.output)
    return Priced(times, np.asarray(m.total), np.asarray(m.reserve), handed, cache_bytes)


__all__ = ["Priced", "at_rows", "price"]
