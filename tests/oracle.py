"""The cost model once more, as slow plain Python on one scenario: nested dicts in, nested dicts out.

Written from the formulas, with loops and ifs, by definitions rather than by the closed forms of `dse.cost`, so that the
two share no code and no algebra. Keys are those of `Scenario` and `Estimate`. `oracle_step` has the operators and the
engine step, `oracle_network` the collectives.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import oracle_network as network
from oracle_step import (
    dense_slices,
    expert_slices,
    gemm_slice,
    has_experts,
    keys_kept,
    kv_heads_of,
    latent_slices,
    segment,
    slots,
    stage_share,
    step,
    tokens_travel,
)

LINE = 0.15  # unevenness of arrivals
BESIDE = 2.0  # prompts of others beside an own one, over the mean


def names(tree: Any) -> Any:
    """Dicts as attributes."""
    if isinstance(tree, dict):
        return SimpleNamespace(**{key: names(value) for key, value in tree.items()})
    if isinstance(tree, list | tuple):
        return [names(item) for item in tree]
    return tree


def area(shapes: list[tuple[float, float]]) -> float:
    return sum(k * n for k, n in shapes)


# ------------------------------------------------------------------------------------------- memory


def weight_bytes(x: Any, drafted: float) -> float:
    """The fullest stage: its layers' matrices as sharded, norms and tables in 16 bits."""
    arch, plan, p = x.architecture, x.plan, x.plan.precision
    layers = 0.0
    for m in arch.mixers:
        elements = area([gemm_slice(g, plan, kv_heads_of(m)) for g in m.gemms])
        layers += m.count * (elements * p.mixer_bytes + m.extra_params * 2)
    for f in arch.ffns:
        size = area(dense_slices(f, x)) * p.ffn_bytes + f.extra_params * 2
        if has_experts(f):
            size += slots(f.routed, plan) / plan.moe_ep * area(expert_slices(f.routed, x)) * p.expert_bytes
            size += area(latent_slices(f.routed, x)) * p.ffn_bytes
        layers += f.count * size
    tables = arch.embeddings if plan.pp == 1 else 1
    total = layers * stage_share(x) + tables * arch.vocab * arch.hidden / plan.tp * 2 + arch.other_params * 2
    if drafted > 0:
        total += arch.mtp_params * p.expert_bytes / max(plan.moe_ep * plan.moe_tp, plan.tp)
    return total


def cache_bytes(x: Any, length: float) -> float:
    """One request's keys, values, index keys and states on one GPU."""
    plan, total = x.plan, 0.0
    for m in x.architecture.mixers:
        if m.core is not None:
            heads = plan.tp if plan.tp < m.core.kv_heads else m.core.kv_heads
            kept = keys_kept(m.core, length) * m.core.kv_elements * plan.precision.kv_bytes
            total += m.count * kept / heads / plan.cp
            if m.indexer is not None and m.indexer.heads > 0:
                total += m.count * m.indexer.dim * m.core.ratio * length / plan.cp
        if m.state is not None:
            total += m.count * m.state.state_bytes / plan.tp
    return total * stage_share(x)


def activation_bytes(x: Any, tokens: float, rows: float) -> float:
    arch, plan = x.architecture, x.plan
    widths = [0.0]
    for m in arch.mixers:
        widths += [sum(gemm_slice(g, plan, kv_heads_of(m))) for g in m.gemms]
    for f in arch.ffns:
        widths += [k + n for k, n in dense_slices(f, x)]
        if has_experts(f):
            up_k, up_n = expert_slices(f.routed, x)[0]
            copies = f.routed.top_k if tokens_travel(x) else f.routed.top_k / plan.moe_ep
            widths.append(copies * (up_k + up_n))
    spread = plan.tp if plan.sequence_parallel else 1
    return tokens * 2 * (2 * arch.hidden / spread + max(widths)) + rows * arch.vocab / plan.tp * 4


