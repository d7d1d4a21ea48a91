"""Continuous batching of one replica, one iteration at a time: admission, prefill of a chunk, decode, what finishes.

A replica has K attention-DP ranks that take requests round robin, each first in, first out, and step together: an
iteration lasts as long as its slowest rank. FIFO makes most of a rank's state counters into the trace (requests
admitted, prompt tokens prefilled); only requests in decode need a slot, which holds the rank's decode count at which
they finish. Where nothing is being prefilled, all decode steps up to the next arrival or finish are one iteration: the
context grows by the same amount each step, so the step's time is a straight line in between, summed exactly.
Ignored: preemption (KV space is reserved at admission, as `memory` counts it), sharing of prefixes in memory, the
spread of contexts within a batch (a step is priced at their mean).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dse.cost.serving import accepted_of, cycle
from dse.cost.shard import Sharded
from dse.cost.step import Batch, Segment, Step, step
from dse.cost.types import Load, Number, pytree, replace
from dse.numerics import safe_divide

POLICIES = ("prefill", "mixed", "decode")
"""prefill: steps of prompts alone go before decode (vLLM without chunked prefill, SGLang); mixed: decode first, what is
left of the step's token budget to prompts (vLLM V1, Sarathi); decode: prompts only where nothing decodes."""
PREFILL, MIXED, DECODE = range(len(POLICIES))
NEVER = 2**30  # decode count of an empty slot


@pytree
class Queue:
    """Requests in order of arrival, dealt to K ranks; cumulative tables have one entry more than requests."""

    count: Number  # [K]
    arrival: Number  # [K, R] seconds, infinite past the last; unread in a closed loop
    isl: Number  # [K, R]
    osl: Number  # [K, R]
    prompt: Number  # [K, R] tokens to compute: isl less the prefix found in the cache
    tokens: Number  # [K, R + 1] cumulative prompt
    context: Number  # [K, R + 1] cumulative isl
    pairs: Number  # [K, R + 1] cumulative (query, key) pairs: prompt * (isl - prompt / 2)


@pytree
class Engine:
    """One plan and how it schedules."""

    sharded: Sharded
    load: Load  # its chunk, draft_tokens, acceptance
    policy: Number  # index of POLICIES
    seats: Number  # most requests running on a rank
    clients: Number  # closed loop: requests in flight; 0: open loop
    capacity: Number  # KV bytes of a rank
    kv: Number  # [K, R] KV bytes set aside for each request
    reserved: Number  # [K, R + 1] cumulative


@pytree
class State:
    """Where a replica stands between two iterations. Counts are of requests of a rank, in order."""

    time: Number
    position: Number  # [K] prompt tokens prefilled, along the cumulative table
    prefilled: Number  # [K]
    admitted: Number  # [K]
    finished: Number  # [K]
    steps: Number  # [K] decode steps done
    context: Number  # [K] tokens in the contexts of requests in decode
    freed: Number  # [K] KV bytes given back
    due: Number  # [K, S] decode count at which the slot's request finishes; NEVER: free
    length: Number  # [K, S] its context then
    held: Number  # [K, S] KV bytes set aside for it


@pytree
class Record:
    """What one iteration leaves behind; times are those of its end."""

    time: Number
    prefilled: Number  # [K]
    admitted: Number  # [K]
    finished: Number  # [K]
    steps: Number  # [K]
    arrived: Number  # requests, all ranks, when it began
    kv_share: Number  # of the fullest rank's KV space set aside
    prompt_tokens: Number  # computed in it, all ranks
    decode_tokens: Number


@pytree
class Work:
    """What a rank does in one step."""

    tokens: Number  # prompt tokens
    requests: Number  # prompts they are of
    start: Number  # mean position of their first token: such that the (query, key) pairs are exact
    decoding: Number
    context: Number  # mean, of requests in decode


def initial(ranks: int, slots: int) -> State:
    """An idle replica."""
    counts, sums = jnp.zeros(ranks, jnp.int32), jnp.zeros(ranks)
    return State(
        time=jnp.zeros(()),
        position=sums,
        prefilled=counts,
        admitted=counts,
        finished=counts,
        steps=counts,
        context=sums,
        freed=sums,
        due=jnp.full((ranks, slots), NEVER, jnp.int32),
        length=jnp.zeros((ranks, slots)),
        held=jnp.zeros((ranks, slots)),
    )


def _reached(table: Number, value: Number) -> Number:
    """[K]: how many entries of each rank's sorted row are at or below its value."""
    find = jax.vmap(lambda row, x: jnp.searchsorted(row, x, side="right", method="scan_unrolled"))
    return find(table, value).astype(jnp.int32)


def _whole(q: Queue, position: Number) -> Number:
    """[K] prompts that end at or before a position of the cumulative table."""
    return jnp.minimum(_reached(q.tokens, position) - 1, q.count)


def _at(table: Number, index: Number) -> Number:
    """[K] or [K, S]: entries of each rank's row."""
    return jax.vmap(lambda row, i: row[i])(table, jnp.minimum(index, table.shape[-1] - 1))


