"""Tensor parallelism against pipeline stages in prefill: the speed-up K of TP from the model's own collectives.

DistServe takes K as given; here it is what the cost model's all-reduces, kernels and GEMM shapes leave of n GPUs.
"""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.evaluate import Scenario
from dse.cost.queueing import crossover
from dse.cost.shard import shard
from dse.cost.step import Batch, Segment, step
from dse.cost.types import Number, pytree, replace


@pytree
class IntraOp:
    """n GPUs used as tensor parallelism, against as many pipeline stages."""

    service: Number  # D: seconds of one prompt's prefill on one GPU
    speedup: Number  # K: D over the seconds on n GPUs
    load: Number  # R D below which tensor parallelism has the lower mean TTFT (`queueing.crossover`)
    rate: Number  # the same as requests/s


def prefill_seconds(x: Scenario, tp: Number) -> Number:
    """One prompt of `x.load.isl` tokens prefilled alone on `tp` GPUs, experts cut as everything else."""
    tp = jnp.asarray(tp, jnp.result_type(float))
    one = jnp.ones_like(tp)
    plan = replace(x.plan, tp=tp, moe_tp=tp, moe_ep=one, attention_dp=one, cp=one, pp=one)
    s = shard(x.architecture, x.device, x.topology, plan, x.coefficients)
    prompt = jnp.maximum(x.load.isl * (1.0 - x.load.prefix_hit), 1.0)
    seg = Segment(requests=one, tokens=prompt, start=x.load.isl - prompt, span=prompt)
    return step(s, Batch(prefill=seg, decode=None), plan.overlap_prefill).total


def against_stages(x: Scenario, gpus: Number) -> IntraOp:
    """K and the crossover of `gpus` GPUs. Ignored, as by DistServe: that one GPU may not hold the model, stages that
    are unequal, what passing activations on costs."""
    alone = prefill_seconds(x, 1.0)
    speedup = alone / prefill_seconds(x, gpus)
    load = crossover(speedup, gpus)
    return IntraOp(service=alone, speedup=speedup, load=load, rate=load / alone)


__all__ = ["IntraOp", "against_stages", "prefill_seconds"]
