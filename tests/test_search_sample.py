"""Optuna's samplers on the same space: legal, seeded, batched, and never better than the exhaustive front."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from brute import brute, chosen, search, spec_of

from dse.cost.coefficients import Coefficients
from dse.search import sample as sampling
from dse.search.kernel import TRACES
from dse.search.result import SearchResult
from dse.search.run import SAMPLERS
from dse.search.sample import BATCH, sample
from dse.space import CompiledSpace, compile_space, describe, parse_space

OPTUNA = tuple(name for name in SAMPLERS if name != "grid")


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The flat indices of every batch that a sampler asks for, in order."""
    batches: list[np.ndarray] = []
    decode = sampling.rank_decode

    def watched(space: CompiledSpace, u: np.ndarray) -> np.ndarray:
        flat = decode(space, u)
        batches.append(flat)
        return flat

    monkeypatch.setattr(sampling, "rank_decode", watched)
    return batches


def same(a: SearchResult, b: SearchResult) -> bool:
    return a.front.equals(b.front) and a.candidates.equals(b.candidates) and a.funnel == b.funnel


@pytest.mark.parametrize("name", OPTUNA)
def test_points_are_legal_asked_in_batches_and_judged_as_brute_force_does(name: str, priced: list[np.ndarray]) -> None:
    b, trials = brute("dense"), 3 * BATCH + 7
    result = search(spec_of("dense"), sampler=name, trials=trials, compare=False)
    assert [len(flat) for flat in priced] == [BATCH, BATCH, BATCH, 7]
    seen = np.unique(np.concatenate(priced))
    assert 0 <= seen.min() <= seen.max() < b.space.legal
    assert (result.sampler, result.evaluated, result.legal) == (name, len(seen), b.space.legal)
    among = np.isin(np.arange(b.space.legal), seen)
    feasible = b.feasible(b.space.constraints) & among
    assert result.feasible == feasible.sum()
    assert result.front["feasible"].all()
    for metric, op, bound in b.space.constraints:
        assert (result.candidates[metric] <= bound if op == "max" else result.candidates[metric] >= bound).all()
    expected = b.front(feasible)
    plan = describe(b.space, [index for index, _ in expected.values()])
    ties = dict(zip(chosen(plan, plan), (count for _, count in expected.values()), strict=True))
    assert dict(zip(chosen(result.front, plan), result.front["ties"], strict=True)) == ties


def test_the_result_has_the_shape_of_the_exhaustive_one() -> None:
    grid, sampled = (search(spec_of("dense"), sampler=name, trials=BATCH, compare=False) for name in ("grid", "tpe"))
    assert list(sampled.front.columns) == list(grid.front.columns)
    assert list(sampled.candidates.columns) == list(grid.candidates.columns)
    assert [s for s, _ in sampled.funnel if s != "evaluated"] == [s for s, _ in grid.funnel]
    assert (sampled.objectives, sampled.constraints, sampled.cuts) == (grid.objectives, grid.constraints, grid.cuts)
    assert (grid.hypervolume_ratio, sampled.hypervolume_ratio) == (None, None)


@pytest.mark.parametrize("name", OPTUNA)
def test_a_seed_repeats_a_search_and_another_one_does_not(name: str) -> None:
    first, again, other = (
        search(spec_of("dense"), sampler=name, trials=2 * BATCH, seed=seed, compare=False) for seed in (3, 3, 4)
    )
    assert same(first, again)
    assert not same(first, other)


def test_every_batch_is_one_call_of_one_program() -> None:
    search(spec_of("dense"), sampler="random", trials=BATCH, compare=False)
    before = dict(TRACES)
    search(spec_of("dense"), sampler="random", trials=4 * BATCH + 1, seed=9, compare=False)
    assert before == TRACES


@pytest.mark.parametrize("name", OPTUNA)
def test_the_ratio_lies_between_nothing_and_the_exhaustive_front(name: str) -> None:
    ratio = search(spec_of("dense"), sampler=name, trials=BATCH).hypervolume_ratio
    assert ratio is not None
    assert 0.0 <= ratio <= 1.0 + 1e-9


def test_tpe_finds_most_of_the_front_of_a_small_space() -> None:
    ratio = search(spec_of("dense"), sampler="tpe", trials=300).hypervolume_ratio
    assert ratio is not None
    assert ratio >= 0.8


def test_the_whole_of_a_tiny_space_is_the_exhaustive_front() -> None:
    """Four points, fifty trials: many repeat, which must count neither as points nor as ties."""
    spec = parse_space(
        {
            "models": ["Llama-3.1-8B"],
            "clusters": ["h100-dgx"],
            "gpus": [2],
            "workloads": [{"isl": 1024, "osl": 256}],
            "axes": {"tp": [1, 2], "concurrency": [4, 64]},
        }
    )
    exhaustive = search(spec)
    sampled = search(spec, sampler="random", trials=BATCH)
    assert sampled.evaluated == exhaustive.evaluated == 4
    assert sampled.funnel == exhaustive.funnel
    assert sampled.feasible == exhaustive.feasible
    assert sampled.hypervolume_ratio == pytest.approx(1.0, abs=1e-9)
    pd.testing.assert_frame_equal(sampled.front, exhaustive.front)


def test_a_space_of_one_point_can_be_sampled() -> None:
    spec = spec_of("dense", gpus=[2], axes={"tp": 2, "dp": 1, "concurrency": 8}, constraints={})
    assert compile_space(spec).legal == 1
    result = search(spec, sampler="tpe", trials=2, compare=False)
    assert (result.evaluated, len(result.front)) == (1, 1)


@pytest.mark.parametrize("name", OPTUNA)
def test_nothing_feasible_gives_a_plan(name: str) -> None:
    limits = {"ttft_ms": {"max": 0.01}, "tpot_ms": {"max": 0.01}, "gpus": {"max": 8}}
    result = search(spec_of("dense", constraints=limits), sampler=name, trials=BATCH)
    assert (len(result.front), result.feasible) == (0, 0)
    assert result.least is not None
    assert {x.metric for x in result.binding} >= {"ttft_ms", "tpot_ms"}
    assert result.hypervolume_ratio is None


def test_an_interrupt_leaves_what_was_found_labelled_partial() -> None:
    def progress(done: int, total: int) -> None:
        assert total == 10 * BATCH
        if done == 3 * BATCH:
            raise KeyboardInterrupt

    found = sample(brute("dense").space, Coefficients(), "random", 10 * BATCH, 0, progress)
    assert found.partial
    assert 0 < found.evaluated <= 3 * BATCH
    assert len(found.front.values)
    whole: Any = search(spec_of("dense"), sampler="random", trials=3 * BATCH, compare=False)
    assert found.evaluated == whole.evaluated
