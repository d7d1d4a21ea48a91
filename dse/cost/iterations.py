"""Iterations of a replica under open load: what does not depend on the rate, and what each iteration takes.

Lengths enter as nodes (`lengths`), priced by the cost model's own `step`: once a plan, what a node's attention adds to
a prompt token and what the spread of contexts does to a decode step; at every rate, the step at a few sizes of its
prompt part (`Curve`). Through a pipeline prompts go as micro-batches of a chunk; how many of them an iteration of so
many tokens has is taken half a chunk smoother than it is, save for a prompt alone (`Replica.lone`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from dse.cost.lengths import Lengths
from dse.cost.memory import Memory
from dse.cost.serving import accepted_of, cycle
from dse.cost.shard import Sharded
from dse.cost.step import Batch, Segment, step
from dse.cost.types import Load, Number, Plan, pytree, replace
from dse.numerics import ceil_ratio, safe_divide, safe_sqrt

KNOTS = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)  # of the token budget, where mixed steps are priced
LEAST_ANSWER = 1e-3  # tokens after the first, of a request that has none: its decode is never waited for


@pytree
class Replica:
    """What does not depend on the rate. Leaves (n,) are by node of the lengths."""

    sharded: Sharded
    chunk: Number
    draft: Number
    yields: Number  # output tokens of a request in an iteration: more than one where drafts are accepted
    weight: Number  # (n,)
    prompt: Number  # (n,) tokens to prefill, ascending
    steps: Number  # (n,) decode iterations
    answer: Number  # (n,) output tokens after the first
    start: Number  # position at which requests found in decode began to, mean
    span: Number  # tokens they run over
    typical: Number  # prompt that the mean prompt token is of
    first: Number  # position of its first token
    extra: Number  # (n,) seconds that a prompt token of a node takes more than one of the typical prompt: attention
    lone: Number  # (n,) seconds that its last piece alone takes more than one of about its size: whole micro-batches
    ratio: Number  # decode iteration over the nodes' contexts, to that at the mean one (1 for full attention)
    seats: Number  # requests that may run on a rank
    overlap: Number  # share of an answer that another begun with it lasts as well, mean
    sized: Number  # squared coefficient of variation of what a request takes of the seats
    ranks: Number
    uneven: Number  # requests that the fullest rank has in decode more than the mean one, over the root of their number
    arrival_scv: Number  # at one rank: requests are dealt round robin

    def mean(self, values: Number) -> Number:
        return jnp.sum(self.weight * values)

    @property
    def width(self) -> Number:
        """Tokens that an iteration has room for, decode's included."""
        return flights(self.sharded.plan) * self.chunk

    def budget(self, n: Number) -> Number:
        """Prompt tokens that an iteration has room for beside n requests in decode."""
        return jnp.maximum(self.width - n * (1.0 + self.draft), 1.0)

    @property
    def mean_extra(self) -> Number:
        """Seconds that the mean prompt token takes more than one of the typical prompt."""
        return self.mean(self.prompt * self.extra) / self.mean(self.prompt)

    @property
    def various(self) -> Number:
        """Second moment of the prompts over the square of their mean."""
        return self.mean(self.prompt**2) / self.mean(self.prompt) ** 2

    @property
    def stay(self) -> Number:
        """Iterations that a request holds its seat for, mean: those of its answer, and of its prompt at least."""
        return self.mean(self.steps) + self.mean(pieces_of(self, self.width))


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
    draft, accepted = load.drafted, accepted_of(load)
    order = jnp.argsort(lengths.isl - lengths.cached)
    lengths = jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], lengths)
    prompt = jnp.maximum(lengths.isl - lengths.cached, 1.0)
    first = lengths.isl - prompt
    answer = jnp.maximum(lengths.osl - 1.0, 0.0)
    steps = jnp.maximum(answer, LEAST_ANSWER) / accepted
    found = lengths.weight * steps / jnp.sum(lengths.weight * steps)  # in decode
    token = lengths.weight * prompt / jnp.sum(lengths.weight * prompt)  # being prefilled
    seats = jnp.maximum(load.concurrency / s.plan.attention_dp, 1.0)
    tight = (memory.requests >= 1.0) & (memory.requests < seats)  # KV space is what runs out
    seats = jnp.where(tight, memory.requests, seats)
    held = lengths.isl + s.c.reserved_output * lengths.osl
    held_mean = jnp.sum(found * held)
    pair = lengths.weight[:, None] * lengths.weight
    overlap = jnp.sum(pair * jnp.minimum(steps[:, None], steps)) / jnp.sum(lengths.weight * steps)
    # Ranks get as many requests in turn, and differ by how long those stay and how long they are; the largest of K
    # normal deviates by Tukey's approximation.
    ranks = s.plan.attention_dp * jnp.ones_like(seats)
    context = lengths.isl + 0.5 * lengths.osl
    context = jnp.sum(found * context**2) / jnp.sum(found * context) ** 2 - 1.0
    highest = ndtri((ranks - 1.0 / 3.0) / (ranks + 1.0 / 3.0))
    some = 0.5 * seats
    start, span = jnp.sum(found * lengths.isl), jnp.sum(found * lengths.osl)
    contexts = jnp.append(lengths.isl, start), jnp.append(lengths.osl, span)
    each = jax.vmap(lambda start, span: _decode_of(s, draft, some, start, span))(*contexts)
    x = Replica(
        sharded=s,
        chunk=load.chunk,
        draft=draft,
        yields=accepted,
        weight=lengths.weight,
        prompt=prompt,
        steps=steps,
        answer=answer,
        start=start,
        span=span,
        typical=jnp.sum(token * prompt),
        first=jnp.sum(token * first),
        extra=jnp.zeros_like(prompt),
        lone=jnp.zeros_like(prompt),
        ratio=jnp.sum(found * each[:-1]) / each[-1],
        seats=seats,
        overlap=overlap,
        sized=jnp.where(tight, jnp.sum(found * held**2) / held_mean**2 - 1.0, 0.0),
        ranks=s.plan.attention_dp,
        uneven=jnp.where(ranks > 1, highest * safe_sqrt((1.0 - 1.0 / ranks) * (1.0 - overlap + context)), 0.0),
        arrival_scv=cv**2 / s.plan.attention_dp,
    )
    full = x.width
    prompts = jnp.append(prompt, x.typical), jnp.append(first, x.first)
    one = jnp.ones_like(full)
    own = jax.vmap(lambda prompt, first: _mixed(x, one, full, 0.0, prompt, first, False, False))(*prompts)
    last = prompt - (pieces_of(x, full) - 1.0) * full
    lone = [
        jax.vmap(lambda last, e=exact: _mixed(x, one, last, 0.0, x.typical, x.first, True, e))(last)
        for exact in (True, False)
    ]
    return replace(x, extra=(own[:-1] - own[-1]) / full, lone=lone[0] - lone[1])


