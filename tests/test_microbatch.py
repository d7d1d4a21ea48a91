"""Micro-batches of whole prompts: balancing against every assignment there is, and its mean against drawn batches."""

from __future__ import annotations

from itertools import product

import jax
import numpy as np
import pytest

from dse.cost.microbatch import dealt, expected, in_turn, longest_first, slowdown, through


@pytest.mark.parametrize(("prompts", "batches"), [(5, 2), (7, 3), (8, 4)])
def test_balancing_is_within_grahams_bound_of_the_best_assignment(prompts: int, batches: int) -> None:
    rng = np.random.default_rng(prompts)
    ways = np.array(list(product(range(batches), repeat=prompts)))
    worst = 0.0
    for _ in range(10):
        work = rng.lognormal(0.0, 0.8, prompts)
        loads = np.stack([np.where(ways == b, work, 0.0).sum(axis=1) for b in range(batches)], axis=1)
        best = loads.max(axis=1).min()
        with jax.enable_x64(True):
            found = np.asarray(longest_first(work, batches))
        assert found.sum() == pytest.approx(work.sum())
        assert found.max() >= best - 1e-12
        assert found.max() <= (4 / 3 - 1 / (3 * batches)) * best + 1e-12
        worst = max(worst, found.max() / best)
    assert worst < 1.12


def test_alike_prompts_gain_nothing_and_one_stage_has_no_bubble() -> None:
    even = dealt(np.full(8, 3.0), 4, 4.0)
    assert float(even.gain) == 0.0
    assert float(even.in_order) == pytest.approx(4 * 6.0 + 3 * 6.0)
    uneven = np.array([1.0, 1.0, 9.0, 1.0, 1.0, 9.0, 1.0, 1.0])
    assert float(dealt(uneven, 2, 1.0).gain) == pytest.approx(0.0, abs=1e-6)
    assert float(dealt(uneven, 2, 4.0).in_order) == float(through(in_turn(uneven, 2), 4.0))
    assert np.sort(np.asarray(longest_first(uneven, 2))).tolist() == [12.0, 12.0]


@pytest.mark.parametrize(("prompts", "batches", "stages"), [(2, 4, 4), (4, 4, 4), (4, 8, 2), (8, 4, 8)])
def test_the_mean_over_drawn_batches(prompts: int, batches: int, stages: int) -> None:
    rng = np.random.default_rng(0)
    work = rng.lognormal(0.0, 0.5, (4000, prompts * batches))
    with jax.enable_x64(True):
        each = jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda w: dealt(w, batches, stages)))(work))
        nodes = np.quantile(work, (np.arange(400) + 0.5) / 400)
        found = expected(nodes, np.full(400, 1 / 400), float(prompts), float(batches), float(stages))
        gain = lambda k: expected(nodes, np.full(400, 1 / 400), k, float(batches), float(stages)).gain  # noqa: E731
        share = float(found.gain)
        slope = float(jax.grad(gain)(float(prompts)))
        central = float(gain(prompts + 1e-4) - gain(prompts - 1e-4)) / 2e-4
    near = 0.06 if prompts < 4 else 0.03
    assert float(found.in_order) == pytest.approx(each.in_order.mean(), rel=near)
    assert float(found.balanced) == pytest.approx(each.balanced.mean(), rel=near)
    assert 0.02 < share < 0.3
    assert slope == pytest.approx(central, rel=1e-4)


def saturated(work: np.ndarray, prompts: int, stages: int, balanced: bool, rounds: int = 1200) -> float:
    """Seconds a micro-batch over its own mean: `stages` of them in flight, the next enters when the oldest is out."""
    drawn = np.random.default_rng(0).choice(work, (rounds, stages * prompts))
    each = []
    for row in drawn:
        if balanced:
            loads = np.zeros(stages)
            for x in np.sort(row)[::-1]:
                loads[np.argmin(loads)] += x
            each += loads.tolist()
        else:
            each += row.reshape(stages, prompts).sum(axis=1).tolist()
    ahead, out, now = [0.0] * stages, [0.0] * stages, 0.0
    for j, t in enumerate(each):
        now, done = out[j % stages], []
        for before in ahead:
            now = max(now, before) + t
            done.append(now)
        ahead, out[j % stages] = done, now
    return now / len(each) / float(np.mean(each))


@pytest.mark.parametrize(
    ("cv", "prompts", "stages", "rel"),
    [(0.3, 1, 4, 0.05), (0.3, 4, 2, 0.05), (0.7, 2, 4, 0.05), (0.7, 4, 4, 0.05), (0.7, 4, 8, 0.06), (1.2, 4, 4, 0.12)],
)
def test_a_saturated_pipeline_waits_for_its_longest_micro_batch(
    cv: float, prompts: int, stages: int, rel: float
) -> None:
    sigma = np.sqrt(np.log1p(cv**2))
    work = np.exp(sigma * np.random.default_rng(1).standard_normal(1000))
    weight = np.full(len(work), 1.0 / len(work))
    for balanced in (False, True):
        found = float(slowdown(work, weight, float(prompts), float(stages), float(balanced)))
        assert found == pytest.approx(saturated(work, prompts, stages, balanced), rel=rel)


def test_no_slowdown_of_one_stage_or_of_alike_prompts() -> None:
    uneven, half = np.array([1.0, 3.0]), np.array([0.5, 0.5])
    for balanced in (0.0, 1.0):
        assert float(slowdown(uneven, half, 2.0, 1.0, balanced)) == 1.0
        assert float(slowdown(np.array([2.0, 2.0]), half, 2.0, 4.0, balanced)) == pytest.approx(1.0, abs=1e-6)
    ways = [float(slowdown(uneven, half, 4.0, 4.0, b)) for b in (0.0, 1.0)]
    assert 1.0 < ways[1] < ways[0]
