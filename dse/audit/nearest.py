"""The nearest plan that meets the targets, or the bound that proves that none can.

A grid around the plan (GPUs, TP, PP, attention-DP, EP, batch) is priced in one batch by the cost model, with the plan's
own MFU and bandwidth utilisation and the ideal elsewhere. Bounds hold for every plan on the hardware, in the grid or
not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import numpy as np

from dse.audit.layouts import is_moe
from dse.audit.price import ONE, Desk, plan_of
from dse.audit.quantity import digits, said
from dse.audit.time_claims import context_limit
from dse.audit.types import Bound, Layout, Nearest, Targets, Variant
from dse.batches import in_blocks
from dse.cost.coefficients import Coefficients
from dse.cost.evaluate import Estimate, Scenario, estimate
from dse.cost.types import Level, Load, Topology, replace, stack

NODE, LINK, BETWEEN = 8, 450e9, 50e9  # of a plan that states no network: today's usual
MOST, BLOCK = 512, 1024
CHUNK = 32768.0
PHASES = ("prefill", "decode")
BATCHES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Candidate:
    layout: Layout
    batch: float


@dataclass(frozen=True)
class Outcome:
    """What the candidates deliver over the workload, worst end of each: arrays, one entry a candidate."""

    ttft: np.ndarray
    tpot: np.ndarray
    prefill: np.ndarray  # tokens/s a GPU
    decode: np.ndarray
    memory: np.ndarray  # bytes


def nearest(desk: Desk) -> Nearest | None:
    """None where the plan has no targets and fits: there is nothing to look for."""
    t = desk.plan.targets
    asked = [q for q in (t.ttft, t.tpot, t.throughput) if q is not None]
    fits = all(desk.use(v, desk.plan.workload.longest).total <= desk.plan.device.capacity for v in desk.plan.variants)
    if not asked and fits:
        return None
    limits = bounds(desk)
    broken = [b for b in limits if b.broken]
    found = candidates(desk)
    outcome = _priced(desk, found)
    miss = _misses(desk, outcome, found)
    far = np.array([_distance(desk, c) for c in found])
    worst = miss.max(axis=0)
    gpus = np.array([c.layout.gpus for c in found])
    order = np.lexsort((gpus, far, np.maximum(worst, 0.0)))
    best = int(order[0])
    meets = bool(worst[best] <= 0.0) and not broken
    described = _describe(found[best], outcome, best)
    label = ", ".join(f"{k} {v}" for k, v in described.items() if k in ("gpus", "layout", "batch"))
    if meets and far[best] == 0.0:
        text = f"the plan itself meets its targets: {label}; {_delivers(outcome, best)}"
    elif meets:
        text = f"nearest plan that meets the targets: {label}; {_delivers(outcome, best)}"
    elif broken:
        proof = "; ".join(f"{b.kind}: {b.text}" for b in broken)
        text = f"no plan meets the targets: {proof}. Least miss: {label}; {_delivers(outcome, best)}"
    else:
        none = f"none of {len(found)} plans around it meets the targets"
        text = f"{none}; the least miss: {label}; {_delivers(outcome, best)}"
    return Nearest(meets=meets, text=text, plan=described, bounds=limits, tried=len(found))


# -------------------------------------------------------------------------------------------------- bounds


def bounds(desk: Desk) -> tuple[Bound, ...]:
    """Limits of the hardware against the targets, for any division of the work."""
    plan, t, w = desk.plan, desk.plan.targets, desk.plan.workload
    light = min(plan.variants, key=lambda v: v.parameters)
    capacity = float(plan.device.capacity)
    whole = desk.weights_total(light) + w.batch * desk.kv_sequence(light, w.longest)
    least = math.ceil(whole / capacity)
    most = plan.most_gpus
    text = f"weights and KV of {said(whole, 'bytes')} need at least {least} GPUs of {said(capacity, 'bytes')}"
    text += f"; {most} is the most there are" if most else ""
    found = [Bound("memory", text, bool(most) and least > (most or 0), {"gpus_needed": float(least)})]
    if t.throughput is not None:
        share = 1.0 if t.throughput.per_gpu else float(most or 0)  # endless GPUs reach any rate in all
        for phase in ((t.phase,) if t.phase else PHASES) if share else ():
            found += _rate_bounds(desk, phase, t.throughput.low / share)
    if t.ttft is not None and most:
        floor = desk.prefill(light, w.prompt[1], ONE).flops / (most * plan.rate * desk.mfu)
        text = f"TTFT: {said(floor, 'seconds')} for the FLOPs of {w.batch:g} × {w.prompt[1]:g} tokens on {most} GPUs"
        found.append(Bound("FLOPs", text, floor > t.ttft.high, {"ttft": floor}))
    if t.tpot is not None:
        n = float(most or MOST)
        read = (_once(desk, light) + w.batch * desk.kv_sequence(light, w.longest)) / n
        floor = read / (float(plan.device.bandwidth) * desk.utilisation)
        text = f"TPOT: {said(floor, 'seconds')} to read weights and cache over {n:g} GPUs, without any latency"
        found.append(Bound("latency", text, bool(most) and floor > t.tpot.high, {"tpot": floor}))
    return tuple(found)


def _rate_bounds(desk: Desk, phase: str, wanted: float) -> list[Bound]:
    """FLOPs a token in either phase; in decode the cache of the context as well."""
    plan, w = desk.plan, desk.plan.workload
    light = min(plan.variants, key=lambda v: v.active)
    length = w.prompt[1] if phase == "prefill" else w.longest
    work = desk.prefill(light, length, ONE) if phase == "prefill" else desk.decode(light, length, ONE)
    tokens = w.batch * (length if phase == "prefill" else 1.0)
    rate = plan.rate * desk.mfu * tokens / work.flops
    text = f"{phase} at {length:g} tokens: at most {said(rate, 'tokens/s')} a GPU, {said(wanted, 'tokens/s')} wanted"
    found = [Bound("FLOPs", text, rate < wanted, {f"{phase}_rate": rate})]
    limit = context_limit(desk, wanted) if phase == "decode" else None
    if limit is not None:
        stream = float(plan.device.bandwidth) * desk.utilisation
        token = desk.kv_sequence(light, w.longest) / w.longest
        most = stream / (token * w.longest)
        text = (
            f"{said(wanted, 'tokens/s')} a GPU in decode is out of reach beyond {round(limit)} tokens of "
            f"context at any batch: {said(stream, 'bytes')}/s ÷ {digits(token / 1024)} KiB a token; "
            f"at {w.longest:g} tokens at most {said(most, 'tokens/s')} a GPU"
        )
        numbers = {"context_limit": limit, "decode_rate": most}
        found.append(Bound("bandwidth", text, limit < w.longest, numbers))
    return found


def _once(desk: Desk, v: Variant) -> float:
    """Bytes of weights that one token needs: the share of them that is active."""
    return desk.weights_total(v) * v.active / v.parameters


# ---------------------------------------------------------------------------------------------------- grid


def candidates(desk: Desk) -> list[Candidate]:
    """Powers of two around the plan, and the plan's own reading first."""
    plan, own = desk.plan, desk.layout
    most = plan.most_gpus or min(MOST, max(64, round(8 * own.gpus)))
    counts = sorted({2**k for k in range(most.bit_length()) if 2**k <= most} | {round(own.gpus)} - {0})
    entry = plan.variants[0].entry
    heads = min((m.core.heads for m in entry.mixers if m.core is not None), default=1)
    experts = min((f.routed.experts for f in entry.ffns if f.routed is not None), default=0)
    batches = [max(1.0, round(plan.workload.batch * b)) for b in BATCHES]
    legal = heads % round(own.tp) == 0 and (experts % round(own.moe_ep) == 0 if experts else True)
    layouts = [own] if legal and own.gpus <= most else []
    for gpus, tp, pp in product(counts, (1, 2, 4, 8, 16), (1, 2, 4)):
        if gpus % (tp * pp) or heads % tp or pp > entry.layers:
            continue
        if not is_moe(plan):
            name = " × ".join(f"{n}{x}" for n, x in (("TP", tp), ("PP", pp), ("replicas", gpus // (tp * pp))) if x > 1)
            layouts.append(Layout(name or "one GPU", tp, pp, 1.0, 1.0, tp, 1.0, gpus / (tp * pp)))
            continue
        stage = gpus // pp
        for ep in (e for e in (1, stage, stage // 2, stage // 4) if e >= 1 and stage % e == 0 and experts % e == 0):
            parts = (("TP", tp), ("attention-DP", stage // tp), ("PP", pp), ("EP", ep), ("expert-TP", stage // ep))
            name = " × ".join(f"{n}{x}" for n, x in parts if x > 1) or "one GPU"
            layouts.append(Layout(name, tp, pp, stage / tp, 1.0, stage / ep, ep))
    unique = {(x.tp, x.pp, x.attention_dp, x.moe_ep, x.replicas): x for x in reversed(layouts)}
    return [
        Candidate(x, b)
        for x in unique.values()
        for b in dict.fromkeys(batches)
        if b >= x.attention_dp * x.replicas or (x is own and b == plan.workload.batch)
    ]


def coefficients(desk: Desk) -> Coefficients:
    """The bare roofline at the plan's MFU and bandwidth utilisation, or the physics' where the plan states none."""
    usual = Coefficients()
    mfu = desk.plan.mfu
    stream = desk.plan.utilisation
    gemm = {n: getattr(usual, n) if mfu is None else mfu for n in _COMPUTE}
    memory = {n: getattr(usual, n) if stream is None else stream for n in ("memory", "core_memory", "expert_memory")}
    limit = {} if mfu is not None else {"flops_per_joule": usual.flops_per_joule}  # an MFU has the power limit in it
    return replace(Coefficients.ideal(), **gemm, **memory, **limit)


_COMPUTE = ("gemm_bf16", "gemm_fp8", "gemm_fp4", "gemm_int8", "core_prefill", "core_decode")


def _priced(desk: Desk, found: list[Candidate]) -> Outcome:
    """Both ends of the workload of every candidate, in blocks of one size."""
    plan, w, net = desk.plan, desk.plan.workload, desk.plan.network
    levels = (
        Level(size=float(net.node or NODE), bandwidth=net.link or LINK, latency=0.0),
        Level(size=4096.0, bandwidth=net.between or net.link or BETWEEN, latency=0.0),
    )
    fixed: dict[str, Any] = {
        "architecture": max(plan.variants, key=lambda v: v.parameters).architecture,
        "device": plan.device,
        "topology": Topology(levels=levels),
        "coefficients": coefficients(desk),
    }
    rows = [(c, isl) for isl in w.prompt for c in found]
    scenarios = [
        Scenario(
            **fixed,
            plan=replace(plan_of(c.layout, plan), cp_method=None),
            load=Load(
                isl=isl,
                osl=max(w.output, 2.0),
                concurrency=c.batch / c.layout.replicas,
                chunk=CHUNK,
                static_batch=1.0,
            ),
        )
        for c, isl in rows
    ]
    with jax.enable_x64(True):
        priced = in_blocks(estimate, stack(scenarios), block=BLOCK, least=BLOCK)
    whole: Estimate = jax.tree.map(lambda leaf: leaf.reshape(2, -1), priced)
    gpus = np.array([c.layout.gpus for c in found])
    size = np.array([c.batch for c in found])
    prompts = np.array(w.prompt)[:, None]
    return Outcome(
        ttft=whole.ttft.max(axis=0),
        tpot=whole.tpot.max(axis=0),
        prefill=(size * prompts / whole.ttft / gpus).min(axis=0),
        decode=(size / whole.tpot / gpus).min(axis=0),
        memory=whole.memory.total.max(axis=0),
    )


def _misses(desk: Desk, x: Outcome, found: list[Candidate]) -> np.ndarray:
    """log(how far off) of memory and each target, (kinds, candidates); 0 and below: met."""
    t: Targets = desk.plan.targets
    over = np.log(x.memory / float(desk.plan.device.capacity))
    rows: list[Any] = [np.where(over > 0, 100.0 + over, over)]  # what does not fit comes last
    if t.ttft is not None:
        rows.append(np.log(x.ttft / t.ttft.high))
    if t.tpot is not None:
        rows.append(np.log(x.tpot / t.tpot.high))
    if t.throughput is not None:
        each = 1.0 if t.throughput.per_gpu else np.array([c.layout.gpus for c in found])
        for phase in (t.phase,) if t.phase else PHASES:
            rows.append(np.log(t.throughput.low / (getattr(x, phase) * each)))
    return np.stack(rows)


def _distance(desk: Desk, c: Candidate) -> float:
    """Doublings of degrees, GPUs and batch between a candidate and the plan."""
    a, b = c.layout, desk.layout
    pairs = [(getattr(a, n), getattr(b, n)) for n in ("tp", "pp", "attention_dp", "moe_ep", "gpus")]
    pairs.append((c.batch, desk.plan.workload.batch))
    return float(sum(abs(math.log2(x / y)) for x, y in pairs))


def _describe(c: Candidate, x: Outcome, i: int) -> dict[str, float | str]:
    degrees = {n: getattr(c.layout, n) for n in ("tp", "pp", "attention_dp", "moe_ep", "moe_tp", "replicas")}
    return {
        "layout": c.layout.name,
        "gpus": c.layout.gpus,
        "batch": c.batch,
        **degrees,
        "ttft_ms": float(x.ttft[i]) * 1e3,
        "tpot_ms": float(x.tpot[i]) * 1e3,
        "prefill_tok_s_gpu": float(x.prefill[i]),
        "decode_tok_s_gpu": float(x.decode[i]),
        "memory_gib": float(x.memory[i]) / 2**30,
    }


def _delivers(x: Outcome, i: int) -> str:
    rates = f"prefill {said(x.prefill[i], 'tokens/s')} and decode {said(x.decode[i], 'tokens/s')} a GPU"
    latency = f"TTFT {said(x.ttft[i], 'seconds')}, TPOT {said(x.tpot[i], 'seconds')}"
    return f"{latency}, {rates}, {said(x.memory[i], 'bytes')} a GPU"


__all__ = ["bounds", "candidates", "nearest"]