# ----------------------------------------------------------------------------------------------- iterations


def flights(plan: Plan) -> Number:
    return jnp.where(plan.microbatches > 0, plan.microbatches, plan.pp)


def decode(x: Replica, n: Number) -> Number:
    """Of the rank with most contexts, whose experts meet the tokens of all: those vary about their mean by `x.uneven`
    over the root of n."""
    most = n + x.uneven * safe_sqrt(n)
    s = replace(x.sharded, plan=replace(x.sharded.plan, attention_dp=x.ranks * n / most))
    return _decode_of(s, x.draft, most, x.start, x.span)


def _decode_of(s: Sharded, draft: Number, n: Number, start: Number, span: Number) -> Number:
    """Seconds of an iteration that only decodes, n requests a rank."""
    micro = jnp.clip(n, 1.0, flights(s.plan))
    seg = Segment(requests=n / micro, tokens=1.0 + draft, start=start, span=span)
    return cycle(s, step(s, Batch(prefill=None, decode=seg), s.plan.overlap_decode), draft, micro)


def _mixed(
    x: Replica, n: Number, tokens: Number, others: Number, prompt: Number, first: Number, drained: bool, exact: bool
) -> Number:
    """Seconds of an iteration with n requests in decode a rank and prompt tokens on the slowest one (`others`: on all
    other ranks), all of prompts of `prompt` tokens.

    The expert group meets all ranks' tokens: `step` counts a group as attention_dp times the rank's own, so
    attention_dp is set to their true ratio.
    """
    plan = x.sharded.plan
    decoding = n * (1.0 + x.draft)
    most = flights(plan)
    chunks = ceil_ratio(tokens, x.chunk) if exact else tokens / x.chunk + 0.5
    chunks = jnp.clip(chunks, 1.0, most)
    micro = jnp.clip(jnp.maximum(chunks, n), 1.0, most)
    own = decoding + tokens
    everyone = own + others + (x.ranks - 1.0) * decoding
    s = replace(x.sharded, plan=replace(plan, attention_dp=everyone / own))
    piece = jnp.minimum(prompt, tokens)
    prompts = Segment(requests=tokens / piece / chunks, tokens=piece, start=first, span=prompt)
    answers = Segment(requests=n / micro, tokens=1.0 + x.draft, start=x.start, span=x.span)
    t = step(s, Batch(prefill=prompts, decode=answers), plan.overlap_prefill)
    # With no more prompts behind them, chunks after the first arrive a stage later each.
    fill = jnp.where(plan.pp > 1, (chunks - 1.0) * t.body, 0.0) if drained else 0.0
    return cycle(s, t, x.draft, micro) + fill


