"""Open loop: the steady state of a replica to which requests come at a rate, whoever is being served.

One attention-DP rank is a queue. An iteration decodes n requests and carries up to B prompt tokens (the step's token
budget less what decode takes). Everything is a function of u, the requests that arrive in one iteration:
- Little's law: n = u * decode steps a request; u * prompt tokens a request are prefilled an iteration. So the mean
  iteration T(u) is explicit, and the rate is R = u / T(u), which rises with u: no fixed point has to be iterated.
  A request in decode sees itself and the n others (PASTA), so TPOT = T at n + 1.
- TTFT = rest of the running iteration + backlog + own iterations, shared with prompts that came in the same one.
  Backlog: a queue of service L T(B)/B a prompt of L tokens (P-K, or G/G/1 for bursts), times Kraemer and
  Langenbach-Belz's factor of regular services, because an iteration takes in all that fits: exp(-2(1-r)B/(3 L)).
- KV space and the engine's limit of running requests are K seats; where all are taken, requests wait for one.
Lengths enter as nodes (`lengths`), priced by the cost model's own `step`: once a plan, what a node's attention adds to
a prompt token and what the spread of contexts does to a decode step; at every u, the step at a few sizes of its prompt
part (`Curve`). Ignored: preemption, correlated bursts, and all but the slowest of attention-DP ranks.
Domain, against the step simulator (tests/test_openloop.py): one attention-DP rank, no pipeline, answers of 100 tokens
or more. Mean errors at 20, 50, 80% of the capacity: TTFT 1, 2, 3% (worst 3, 11, 10), its P90 4, 3, 5% (9, 19, 14),
TPOT 1, 1, 3% (4, 3, 9), its P90 2, 4, 6%; P99 of TTFT is 5-30% low. Bursts of coefficient of variation 2: TTFT 1-25%
low. Pipelines: 2-20% high. Attention DP beyond half the capacity: not to be trusted where lengths vary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dse.cost.lengths import Lengths
from dse.cost.memory import Memory
from dse.cost.queueing import Moments, Wait, companions, gg1, many_servers
from dse.cost.serving import accepted_tokens, cycle
from dse.cost.shard import Sharded
from dse.cost.step import Batch, Segment, step
from dse.cost.types import Load, Number, Plan, pytree, replace
from dse.numerics import ceil_ratio, safe_divide, safe_sqrt

KNOTS = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)  # of the token budget, where mixed steps are priced
AVERAGED = 0.74  # 2(e^-1 - 1 + 1): an answer averages over its own length the requests beside it


@pytree
class Replica:
    """What does not depend on the rate. Leaves (n,) are by node of the lengths."""

    sharded: Sharded
    chunk: Number
    draft: Number
    weight: Number  # (n,)
    prompt: Number  # (n,) tokens to prefill, ascending
    steps: Number  # (n,) decode iterations
    answer: Number  # (n,) output tokens after the first
    start: Number  # position at which requests found in decode began to, mean
    span: Number  # tokens they run over
    typical: Number  # prompt that the mean prompt token is of
    first: Number  # position of its first token
    extra: Number  # (n,) seconds that a prompt token of a node takes more than one of the typical prompt: attention
    ratio: Number  # decode iteration over the nodes' contexts, to that at the mean one (1 for full attention)
    seats: Number  # requests that may run on a rank
    ranks: Number
    arrival_scv: Number  # at one rank: requests are dealt round robin

    def mean(self, values: Number) -> Number:
        return jnp.sum(self.weight * values)


def resident(load: Load, lengths: Lengths) -> Load:
    """The load at the mean lengths of requests found in the engine: what memory must hold. (Long answers stay long.)"""
    share = lengths.weight * lengths.osl
    share = share / jnp.sum(share)
    return replace(
        load,
        isl=jnp.sum(share * lengths.isl),
        osl=jnp.sum(share * lengths.osl),
        prefix_hit=jnp.sum(lengths.weight * lengths.cached) / jnp.sum(lengths.weight * lengths.isl),
    )


def replica(s: Sharded, load: Load, lengths: Lengths, memory: Memory, cv: Number) -> Replica:
    """`load.concurrency`: requests that the engine runs at once at most; `memory`: at the load of `resident`."""
    draft = 0.0 if load.draft_tokens is None else load.draft_tokens
    accepted = 1.0 if load.draft_tokens is None else accepted_tokens(draft, load.acceptance)
    order = jnp.argsort(lengths.isl - lengths.cached)
    lengths = jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], lengths)
    prompt = jnp.maximum(lengths.isl - lengths.cached, 1.0)
    first = lengths.isl - prompt
    answer = jnp.maximum(lengths.osl - 1.0, 0.0)
    steps = jnp.maximum(answer, 1e-3) / accepted
    found = lengths.weight * steps / jnp.sum(lengths.weight * steps)  # in decode
    token = lengths.weight * prompt / jnp.sum(lengths.weight * prompt)  # being prefilled
    seats = jnp.maximum(load.concurrency / s.plan.attention_dp, 1.0)
    seats = jnp.where(memory.requests < 1.0, seats, jnp.minimum(memory.requests, seats))
    some = 0.5 * seats
    start, span = jnp.sum(found * lengths.isl), jnp.sum(found * lengths.osl)
    contexts = jnp.append(lengths.isl, start), jnp.append(lengths.osl, span)
    each = jax.vmap(lambda start, span: _decode(s, draft, some, start, span))(*contexts)
    x = Replica(
        sharded=s,
        chunk=load.chunk,
        draft=draft,
        weight=lengths.weight,
        prompt=prompt,
        steps=steps,
        answer=answer,
        start=start,
        span=span,
        typical=jnp.sum(token * prompt),
        first=jnp.sum(token * first),
        extra=jnp.zeros_like(prompt),
        ratio=jnp.sum(found * each[:-1]) / each[-1],
        seats=seats,
        ranks=s.plan.attention_dp,
        arrival_scv=cv**2 / s.plan.attention_dp,
    )
    full = _flights(s.plan) * load.chunk
    prompts = jnp.append(prompt, x.typical), jnp.append(first, x.first)
    own = jax.vmap(lambda prompt, first: _mixed(x, jnp.ones_like(full), full, 0.0, prompt, first))(*prompts)
    return replace(x, extra=(own[:-1] - own[-1]) / full)


# ----------------------------------------------------------------------------------------------- iterations


def _flights(plan: Plan) -> Number:
    return jnp.where(plan.microbatches > 0, plan.microbatches, plan.pp)


def _decode(s: Sharded, draft: Number, n: Number, start: Number, span: Number) -> Number:
    """Seconds of an iteration that only decodes, n requests a rank."""
    micro = jnp.clip(n, 1.0, _flights(s.plan))
    seg = Segment(requests=n / micro, tokens=1.0 + draft, start=start, span=span)
    return cycle(s, step(s, Batch(prefill=None, decode=seg), s.plan.overlap_decode), draft, micro)


def _mixed(x: Replica, n: Number, tokens: Number, others: Number, prompt: Number, first: Number) -> Number:
    """Seconds of an iteration with n requests in decode a rank and prompt tokens on the slowest one (`others`: on all
    other ranks), all of prompts of `prompt` tokens.

    The expert group meets all ranks' tokens: `step` counts a group as attention_dp times the rank's own, so
    attention_dp is set to their true ratio.
    """
    plan = x.sharded.plan
    decoding = n * (1.0 + x.draft)
    most = _flights(plan)
    chunks = jnp.clip(ceil_ratio(tokens, x.chunk), 1.0, most)
    micro = jnp.clip(jnp.maximum(chunks, n), 1.0, most)
    own = decoding + tokens
    everyone = own + others + (x.ranks - 1.0) * decoding
    s = replace(x.sharded, plan=replace(plan, attention_dp=everyone / own))
    piece = jnp.minimum(prompt, tokens)
    prompts = Segment(requests=tokens / piece / chunks, tokens=piece, start=first, span=prompt)
    answers = Segment(requests=n / micro, tokens=1.0 + x.draft, start=x.start, span=x.span)
    t = step(s, Batch(prefill=prompts, decode=answers), plan.overlap_prefill)
    # With no more prompts behind them, chunks after the first arrive a stage later each.
    drained = (plan.pp > 1) & (own < 0.999 * most * x.chunk)
    fill = jnp.where(drained, (chunks - 1.0) * t.body, 0.0)
    return cycle(s, t, x.draft, micro) + fill


@pytree
class Curve:
    """Seconds of a mixed iteration against its prompt tokens: straight between the knots, flat below the first."""

    knots: Number  # (k,) tokens
    seconds: Number  # (k,)

    def __call__(self, tokens: Number) -> Number:
        inside = jnp.clip(tokens[..., None] - self.knots[:-1], 0.0, jnp.diff(self.knots))
        return self.seconds[0] + jnp.sum(inside * jnp.diff(self.seconds) / jnp.diff(self.knots), -1)


def _curve(x: Replica, n: Number, budget: Number, others: Number) -> Curve:
    """Of the mean prompt; what a node's own differs by is `x.extra` seconds a token."""
    knots = budget * jnp.array(KNOTS)
    seconds = jax.vmap(lambda tokens: _mixed(x, n, tokens, others, x.typical, x.first))(knots)
    return Curve(knots=knots, seconds=seconds)


