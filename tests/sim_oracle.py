"""A serving engine as a plain event loop, one step at a time, one list of requests a rank: the simulator's oracle.

Only the price of a step is the cost model's; scheduling, memory and clocks are written out by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from dse.cost.evaluate import Scenario
from dse.cost.memory import kv_bytes, memory
from dse.cost.serving import cycle
from dse.cost.shard import shard
from dse.cost.step import Batch, Segment, step
from dse.cost.types import replace


@dataclass
class Request:
    number: int
    arrival: float
    isl: int
    osl: int
    prefix: int = 0
    done: int = 0  # prompt tokens computed
    given: float = 0.0  # tokens generated after the first
    admitted: float = math.nan
    first_token: float = math.nan
    finished: float = math.nan

    @property
    def todo(self) -> int:
        return max(self.isl - self.prefix, 1) - self.done


@dataclass
class Rank:
    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)


@dataclass
class Plan:
    """One plan's numbers, and its price of a step."""

    chunk: float
    draft: float
    accepted: float
    flights: float
    ranks: int
    capacity: float
    kv: Callable[[Request], float]
    price: Callable[..., float]
    most_used: float = 0.0


def plan_of(x: Scenario) -> Plan:
    load, c = x.load, x.coefficients
    draft = 0.0 if load.draft_tokens is None else float(load.draft_tokens)
    accepted = sum(min(float(load.acceptance), 1 - 1e-6) ** i for i in range(int(draft) + 1))
    fits = memory(x.architecture, x.device, x.plan, x.load, c)
    sharded = shard(x.architecture, x.device, x.topology, x.plan, c)
    length = jax.jit(lambda n: kv_bytes(x.architecture, x.plan, n))
    flights = float(x.plan.microbatches) or float(x.plan.pp)

    @jax.jit
    def mixed(share: Any, full: Any, micro: Any, p: Any, t: Any, start: Any, n: Any, ctx: Any) -> Any:
        s = replace(sharded, plan=replace(sharded.plan, attention_dp=share))
        prompts = Segment(requests=p / full, tokens=t, start=start, span=t)
        answers = Segment(requests=n / micro, tokens=1 + draft, start=ctx, span=1 + draft)
        parts = {
            "prefill": step(s, Batch(prefill=prompts, decode=None), x.plan.overlap_prefill),
            "decode": step(s, Batch(prefill=None, decode=answers), x.plan.overlap_decode),
            "both": step(s, Batch(prefill=prompts, decode=answers), x.plan.overlap_prefill),
        }
        return {name: (cycle(s, one, draft, micro), one.body) for name, one in parts.items()}

    def price(share: float, pieces: list[tuple[int, int]], contexts: list[float], drained: bool) -> float:
        tokens = sum(n for _, n in pieces)
        chunks = min(max(math.ceil(tokens / float(load.chunk)), 1), flights)
        micro = min(max(chunks, len(contexts)), flights)
        mean = tokens / len(pieces) if pieces else 1.0
        pairs = sum(n * (start + n / 2) for start, n in pieces)
        start = pairs / tokens - mean / 2 if tokens else 0.0
        context = sum(contexts) / len(contexts) if contexts else 0.0
        kind = "both" if pieces and contexts else "prefill" if pieces else "decode"
        numbers = mixed(share, chunks, micro, float(len(pieces)), mean, start, float(len(contexts)), context)[kind]
        fill = (chunks - 1) * float(numbers[1]) if drained and float(x.plan.pp) > 1 else 0.0
        return float(numbers[0]) + fill

    return Plan(
        chunk=float(load.chunk),
        draft=draft,
        accepted=accepted,
        flights=flights,
        ranks=int(x.plan.attention_dp),
        capacity=float(fits.requests * fits.kv_request),
        kv=lambda r: float(length(r.isl + float(c.reserved_output) * r.osl)),
        price=price,
    )


def run(plan: Plan, requests: list[Request], policy: str, seats: int, ranks: int, clients: int = 0) -> list[Request]:
    """Serve them all; the requests come back with their times."""
    coming, engines = list(requests), [Rank() for _ in range(ranks)]
    now, finished = 0.0, 0
    while finished < len(requests):
        while coming and (coming[0].number < clients + finished if clients else coming[0].arrival <= now):
            r = coming.pop(0)
            r.arrival = now if clients else r.arrival
            engines[r.number % ranks].waiting.append(r)
        plans = [_schedule(plan, engine, policy, seats, now) for engine in engines]
        if not any(pieces or decode for pieces, decode in plans):
            now = coming[0].arrival
            continue
        work = [sum(n for _, n in pieces) + len(decode) * (1 + plan.draft) for pieces, decode in plans]
        now += max(
            plan.price(
                sum(work) / own,
                [(r.isl - max(r.isl - r.prefix, 1) + r.done, n) for r, n in pieces],
                [r.isl + r.given for r in decode],
                all(
                    r.todo == dict((q.number, n) for q, n in pieces).get(r.number, 0) for r in engine.running if r.todo
                ),
            )
            for own, engine, (pieces, decode) in zip(work, engines, plans, strict=True)
            if own
        )
        for engine, (pieces, decode) in zip(engines, plans, strict=True):
            for r in decode:
                r.given += plan.accepted
            for r, n in pieces:
                r.done += n
                if not r.todo:
                    r.first_token = now
            for r in [r for r in engine.running if not r.todo and 1 + r.given >= r.osl - 1e-9]:
                r.finished = now
                engine.running.remove(r)
                finished += 1
    return requests


def _schedule(
    plan: Plan, engine: Rank, policy: str, seats: int, now: float
) -> tuple[list[tuple[Request, int]], list[Request]]:
    """Admit in order, then pick prompt pieces and requests to decode."""
    shut = policy == "decode" and any(not r.todo for r in engine.running)
    while engine.waiting and len(engine.running) < seats and not shut:
        used = sum(plan.kv(r) for r in [*engine.running, engine.waiting[0]])
        if used > plan.capacity * (1 + 1e-12):
            break
        plan.most_used = max(plan.most_used, used)
        r = engine.waiting.pop(0)
        r.admitted = now
        engine.running.append(r)
    decode = [r for r in engine.running if not r.todo]
    budget = int(plan.flights * plan.chunk)
    if policy != "prefill":
        budget -= int(len(decode) * (1 + plan.draft))
    if policy == "decode" and decode:
        budget = 0
    pieces = []
    for r in engine.running:
        n = min(r.todo, max(budget, 0))
        if n:
            pieces.append((r, n))
            budget -= n
    return pieces, [] if policy == "prefill" and pieces else decode


def times(requests: list[Request]) -> np.ndarray:
    """[4, R]: arrival, admitted, first token, finished."""
    rows = [[r.arrival, r.admitted, r.first_token, r.finished] for r in sorted(requests, key=lambda r: r.number)]
    return np.array(rows).T