def pieces_of(x: Replica, budget: Number) -> Number:
    """(n,) iterations that a prompt takes at least."""
    return jnp.maximum(ceil_ratio(x.prompt, budget), 1.0)


@pytree
class Curve:
    """Seconds of a mixed iteration against its prompt tokens: straight between the knots."""

    knots: Number  # (k,) tokens, from 0: decode only
    seconds: Number  # (k,)
    full: Number  # of one that fills the budget and leaves prompts behind
    other: Number  # more for a prompt token more on other ranks

    def __call__(self, tokens: Number) -> Number:
        inside = jnp.clip(tokens[..., None] - self.knots[:-1], 0.0, jnp.diff(self.knots))
        return self.seconds[0] + jnp.sum(inside * jnp.diff(self.seconds) / jnp.diff(self.knots), -1)

    def of(self, x: Replica, tokens: Number) -> Number:
        """(n,) of tokens (n,) of each node's own prompts."""
        return self(tokens) + tokens * x.extra


def full_iteration(x: Replica, n: Number, budget: Number, others: Number) -> Number:
    """Seconds of an iteration that fills the budget and leaves prompts behind."""
    return _mixed(x, n, budget, others, x.typical, x.first, False, False)


def curve_of(x: Replica, n: Number, budget: Number, others: Number, without: Number) -> Curve:
    """Of the mean prompt; what a node's own differs by is `x.extra` seconds a token. `without`: decode only."""
    knots = budget * jnp.array(KNOTS)
    seconds = jax.vmap(lambda tokens: _mixed(x, n, tokens, others, x.typical, x.first, True, False))(knots)
    knots, seconds = jnp.append(0.0, knots), jnp.append(jnp.minimum(without, seconds[0]), seconds)
    full = full_iteration(x, n, budget, others)
    crowd = (x.ranks - 1.0) * budget
    crowded = _mixed(x, n, budget, others + crowd, x.typical, x.first, False, False)
    return Curve(knots=knots, seconds=seconds, full=full, other=safe_divide(crowded - full, crowd))


__all__ = ["Curve", "Replica", "curve_of", "decode", "flights", "full_iteration", "pieces_of", "replica", "resident"]