@pytree
class Point:
    """A replica at u arrivals an iteration and rank."""

    rate: Number  # to the rank
    running: Number  # in decode, a rank
    load: Number  # of the prefill queue
    seated: Number  # utilisation of the seats
    pace: Number  # (n,) seconds of an iteration, mean over an answer, as its request sees them
    spread: Number  # (n,) variance of that mean
    floor: Number  # seconds of an iteration with one request
    base: Number  # (n,) seconds from the next iteration on, where nobody else waits
    queue: Wait
    chance: Number  # (k,) that a request finds an iteration of kind k running: decode only, short and long mixed ones
    lasts: Number  # (k,) seconds
    joined: Wait  # (k, n) what prompts that share its last iteration add


def most_arrivals(x: Replica) -> Number:
    """u at which the token budget or the seats are full."""
    plan = x.sharded.plan
    steps = x.mean(x.steps)
    budget = _flights(plan) * x.chunk / (x.mean(x.prompt) + steps * (1.0 + x.draft))
    return jnp.minimum(budget, x.seats / (steps + x.mean(_pieces(x, _flights(plan) * x.chunk))))


def _pieces(x: Replica, budget: Number) -> Number:
    """(n,) iterations that a prompt takes at least."""
    return jnp.maximum(ceil_ratio(x.prompt, budget), 1.0)


