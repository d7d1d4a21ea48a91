"""From steps to what a user feels: TTFT and TPOT of a static batch and of a closed loop with continuous batching."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from dse.cost.memory import Memory
from dse.cost.shard import Sharded
from dse.cost.step import Batch, Segment, Step, step
from dse.cost.types import Load, Number, pytree
from dse.numerics import safe_divide, safe_sqrt


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


def accepted_of(load: Load) -> Number:
    """Tokens a step of a request under a load; 1 where it drafts none."""
    return 1.0 if load.draft_tokens is None else accepted_tokens(load.draft_tokens, load.acceptance)


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


def drawn(mean: Number) -> Number:
    """Mean of a Poisson count given that it is not 0: x/(1 - exp(-x)), 1 at x = 0."""
    large = jnp.maximum(mean, 1e-3)  # below, a series: the slope of the quotient is a difference of large numbers
    return jnp.where(mean > 1e-3, large / -jnp.expm1(-large), 1.0 + mean / 2.0 + mean**2 / 12.0)


def any_of(ranks: Number, chance: Number) -> Number:
    """1 - (1 - chance)^ranks: that at least one of some ranks ...; exact for small chances in float32."""
    sure = chance >= 1.0
    return jnp.where(sure, 1.0, -jnp.expm1(ranks * jnp.log1p(-jnp.where(sure, 0.0, chance))))


def steps_to_token(turns: Number, company: Number) -> Number:
    """Steps like its own that a first token takes: `turns` beside others, one where it meets no step of anyone's."""
    return 1.0 + (turns - 1.0) * company


def unseated(idle_seats: Number, company: Number) -> Number:
    """Clients of a rank that find no seat, whatever its memory: none where a client is alone."""
    return company * idle_seats


def larger_root(x: Number, q: Number) -> Number:
    """The larger L with L (L - x) = q, for q >= 0: (x + sqrt(x^2 + 4 q))/2, without its cancellation for x < 0."""
    root = jnp.abs(x) + safe_sqrt(x * x + 4.0 * q)
    return jnp.where(x > 0, 0.5 * root, safe_divide(2.0 * q, root))


@pytree
class Loop:
    """The closed loop of one micro-batch, as counts: requests, tokens, steps."""

    draft: Number
    accepted: Number  # tokens a step
    asked: Number  # requests a rank should run, ...
    running: Number  # ... and does, as far as the KV space holds them
    flights: Number  # micro-batches in the pipeline
    n: Number  # requests of a micro-batch
    others: Number
    first: Number  # share of the requests that count as the first wave, whose prompts come all at once
    alive: Number  # mean share of n while the last requests drain
    prompt: Number  # tokens computed of one prompt, ...
    piece: Number  # ... in pieces of
    chunks: Number
    decode_steps: Number  # of a request
    share: Number  # of a request's steps that decode
    arriving: Number  # prompt tokens of others a step
    elsewhere: Number  # prompt tokens a step on each other attention-DP rank: those of all its requests
    budget: Number  # prompt tokens a step can take beside decode


def closed_loop(s: Sharded, load: Load, memory: Memory) -> Loop:
    """Requests and tokens that meet in the steps of a load."""
    plan = s.plan
    draft, accepted = load.drafted, accepted_of(load)
    static = 0.0 if load.static_batch is None else load.static_batch
    asked = jnp.maximum(load.concurrency / plan.attention_dp, 1.0)
    # Where not even one request fits, the plan is refused, and priced as if memory sufficed: its engine, if it ran, had
    # other settings than ours, not a queue of one.
    running = jnp.where(memory.requests < 1.0, asked, jnp.minimum(memory.requests, asked))
    flights = jnp.minimum(jnp.where(plan.microbatches > 0, plan.microbatches, plan.pp), running)
    n = running / flights
    others = jnp.maximum(n - 1.0, 0.0)
    waves = load.waves * asked / running
    prompt = jnp.maximum(load.isl * (1.0 - load.prefix_hit), 1.0)
    chunks = jnp.maximum(prompt / load.chunk, 1.0)
    decode_steps = jnp.maximum(load.osl - 1.0, 1e-3) / accepted
    share = jnp.where(static > 0, 1.0, decode_steps / (decode_steps + chunks))
    # A finite run: its first wave sees only the prompts behind each one's own, its last requests decode in a batch that
    # drains
    first = jnp.where(static > 0, 1.0, jnp.minimum(s.c.first_wave / waves, 1.0))
    seen = (1.0 - static) * (1.0 - 0.5 * first)
    # Requests of each other attention-DP rank: none where there are fewer requests than ranks
    theirs = n * safe_divide(load.concurrency / asked - 1.0, plan.attention_dp - 1.0)
    # Decode tokens take their part of a step's budget; the second is what a saturated prefill leaves itself.
    verified = 1.0 + draft
    budget = jnp.maximum(load.chunk - verified * n * share, load.chunk / (1.0 + verified * decode_steps / prompt))
    return Loop(
        draft=draft,
        accepted=accepted,
        asked=asked,
        running=running,
        flights=flights,
        n=n,
        others=others,
        first=first,
        alive=1.0 - (1.0 - static) / (6.0 * waves),
        prompt=prompt,
        piece=prompt / chunks,
        chunks=chunks,
        decode_steps=decode_steps,
        share=share,
        arriving=seen * others * prompt / (decode_steps + chunks),
        elsewhere=seen * theirs * prompt / (decode_steps + chunks),
        budget=budget,
    )


