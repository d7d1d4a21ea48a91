"""Many plans over one trace, or many closed loops, at once: the iterations of `batching` batched, and read back.

A run leaves one record an iteration. Because requests are served first in, first out, and finish at a known decode
count, every request's times are found in the records afterwards by bisection; nothing is written by request.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dse.cost.batching import MIXED, Engine, Queue, Record, State, advance, decode_steps, initial
from dse.cost.evaluate import Scenario
from dse.cost.memory import kv_bytes, memory
from dse.cost.shard import shard_scenario
from dse.cost.types import Load, Number, pytree, replace
from dse.programs import Program, program

Array = np.ndarray
PIECE = 4096  # iterations a call
BLOCK = 64  # plans a call
POINTS = 1024  # of a timeline
SEATS = 256  # requests an engine runs on a rank, at most: vLLM's long-time default


@pytree
class Requests:
    """A trace in order of arrival: [R] for all plans, or [P, R] with `count` of each plan's row in use."""

    arrival: Array  # seconds; unread in a closed loop
    isl: Array
    osl: Array
    prefix: Array  # tokens of the prompt found in the cache
    count: Array  # [] or [P]


@pytree
class Outcome:
    """[P, R] seconds, in order of arrival; NaN past a plan's last request and in plans that were not run."""

    arrival: Array
    admitted: Array
    first_token: Array
    finished: Array


@pytree
class Timeline:
    """[P, POINTS] iterations evenly over each run, NaN past its last; counts as each began, over all ranks."""

    time: Array  # seconds, of the iteration's end
    waiting: Array  # requests that had come and were not admitted
    prefilling: Array  # admitted, without a first token
    decoding: Array
    kv_share: Array  # of the fullest rank's KV space set aside
    prompt_tokens: Array  # computed in the iteration (in all its steps)
    decode_tokens: Array


@pytree
class Totals:
    """[P] over each whole run; means are over time."""

    seconds: Number
    iterations: Number
    waiting: Number
    most_waiting: Number
    queue: Number  # before their first token: waiting and prefilling
    most_queue: Number
    decoding: Number
    kv_share: Number
    most_kv_share: Number
    prompt_tokens: Number
    decode_tokens: Number


@pytree
class Simulation:
    outcome: Outcome
    timeline: Timeline
    totals: Totals
    fits: Array  # [P] whether each request fits alone in the KV space; plans that fail this were not run
    capacity: Array  # [P] KV bytes of a rank


