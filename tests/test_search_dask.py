"""The same sweep on Dask: same answer, lost workers, missing package, Ctrl-C."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from dataclasses import replace

import pandas as pd
import pytest
from brute import (
    brute,
    search,
    spec_of,
)
from test_search_grid import FINE

from dse.cost.coefficients import Coefficients
from dse.errors import InputError
from dse.search import distribute
from dse.search.distribute import shards, sweep_shard
from dse.search.grid import Swept, Tiling, sweep
from dse.search.result import SearchResult
from dse.search.run import BEST
from dse.space import compile_space, parse_space

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
