"""The cost model once more, as slow plain Python on one scenario: nested dicts in, nested dicts out.

Written from the formulas, with loops and ifs, by definitions rather than by the closed forms of `dse.cost`, so that the
two share no code and no algebra. Keys are those of `Scenario` and `Estimate`. `oracle_step` has the operators and the
engine step, `oracle_network` the collectives.
"""

from __future__ import annotations

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
    stage_share,
    step,
    tokens_travel,
)


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
            size += f.routed.experts / plan.moe_ep * area(expert_slices(f.routed, x)) * p.expert_bytes
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
    accepted = tokens_a_step(load.draft_tokens or 0.0, load.acceptance)
    answer = max(load.osl - 1, 1e-3) / accepted  # decode steps of a request
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
        accepted=accepted,
        answer=answer,
        arriving=0.0 if static else others * prompt / (answer + pieces),
    )


def serve(x: Any, fits: float) -> dict[str, Any]:
    """TTFT and TPOT of one static batch or of the closed loop."""
    plan, load, c, pp = x.plan, x.load, x.coefficients, x.plan.pp
    loop = rhythm(x, fits)
    static, asked, running, flights, n = loop.static, loop.asked, loop.running, loop.flights, loop.n
    others, prompt, pieces, piece = loop.others, loop.prompt, loop.pieces, loop.piece
    accepted, answer, arriving = loop.accepted, loop.answer, loop.arriving
    drafted, start = load.draft_tokens or 0.0, load.isl - prompt
    mix = clamp(arriving, piece, load.chunk)
    busy = min(arriving / mix, 1.0)
    if static:
        held, beside = n, min(n, others)
    elif arriving > load.chunk:
        held = answer * mix / prompt + answer / (answer + pieces)
        beside = min(held, others * answer / (answer + pieces))
    else:
        held, beside = n * answer / (answer + pieces), others * answer / (answer + pieces)
    wave = clamp(running * prompt, piece, load.chunk)

    def decoding(requests: float) -> Any:
        return segment(requests, 1 + drafted, load.isl, load.osl, prefill=False)

    def prompts(tokens: float) -> Any:
        return segment(tokens / piece, piece, start, prompt, prefill=True)

    decode = step([decoding(held)], plan.overlap_decode, x)
    mixed = step([prompts(mix), decoding(beside)], plan.overlap_prefill, x)
    prefill = step([prompts(wave)], plan.overlap_prefill, x)
    boundary = network.shape(x.topology, pp, plan.tp * plan.attention_dp * plan.cp)

    def hop(t: dict[str, float]) -> float:
        return network.point_to_point(boundary, t["tokens"] * 2 * x.architecture.hidden / plan.tp, c)

    def period(t: dict[str, float]) -> float:
        body, head = t["body"] + drafted * t["layer"], t["head"] * (1 + drafted)
        return max(pp * body + (pp - 1) * hop(t) + head + t["overhead"], flights * (body + head))

    def through(t: dict[str, float], steps: float) -> float:
        return steps * t["total"] + (pp - 1) * (t["body"] + hop(t))

    tpot = ((1 - busy) * period(decode) + busy * period(mixed)) / accepted
    own, alone = through(mixed, pieces), through(prefill, pieces)
    if static:
        served = through(prefill, max(running * prompt / wave, 1.0))
    else:
        load_factor = arriving / load.chunk
        line = others / 2
        if load_factor < 1:
            line = min(line, load_factor / (2 * (1 - load_factor)))
        backlog = max(n - held - mix / piece, 0.0) * prompt / mix
        waiting = max(line * pieces, backlog) * mixed["total"] + (decode["total"] / 2 if others > 0 else 0.0)
        burst = through(prefill, max((running + 1) / 2 * prompt / wave, 1.0))
        first = min(c.first_wave / load.waves, 1.0)
        served = first * burst + (1 - first) * (own + waiting)
        alone = first * alone + (1 - first) * own
    admission = (asked - running) / running * (served + max(load.osl - 1, 0.0) * tpot)
    return {
        "ttft": c.arrival_overhead + served + admission,
        "tpot": tpot,
        "queue": max(served - alone, 0.0) + admission,
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
