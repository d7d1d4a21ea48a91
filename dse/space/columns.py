"""Estimates as columns for people: ms, GiB, tokens/s/GPU, USD; the breakdown; feasible or the reason why not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from dse.cost.evaluate import Estimate, OpenEstimate
from dse.cost.goodput import OpenLoop
from dse.cost.memory import Memory
from dse.cost.step import Step
from dse.units import GIB, MS

Array = np.ndarray

# Parts of a step in the order in which a breakdown is drawn; `hidden` is what overlap saves (negative bar).
STEP_PARTS = (
    "projections",
    "attention",
    "dense",
    "experts",
    "elementwise",
    "head",
    "reduce",
    "exchange",
    "sequence",
    "overhead",
    "hidden",
)
STEPS = ("decode", "mixed", "prefill")
MEMORY_PARTS = ("weights", "kv", "activations", "buffers", "reserve")


def columns(estimate: Estimate, concurrency: Array, attention_dp: Array) -> dict[str, Array]:
    """Contract columns of a batch of estimates (leaves (n,)), in their order."""
    served, memory = estimate.served, estimate.memory
    feasible, reason = fits(memory, concurrency, attention_dp)
    result: dict[str, Array] = {
        "ttft_ms": estimate.ttft / MS,
        "tpot_ms": estimate.tpot / MS,
        "output_tok_s_gpu": estimate.output_rate,
        "tok_s_user": estimate.user_rate,
        "e2e_ms": estimate.e2e / MS,
        "memory_gib": memory.total / GIB,
        "feasible": feasible,
        "reason": reason,
        "total_tok_s_gpu": estimate.total_rate,
        "requests_s": estimate.request_rate,
        "gpus": estimate.gpus,
        "usd_per_mtok": estimate.usd_per_mtok,
        "joules_per_token": estimate.joules_per_token,
        "queue_ms": served.queue / MS,
        "running": served.running,
        "kv_requests": memory.requests,
    }
    for name in STEPS:
        step: Step = getattr(served, name)
        result[f"{name}_step_ms"] = np.asarray(step.total) / MS
        for part in STEP_PARTS:
            result[f"{name}_{part}_ms"] = np.asarray(getattr(step, part)) / MS
    for part in MEMORY_PARTS:
        result[f"{part}_gib"] = np.asarray(getattr(memory, part)) / GIB
    result["usable_gib"] = np.asarray(memory.usable) / GIB
    if isinstance(estimate, OpenEstimate):
        if estimate.goodput is not None:
            result["goodput_req_s_gpu"] = estimate.goodput
        result |= open_columns(estimate.open)
    return {name: np.asarray(values) for name, values in result.items()}


def open_columns(load: OpenLoop) -> dict[str, Array]:
    """A replica under open load: at the rate asked for, or at its goodput."""
    seconds = ("wait", "ttft_p50", "ttft_p90", "ttft_p99", "tpot_p90", "tpot_p99")
    result = {
        "open_req_s": load.rate,
        "capacity_req_s": load.capacity,
        "open_utilisation": load.utilisation,
        "open_running": load.running,
        "open_ttft_ms": np.asarray(load.ttft) / MS,
        "open_tpot_ms": np.asarray(load.tpot) / MS,
        "open_e2e_ms": np.asarray(load.e2e) / MS,
        **{f"{name}_ms": np.asarray(getattr(load, name)) / MS for name in seconds},
        "attainment": load.attainment,
        "stable": np.asarray(load.stable, float),
    }
    return {name: np.asarray(values) for name, values in result.items()}


def fits(memory: Memory, concurrency: Array, attention_dp: Array) -> tuple[Array, Array]:
    """Whether a plan fits in memory, and the one reason why it does not."""
    total, usable = np.asarray(memory.total), np.asarray(memory.usable)
    static = total - np.asarray(memory.kv)
    feasible = total <= usable
    asked = np.maximum(np.asarray(concurrency) / np.asarray(attention_dp), 1.0)
    held = np.floor(np.asarray(memory.requests))
    reason = np.full(np.shape(total), "", dtype=object)
    for i in zip(*np.nonzero(~feasible), strict=True):
        if static[i] > usable[i]:
            reason[i] = f"memory: {static[i] / GIB:.1f} GiB without any KV cache, {usable[i] / GIB:.1f} GiB usable"
        else:
            reason[i] = f"memory: KV cache holds {held[i]:.0f} of {asked[i]:.0f} requests a rank"
    return feasible, reason


def mean_over_mix(estimate: Estimate, weights: Array) -> Estimate:
    """Estimates (n, W) of a mix of workloads -> (n,): weighted means; memory of the most demanding workload."""
    import jax

    worst = np.argmax(np.asarray(estimate.memory.total), axis=-1)
    rows = np.arange(len(worst))

    def mean(leaf: Any) -> Array:
        return np.asarray(leaf) @ weights

    def at_worst(leaf: Any) -> Array:
        return np.asarray(leaf)[rows, worst]

    means = jax.tree.map(mean, estimate)
    return replace(means, memory=jax.tree.map(at_worst, estimate.memory))