@pytree
class Flow:
    """What an iteration carries at u arrivals an iteration and rank."""

    running: Number  # in decode, a rank
    budget: Number  # prompt tokens, at most
    tokens: Number  # prompt tokens, mean
    mix: Number  # of those that carry any
    busy: Number  # share of iterations in which a rank prefills
    anywhere: Number  # share in which any rank does
    slowest: Number  # prompt tokens, then, on the rank that has most
    others: Number  # and on all other ranks


def _flow(x: Replica, u: Number) -> Flow:
    """Prompts of one iteration are Poisson up to the budget, so that a share 1 - exp(-pieces) of iterations has any;
    dealt to many ranks they come regularly, one at a time. Ranks step together: the one with most tokens sets the pace,
    the largest of as many pieces as there are busy ranks.
    """
    n = u * x.mean(x.steps)
    budget = jnp.maximum(_flights(x.sharded.plan) * x.chunk - n * (1.0 + x.draft), 1.0)
    tokens = u * x.mean(x.prompt)
    pieces = _pieces(x, budget)
    each = x.mean(x.prompt) / x.mean(pieces)
    regular = jnp.maximum(tokens, each)
    mix = regular + jnp.minimum(x.arrival_scv, 1.0) * (tokens / -jnp.expm1(-tokens / each) - regular)
    mix = jnp.minimum(mix, budget)
    busy = jnp.minimum(tokens / mix, 1.0 - 1e-6)
    anywhere = 1.0 - (1.0 - busy) ** x.ranks
    slowest = jnp.clip(_largest(x, budget, pieces, x.ranks * busy / anywhere) * mix, mix, budget)
    return Flow(
        running=n,
        budget=budget,
        tokens=tokens,
        mix=mix,
        busy=busy,
        anywhere=anywhere,
        slowest=slowest,
        others=jnp.maximum(x.ranks * tokens / anywhere - slowest, 0.0),
    )


