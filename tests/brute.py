"""Brute force: each legal point of a small space priced in float64, judged plainly; what searches are held to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

from dse.cost.coefficients import Coefficients
from dse.cost.evaluate import Estimate, Scenario, estimate
from dse.search import run
from dse.search.recheck import Rechecked, recheck
from dse.search.result import SearchResult
from dse.search.run import BEST
from dse.space import CompiledSpace, SpaceSpec, compile_space, describe, loads, parse_space, plans
from dse.units import GIB

# Physics whatever sets are shipped: brute force prices by it.
search = partial(run.search, coefficients=Coefficients())

SHIPPED = Path(__file__).parent.parent / "search_spaces"

SPACES: dict[str, dict[str, Any]] = {
    "dense": {
        "models": ["Llama-3.1-8B"],
        "clusters": ["h100-dgx"],
        "gpus": [1, 2, 4, 8, 16],
        "workloads": [{"isl": 1024, "osl": 256}],
        "axes": {
            "pp": [1, 2],
            "kv": ["bf16", "fp8"],
            "concurrency": {"min": 1, "max": 700, "factor": 1.35},
            "chunk": [1024, 4096],
        },
        "constraints": {"ttft_ms": {"max": 1000}, "tpot_ms": {"max": 25}, "gpus": {"max": 8}},
    },
    "wide": {
        "models": ["DeepSeek-V3"],
        "clusters": ["h200-hgx"],
        "gpus": [8, 16, 24, 32],
        "workloads": [{"isl": 4096, "osl": 1024, "prefix_hit": 0.25}],
        "axes": {
            "tp": [1, 4, 8],
            "attention_dp": "auto",
            "overlap_decode": ["none", "two_batch"],
            "dispatch": ["auto", "flat"],
            "concurrency": [8, 64, 256, 512, 1024, 1536, 2048],
            "draft_tokens": [0, 2],
        },
        "constraints": {"tpot_ms": {"max": 60}, "output_tok_s_gpu": {"min": 50}},
        "objectives": {"output_tok_s_gpu": "max", "tpot_ms": "min", "gpus": "min"},
    },
    "mixed": {
        "models": ["Llama-3.1-8B", "Qwen3-30B-A3B", "gpt-oss-20b"],
        "clusters": ["h100", "b200", "mi300x", "l40s"],
        "gpus": [1, 2, 4],
        "workloads": [{"isl": 512, "osl": 256}, {"isl": 6144, "osl": 512, "prefix_hit": 0.5, "weight": 3}],
        "axes": {"weights": ["native", "fp8"], "concurrency": [1, 8, 48, 200], "chunk": [2048, 8192]},
        "constraints": {"e2e_ms": {"max": 20000}, "tok_s_user": {"min": 20}},
        "objectives": {"usd_per_mtok": "min", "ttft_ms": "min", "tok_s_user": "max", "memory_gib": "min"},
    },
    "static": {
        "models": ["Mixtral-8x7B"],
        "clusters": ["a100"],
        "gpus": [2, 4, 8],
        "workloads": [{"isl": 2048, "osl": 128}],
        "axes": {
            "batch": {"min": 1, "max": 300, "step": 7},
            "ep": "auto",
            "moe_tp": "auto",
            "microbatches": ["auto", 4],
        },
        "constraints": {"ttft_ms": {"max": 6000}},
        "objectives": {"total_tok_s_gpu": "max"},
    },
}


def spec_of(name: str, **changes: Any) -> SpaceSpec:
    return parse_space({**SPACES[name], **changes}, f"{name}.yaml")


METRICS = {
    "ttft_ms": lambda e: e.ttft * 1e3,
    "tpot_ms": lambda e: e.tpot * 1e3,
    "e2e_ms": lambda e: e.e2e * 1e3,
    "output_tok_s_gpu": lambda e: e.output_rate,
    "total_tok_s_gpu": lambda e: e.total_rate,
    "tok_s_user": lambda e: e.user_rate,
    "gpus": lambda e: e.gpus,
    "usd_per_mtok": lambda e: e.usd_per_mtok,
    "memory_gib": lambda e: e.memory.total / GIB,
}


@dataclass(frozen=True, eq=False)
class Brute:
    """A whole space in float64. `exact` is the search's own recheck of every point, the rest is independent of it."""

    space: CompiledSpace
    estimate: Estimate  # leaves (legal, W)

    @cached_property
    def exact(self) -> Rechecked:
        return recheck(self.space, Coefficients(), np.arange(self.space.legal))

    @cached_property
    def names(self) -> list[str]:
        return [name for name, _ in self.space.objectives]

    @cached_property
    def objectives(self) -> np.ndarray:
        """(legal, K), to minimise: means over the mix, and the worst workload's memory."""
        weight = self.space.workloads.weight
        values = [METRICS[name](self.estimate) for name in self.names]
        columns = [x.max(axis=1) if name == "memory_gib" else x @ weight for name, x in zip(self.names, values)]
        return np.stack([x if way == "min" else -x for x, (_, way) in zip(columns, self.space.objectives)], axis=1)

    @cached_property
    def fits(self) -> np.ndarray:
        return (self.estimate.memory.total <= self.estimate.memory.usable).all(axis=1)

    def excess(self, metric: str, op: str, bound: float) -> np.ndarray:
        """Relative excess over a bound, worst workload: at most 0 is met."""
        value = METRICS[metric](self.estimate)
        return ((value - bound) / bound if op == "max" else (bound - value) / value).max(axis=1)

    def funnel(self, constraints: Any) -> list[int]:
        """Points that fit, then meet the first 1, 2, ... constraints."""
        alive, counts = self.fits, [int(self.fits.sum())]
        for metric, op, bound in constraints:
            alive = alive & (self.excess(metric, op, bound) <= 0)
            counts.append(int(alive.sum()))
        return counts

    def feasible(self, constraints: Any) -> np.ndarray:
        alive = self.fits
        for metric, op, bound in constraints:
            alive = alive & (self.excess(metric, op, bound) <= 0)
        return alive

    def violation(self, constraints: Any) -> np.ndarray:
        memory = (self.estimate.memory.total / self.estimate.memory.usable).max(axis=1) - 1.0
        parts = [memory, *(self.excess(*c) for c in constraints)]
        return sum(np.maximum(part, 0.0) for part in parts)

    def front(self, feasible: np.ndarray) -> dict[tuple[float, ...], tuple[int, int]]:
        """Vector -> (lowest index, ties) of the points no feasible point dominates, one pair at a time."""
        values, indices = self.exact.objectives[feasible], np.flatnonzero(feasible)
        result: dict[tuple[float, ...], tuple[int, int]] = {}
        for row, index in zip(values, indices, strict=True):
            if not ((values <= row).all(axis=1) & (values < row).any(axis=1)).any():
                first, ties = result.get(tuple(row), (int(index), 0))
                result[tuple(row)] = (first, ties + 1)
        return result


