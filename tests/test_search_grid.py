"""The exhaustive search against brute force: each legal point priced in float64, judged plainly, O(n^2) fronts."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

from dse.cost.coefficients import Coefficients
from dse.cost.evaluate import Estimate, Scenario, estimate
from dse.errors import InputError
from dse.search import distribute, grid
from dse.search.distribute import shards, sweep_shard
from dse.search.grid import Swept, Tiling, sweep
from dse.search.kernel import TRACES, Questions, compiled_points, goals, tables
from dse.search.metrics import MARGIN
from dse.search.recheck import Rechecked, recheck
from dse.search.result import SearchResult
from dse.search.run import BEST, search
from dse.space import CompiledSpace, SpaceSpec, compile_space, describe, load_space, loads, parse_space, plans
from dse.units import GIB

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
        """(legal, K), to minimise: means over the mix."""
        weight = self.space.workloads.weight
        columns = [METRICS[name](self.estimate) @ weight for name in self.names]
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


# --------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", SPACES)
def test_the_recheck_prices_a_point_as_the_model_does_alone(name: str) -> None:
    b = brute(name)
    assert b.exact.objectives == pytest.approx(b.objectives, rel=1e-11)
    assert (b.exact.feasible == b.feasible(b.space.constraints)).all()
    assert np.isfinite(b.objectives).all()


@pytest.mark.parametrize("name", SPACES)
def test_front_funnel_and_best_are_those_of_brute_force(name: str) -> None:
    b, rng = brute(name), np.random.default_rng(0)
    check_all: list[dict[str, float]] = [
        {metric: float(rng.uniform(0.15, 0.95)) for metric, _, _ in b.space.constraints} for _ in range(3)
    ]
    for shares in check_all:
        limits = bounds(b, shares)
        result = search(bounded(name, limits))
        if b.feasible(limits).any():
            check(b, limits, result)
        else:
            assert (len(result.front), result.feasible) == (0, 0)


@pytest.mark.parametrize("name", SPACES)
def test_rows_show_the_objectives_that_were_compared(name: str) -> None:
    b = brute(name)
    result = search(spec_of(name))
    plan = describe(b.space, np.arange(b.space.legal))
    row = {key: i for i, key in enumerate(chosen(plan, plan))}
    index = [row[key] for key in chosen(result.candidates, plan)]
    sign = [1.0 if way == "min" else -1.0 for _, way in b.space.objectives]
    assert result.candidates[b.names].to_numpy(float) == pytest.approx(b.objectives[index] * sign, rel=1e-9)
    assert result.candidates["feasible"].all()


def test_ties_are_one_row_of_the_lowest_index_and_are_counted() -> None:
    """Replicas change neither objective, so each number of GPUs ties with the others."""
    b = brute("dense")
    expected = b.front(b.feasible(b.space.constraints))
    assert max(ties for _, ties in expected.values()) > 1
    result = search(spec_of("dense"))
    assert result.front["ties"].sum() == sum(ties for _, ties in expected.values())
    assert len(result.front) == len(expected)


@pytest.mark.parametrize("metric", ["ttft_ms", "tpot_ms"])
@pytest.mark.parametrize("off", [-1e-5, -1e-7, 0.0, 1e-7, 1e-5])
def test_a_bound_within_rounding_of_a_value_decides_as_float64_does(metric: str, off: float) -> None:
    """What float32 cannot tell from feasible is kept for the recheck, and must not push out what is feasible."""
    b = brute("dense")
    feasible = b.feasible(b.space.constraints)
    values = METRICS[metric](b.estimate).max(axis=1)
    members = [index for index, _ in b.front(feasible).values()]
    for member in members[:: max(1, len(members) // 6)]:
        limits = [
            (name, op, float(values[member]) * (1.0 + off) if name == metric else bound)
            for name, op, bound in b.space.constraints
        ]
        alive = b.exact.feasible & b.feasible(limits)
        result = search(bounded("dense", limits))
        plan = describe(b.space, [index for index, _ in b.front(alive).values()])
        if alive.any():
            assert set(chosen(result.front, plan)) == set(chosen(plan, plan))
        else:
            assert result.least is not None


FINE = {
    **SPACES["dense"],
    "gpus": [1, 2, 4, 8],
    "axes": {"kv": ["bf16", "fp8"], "concurrency": {"min": 1, "max": 256, "step": 1}, "chunk": [1024, 4096]},
    "constraints": {"memory_gib": {"max": 1000.0}},
}


def test_an_infeasible_point_within_rounding_of_its_bound_pushes_nothing_out() -> None:
    """More points than the list of the best holds, so that the front alone decides who stays."""
    space = compile_space(parse_space(FINE, "fine.yaml"))
    exact = recheck(space, Coefficients(), np.arange(space.legal))
    values, memory = exact.objectives, exact.rows["memory_gib"].to_numpy()
    plan = describe(space, np.arange(space.legal))
    row = {key: i for i, key in enumerate(chosen(plan, plan))}
    members = front_of_two(values)
    on_front = [i for i, one in enumerate(values) if tuple(one) in members]
    lost, counts = {}, {}
    for member in on_front[:: len(on_front) // 12]:
        bound = float(memory[member]) * (1.0 - 1e-5)
        alive = np.flatnonzero(memory <= bound)
        result = search(parse_space({**FINE, "constraints": {"memory_gib": {"max": bound}}}, "fine.yaml"))
        found = {tuple(values[row[key]]) for key in chosen(result.front, plan)}
        lost[bound] = front_of_two(values[alive]) ^ found
        counts[bound] = result.feasible - len(alive)
    assert not any(lost.values()), {bound: len(members) for bound, members in lost.items()}
    assert not any(counts.values()), counts


def front_of_two(values: np.ndarray) -> set[tuple[float, ...]]:
    """By the first objective, each that is better in the second than all before it."""
    best, result = np.inf, set()
    for first, second in sorted(map(tuple, values)):
        if second < best:
            best = second
            result.add((first, second))
    return result


def test_a_whole_number_meets_a_bound_that_equals_it() -> None:
    b = brute("dense")
    for gpus in (1, 2, 4, 8, 16):
        limits = [(m, op, float(gpus) if m == "gpus" else 1e9) for m, op, _ in b.space.constraints]
        assert search(bounded("dense", limits)).funnel[-1][1] == b.funnel(limits)[-1]


# ------------------------------------------------------------------------------------------- nothing feasible


@pytest.mark.parametrize("name", SPACES)
def test_nothing_feasible_gives_the_least_violating_plan_and_what_binds(name: str) -> None:
    b = brute(name)
    limits = []
    for metric, op, _ in b.space.constraints:
        value = METRICS[metric](b.estimate)
        limits.append((metric, op, 0.4 * float(value.min()) if op == "max" else 2.5 * float(value.max())))
    result = search(bounded(name, limits))
    assert (len(result.front), len(result.candidates), result.feasible) == (0, 0, 0)
    violation = b.violation(limits)
    plan = describe(b.space, np.arange(b.space.legal))
    assert result.least is not None
    index = chosen(plan, plan).index(chosen(result.least, plan)[0])
    assert violation[index] == pytest.approx(violation.min(), rel=1e-5)
    over = {"memory_gib": (b.estimate.memory.total / b.estimate.memory.usable).max(axis=1)[index] - 1.0}
    over |= {metric: b.excess(metric, op, bound)[index] for metric, op, bound in limits}
    assert {x.metric for x in result.binding} == {metric for metric, excess in over.items() if excess > 0}
    for binding in result.binding:
        if binding.metric != "memory_gib":
            value = METRICS[binding.metric](b.estimate)[index]
            worst = value.max() if binding.op == "max" else value.min()
            assert binding.value == pytest.approx(worst, rel=1e-9)
            assert (binding.metric, binding.op, binding.bound) in limits


@pytest.mark.parametrize("bound", [0.0, "a hair below the least"])
def test_there_is_a_least_violating_plan_whatever_the_bound(bound: float | str) -> None:
    b = brute("dense")
    least = METRICS["tpot_ms"](b.estimate)[b.fits].min()
    limit = float(least) * (1 - 1e-5) if isinstance(bound, str) else bound
    result = search(bounded("dense", [("ttft_ms", "max", 1e9), ("tpot_ms", "max", limit), ("gpus", "max", 1e9)]))
    assert (len(result.front), result.feasible) == (0, 0)
    assert result.least is not None
    assert "tpot_ms" in {x.metric for x in result.binding}


# --------------------------------------------------------------------------------------- tiles, traces, Ctrl-C


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Tiling:
    """The dense space in many tiles, some of them past the end on both sides."""
    monkeypatch.setattr(grid, "TILE", 98)
    monkeypatch.setattr(grid, "WIDEST", 7)
    return Tiling.of(brute("dense").space)


def test_tiles_cover_every_point_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for tile, widest in ((1, 1), (7, 3), (64, 64), (65_536, 1_024)):
        monkeypatch.setattr(grid, "TILE", tile)
        monkeypatch.setattr(grid, "WIDEST", widest)
        for name in SPACES:
            space = brute(name).space
            tiling = Tiling.of(space)
            seen = np.zeros((tiling.rows, tiling.columns), int)
            for i in range(len(tiling)):
                row, column = tiling.origin(i)
                seen[row : row + tiling.designs, column : column + tiling.points] += 1
            assert (seen == 1).all()
            assert sum(tiling.size(i) for i in range(len(tiling))) == space.legal
            assert tiling.designs * tiling.points <= max(tile, tiling.points)


def test_the_answer_does_not_depend_on_the_tiles_and_a_sweep_traces_once(small_tiles: Tiling) -> None:
    b = brute("dense")
    assert small_tiles.shape > (1, 1)
    assert small_tiles.rows % small_tiles.designs
    assert small_tiles.columns % small_tiles.points
    before = TRACES["tile"]
    for limits in (list(b.space.constraints), bounds(b, {"ttft_ms": 0.5, "tpot_ms": 0.5, "gpus": 0.9})):
        check(b, limits, search(bounded("dense", limits)))
    assert TRACES["tile"] == before + 1


def test_progress_ends_at_the_whole_space(small_tiles: Tiling) -> None:
    seen: list[tuple[int, int]] = []
    search(spec_of("dense"), progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == np.cumsum([small_tiles.size(i) for i in range(len(small_tiles))]).tolist()
    assert {total for _, total in seen} == {brute("dense").space.legal}


@pytest.mark.parametrize("after", [1, 5])
def test_an_interrupt_leaves_what_was_found_labelled_partial(small_tiles: Tiling, after: int) -> None:
    b = brute("dense")
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == after:
            raise KeyboardInterrupt

    result = search(spec_of("dense"), progress=progress)
    assert result.partial
    assert result.evaluated == calls[-1] < result.legal
    assert ("evaluated", result.evaluated) in result.funnel
    seen = np.zeros((small_tiles.rows, small_tiles.columns), bool)
    for i in range(after):
        row, column = small_tiles.origin(i)
        seen[row : row + small_tiles.designs, column : column + small_tiles.points] = True
    feasible = b.feasible(b.space.constraints) & seen.ravel()
    assert result.feasible == feasible.sum()
    plan = describe(b.space, [index for index, _ in b.front(feasible).values()])
    assert set(chosen(result.front, plan)) == set(chosen(plan, plan))


def test_parts_of_a_sweep_merge_into_the_whole(small_tiles: Tiling) -> None:
    space, n = brute("dense").space, len(small_tiles)
    whole = sweep(space, Coefficients())
    merged: Swept | None = None
    for tiles in (range(n // 2, n), range(1), range(1, n // 2)):
        part = sweep(space, Coefficients(), tiles=tiles)
        merged = part if merged is None else merged
        if merged is not part:
            merged.merge(part)
    assert merged is not None
    merged.front.compact()
    assert merged.evaluated == whole.evaluated == space.legal
    assert merged.passed.tolist() == whole.passed.tolist()
    assert sorted(map(tuple, merged.front.members())) == sorted(map(tuple, whole.front.members()))


# ------------------------------------------------------------------------------------------------ NaN, float32


def test_points_that_are_nan_are_infeasible_and_hide_no_others() -> None:
    """One machine of four has an efficiency that is not a number."""
    b = brute("mixed")
    memory = np.array([0.8, np.nan, 0.8, 0.8])
    result = search(spec_of("mixed"), coefficients=replace(Coefficients(), memory=memory))
    healthy = np.repeat(b.space.designs.machine != 1, len(b.space.operating))
    feasible = b.feasible(b.space.constraints) & healthy
    plan = describe(b.space, [index for index, _ in b.front(feasible).values()])
    assert set(chosen(result.front, plan)) == set(chosen(plan, plan))
    assert result.feasible == feasible.sum()
    assert dict(result.funnel)["fits in memory"] == b.fits.sum()
    assert np.isfinite(result.front[b.names].to_numpy()).all()


def test_nothing_but_nan_is_nothing_feasible() -> None:
    result = search(spec_of("static"), coefficients=replace(Coefficients(), memory=np.nan))
    assert (len(result.front), len(result.candidates), result.feasible) == (0, 0, 0)


def drift(name: str, most: int) -> dict[str, float]:
    """Largest relative float32 error of every metric over the points of a shipped space that fit in memory."""
    space = compile_space(load_space(SHIPPED / f"{name}.yaml"))
    kernel, block = compiled_points(Questions.of(space)), 8192
    flat = np.arange(space.legal)
    if space.legal > most:
        flat = np.sort(np.random.default_rng(0).choice(space.legal, most, replace=False))
    worst = dict.fromkeys(METRICS, 0.0)
    for start in range(0, len(flat), block):
        rows, points = np.divmod(np.resize(flat[start : start + block], block), len(space.operating))
        at = rows.astype(np.int32), points.astype(np.int32)
        found = []
        for x64, dtype in ((True, np.float64), (False, np.float32)):
            with jax.enable_x64(x64):
                priced = kernel(tables(space, Coefficients(), dtype), *at, goals(space, dtype).bounds)[0]
                found.append(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), priced))
        exact, rough = found
        fits = exact.memory.total <= exact.memory.usable
        for metric, value in METRICS.items():
            error = np.abs(value(rough) / value(exact) - 1.0) * fits
            worst[metric] = max(worst[metric], float(error.max()))
    return worst


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("quickstart", 100_000),
        *(
            pytest.param(name, 1_000_000, marks=pytest.mark.slow)
            for name in ("moe_10b_plan", "gpu_shootout", "long_context_cp", "qwen3_235b_b200")
        ),
        *(
            pytest.param(name, 300_000, marks=pytest.mark.slow)
            for name in ("deepseek_v3_nvl72", "deepseek_v3_h200", "billion")
        ),
    ],
)
def test_float32_stays_within_a_third_of_the_margin_over_a_shipped_space(name: str, most: int) -> None:
    """Where a plan fits; one that does not waits for memory, which a difference of large numbers decides."""
    for metric, error in drift(name, most).items():
        assert error <= MARGIN[metric] / 3, metric


# ----------------------------------------------------------------------------------------------------- on Dask

MANY = {**FINE, "axes": {**FINE["axes"], "concurrency": {"min": 1, "max": 2500, "step": 1}}}


def assert_same(a: SearchResult, b: SearchResult) -> None:
    assert (a.funnel, a.feasible, a.evaluated, a.partial) == (b.funnel, b.feasible, b.evaluated, b.partial)
    pd.testing.assert_frame_equal(a.front, b.front)
    pd.testing.assert_frame_equal(a.candidates, b.candidates)


def test_shards_are_all_tiles_in_order() -> None:
    for tiles in (1, 2, 15, 64, 1000):
        for workers in (1, 3, 8):
            pieces = shards(tiles, workers)
            assert [tile for piece in pieces for tile in piece] == list(range(tiles))
            assert all(len(piece) for piece in pieces)


def test_a_sweep_travels(small_tiles: Tiling) -> None:
    found = sweep(brute("dense").space, Coefficients())
    again: Swept = pickle.loads(pickle.dumps(found))
    assert again.front.values.tolist() == found.front.values.tolist()
    assert (again.evaluated, again.least, again.passed.tolist()) == (
        found.evaluated,
        found.least,
        found.passed.tolist(),
    )
    job = pickle.dumps((spec_of("dense"), Coefficients()))
    part = sweep_shard(job, small_tiles, BEST, range(2, 5))
    assert part.evaluated == sum(small_tiles.size(tile) for tile in range(2, 5))
    with pytest.raises(InputError, match="same version"):
        sweep_shard(job, replace(small_tiles, designs=1), BEST, range(2, 5))


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r'pip install "dse\[dask\]"'):
        search(spec_of("dense"), engine="dask")


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setenv("DSE_DASK_SCHEDULER", "tcp://127.0.0.1:1")
    monkeypatch.setattr(distribute, "REACHABLE", 0.5)
    with pytest.raises(InputError, match=r"DSE_DASK_SCHEDULER='tcp://127\.0\.0\.1:1'"):
        search(spec_of("dense"), engine="dask")


@pytest.mark.slow
def test_dask_answers_as_the_local_engine_does() -> None:
    pytest.importorskip("distributed")
    spec, seen = parse_space(MANY, "many.yaml"), []
    local = search(spec)
    assert len(Tiling.of(compile_space(spec))) > 2
    assert_same(search(spec, engine="dask", progress=lambda done, total: seen.append((done, total))), local)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (local.legal, local.legal)


@pytest.mark.slow
def test_a_shard_whose_worker_is_killed_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of = pytest.importorskip("distributed").LocalCluster
    spec = parse_space(MANY, "many.yaml")
    with cluster_of(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
        monkeypatch.setenv("DSE_DASK_SCHEDULER", cluster.scheduler_address)
        killed = []

        def progress(done: int, total: int) -> None:
            if not killed:
                killed.append(cluster.workers[0].pid)
                os.kill(killed[0], signal.SIGKILL)

        result = search(spec, engine="dask", progress=progress)
    assert killed
    assert_same(result, search(spec))


@pytest.mark.slow
def test_an_interrupt_of_a_distributed_sweep_leaves_what_was_found() -> None:
    pytest.importorskip("distributed")

    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    spec = parse_space(MANY, "many.yaml")
    result = search(spec, engine="dask", progress=progress)
    assert result.partial
    assert 0 < result.evaluated < result.legal
    assert len(result.front)
