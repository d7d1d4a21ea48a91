"""Batches on the host: some rows of a tree, and many rows priced in padded blocks so that few shapes are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

LEAST = 16  # rows of the smallest block


def at_rows(tree: Any, index: Any) -> Any:
    """Every leaf of a tree, as a NumPy array, by an index of its leading axis, or a tuple of one index an axis."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


def in_blocks(price: Callable[..., Any], *batches: Any, block: int | None = None, least: int = LEAST) -> Any:
    """`price(*batches)`, `block` rows at a time (all at once where None), as NumPy arrays.

    Every leaf has the same n >= 1 rows on its leading axis. The last row fills each block up to a power of two of at
    least `least` rows and at most `block`; what is priced of the filling is cut off.
    """
    rows = len(jax.tree.leaves(batches)[0])
    most = block or rows
    parts = []
    for start in range(0, rows, most):
        count = min(most, rows - start)
        size = max(least, 1 << (count - 1).bit_length())
        index = np.minimum(np.arange(start, start + (min(size, block) if block else size)), rows - 1)
        parts.append(at_rows(price(*at_rows(batches, index)), slice(count)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


__all__ = ["LEAST", "at_rows", "in_blocks"]
