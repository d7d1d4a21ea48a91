"""Open loop: the steady state of a replica to which requests come at a rate, whoever is being served.

One attention-DP rank is a queue. An iteration decodes n requests and carries up to B prompt tokens (the step's token
budget less what decode takes). Everything is a function of u, the requests that arrive in one iteration:
- Little's law: n = u * decode steps a request; u * prompt tokens a request are prefilled an iteration. So the mean
  iteration T(u) is explicit, and the rate is R = u / T(u), which rises with u: no fixed point has to be iterated.
  A request in decode sees n and Var[n]/n more (itself; a burst's companions), so TPOT = T at that many.
- TTFT = rest of the running iteration + backlog + own iterations, shared with prompts that came in the same one.
  Backlog: a queue of service L T(B)/B a prompt of L tokens (P-K, or G/G/1 for bursts), times Kraemer and
  Langenbach-Belz's factor of regular services, because an iteration takes in all that fits: exp(-2(1-r)B/(3 v L)),
  v = cs^2 + ca^2 the variance of the work that comes over the square of its mean.
  While prompts wait decode swells (`laden`), and those behind a request slow its own decode (`Point.pace`).
- KV space and the engine's limit of running requests are K seats; where all are taken, requests wait for one.
What iterations carry is in `flow`, what they take in `iterations`. Ignored: preemption, correlated bursts.
Domain, against the step simulator (`python benchmarks/openloop.py`): mean error at 20, 50, 80% of the capacity (worst),
cases developed on; held-out cases after the semicolon. Means are simulated to 0.3-1% at 20%, 2-4% at 80%.
- Poisson arrivals, one rank: TTFT 1, 2, 4% (2, 11, 16); 1, 3, 5% (9, 29, 47: prompts that vary by 1.3 times their mean,
  whose simulated mean is uncertain by 8-18%). Its P90 4, 3, 8%; 3, 4, 8%, P99 8, 10, 19%; 7, 14, 17%. TPOT 1-4%.
- Bursts of coefficient of variation 1.5 to 2: TTFT 4, 5, 6% (14, 35, 29); 4, 4, 4% (11, 11, 11); of 3: 7, 6, 10%
  (14, 14, 32); 7, 5, 7% (16, 12, 15). P90 6, 6, 12%; 7, 6, 9%, of 3 at 80% 23-25%. TPOT at 80% 5%; 6%, of 3 11%; 15%.
- Pipelines: TTFT 1, 3, 4% (3, 9, 13); 2, 3, 7% (12, 8, 26). TPOT 3, 4, 8% (13, 9, 42); 2, 3, 6% (6, 14, 14).
- Attention DP: TTFT 4, 4, 10% (35, 18, 47); 1, 2, 5% (3, 5, 16), P90 6, 7, 15%; 3, 6, 9%. TPOT 3, 7, 7%; 2, 4, 6%.
  Worst, and low, with eight ranks of long prompts of which a few are far longer. Two errors were found on its held-out
  cases (a queue without end at 80%, TPOT twofold at 20%) and mended, so that these are no longer unseen.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dse.cost.flow import FADE, Flow, flow_of, lockstep, slowest_of, together
from dse.cost.iterations import Curve, Replica, curve_of, decode, flights, full_iteration, pieces_of, replica, resident
from dse.cost.queueing import Moments, Wait, any_come, companions, gg1, many_servers
from dse.cost.types import Number, pytree, replace
from dse.numerics import safe_divide, safe_sqrt

FULLEST = 0.999  # of the capacity
ROUNDS = 4
AVERAGED = 0.74  # 2(e^-1 - 1 + 1): an answer averages over its own length the requests beside it


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
    budget = flights(plan) * x.chunk / (x.mean(x.prompt) + steps * (1.0 + x.draft))
    return jnp.minimum(budget, x.seats / (steps + x.mean(pieces_of(x, flights(plan) * x.chunk))))


@pytree
class Times:
    """Iterations at u arrivals: what they carry, and their seconds."""

    flow: Flow
    curve: Curve
    alone: Number  # decode only, with as many requests as one in decode finds
    growth: Number  # more for a request in decode more
    elastic: Number  # relative change of the pace with that of the requests in decode
    stolen: Number  # share of its own length that an iteration adds to the next
    wide: Number  # standard deviation of mixed ones
    floor: Number  # with one request
    mixed: Number
    follow: Number  # chance that a prompt leaves others behind its last iteration
    pace: Number  # mean

    def rate(self, u: Number) -> Number:
        return u / self.pace


def times(x: Replica, u: Number) -> Times:
    f = flow_of(x, u)
    n = f.running
    # Its slope over the others that a request finds in decode: n + sd and, positive, n^2/(n + sd).
    most = n + safe_sqrt(jnp.maximum(f.varied * n, 0.25))
    counts = jnp.stack([1.0 + n * n / most, n, 1.0 + most, jnp.ones_like(n)])
    less, before, more, floor = x.ratio * jax.vmap(lambda n: decode(x, n))(counts)
    curve = curve_of(x, n, f.budget, f.others, before)
    growth = (more - less) / (counts[2] - counts[0])
    extra = x.mean(x.prompt * x.extra) / x.mean(x.prompt)
    if lockstep(x):
        f, shift, crowd = together(x, u, f, curve, before)
        curve = replace(curve, seconds=curve.seconds + shift, full=curve.full + shift)
    mixed, several, follow = drains(x, u, f, curve, before)
    mixed = mixed + f.slowest * extra
    if lockstep(x):
        slowest, uneven = crowd.moments(curve(crowd.tokens) + crowd.tokens * x.extra)
        mixed, several = jnp.where(x.ranks > 1, slowest, mixed), jnp.where(x.ranks > 1, uneven, several)
    # A request in decode finds n + Var[n]/n there; more of them are slower, and so stay for longer.
    steady = (1.0 - f.anywhere) * before + f.anywhere * mixed
    high, low = jnp.minimum(f.slowest + f.spread, f.budget), jnp.maximum(f.slowest - f.spread, 0.0)
    steep = safe_divide(curve(high) - curve(low), high - low)
    between, within = (1.0 - f.busy) * f.mix**2 + 1e-9, f.spread**2
    slope = (between * (mixed - before) / f.slowest + within * steep) / (between + within)
    stolen = jnp.clip(slope * f.tokens / steady, 0.0, 0.95)
    elastic = jnp.clip(n * growth / ((1.0 - stolen) * steady), 0.0, 0.75)
    found = 1.0 + (f.varied / (1.0 - elastic) - 1.0) * (1.0 - (f.tokens / f.budget) ** FADE)
    found = jnp.minimum(found, jnp.maximum(x.seats - n, 1.0))
    alone = before + found * growth
    mixed = mixed + found * growth
    pace = (1.0 - f.anywhere) * alone + f.anywhere * mixed
    return Times(
        flow=f,
        curve=curve,
        alone=alone,
        growth=growth,
        elastic=jnp.clip(n * growth / ((1.0 - stolen) * pace), 0.0, 0.95),
        stolen=stolen,
        wide=jnp.minimum(several, 0.99 * jnp.maximum(mixed - alone, 0.0)),
        floor=floor,
        mixed=mixed,
        follow=follow,
        pace=pace,
    )


def drains(x: Replica, u: Number, f: Flow, curve: Curve, short: Number) -> tuple[Number, Number, Number]:
    """Seconds of iterations with prompts: mean, standard deviation, and the chance that a prompt leaves others behind.

    Those that leave prompts behind are full, and their pipeline stays filled (`Curve.full`). A request leaves nobody in
    the queue with the chance that a new one finds none there, 1 - busy share of time, and none behind its iteration
    where those that came in it are not counted; it takes `mix` tokens an iteration, so one in prompt/mix is its last.
    That holds where prompts are served one by one; where many share an iteration, no more of them are full than if the
    work were exponential: e^-y, (1 - e^-y)/y = mix/budget, y about budget/mix - mix/budget.
    """
    prompt = x.mean(x.prompt)
    last = jnp.minimum(f.mix / prompt, 1.0)
    least = jnp.minimum(-jnp.expm1(f.mix / f.budget - f.budget / f.mix), last)

    def kinds(alone: Number) -> tuple[Number, Number, Number]:
        tokens = jnp.clip((f.mix - (1.0 - alone) * f.budget) / alone, 1.0, f.budget)
        apart = jnp.minimum(f.spread, jnp.minimum(f.budget - tokens, tokens))
        low, high = curve(tokens - apart), curve(tokens + apart)
        return 0.5 * (low + high), 0.5 * (high - low), alone * 0.5 * (low + high) + (1.0 - alone) * curve.full

    def better(_: Number, alone: Number) -> Number:
        mean = kinds(alone)[2]
        pace = (1.0 - f.busy) * short + f.busy * mean
        nobody = (1.0 - f.busy * mean / pace) / (1.0 - any_come(f.clustered, u * mean / pace))
        return jnp.clip(last * nobody, jnp.maximum(least, 1e-3), last)

    alone = jax.lax.fori_loop(0, ROUNDS, better, last)  # share that leaves nobody behind; `last`: at no load
    drained, apart, mean = kinds(alone)
    spread = safe_sqrt(alone * apart**2 + alone * (1.0 - alone) * (drained - curve.full) ** 2)
    return mean, spread, 1.0 - alone / last


def rate_at(x: Replica, u: Number) -> Number:
    """Requests/s to a rank at u arrivals an iteration."""
    return times(x, u).rate(u)


@pytree
class Top:
    """A replica as near to its capacity as a steady state is described."""

    capacity: Number  # arrivals an iteration at which the token budget or the seats are full
    pace: Number  # seconds of an iteration at u

    @property
    def u(self) -> Number:
        """Arrivals an iteration: where an unstable rate is evaluated, flagged."""
        return FULLEST * self.capacity


def top(x: Replica) -> Top:
    """The end of what a replica serves: found once, for every rate that is asked of it."""
    capacity = most_arrivals(x)
    return Top(capacity=capacity, pace=times(x, FULLEST * capacity).pace)


def point(x: Replica, u: Number, most: Top, t: Times | None = None) -> Point:
    """The steady state at u arrivals an iteration (0 < u < `most.capacity`); `t` where `times` is known."""
    t = times(x, u) if t is None else t
    f, curve, alone, mixed, pace = t.flow, t.curve, t.alone, t.mixed, t.pace
    n, budget, prompt, steps, rate = f.running, f.budget, x.mean(x.prompt), x.mean(x.steps), t.rate(u)
    pieces = pieces_of(x, budget)
    left = x.prompt - (pieces - 1.0) * budget  # of the last piece
    room = jnp.maximum(budget - left, 0.0)
    full = curve.full + budget * x.extra
    last = curve(left) + left * x.extra + (1.0 - f.busy) * x.lone
    last = last - t.follow * (curve(budget) - curve.full)  # with prompts behind it the pipeline stays filled
    # The iteration that a request finds running; mixed ones are a short and a long kind, by their standard deviation
    stolen, wide = t.stolen, t.wide
    lasts = jnp.stack([alone, mixed - wide, mixed + wide])
    often = jnp.stack([1.0 - f.anywhere, 0.5 * f.anywhere, 0.5 * f.anywhere]) * lasts / pace
    crowd = None
    if lockstep(x):
        # On other ranks come as many as here in the iteration that it finds; and there are pieces of longer prompts
        come = rate * jnp.sum(often * lasts) + u * (x.mean(pieces) - 1.0) * jnp.sum(often[1:]) / f.anywhere
        elsewhere = (x.ranks - 1.0) * come
        crowd = slowest_of(x, budget, elsewhere, x.ranks - 1.0)
        theirs = curve(crowd.tokens) + crowd.tokens * x.extra
        crowded = curve.other * jnp.maximum(elsewhere * prompt / x.mean(pieces) - f.others, 0.0)

    def held_up(own: Number) -> Number:
        """More seconds of an iteration that would take `own` on its rank: it takes as long as on the slowest one."""
        return 0.0 if crowd is None else jnp.where(x.ranks > 1, crowd.beyond(theirs, own) + crowded, 0.0)

    unheld = last
    last = last + held_up(last)
    full = full + held_up(full)
    service = x.prompt * full / budget
    if crowd is not None:
        short = jnp.where(x.ranks > 1, last - left / budget * full, 0.0)
        idle = jnp.maximum(1.0 - rate * x.mean(service), 0.0)  # no backlog fills its last iteration ...
        once = any_come(f.clustered, u) / u  # ... which those that came together share
        service = service + idle * once * jnp.maximum(short, 0.0)
    service = service + laden(x, t, rate, service, most)
    load = rate * x.mean(service)

    chance = (1.0 - jnp.exp(-n) * (1.0 - jnp.minimum(load, 1.0))) * often

    # The backlog of earlier iterations: what the queue holds, less what came in the running one.
    various = x.mean(x.prompt**2) / prompt**2
    uneven = various + x.arrival_scv - 1.0
    moments = Moments(mean=x.mean(service), square=x.mean(service**2), cube=x.mean(service**3))
    queue = gg1(rate, x.arrival_scv, moments)
    regular = jnp.exp(-2.0 * (1.0 - jnp.minimum(load, 1.0)) * budget / (3.0 * uneven * prompt))
    bulk = budget / (budget + uneven * prompt)
    backlog = jnp.maximum(queue.mean - 0.5 * jnp.sum(chance * lasts) * load * bulk, 0.0)
    queue = replace(queue, mean=backlog * regular, delayed=queue.delayed * regular)
    # requests behind, when a prompt is through: as many as wait at any time (Little), beyond those at any iteration
    behind = rate * (1.0 - pace / jnp.maximum(curve.full, pace))
    waiting = behind * queue.mean
    unlike = behind**2 * queue.mean**2 * (safe_divide(1.0 + queue.scv, queue.delayed, otherwise=1.0) - 1.0)

    # Prompts that came in the same iteration go before; those behind fill what is left of the last one.
    near, some = companions(x.arrival_scv, rate * 0.5 * lasts[:, None])
    before = near * prompt
    until = 0.5 * lasts[:, None] + queue.mean + (pieces - 1.0) * full
    after, _ = companions(x.arrival_scv, rate * until)
    fill = room * -jnp.expm1(-after * jnp.minimum(1.0, prompt / jnp.maximum(room, 1.0)))
    beside = jnp.minimum(before + fill * jnp.maximum(1.0 - before / jnp.maximum(room, 1.0), 0.0), room)
    over = some * jnp.exp(-room * some / jnp.maximum(before, 1e-9))  # those before push it over the budget
    beside = curve(left + beside) - curve(left) + beside * x.mean(x.prompt * x.extra) / prompt
    shared = beside + held_up(unheld + beside) - held_up(unheld) + over * alone
    delayed = jnp.broadcast_to(1.0 - (1.0 - some) ** 2, shared.shape)
    joined = Wait(
        mean=jnp.maximum(shared, 0.0),
        delayed=delayed,
        scv=(0.5 * various / jnp.maximum(near, 1e-9) + 1.0) * delayed - 1.0,
        utilisation=load,
        stable=load < 1.0,
    )
    base = (pieces - 1.0) * full + last
    if crowd is not None:  # ranks differ in what holds them up
        excess = jnp.maximum(theirs - unheld[:, None], 0.0)
        held = jnp.sum(excess * crowd.chance, -1)
        often_held = jnp.sum((excess > 0.0) * crowd.chance, -1)
        varying = safe_divide(jnp.sum(excess**2 * crowd.chance, -1) * often_held, held**2, otherwise=2.0) - 1.0
        held = jnp.where(x.ranks > 1, held, 0.0)
        hold = replace(joined, mean=held, delayed=often_held, scv=varying)
        joined = jax.tree.map(lambda many, one: jnp.where(x.ranks > 1, many, one), both(joined, hold), joined)
        base = base - held

    # what prompts of others add to the iterations of one answer; those after its own prompt are longer than the mean
    costs = jnp.maximum(mixed - alone + f.slowest * (x.extra - x.mean(x.prompt * x.extra) / prompt), 0.0)
    extra = costs * x.prompt / f.mix * f.anywhere / jnp.maximum(f.busy, 1e-9)
    own = last + jnp.sum(chance[:, None] * shared, axis=0)
    after = jnp.maximum(companions(x.arrival_scv, n)[0] - n - companions(x.arrival_scv, u)[0] + u, 0.0)
    wake = stolen * (1.0 - stolen**x.steps) / (1.0 - stolen) / x.steps
    noise = u * (x.mean(extra**2) + (x.arrival_scv - 1.0) * x.mean(extra) ** 2) / (1.0 - stolen) ** 2 / x.steps
    growth = t.growth / (1.0 - stolen)  # of the pace with the requests in decode, whose number varies
    each = x.mean(extra) / (1.0 - stolen) / x.steps
    seen = pace + wake * (own - pace) + (after + waiting) * each
    varied = 0.5 * (x.arrival_scv + x.mean(x.steps**2) / steps**2 - 1.0)
    peaked = 1.0 + (x.arrival_scv - 1.0) * x.overlap + x.sized
    stays = steps + x.mean(pieces)
    stay = x.mean((x.steps + pieces) * seen)
    seats = many_servers(rate, x.seats, stay, varied, peaked, stays * most.pace, t.elastic)
    return Point(
        rate=rate,
        running=n,
        load=load,
        seated=seats.utilisation,
        pace=seen,
        spread=noise + unlike * each**2 + AVERAGED * growth**2 * n / (1.0 - t.elastic) * 0.5 * (1.0 + x.arrival_scv),
        floor=t.floor,
        base=base,
        queue=both(queue, seats),
        chance=chance,
        lasts=lasts,
        joined=joined,
    )


def laden(x: Replica, t: Times, rate: Number, service: Number, most: Top) -> Number:
    """(n,) seconds that a prompt takes longer in a backlog, because decode beside it swells.

    While prompts wait, they leave prefill at its full rate, and after as many iterations as an answer has, decode is as
    large as at capacity: by then a request takes what it takes there, its own decode steps included, and the queue's
    load is the share of the capacity. A backlog that lasts for a share y of that has got y/2 of the way in the mean.
    Backlogs that make the wait last (ca^2 + cs^2) s/(1-r)^2 (the relaxation time of a diffusion), which is solved for.
    """
    f = t.flow
    n = most.capacity * x.mean(x.steps)
    budget = jnp.maximum(flights(x.sharded.plan) * x.chunk - n * (1.0 + x.draft), 1.0)
    full = full_iteration(x, n, budget, f.others) + budget * x.extra
    prompt, steps = x.mean(x.prompt), x.mean(x.steps)
    own = x.prompt * full / budget + (x.steps / steps - x.prompt / prompt) * n * t.growth * prompt / budget
    more = jnp.maximum(own, 0.0) - service

    def better(_: Number, share: Number) -> Number:
        s = service + share * more
        mean = x.mean(s)
        idle = jnp.maximum(1.0 - rate * mean, 1e-3)
        lasts = (x.arrival_scv + x.mean(s**2) / mean**2 - 1.0) * prompt / budget / idle**2
        return lasts / (2.0 * steps + lasts)

    return jax.lax.fori_loop(0, ROUNDS, better, jnp.zeros_like(rate)) * more


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


__all__ = [
    "Point",
    "Replica",
    "Times",
    "Top",
    "both",
    "point",
    "rate_at",
    "replica",
    "resident",
    "times",
    "top",
]