def deal(r: Requests, ranks: int) -> Queue:
    """A trace dealt round robin to a replica's ranks."""
    wide = -(-r.isl.shape[-1] // ranks)

    def split(values: Array, fill: float) -> Array:
        padded = np.full((*values.shape[:-1], wide * ranks), fill)
        padded[..., : values.shape[-1]] = values
        return np.swapaxes(padded.reshape(*values.shape[:-1], wide, ranks), -1, -2)

    def summed(values: Array) -> Array:
        return np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)

    used = np.arange(r.isl.shape[-1]) < np.asarray(r.count)[..., None]
    prompt = np.maximum(r.isl - r.prefix, 1.0)
    isl, prompts = split(np.where(used, r.isl, 0.0), 0.0), split(np.where(used, prompt, 0.0), 0.0)
    count = np.asarray(r.count)[..., None]
    return Queue(
        count=((count - np.arange(ranks) + ranks - 1) // ranks).astype(np.int32),
        arrival=split(np.where(used, r.arrival, np.inf), np.inf),
        isl=isl,
        osl=split(np.where(used, r.osl, 1.0), 1.0),
        prompt=prompts,
        tokens=summed(prompts),
        context=summed(isl),
        pairs=summed(prompts * (isl - 0.5 * prompts)),
    )


def _engine(x: Scenario, q: Queue, policy: Number, seats: Number, clients: Number) -> Engine:
    """A plan made ready for a queue: sharded, its KV space, and what each request takes of it."""
    fits = memory(x.architecture, x.device, x.plan, x.load, x.coefficients)
    lengths = q.isl + x.coefficients.reserved_output * q.osl
    kv = jax.vmap(lambda length: kv_bytes(x.architecture, x.plan, length))(lengths)
    kv = jnp.where(jnp.arange(kv.shape[-1]) < q.count[:, None], kv, 0.0)
    return Engine(
        sharded=shard_scenario(x),
        load=x.load,
        policy=policy,
        seats=seats,
        clients=clients,
        capacity=fits.requests * fits.kv_request,
        kv=kv,
        reserved=jnp.concatenate([jnp.zeros_like(kv[:, :1]), jnp.cumsum(kv, axis=-1)], axis=-1),
    )


def _engines(shared: bool, x: Scenario, q: Queue, policy: Array, seats: Array, clients: Array) -> tuple[Engine, Number]:
    """Engines of a batch, and the KV bytes of the largest request of each."""
    made = jax.vmap(_engine, in_axes=(0, None if shared else 0, 0, 0, 0))(x, q, policy, seats, clients)
    return made, jnp.max(made.kv, axis=(1, 2))


def _piece(shared: bool, engines: Engine, q: Queue, state: State) -> tuple[State, Record, Number]:
    """Up to PIECE iterations of a batch of plans, and how many were run."""
    together = jax.vmap(advance, in_axes=(0, None if shared else 0, 0))
    shapes = jax.eval_shape(lambda: together(engines, q, state)[1])
    empty = jax.tree.map(lambda x: jnp.zeros((PIECE, *x.shape), _kept(x.dtype)), shapes)
    empty = replace(empty, time=jnp.zeros((PIECE, *shapes.time.shape)))

    def more(carry: tuple[Number, State, Record]) -> Number:
        i, s, _ = carry
        return (i < PIECE) & jnp.any(s.finished < q.count)

    def body(carry: tuple[Number, State, Record]) -> tuple[Number, State, Record]:
        i, s, log = carry
        s, record = together(engines, q, s)
        log = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new.astype(old.dtype), i, 0), log, record
        )
        return i + 1, s, log

    count, state, log = jax.lax.while_loop(more, body, (jnp.zeros((), jnp.int32), state, empty))
    return state, log, count


@cache
def _compiled(kernel: Callable[..., Any], shared: bool) -> Program:
    return program(kernel, shared)


def _kept(dtype: Any) -> Any:
    """Records are many: all but the time in 32 bits."""
    return jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32


@dataclass(frozen=True)
class _Block:
    """Plans that run together, padded to a common size by repeating the last."""

    rows: Array  # places in the whole batch, [n] with n up to `size`
    engines: Engine
    queue: Queue
    shared: bool
    slots: int

    def run(self, progress: Callable[[int], None]) -> Record:
        """All iterations, [L, P, ...]."""
        logs: list[Record] = []
        with jax.enable_x64(True):  # of this thread
            state = self.start()
            count = PIECE
            while count == PIECE:
                state, log, done = _compiled(_piece, self.shared)(self.engines, self.queue, state)
                count = int(done)
                logs.append(jax.tree.map(lambda x, n=count: np.asarray(x[:n]), log))
                progress(int(np.asarray(state.finished)[: len(self.rows)].sum()))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *logs)

    def start(self) -> State:
        size, ranks = self.engines.reserved.shape[:2]
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)), initial(ranks, self.slots))

    def compile(self) -> None:
        """Compile the program once before threads share it: a call with nothing left to do."""
        with jax.enable_x64(True):
            state = self.start()
            nothing = replace(state, finished=jnp.broadcast_to(self.queue.count, state.finished.shape))
            jax.block_until_ready(_compiled(_piece, self.shared)(self.engines, self.queue, nothing)[2])

    def plan(self, log: Record, place: int) -> tuple[Record, Queue]:
        """One plan's records, up to its last finish, and its queue."""
        queue = self.queue if self.shared else jax.tree.map(lambda x: x[place], self.queue)
        own = jax.tree.map(lambda x: x[:, place], log)
        length = int(np.searchsorted(own.finished.sum(axis=-1), int(queue.count.sum()))) + 1
        return jax.tree.map(lambda x: x[:length], own), queue


def _blocks(engines: Engine, q: Queue, shared: bool, rows: Array, slots: int, size: int) -> list[_Block]:
    """`rows` name the plans of `engines` that can run."""
    parts = []
    for start in range(0, len(rows), size):
        index = rows[np.minimum(np.arange(start, start + size), len(rows) - 1)]
        parts.append(
            _Block(
                rows=rows[start : start + size],
                engines=jax.tree.map(lambda x, i=index: x[i], engines),
                queue=q if shared else jax.tree.map(lambda x, i=index: x[i], q),
                shared=shared,
                slots=slots,
            )
        )
    return parts


