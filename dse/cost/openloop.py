"""Open loop: the steady state of a replica to which requests come at a rate, whoever is being served.

One attention-DP rank is a queue. An iteration decodes n requests and carries up to B prompt tokens (the step's token
budget less what decode takes). Everything is a function of u, the requests that arrive in one iteration:
- Little's law: n = u * decode steps a request; u * prompt tokens a request are prefilled an iteration. So the mean
  iteration T(u) is explicit, and the rate is R = u / T(u), which rises with u: no fixed point has to be iterated.
  A request in decode sees n and Var[n]/n more (itself; a burst's companions), so TPOT = T at that many.
- TTFT = rest of the running iteration + backlog + own iterations, shared with prompts that came in the same one.
  Backlog: a queue of service L T(B)/B a prompt of L tokens (P-K, or G/G/1 for bursts) that slows down as it lasts
  (`backlog`), times Kraemer and Langenbach-Belz's factor of regular services, because an iteration takes in all that
  fits: exp(-2(1-r)B/(3 v L)), v = cs^2 + ca^2 the variance of the work that comes over the square of its mean.
- KV space and the engine's limit of running requests are K seats; where all are taken, requests wait for one. Their
  number is a process of its own (`occupancy`), whose spread is also TPOT's.
What iterations carry is in `flow`, what they take in `iterations` and `pace`. Ignored: preemption, correlated bursts.
Domain, against the step simulator (`python benchmarks/openloop.py`): mean error at 20, 50, 80% of the capacity (worst
at 80%) of the cases developed on; of held-out cases looked at meanwhile; of those of a seed drawn once, afterwards.
- Poisson arrivals, one rank: TTFT 1, 2, 2% (10); 1, 2, 5% (40: prompts of 4.4k tokens that vary by 1.3 times their
  mean, beyond the model's context); 1, 2, 2% (9). P90 4, 2, 4%; 2, 2, 6%; 2, 3, 4%. P99 5, 5, 10%; 4, 7, 11%; 6, 7,
  13%. TPOT 1-2%, its P90 2-5%.
- Bursts of coefficient of variation 2: TTFT 5, 5, 4% (14); 6, 5, 3% (10); 7, 7, 13% (64). P90 6, 5, 6%; 8, 5, 7%; 8,
  7, 16%. Of 3: TTFT 6, 6, 9% (19); 7, 4, 6% (18); 8, 7, 15% (87). P90 7, 5, 13%; 5, 5, 13%; 9, 6, 25%. P99 3-10%,
  but 15-60% at 80%, where waits for seats are rare and long: the worst, twofold too high, have little KV space and
  answers of unlike lengths. TPOT 3-10%, its P90 5-15%.
- Pipelines: TTFT 1, 3, 5% (14); 2, 3, 7% (26); 1, 2, 4% (18). P90 3-6%, P99 4-12%. TPOT 2, 4, 9%; 2, 3, 5%; 1, 2, 4%.
- Attention DP: TTFT 2, 5, 13% (55); 1, 2, 4% (13); 2, 3, 12% (76). P90 6, 8, 18%; 3, 5, 8%; 4, 5, 16%. P99 6-26%.
  TPOT 2-8%. Worst, and low, with eight ranks of long prompts of which a few are far longer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dse.cost.backlog import at_capacity, backlog
from dse.cost.flow import Slowest, lockstep, slowest_of
from dse.cost.iterations import Replica, pieces_of
from dse.cost.lengths import DEVIATES, SHARES
from dse.cost.occupancy import Occupancy, occupancy
from dse.cost.pace import FULLEST, Times, Top, times
from dse.cost.queueing import Wait, any_come, both, companions
from dse.cost.types import Number, pytree, replace
from dse.numerics import safe_divide, safe_sqrt

IDLE = 0.5  # see `queue_of`


@pytree
class Point:
    """A replica at u arrivals an iteration and rank."""

    rate: Number  # to the rank
    running: Number  # in decode, a rank
    pace: Number  # (n,) seconds of an iteration, mean over an answer, as its request sees them
    spread: Number  # (n,) variance of that mean
    floor: Number  # seconds of an iteration with one request
    base: Number  # (n,) seconds from the next iteration on, where nobody else waits
    queue: Wait
    chance: Number  # (k,) that a request finds an iteration of kind k running: decode only, short and long mixed ones
    lasts: Number  # (k,) seconds
    joined: Wait  # (k, n) what prompts that share its last iteration add


def seats_of(x: Replica, rate: Number, t: Times, most: Top) -> Occupancy:
    """Requests that hold a seat, and the wait for one."""
    varied = x.mean(x.steps**2) / x.mean(x.steps) ** 2 - 1.0
    peaked = 1.0 + (x.arrival_scv - 1.0) * x.overlap + x.sized
    there, stays = most.numbers(x.stay), x.stay * most.paces
    return occupancy(rate, x.seats, there, stays, x.arrival_scv, varied, peaked, t.elastic)


@pytree
class Others:
    """The rank that has most of the others, in the iteration of a prompt's last piece: ranks step together."""

    slowest: Slowest
    seconds: Number  # (n,) an iteration of what it has
    crowded: Number  # more for the tokens of all others
    found: Number  # (k, 2, n) as `seconds`, behind an iteration of kind k, where it has fewer pieces or more of them
    chance: Number  # (k, 1, n) of each


