"""Logs of engine steps as a source of the fit: the time between consecutive steps against one step of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from dse.calibrate.observations import labels_of
from dse.calibrate.parameters import apply
from dse.calibrate.sources import Refusal, Source, compiled, row_weight
from dse.catalog.coefficients import CoefficientSet
from dse.cost.coefficients import Coefficients
from dse.errors import InputError
from dse.programs import program
from dse.space.steps import EngineStep, StepCase, parse_steps, step_seconds, steps_of
from dse.units import US

MEASURED = "cycle_us"
# `step_duration_us` is the scheduler's own span, below the weight-read floor; only the cycle is the step's time.
SCALE = 0.03  # log residual that a good model leaves: what neighbouring steps and the host's noise add
# A log is one deployment, however many steps it holds: it counts as this many rows beside hundreds of serving runs.
MOST_STEPS = 100.0
FULL = 0.95  # share of the KV cache beyond which steps wait for memory and preempt


def read_steps(table: pd.DataFrame, rest: CoefficientSet | None = None) -> Source:
    """Rows of a step log with `cycle_us`: the time from this step's start to the next one's.

    Refused with a reason: rows that cannot be priced (empty steps among them), without a cycle, faster than the
    hardware can be (engines that schedule ahead log a neighbour's time), exact duplicates, and steps short of memory
    (KV use beyond 95%, preemption): those serve queueing, not the step.
    """
    if MEASURED not in table.columns:
        raise InputError(f"step observations: column {MEASURED} missing")
    measured = pd.to_numeric(table[MEASURED], errors="coerce").to_numpy(float)
    duplicate = table.duplicated().to_numpy()
    usage, preempted = (_numbers(table, name) for name in ("kv_usage_gpu_ratio", "batch_num_preempted"))
    parsed = parse_steps(table)
    floor = _floors(parsed)
    refused, keep, cases = [], [], []
    for i, row in enumerate(parsed):
        reason = ""
        if isinstance(row, str):
            reason = row
        elif not 0 < measured[i] < np.inf:
            reason = f"{MEASURED} = {measured[i]:g}: not a positive number"
        elif measured[i] * US < floor[i]:
            reason = (
                f"{MEASURED} = {measured[i]:.0f}: the hardware needs {floor[i] / US:.0f} us at least for this batch; "
                "the time of another step"
            )
        elif usage[i] > FULL or preempted[i] > 0:
            reason = "short of memory (KV use beyond 95% or a preemption)"
        elif duplicate[i]:
            reason = "the same row again"
        if reason:
            refused.append(Refusal(i, reason, "steps"))
        elif isinstance(row, StepCase):
            keep.append(i)
            cases.append(row)
    if not cases:
        raise InputError("step observations: no row can serve the fit; " + (refused[0].reason if refused else "empty"))
    with jax.enable_x64(True):
        steps = steps_of(cases, rest or CoefficientSet("physics"))
    return Source(
        name="steps",
        frame=table.iloc[keep].reset_index(drop=True),
        labels=labels_of([c.case.keys for c in cases]),
        metrics=("cycle",),
        measured=np.log(measured[keep] * US)[:, None],
        scale=np.array([SCALE]),
        weight=row_weight(len(cases), MOST_STEPS),
        refused=tuple(refused),
        **compiled(_log_cycle, steps),
    )


def _floors(parsed: Sequence[StepCase | str]) -> np.ndarray:
    """Seconds below which no hardware does a row's batch: full peaks, nothing else. 0 where a row is no step."""
    result = np.zeros(len(parsed))
    valid = [i for i, row in enumerate(parsed) if isinstance(row, StepCase)]
    if valid:
        with jax.enable_x64(True):
            steps = steps_of([row for row in parsed if isinstance(row, StepCase)], CoefficientSet("physics"))
            ideal = jax.tree.map(lambda leaf: np.full(len(valid), float(leaf)), Coefficients.ideal())
            result[valid] = np.asarray(_seconds(replace(steps, coefficients=ideal)))
    return result


_seconds = program(step_seconds, in_axes=0)


def _numbers(table: pd.DataFrame, name: str) -> np.ndarray:
    if name not in table:
        return np.zeros(len(table))
    return pd.to_numeric(table[name], errors="coerce").fillna(0.0).to_numpy(float)


def _log_cycle(logs: Any, x: EngineStep) -> Any:
    return jnp.log(step_seconds(replace(x, coefficients=apply(logs, x.coefficients))))[None]


__all__ = ["read_steps"]
