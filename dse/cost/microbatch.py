"""Micro-batches of whole prompts through a pipeline: what uneven lengths cost, and what balancing them gives back.

After DistTrain (equal-length micro-batching). m micro-batches, t_j seconds on each of P stages, one behind the other:
the last leaves after sum t_j + (P-1) max t_j, so that the longest sets the bubble. Balanced ones are dealt longest
prompt first, each to the shortest micro-batch so far (Graham's LPT: at most 4/3 - 1/(3m) of the best maximum).
Engines that cut prompts into chunks of a token budget (continuous batching as `batching` and `openloop` have it) make
equal micro-batches anyway; this is for prompts that go whole, as in encoders and prefill instances without chunks
(`slowdown` in the stages of a pipeline of models).
Ignored: that attention makes a micro-batch's time more than the sum of its tokens, unless `work` says so.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from dse.cost.types import Number, pytree
from dse.numerics import safe_divide

ROUNDS = 0.45  # deviations of a round's mean by which the larger of two overlapping ones exceeds it


@pytree
class Dealt:
    """Seconds of work, in order of arrival and balanced, until the last micro-batch leaves the pipeline."""

    in_order: Number
    balanced: Number

    @property
    def gain(self) -> Number:
        """Share of the time that balancing saves."""
        return 1.0 - safe_divide(self.balanced, self.in_order, otherwise=1.0)


def through(work: Number, stages: Number) -> Number:
    """sum t + (P-1) max t; `work` (..., m) of each micro-batch on one stage."""
    return jnp.sum(work, -1) + (stages - 1.0) * jnp.max(work, -1)


def in_turn(work: Number, batches: int) -> Number:
    """(m,) work of micro-batches to which prompts (n,) are dealt in order of arrival, one each in turn."""
    return jnp.zeros(batches).at[jnp.arange(len(work)) % batches].add(work)


def longest_first(work: Number, batches: int) -> Number:
    """(m,) work of micro-batches balanced by LPT."""

    def deal(loads: Number, own: Number) -> tuple[Number, None]:
        return loads.at[jnp.argmin(loads)].add(own), None

    return jax.lax.scan(deal, jnp.zeros(batches), -jnp.sort(-jnp.asarray(work, jnp.result_type(float))))[0]


def dealt(work: Number, batches: int, stages: Number) -> Dealt:
    """Prompts of work (n,) seconds a stage in `batches` micro-batches."""
    ways = in_turn(work, batches), longest_first(work, batches)
    return Dealt(in_order=through(ways[0], stages), balanced=through(ways[1], stages))


def expected(work: Number, weight: Number, prompts: Number, batches: Number, stages: Number) -> Dealt:
    """In the mean over batches of `prompts` prompts a micro-batch, of a distribution (nodes (n,), weights).

    Smooth in all of them. In order: micro-batches of mean k E[t] and variance k Var[t], the largest of m about c_m
    standard deviations above, c_m = F^-1((m - 1/3)/(m + 1/3)) (Tukey); at most all prompts in one. Balanced: the mean,
    or the longest prompt where that is more, E[max of km] = sum t (G^km - G_-^km). Within 3% where k is 4 or
    more, 6% where it is 2 (lognormal work of variation 0.5).
    """
    mean, _, uneven, even = _largest(work, weight, prompts, batches)
    total = prompts * batches * mean
    return Dealt(
        in_order=total + (stages - 1.0) * jnp.minimum(uneven, total),
        balanced=total + (stages - 1.0) * jnp.minimum(even, total),
    )


def _largest(work: Number, weight: Number, prompts: Number, batches: Number) -> tuple[Number, ...]:
    """Of a prompt: mean and standard deviation; of the largest of the micro-batches: in order, and balanced."""
    order = jnp.argsort(work)
    work, weight = work[order], weight[order]
    mean = jnp.sum(weight * work)
    spread = jnp.sqrt(jnp.maximum(jnp.sum(weight * work**2) - mean**2, 1e-30))
    above = ndtri((batches - 1.0 / 3.0) / (batches + 1.0 / 3.0))
    whole = jnp.clip(jnp.cumsum(weight), 1e-12, 1.0) ** (prompts * batches)
    longest = jnp.sum(work * jnp.diff(whole, prepend=0.0))
    uneven = jnp.maximum(prompts * mean + above * spread * jnp.sqrt(prompts), longest)
    return mean, spread, uneven, jnp.maximum(prompts * mean, longest)


def slowdown(work: Number, weight: Number, prompts: Number, stages: Number, balanced: Number) -> Number:
    """Time of a micro-batch in a saturated pipeline over its own mean: 1 where prompts are alike, or of one stage.

    Engines keep as many micro-batches in flight as there are stages (vLLM's max_concurrent_batches, TensorRT-LLM's
    num_micro_batches, SGLang's pp_loop_size), so that all of them wait for the longest: E[max]/mean of P in order of
    arrival. Balanced (1), each round of P is dealt anew; rounds differ, and of two that overlap the larger counts,
    E[max] of two up to .56 deviations of a round's mean. Within 10% of a simulation up to a variation of 0.7 (lognormal
    work), 20% at 1.2.
    """
    mean, spread, uneven, even = _largest(work, weight, prompts, stages)
    rounds = ROUNDS * spread * jnp.sqrt(prompts / stages)
    longest = jnp.where(balanced > 0, jnp.minimum(even + rounds, uneven), uneven)
    total = prompts * stages * mean
    return jnp.where(stages > 1, safe_divide(jnp.minimum(longest, total), prompts * mean, otherwise=1.0), 1.0)


__all__ = ["Dealt", "dealt", "expected", "in_turn", "longest_first", "slowdown", "through"]