def _largest(x: Replica, budget: Number, pieces: Number, among: Number) -> Number:
    """Expected tokens of the largest of `among` pieces, over the mean piece: sum of size (F^among - G^among), G of a
    smaller one. Pieces are as long as their prompts or fill the budget, so that nodes are in their order."""
    size = jnp.minimum(x.prompt, budget)
    share = x.weight * pieces / x.mean(pieces)
    below = jnp.clip(jnp.cumsum(share), 1e-12, 1.0) ** among
    return jnp.sum(size * jnp.diff(below, prepend=0.0)) / jnp.sum(size * share)


@pytree
class Times:
    """Iterations at u arrivals: what they carry, and their seconds."""

    flow: Flow
    curve: Curve
    alone: Number  # decode only, with one more request than the mean: as a request in decode finds it
    more: Number  # and with two more
    floor: Number  # with one request
    mixed: Number
    pace: Number  # mean

    def rate(self, u: Number) -> Number:
        return u / self.pace


def times(x: Replica, u: Number) -> Times:
    f = _flow(x, u)
    n = f.running
    curve = _curve(x, n, f.budget, f.others)
    counts = jnp.stack([n, n + 1.0, n + 2.0, jnp.ones_like(n)])
    before, alone, more, floor = x.ratio * jax.vmap(lambda n: _decode(x.sharded, x.draft, n, x.start, x.span))(counts)
    extra = x.mean(x.prompt * x.extra) / x.mean(x.prompt)
    mixed = curve(f.slowest) + f.slowest * extra + alone - before
    pace = (1.0 - f.anywhere) * alone + f.anywhere * mixed
    return Times(flow=f, curve=curve, alone=alone, more=more, floor=floor, mixed=mixed, pace=pace)


def rate_at(x: Replica, u: Number) -> Number:
    """Requests/s to a rank at u arrivals an iteration."""
    return times(x, u).rate(u)


