"""What an iteration of a replica under open load carries: prompt tokens of the requests that came in the last one.

Arrivals are gamma renewals of squared coefficient of variation ca^2; those of an iteration are taken as negative
binomial (Poisson where ca = 1), by the true dispersion over its length (`queueing.dispersion`).
Ranks of attention DP step together (`lockstep`), so that an iteration is as long as its slowest rank's.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

from dse.cost.iterations import Curve, Replica, pieces_of
from dse.cost.queueing import any_come, companions, dispersion
from dse.cost.types import Number, pytree, replace
from dse.numerics import safe_sqrt

FADE = 4.0  # power of the share of the budget in use with which a saturated prefill evens out what goes into decode
ROUNDS = 8


@pytree
class Flow:
    """What an iteration carries at u arrivals an iteration and rank."""

    running: Number  # in decode, a rank
    varied: Number  # requests in decode that one of them finds beyond the mean, itself included, at constant pace
    clustered: Number  # variance over mean of the requests that come in an iteration
    budget: Number  # prompt tokens, at most
    tokens: Number  # prompt tokens, mean
    mix: Number  # of those that carry any
    spread: Number  # their standard deviation, then
    busy: Number  # share of iterations in which a rank prefills
    anywhere: Number  # share in which any rank does
    slowest: Number  # prompt tokens, then, on the rank that has most
    others: Number  # and on all other ranks


def flow_of(x: Replica, u: Number) -> Flow:
    """As if ranks did not wait for each other: `together` corrects that.

    A request in decode meets, beside the mean, itself and the companions of the burst it came in: Var[n]/n of them.
    """
    n = u * x.mean(x.steps)
    near, _ = companions(x.arrival_scv, n)
    varied = jnp.maximum(1.0 + 2.0 * (near - n), 0.0)
    budget = x.budget(n)
    tokens = u * x.mean(x.prompt)
    pieces = pieces_of(x, budget)
    each = x.mean(x.prompt) / x.mean(pieces)
    clustered = dispersion(x.arrival_scv, u)
    mix = jnp.clip(tokens / any_come(clustered, tokens / each), each, budget)
    sized = x.mean(x.prompt * jnp.minimum(x.prompt, budget)) / x.mean(x.prompt)
    sized = sized + (clustered - 1.0) * jnp.minimum(x.mean(x.prompt), budget)
    busy = jnp.minimum(tokens / mix, 1.0 - 1e-6)
    anywhere = -jnp.expm1(x.ranks * jnp.log1p(-busy))  # also where single precision has no 1 - busy
    return Flow(
        running=n,
        varied=varied,
        clustered=clustered,
        budget=budget,
        tokens=tokens,
        mix=mix,
        spread=safe_sqrt(jnp.minimum((tokens**2 + tokens * sized) / busy, budget * mix) - mix**2),
        busy=busy,
        anywhere=anywhere,
        slowest=mix,
        others=jnp.maximum(x.ranks * tokens / anywhere - mix, 0.0),
    )


def lockstep(x: Replica) -> bool:
    """Whether the replica may have ranks that step together: attention DP of a model without experts is only DP."""
    return any(f.routed is not None for f in x.sharded.ffns)


@pytree
class Slowest:
    """Prompt tokens of the rank that has most, among ranks with so many pieces in an iteration: Poisson, each on a rank
    of its own until all ranks have one; from there on a rank's are sums, which vary by the root of their number."""

    tokens: Number  # (n,) ascending
    wide: Number  # (n,) their standard deviation by the number of its pieces
    chance: Number  # (n,) of each
    none: Number  # chance that there is no piece

    def beyond(self, values: Number, own: Number) -> Number:
        """Expected excess over `own` of what the slowest has of `values` (n,)."""
        return jnp.sum(jnp.maximum(values - own[..., None], 0.0) * self.chance, -1)

    def moments(self, price: Callable[[Number], Number]) -> tuple[Number, Number]:
        """Mean and standard deviation of what the slowest has of a price of tokens (n,), where there is a piece."""
        values = price(self.tokens)
        mean = jnp.sum(values * self.chance) / (1.0 - self.none)
        apart = 0.5 * (price(self.tokens + self.wide) - price(jnp.maximum(self.tokens - self.wide, 0.0)))
        square = jnp.sum(((values - mean) ** 2 + apart**2) * self.chance) / (1.0 - self.none)
        return mean, safe_sqrt(square)


