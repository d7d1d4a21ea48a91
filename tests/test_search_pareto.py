"""Fronts against plain-Python O(n^2) oracles: ties, duplicates, infinities, NaN, negative values, 1 to 4 objectives."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dse.search.kernel import BINS, Questions, goals, sift
from dse.search.metrics import MARGIN, margins
from dse.search.pareto import RunningFront, distinct, dominated_by, front, hypervolume, spread, staircase

# ------------------------------------------------------------------------------------------------- the oracles

Row = tuple[float, ...]


def no_worse(a: Row, b: Row) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True))


def dominates(a: Row, b: Row) -> bool:
    return no_worse(a, b) and any(x < y for x, y in zip(a, b, strict=True))


def front_oracle(rows: list[Row]) -> list[bool]:
    usable = [not any(math.isnan(x) for x in row) for row in rows]
    return [
        ok and not any(other and dominates(rival, row) for rival, other in zip(rows, usable, strict=True))
        for row, ok in zip(rows, usable, strict=True)
    ]


def beats(r: Row, v: Row, margin: Row) -> bool:
    """The rule as `dominated_by` documents it."""
    worse = [y > x + m * abs(x) for x, y, m in zip(r, v, margin, strict=True)]
    same = [x == y for x, y in zip(r, v, strict=True)]
    return all(w or s for w, s in zip(worse, same, strict=True)) and any(worse)


def merged(rows: list[Row], indices: list[int], ties: list[int]) -> dict[Row, tuple[int, int]]:
    """Vector -> (lowest index, ties in all)."""
    result: dict[Row, tuple[int, int]] = {}
    for row, index, count in zip(rows, indices, ties, strict=True):
        first, total = result.get(row, (index, 0))
        result[row] = (min(first, index), total + count)
    return result


# ------------------------------------------------------------------------------------------------ the examples

# Few distinct numbers, so that ties and duplicates are the rule; some a hair apart, within and beyond a margin.
GRID = [-7.0, -2.0, -1.0 - 1e-5, -1.0, -0.0, 0.0, 0.5, 1.0, 1.0 + 1e-5, 1.0 + 1e-4, 3.0, 1e6]
finite = st.one_of(st.sampled_from(GRID), st.floats(-1e4, 1e4, width=32, allow_subnormal=False))
special = st.sampled_from([math.inf, -math.inf, math.nan])


@st.composite
def tables(draw: st.DrawFn, number: st.SearchStrategy[float], sizes: tuple[int, int] = (0, 40)) -> list[Row]:
    k = draw(st.integers(1, 4))
    return draw(st.lists(st.tuples(*[number] * k), min_size=max(1, sizes[0]), max_size=sizes[1]))


def array(rows: list[Row]) -> np.ndarray:
    return np.array(rows, np.float64).reshape(len(rows), -1)


# --------------------------------------------------------------------------------------------------- the tests


@given(tables(st.one_of(finite, finite, finite, special)))
def test_front_is_the_quadratic_one(rows: list[Row]) -> None:
    assert front(array(rows)).tolist() == front_oracle(rows)


@given(tables(st.one_of(finite, special)), st.randoms(use_true_random=False))
def test_distinct_merges_equal_rows_only(rows: list[Row], random: Any) -> None:
    indices = list(range(0, 3 * len(rows), 3))
    random.shuffle(indices)
    ties = [random.randint(1, 5) for _ in rows]
    values, first, total = distinct(array(rows), np.array(indices), np.array(ties))
    assert (np.diff(first) > 0).all()
    clean = [not any(math.isnan(x) for x in row) for row in rows]
    expected = merged(*([x for x, ok in zip(column, clean) if ok] for column in (rows, indices, ties)))
    usable = ~np.isnan(values).any(axis=1)
    found = {
        tuple(v): (int(i), int(t))
        for v, i, t in zip(values[usable].tolist(), first[usable], total[usable], strict=True)
    }
    assert found == expected
    assert usable.sum() == len(expected)
    assert total.sum() == sum(ties)


@given(tables(finite), tables(finite), st.sampled_from([0.0, 1e-5, 1e-2]))
def test_dominated_by_never_drops_more_than_the_rule_and_keeps_no_clear_loser(
    rows: list[Row], others: list[Row], m: float
) -> None:
    k = len(rows[0])
    candidates = array([row[:k] + (0.0,) * (k - len(row)) for row in others])
    references = array(rows)[front(array(rows))]
    margin = (m,) * k
    found = dominated_by(candidates, references, np.array(margin))
    for row, dropped in zip(map(tuple, candidates.tolist()), found, strict=True):
        by_rule = any(beats(r, row, margin) for r in map(tuple, references.tolist()))
        clear = any(all(v > r + m * abs(r) for r, v in zip(ref, row)) for ref in references.tolist())
        assert by_rule or not dropped
        assert dropped or not clear
        if k != 2:  # two objectives look at the neighbours on the staircase only
            assert dropped == by_rule


def test_dominated_by_of_nothing() -> None:
    none = np.zeros((0, 2))
    assert dominated_by(none, np.ones((1, 2)), np.zeros(2)).tolist() == []
    assert dominated_by(np.ones((3, 2)), none, np.zeros(2)).tolist() == [False] * 3


@given(
    st.lists(st.tuples(finite, finite), min_size=1, max_size=40),
    st.lists(st.tuples(finite, finite), min_size=1, max_size=40),
    st.sampled_from([3, 8, BINS]),
)
def test_a_staircase_beats_only_what_a_member_beats(members: list[Row], rows: list[Row], bins: int) -> None:
    margin = (3e-5, 3e-5)
    references = array(members)[front(array(members))]
    table, start, scale = staircase(references, np.array(margin), bins)
    assert (np.diff(table[np.isfinite(table)]) <= 0).all()
    assert table[0] == np.inf  # what lies before the front is beaten by nobody
    for first, second in [*rows, *map(tuple, references.tolist())]:
        i = max(int(min(max((first - start) * scale, 0.0), bins - 1.0)) - 1, 0)
        best = float(table[i])
        if second > best + margin[1] * abs(best) or second == best:
            assert any(beats(r, (first, second), margin) for r in map(tuple, references.tolist()))


@given(tables(st.one_of(finite, finite, finite, special)), st.integers(1, 12), st.data())
def test_running_front_keeps_the_exact_front_and_the_best(rows: list[Row], best: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    values = array(rows)
    running = RunningFront(margin=np.full(values.shape[1], 1e-5), best=best)
    for first, last in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        chunk = np.array(order[first:last], np.int64)
        running.add(values[chunk], chunk)
        if data.draw(st.booleans()):
            running.compact()
    running.compact()
    held = {tuple(v): (int(i), int(t)) for v, i, t in zip(running.values.tolist(), running.indices, running.ties)}
    assert len(held) == len(running.values)  # equal vectors are one
    everything = merged(rows, list(range(len(rows))), [1] * len(rows))
    for row, on_front in zip(rows, front_oracle(rows), strict=True):
        if on_front:
            assert held[row] == everything[row]
    usable = sorted(row[0] for row in everything if not any(map(math.isnan, row)))
    assert sorted(row[0] for row in held)[:best] == usable[:best]
    assert sorted(map(tuple, running.members().tolist())) == sorted(
        {row for row, on_front in zip(rows, front_oracle(rows), strict=True) if on_front}
    )
    threshold = usable[best - 1] if len(usable) >= best else math.inf  # one that a margin widens loses nothing
    assert running.threshold() == pytest.approx(threshold, rel=2e-5)
    assert running.threshold() >= threshold


# ------------------------------------------------------------------------- what a float32 sweep must not lose

METRICS = ("output_tok_s_gpu", "tpot_ms", "usd_per_mtok", "memory_gib")
ROWS = 64  # a call of the kernel's filter


def question(k: int) -> Any:
    objectives = tuple((name, "max" if name.startswith("output") else "min") for name in METRICS[:k])
    return SimpleNamespace(objectives=objectives, constraints=())


@lru_cache
def filtered(k: int) -> Any:
    asked = Questions(constraints=(), objectives=question(k).objectives)
    return jax.jit(partial(sift, asked=asked))


def swept(values: np.ndarray, order: np.ndarray, best: int) -> RunningFront:
    """What `grid.sweep` does with the objectives that its kernel computes."""
    k = values.shape[1]
    running = RunningFront(margin=np.array(margins(question(k).objectives)), best=best)
    target = goals(question(k), np.float32)
    for first in range(0, len(order), ROWS):
        chosen = order[first : first + ROWS]
        padded = np.resize(chosen, ROWS)
        inside = np.arange(ROWS) < len(chosen)
        excess = np.full((ROWS, 1), -0.5, np.float32)
        points = filtered(k)(values[padded].astype(np.float32), excess, inside, target)
        kept = np.flatnonzero(np.asarray(points.keep))
        assert int(points.passed[0]) == len(chosen)
        running.add(values[padded[kept]].astype(np.float64), padded[kept])
        running.compact()
        target = goals(question(k), np.float32, running.members(), running.threshold())
    return running


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(1, 300), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-6, 1e-4, 0.1]))
def test_no_member_of_the_float64_front_is_lost_to_float32(k: int, n: int, seed: int, apart: float) -> None:
    """Values a hair apart (`apart`), tied or not, each off by up to 1e-5: the exact front is among the survivors."""
    rng = np.random.default_rng(seed)
    sign = np.array([-1.0 if name.startswith("output") else 1.0 for name in METRICS[:k]])
    anti = rng.random(n)  # along a front rather than a cloud, so that many are on it
    shape = np.stack([np.exp(a * (anti if i % 2 else -anti)) for i, a in enumerate(rng.uniform(0, 3, k))], axis=1)
    exact = sign * 10.0 ** rng.uniform(-2, 4, k) * shape * (1 + apart * rng.integers(0, 4, (n, k)))
    copies = rng.integers(0, n, n // 3)
    exact = np.concatenate([exact, exact[copies]])
    rng.shuffle(exact)
    values = (exact * (1 + 1e-5 * rng.uniform(-1, 1, exact.shape))).astype(np.float32)
    for column in range(k):  # two float32 numbers that are equal count as equal; see the next test
        pairs = np.unique(np.stack([exact[:, column], values[:, column]]), axis=1)
        assume(len(np.unique(pairs[1])) == pairs.shape[1])
    survivors = swept(values, rng.permutation(len(exact)), best=5).indices
    assert {*map(tuple, exact[front(exact)])} <= {*map(tuple, exact[survivors])}


def test_what_float32_cannot_tell_apart_is_a_tie() -> None:
    """Equal in float32 is equal: such a row may lose to one that is better elsewhere by more than the margin."""
    values = np.array([[-2.0, 1.0], [-1.0, 1.0], [-1.5, 1.0]], np.float32)
    assert swept(values, np.arange(3), best=1).indices.tolist() == [0]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_infinite_values_survive_and_nan_does_not(k: int) -> None:
    rng = np.random.default_rng(k)
    values = rng.integers(-3, 4, (200, k)).astype(np.float32)
    values[::7, k - 1] = np.inf
    values[3, 0] = np.nan
    survivors = swept(values, np.arange(200), best=1)
    kept = {tuple(row) for row in survivors.values.tolist()}
    assert not np.isnan(survivors.values).any()
    assert {tuple(row) for row in values[front(values)].tolist()} <= kept


def test_counts_have_no_margin() -> None:
    assert MARGIN["gpus"] == 0.0


@given(tables(st.floats(0, 1, width=32), (1, 12)), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_hypervolume_is_the_share_of_random_points_that_some_row_dominates(rows: list[Row], seed: int) -> None:
    k = len(rows[0])
    points = np.random.default_rng(seed).random((20_000, k))
    share = (array(rows)[:, None, :] <= points[None]).all(axis=2).any(axis=0).mean()
    assert hypervolume(array(rows), np.ones(k)) == pytest.approx(share, abs=0.02)


def test_hypervolume_of_nothing_and_of_nan() -> None:
    assert hypervolume(np.zeros((0, 2)), np.ones(2)) == 0.0
    assert hypervolume(np.array([[np.nan, 0.0], [0.5, 0.5]]), np.ones(2)) == pytest.approx(0.25)


@given(tables(finite, (1, 40)), st.integers(4, 40))
def test_spread_holds_the_extremes_and_repeats_nothing(rows: list[Row], count: int) -> None:
    values = array(rows)
    picked = spread(values, count)
    assert len(set(picked.tolist())) == len(picked) <= max(count, min(len(rows), count))
    for k in range(values.shape[1]):
        if count >= 2 * values.shape[1] or len(values) <= count:
            assert values[:, k].min() in values[picked, k]
            assert values[:, k].max() in values[picked, k]
