"""The aggregated LLM stage of a pipeline: one replica of it under open load, as `dse goodput` prices it.

Calls come as a Poisson stream. In a loop the first turn's TTFT is what users see, though all turns' calls queue
together: its own prompts meet the others' queue.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dse.cost.evaluate import Scenario
from dse.cost.goodput import Arrivals, Slo, attainment, open_loop
from dse.cost.iterations import replica, resident
from dse.cost.lengths import Lengths
from dse.cost.memory import memory
from dse.cost.openloop import point
from dse.cost.pace import top
from dse.cost.queueing import quantile
from dse.cost.shard import shard_scenario
from dse.cost.types import Number, pytree, replace

ANY = 1e6  # seconds: a target that every request meets
SHARES = (0.5, 0.9, 0.99)


@pytree
class Aggregated:
    """A replica at a rate. Seconds, calls/s; finite also where it is not stable."""

    capacity: Number
    stable: Number
    wait: Number  # part of the mean TTFT that others cause
    ttft: Number  # mean over all calls
    first: Number  # over those of the first turn, and its percentiles
    first_p50: Number
    first_p90: Number
    first_p99: Number
    tpot: Number
    tpot_p90: Number
    tpot_p99: Number


def aggregated(x: Scenario, lengths: Lengths, first: Number | None, rate: Number) -> Aggregated:
    """`rate` calls/s to the replica. `first` (n,): weights of the first turn's calls over the nodes of `lengths`; None
    where there is no other turn."""
    s = shard_scenario(x)
    load = resident(x.load, lengths)
    held = memory(x.architecture, x.device, x.plan, load, x.coefficients)
    found = open_loop(s, load, lengths, held, Arrivals(rate=rate), Slo(ttft=ANY, tpot=ANY))
    mean, shares = found.ttft, (found.ttft_p50, found.ttft_p90, found.ttft_p99)
    if first is not None:
        order = jnp.argsort(lengths.isl - lengths.cached)  # the order of a replica's nodes
        r = replica(s, load, lengths, held, 1.0)
        p = point(r, found.running / r.mean(r.steps), top(r))
        own = replace(r, weight=jnp.asarray(first)[order])
        late = 10.0 * (found.ttft_p99 + jnp.max(p.base))

        def by(share: Number) -> Number:
            return quantile(lambda t: 1.0 - attainment(own, p, Slo(ttft=t, tpot=ANY)), share, late)

        mean, shares = mean + own.mean(p.base) - r.mean(p.base), tuple(jax.vmap(by)(jnp.array(SHARES)))
    return Aggregated(
        capacity=found.capacity,
        stable=found.stable,
        wait=found.wait,
        ttft=found.ttft,
        first=mean,
        first_p50=shares[0],
        first_p90=shares[1],
        first_p99=shares[2],
        tpot=found.tpot,
        tpot_p90=found.tpot_p90,
        tpot_p99=found.tpot_p99,
    )


__all__ = ["Aggregated", "aggregated"]