def slowest_of(x: Replica, budget: Number, count: Number, ranks: Number) -> Slowest:
    """Of `count` pieces on `ranks` ranks. Prompts beyond the budget come as full pieces and a last one, of any size."""
    pieces = pieces_of(x, budget)
    single = pieces < 1.5
    size = jnp.minimum(x.prompt, budget)
    whole = jnp.where(single, x.weight, 0.0)
    below = jnp.cumsum(whole + x.weight * (pieces - 1.0)) + (1.0 - jnp.sum(whole)) * size / budget
    below = jnp.minimum(below / x.mean(pieces), 1.0)
    each = x.mean(x.prompt) / x.mean(pieces)
    ranks = jnp.maximum(ranks, 1.0)
    turns = ranks * jnp.array([1.0, 2.0, 3.0])  # in turn: the fullest rank gets one more from each of these on
    more = ndtr((count - turns - 0.5) / jnp.sqrt(count + 0.25))
    many = jnp.maximum(1.0 + jnp.sum(more), count / ranks)
    spread = safe_sqrt(jnp.sum(jnp.array([3.0, 5.0, 7.0]) * more) - (many - 1.0) * (many + 1.0))
    tokens = jnp.clip(each * many + (size - each) * jnp.sqrt(many), 0.0, budget)
    wide = jnp.minimum(each * spread, budget - tokens)
    none = jnp.exp(-count)
    at_most = jnp.exp(-count / many * (1.0 - below))
    return Slowest(tokens=tokens, wide=wide, chance=jnp.diff(at_most, prepend=none), none=none)


def at_least_one(mean: Number) -> Number:
    """The Poisson mean y of a number that is `mean` where it is not 0: mean = y/(1 - e^-y), from its two limits."""
    mean = jnp.maximum(mean, 1.0 + 1e-3)
    y = mean - 1.0 / mean
    for _ in range(2):
        y = -mean * jnp.expm1(-y)
    return y


def together(x: Replica, u: Number, f: Flow, curve: Curve, short: Number) -> tuple[Flow, Number, Slowest]:
    """Iterations in which any of several ranks prefills, and what the rank with most has then; seconds that the others'
    tokens add to those of the curve.

    What comes in an iteration is prefilled in the next one: after a long one more has come, so that long ones follow
    each other, and prompts of several ranks share them. Two states, long where any rank prefills: a long one follows a
    short one with chance a, a long one with b; they are a/(1 - b + a) of all, and each has its share of all pieces.
    """
    scv, pieces = x.arrival_scv * x.ranks, pieces_of(x, f.budget)
    each = x.mean(x.prompt) / x.mean(pieces)

    def long_ones(share: Number) -> tuple[Slowest, Number, Number]:
        crowd = slowest_of(x, f.budget, at_least_one(x.ranks * f.tokens / each / share), x.ranks)
        mean = jnp.clip(crowd.moments(lambda tokens: tokens)[0], f.tokens / share, f.budget)
        return crowd, mean, curve.other * (jnp.maximum(x.ranks * f.tokens / share - mean, 0.0) - f.others)

    def better(_: Number, share: Number) -> Number:
        crowd, _, shift = long_ones(share)

        def price(tokens: Number) -> Number:
            return curve.of(x, tokens) + shift

        seconds = price(crowd.tokens)
        pace = short + share * jnp.maximum(crowd.moments(price)[0] - short, 0.0)
        counts = x.ranks * u / pace * jnp.append(seconds, short)  # requests that come in an iteration
        come = any_come(dispersion(scv, counts), counts)
        # a short one follows where none comes and the slowest rank, hence any, has a last piece
        quiet = jnp.sum(crowd.chance / pieces * (1.0 - come[:-1])) / (1.0 - crowd.none)
        found = jnp.clip(come[-1] / (quiet + come[-1]), f.tokens / f.budget, 1.0 - 1e-6)
        return jnp.sqrt(share * found)  # it overshoots: longer iterations are fewer in which to arrive

    share = jax.lax.fori_loop(0, ROUNDS, better, f.anywhere)
    crowd, mean, shift = long_ones(share)
    joint = replace(f, anywhere=share, slowest=mean, spread=crowd.moments(lambda tokens: tokens)[1])
    joint, shift = jax.tree.map(lambda many, one: jnp.where(x.ranks > 1, many, one), (joint, shift), (f, 0.0))
    return joint, shift, crowd


__all__ = ["FADE", "Flow", "Slowest", "at_least_one", "flow_of", "lockstep", "slowest_of", "together"]
