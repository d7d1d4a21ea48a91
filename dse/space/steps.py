"""Single engine steps, one a row of a step log: looked up, priced by the model, with a reason where that fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pandas as pd

from dse.catalog.coefficients import CoefficientSet, coefficient_set
from dse.cost.coefficients import Coefficients
from dse.cost.shard import shard_scenario
from dse.cost.step import Batch, Segment, step
from dse.cost.types import Architecture, Device, Number, Plan, Topology, pytree
from dse.errors import InputError
from dse.programs import program
from dse.space.cases import Case, parse_cases, scenarios_of
from dse.units import US

REQUIRED = ("model", "tp", "batch_num_prefill_reqs", "batch_num_decode_reqs", "batch_prefill_tokens", "kv_tokens_used")
# A step log names no engine: the format is vLLM's, and the logs at hand are of this version.
DEFAULTS = {"gpu": "h100", "engine": "vllm", "engine_version": "0.15.1"}


@pytree
class EngineStep:
    """Everything one step's time depends on."""

    architecture: Architecture
    device: Device
    topology: Topology
    plan: Plan
    coefficients: Coefficients
    batch: Batch


@dataclass(frozen=True)
class StepCase:
    """One valid row: its deployment, and the requests of its batch. `context`: mean tokens a running request holds."""

    case: Case
    prefill_requests: float
    prefill_tokens: float
    decode_requests: float
    context: float


def step_seconds(x: EngineStep) -> Number:
    """Time between this step and the next."""
    sharded = shard_scenario(x)
    return step(sharded, x.batch, x.plan.overlap_prefill).total


def parse_steps(table: pd.DataFrame) -> list[StepCase | str]:
    """Each row looked up, or why it cannot be priced. Raises InputError where required columns are missing."""
    missing = [name for name in REQUIRED if name not in table.columns]
    if missing:
        raise InputError(f"steps: columns {', '.join(missing)} missing (required: {', '.join(REQUIRED)})")
    deployments = parse_cases(_deployments(table))
    numbers = {name: _numbers(table, name) for name in _COUNTS}
    return [
        case if isinstance(case, str) else _case(case, {name: float(values[i]) for name, values in numbers.items()})
        for i, case in enumerate(deployments)
    ]


_COUNTS = (*REQUIRED[2:], "queue_running_depth")
_DEPLOYMENT = ("model", "tp", "cluster", "weights", "kv", "moe_tp", "moe_ep", "attention_dp")


def _deployments(table: pd.DataFrame) -> pd.DataFrame:
    """The rows as `parse_cases` reads them; lengths play no part in a step."""
    rows = table[[name for name in _DEPLOYMENT if name in table.columns]].assign(isl=1, osl=1)
    named = table["engine"].notna() if "engine" in table.columns else np.zeros(len(table), bool)
    for name, default in DEFAULTS.items():
        given = table[name] if name in table.columns else pd.Series(np.nan, index=table.index, dtype=object)
        # The version is only that of the engine it belongs to.
        other = named if name == "engine_version" else np.zeros(len(table), bool)
        rows[name] = given.where(given.notna() | other, default)
    return rows


def _numbers(table: pd.DataFrame, name: str) -> np.ndarray:
    """A column as floats; NaN where it is no number, 0 where the column is not there."""
    if name not in table.columns:
        return np.zeros(len(table))
    return pd.to_numeric(table[name], errors="coerce").to_numpy(float)


def _case(case: Case, row: dict[str, float]) -> StepCase | str:
    for name, value in row.items():
        if not 0 <= value <= 1e12:
            return f"{name}: {value:g} is not a number from 0 on"
    prefill, decode = row["batch_num_prefill_reqs"], row["batch_num_decode_reqs"]
    tokens = row["batch_prefill_tokens"]
    if prefill + decode <= 0:
        return "batch_num_prefill_reqs, batch_num_decode_reqs: both 0; an empty step has no time"
    if tokens < prefill or (prefill == 0 and tokens > 0):
        return f"batch_prefill_tokens: {tokens:g} of {prefill:g} requests; each has at least one"
    return StepCase(
        case=case,
        prefill_requests=prefill,
        prefill_tokens=tokens,
        decode_requests=decode,
        context=row["kv_tokens_used"] / max(row["queue_running_depth"], prefill + decode),
    )


def steps_of(cases: Sequence[StepCase], coefficients: CoefficientSet) -> EngineStep:
    """A batch: leaves (n,)."""
    scenarios = scenarios_of([c.case for c in cases], coefficients)
    prefill, tokens, decode, context = (
        np.array([getattr(c, name) for c in cases], float)
        for name in ("prefill_requests", "prefill_tokens", "decode_requests", "context")
    )
    each = tokens / np.maximum(prefill, 1.0)
    # Padding computes more rows but reads no more cache: more requests, each with less context.
    padded = decode + captured(tokens + decode) - (tokens + decode)
    held = context * decode / np.maximum(padded, 1.0)
    return EngineStep(
        architecture=scenarios.architecture,
        device=scenarios.device,
        topology=scenarios.topology,
        plan=scenarios.plan,
        coefficients=scenarios.coefficients,
        batch=Batch(
            prefill=Segment(
                requests=prefill,
                tokens=np.maximum(each, 1.0),
                start=np.maximum(context - each, 0.0),
                span=np.maximum(each, 1.0),
            ),
            decode=Segment(requests=padded, tokens=np.ones(len(cases)), start=held, span=np.ones(len(cases))),
        ),
    )


def captured(tokens: np.ndarray) -> np.ndarray:
    """Tokens that a step computes: engines run captured graphs of few sizes and pad a batch to the next one.

    vLLM's sizes: 1, 2, 4, multiples of 8 to 256, of 16 to 512 (`cudagraph_capture_sizes`); larger steps run unpadded.
    """
    sizes = np.concatenate([[0, 1, 2, 4], np.arange(8, 256, 8), np.arange(256, 513, 16)])
    place = np.minimum(np.searchsorted(sizes, tokens), len(sizes) - 1)
    return np.where(tokens <= sizes[-1], sizes[place], tokens)


@lru_cache(maxsize=1)
def _batched() -> Any:
    return program(step_seconds, in_axes=0)


def estimate_steps(table: pd.DataFrame, coefficients: CoefficientSet | None = None) -> pd.DataFrame:
    """The input columns, `predicted_us` and `reason` (empty where priced): one row in, one row out, same order.

    Read: model, tp, the batch's requests and tokens, kv_tokens_used; with defaults gpu (h100), engine (vllm 0.15.1),
    weights, kv, moe_tp, moe_ep, queue_running_depth. Never any time of the row.
    """
    parsed = parse_steps(table)
    valid = [i for i, row in enumerate(parsed) if isinstance(row, StepCase)]
    predicted = np.full(len(parsed), np.nan)
    if valid:
        cases = [row for row in parsed if isinstance(row, StepCase)]
        with jax.enable_x64(True):
            seconds = _batched()(steps_of(cases, coefficients or coefficient_set()))
        predicted[valid] = np.asarray(seconds) / US
    reason = ["" if isinstance(row, StepCase) else row for row in parsed]
    kept = table.drop(columns=[name for name in ("predicted_us", "reason") if name in table.columns])
    return kept.reset_index(drop=True).assign(predicted_us=predicted, reason=reason)


__all__ = ["EngineStep", "StepCase", "captured", "estimate_steps", "parse_steps", "step_seconds", "steps_of"]
