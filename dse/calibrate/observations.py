"""Serving measurements as the fit sees them: closed-loop runs, priced by the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from dse.calibrate.parameters import apply
from dse.calibrate.sources import Refusal, Source, compiled
from dse.catalog.coefficients import LEVELS, CoefficientSet
from dse.cost.coefficients import Coefficients
from dse.cost.evaluate import Scenario, estimate, estimate_one
from dse.errors import InputError
from dse.space.cases import Case, parse_cases, scenarios_of

Array = np.ndarray
SERVING = ("measured_ttft_ms", "measured_tpot_ms")
# Residual scales (log): what a good model leaves. TTFT carries engine settings that nobody recorded.
TPOT_SCALE, TTFT_SCALE = 0.08, 0.2
# What makes two rows one series: re-measurements and other concurrencies of it stay in one fold.
SERIES = ("model", "gpu", "engine", "weights", "tp", "moe_ep", "isl", "osl")


def read_serving(
    table: pd.DataFrame, speculation: Sequence[str] = ("no", ""), rest: CoefficientSet | None = None
) -> Source:
    """Closed-loop serving: rows in estimate's columns with `measured_ttft_ms` and `measured_tpot_ms`.

    A row may have measured only one of the two. Refused with a reason: rows that cannot be priced, that measured
    nothing or what is no positive number, that may have speculated (their accepted length is not recorded), exact
    duplicates, and what the hardware cannot do: TPOT below half the time to read the weights once, or requests that end
    sooner than full data-sheet peaks could serve them (prompts found in a prefix cache, say). `rest`: the set whose
    values the coefficients that are not fitted keep (physics).
    """
    missing = [name for name in SERVING if name not in table.columns]
    if missing:
        raise InputError(f"serving observations: columns {', '.join(missing)} missing")
    parsed = parse_cases(table)
    measured = table[list(SERVING)].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    nothing = np.isnan(measured)
    usable = (nothing | ((measured > 0) & (measured < np.inf))).all(axis=1) & ~nothing.all(axis=1)
    duplicate = table.duplicated().to_numpy()
    least = fastest(parsed)
    ends = (measured[:, 0] + np.maximum(_numbers(table, "osl") - 1.0, 0.0) * measured[:, 1]) * 1e-3
    refused, keep, cases = [], [], []
    for i, case in enumerate(parsed):
        word = str(table["speculation"].iloc[i]).lower() if "speculation" in table else ""
        reason = ""
        if isinstance(case, str):
            reason = case
        elif not usable[i]:
            reason = f"measured TTFT, TPOT = {measured[i][0]:g}, {measured[i][1]:g} ms: not positive numbers"
        elif word not in speculation and word != "nan":
            reason = f"speculation: {word!r}; accepted tokens are not recorded"
        elif duplicate[i]:
            reason = "the same row again"
        elif measured[i][1] * 1e-3 < 0.5 * floor_seconds(case):
            reason = f"TPOT {measured[i][1]:g} ms is below half the time to read the weights once"
        elif ends[i] < least[i]:
            reason = "requests end sooner than at the data sheet's full peaks (a prefix cache? another model?)"
        if reason:
            refused.append(Refusal(i, reason, "serving"))
        elif isinstance(case, Case):
            keep.append(i)
            cases.append(case)
    if not cases:
        raise InputError(
            "serving observations: no row can serve the fit; " + (refused[0].reason if refused else "empty")
        )
    with jax.enable_x64(True):
        scenarios = scenarios_of(cases, rest or CoefficientSet("physics"))
    return Source(
        name="serving",
        frame=table.iloc[keep].reset_index(drop=True),
        labels=labels_of([c.keys for c in cases]) | {"model": [c.entry.name for c in cases]},
        metrics=("ttft", "tpot"),
        measured=np.log(measured[keep] * 1e-3),
        scale=np.array([TTFT_SCALE, TPOT_SCALE]),
        refused=tuple(refused),
        **compiled(log_ttft_tpot, scenarios),
    )


def log_ttft_tpot(logs: Any, scenario: Scenario) -> Any:
    """Log seconds (2,) of one scenario by the logs of the fitted coefficients (F,)."""
    result = estimate_one(replace(scenario, coefficients=apply(logs, scenario.coefficients)))
    return jnp.log(jnp.stack([result.ttft, result.tpot]))


def labels_of(keys: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Level -> key of each row."""
    return {level: [k[level] for k in keys] for level in LEVELS}


def _numbers(table: pd.DataFrame, name: str) -> Array:
    return pd.to_numeric(table[name], errors="coerce").to_numpy(float)


def fastest(parsed: Sequence[Any]) -> Array:
    """Seconds (n,) from arrival to the last token at full peaks, no overheads, unlimited memory; 0 where no case."""
    result = np.zeros(len(parsed))
    valid = [i for i, case in enumerate(parsed) if isinstance(case, Case)]
    if valid:
        with jax.enable_x64(True):
            x = scenarios_of([parsed[i] for i in valid], CoefficientSet("physics"))
            priority = x.coefficients.prefill_priority
            ideal = jax.tree.map(lambda leaf: np.full(len(valid), float(leaf)), Coefficients.ideal())
            device = replace(x.device, capacity=np.full(len(valid), 1e18))
            x = replace(x, device=device, coefficients=replace(ideal, prefill_priority=priority))
            result[valid] = np.asarray(estimate(x).e2e)
    return result


def floor_seconds(case: Case) -> float:
    """The time to stream one GPU's always-read weights (all but routed experts) at the data sheet's bandwidth."""
    from dse.catalog.hardware import to_device

    mixers = sum(m.count * sum(g.k * (g.n + g.n_kv) for g in m.gemms) for m in case.entry.mixers)
    size = mixers * case.precision.mixer_bytes
    return float(size / case.plan["tp"] / case.plan["pp"] / to_device(case.gpu).bandwidth)
