"""Replicas of hot experts (EPLB): how much fuller the busiest rank of an expert group is than the mean.

Expert loads follow a power law over the experts in order of load, l(x) = (1-a) x^-a on 0 < x <= 1 (mean 1). The
exponent is calibrated by `Coefficients.imbalance`, what the busiest rank has without replicas: the hottest of E
experts has l(1/E) = 1 + (I0 - 1) sqrt(E/ep), for the sum of E/ep experts drawn at random spreads as its square root.
R redundant slots go to the expert with the most load a replica, again and again. That cuts every load at a level
t = l(x_t): the hottest x_t E experts have ceil(l/t) replicas, about l/t + 1 - a each, hence
R/E = x_t (a/(1-a) + 1 - a); once all have (x_t = 1), t = 1/(R/E + a). The lightest slots have 1 - a, or t/2 where
experts of all loads are split. Packed fullest first, a rank's n = (E+R)/ep slots are the hottest and lightest ones:
I = max(1, (t + (n - 1) min(1-a, t/2)) ep/E), at most I0. Limits: R = 0: I0; many replicas: 1; ep = 1: 1.
Ignored: loads that drift from those the replicas were placed by, and the sampling noise of one step's few tokens.
Against greedy replication and packing of power-law loads: tests/test_eplb.py (the term 1 - a was chosen on these same
simulations). Domain: 64 experts or more; with few experts the sum is far from its integral. Under mild skew and several
slots a rank, a few more replicas may raise I by some percent, as they do in the simulation.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp

from dse.cost.types import Number, Plan, Routed
from dse.numerics import safe_divide

NEWTON_STEPS = 8


def exponent(hottest: Number, experts: Number) -> Number:
    """a of (1-a) E^a = hottest, in [0, 1 - 1/ln E): concave in a, so that Newton rises to the root from 0."""
    log_e, target = jnp.log(jnp.maximum(experts, 3.0)), jnp.log(jnp.maximum(hottest, 1.0))
    top = 1.0 - 1.0 / log_e
    target = jnp.minimum(target, 0.999 * (jnp.log1p(-top) + top * log_e))
    a = 0.0 * target
    for _ in range(NEWTON_STEPS):
        excess = jnp.log1p(-a) + a * log_e - target
        a = jnp.clip(a - excess / jnp.maximum(log_e - 1.0 / (1.0 - a), 1e-2), 0.0, top)
    return a


def balanced(without: Number, experts: Number, ep: Number, replicas: Number) -> Number:
    """The busiest rank's share over the mean with `replicas` redundant experts a layer; `without`: with none."""
    ranks = ep / jnp.maximum(experts, 1.0)
    a = exponent(1.0 + (without - 1.0) / jnp.sqrt(ranks), experts)
    share = safe_divide(replicas, experts)
    hot = jnp.maximum(share / (a / (1.0 - a) + 1.0 - a), 1.0 / jnp.maximum(experts, 1.0))
    level = jnp.where(hot < 1.0, (1.0 - a) * jnp.minimum(hot, 1.0) ** -a, safe_divide(1.0, share + a))
    slots = (1.0 + share) / ranks
    busiest = (level + (slots - 1.0) * jnp.minimum(1.0 - a, 0.5 * level)) * ranks
    busiest = jnp.maximum(busiest, 1.0)
    return jnp.where(replicas > 0, jnp.minimum(busiest, without), without)


def imbalance(measured: Number, routed: Routed, plan: Plan) -> Number:
    """What `plan`'s busiest rank has over the mean: `measured` without replicas in a large group, 1 in a group of 1."""
    without = 1.0 + (measured - 1.0) * (1.0 - 1.0 / plan.moe_ep)
    if plan.eplb_replicas is None:
        return without
    return balanced(without, routed.experts, plan.moe_ep, plan.eplb_replicas)


def with_replicas(routed: Routed, plan: Plan) -> Routed:
    """The experts that ranks hold, replicas included: their tokens are spread over E + R slots."""
    if plan.eplb_replicas is None:
        return routed
    present = jnp.where(routed.top_k > 0, plan.eplb_replicas, 0.0)
    return replace(routed, experts=routed.experts + present)


__all__ = ["balanced", "exponent", "imbalance", "with_replicas"]
