"""How fast a sweep is: python benchmarks/throughput.py [SPACE.yaml ...] [--seconds 10] [--points 300]

For each space: compile time apart, then tiles until the time is up with their answers taken in as a search does, the
share of time outside the kernel, the memory of the process, and the same function called point by point, whose
answers are compared with the tile's while both are timed.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from dse.cost.coefficients import Coefficients
from dse.search.grid import Swept, Tiling, sweep
from dse.search.kernel import TRACES, Questions, compiled_points, compiled_tile, goals, tables
from dse.space import CompiledSpace, compile_space, load_space

SPACES = ("quickstart", "deepseek_v3_h200", "billion")
FOLDER = Path(__file__).parent.parent / "search_spaces"
AGREE = 3e-5  # relative error allowed between a tile's answers and the point's own
MOST_MEMORY = 2 * 2**30
AT_LEAST = 2_000_000  # points to price, so that a small space is swept again and again


@dataclass(frozen=True)
class Timing:
    """Seconds, and what was done in them."""

    compiling: float
    points: int
    seconds: float
    outside: float
    one_by_one: float  # points/s
    error: float

    @property
    def rate(self) -> float:
        return self.points / self.seconds


def measure(space: CompiledSpace, seconds: float, singles: int) -> Timing:
    c, tiling = Coefficients(), Tiling.of(space)
    traces, started = TRACES["tile"], time.perf_counter()
    warm = sweep(space, c, tiles=range(1))
    compiling = time.perf_counter() - started
    timed = repeated(space, c, bounded(warm, space, c, tiling, seconds), seconds)
    if TRACES["tile"] > traces + 1:
        raise SystemExit(f"{space.spec.name}: traced {TRACES['tile'] - traces} times, not once")
    error, one_by_one = compare(space, c, tiling, singles)
    return Timing(
        compiling=compiling,
        points=sum(part.evaluated for part in timed),
        seconds=sum(part.seconds for part in timed),
        outside=sum(part.outside for part in timed),
        one_by_one=one_by_one,
        error=error,
    )


def bounded(warm: Swept, space: CompiledSpace, c: Coefficients, tiling: Tiling, seconds: float) -> range:
    """As many tiles, from the first on, as the time allows."""
    again = sweep(space, c, tiles=range(min(4, len(tiling))))
    return range(max(1, min(len(tiling), int(again.evaluated / again.seconds * seconds / max(1, tiling.size(0))))))


def repeated(space: CompiledSpace, c: Coefficients, tiles: range, seconds: float) -> list[Swept]:
    """Whole sweeps of the tiles until enough points are priced (one, where the space is large)."""
    parts = [sweep(space, c, tiles=tiles)]
    while sum(p.evaluated for p in parts) < AT_LEAST and sum(p.seconds for p in parts) < seconds:
        parts.append(sweep(space, c, tiles=tiles))
    return parts


def compare(space: CompiledSpace, c: Coefficients, tiling: Tiling, count: int) -> tuple[float, float]:
    """The worst relative error of a tile's objectives, and points/s of the same function called for one at a time."""
    asked = Questions.of(space)
    table, target = jax.device_put(tables(space, c, np.float32)), goals(space, np.float32)
    tile = compiled_tile(asked, tiling.designs, tiling.points)(table, np.int32(0), np.int32(0), target)
    swept = np.asarray(jax.block_until_ready(tile).objectives, np.float64)
    single = compiled_points(asked)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, min(tiling.designs, tiling.rows), count).astype(np.int32)
    columns = rng.integers(0, min(tiling.points, tiling.columns), count).astype(np.int32)
    jax.block_until_ready(single(table, rows[:1], columns[:1], target.bounds))  # warm
    error, started = 0.0, time.perf_counter()
    for row, column in zip(rows, columns, strict=True):
        alone = jax.block_until_ready(single(table, row[None], column[None], target.bounds))[1]
        ours, theirs = swept[row, column], np.asarray(alone[0], np.float64)
        error = max(error, float(np.max(np.abs(ours - theirs) / np.abs(theirs))))
    return error, count / (time.perf_counter() - started)


def memory() -> int:
    """Most bytes this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spaces", nargs="*", type=Path, help="search spaces (default: the shipped ones)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each space")
    parser.add_argument("--points", type=int, default=300, help="points priced one at a time")
    arguments = parser.parse_args()
    files = arguments.spaces or [path for name in SPACES if (path := FOLDER / f"{name}.yaml").exists()]
    print(f"{os.cpu_count()} cores, jax {jax.__version__} on {jax.devices()[0].platform}, float32", flush=True)
    for path in files:
        space = compile_space(load_space(path))
        t = measure(space, arguments.seconds, arguments.points)
        print(
            f"{path.stem}: {space.legal:,} points, {t.points:,} priced in {t.seconds:.2f} s,"
            f" {t.rate / 1e6:.1f} M points/s\n"
            f"  first tile with compilation {t.compiling:.1f} s; {t.outside / t.seconds:.1%} of the time outside"
            f" the kernel; {memory() / 2**20:,.0f} MiB at most\n"
            f"  one by one {t.one_by_one:,.0f} points/s: the sweep is {t.rate / t.one_by_one:,.0f} times as fast,"
            f" answers within {t.error:.1e}",
            flush=True,
        )
        if not t.error <= AGREE:
            raise SystemExit(f"{path.stem}: answers differ by {t.error:.1e} (allowed: {AGREE:g})")
        if memory() > MOST_MEMORY:
            raise SystemExit(f"{path.stem}: {memory() / 2**20:,.0f} MiB (allowed: {MOST_MEMORY / 2**20:,.0f})")


if __name__ == "__main__":
    main()
