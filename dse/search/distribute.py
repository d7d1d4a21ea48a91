"""The same sweep on many processes or hosts with Dask: shards are ranges of tiles, results merge as they complete.

Each worker compiles the space itself from the spec, once, so a task is a spec and two integers, and what comes back
is a front. A shard whose worker dies is run again elsewhere (Dask does that, three times).
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from dse.cost.coefficients import Coefficients
from dse.errors import InputError
from dse.search.grid import Progress, Swept, Tiling, sweep
from dse.search.metrics import margins
from dse.search.pareto import RunningFront
from dse.space.compile import CompiledSpace, compile_space
from dse.space.schema import SpaceSpec

SCHEDULER = "DSE_DASK_SCHEDULER"  # address of a scheduler to use; a cluster on this host where it is not set
SHARDS = 16  # a worker: enough for the last ones to finish together, and for progress
REACHABLE = 10  # seconds within which a scheduler must answer, and have a worker


def sweep_dask(
    spec: SpaceSpec, coefficients: Coefficients, tiling: Tiling, best: int = 200, progress: Progress | None = None
) -> Swept:
    """Price every point of the space. Ctrl-C returns what was found so far, marked partial.

    Raises InputError where Dask is not installed or the scheduler does not answer.
    """
    job = pickle.dumps((spec, jax.tree.map(np.asarray, coefficients)))
    swept = _nothing(spec, best)
    total, started = tiling.rows * tiling.columns, time.perf_counter()
    try:
        with _client() as client:
            for part in _parts(client, job, tiling, best):
                swept.merge(part)
                swept.front.compact()
                if progress is not None:
                    progress(swept.evaluated, total)
    except KeyboardInterrupt:
        swept.partial = True
    swept.front.compact()
    swept.seconds = time.perf_counter() - started
    return swept


def shards(tiles: int, workers: int) -> list[range]:
    """All tiles in order, in at most SHARDS pieces a worker, none of which is empty."""
    count = min(tiles, max(workers, 1) * SHARDS)
    edges = [tiles * i // count for i in range(count + 1)]
    return [range(first, last) for first, last in pairwise(edges)]


def sweep_shard(job: bytes, tiling: Tiling, best: int, tiles: range) -> Swept:
    """What one task does, on a worker."""
    space, coefficients = _compiled(job)
    if Tiling.of(space) != tiling:
        raise InputError(
            f"a Dask worker cuts the space into {Tiling.of(space)}, this process into {tiling};"
            " install the same version of dse on both"
        )
    return sweep(space, coefficients, tiles=tiles, best=best)


@lru_cache(maxsize=2)
def _compiled(job: bytes) -> tuple[CompiledSpace, Coefficients]:
    spec, coefficients = pickle.loads(job)
    return compile_space(spec), coefficients


def _nothing(spec: SpaceSpec, best: int) -> Swept:
    """Of no tile at all. A metric bounded on both sides is two constraints."""
    bounds = sum((b.min is not None) + (b.max is not None) for b in spec.constraints.values())
    front = RunningFront(margin=np.array(margins(spec.objectives)), best=best)
    return Swept(front=front, passed=np.zeros(1 + bounds, np.int64))


def _parts(client: Any, job: bytes, tiling: Tiling, best: int) -> Iterator[Swept]:
    """Finished shards in whatever order they come."""
    from distributed import as_completed

    workers = max(1, len(client.scheduler_info(n_workers=-1)["workers"]))
    pieces = shards(len(tiling), workers)
    futures = [client.submit(sweep_shard, job, tiling, best, piece, pure=False) for piece in pieces]
    try:
        for future in as_completed(futures):
            yield future.result()
            future.release()
    finally:
        client.cancel([future for future in futures if not future.done()], force=True)


@contextmanager
def _client() -> Iterator[Any]:
    """A client of the scheduler that the environment names, else of a cluster of this host's cores."""
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise InputError(
            '--engine dask: dask is not installed (allowed: local, or dask with its extra); pip install "dse[dask]"'
        ) from None
    address = os.environ.get(SCHEDULER, "").strip()
    if address:
        try:
            client = Client(address, timeout=REACHABLE)
            client.wait_for_workers(1, timeout=REACHABLE)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{SCHEDULER}={address!r}: no Dask scheduler with a worker answers there ({error});"
                " start one, or unset it for a cluster on this host"
            ) from None
        with client:
            yield client
        return
    with _workers_spared():
        cluster = LocalCluster(
            processes=True, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL
        )
    with cluster, Client(cluster) as client:
        yield client


@contextmanager
def _workers_spared() -> Iterator[None]:
    """Ctrl-C in a terminal reaches every process; workers started in here leave it to their parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