def _arrived(e: Engine, q: Queue, s: State) -> Number:
    """[K] requests in the queue so far; in a closed loop each finish brings the next."""
    ranks = q.count.shape[0]
    sent = e.clients + jnp.sum(s.finished)
    dealt = (sent - jnp.arange(ranks) + ranks - 1) // ranks
    open_loop = _reached(q.arrival, jnp.broadcast_to(s.time, (ranks,)))
    return jnp.minimum(jnp.where(e.clients > 0, dealt, open_loop), q.count).astype(jnp.int32)


def _work(e: Engine, q: Queue, s: State, admitted: Number, flights: Number) -> Work:
    """[K]: the prompt tokens that the policy lets into this step, and the requests in decode beside them."""
    decoding = s.prefilled - s.finished
    budget = flights * e.load.chunk
    left = jnp.maximum(budget - decoding * (1.0 + e.load.drafted), 0.0)
    budget = jnp.where(e.policy == PREFILL, budget, left)
    budget = jnp.where((e.policy == DECODE) & (decoding > 0), 0.0, budget)
    tokens = jnp.minimum(_at(q.tokens, admitted) - s.position, budget)
    end = s.position + tokens
    last = _whole(q, end)
    requests = last + (end > _at(q.tokens, last)) - s.prefilled
    pairs = _pairs(q, end, last) - _pairs(q, s.position, s.prefilled)
    piece = safe_divide(tokens, requests)
    return Work(
        tokens=tokens,
        requests=jnp.where(tokens > 0, requests, 0),
        start=jnp.maximum(safe_divide(pairs, tokens) - 0.5 * piece, 0.0),
        decoding=jnp.where((e.policy == PREFILL) & (tokens > 0), 0, decoding),
        context=safe_divide(s.context, decoding),
    )


def _pairs(q: Queue, position: Number, request: Number) -> Number:
    """(query, key) pairs of all prompt tokens up to a position: those of whole requests, and of part of the next."""
    part = position - _at(q.tokens, request)
    cached = _at(q.isl, request) - _at(q.prompt, request)
    return _at(q.pairs, request) + part * (cached + 0.5 * part)


def decode_steps(osl: Number, load: Load) -> Number:
    """Steps from the first token to the last."""
    return jnp.ceil((osl - 1.0) / accepted_of(load) - 1e-9)


def _priced(s: Sharded, w: Work, draft: Number, chunks: Number, micro: Number) -> Step:
    """One micro-batch of the work, by the cost model's own step: one of `chunks` with prompts, `micro` with decode.

    Context parallelism pays fixed latencies for each part of a batch, present or not, so that such plans price
    steps of one part apart; elsewhere a part without requests costs nothing.
    """
    tokens = jnp.maximum(safe_divide(w.tokens, w.requests), 1.0)
    prompts = Segment(requests=w.requests / chunks, tokens=tokens, start=w.start, span=tokens)
    answers = Segment(requests=w.decoding / micro, tokens=1.0 + draft, start=w.context, span=1.0 + draft)
    plan = s.plan
    rule = jnp.where(w.tokens > 0, plan.overlap_prefill, plan.overlap_decode)
    both = step(s, Batch(prefill=prompts, decode=answers), rule)
    if plan.cp_method is None:
        return both
    prefill = step(s, Batch(prefill=prompts, decode=None), plan.overlap_prefill)
    decode = step(s, Batch(prefill=None, decode=answers), plan.overlap_decode)
    one = jax.tree.map(lambda p, d: jnp.where(w.tokens > 0, p, d), prefill, decode)
    alone = (w.tokens <= 0) | (w.decoding <= 0)
    return jax.tree.map(lambda b, o: jnp.where(alone, o, b), both, one)


def seconds(e: Engine, work: Work, drained: Number) -> Number:
    """Of one iteration: that of the slowest rank, whose experts meet the tokens of all ranks.

    The mean-field group of `step` (attention_dp times the rank's tokens) becomes the true one. A pipeline has up to
    `microbatches` (or pp) of them in flight: prompts fill as many as they have chunks, and where the last pending token
    is among them (`drained`), the chunks behind the first arrive a stage later each.
    """
    draft = e.load.drafted
    computed = work.tokens + work.decoding * (1.0 + draft)
    everyone = jnp.sum(computed)

    def of_rank(w: Work, own: Number, last: Number) -> Number:
        plan = replace(e.sharded.plan, attention_dp=safe_divide(everyone, own, otherwise=1.0))
        s = replace(e.sharded, plan=plan)
        most = flights_of(e.sharded)
        chunks = jnp.clip(jnp.ceil(w.tokens / e.load.chunk), 1.0, most)
        micro = jnp.clip(jnp.maximum(chunks, w.decoding), 1.0, most)
        t = _priced(s, w, draft, chunks, micro)
        fill = jnp.where(last & (plan.pp > 1), (chunks - 1.0) * t.body, 0.0)
        return jnp.where(own > 0, cycle(s, t, draft, micro) + fill, 0.0)

    return jnp.max(jax.vmap(of_rank)(work, computed, drained))


def flights_of(s: Sharded) -> Number:
    """Micro-batches in flight through the pipeline, at most."""
    return jnp.where(s.plan.microbatches > 0, s.plan.microbatches, s.plan.pp)


