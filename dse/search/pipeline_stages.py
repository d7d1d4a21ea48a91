"""Every plan of every stage of a pipeline, priced by itself: all jobs in one vectorised call, decode in another.

Aggregated language models depend on the rate; `pipeline_open` prices them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np

from dse.batches import at_rows, in_blocks
from dse.cost.coefficients import Coefficients
from dse.cost.evaluate import Scenario
from dse.cost.lengths import NODES
from dse.cost.memory import kv_bytes, memory
from dse.cost.microbatch import slowdown
from dse.cost.pipeline import Batched, Continuous, Job, batched, decode_time, job_times, scan_time
from dse.cost.types import Load, Plan, replace
from dse.programs import program
from dse.space.pipeline import DELAYS, LARGE_MODELS, StageSpec
from dse.space.pipeline_calls import Kinds, answer, contexts
from dse.space.pipeline_compile import CompiledPipeline, Design
from dse.units import GB, MS

Array = np.ndarray
KNOTS = 6  # numbers of running calls at which a continuous stage is priced
CONTEXTS = 6  # and contexts
WAVES = 1e9  # requests a client: no first wave, the load is open
SURE = 2.0  # standard deviations of the cache that all seats hold, beyond its mean


@dataclass(frozen=True, eq=False)
class Priced:
    """A stage's designs, leaves (D,): times, bytes a GPU (`held`; `reserve` of them once a GPU), what is handed on.

    `times`: of an aggregated language model its scenarios, to be priced at a rate.
    """

    times: Batched | Continuous | Scenario
    held: Array
    reserve: Array
    handed: Array  # bytes that a call sends to the next stage
    cache: Array  # bytes of a cached element, which two pools must agree on; 0: no cache


@cache
def _compiled(function: Any) -> Any:
    return program(function, in_axes=0)


def _each(function: Any, *trees: Any) -> Any:
    """`function` of every row."""
    return in_blocks(_compiled(function), *trees, least=256)


def _each_of(designs: tuple[Design, ...], name: str) -> Array:
    """A number of every design, (D,)."""
    return np.array([getattr(d, name) for d in designs], float)


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
        elif s.kind == "decode":
            found[s.name] = _decode(p, c, s)
        elif s.kind == "llm":
            found[s.name] = _aggregated(p, c, s)
    return found


def _jobs(p: CompiledPipeline, c: Coefficients, s: StageSpec) -> Job:
    """Rows: (alone, full batch) x designs x kinds. Of an encoder's copies the one that has most sequences."""
    k = p.kinds[s.name]
    count, width = len(p.designs[s.name]), len(k.tokens)
    index = np.tile(np.repeat(np.arange(count), width), 2)
    batch = _each_of(p.designs[s.name], "batch")
    many = np.concatenate([np.ones(count * width), np.repeat(batch, width)])
    sequences = np.tile(k.sequences, 2 * count) * many
    return Job(
        **_machine_parts(p, c, s.name, index),
        sequences=_dealt(s, sequences, _each_of(p.designs[s.name], "copies")[index]),
        tokens=np.tile(k.tokens, 2 * count),
        cached=np.tile(k.cached, 2 * count),
        bidirectional=np.full(len(index), 1.0 if s.kind == "encoder" else 0.0),
    )


def _dealt(s: StageSpec, sequences: Array, copies: Array) -> Array:
    """Sequences of a copy of an encoder. (A language model deals its calls over its ranks itself.)"""
    return sequences if s.kind in LARGE_MODELS else np.maximum(sequences / copies, np.minimum(sequences, 1.0))


def _of_jobs(p: CompiledPipeline, c: Coefficients, s: StageSpec, through: Array, occupied: Array) -> Priced:
    k, designs = p.kinds[s.name], p.designs[s.name]
    shape = (2, len(designs), len(k.tokens))
    alone, full = through.reshape(shape)
    lone, busy = occupied.reshape(shape)
    longer = _uneven(designs, busy, k)
    machine = np.array([d.machine for d in designs])
    # what an engine adds once a request: HTTP, tokenisation, first scheduling
    arrival = (
        at_rows(c, (machine, p.entry_of[s.name])).arrival_overhead if s.kind == "prefill" else np.zeros(len(designs))
    )
    times = batched(
        (alone + arrival[:, None], full * longer + arrival[:, None]),
        (lone, busy * longer),
        k.weight,
        k.first,
        _each_of(designs, "batch"),
        np.full(len(designs), k.calls),
    )
    times = replace(times, slopes=stage_slopes(p, s, k, alone))
    return _priced(p, c, s, jax.tree.map(np.asarray, times), k)


