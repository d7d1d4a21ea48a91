"""Sampling that is always legal: walk the axes in order and pick each value by its rank among those still legal.

The legal designs, sorted as they are enumerated, are the leaves of a tree: the children of a prefix lie side by side,
so a level of the tree is one array of where the children of each prefix start. A coordinate u in [0, 1) picks child
floor(u * children), whatever came before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dse.errors import InputError
from dse.space.compile import CompiledSpace, Designs

Array = np.ndarray

DESIGN_AXES = (
    "model",
    "machine",
    "gpus",
    "pp",
    "tp",
    "cp",
    "attention_dp",
    "moe_ep",
    "moe_tp",
    "replicas",
    "weights",
    "activations",
    "kv",
    "overlap_prefill",
    "overlap_decode",
    "dispatch",
    "eplb_replicas",
    "cp_method",
    "sequence_parallel",
    "microbatches",
    "utilisation",
    "draft_model",
    "draft_tp",
)
LOAD_AXES = ("concurrency", "chunk", "draft_tokens", "acceptance", "prefix_hit")


@dataclass(frozen=True)
class Tree:
    """`starts[k][i]`: first child, at level k + 1, of node i of level k; a last entry ends the last node's children."""

    axes: tuple[str, ...]
    starts: tuple[Array, ...]


def axis_names(compiled: CompiledSpace) -> tuple[str, ...]:
    """The axes that leave a choice, in the order in which `rank_decode` walks them."""
    loads = [name for name, size in zip(LOAD_AXES, compiled.operating.shape) if size > 1]
    return (*_tree_of(compiled).axes, *loads)


def rank_decode(compiled: CompiledSpace, u: Array) -> Array:
    """Flat indices of the points at coordinates u, (n, len(axis_names)) in [0, 1): all legal, and all are reached."""
    u = np.asarray(u, np.float64)
    names = axis_names(compiled)
    if u.ndim != 2 or u.shape[1] != len(names):
        raise InputError(
            f"coordinates of shape {u.shape} (allowed: (n, {len(names)}), one for each of {', '.join(names)})"
        )
    if not bool(np.all((u >= 0) & (u < 1))):
        raise InputError("coordinates must lie in [0, 1)")
    tree = _tree_of(compiled)
    node = np.zeros(len(u), np.int64)
    for k, starts in enumerate(tree.starts):
        first, last = starts[node], starts[node + 1]
        node = first + _rank(u[:, k], last - first)
    q = np.zeros(len(u), np.int64)
    k = len(tree.starts)
    for size in compiled.operating.shape:
        q *= size
        if size > 1:
            q += _rank(u[:, k], np.int64(size))
            k += 1
    return node * len(compiled.operating) + q


def rank_encode(compiled: CompiledSpace, flat: Array) -> Array:
    """Coordinates that `rank_decode` takes to the given points: the middle of each one's cell."""
    from dse.space.tables import split

    tree = _tree_of(compiled)
    design, q = split(compiled, flat)
    columns: list[Array] = []
    node = design
    for starts in reversed(tree.starts):
        parent = np.searchsorted(starts, node, side="right") - 1
        columns.append((node - starts[parent] + 0.5) / (starts[parent + 1] - starts[parent]))
        node = parent
    columns.reverse()
    loads: list[Array] = []
    for size in reversed(compiled.operating.shape):
        if size > 1:
            loads.append((q % size + 0.5) / size)
        q = q // size
    stacked = [*columns, *reversed(loads)]
    return np.stack(stacked, axis=1) if stacked else np.zeros((len(design), 0))


def _rank(u: Array, count: Array | np.int64) -> Array:
    return np.minimum((u * count).astype(np.int64), count - 1)


def tree(designs: Designs) -> Tree:
    """The levels at which some prefix has a choice; the others add nothing."""
    n = len(designs)
    new = np.zeros(n, bool)  # where a prefix begins
    new[0] = True
    nodes = np.zeros(1, np.int64)  # first row of each node of the level above
    axes: list[str] = []
    starts: list[Array] = []
    for name in DESIGN_AXES:
        column = getattr(designs, name)
        new[1:] |= column[1:] != column[:-1]
        below = np.flatnonzero(new)
        if len(below) > len(nodes):
            axes.append(name)
            starts.append(np.append(np.searchsorted(below, nodes), len(below)))
            nodes = below
    return Tree(tuple(axes), tuple(starts))


@lru_cache(maxsize=4)
def _tree_of(compiled: CompiledSpace) -> Tree:
    return tree(compiled.designs)


__all__ = ["DESIGN_AXES", "LOAD_AXES", "Tree", "axis_names", "rank_decode", "rank_encode", "tree"]