def _outcome(log: Record, q: Queue, load: Load, closed: int, total: int) -> Outcome:
    """One plan's requests, from its records [L, K] and its queue [K, R]."""
    times, ranks = log.time, q.isl.shape[0]
    starts = np.concatenate([[0.0], times[:-1]])
    found = {name: np.empty(total) for name in ("arrival", "admitted", "first_token", "finished")}
    for k in range(ranks):
        n = len(range(k, total, ranks))
        order = np.arange(1, n + 1)
        first = np.searchsorted(log.prefilled[:, k], order)
        needed = np.asarray(decode_steps(q.osl[k, :n], load), np.int64)
        last = np.maximum(first, np.searchsorted(log.steps[:, k], log.steps[first, k] + needed))
        found["arrival"][k::ranks] = q.arrival[k, :n]
        found["admitted"][k::ranks] = starts[np.searchsorted(log.admitted[:, k], order)]
        found["first_token"][k::ranks] = times[first]
        found["finished"][k::ranks] = times[last]
    if closed:
        finishes = np.maximum(np.arange(total) + 1 - closed, 0)  # that must come before each request is sent
        after = np.searchsorted(log.finished.sum(axis=-1), finishes)
        found["arrival"] = np.where(finishes > 0, times[after], 0.0)
    return Outcome(**found)


def _timeline(log: Record, outcome: Outcome) -> tuple[Timeline, Totals]:
    """One plan's iterations: some to draw, and their totals; mean counts are sums of stays over the time (Little)."""
    finished, prefilled = (np.append(0, x.sum(axis=-1)[:-1]) for x in (log.finished, log.prefilled))  # at its start
    admitted = log.admitted.sum(axis=-1)
    series = {
        "waiting": log.arrived - admitted,
        "prefilling": admitted - prefilled,
        "decoding": prefilled - finished,
        "kv_share": log.kv_share,
        "prompt_tokens": log.prompt_tokens,
        "decode_tokens": log.decode_tokens,
    }
    length = len(log.time)
    shown = np.unique(np.linspace(0, length - 1, min(length, POINTS)).astype(int))
    whole = max(float(log.time[-1]), 1e-300)
    o = outcome

    def padded(values: Array) -> Array:
        return np.pad(values[shown].astype(float), (0, POINTS - len(shown)), constant_values=np.nan)

    return Timeline(time=padded(log.time), **{k: padded(v) for k, v in series.items()}), Totals(
        seconds=log.time[-1],
        iterations=length,
        waiting=(o.admitted - o.arrival).sum() / whole,
        most_waiting=series["waiting"].max(),
        queue=(o.first_token - o.arrival).sum() / whole,
        most_queue=(log.arrived - prefilled).max(),
        decoding=(o.finished - o.first_token).sum() / whole,
        kv_share=(log.kv_share * np.diff(log.time, prepend=0.0)).sum() / whole,
        most_kv_share=log.kv_share.max(),
        prompt_tokens=series["prompt_tokens"].sum(dtype=np.float64),
        decode_tokens=series["decode_tokens"].sum(dtype=np.float64),
    )


