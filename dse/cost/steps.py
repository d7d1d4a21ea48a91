"""The time of single engine steps, batched: what a step log measures."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax

from dse.cost.coefficients import Coefficients
from dse.cost.shard import shard
from dse.cost.step import Batch, step
from dse.cost.types import Architecture, Device, Number, Plan, Topology, pytree


@pytree
class StepScenario:
    """One step of one deployment."""

    architecture: Architecture
    device: Device
    topology: Topology
    plan: Plan
    batch: Batch
    coefficients: Coefficients


def step_seconds(x: StepScenario) -> Number:
    """Seconds of one step (one stage): overlap by the prefill rule where it carries a prompt."""
    sharded = shard(x.architecture, x.device, x.topology, x.plan, x.coefficients)
    rule = x.plan.overlap_decode if x.batch.prefill is None else x.plan.overlap_prefill
    return step(sharded, x.batch, rule).total


@lru_cache(maxsize=1)
def _batched() -> Any:
    return jax.jit(jax.vmap(step_seconds))


def steps(scenarios: StepScenario) -> Number:
    """Seconds of a batch of steps: every leaf has one leading axis."""
    return _batched()(scenarios)