def others_of(x: Replica, t: Times, u: Number) -> Others | None:
    """None where no rank waits for another."""
    if not lockstep(x):
        return None
    f, (lasts, often) = t.flow, t.kinds()
    pieces = x.mean(pieces_of(x, f.budget))
    # on other ranks come as many as here in the iteration that it finds; and there are pieces of longer prompts
    come = t.rate(u) * jnp.sum(often * lasts) + u * (pieces - 1.0) * jnp.sum(often[1:]) / f.anywhere
    elsewhere = (x.ranks - 1.0) * come
    slowest = slowest_of(x, f.budget, elsewhere, x.ranks - 1.0)
    # a long iteration is followed by a long one: more have come meanwhile
    going_on = u * (pieces - 1.0) / f.anywhere * jnp.array([0.0, 1.0, 1.0])
    after = (x.ranks - 1.0) * (t.rate(u) * lasts + going_on)
    found = jax.vmap(lambda count: slowest_of(x, f.budget, count, x.ranks - 1.0))(after)
    fewer = jnp.maximum(found.tokens - found.wide, 0.0)
    return Others(
        slowest=slowest,
        seconds=t.curve.of(x, slowest.tokens),
        crowded=t.curve.other * jnp.maximum(elsewhere * x.mean(x.prompt) / pieces - f.others, 0.0),
        found=jnp.stack([t.curve.of(x, tokens) for tokens in (fewer, found.tokens + found.wide)], 1),
        chance=0.5 * found.chance[:, None],
    )


def held_up(x: Replica, others: Others | None, own: Number) -> Number:
    """More seconds of an iteration that would take `own` on its rank: it takes as long as on the slowest one."""
    if others is None:
        return jnp.zeros_like(own)
    return jnp.where(x.ranks > 1, others.slowest.beyond(others.seconds, own) + others.crowded, 0.0)


@pytree
class Own:
    """(n,) The iterations of a prompt's own pieces, where no other prompt is in them."""

    pieces: Number
    left: Number  # tokens of the last piece
    room: Number  # beside it
    full: Number  # seconds of those before the last ...
    last: Number  # ... and of the last,
    unheld: Number  # if no rank had to wait for another

    @property
    def base(self) -> Number:
        return (self.pieces - 1.0) * self.full + self.last


def own_iterations(x: Replica, t: Times, others: Others | None) -> Own:
    f, curve = t.flow, t.curve
    pieces = pieces_of(x, f.budget)
    left = x.prompt - (pieces - 1.0) * f.budget
    full = curve.full + f.budget * x.extra
    last = curve.of(x, left) + (1.0 - f.busy) * x.lone
    last = last - t.follow * (curve(f.budget) - curve.full)  # with prompts behind it the pipeline stays filled
    return Own(
        pieces=pieces,
        left=left,
        room=jnp.maximum(f.budget - left, 0.0),
        full=full + held_up(x, others, full),
        last=last + held_up(x, others, last),
        unheld=last,
    )