LINE = 0.15  # unevenness of arrivals in a closed loop (Poisson: 1/2), from simulation
BESIDE = 2.0  # others' prompts that share the steps of an own prompt, over those that a mean step has


def serve(s: Sharded, load: Load, memory: Memory) -> Served:
    """The closed loop of N requests in flight, or one static batch of N.

    Per micro-batch of n requests: a request needs M = max(1, prompt/chunk) prefill steps and D = (osl-1)/accepted
    decode steps; the others bring (n-1) prompt/(D+M) prompt tokens a step, at most what the budget leaves them.
    Two policies, mixed by `prefill_priority`:
    - prompts share steps with decode: TPOT is the step-weighted mean of mixed and pure decode steps (ranks of attention
      DP step together: any rank's prompt slows all); TTFT = own steps with the prompts that share them + the line
      W = (x + sqrt(x^2 + 4 k (n-1) s^2))/2 steps, x = (n-1) s - D - M, s = steps of one prompt (exact for few requests
      and, by Little's law, for a saturated prefill) + half a mean step, which runs when a request comes back;
    - prompts go first, in steps of their own: each of the lam = (n-1)/D that come in a decode step stalls decode.
    The first wave of N prompts at once weighs 1/waves (all of a static batch); `cohort` of the later ones stays
    together as well. Requests that the KV space or the seats (`idle_seats`) do not hold wait for a whole residence
    (Little's law); engines that schedule ahead take `turns` steps to a first token. Checked
    against the step simulator (`simulate`): TTFT within 3% in the mean but for the half step, which its clients
    do not lose, TPOT within 1-3%. Ignored: variance of lengths, preemption.
    """
    plan, c = s.plan, s.c
    static = 0.0 if load.static_batch is None else load.static_batch
    q = closed_loop(s, load, memory)
    ranks = plan.attention_dp
    most = q.decode_steps * q.budget / q.prompt  # other requests that a saturated prefill can keep in decode
    held = jnp.minimum(q.alive * q.n * q.share, most + q.share)
    if c.prefill_priority is not None:
        held = held + c.prefill_priority * (q.alive * q.n - held)
    held = jnp.where(static > 0, q.n, held)
    beside = jnp.minimum(held, q.others * q.share)
    piece = jnp.minimum(q.piece, q.budget)
    mix = jnp.clip(q.arriving, piece, q.budget)
    busy = jnp.minimum(q.arriving / mix, 1.0)
    elsewhere = jnp.clip(q.elsewhere, piece, q.budget)
    busy_elsewhere = jnp.minimum(q.elsewhere / elsewhere, 1.0)
    any_busy = busy + (1.0 - busy) * any_of(ranks - 1.0, busy_elsewhere)
    wave = jnp.clip(q.running * q.prompt, q.piece, jnp.maximum(load.chunk, q.piece))

    def decoding(requests: Number) -> Segment:
        return Segment(requests=requests, tokens=1.0 + q.draft, start=load.isl, span=load.osl)

    def prompts(tokens: Number) -> Segment:
        start = load.isl - q.prompt
        return Segment(requests=tokens / q.piece, tokens=q.piece, start=start, span=q.prompt)

    decode = step(s, Batch(prefill=None, decode=decoding(held)), plan.overlap_decode)
    # Of the other ranks that meet a mixed step, some bring prompts of their own, all their decode tokens.
    many = safe_divide(busy + (ranks - 1.0) * busy_elsewhere, any_busy, otherwise=1.0)  # ranks with prompts
    with_prompts = safe_divide(many - 1.0, ranks - 1.0)
    verified = (1.0 + q.draft) * beside
    group = 1.0 + (ranks - 1.0) * (with_prompts * mix + verified) / (mix + verified)
    mixed = step(_among(s, group), Batch(prefill=prompts(mix), decode=decoding(beside)), plan.overlap_prefill)
    prefill = step(s, Batch(prefill=prompts(wave), decode=None), plan.overlap_prefill)
    t_decode, t_mixed = cycle(s, decode, q.draft, q.flights), cycle(s, mixed, q.draft, q.flights)
    token = prefill.total / wave  # seconds of one token more in a large step

    cycle_time = (1.0 - any_busy) * t_decode + any_busy * t_mixed
    # A prompt's own steps are wider than the mean mixed step: others that came with it share them
    wide = jnp.minimum(q.budget, piece + BESIDE * q.arriving)
    own_steps = jnp.maximum(q.chunks, q.prompt / wide)
    own = flow(s, mixed, own_steps) + own_steps * token * jnp.maximum(wide - mix, 0.0)
    steps_each = q.prompt / q.budget
    x = q.others * steps_each - q.decode_steps - q.chunks
    line = larger_root(x, LINE * q.others * steps_each**2)
    # A client that answers at the end of one step meets the next, whatever its length: no bias to long ones
    company = jnp.minimum(q.others, 1.0)
    late = 0.5 * cycle_time * company
    rest = steps_to_token(c.turns, company) * own + line * (t_mixed + token * (q.budget - mix)) + late

    # All prompts at once, one behind the other: the mean of the first and the last of them; a static batch ends as one
    waiting = q.running * q.prompt
    burst_steps = jnp.where(static > 0, waiting, 0.5 * (waiting + jnp.maximum(wave, q.prompt))) / wave
    burst = flow(s, prefill, jnp.maximum(burst_steps, 1.0))
    if c.prefill_priority is not None:
        paused, first_served = _prompts_first(s, load, q, prompts, held, t_decode, token)
        paused, first_served = t_decode + paused * (1.0 - 0.5 * c.cohort), first_served + late
        cycle_time = cycle_time + c.prefill_priority * (paused - cycle_time)
        rest = rest + c.prefill_priority * (first_served - rest)
    rest = rest + c.cohort * jnp.maximum(burst - rest, 0.0)  # a saturated prefill's line is longer than any burst
    tpot = cycle_time / q.accepted

    served = q.first * burst + (1.0 - q.first) * rest
    residence = served + jnp.maximum(load.osl - 1.0, 0.0) * tpot
    unserved = (q.asked - q.running) * (1.0 - (q.asked - q.running) / (2.0 * q.asked * load.waves))  # none at the end
    idle = (1.0 - static) * unseated(c.idle_seats, company)
    admission = (unserved + idle) / (q.running - idle) * residence
    alone = q.first * flow(s, prefill, q.chunks) + (1.0 - q.first) * own
    ttft, tpot = _as_sent(load, c.arrival_overhead + served + admission, tpot)
    return Served(
        ttft=ttft,
        tpot=tpot,
        queue=jnp.maximum(served - alone, 0.0) + admission,
        running=q.running,
        decode=decode,
        mixed=mixed,
        prefill=prefill,
    )


