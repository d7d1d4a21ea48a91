"""What a search returns, whichever sampler ran it: data only, for tables, files and the report."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Binding:
    """How far the least-violating plan is from one limit it breaks."""

    metric: str
    value: float
    op: str
    bound: float

    @property
    def text(self) -> str:
        return f"{self.metric} {self.value:.4g}, {self.op} {self.bound:.4g}"


@dataclass(frozen=True)
class SearchResult:
    """Front and best plans as DataFrames (columns: what was chosen, then `space.columns`), and how they were found.

    `funnel`: (stage, points left) from enumerated to all constraints met. `least`: the least-violating plan where
    nothing is feasible, with what binds. Rows are float64 re-evaluations of what the float32 sweep kept.
    """

    name: str
    sampler: str
    objectives: tuple[tuple[str, str], ...]
    constraints: tuple[tuple[str, str, float], ...]
    front: pd.DataFrame
    candidates: pd.DataFrame
    funnel: tuple[tuple[str, int], ...]
    cuts: dict[str, int]
    enumerated: int
    legal: int
    evaluated: int
    feasible: int
    seconds: float
    rate: float  # points/s while sweeping
    partial: bool = False
    least: pd.DataFrame | None = None
    binding: tuple[Binding, ...] = ()
    hypervolume_ratio: float | None = None  # sampled front against the exhaustive one, where both were computed
    run: dict[str, Any] = field(default_factory=dict)  # space, versions, seeds: what run.json adds


def funnel_of(
    enumerated: int,
    legal: int,
    evaluated: int,
    constraints: Sequence[tuple[str, str, float]],
    passed: Iterable[int],
) -> tuple[tuple[str, int], ...]:
    """(stage, points left); `passed`: those that fit in memory, then those that meet each constraint too."""
    before = [("enumerated", enumerated), ("legal", legal), ("evaluated", evaluated)]
    stages = ("fits in memory", *(f"meets {metric} {op} {bound:g}" for metric, op, bound in constraints))
    return (*before[: 3 if evaluated < legal else 2], *zip(stages, (int(n) for n in passed), strict=True))


def provenance(space: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """What repeats a run: the space as plain data, the seed, the versions of what computed it."""
    return {
        "space": space,
        "seed": seed,
        "versions": {name: version(name) for name in ("dse", "jax", "numpy", "optuna", "moocore")},
        "python": platform.python_version(),
    }
