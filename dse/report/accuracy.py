"""Predictions of rows that no fit saw against what was measured, summarised: errors by split and bucket, worst rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dse.report.names import number

if TYPE_CHECKING:
    from dse.calibrate.roofline import Beside
    from dse.calibrate.run import Accuracy

BY = ("model", "gpu", "engine", "weights", "concurrency", "isl", "osl", "workload", "experiment_id")
EDGES = {"concurrency": (4, 16, 64, 256), "isl": (512, 2048, 8192), "osl": (128, 512, 2048)}
SETTINGS = ("model", "gpu", "engine", "weights", "tp", "moe_ep", "isl", "osl", "concurrency", "workload")
MOST_WORST = 15


@dataclass(frozen=True)
class Measure:
    """A measured time and the column that predicts it."""

    key: str
    label: str
    unit: str
    measured: str
    predicted: str


MEASURES = (
    Measure("tpot", "TPOT", "ms", "measured_tpot_ms", "tpot_ms"),
    Measure("ttft", "TTFT", "ms", "measured_ttft_ms", "ttft_ms"),
    Measure("cycle", "engine step", "µs", "cycle_us", "predicted_us"),
)


@dataclass(frozen=True)
class Errors:
    """Mean and median |predicted/measured - 1|, and the bias: the geometric mean of predicted/measured."""

    rows: int
    mean: float
    median: float
    bias: float


@dataclass(frozen=True)
class Parity:
    """One measure of one split: (n,) measured and predicted, a group and a description each."""

    measure: Measure
    measured: tuple[float, ...]
    predicted: tuple[float, ...]
    group: tuple[str, ...]
    about: tuple[str, ...]

    @property
    def errors(self) -> Errors:
        return _errors(np.array(self.predicted) / np.array(self.measured))


@dataclass(frozen=True)
class Split:
    """Who was left out, and how every row fared. `buckets`: (column, value) -> errors of each measure, in order."""

    name: str
    parities: tuple[Parity, ...]
    buckets: tuple[tuple[str, str, tuple[Errors, ...]], ...]
    worst: tuple[tuple[str, ...], ...]  # cells under `worst_heads`
    worst_heads: tuple[str, ...]


@dataclass(frozen=True)
class AccuracyReport:
    """Everything the page shows."""

    source: str
    splits: tuple[Split, ...]
    refused: tuple[tuple[str, int], ...]
    beside: tuple[Beside, ...] = ()


# -------------------------------------------------------------------------------------------------- summary


def summarise(result: Accuracy, source: str = "", beside: Sequence[Beside] = ()) -> AccuracyReport:
    """The report's numbers; splits in the order in which they were made."""
    refused = Counter(refusal.reason for refusal in result.refused)
    return AccuracyReport(
        source=source,
        splits=tuple(_split(name, rows) for name, rows in result.rows.items()),
        refused=tuple(refused.most_common()),
        beside=tuple(beside),
    )


def _split(name: str, rows: pd.DataFrame) -> Split:
    measures = [m for m in MEASURES if m.measured in rows and m.predicted in rows]
    settings = [column for column in SETTINGS if column in rows]
    about = [", ".join(f"{c} {v}" for c, v in zip(settings, row)) for row in rows[settings].astype(str).to_numpy()]
    group = rows["gpu" if "gpu" in rows else settings[0]].astype(str).tolist() if settings else [""] * len(rows)
    found = []
    for m in measures:
        x, y = (pd.to_numeric(rows[column], errors="coerce").to_numpy(float) for column in (m.measured, m.predicted))
        good = (x > 0) & (y > 0) & np.isfinite(x * y)
        pick = np.nonzero(good)[0]
        found.append(
            Parity(m, *(tuple(v[good].tolist()) for v in (x, y)), *(tuple(t[i] for i in pick) for t in (group, about)))
        )
    first = measures[0]
    return Split(
        name=name,
        parities=tuple(found),
        buckets=tuple(_buckets(rows, measures)),
        worst=_worst(rows, first, settings),
        worst_heads=(*settings, f"measured {first.unit}", f"predicted {first.unit}", "ratio"),
    )


def _buckets(rows: pd.DataFrame, measures: Sequence[Measure]) -> Iterator[tuple[str, str, tuple[Errors, ...]]]:
    """Rows by each setting that takes more than one value; counts and lengths in ranges."""
    ratios = [_ratio(rows, m) for m in measures]
    for column in BY:
        groups = list(_groups(rows[column], EDGES.get(column, ()))) if column in rows else []
        for name, some in groups if len(groups) > 1 else ():
            yield column, name, tuple(_errors(ratio[some]) for ratio in ratios)


def _groups(values: pd.Series, edges: Sequence[int]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, mask) of each value, or of each range between edges, in order."""
    if not edges:
        text = values.astype(str).to_numpy()
        yield from ((str(name), text == name) for name in sorted(set(text)))
        return
    names = [f"to {edges[0]}", *(f"{a + 1} to {b}" for a, b in pairwise(edges)), f"above {edges[-1]}"]
    place = np.searchsorted(np.array(edges, float), pd.to_numeric(values, errors="coerce").to_numpy(float), side="left")
    yield from ((names[i], place == i) for i in np.unique(place))


def _worst(rows: pd.DataFrame, measure: Measure, settings: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    ratio = _ratio(rows, measure)
    off = np.where(np.isfinite(ratio), np.abs(np.log(np.where(ratio > 0, ratio, 1.0))), -1.0)
    found = []
    for i in np.argsort(-off, kind="stable")[:MOST_WORST]:
        row = rows.iloc[i]
        times = [number(float(row[column])) for column in (measure.measured, measure.predicted)]
        found.append((*(_cell(row[c]) for c in settings), *times, f"{ratio[i]:.2f}"))
    return tuple(found)


def _ratio(rows: pd.DataFrame, m: Measure) -> np.ndarray:
    measured, predicted = (
        pd.to_numeric(rows[column], errors="coerce").to_numpy(float) for column in (m.measured, m.predicted)
    )
    return np.where(measured > 0, predicted / np.where(measured > 0, measured, 1.0), np.nan)


def _errors(ratio: np.ndarray) -> Errors:
    known = ratio[np.isfinite(ratio) & (ratio > 0)]
    if not len(known):
        return Errors(0, float("nan"), float("nan"), float("nan"))
    off = np.abs(known - 1.0)
    return Errors(len(known), float(off.mean()), float(np.median(off)), float(np.exp(np.log(known).mean())))


def _cell(value: Any) -> str:
    text = "" if pd.isna(value) else str(value)
    return text.removesuffix(".0").split("/")[-1]


__all__ = ["MEASURES", "AccuracyReport", "Errors", "Measure", "Parity", "Split", "summarise"]
