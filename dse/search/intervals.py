"""Intervals of a search's rows: only survivors are rows, so this is cheap."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pandas as pd

from dse.catalog.coefficients import LEVELS, CoefficientSet
from dse.catalog.uncertainty import METRICS
from dse.cost.coefficients import Coefficients
from dse.programs import program
from dse.search.kernel import Tables, rows_of, scenarios, tables
from dse.space.compile import CompiledSpace
from dse.space.intervals import COLUMNS, Known, half_widths
from dse.space.tables import split

Array = np.ndarray


def with_intervals(
    frame: pd.DataFrame, flat: Array, space: CompiledSpace, c: Coefficients, chosen: CoefficientSet
) -> pd.DataFrame:
    """A frame of points (flat indices beside its rows) with the ends of each metric's interval.

    Under a mix of workloads an interval is as wide, in logs, as the widest of its workloads: their errors are taken to
    be the same, which is the cautious end.
    """
    if not len(frame):
        return frame
    rows, points = split(space, flat)
    kinds = len(space.workloads)
    triples = rows.repeat(kinds), points.repeat(kinds), np.tile(np.arange(kinds), len(rows))
    with jax.enable_x64(True):
        batch = jax.tree.map(np.asarray, _gathered(tables(space, c, np.float64), *triples))
    known = []
    for row in rows:
        machine = space.machines[space.designs.machine[row]]
        model = space.models[space.designs.model[row]].name
        named = {"generation": machine.gpu.generation, "gpu": machine.gpu.name, "model": model}
        known += [Known(model, dict.fromkeys(LEVELS, "") | named)] * kinds
    half = half_widths(batch, known, chosen).reshape(len(rows), kinds, len(METRICS)).max(axis=1)
    ends: dict[str, Array] = {}
    for i, metric in enumerate(METRICS):
        value = frame[COLUMNS[metric]].to_numpy(float)
        ends[f"{COLUMNS[metric]}_low"] = value * np.exp(-half[:, i])
        ends[f"{COLUMNS[metric]}_high"] = value * np.exp(half[:, i])
    return frame.assign(**ends)


def _gather(t: Tables, rows: Array, points: Array, kinds: Array) -> Any:
    """Scenarios of (design, operating point, workload) triples: leaves (n,)."""
    load = rows_of(t.loads, points)
    hit = load.prefix_hit if t.prefix_hit is None else t.prefix_hit[kinds]
    load = replace(load, isl=t.isl[kinds], osl=t.osl[kinds], prefix_hit=hit)
    return replace(scenarios(t, rows), load=load)


_gathered = program(_gather)


__all__ = ["with_intervals"]