def simulate(
    scenarios: Scenario,
    requests: Requests,
    policy: Array | int = MIXED,
    seats: Array | int = SEATS,
    clients: Array | int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Serve the requests by each of P plans (leaves of `scenarios` have a leading axis P), in float64.

    `clients` > 0 is a closed loop: so many requests in flight, the next sent when one finishes; 0 takes the arrivals
    as they are. `policy` (index of POLICIES), `seats` and `clients` are of all plans or of each. Plans are grouped by
    attention-DP ranks (a program is compiled for each group) and run in blocks by `workers` threads.
    """
    ranks = np.asarray(scenarios.plan.attention_dp, np.float64).astype(int)
    plans, wide = len(ranks), requests.isl.shape[-1]
    shared = requests.isl.ndim == 1
    of_plan = [np.broadcast_to(np.asarray(x, np.float64), plans) for x in (policy, seats, clients)]
    counts = np.broadcast_to(np.asarray(requests.count, int), plans)
    results: dict[int, tuple[Outcome, Timeline, Totals]] = {}
    fits, capacity = np.zeros(plans, bool), np.zeros(plans)
    served: dict[int, int] = {}

    def work(block: _Block, mine: Array) -> None:
        def report(finished: int) -> None:
            served[int(mine[block.rows[0]])] = finished
            if progress is not None:
                progress(sum(served.values()), int(counts.sum()))

        log = block.run(report)
        with jax.enable_x64(True):
            for place, row in enumerate(mine[block.rows]):
                own, queue = block.plan(log, place)
                load = jax.tree.map(lambda x, i=row: np.asarray(x)[i], scenarios.load)
                outcome = _outcome(own, queue, load, int(of_plan[2][row]), int(counts[row]))
                results[int(row)] = (_padded(outcome, wide), *_timeline(own, outcome))

    for k in np.unique(ranks):
        mine = np.flatnonzero(ranks == k)
        part = requests if shared else jax.tree.map(lambda x, i=mine: x[i], requests)
        queue = deal(part, int(k))
        some = jax.tree.map(lambda x, i=mine: np.asarray(x)[i], scenarios)
        with jax.enable_x64(True):
            made = _compiled(_engines, shared)(some, queue, *(x[mine] for x in of_plan))
        engines, largest = jax.tree.map(np.asarray, made)
        capacity[mine] = engines.capacity
        fits[mine] = (largest <= engines.capacity) & (engines.capacity > 0)
        able = np.flatnonzero(fits[mine])
        if not len(able):
            continue
        slots = 1 << int(min(of_plan[1][mine].max(), queue.isl.shape[-1]) - 1).bit_length()
        size = min(BLOCK, -(-len(able) // workers))
        blocks = _blocks(engines, queue, shared, able, slots, size)
        blocks[0].compile()
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda block, mine=mine: work(block, mine), blocks))
    return _gathered(results, plans, wide, fits, capacity)


def _padded(outcome: Outcome, wide: int) -> Outcome:
    return jax.tree.map(lambda x: np.pad(x, (0, wide - len(x)), constant_values=np.nan), outcome)


def _gathered(
    results: dict[int, tuple[Outcome, Timeline, Totals]], plans: int, wide: int, fits: Array, capacity: Array
) -> Simulation:
    """Results in the order of the plans; NaN where a plan was not run."""
    nothing = Outcome(**{f.name: np.full(wide, np.nan) for f in fields(Outcome)})
    empty = Timeline(**{f.name: np.full(POINTS, np.nan) for f in fields(Timeline)})
    none = Totals(**{f.name: np.nan for f in fields(Totals)})
    rows = [results.get(i, (nothing, empty, none)) for i in range(plans)]
    outcome, timeline, totals = jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *rows)
    return Simulation(outcome=outcome, timeline=timeline, totals=totals, fits=fits, capacity=capacity)


def simulate_closed(scenarios: Scenario, waves: int = 10, spread: float = 1.0, seed: int = 0, **how: Any) -> Simulation:
    """Closed loops as benchmark tools run them: `load.concurrency` clients, `waves` requests each, all start at once.

    Lengths are drawn uniformly from `spread` x the nominal ones up to them (vLLM's and SGLang's random range ratio),
    whole tokens; spread 1 sends the nominal lengths. The prefix hit is that share of each prompt.
    """
    load = scenarios.load
    clients = np.asarray(load.concurrency, np.float64)
    counts = (clients * waves).astype(int)
    rng = np.random.default_rng(seed)
    shape = (len(clients), int(counts.max()))

    def lengths(nominal: Array) -> Array:
        top = np.round(np.asarray(nominal, np.float64))[:, None]
        low = np.maximum(np.ceil(top * spread), 1.0)
        return np.minimum(low + np.floor(rng.random(shape) * (top - low + 1.0)), top)

    isl, osl = lengths(load.isl), lengths(load.osl)
    requests = Requests(
        arrival=np.zeros(shape),
        isl=isl,
        osl=osl,
        prefix=np.floor(isl * np.asarray(load.prefix_hit)[:, None]),
        count=counts,
    )
    how = {"seats": np.maximum(clients, 1.0)} | how
    return simulate(scenarios, requests, clients=clients, **how)


__all__ = ["Outcome", "Requests", "Simulation", "Timeline", "Totals", "simulate", "simulate_closed"]
