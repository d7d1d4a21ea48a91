"""Micro-batches of whole prompts: balancing against every assignment there is, and its mean against drawn batches."""

from __future__ import annotations

from itertools import product

import jax
import numpy as np
import pytest

from dse.cost.microbatch import dealt, expected, in_turn, longest_first, through


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