def _steps_within(gap: Number, first: Number, slope: Number) -> Number:
    """Least m with m first + slope m (m - 1) / 2 >= gap."""
    linear = first - 0.5 * slope
    root = jnp.sqrt(jnp.maximum(linear**2 + 2.0 * slope * gap, 0.0))
    return jnp.ceil(safe_divide(2.0 * gap, linear + root, otherwise=1.0) - 1e-9)


def _next_admissible(e: Engine, q: Queue, s: State, arrived: Number, admitted: Number) -> Number:
    """When the next request comes that could start at once; infinite where none can before a finish."""
    room = _at(e.reserved, admitted + 1) <= e.capacity + s.freed
    starts = (arrived == admitted) & (arrived < q.count) & room & (admitted - s.finished < e.seats)
    starts = starts & (e.clients <= 0) & ((e.policy != DECODE) | (s.prefilled == s.finished))
    return jnp.min(jnp.where(starts, _at(q.arrival, arrived), jnp.inf))


def advance(e: Engine, q: Queue, s: State) -> tuple[State, Record]:
    """One iteration: a step with prompts, or all decode steps up to the next event, or a wait for an arrival."""
    arrived = _arrived(e, q, s)
    fitting = jnp.minimum(_reached(e.reserved, e.capacity + s.freed) - 1, s.finished + e.seats.astype(jnp.int32))
    shut = (e.policy == DECODE) & (s.prefilled > s.finished)
    admitted = jnp.where(shut, s.admitted, jnp.maximum(s.admitted, jnp.minimum(arrived, fitting)))
    work = _work(e, q, s, admitted, flights_of(e.sharded))
    prefilling, busy = jnp.any(work.tokens > 0), jnp.any(work.tokens + work.decoding > 0)

    # how long: pure decode runs on to the first finish, or to the first arrival that may start
    ahead = jnp.where(work.decoding > 0, jnp.min(s.due, axis=-1) - s.steps, NEVER)
    most = jnp.where(prefilling, 1, jnp.maximum(jnp.min(ahead), 1)).astype(s.time.dtype)
    drained = s.position + work.tokens >= _at(q.tokens, admitted)
    grown = replace(work, context=work.context + accepted_of(e.load) * (most - 1.0))
    ends = jax.tree.map(lambda a, b: jnp.stack([a, b]), work, grown)
    first, last = jax.vmap(lambda w: seconds(e, w, drained))(ends)
    slope = safe_divide(last - first, most - 1.0)
    come = _next_admissible(e, q, s, arrived, admitted)
    gap = jnp.where(jnp.isfinite(come), jnp.maximum(come - s.time, 0.0), 0.0)
    m = jnp.where(jnp.isfinite(come), jnp.clip(_steps_within(gap, first, slope), 1.0, most), most)
    spent = m * first + 0.5 * slope * m * (m - 1.0)
    wake = jnp.min(jnp.where(arrived < q.count, _at(q.arrival, arrived), jnp.inf))
    idle = jnp.where(jnp.isfinite(wake), jnp.maximum(wake, s.time), s.time)
    time = jnp.where(busy, s.time + spent, idle)

    decoded = jnp.where(work.decoding > 0, m, 0.0)
    steps = s.steps + decoded.astype(jnp.int32)
    position = s.position + work.tokens
    prefilled = _whole(q, position)
    context = s.context + work.decoding * accepted_of(e.load) * decoded
    context = context + _at(q.context, prefilled) - _at(q.context, s.prefilled)

    # prompts that are done take free slots, in order
    free = s.due == NEVER
    rank = jnp.cumsum(free, axis=-1, dtype=jnp.int32) - 1
    request = s.prefilled[:, None] + rank
    taken = free & (request < prefilled[:, None])
    needed = decode_steps(_at(q.osl, request), e.load)
    due = jnp.where(taken, steps[:, None] + needed.astype(jnp.int32), s.due)
    length = jnp.where(taken, _at(q.isl, request) + accepted_of(e.load) * needed, s.length)
    held = jnp.where(taken, _at(e.kv, request), s.held)

    done = due <= steps[:, None]
    after = State(
        time=time,
        position=position,
        prefilled=prefilled,
        admitted=admitted,
        finished=s.finished + jnp.sum(done, axis=-1, dtype=jnp.int32),
        steps=steps,
        context=context - jnp.sum(jnp.where(done, length, 0.0), axis=-1),
        freed=s.freed + jnp.sum(jnp.where(done, held, 0.0), axis=-1),
        due=jnp.where(done, NEVER, due),
        length=length,
        held=held,
    )
    used = jnp.max(_at(e.reserved, admitted) - s.freed)
    record = Record(
        time=time,
        prefilled=prefilled,
        admitted=admitted,
        finished=after.finished,
        steps=steps,
        arrived=jnp.sum(arrived),
        kv_share=safe_divide(used, e.capacity),
        prompt_tokens=jnp.sum(work.tokens),
        decode_tokens=jnp.sum(work.decoding * decoded) * accepted_of(e.load),
    )
    return after, record
