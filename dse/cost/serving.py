"""From steps to what a user feels: TTFT and TPOT of a static batch and of a closed loop with continuous batching."""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.memory import Memory
from dse.cost.shard import Sharded
from dse.cost.step import Batch, Segment, Step, step
from dse.cost.types import Load, Number, pytree
from dse.numerics import safe_divide


@pytree
class Served:
    """Seconds, and the steps they are made of. `running`: requests a rank really runs (KV space admits them)."""

    ttft: Number
    tpot: Number
    queue: Number  # part of ttft spent waiting (first wave, prefill slot, admission)
    running: Number
    decode: Step
    mixed: Step
    prefill: Step


def accepted_tokens(draft: Number, acceptance: Number) -> Number:
    """Tokens a verification step yields: 1 + sum_{i<=n} p^i = (1 - p^(n+1)) / (1 - p); n + 1 at p = 1."""
    p = jnp.minimum(acceptance, 1.0 - 1e-6)
    return (1.0 - p ** (draft + 1.0)) / (1.0 - p)


def cycle(s: Sharded, t: Step, draft: Number, flights: Number) -> Number:
    """Seconds between two tokens of a request: once through the pipeline, or m stages where m micro-batches fill it.

    max(P t + (P-1) p2p + head + overhead, m (t + head)); drafting adds one layer and one head a drafted token.
    """
    body, head = t.body + draft * t.layer, (1.0 + draft) * t.head
    hop = s.boundary(t.tokens * s.boundary_bytes)
    return jnp.maximum(s.plan.pp * body + (s.plan.pp - 1.0) * hop + head + t.overhead, flights * (body + head))


def flow(s: Sharded, t: Step, steps: Number) -> Number:
    """Seconds for `steps` chunks to run through the pipeline: sum t_i + (P-1)(t + p2p)."""
    hop = s.boundary(t.tokens * s.boundary_bytes)
    return steps * t.total + (s.plan.pp - 1.0) * (t.body + hop)


def serve(s: Sharded, load: Load, memory: Memory) -> Served:
    """The closed loop of N requests in flight, or one static batch of N.

    Closed loop, per micro-batch of n requests: a request needs M = max(1, prompt/chunk) prefill steps and
    D = (osl-1)/accepted decode steps; the others bring (n-1) prompt/(D+M) prompt tokens a step, at most `chunk`.
    TPOT is the step-weighted mean of mixed and pure decode steps. TTFT = the own M mixed steps + half a running step +
    the wait for the prefill slot (M/D/1 up to saturation, then what the closed loop cannot hold in decode), mixed
    with the first wave of N prompts at once, (N+1)/2 prefills in the mean, by 1/waves. Requests that the KV space
    does not hold wait for a whole residence (Little's law). Ignored: variance of lengths, preemption.
    """
    plan, c = s.plan, s.c
    draft = 0.0 if load.draft_tokens is None else load.draft_tokens
    static = 0.0 if load.static_batch is None else load.static_batch
    closed = 1.0 - static
    asked = jnp.maximum(load.concurrency / plan.attention_dp, 1.0)
    # Where not even one request fits, the plan is refused, and priced as if memory sufficed: its engine, if it ran, had
    # other settings than ours, not a queue of one.
    running = jnp.where(memory.requests < 1.0, asked, jnp.minimum(memory.requests, asked))
    flights = jnp.minimum(jnp.where(plan.microbatches > 0, plan.microbatches, plan.pp), running)
    n = running / flights

    prompt = jnp.maximum(load.isl * (1.0 - load.prefix_hit), 1.0)
    start = load.isl - prompt
    chunks = jnp.maximum(prompt / load.chunk, 1.0)
    piece = prompt / chunks
    accepted = 1.0 if load.draft_tokens is None else accepted_tokens(draft, load.acceptance)
    decode_steps = jnp.maximum(load.osl - 1.0, 1e-3) / accepted
    others = jnp.maximum(n - 1.0, 0.0)
    arriving = closed * others * prompt / (decode_steps + chunks)
    mix = jnp.clip(arriving, piece, jnp.maximum(load.chunk, piece))
    busy = jnp.minimum(arriving / mix, 1.0)
    most = decode_steps * mix / prompt  # other requests that a saturated prefill can keep in decode
    share = jnp.where(static > 0, 1.0, decode_steps / (decode_steps + chunks))

    def decoding(requests: Number) -> Segment:
        return Segment(requests=requests, tokens=1.0 + draft, start=load.isl, span=load.osl)

    def prompts(tokens: Number) -> Segment:
        return Segment(requests=tokens / piece, tokens=piece, start=start, span=prompt)

    held = jnp.where(arriving > load.chunk, most + share, n * share)
    beside = jnp.minimum(held, others * share)
    wave = jnp.clip(running * prompt, piece, jnp.maximum(load.chunk, piece))
    decode = step(s, Batch(prefill=None, decode=decoding(held)), plan.overlap_decode)
    mixed = step(s, Batch(prefill=prompts(mix), decode=decoding(beside)), plan.overlap_prefill)
    prefill = step(s, Batch(prefill=prompts(wave), decode=None), plan.overlap_prefill)

    t_decode, t_mixed = cycle(s, decode, draft, flights), cycle(s, mixed, draft, flights)
    tpot = ((1.0 - busy) * t_decode + busy * t_mixed) / accepted

    own = flow(s, mixed, chunks)
    load_factor = jnp.minimum(arriving / load.chunk, 1.0)
    line = jnp.minimum(safe_divide(load_factor, 2.0 * (1.0 - load_factor), otherwise=1e9), 0.5 * others) * chunks
    kept = jnp.where(arriving > load.chunk, n - held, closed * n * chunks / (decode_steps + chunks))
    backlog = jnp.maximum(kept - mix / piece, 0.0) * prompt / mix
    waiting = jnp.maximum(line, backlog) * mixed.total + 0.5 * jnp.where(others > 0, decode.total, 0.0)
    share_of_prompts = jnp.where(static > 0, running, 0.5 * (running + 1.0))
    burst = flow(s, prefill, jnp.maximum(share_of_prompts * prompt / wave, 1.0))
    first = jnp.where(static > 0, 1.0, jnp.minimum(c.first_wave / load.waves, 1.0))
    served = first * burst + (1.0 - first) * (own + waiting)
    residence = served + jnp.maximum(load.osl - 1.0, 0.0) * tpot
    admission = (asked - running) / running * residence
    alone = first * flow(s, prefill, chunks) + (1.0 - first) * own
    return Served(
        ttft=c.arrival_overhead + served + admission,
        tpot=tpot,
        queue=jnp.maximum(served - alone, 0.0) + admission,
        running=running,
        decode=decode,
        mixed=mixed,
        prefill=prefill,
    )