def memory(x: Any) -> dict[str, float]:
    arch, plan, load, c = x.architecture, x.plan, x.load, x.coefficients
    drafted = load.draft_tokens or 0.0
    asked = max(load.concurrency / plan.attention_dp, 1.0)
    rows = asked * (1 + drafted)
    tokens = min(load.chunk, load.isl * (1 - load.prefix_hit) * asked) / plan.cp + rows
    buffers = c.communication_buffer if plan.tp * plan.pp * plan.attention_dp * plan.cp > 1 else 0.0
    if tokens_travel(x) and plan.moe_ep > 1:
        buffers += 2 * tokens * arch.hidden * (plan.precision.dispatch_bytes + plan.precision.combine_bytes)
    result = {
        "weights": weight_bytes(x, drafted),
        "activations": activation_bytes(x, tokens, rows),
        "buffers": buffers,
        "reserve": c.runtime_reserve + c.graph_reserve,
    }
    usable = x.device.capacity * c.utilisation
    one = cache_bytes(x, load.isl + c.reserved_output * load.osl)
    free = usable - sum(result.values())
    fits = free / one if one > 0 and free > 0 else 0.0
    result |= {"kv_request": one, "kv": asked * one, "usable": usable, "requests": fits}
    result["total"] = result["weights"] + result["activations"] + result["buffers"] + result["reserve"] + result["kv"]
    return result


# ------------------------------------------------------------------------------------------ serving


def tokens_a_step(drafted: float, chance: float) -> float:
    """The token verified for sure, then each drafted one as long as all before it were accepted."""
    return sum(chance**i for i in range(int(drafted) + 1))


def clamp(value: float, low: float, high: float) -> float:
    return max(low, min(value, high))


def larger_root(x: float, q: float) -> float:
    """The L >= max(x, 0) with L (L - x) = q, by bisection."""
    low = max(x, 0.0)
    high = low + math.sqrt(q)
    for _ in range(400):
        middle = (low + high) / 2
        low, high = (low, middle) if middle * (middle - x) > q else (middle, high)
    return (low + high) / 2


def busy_ranks(ranks: int, own: float, other: float) -> tuple[float, float]:
    """The chance that any rank has prompts (ours by one chance, others by another), and how many then have."""
    some, weighted = 0.0, 0.0
    for k in range(ranks):  # busy ones among the others
        chance = math.comb(ranks - 1, k) * other**k * (1 - other) ** (ranks - 1 - k)
        some += chance * (own if k == 0 else 1.0)
        weighted += chance * (k + own)
    return some, weighted / some if some > 0 else 1.0


def at_least_one(mean: float) -> float:
    """Mean of a Poisson count that is known not to be nought."""
    if mean > 30:
        return mean
    term, total, weighted = 1.0, 0.0, 0.0  # P(k) over P(0)
    for k in range(1, 200):
        term *= mean / k
        total += term
        weighted += k * term
    return weighted / total if total > 0 else 1.0