def price(space: CompiledSpace) -> Estimate:
    """Every point through the model's own front door, as scenarios of their own: nothing of the search's kernel."""
    d, q, w = len(space.designs), len(space.operating), len(space.workloads)
    rows, points, kinds = (x.ravel() for x in np.meshgrid(range(d), range(q), range(w), indexing="ij"))

    def take(tree: Any, index: Any) -> Any:
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[index], tree)

    machine = space.designs.machine[rows]
    defaults = jax.tree.map(lambda x: np.full(len(rows), x), Coefficients())
    scenarios = Scenario(
        architecture=take(space.architectures, space.designs.model[rows]),
        device=take(space.devices, machine),
        topology=take(space.topologies, machine),
        plan=take(plans(space), rows),
        load=take(loads(space), (points, kinds)),
        coefficients=replace(defaults, utilisation=space.designs.utilisation[rows]),
    )
    with jax.enable_x64(True):
        return jax.tree.map(lambda x: np.asarray(x).reshape(d * q, w), estimate(scenarios))


@lru_cache(maxsize=8)
def brute(name: str) -> Brute:
    space = compile_space(spec_of(name))
    return Brute(space, price(space))


# ------------------------------------------------------------------------------------------- what is compared

Bounds = list[tuple[str, str, float]]


def apart(values: np.ndarray, share: float) -> float:
    """About the `share` quantile, well away from every value: between two neighbours that differ by 0.1% or more."""
    ordered = np.unique(values)
    middle = int(share * (len(ordered) - 1))
    gaps = np.flatnonzero(np.diff(ordered) > 1e-3 * ordered[1:])
    at = gaps[np.argmin(np.abs(gaps - middle))]
    return float((ordered[at] + ordered[at + 1]) / 2)


def bounds(b: Brute, shares: dict[str, float]) -> Bounds:
    """The space's constraints with new bounds at the quantiles."""
    result = []
    for metric, op, _ in b.space.constraints:
        value = METRICS[metric](b.estimate)
        result.append((metric, op, apart(value.max(axis=1) if op == "max" else value.min(axis=1), shares[metric])))
    return result


def bounded(name: str, limits: Bounds) -> SpaceSpec:
    return spec_of(name, constraints={metric: {op: bound} for metric, op, bound in limits})


def chosen(frame: pd.DataFrame, like: pd.DataFrame) -> list[tuple[str, ...]]:
    return [tuple(row) for row in frame[like.columns].astype(str).to_numpy()]


def check(b: Brute, limits: Bounds, result: SearchResult) -> None:
    """Front, ties, candidates and funnel are those of the brute force."""
    feasible = b.feasible(limits)
    expected = b.front(feasible)
    lowest = [index for index, _ in expected.values()]
    plan = describe(b.space, lowest)
    found = dict(zip(chosen(result.front, plan), result.front["ties"], strict=True))
    assert found == dict(zip(chosen(plan, plan), (ties for _, ties in expected.values()), strict=True))
    assert result.front[b.names[0]].to_numpy() == pytest.approx(
        np.sort(result.front[b.names[0]])[:: 1 if b.space.objectives[0][1] == "min" else -1]
    )
    assert dict(result.funnel) == {
        "enumerated": b.space.enumerated,
        "legal": b.space.legal,
        **dict(zip([stage for stage, _ in result.funnel[2:]], b.funnel(limits), strict=True)),
    }
    assert [stage for stage, _ in result.funnel[2:]] == [
        "fits in memory",
        *(f"meets {metric} {op} {bound:g}" for metric, op, bound in limits),
    ]
    assert result.feasible == feasible.sum()
    assert result.evaluated == result.legal == b.space.legal
    assert result.enumerated == result.legal + sum(result.cuts.values())
    assert not result.partial
    check_best(b, feasible, result)


def check_best(b: Brute, feasible: np.ndarray, result: SearchResult) -> None:
    """Candidates: the best feasible plans by the first objective, equal plans (in all objectives) once."""
    vectors: dict[tuple[float, ...], int] = {}
    for index in np.flatnonzero(feasible):
        vectors.setdefault(tuple(b.exact.objectives[index]), int(index))
    ranked = sorted(vectors.items(), key=lambda item: (item[0][0], item[1]))[:BEST]
    plan = describe(b.space, [index for _, index in ranked])
    sure = sum(vector[0] < ranked[-1][0][0] for vector, _ in ranked)  # which of equal last ones is nobody's business
    assert len(result.candidates) == len(ranked)
    assert chosen(result.candidates, plan)[:sure] == chosen(plan, plan)[:sure]
