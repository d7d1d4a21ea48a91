"""The exhaustive sweep: tiles of one shape through one compiled kernel, a running front on the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
import numpy as np

from dse.cost.coefficients import Coefficients
from dse.programs import Effort
from dse.search.kernel import Goals, Points, Questions, compiled_tile, goals, tables
from dse.search.metrics import margins
from dse.search.pareto import RunningFront
from dse.space.compile import CompiledSpace

TILE = 65_536  # points a call: a few MiB of intermediates, whatever the space's size
WIDEST = 1_024  # operating points of a tile
OPEN_TILE = 4_096  # points a call under open load, which prices a plan at every node of its lengths
# Points that are priced before a better program would be compiled: see `_effort`.
SMALL, OPEN_SMALL = 4 * TILE, 2 * OPEN_TILE
MIDDLE, OPEN_MIDDLE = 16 * SMALL, 16 * OPEN_SMALL

Progress = Callable[[int, int], None]  # points done, points in all


@dataclass(frozen=True)
class Tiling:
    """The tiles of a space: `designs` x `points` each, balanced so that little is padding."""

    designs: int
    points: int
    rows: int  # designs in all
    columns: int  # operating points in all

    @classmethod
    def of(cls, space: CompiledSpace) -> Tiling:
        rows, columns = len(space.designs), len(space.operating)
        points = _even(columns, WIDEST)
        tile = TILE if space.workloads.demand is None else OPEN_TILE
        return cls(designs=_even(rows, max(1, tile // points)), points=points, rows=rows, columns=columns)

    @property
    def shape(self) -> tuple[int, int]:
        return -(-self.rows // self.designs), -(-self.columns // self.points)

    def __len__(self) -> int:
        return self.shape[0] * self.shape[1]

    def origin(self, tile: int) -> tuple[int, int]:
        down, across = divmod(tile, self.shape[1])
        return down * self.designs, across * self.points

    def size(self, tile: int) -> int:
        """Points of a tile that exist."""
        row, column = self.origin(tile)
        return min(self.designs, self.rows - row) * min(self.points, self.columns - column)


def _even(total: int, most: int) -> int:
    """The smallest block length that covers `total` in as few blocks as `most` allows."""
    return -(-total // -(-total // min(total, most)))


@dataclass
class Swept:
    """What a sweep of some tiles found: float32 values, flat indices."""

    front: RunningFront
    passed: np.ndarray  # points that fit in memory, then meet the first 1, 2, ... constraints
    evaluated: int = 0
    seconds: float = 0.0
    outside: float = 0.0  # seconds the host spent while no tile was in flight, or merging
    partial: bool = False
    least: tuple[float, int] = (np.inf, -1)  # violation, flat index

    def merge(self, other: Swept) -> None:
        """Join what another worker found on other tiles."""
        self.front.add(other.front.values, other.front.indices, other.front.ties, other.front.sure)
        self.passed = self.passed + other.passed
        self.evaluated += other.evaluated
        self.partial |= other.partial
        self.least = min(self.least, other.least)


@dataclass
class _State:
    space: CompiledSpace
    tiling: Tiling
    swept: Swept
    target: Goals = field(init=False)
    young: bool = True

    def __post_init__(self) -> None:
        self.target = goals(self.space, np.float32)

    def absorb(self, tile: int, points: Points) -> None:
        """Take a finished tile's survivors into the front, and let the front sharpen the kernel's questions."""
        swept = self.swept
        row, column = self.tiling.origin(tile)
        swept.passed = swept.passed + np.asarray(points.passed, np.int64)
        swept.evaluated += self.tiling.size(tile)
        kept = np.flatnonzero(np.asarray(points.keep).ravel())
        if len(kept):
            down, across = np.divmod(kept, self.tiling.points)
            flat = (row + down).astype(np.int64) * self.tiling.columns + column + across
            values = np.asarray(points.objectives).reshape(-1, points.objectives.shape[-1])[kept]
            swept.front.add(values.astype(np.float64), flat, sure=np.asarray(points.sure).ravel()[kept])
        if not swept.passed[-1]:
            self._nearest(points, row, column)
        if swept.front.compact(at_least=1 if self.young else 4096):
            self.target = goals(self.space, np.float32, swept.front.members(), swept.front.threshold())
        self.young = tile & (tile - 1) == 0  # often at first, then when enough has gathered

    def _nearest(self, points: Points, row: int, column: int) -> None:
        """While nothing is feasible, remember the least-violating point (NaN never wins)."""
        violation = np.nan_to_num(np.asarray(points.violation).ravel(), nan=np.inf, posinf=np.inf)
        best = int(np.argmin(violation))
        down, across = divmod(best, self.tiling.points)
        if np.isfinite(violation[best]):
            index = (row + down) * self.tiling.columns + column + across
            self.swept.least = min(self.swept.least, (float(violation[best]), index))


def sweep(
    space: CompiledSpace,
    coefficients: Coefficients,
    tiles: range | None = None,
    best: int = 200,
    progress: Progress | None = None,
) -> Swept:
    """Price every point of the tiles (all by default). Ctrl-C returns what was found so far, marked partial."""
    tiling = Tiling.of(space)
    tiles = range(len(tiling)) if tiles is None else tiles
    front = RunningFront(margin=np.array(margins(space.objectives)), best=best)
    swept = Swept(front=front, passed=np.zeros(1 + len(space.constraints), np.int64))
    state = _State(space, tiling, swept)
    kernel = compiled_tile(Questions.of(space), tiling.designs, tiling.points, _effort(space, tiling))
    table = jax.device_put(tables(space, coefficients, np.float32))
    total = sum(tiling.size(tile) for tile in tiles) if len(tiles) != len(tiling) else space.legal
    started = time.perf_counter()
    try:
        for tile, points in _in_flight(kernel, table, tiling, tiles, state):
            ready = time.perf_counter()
            state.absorb(tile, points)
            swept.outside += time.perf_counter() - ready
            if progress is not None:
                progress(swept.evaluated, total)
    except KeyboardInterrupt:
        swept.partial = True
    front.compact()
    swept.seconds = time.perf_counter() - started
    return swept


def _effort(space: CompiledSpace, tiling: Tiling) -> Effort:
    """How well to compile: a tile of 16 ms takes 9 s, in 24 ms it takes 4 s, in 110 ms 2.5 s."""
    small, middle = (SMALL, MIDDLE) if space.workloads.demand is None else (OPEN_SMALL, OPEN_MIDDLE)
    points = tiling.rows * tiling.columns
    return "quick" if points <= small else "fair" if points <= middle else "full"


def _in_flight(
    kernel: Callable[..., Points], table: object, tiling: Tiling, tiles: range, state: _State
) -> Iterator[tuple[int, Points]]:
    """Finished tiles in order; the next one already runs while the host takes in the last."""
    waiting: list[tuple[int, Points]] = []
    for tile in tiles:
        row, column = tiling.origin(tile)
        waiting.append((tile, kernel(table, np.int32(row), np.int32(column), state.target)))
        if len(waiting) > 1:
            first, points = waiting.pop(0)
            yield first, jax.block_until_ready(points)
    for first, points in waiting:
        yield first, jax.block_until_ready(points)