def service_of(x: Replica, t: Times, u: Number, own: Own, others: Others | None) -> Number:
    """(n,) seconds that a prompt takes of a prefill that never ends."""
    budget, rate = t.flow.budget, t.rate(u)
    service = x.prompt * own.full / budget
    if others is None:
        return service
    short = jnp.where(x.ranks > 1, own.last - own.left / budget * own.full, 0.0)
    idle = jnp.maximum(1.0 - rate * x.mean(service), 0.0)  # no backlog fills its last iteration ...
    once = any_come(t.flow.clustered, u) / u  # ... which those that came together share
    return service + idle * once * jnp.maximum(short, 0.0)


def queue_of(x: Replica, t: Times, rate: Number, service: Number, most: Top, seats: Occupancy, found: Number) -> Wait:
    """Wait for the prompts of earlier iterations: what the queue holds, less what came in the running one, which
    lasts `found` seconds in the mean."""
    f, prompt = t.flow, x.mean(x.prompt)
    # prefill is idle for half of what the capacity leaves at least: the queue has no end only where that has none
    longest = (1.0 - IDLE * jnp.maximum(1.0 - FULLEST * rate / most.rate, 0.0)) / rate
    service, slow = (s * jnp.minimum(longest / x.mean(s), 1.0) for s in (service, at_capacity(x, t, most)))
    more = service * jnp.maximum(x.mean(slow) / x.mean(service) - 1.0, 0.0)
    # sizes of the batch: lognormal about its mean, as wide as it is in the long run
    sizes = jnp.exp(safe_sqrt(jnp.log1p(seats.variance / seats.mean**2)) * jnp.array(DEVIATES))
    sizes = f.running * sizes / jnp.sum(sizes * jnp.array(SHARES))
    full = most.u * x.mean(x.steps)
    states = jnp.clip((sizes - f.running) / jnp.maximum(full - f.running, 1e-3 * full), -2.0, 1.0)
    stay = x.mean(x.steps + pieces_of(x, f.budget)) * t.pace
    wait = backlog(x, rate, service, more, stay, states, jnp.array(SHARES))
    load = jnp.minimum(rate * x.mean(service), 1.0)
    uneven = x.various + x.arrival_scv - 1.0
    regular = jnp.exp(-2.0 * (1.0 - load) * f.budget / (3.0 * uneven * prompt))
    bulk = f.budget / (f.budget + uneven * prompt)
    earlier = jnp.maximum(wait.mean - 0.5 * found * load * bulk, 0.0)
    return replace(wait, mean=earlier * regular, delayed=wait.delayed * regular)


def joined_of(
    x: Replica, t: Times, rate: Number, own: Own, others: Others | None, lasts: Number, queued: Number
) -> tuple[Wait, Number, Number]:
    """What prompts of others add to the last iteration of a prompt: the wait (k, n) by the kind of iteration that was
    running, and its mean without that for other ranks; (n,) what of the prompt's own iterations is part of the former.

    Prompts that came in the same iteration go before; those behind fill what is left of the last one.
    """
    curve, prompt = t.curve, x.mean(x.prompt)
    near, some = companions(x.arrival_scv, rate * 0.5 * lasts[:, None])
    before = near * prompt
    after, _ = companions(x.arrival_scv, rate * (0.5 * lasts[:, None] + queued + (own.pieces - 1.0) * own.full))
    fill = own.room * -jnp.expm1(-after * jnp.minimum(1.0, prompt / jnp.maximum(own.room, 1.0)))
    beside = before + fill * jnp.maximum(1.0 - before / jnp.maximum(own.room, 1.0), 0.0)
    beside = jnp.minimum(beside, own.room)
    over = some * jnp.exp(-own.room * some / jnp.maximum(before, 1e-9))  # those before push it over the budget
    beside = curve(own.left + beside) - curve(own.left) + beside * x.mean_extra
    shared = held_up(x, others, own.unheld + beside) - held_up(x, others, own.unheld) + beside + over * t.alone
    delayed = jnp.broadcast_to(1.0 - (1.0 - some) ** 2, shared.shape)
    joined = Wait(
        mean=jnp.maximum(shared, 0.0),
        delayed=delayed,
        scv=(0.5 * x.various / jnp.maximum(near, 1e-9) + 1.0) * delayed - 1.0,
        utilisation=jnp.zeros_like(rate),
        stable=jnp.asarray(True),
    )
    if others is None:
        return joined, shared, jnp.zeros_like(own.left)
    # ranks differ in what holds them up
    excess = jnp.maximum(others.found[:, None] - own.unheld[:, None, None], 0.0)  # (k, n, 2, n)
    weights = others.chance[:, None]
    held, square = (jnp.sum(excess**power * weights, (-2, -1)) for power in (1, 2))
    often = jnp.sum((excess > 0.0) * weights, (-2, -1))
    varying = safe_divide(square * often, held**2, otherwise=2.0) - 1.0
    held = jnp.where(x.ranks > 1, held, 0.0)
    hold = replace(joined, mean=held, delayed=often, scv=varying)
    joined = jax.tree.map(lambda many, one: jnp.where(x.ranks > 1, many, one), both(joined, hold), joined)
    return joined, shared, jnp.where(x.ranks > 1, others.slowest.beyond(others.seconds, own.unheld), 0.0)


