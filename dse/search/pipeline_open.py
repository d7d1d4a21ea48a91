"""Aggregated language models of a pipeline at every rate that their replicas meet, in blocks of one shape."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np

from dse.batches import at_rows, in_blocks
from dse.cost.evaluate import Scenario
from dse.cost.pipeline_open import Aggregated, aggregated
from dse.programs import LARGE, program
from dse.space.pipeline import StageSpec
from dse.space.pipeline_calls import call_lengths
from dse.space.pipeline_compile import CompiledPipeline

Array = np.ndarray
BLOCK = 512  # rows of one call: the program is large, so it is compiled once
IDLE = 1e-6  # of a design's capacity, found first, at a rate that any serves


@cache
def compiled() -> Any:
    return program(aggregated, in_axes=(0, None, None, 0), options=LARGE)


def _rows(x: Scenario, nodes: Any, first: Array | None, design: Array, rate: Array) -> Aggregated:
    def priced(some: Scenario, at: Array) -> Aggregated:
        return compiled()(some, nodes, first, at)

    found: Aggregated = in_blocks(priced, at_rows(x, design), rate, block=BLOCK, least=BLOCK)
    return found


def aggregated_at(p: CompiledPipeline, x: Scenario, stage: StageSpec, design: Array, rate: Array) -> Aggregated:
    """Leaves (R, N): designs (N,) of a stage, each replica at the calls/s of `rate` (R, N).

    Each design is priced once at each of its rates; where it is not stable, as if nearly idle.
    """
    nodes, first = call_lengths(p.spec, stage, p.kinds[stage.name])
    every = np.arange(len(p.designs[stage.name]))
    idle = _rows(x, nodes, first, every, np.full(len(every), IDLE))
    capacity = np.asarray(idle.capacity)[design]
    stable = rate < capacity
    pairs = np.stack([np.broadcast_to(design, rate.shape)[stable], rate[stable]], axis=1)
    unique, of = np.unique(pairs, axis=0, return_inverse=True)
    found = at_rows(idle, np.broadcast_to(design, rate.shape))
    if len(unique):
        priced = _rows(x, nodes, first, unique[:, 0].astype(int), unique[:, 1])
        found = jax.tree.map(lambda a, b: _placed(np.array(a), stable, b[of.ravel()]), found, priced)
    return Aggregated(**{**vars(found), "stable": stable & found.stable.astype(bool)})


def _placed(values: Array, where: Array, new: Array) -> Array:
    values[where] = new
    return values


__all__ = ["aggregated_at", "compiled"]
