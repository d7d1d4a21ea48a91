"""A worker of either pool by itself: its steps, its memory."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from dse.cost.evaluate import Scenario
from dse.cost.memory import Memory, memory
from dse.cost.serving import accepted_of, cycle, flow
from dse.cost.shard import Sharded
from dse.cost.step import Batch, Segment, Step, step
from dse.cost.types import Load, Number, pytree
from dse.numerics import safe_divide


@pytree
class PrefillTimes:
    """Seconds on one attention-DP rank of a prefill worker."""

    idle: Number  # one prompt, the worker otherwise idle
    busy: Number  # one prompt while the other ranks compute one each
    more: Number  # a prompt more on every rank in the same steps
    longest: Number  # a prompt in full steps
    service: Number  # a prompt's share of full steps: 1 / (prompts/s of a rank)
    stage: Number  # share of `idle` in which the worker's first pipeline stage is taken
    chunks: Number  # steps of a prompt
    prompts: Number  # of a full step
    alone: Step
    full: Step


@pytree
class DecodeTimes:
    tpot: Number
    step: Step


def prefill_times(s: Sharded, load: Load) -> PrefillTimes:
    """A prompt through the prefill steps: ceil(prompt/chunk) of them alone, or its share of full ones.

    Where one rank of several has a prompt, experts see that rank's tokens only.
    """
    plan = s.plan
    prompt = jnp.maximum(load.isl * (1.0 - load.prefix_hit), 1.0)
    chunks = jnp.maximum(prompt / load.chunk, 1.0)
    piece = prompt / chunks
    full = jnp.maximum(load.chunk, piece)

    def price(tokens: Number, ranks: Number) -> Step:
        seg = Segment(requests=tokens / piece, tokens=piece, start=load.isl - prompt, span=prompt)
        return step(_with_ranks(s, ranks), Batch(prefill=seg, decode=None), plan.overlap_prefill)

    ranks = plan.attention_dp * jnp.ones_like(piece)
    steps = jax.vmap(price)(jnp.stack([piece, piece, full]), jnp.stack([jnp.ones_like(ranks), ranks, ranks]))
    alone, beside, filled = (jax.tree.map(lambda leaf, i=i: leaf[i], steps) for i in range(3))
    idle, busy = flow(s, alone, chunks), flow(s, beside, chunks)
    longest = jnp.where(full > piece, flow(s, filled, 1.0), busy)
    return PrefillTimes(
        idle=idle,
        busy=busy,
        more=safe_divide(longest - busy, full / piece - 1.0),
        longest=longest,
        service=filled.total * prompt / full,
        stage=chunks * alone.total / idle,
        chunks=chunks,
        prompts=full / prompt,
        alone=alone,
        full=filled,
    )


def decode_times(s: Sharded, load: Load, running: Number) -> DecodeTimes:
    """TPOT of a decode worker that holds `running` requests (below one a rank, some ranks hold none)."""
    plan = s.plan
    draft, accepted = load.drafted, accepted_of(load)
    a_rank = jnp.maximum(running / plan.attention_dp, 1.0)
    ranks = jnp.clip(running, 1.0, plan.attention_dp)
    flights = jnp.minimum(jnp.where(plan.microbatches > 0, plan.microbatches, plan.pp), a_rank)
    seg = Segment(requests=a_rank / flights, tokens=1.0 + draft, start=load.isl, span=load.osl)
    one = step(_with_ranks(s, ranks), Batch(prefill=None, decode=seg), plan.overlap_decode)
    return DecodeTimes(tpot=cycle(s, one, draft, flights) / accepted, step=one)


def _with_ranks(s: Sharded, ranks: Number) -> Sharded:
    """The same worker with tokens on `ranks` of its attention-DP ranks: a step counts the expert group's tokens so."""
    return replace(s, plan=replace(s.plan, attention_dp=ranks))


def prefill_memory(x: Scenario) -> Memory:
    """A prefill worker holds the prompts of one step a rank, and no answers; a draft model, for it has them too."""
    prompts = jnp.maximum(x.load.chunk / jnp.maximum(x.load.isl, 1.0), 1.0)
    load = replace(
        x.load,
        osl=jnp.ones_like(prompts),
        concurrency=prompts * x.plan.attention_dp,
        draft_tokens=None if x.plan.draft is None else x.plan.draft.present,
    )
    return memory(x.architecture, x.device, x.plan, load, x.coefficients)


def decode_memory(x: Scenario, running: Number) -> Memory:
    """A decode worker holds whole requests and computes no prompts."""
    load = replace(x.load, concurrency=running, chunk=jnp.zeros_like(running))
    return memory(x.architecture, x.device, x.plan, load, x.coefficients)


def decode_rate(running: Number, osl: Number, tpot: Number) -> Number:
    """Requests/s of a decode worker (Little): each stays for (osl - 1) TPOT."""
    return running / (jnp.maximum(osl - 1.0, 1e-3) * tpot)


def fuller(a: Memory, b: Memory) -> Memory:
    """The memory that is nearer to its limit."""
    nearer = a.total / a.usable > b.total / b.usable
    return jax.tree.map(lambda p, d: jnp.where(nearer, p, d), a, b)


__all__ = [
    "DecodeTimes",
    "PrefillTimes",
    "decode_memory",
    "decode_rate",
    "decode_times",
    "fuller",
    "prefill_memory",
    "prefill_times",
]