def stage_slopes(p: CompiledPipeline, s: StageSpec, k: Kinds, alone: Array) -> tuple[Array, ...]:
    """(D,) of each amount in common: seconds that a request's first call takes more by a standard deviation of it.

    Regressions over kinds: an encoder's time on its tokens, requests without any among them; prefill's on the prompt's,
    of which the encoder's are a part, independent of the rest.
    """

    def between(t: Array, x: Array, share: float) -> Array:
        """Covariance over requests, of which a share has any."""
        return np.asarray(share * ((t * x) @ k.first) - share**2 * (t @ k.first) * float(x @ k.first))

    found = []
    for common in p.commons:
        slope = np.zeros(len(alone))
        if s.name == common.stage:
            slope = between(alone, k.sequences * k.tokens, k.share) / common.deviation
        elif s.kind == "prefill":
            varies = float(between(k.tokens, k.tokens, 1.0))
            new = common.deviation / common.merge * (1.0 - p.spec.request.prefix_hit)
            slope = between(alone, k.tokens, 1.0) / varies * new if varies > 0 else slope
        found.append(np.maximum(slope, 0.0))
    return tuple(found)


def _uneven(designs: tuple[Design, ...], busy: Array, k: Kinds) -> Array:
    """(D, 1) how much longer full batches take one behind the other through pp stages, for the calls in them differ."""
    batch, stages = _each_of(designs, "batch"), _each_of(designs, "pp")
    if stages.max() <= 1.0:
        return np.ones((len(designs), 1))
    balanced = np.array([d.microbatching == "balanced" for d in designs], float)
    weight = np.broadcast_to(k.weight, busy.shape)
    return np.asarray(_each(slowdown, busy / batch[:, None], weight, batch, stages, balanced))[:, None]


def _retrieval(p: CompiledPipeline, c: Coefficients, s: StageSpec) -> Priced:
    """Queries are alike; a GPU's memory is read at the coefficients' share of its bandwidth."""
    designs, k = p.designs[s.name], p.kinds[s.name]
    tp, batch = (_each_of(designs, name) for name in ("tp", "batch"))
    machine = np.array([d.machine for d in designs])
    if s.host is not None:
        bandwidth = s.host.memory_gb_s * GB * tp
    else:
        bandwidth = np.asarray(p.devices.bandwidth)[machine] * np.asarray(c.memory)[machine, 0] * tp
    alone, full = (
        np.asarray(scan_time(s.index_bytes, s.scan, n, bandwidth, s.time_ms * MS))[:, None]
        for n in (np.ones_like(batch), batch)
    )
    both = alone, full
    one = np.ones(1)
    times = batched(both, both, one, one, batch, np.full(len(designs), k.calls))
    nothing = np.zeros(len(designs))
    times = replace(times, slopes=tuple(nothing for _ in p.commons))
    held = nothing if s.host is not None else s.index_bytes / tp
    return Priced(jax.tree.map(np.asarray, times), held, nothing, nothing, nothing)


def _decode(p: CompiledPipeline, c: Coefficients, s: StageSpec) -> Priced:
    """Rows: designs x numbers of running calls x contexts (of all turns): a step is the mean over its calls'."""
    k, designs, r = p.kinds[s.name], p.designs[s.name], p.spec.request
    prompt, weight = contexts(k, CONTEXTS)
    batch = _each_of(designs, "batch")
    alive = batch[:, None] ** np.linspace(0.0, 1.0, KNOTS)
    index = np.repeat(np.arange(len(designs)), KNOTS * len(prompt))
    load = _load(s, k, r.osl, np.repeat(alive.ravel(), len(prompt)))
    load = replace(load, isl=np.tile(prompt, alive.size))
    x = Scenario(**_machine_parts(p, c, s.name, index), load=load)
    each = np.asarray(_each(decode_time, x)).reshape(*alive.shape, len(prompt))
    tpot = each @ weight
    steps = max(r.osl - 1.0, 1e-3)
    stay = steps * tpot
    times = Continuous(
        rate=np.maximum.accumulate(alive / stay, axis=1),
        tpot=tpot,
        seats=batch,
        scv=np.full(len(designs), r.osl_cv**2),
        calls=np.full(len(designs), k.calls),
        steps=np.full(len(designs), steps),
        uneven=(each - tpot[..., None]) ** 2 @ weight,
    )
    return _priced(p, c, s, times, k)


