"""Measurements as the fit sees them: scenarios, what was measured (log seconds), whose rows they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
import pandas as pd

from dse.catalog.coefficients import CoefficientSet
from dse.cost.evaluate import Scenario
from dse.errors import InputError
from dse.space.cases import Case, parse_cases, scenarios_of

Array = np.ndarray
SERVING = ("measured_ttft_ms", "measured_tpot_ms")
# What makes two rows one series: re-measurements and other concurrencies of it stay in one fold.
SERIES = ("model", "gpu", "engine", "weights", "tp", "moe_ep", "isl", "osl")


@dataclass(frozen=True)
class Refusal:
    """A row that cannot serve the fit, and why. Listed, never dropped silently."""

    row: int
    reason: str


@dataclass(frozen=True)
class Serving:
    """Closed-loop serving rows: leaves of `scenarios` are (n,); measured log seconds, NaN where not measured."""

    frame: pd.DataFrame
    scenarios: Scenario
    labels: dict[str, list[str]]
    log_ttft: Array
    log_tpot: Array
    refused: tuple[Refusal, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.log_tpot)


def read_serving(table: pd.DataFrame, speculation: Sequence[str] = ("no", "")) -> Serving:
    """Rows in estimate's columns with `measured_ttft_ms` and `measured_tpot_ms`.

    Refused with a reason: rows that cannot be priced, that measured nothing, that may have speculated (their accepted
    length is not recorded), exact duplicates, and TPOT below what reading the weights once would take.
    """
    missing = [name for name in SERVING if name not in table.columns]
    if missing:
        raise InputError(f"serving observations: columns {', '.join(missing)} missing")
    parsed = parse_cases(table)
    measured = table[list(SERVING)].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    duplicate = table.duplicated().to_numpy()
    refused, keep, cases = [], [], []
    for i, case in enumerate(parsed):
        word = str(table["speculation"].iloc[i]).lower() if "speculation" in table else ""
        reason = ""
        if isinstance(case, str):
            reason = case
        elif not (measured[i] > 0).all():
            reason = f"measured TTFT, TPOT = {measured[i][0]:g}, {measured[i][1]:g} ms: not both positive numbers"
        elif word not in speculation and word != "nan":
            reason = f"speculation: {word!r}; accepted tokens are not recorded"
        elif duplicate[i]:
            reason = "the same row again"
        elif measured[i][1] * 1e-3 < 0.5 * floor_seconds(case):
            reason = f"TPOT {measured[i][1]:g} ms is below half the time to read the weights once"
        if reason:
            refused.append(Refusal(i, reason))
        elif isinstance(case, Case):
            keep.append(i)
            cases.append(case)
    if not cases:
        raise InputError(
            "serving observations: no row can serve the fit; " + (refused[0].reason if refused else "empty")
        )
    with jax.enable_x64(True):
        scenarios = scenarios_of(cases, CoefficientSet("physics"))
    return Serving(
        frame=table.iloc[keep].reset_index(drop=True),
        scenarios=scenarios,
        labels={
            "generation": [c.gpu.generation for c in cases],
            "gpu": [c.gpu.name for c in cases],
            "engine": [c.engine for c in cases],
        },
        log_ttft=np.log(measured[keep, 0] * 1e-3),
        log_tpot=np.log(measured[keep, 1] * 1e-3),
        refused=tuple(refused),
    )


def floor_seconds(case: Case) -> float:
    """The time to stream one GPU's always-read weights (all but routed experts) at the data sheet's bandwidth."""
    from dse.catalog.hardware import to_device

    mixers = sum(m.count * sum(g.k * (g.n + g.n_kv) for g in m.gemms) for m in case.entry.mixers)
    size = mixers * case.precision.mixer_bytes
    return float(size / case.plan["tp"] / case.plan["pp"] / to_device(case.gpu).bandwidth)


def series(frame: pd.DataFrame, columns: Sequence[str] = SERIES) -> Array:
    """A number for each group of rows that must share a fold."""
    known = [name for name in columns if name in frame]
    return np.asarray(frame[known].astype(str).agg("|".join, axis=1).factorize()[0])
