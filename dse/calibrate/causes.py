"""Why a row is off: priced again as what it may really have been, each explanation judged by both times at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
import pandas as pd

from dse.calibrate.observations import log_ttft_tpot
from dse.calibrate.parameters import FREE
from dse.calibrate.sources import Source
from dse.catalog.coefficients import CoefficientSet
from dse.programs import program
from dse.space.cases import Case, parse_cases, scenarios_of

Array = np.ndarray
Row = dict[str, Any]
NONE = "none found"
WITHIN = 2.0  # standard deviations of the residuals that an explanation may leave in either time
BETTER = 0.5  # the largest share of the row's own misfit that it may leave
UNLIMITED = 1e18  # bytes of memory: admission never waits for KV
_PLACE = {f.name: i for i, f in enumerate(FREE)}


@dataclass(frozen=True)
class Cause:
    """An alternative to what a row says: another row, other values of coefficients, or memory without end."""

    name: str
    row: Callable[[Row, Case], Row | None] = lambda row, case: row  # None: does not apply
    values: Mapping[str, float] = field(default_factory=dict)
    unlimited: bool = False


def _with(**changed: str) -> Callable[[Row, Case], Row | None]:
    return lambda row, case: {**row, **changed}


def _tp(factor: float) -> Callable[[Row, Case], Row | None]:
    """Other TP; experts stay as divided among ranks (one of EP and MoE TP was all of them, or both share)."""

    def other(row: Row, case: Case) -> Row | None:
        tp = case.plan["tp"] * factor
        if tp < 1.0 or tp != round(tp):
            return None
        ep = case.plan["moe_ep"] * (factor if case.plan["moe_tp"] == 1.0 else 1.0)
        split = ep >= 1.0 and case.plan["moe_ep"] > 1.0
        return {**row, "tp": f"{tp:g}", "moe_tp": "", "moe_ep": f"{ep:g}" if split else "1"}

    return other


def _draft(row: Row, case: Case) -> Row | None:
    return None if case.load.draft_tokens else {**row, "speculation": "1"}


# In the order of trust: of two that explain a row alike, the one named first.
CAUSES = (
    *(Cause(f"weights are {name}", _with(weights=name)) for name in ("bf16", "fp8", "fp4")),
    Cause("tp is twice as large", _tp(2.0)),
    Cause("tp is half as large", _tp(0.5)),
    Cause("speculation: 1 drafted token a step", _draft),
    Cause("half of each prompt was in a prefix cache", _with(prefix_hit="0.5")),
    Cause("prompts were in a prefix cache (95%)", _with(prefix_hit="0.95")),
    *(Cause(f"the KV cache is {name}", _with(kv=name)) for name in ("bf16", "fp8")),
    Cause("tokens are sent 20 at a time (stream_interval)", _with(stream_interval="20")),
    Cause("admission is not limited by KV memory", unlimited=True),
    Cause("admission sets aside the KV of whole answers", values={"reserved_output": 1.0}),
    Cause("requests run in lockstep cohorts", values={"cohort": 1.0}),
    Cause("one client finds no seat free", values={"idle_seats": 1.0}),
)


def explain(
    source: Source, rows: Sequence[int], logs: Array, sigma: Array, causes: Sequence[Cause] = CAUSES
) -> pd.DataFrame:
    """The likely cause of each of some rows of a serving source, priced by the same coefficients: one line a row.

    `logs` (n, F): log coefficients of every row of the source; `sigma` (2,): spread of the log residuals of TTFT and
    TPOT. A cause is named where it leaves at most `WITHIN` sigma in both measured times and at most `BETTER` of the
    misfit (root of the sum of squares); of several the one that leaves least. `others`: the rest that would do.
    """
    parsed = parse_cases(source.frame.iloc[list(rows)])
    tried: list[tuple[int, Cause, Row]] = []
    for place, (number, case) in enumerate(zip(rows, parsed, strict=True)):
        if not isinstance(case, Case):
            continue
        plain = Cause("as said")
        row = {str(k): v for k, v in source.frame.iloc[number].items()}
        for cause in (plain, *causes):
            changed = cause.row(row, case)
            if changed is not None:
                tried.append((place, cause, changed))
    predicted = _price(tried, [logs[rows[place]] for place, _, _ in tried])
    return pd.DataFrame(
        [
            _verdict(
                source.measured[number],
                [(cause.name, value) for (at, cause, _), value in zip(tried, predicted, strict=True) if at == place],
                sigma,
            )
            for place, number in enumerate(rows)
        ]
    )


def _price(tried: Sequence[tuple[int, Cause, Row]], logs: Sequence[Array]) -> Array:
    """Log seconds (m, 2) of every alternative; NaN where it cannot be."""
    result = np.full((len(tried), 2), np.nan)
    cases = parse_cases(pd.DataFrame([row for _, _, row in tried])) if tried else []
    valid = [i for i, case in enumerate(cases) if isinstance(case, Case)]
    if not valid:
        return result
    with jax.enable_x64(True):
        scenarios = scenarios_of([c for c in cases if isinstance(c, Case)], CoefficientSet("physics"))
        unlimited = np.array([tried[i][1].unlimited for i in valid])
        device = replace(
            scenarios.device, capacity=np.where(unlimited, UNLIMITED, np.asarray(scenarios.device.capacity))
        )
        moved = np.array([_moved(logs[i], tried[i][1].values) for i in valid])
        result[valid] = np.asarray(_priced(moved, replace(scenarios, device=device)))
    return result


_priced = program(log_ttft_tpot, in_axes=0)


def _moved(logs: Array, values: Mapping[str, float]) -> Array:
    result = np.array(logs)
    for name, value in values.items():
        result[_PLACE[name]] = np.log(value)
    return result


def _verdict(measured: Array, tried: Sequence[tuple[str, Array]], sigma: Array) -> dict[str, Any]:
    """What is said of one row; `tried`: name and log seconds, the row as it stands first."""
    seen = np.isfinite(measured)

    def off(value: Array) -> Array:
        return np.where(seen, np.abs(value - np.where(seen, measured, 0.0)) / sigma, 0.0)

    own = float(np.linalg.norm(off(tried[0][1]))) if tried else np.nan
    fits = []
    for name, value in tried[1:]:
        left = off(value)
        if np.all(np.isfinite(left)) and left.max() <= WITHIN and np.linalg.norm(left) <= BETTER * own:
            fits.append((float(np.linalg.norm(left)), name, value))
    fits.sort(key=lambda found: found[0])
    best = np.exp(fits[0][2]) * 1e3 if fits else np.full(2, np.nan)
    return {
        "cause": fits[0][1] if fits else NONE,
        "cause_ttft_ms": float(best[0]),
        "cause_tpot_ms": float(best[1]),
        "others": "; ".join(name for _, name, _ in fits[1:]),
    }


__all__ = ["CAUSES", "NONE", "Cause", "explain"]
