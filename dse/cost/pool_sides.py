"""What a worker of either pool is to the other and to its users, and the way of a request between them."""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost import collectives as coll
from dse.cost.coefficients import Coefficients
from dse.cost.collectives import Line
from dse.cost.evaluate import Scenario, gpus_of_replica
from dse.cost.memory import kv_bytes
from dse.cost.pool_queue import Journey, company
from dse.cost.pool_steps import PrefillTimes
from dse.cost.serving import accepted_of, steps_to_token
from dse.cost.types import Architecture, Load, Number, Plan, Topology, pytree
from dse.numerics import safe_divide


@pytree
class Sender:
    """A prefill worker, priced: all that a decode pool and its users must know of it. Seconds; USD/h and W a worker."""

    idle: Number  # as in PrefillTimes
    busy: Number
    more: Number
    longest: Number
    service: Number
    stage: Number
    chunks: Number
    prompts: Number
    ranks: Number  # attention-DP ranks
    gpus: Number
    holders: Number  # GPUs that hold a part (or a copy) of one request's KV cache
    arrival: Number  # overhead of a request
    first_wave: Number  # weight of the first wave
    turns: Number  # steps like its own that a prompt takes beside others
    price: Number
    power: Number


@pytree
class Receiver:
    """A decode worker, priced. Bytes, seconds; USD/h and W a worker."""

    gpus: Number
    holders: Number
    cache: Number  # KV bytes a GPU, one request's prompt
    ranks: Number  # attention-DP ranks
    idle_seats: Number  # of a rank
    price: Number
    power: Number


def request_ranks(plan: Plan) -> Number:
    """GPUs that hold a part (or a copy) of one request's KV cache."""
    return plan.tp * plan.cp * plan.pp


def link(
    topologies: tuple[Topology, Topology],
    c: tuple[Coefficients, Coefficients],
    gpus: Number,
    apart: Number,
    free: Number,
) -> Line:
    """Seconds by bytes of one GPU's flow from the first side (prefill) to the second.

    The slowest level that the deployment's GPUs span: node, rack, network. Pools in different clusters (`apart`) are
    joined by the outermost levels of both.
    """
    lines = []
    for topology, coefficients in zip(topologies, c, strict=True):
        whole = jnp.prod(jnp.stack([jnp.asarray(level.size) for level in topology.levels]))
        span = jnp.where(apart > 0, jnp.maximum(gpus, whole), gpus)
        lines.append(coll.point_to_point(topology, coll.group(topology, span, 1.0), coefficients))
    paid = jnp.where(free > 0, 0.0, 1.0)
    return Line(
        fixed=paid * (jnp.maximum(lines[0].fixed, lines[1].fixed) + c[1].transfer_base),
        per_byte=paid * jnp.maximum(lines[0].per_byte, lines[1].per_byte),
    )


def layer_count(arch: Architecture) -> Number:
    """Layers that keep a cache or a state."""
    return jnp.maximum(sum((m.count for m in arch.mixers), start=jnp.zeros(())), 1.0)


def sender(x: Scenario, times: PrefillTimes) -> Sender:
    gpus = gpus_of_replica(x.plan)
    return Sender(
        idle=times.idle,
        busy=times.busy,
        more=times.more,
        longest=times.longest,
        service=times.service,
        stage=times.stage,
        chunks=times.chunks,
        prompts=times.prompts,
        ranks=x.plan.attention_dp,
        gpus=gpus,
        holders=request_ranks(x.plan),
        arrival=x.coefficients.arrival_overhead * jnp.ones_like(gpus),
        first_wave=jnp.minimum(x.coefficients.first_wave, 1.0) / jnp.maximum(x.load.waves, 1.0),
        # Below one it mends how wide the mixed steps of an undivided engine are: a pool has none
        turns=jnp.maximum(x.coefficients.turns, 1.0) * jnp.ones_like(gpus),
        price=gpus * x.device.price,
        power=gpus * x.device.power,
    )


def burdens(s: Sender) -> list[Number]:
    """What a prefill worker makes its users wait by: more of any of these never shortens `in_flight`'s TTFT(N).

    Seconds, turns, and (negated) ranks that share them, GPUs that send a request's cache, steps at whose end others may
    start, prompts of a full step.
    """
    seconds = [s.idle, s.busy, s.more, s.longest, s.service / s.ranks, s.stage, s.arrival, s.first_wave, s.turns]
    return [*seconds, -s.ranks, -s.holders, -s.chunks, -s.prompts]


def receiver(x: Scenario, ffn: Scenario | None = None) -> Receiver:
    """A decode worker; with the GPUs of its experts where they are its own."""
    gpus = gpus_of_replica(x.plan)
    experts = jnp.zeros_like(gpus) if ffn is None else gpus_of_replica(ffn.plan)
    device = x.device if ffn is None else ffn.device
    return Receiver(
        gpus=gpus + experts,
        holders=request_ranks(x.plan),
        cache=kv_bytes(x.architecture, x.plan, x.load.isl),
        ranks=x.plan.attention_dp * jnp.ones_like(gpus),
        idle_seats=x.coefficients.idle_seats * jnp.ones_like(gpus),
        price=gpus * x.device.price + experts * device.price,
        power=gpus * x.device.power + experts * device.power,
    )


def journey(
    a: Sender, b: Receiver, line: Line, workers: tuple[Number, Number], layers: Number, layerwise: Number
) -> tuple[Journey, Number]:
    """The journey, and the most requests/s that the prefill pool and the link allow.

    The busiest NIC carries what a decode GPU takes in, or what a prefill GPU sends out; a cached prefix travels too,
    and so does each copy (MLA or few KV heads under TP).
    """
    servers = workers[0] * a.ranks
    sides = jnp.minimum(workers[0] * a.gpus, workers[1] * b.gpus)
    trip = Journey(
        idle=a.idle,
        busy=a.busy,
        more=a.more,
        full=a.longest,
        service=a.service,
        stage=a.stage,
        chunks=a.chunks,
        prompts=a.prompts,
        workers=workers[0],
        servers=servers,
        fixed=a.arrival + line.fixed,
        travel=line.per_byte * b.cache * jnp.maximum(1.0, b.holders / a.holders),
        layers=layers,
        layerwise=layerwise,
        first_wave=a.first_wave,
        turns=a.turns,
        decoders=workers[1] * b.ranks,
        idle_seats=b.idle_seats,
    )
    moved = line.per_byte * b.cache * b.holders
    return trip, jnp.minimum(servers / a.service, safe_divide(sides, moved, otherwise=1e12))


def answer(load: Load, tpot: Number) -> Number:
    """Seconds from the first token to the last."""
    return jnp.maximum(load.osl - 1.0, 1e-3) * tpot


def first_token(x: Scenario, running: Number, tpot: Number) -> Number:
    """Seconds to the first token of a decode worker that computes it itself, from the cache's arrival.

    As prompts of an undivided engine: `turns` decode steps beside others, and half a step until one ends.
    """
    beside = company(running / x.plan.attention_dp)
    turns = steps_to_token(jnp.maximum(x.coefficients.turns, 1.0), beside)
    return accepted_of(x.load) * tpot * (turns + 0.5 * beside)


__all__ = [
    "Receiver",
    "Sender",
    "answer",
    "burdens",
    "first_token",
    "journey",
    "layer_count",
    "link",
    "receiver",
    "request_ranks",
    "sender",
]
