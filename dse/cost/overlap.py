"""How communication hides behind compute: one function, all rules as data (types.OVERLAPS)."""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.coefficients import Coefficients
from dse.cost.types import OVERLAPS, Number, pytree
from dse.numerics import pick

TWO_BATCH = float(OVERLAPS.index("two_batch"))


@pytree
class LayerTimes:
    """Seconds of the parts that a rule arranges: of one layer, or of several alike."""

    attention: Number  # mixers, with their projections
    shared: Number  # dense part or shared experts
    routed: Number  # expert GEMMs and router
    routed_down: Number  # the part of `routed` in the down projection
    reduce: Number  # tensor- and context-parallel collectives
    dispatch: Number
    combine: Number


def micro_batches(rule: Number) -> Number:
    """Into how many parts a step is cut: two_batch runs two halves against each other."""
    return jnp.where(rule == TWO_BATCH, 2.0, 1.0)


def overlapped(rule: Number, t: LayerTimes, c: Coefficients) -> Number:
    """Seconds from start to end under a rule. C = compute, K = communication.

    none C + K; partial C + (1-rho) K; full max(K, C + s K): kernels that communicate hold a share s of the compute
    rate, so C work lasts (C - K(1-s)) + K when K is the shorter; two_batch: the same on half batches (the step prices
    the halves, doubles, and adds the first fill); shared_expert (single batch): attention + max(shared, dispatch) +
    routed up + max(routed down, combine); shallowsim: C + max(0, K - (attention + shared)).
    """
    compute = t.attention + t.shared + t.routed
    communication = t.reduce + t.dispatch + t.combine
    full = jnp.maximum(communication, compute + c.sm_share * communication)
    single = (
        t.attention
        + t.reduce
        + jnp.maximum(t.shared, t.dispatch)
        + (t.routed - t.routed_down)
        + jnp.maximum(t.routed_down, t.combine)
    )
    return pick(
        rule,
        [
            compute + communication,
            compute + (1.0 - c.partial_overlap) * communication,
            full,
            full,
            single,
            compute + jnp.maximum(0.0, communication - (t.attention + t.shared)),
        ],
    )