def rhythm(x: Any, fits: float) -> Any:
    """Steps a request needs, and the prompt tokens that the others bring to each step of one micro-batch."""
    plan, load = x.plan, x.load
    static = load.static_batch is not None and load.static_batch > 0
    asked = max(load.concurrency / plan.attention_dp, 1.0)
    running = asked if fits < 1 else min(fits, asked)
    flights = min(plan.microbatches if plan.microbatches > 0 else plan.pp, running)
    n = running / flights
    others = max(n - 1, 0.0)
    prompt = max(load.isl * (1 - load.prefix_hit), 1.0)
    pieces = prompt / load.chunk if prompt > load.chunk else 1.0
    verified = 1 + (load.draft_tokens or 0.0)
    accepted = tokens_a_step(load.draft_tokens or 0.0, load.acceptance)
    answer = max(load.osl - 1, 1e-3) / accepted  # decode steps of a request
    deciding = 1.0 if static else answer / (answer + pieces)  # part of a request's steps in which it decodes
    # A prompt token a step brings 1/prompt requests a step, which then decode in `answer` steps each: what a step's
    # chunk holds where prompts never end.
    saturated = load.chunk * prompt / (prompt + verified * answer)
    budget = max(load.chunk - n * deciding * verified, saturated)
    waves = load.waves * asked / running
    # Requests of every other rank over those of ours: as many where all ranks have some
    spread = (load.concurrency / asked - 1) / (plan.attention_dp - 1) if plan.attention_dp > 1 else 0.0
    first = (
        1.0 if static else min(x.coefficients.first_wave / waves, 1.0)
    )  # share of requests that start with all others
    # Half of the others' prompts came before theirs
    seen, alive = (0.0, 1.0) if static else (1 - first / 2, 1 - 1 / (6 * waves))
    return SimpleNamespace(
        static=static,
        asked=asked,
        running=running,
        flights=flights,
        n=n,
        others=others,
        prompt=prompt,
        pieces=pieces,
        piece=prompt / pieces,
        verified=verified,
        accepted=accepted,
        answer=answer,
        deciding=deciding,
        budget=budget,
        first=first,
        alive=alive,
        arriving=seen * others * prompt / (answer + pieces),
        theirs=seen * prompt / (answer + pieces) * n * spread,
    )