def point(x: Replica, u: Number, t: Times | None = None) -> Point:
    """The steady state at u arrivals an iteration (0 < u < `most_arrivals`); `t` where `times` is known."""
    t = times(x, u) if t is None else t
    f, curve, alone, mixed, pace = t.flow, t.curve, t.alone, t.mixed, t.pace
    n, budget, prompt, steps, rate = f.running, f.budget, x.mean(x.prompt), x.mean(x.steps), t.rate(u)
    pieces = _pieces(x, budget)
    left = x.prompt - (pieces - 1.0) * budget  # of the last piece
    room = jnp.maximum(budget - left, 0.0)
    full = curve(budget) + budget * x.extra
    last = curve(left) + left * x.extra
    service = x.prompt * full / budget
    load = rate * x.mean(service)

    # The iteration that a request finds running. Mixed ones are a short and a long kind, about their standard
    # deviation; each brings the prompts of the next, so that Var[prompt tokens] = u E[L^2]/(1 - stolen^2).
    slope = jnp.maximum(mixed - alone, 0.0) / f.slowest
    stolen = jnp.minimum(slope * f.tokens / pace, 0.99)
    sized = x.mean(x.prompt * jnp.minimum(x.prompt, budget)) / prompt
    square = f.tokens**2 + f.tokens * sized / (1.0 - stolen**2)
    wide = slope * safe_sqrt(jnp.maximum(jnp.minimum(square / f.busy, budget * f.mix) - f.mix**2, 0.0))
    wide = jnp.minimum(wide, 0.99 * jnp.maximum(mixed - alone, 0.0))
    lasts = jnp.stack([alone, mixed - wide, mixed + wide])
    often = jnp.stack([1.0 - f.anywhere, 0.5 * f.anywhere, 0.5 * f.anywhere])
    chance = (1.0 - jnp.exp(-n) * (1.0 - jnp.minimum(load, 1.0))) * often * lasts / pace

    # The backlog of earlier iterations: what the queue holds, less what came in the running one.
    uneven = x.mean(x.prompt**2) / prompt**2
    moments = Moments(mean=x.mean(service), square=x.mean(service**2), cube=x.mean(service**3))
    queue = gg1(rate, x.arrival_scv, moments)
    regular = jnp.exp(-2.0 * (1.0 - jnp.minimum(load, 1.0)) * budget / (3.0 * uneven * prompt))
    bulk = budget / (budget + uneven * prompt)
    backlog = jnp.maximum(queue.mean - 0.5 * jnp.sum(chance * lasts) * load * bulk, 0.0)
    queue = replace(queue, mean=backlog * regular, delayed=queue.delayed * regular)
    varied = 0.5 * (x.arrival_scv + x.mean(x.steps**2) / steps**2 - 1.0)
    seats = many_servers(rate, x.seats, (steps + x.mean(pieces)) * pace, varied)
    queue = both(queue, seats)

    # Prompts that came in the same iteration go before; those behind fill what is left of the last one.
    near, some = companions(rate, x.arrival_scv, 0.5 * lasts[:, None])
    before = near * prompt
    behind, _ = companions(rate, x.arrival_scv, 0.5 * lasts[:, None] + queue.mean + (pieces - 1.0) * full)
    fill = room * -jnp.expm1(-behind * jnp.minimum(1.0, prompt / jnp.maximum(room, 1.0)))
    beside = jnp.minimum(before + fill * jnp.maximum(1.0 - before / jnp.maximum(room, 1.0), 0.0), room)
    over = some * jnp.exp(-room * some / jnp.maximum(before, 1e-9))  # those before push it over the budget
    shared = curve(left + beside) - curve(left) + beside * x.mean(x.prompt * x.extra) / prompt + over * alone
    delayed = jnp.broadcast_to(1.0 - (1.0 - some) ** 2, shared.shape)
    joined = Wait(
        mean=jnp.maximum(shared, 0.0),
        delayed=delayed,
        scv=(0.5 * uneven / jnp.maximum(near, 1e-9) + 1.0) * delayed - 1.0,
        utilisation=load,
        stable=load < 1.0,
    )

    # what prompts of others add to the iterations of one answer; those after its own prompt are longer than the mean
    costs = jnp.maximum(mixed - alone + f.slowest * (x.extra - x.mean(x.prompt * x.extra) / prompt), 0.0)
    extra = costs * x.prompt / f.mix * f.anywhere / jnp.maximum(f.busy, 1e-9)
    own = last + jnp.sum(chance[:, None] * shared, axis=0)
    wake = stolen * (1.0 - stolen**x.steps) / (1.0 - stolen) / x.steps
    noise = u * (x.mean(extra**2) + (x.arrival_scv - 1.0) * x.mean(extra) ** 2) / (1.0 - stolen) ** 2 / x.steps
    growth = (t.more - alone) / (1.0 - stolen)  # of the pace with the requests in decode, whose number varies
    elastic = jnp.clip(n * growth / pace, 0.0, 0.99)
    return Point(
        rate=rate,
        running=n,
        load=load,
        seated=seats.utilisation,
        pace=pace + wake * (own - pace),
        spread=noise + AVERAGED * growth**2 * n / (1.0 - elastic) * 0.5 * (1.0 + x.arrival_scv),
        floor=t.floor,
        base=(pieces - 1.0) * full + last,
        queue=queue,
        chance=chance,
        lasts=lasts,
        joined=joined,
    )


def both(a: Wait, b: Wait) -> Wait:
    """The sum of two independent waits."""
    delayed = 1.0 - (1.0 - a.delayed) * (1.0 - b.delayed)
    mean = a.mean + b.mean

    def square(w: Wait) -> Number:
        return safe_divide((1.0 + w.scv) * w.mean**2, w.delayed)

    total = square(a) + square(b) + 2.0 * a.mean * b.mean
    return Wait(
        mean=mean,
        delayed=delayed,
        scv=safe_divide(total * delayed, mean**2, otherwise=2.0) - 1.0,
        utilisation=jnp.maximum(a.utilisation, b.utilisation),
        stable=a.stable & b.stable,
    )


__all__ = ["Point", "Replica", "Times", "both", "most_arrivals", "point", "rate_at", "replica", "resident", "times"]
