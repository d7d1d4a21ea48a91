"""Rows of batches, and blocks padded so that few shapes are compiled: every row comes back once, in order."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dse.batches import at_rows, in_blocks


def test_rows_of_every_leaf_by_one_index_or_one_an_axis() -> None:
    tree = {"a": jnp.arange(12.0).reshape(3, 4), "b": None}
    by_row = at_rows(tree, np.array([2, 0]))
    assert by_row["b"] is None
    assert isinstance(by_row["a"], np.ndarray)
    assert by_row["a"].tolist() == [[8.0, 9.0, 10.0, 11.0], [0.0, 1.0, 2.0, 3.0]]
    assert at_rows(tree, (np.array([1, 2]), 3))["a"].tolist() == [7.0, 11.0]


@pytest.mark.parametrize(
    ("rows", "options", "sizes"),
    [
        (1, {}, [16]),
        (17, {}, [32]),
        (16, {}, [16]),
        (5, {"least": 2}, [8]),
        (40, {"block": 32}, [32, 16]),
        (64, {"block": 32}, [32, 32]),
        (3, {"block": 8, "least": 8}, [8]),
        (11, {"block": 10, "least": 10}, [10, 10]),  # blocks of one size, which need not be a power of two
        (5, {"block": 2}, [2, 2, 2]),  # `block` is never passed, whatever the least
    ],
)
def test_blocks_are_padded_with_the_last_row_and_cut(rows: int, options: Any, sizes: list[int]) -> None:
    seen = []

    def price(x: Any, weight: Any) -> Any:
        seen.append(len(x["isl"]))
        filling = x["isl"][min(len(x["isl"]), rows - sum(seen[:-1])) :]
        assert np.all(filling == rows - 1.0)
        return {"sum": jnp.asarray(x["isl"] + weight[:, 0]), "both": weight}

    isl, weight = np.arange(float(rows)), np.arange(2.0 * rows).reshape(rows, 2)
    found = in_blocks(price, {"isl": isl, "unused": None}, weight, **options)
    assert seen == sizes
    assert found["sum"].tolist() == (isl + weight[:, 0]).tolist()
    assert found["both"].tolist() == weight.tolist()
    assert all(isinstance(leaf, np.ndarray) for leaf in found.values())
