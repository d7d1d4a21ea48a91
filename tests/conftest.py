"""What the tests of the cost model share: one batch of random scenarios, priced once in each precision."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

# Before numpy: several test processes with a BLAS pool each wait for each other on a small machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Before jax: what one test process has compiled serves the others, the commands they start, and the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("DSE_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"])
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import numpy as np
import pytest
from brute import brute
from scenarios import random_scenarios

from dse.cost.evaluate import Estimate, Scenario, estimate
from dse.cost.types import stack
from dse.search import grid
from dse.search.grid import Tiling

Columns = dict[str, Any]  # arrays by name
LARGE = 2 * 2**30  # bytes of a test process


def columns(tree: Any, prefix: str = "") -> Columns:
    """The leaves of an estimate (and every `total`) as flat columns: `served.decode.attention`."""
    flat: Columns = {}
    for field in fields(tree):
        value = getattr(tree, field.name)
        flat |= columns(value, f"{prefix}{field.name}.") if is_dataclass(value) else {prefix + field.name: value}
    if hasattr(type(tree), "total"):
        flat[f"{prefix}total"] = tree.total
    return flat


def in_double(scenarios: list[Scenario]) -> Estimate:
    """Estimates in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, estimate(stack(scenarios)))


def resident() -> int:
    """Bytes of memory that this process has; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@pytest.fixture(scope="module", autouse=True)
def programs_of_large_processes_go() -> Iterator[None]:
    """JAX keeps every program ever compiled, 6 GB of them in a whole run: a large process drops them between files."""
    yield
    if resident() > LARGE:
        jax.clear_caches()
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", bool)(0)  # glibc would keep what is freed


@pytest.fixture(scope="session")
def random_batch() -> list[Scenario]:
    return random_scenarios(400, seed=0)


@pytest.fixture(scope="session")
def double(random_batch: list[Scenario]) -> Columns:
    return columns(in_double(random_batch))


@pytest.fixture(scope="session")
def single(random_batch: list[Scenario]) -> Columns:
    return columns(jax.tree.map(np.asarray, estimate(stack(random_batch))))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Tiling:
    """The dense space in many tiles, some of them past the end on both sides."""
    monkeypatch.setattr(grid, "TILE", 98)
    monkeypatch.setattr(grid, "WIDEST", 7)
    return Tiling.of(brute("dense").space)
