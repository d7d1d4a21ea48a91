"""One scenario -> Estimate, and the only place where the model is batched and compiled."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax.numpy as jnp

from dse.cost.coefficients import Coefficients
from dse.cost.goodput import Arrivals, Demand, OpenLoop, goodput, open_loop
from dse.cost.iterations import resident
from dse.cost.memory import Memory, memory
from dse.cost.serving import Served, serve
from dse.cost.shard import shard_scenario, speculating
from dse.cost.types import Architecture, Device, Load, Number, Plan, Topology, pytree, replace
from dse.numerics import safe_divide
from dse.programs import by_size
from dse.units import HOUR


@pytree
class Scenario:
    """Everything one estimate depends on."""

    architecture: Architecture
    device: Device
    topology: Topology
    plan: Plan
    load: Load
    coefficients: Coefficients


@pytree
class Estimate:
    """What a deployment delivers. SI units; rates are of one GPU unless said."""

    ttft: Number
    tpot: Number
    e2e: Number
    output_rate: Number  # output tokens/s a GPU
    total_rate: Number  # input and output tokens/s a GPU
    user_rate: Number  # tokens/s a user
    request_rate: Number  # requests/s, whole deployment
    gpus: Number  # whole deployment
    usd_per_mtok: Number  # USD a million output tokens
    joules_per_token: Number
    memory: Memory
    served: Served


@pytree
class OpenEstimate(Estimate):
    """An estimate and the same deployment under open load; memory is that of the requests then found in it."""

    open: OpenLoop  # of one replica: at the rate given, else at the goodput
    goodput: Number | None = None  # requests/s a GPU; None where not asked


def gpus_of_replica(plan: Plan) -> Number:
    return plan.tp * plan.attention_dp * plan.cp * plan.pp


def estimate_one(x: Scenario) -> Estimate:
    """Price one scenario. Throughput is concurrency * osl / (ttft + (osl-1) tpot), as every closed-loop benchmark's."""
    sharded = shard_scenario(x)
    return estimate_sharded(x, sharded)


def estimate_sharded(x: Scenario, sharded: Any) -> Estimate:
    """The rest of `estimate_one`, once the plan's own numbers are known: what a sweep repeats for every load."""
    plan = speculating(x.plan, x.load)
    fits = memory(x.architecture, x.device, plan, x.load, x.coefficients)
    served = serve(speculated(sharded, x.load), x.load, fits)
    load, gpus = x.load, gpus_of_replica(x.plan)
    e2e = served.ttft + jnp.maximum(load.osl - 1.0, 0.0) * served.tpot
    requests = load.concurrency / e2e  # a replica
    output_rate = requests * load.osl / gpus
    return Estimate(
        ttft=served.ttft,
        tpot=served.tpot,
        e2e=e2e,
        output_rate=output_rate,
        total_rate=requests * (load.osl + load.isl) / gpus,
        user_rate=safe_divide(1.0, served.tpot),
        request_rate=requests * x.plan.replicas,
        gpus=gpus * x.plan.replicas,
        usd_per_mtok=safe_divide(x.device.price / HOUR * 1e6, output_rate),
        joules_per_token=safe_divide(x.device.power, output_rate),
        memory=fits,
        served=served,
    )


def speculated(sharded: Any, load: Load) -> Any:
    """A sharded plan without its draft model's prompts where the load drafts nothing."""
    return sharded if sharded.draft is None else replace(sharded, plan=speculating(sharded.plan, load))


def estimate_open(x: Scenario, sharded: Any, demand: Demand, best: bool = True) -> OpenEstimate:
    """An estimate under open load as well. `best`: find the goodput, even where a rate is given."""
    load = resident(x.load, demand.lengths)
    held = memory(x.architecture, x.device, speculating(x.plan, x.load), load, x.coefficients)
    base, sharded = estimate_sharded(x, sharded), speculated(sharded, x.load)
    common = {**vars(base), "memory": held}
    if demand.rate is None or best:
        top = goodput(sharded, load, demand.lengths, held, demand.cv, demand.slo)
        common["goodput"] = top.rate / gpus_of_replica(x.plan)
        if demand.rate is None:
            return OpenEstimate(**common, open=top)
    arrivals = Arrivals(rate=demand.rate / x.plan.replicas, cv=demand.cv)
    return OpenEstimate(**common, open=open_loop(sharded, load, demand.lengths, held, arrivals, demand.slo))


@lru_cache(maxsize=1)
def _batched() -> Any:
    return by_size(estimate_one)


def estimate(scenarios: Scenario) -> Estimate:
    """Estimates of a batch: every leaf has one leading axis of the same length N, and so has the result's."""
    return _batched()(scenarios)
