"""Pareto fronts: a running front with a float32 margin, so that the float64 recheck loses nothing.

All objectives are minimised here (the sign flips in `search.metrics`). Documented outcomes: rows with NaN are dropped,
infinite values are kept; equal objective vectors are one point, represented by the lowest index, with its ties counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


def front(values: Floats) -> NDArray[np.bool_]:
    """Which rows (n, k) no other row dominates (<= everywhere and < somewhere). Equal rows are all kept."""
    import moocore

    keep = np.zeros(len(values), bool)
    usable = ~np.isnan(values).any(axis=1)
    if usable.any():
        # moocore takes infinities for its own sentinels: the largest finite numbers order alike.
        rows = np.nan_to_num(np.ascontiguousarray(values[usable], np.float64))
        if rows.shape[1] == 1:
            keep[usable] = rows[:, 0] == rows[:, 0].min()
        else:
            keep[usable] = moocore.is_nondominated(rows, keep_weakly=True)
    return keep


def distinct(values: Floats, indices: Ints, ties: Ints) -> tuple[Floats, Ints, Ints]:
    """Equal rows merged into the one of lowest index; ties add up. Rows come back ordered by index."""
    if not len(values):
        return values, indices, ties
    order = np.lexsort((indices, *values.T[::-1]))
    sorted_values = values[order]
    new = np.ones(len(order), bool)
    new[1:] = (sorted_values[1:] != sorted_values[:-1]).any(axis=1)
    starts = np.flatnonzero(new)
    first = order[starts]
    total = np.add.reduceat(ties[order], starts)
    by_index = np.argsort(indices[first], kind="stable")
    return values[first][by_index], indices[first][by_index], total[by_index]


def on_front(values: Floats, indices: Ints) -> NDArray[np.intp]:
    """Positions of the rows on the front, by the first objective; equal vectors by their lowest index."""
    if not len(values):
        return np.zeros(0, np.intp)
    members = np.flatnonzero(front(values))
    _, first, _ = distinct(values[members], indices[members], np.ones(len(members), np.int64))
    position = members[np.isin(indices[members], first)]
    return position[np.argsort(values[position, 0], kind="stable")]


def foremost(values: Floats, most: int) -> NDArray[np.intp]:
    """Positions of the `most` best rows by the first objective."""
    return np.argsort(values[:, 0], kind="stable")[:most] if len(values) else np.zeros(0, np.intp)


def dominated_by(values: Floats, references: Floats, margin: Floats) -> NDArray[np.bool_]:
    """Rows that some front member beats by the margin where they differ at all: what no float64 recheck can revive.

    A reference r beats a row v when in every objective v > r + margin |r| or v == r, and the former somewhere.
    `references` must be a front (mutually non-dominated).
    """
    if not len(references) or not len(values):
        return np.zeros(len(values), bool)
    if values.shape[1] == 2:
        return _dominated_2d(values, references, margin)
    few = references[spread(references, 32)]
    beaten = _dominated_blocks(values, few, margin)
    rest = np.flatnonzero(~beaten)
    beaten[rest] = _dominated_blocks(values[rest], references, margin)
    return beaten


def _limit(references: Floats, margin: Floats) -> Floats:
    """What is worse than a reference by the margin lies above this; an infinite one has none."""
    return np.where(np.isinf(references), references, references + margin * np.abs(np.nan_to_num(references)))


def _dominated_blocks(values: Floats, references: Floats, margin: Floats) -> NDArray[np.bool_]:
    """Every row against every reference, a block of rows at a time."""
    beaten = np.zeros(len(values), bool)
    worse_than = _limit(references, margin)
    block = max(1, 2_000_000 // len(references))
    for start in range(0, len(values), block):
        rows = values[start : start + block, None, :]
        worse = rows > worse_than[None]
        beaten[start : start + block] = ((worse | (rows == references[None])).all(2) & worse.any(2)).any(1)
    return beaten


def _dominated_2d(values: Floats, references: Floats, margin: Floats) -> NDArray[np.bool_]:
    """Two objectives: the references that beat a row in one of them are a stretch of the sorted staircase."""
    order = np.lexsort((references[:, 1], references[:, 0]))
    first, second = references[order, 0], references[order, 1]
    limit_first, limit_second = _limit(references[order], margin).T
    count = np.searchsorted(limit_first, values[:, 0], side="left")  # worse than this many in the first
    last = np.maximum(count - 1, 0)
    beaten = (count > 0) & ((values[:, 1] > limit_second[last]) | (values[:, 1] == second[last]))
    same = np.minimum(np.searchsorted(first, values[:, 0], side="left"), len(first) - 1)
    return beaten | ((first[same] == values[:, 0]) & (values[:, 1] > limit_second[same]))


def staircase(references: Floats, margin: Floats, bins: int) -> tuple[Floats, float, float]:
    """Two objectives as a table: (best second objective by bin of the first, start of the bins, bins a unit).

    A row whose first objective falls in bin i is worse, by the margin, than front members whose second objective is at
    best table[i]. What lies before the first bin meets +inf.
    """
    order = np.argsort(references[:, 0])
    first, second = references[order, 0], references[order, 1]
    low, high = first[0], first[-1]
    width = max((high - low) / (bins - 2), np.abs(high) * 1e-6, 1e-30)
    edges = low + width * (np.arange(bins) - 1)
    count = np.searchsorted(first + margin[0] * np.abs(first), edges, side="left")
    best = np.minimum.accumulate(second)
    return np.where(count > 0, best[np.maximum(count - 1, 0)], np.inf), float(low - width), 1.0 / width


def hypervolume(values: Floats, reference: Floats) -> float:
    """Volume dominated by the rows, bounded by `reference` (minimisation)."""
    import moocore

    usable = values[~np.isnan(values).any(axis=1)]
    return float(moocore.hypervolume(usable, ref=np.asarray(reference, float))) if len(usable) else 0.0


def spread(values: Floats, count: int) -> NDArray[np.intp]:
    """Indices of up to `count` rows spread along the front: evenly by rank in each objective, extremes included."""
    if len(values) <= count:
        return np.arange(len(values))
    share = count // values.shape[1]
    picks = [
        np.argsort(values[:, k])[np.linspace(0, len(values) - 1, share).astype(int)] for k in range(values.shape[1])
    ]
    return np.unique(np.concatenate(picks))


@dataclass
class RunningFront:
    """The front of everything seen so far (within the margin), and the `best` rows by the first objective.

    A row that is not `sure` may turn out infeasible: it is kept while no sure row beats it, and beats none itself.
    """

    margin: Floats
    best: int = 200
    values: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    indices: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    ties: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    sure: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    _pending: list[tuple[Floats, Ints, Ints, NDArray[np.bool_]]] = field(default_factory=list)
    _held: int = 0

    def add(
        self, values: Floats, indices: Ints, ties: Ints | None = None, sure: NDArray[np.bool_] | None = None
    ) -> None:
        """Rows (n, k) of feasible points with their flat indices."""
        if len(values):
            ties = np.ones(len(indices), np.int64) if ties is None else ties
            self._pending.append((values, indices, ties, np.ones(len(indices), bool) if sure is None else sure))
            self._held += len(values)

    def compact(self, at_least: int = 1) -> bool:
        """Merge what is pending once it is `at_least` rows: drop what is beaten and not among the best."""
        if self._held < at_least:
            return False
        held = [(self.values, self.indices, self.ties, self.sure)] if len(self.values) else []
        values, indices, ties, sure = (np.concatenate(x) for x in zip(*held, *self._pending, strict=True))
        values, indices, ties = distinct(np.column_stack([values, ~sure]), indices, ties)
        values, sure = values[:, :-1], values[:, -1] == 0
        usable = ~np.isnan(values).any(axis=1)
        values, indices, ties, sure = values[usable], indices[usable], ties[usable], sure[usable]
        keep = ~dominated_by(values, values[sure][front(values[sure])], self.margin)
        keep |= values[:, 0] <= self._last_of_best(values[sure, 0])
        self.values, self.indices, self.ties, self.sure = values[keep], indices[keep], ties[keep], sure[keep]
        self._pending, self._held = [], 0
        return True

    def threshold(self) -> float:
        """First-objective value that a row must beat to be among the best."""
        return self._last_of_best(self.values[self.sure, 0] if len(self.values) else np.zeros(0))

    def _last_of_best(self, first: Floats) -> float:
        """The `best`-th of them, and the margin."""
        if len(first) < self.best:
            return float("inf")
        last = np.partition(first, self.best - 1)[self.best - 1]
        return float(_limit(last, self.margin[0]))

    def members(self) -> Floats:
        """The rows of the front proper."""
        values = self.values[self.sure]
        return values[front(values)] if len(values) else values