def serve(x: Any, fits: float) -> dict[str, Any]:
    """TTFT and TPOT of one static batch or of the closed loop."""
    plan, load, c, pp = x.plan, x.load, x.coefficients, x.plan.pp
    loop = rhythm(x, fits)
    static, asked, running, flights, n = loop.static, loop.asked, loop.running, loop.flights, loop.n
    others, prompt, pieces, piece = loop.others, loop.prompt, loop.pieces, loop.piece
    accepted, answer, arriving, budget = loop.accepted, loop.answer, loop.arriving, loop.budget
    drafted, start, ranks = load.draft_tokens or 0.0, load.isl - prompt, round(plan.attention_dp)
    priority = c.prefill_priority or 0.0

    mix = clamp(arriving, min(piece, budget), budget)
    busy = arriving / mix if arriving < mix else 1.0
    if static:
        held = n
        beside = min(n, others)
    else:
        shared = min(loop.alive * n * loop.deciding, answer * budget / prompt + loop.deciding)
        held = (1 - priority) * shared + priority * loop.alive * n
        beside = min(held, others * loop.deciding)
    wave = clamp(running * prompt, piece, load.chunk)

    def decoding(requests: float) -> Any:
        return segment(requests, loop.verified, load.isl, load.osl, prefill=False)

    def prompts(tokens: float) -> Any:
        return segment(tokens / piece, piece, start, prompt, prefill=True)

    packed = clamp(loop.theirs, min(piece, budget), budget)
    some, many = busy_ranks(ranks, busy, min(loop.theirs / packed, 1.0))
    elsewhere = beside * loop.verified + (mix * (many - 1) / (ranks - 1) if ranks > 1 else 0.0)
    decode = step([decoding(held)], plan.overlap_decode, x)
    mixed = step([prompts(mix), decoding(beside)], plan.overlap_prefill, x, others=elsewhere)
    prefill = step([prompts(wave)], plan.overlap_prefill, x)
    boundary = network.shape(x.topology, pp, plan.tp * plan.attention_dp * plan.cp)

    def hop(t: dict[str, float]) -> float:
        return network.point_to_point(boundary, t["tokens"] * 2 * x.architecture.hidden / plan.tp, c)

    def period(t: dict[str, float]) -> float:
        body, head = t["body"] + drafted * t["layer"], t["head"] * (1 + drafted)
        return max(pp * body + (pp - 1) * hop(t) + head + t["overhead"], flights * (body + head))

    def through(t: dict[str, float], steps: float) -> float:
        return steps * t["total"] + (pp - 1) * (t["body"] + hop(t))

    # Steps of the shared policy, and what a token beyond those they are priced for costs
    t_decode, t_mixed, token = period(decode), period(mixed), prefill["total"] / wave
    apart = (1 - some) * t_decode + some * t_mixed
    wide = min(budget, min(piece, budget) + BESIDE * arriving)
    steps = max(pieces, prompt / wide)
    own = through(mixed, steps) + (steps * (wide - mix) * token if wide > mix else 0.0)
    each = prompt / budget
    line = larger_root(others * each - answer - pieces, LINE * others * each**2)
    late = apart / 2 * min(others, 1.0)  # into the middle of the step that follows an answer's last
    between = min(others, 1.0)  # a request alone meets no steps of others, and all seats free
    shared = own + between * (c.turns - 1) * own + line * (t_mixed + (budget - mix) * token) + late

    # All prompts at once, one behind the other: half way between the first and the last of them (static: the last)
    last = running * prompt / wave
    burst = through(prefill, max(1.0, last if static else (max(prompt / wave, 1.0) + last) / 2))

    # Prompts first: those of others in a decode step of ours, and of another rank's
    def rush(tokens: float) -> tuple[float, float]:
        prompts_a_step = tokens / prompt * (answer + pieces) / answer
        return prompts_a_step, clamp(at_least_one(prompts_a_step) * prompt, piece, load.chunk)

    (arrivals, together), (foreign, packed) = rush(arriving), rush(loop.theirs)
    prefilling = foreign * prompt / packed  # steps of prompts for each of decode, on another rank
    chance = prefilling / (prefilling + 1)
    met = chance * packed + (1 - chance) * held * loop.verified
    alone = step([prompts(together)], plan.overlap_prefill, x, others=met)
    longer = max(period(alone) - t_decode, 0.0)  # a decode step while any other rank has prompts
    stall = arrivals * prompt / together * period(alone) + busy_ranks(ranks, 0.0, chance)[0] * longer
    paused = t_decode + (1 - c.cohort / 2) * stall
    company = prompt * (1 + 2 * arrivals)
    width = clamp(company, piece, load.chunk)
    count = max(pieces, (1 + company / width) / 2)
    ahead = late + through(alone, count) + count * (width - together) * token

    tpot = ((1 - priority) * apart + priority * paused) / accepted
    first = loop.first
    apiece = (1 - priority) * shared + priority * ahead
    served = first * burst + (1 - first) * max(apiece, c.cohort * burst + (1 - c.cohort) * apiece)
    least = first * through(prefill, pieces) + (1 - first) * own
    outside = asked - running
    outside *= 1 - outside / (asked * load.waves) / 2  # they have gone in at the end of the run
    empty = 0.0 if static else between * c.idle_seats
    admission = (outside + empty) / (running - empty) * (served + max(load.osl - 1, 0.0) * tpot)
    return {
        "ttft": c.arrival_overhead + served + admission,
        "tpot": tpot,
        "queue": max(served - least, 0.0) + admission,
        "running": running,
        "decode": decode,
        "mixed": mixed,
        "prefill": prefill,
    }


def price(scenario: dict[str, Any]) -> dict[str, Any]:
    """All that `estimate` returns, for one scenario."""
    x = names(scenario)
    plan, load = x.plan, x.load
    space = memory(x)
    served = serve(x, space["requests"])
    replica = plan.tp * plan.attention_dp * plan.cp * plan.pp
    e2e = served["ttft"] + max(load.osl - 1, 0.0) * served["tpot"]
    rate = load.concurrency / e2e
    output = rate * load.osl / replica
    return {
        "ttft": served["ttft"],
        "tpot": served["tpot"],
        "e2e": e2e,
        "output_rate": output,
        "total_rate": rate * (load.osl + load.isl) / replica,
        "user_rate": 1 / served["tpot"],
        "request_rate": rate * plan.replicas,
        "gpus": replica * plan.replicas,
        "usd_per_mtok": x.device.price / 3600 / output * 1e6,
        "joules_per_token": x.device.power / output,
        "memory": space,
        "served": served,
    }
