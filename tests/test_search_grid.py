"""The exhaustive search against brute force: each legal point priced in float64, judged plainly, O(n^2) fronts."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from brute import (
    METRICS,
    SHIPPED,
    SPACES,
    bounded,
    bounds,
    brute,
    check,
    chosen,
    search,
    spec_of,
)

from dse.cost.coefficients import Coefficients
from dse.search import grid
from dse.search.grid import Swept, Tiling, sweep
from dse.search.kernel import TRACES, Questions, compiled_points, goals, tables
from dse.search.metrics import MARGIN
from dse.search.recheck import recheck
from dse.space import compile_space, describe, load_space, parse_space

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


def test_a_small_sweep_compiled_quickly_equals_one_compiled_well(monkeypatch: pytest.MonkeyPatch) -> None:
    space = brute("dense").space
    assert space.legal <= grid.SMALL
    fast = sweep(space, Coefficients())
    for limit in ("SMALL", "MIDDLE"):
        monkeypatch.setattr(grid, limit, 0)
        well = sweep(space, Coefficients())
        assert fast.passed.tolist() == well.passed.tolist()
        assert fast.front.members() == pytest.approx(well.front.members(), rel=MARGIN["ttft_ms"])


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
    memory = np.array([[0.8], [np.nan], [0.8], [0.8]])  # by machine, whatever the model
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
