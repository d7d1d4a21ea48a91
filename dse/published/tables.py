"""`published`: any of the published methods over a table, one row in, one row out, same order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from dse.cost.types import Architecture
from dse.errors import unknown
from dse.published.cells import Cells
from dse.published.methods import METHODS


def published(
    method: str, cases: pd.DataFrame, architecture: Callable[[str], Architecture] | None = None
) -> pd.DataFrame:
    """The input columns with the method's results: a result that the input has as a column already takes its place.

    A row outside the method's domain has its `reason` and no results; the others are computed in float64.
    `architecture` finds a model by name for `corrected-roofline`, which knows its own few models without it. Raises
    InputError only where no row could be read: an unknown method, a required column that is missing.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    cells = Cells(cases, method)
    columns = METHODS[method](cells, architecture)
    usable = cells.usable
    result = cases.reset_index(drop=True).copy()
    for name, values in columns.items():
        filled = np.full(cells.n, np.nan, dtype=object if values.dtype == bool else float)
        filled[usable] = values
        result[name] = filled
    result["reason"] = np.where(cells.reason == "", cells.notes, cells.reason)
    return result


def methods() -> tuple[str, ...]:
    """Names that `published` takes."""
    return tuple(METHODS)


__all__ = ["methods", "published"]