def _aggregated(p: CompiledPipeline, c: Coefficients, s: StageSpec) -> Priced:
    """`load.concurrency`: seats of a replica."""
    k, designs = p.kinds[s.name], p.designs[s.name]
    batch = _each_of(designs, "batch")
    load = _load(s, k, answer(p.spec, s)[0], batch)
    return _priced(p, c, s, Scenario(**_machine_parts(p, c, s.name, np.arange(len(designs))), load=load), k)


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


def _priced(
    p: CompiledPipeline, c: Coefficients, s: StageSpec, times: Batched | Continuous | Scenario, k: Kinds
) -> Priced:
    """With memory: a batch of the longest kind (batched), or all seats (decode, aggregated)."""
    designs = p.designs[s.name]
    parts = _machine_parts(p, c, s.name, np.arange(len(designs)))
    batch = _each_of(designs, "batch")
    one = np.ones_like(batch)
    arch, plan = parts["architecture"], parts["plan"]
    if isinstance(times, Batched):
        longest = int(np.argmax(k.sequences * k.prompt))
        sequences = _dealt(s, batch * k.sequences[longest], _each_of(designs, "copies"))
        load = replace(
            _load(s, k, 0.0, sequences),
            isl=float(k.prompt[longest]) * one,
            prefix_hit=float(k.cached[longest] / k.prompt[longest]) * one,
            chunk=1e12 * one,
        )
    else:
        load = _load(s, k, answer(p.spec, s)[0], batch)
    m = _each(memory, arch, parts["device"], plan, load, parts["coefficients"])
    held = np.asarray(m.total)
    if not isinstance(times, Batched):
        held = held - np.asarray(m.kv) + _seated(parts, load, k)
    handed, cache_bytes = np.zeros(len(designs)), np.zeros(len(designs))
    if s.kind in ("prefill", "decode"):
        cache_bytes = np.asarray(plan.precision.kv_bytes, float)
    following = [x for x in p.spec.pipeline[p.spec.pipeline.index(s) + 1 :] if x.name in p.entry_of]
    if s.transfer_bytes is not None:
        handed = np.full(len(designs), s.transfer_bytes * k.output)
    elif s.kind == "prefill":
        handed = np.asarray(_each(kv_bytes, arch, replace(plan, tp=one, pp=one, cp=one), k.output * one))
    elif s.kind == "encoder" and following:
        handed = np.full(len(designs), 2.0 * p.entries[p.entry_of[following[0].name]].hidden * k.output)
    return Priced(times, held, np.asarray(m.reserve), handed, cache_bytes)


def _seated(parts: dict[str, Any], load: Load, k: Kinds) -> Array:
    """Bytes of cache that the seats of a rank hold of answered contexts: n mean + 2 sqrt(n) deviations of one's."""
    plan: Plan = parts["plan"]
    prompt, weight = contexts(k, NODES)
    count = len(np.asarray(plan.tp))
    index = np.repeat(np.arange(count), len(prompt))
    reserved = np.asarray(parts["coefficients"].reserved_output)[index] * np.asarray(load.osl)[index]
    length = np.tile(prompt, count) + reserved
    each = np.asarray(_each(kv_bytes, at_rows(parts["architecture"], index), at_rows(plan, index), length))
    each = each.reshape(count, len(prompt))
    mean = each @ weight
    deviation = np.sqrt(np.maximum((each - mean[:, None]) ** 2 @ weight, 0.0))
    seats = np.maximum(np.asarray(load.concurrency) / np.asarray(plan.attention_dp), 1.0)
    return seats * mean + SURE * np.sqrt(seats) * deviation


__all__ = ["Priced", "price", "stage_slopes"]
