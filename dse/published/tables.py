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


def placement_table(
    mean_isl: float | None = None,
    mean_osl: float | None = None,
    gpus: int = 4,
    ttft_ms: float = 200.0,
    tpot_ms: float = 100.0,
) -> pd.DataFrame:
    """DistServe's placements of OPT-13B on up to `gpus` A100, with goodput (requests/s) and L_m, best a GPU first.

    Lognormal lengths of the given means; without them those of the authors' ShareGPT requests.
    """
    from dse.published import placement as pl

    places = pl.placements(gpus)
    trace = pl.sharegpt() if mean_isl is None or mean_osl is None else pl.sharegpt_like(mean_isl, mean_osl)
    found = pl.goodput(places, trace, pl.Target(ttft=ttft_ms * 1e-3, tpot=tpot_ms * 1e-3))
    names = ("pp_across", "tp_prefill", "pp_prefill", "tp_decode", "pp_decode")
    table = pd.DataFrame({name: np.asarray(getattr(places, name)).astype(int) for name in names})
    table = table.assign(
        gpus=np.asarray(places.gpus).astype(int),
        req_s_gpu=np.asarray(found.per_gpu, float).round(3),
        req_s=np.asarray(found.rate, float).round(3),
        l_m=np.asarray(found.l_m, float).round(),
    )
    return table.sort_values(["req_s_gpu", "gpus"], ascending=[False, True], ignore_index=True)


__all__ = ["methods", "placement_table", "published"]