def _as_sent(load: Load, ttft: Number, tpot: Number) -> tuple[Number, Number]:
    """TTFT and TPOT as a client sees them whose engine sends k = `stream_interval` tokens at a time, the first k too:
    its first token comes with k - 1 more, its last one when it did before."""
    if load.stream_interval is None:
        return ttft, tpot
    held = jnp.minimum(load.stream_interval, load.osl) - 1.0
    return ttft + held * tpot, tpot * (1.0 - safe_divide(held, load.osl - 1.0))


def _among(s: Sharded, group: Number) -> Sharded:
    """The same stage in an expert group of `group` times this rank's tokens: what a step reads attention DP for."""
    return replace(s, plan=replace(s.plan, attention_dp=group))


def _prompts_first(
    s: Sharded, load: Load, q: Loop, prompts: Any, held: Number, t_decode: Number, token: Number
) -> tuple[Number, Number]:
    """(stall a decode step, seconds to a first token) where prompts get steps of their own, ahead of decode.

    An own prompt goes with k = 1 + 2 lam prompts: those of its step and of the cohort it came in. While another
    attention-DP rank runs prompts, a rank without any still decodes its `held` requests, in a step as long as theirs.
    """
    ranks, largest = s.plan.attention_dp, jnp.maximum(load.chunk, q.piece)

    def arrivals(tokens: Number) -> tuple[Number, Number]:
        """Prompts a decode step of a rank to which so many tokens a step come, and the tokens that go together."""
        lam = safe_divide(tokens * (q.decode_steps + q.chunks), q.prompt * q.decode_steps)
        return lam, jnp.clip(drawn(lam) * q.prompt, q.piece, largest)

    (lam, together), (theirs, elsewhere) = arrivals(q.arriving), arrivals(q.elsewhere)
    steps_theirs = theirs * q.prompt / elsewhere
    share = steps_theirs / (1.0 + steps_theirs)  # of another rank's steps that are prompts'
    met = share * elsewhere + (1.0 - share) * held * (1.0 + q.draft)
    group = 1.0 + (ranks - 1.0) * met / together
    alone = step(_among(s, group), Batch(prefill=prompts(together), decode=None), s.plan.overlap_prefill)
    t_alone = cycle(s, alone, q.draft, q.flights)
    stall = lam * q.prompt / together * t_alone + any_of(ranks - 1.0, share) * jnp.maximum(t_alone - t_decode, 0.0)
    tokens = (1.0 + 2.0 * lam) * q.prompt
    wide = jnp.clip(tokens, q.piece, largest)
    steps = jnp.maximum(q.chunks, 0.5 * (tokens + wide) / wide)
    return stall, flow(s, alone, steps) + steps * token * (wide - together)