def paces_of(x: Replica, t: Times, u: Number, own: Number, queue: Wait, seats: Occupancy) -> tuple[Number, Number]:
    """(n,) seconds of an iteration, mean over an answer, as its request sees them, and the variance of that mean.
    `own` (n,): seconds of the last iteration of its prompt, which is longer than the mean, as are those that follow."""
    f, n, rate = t.flow, t.flow.running, t.rate(u)
    kept = 1.0 - t.stolen
    # what prompts of others add to the iterations of one answer, and their number beyond the mean
    costs = jnp.maximum(t.mixed - t.alone + f.slowest * (x.extra - x.mean_extra), 0.0)
    extra = costs * x.prompt / f.mix * f.anywhere / jnp.maximum(f.busy, 1e-9)
    each = x.mean(extra) / kept / x.steps
    after = jnp.maximum(companions(x.arrival_scv, n)[0] - n - companions(x.arrival_scv, u)[0] + u, 0.0)
    # requests behind, when a prompt is through: as many as wait at any time (Little), beyond those at any iteration
    behind = rate * (1.0 - t.pace / jnp.maximum(t.curve.full, t.pace))
    unlike = behind**2 * queue.mean**2 * (safe_divide(1.0 + queue.scv, queue.delayed, otherwise=1.0) - 1.0)
    # they make its iterations full ones, and no more than that
    slowest = jnp.maximum(t.curve.full - t.pace, 1e-9)
    full = -jnp.expm1(-(after + behind * queue.mean) * each / slowest)
    backed = jnp.minimum(unlike * each**2, slowest**2 * full * (1.0 - full))
    wake = t.stolen * (1.0 - t.stolen**x.steps) / kept / x.steps
    noise = u * (x.mean(extra**2) + (x.arrival_scv - 1.0) * x.mean(extra) ** 2) / kept**2 / x.steps
    # an answer averages over its own length the number of those beside it, which forgets at the rate (1-e)/stay
    y = 1.0 - t.elastic
    swing = 2.0 * (jnp.exp(-y) - 1.0 + y) / y**2 * (t.growth / kept) ** 2 * seats.variance
    return t.pace + wake * (own - t.pace) + slowest * full, noise + backed + swing


def point(x: Replica, u: Number, most: Top) -> Point:
    """The steady state at u arrivals an iteration (0 < u < `most.capacity`)."""
    t = times(x, u)
    n, rate = t.flow.running, t.rate(u)
    lasts, often = t.kinds()
    others = others_of(x, t, u)
    own = own_iterations(x, t, others)
    service = service_of(x, t, u, own, others)
    load = rate * x.mean(service)
    chance = (1.0 - jnp.exp(-n) * (1.0 - jnp.minimum(load, 1.0))) * often
    seats = seats_of(x, rate, t, most)
    queue = queue_of(x, t, rate, service, most, seats, jnp.sum(chance * lasts))
    joined, shared, held = joined_of(x, t, rate, own, others, lasts, queue.mean)
    pace, spread = paces_of(x, t, u, own.last + chance @ shared, queue, seats)
    return Point(
        rate=rate,
        running=n,
        pace=pace,
        spread=spread,
        floor=t.floor,
        base=own.base - held,
        queue=both(queue, seats.wait),
        chance=chance,
        lasts=lasts,
        joined=joined,
    )


__all__ = ["Point", "point"]
