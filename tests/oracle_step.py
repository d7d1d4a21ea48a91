"""Operators and one engine step of the oracle: FLOPs over attainable rates, bytes over bandwidths, rule by rule."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import oracle_network as network
from oracle_network import larger

OVERLAPS = ("none", "partial", "full", "two_batch", "shared_expert", "shallowsim")
CP_METHODS = ("auto", "ulysses", "ring", "pass_kv", "pass_q")
RATES = ("bf16", "fp8", "fp4", "int8")


# ---------------------------------------------------------------------------------------- operators


def mean_reach(start: float, span: float, limit: float, beyond: float) -> float:
    """Mean of f(x) over [start, start + span): f(x) = x below the limit, `beyond` from there on."""
    end = start + span
    if end <= limit:
        return start + span / 2
    if start >= limit:
        return beyond
    triangle = (limit - start) * (limit + start) / 2
    return (triangle + (end - limit) * beyond) / span


def keys_seen(core: Any, start: float, span: float) -> float:
    """Mean keys a query attends to: those in its window or chunk, and those of the whole (compressed) sequence."""
    local = mean_reach(start, span, core.window, core.window_fill * core.window) if core.window > 0 else 0.0
    if core.ratio == 0:
        return local
    return local + core.ratio * mean_reach(start, span, core.top_k / core.ratio, core.top_k / core.ratio)


def keys_read(core: Any, start: float, span: float, tokens: float) -> float:
    """Keys a request's step reads. `length`: mean over the span's steps of what the cache holds at their end."""
    length = ((start + tokens) + (start + span)) / 2
    local = min(length, core.window_fill * core.window + tokens) if core.window > 0 else 0.0
    return local + min(core.ratio * length, core.top_k * tokens)


def keys_kept(core: Any, length: float) -> float:
    return min(length, core.window) + core.ratio * length


def rate_of(code: float, x: Any) -> float:
    """FLOP/s of a large GEMM: the more a chip promises for each watt it may draw, the less of it is sustained."""
    c, device = x.coefficients, x.device
    for name in (RATES[int(code)], "bf16"):
        peak = getattr(device, f"peak_{name}")
        if peak * getattr(c, f"gemm_{name}") > 0:
            break
    promised = peak / device.power  # FLOP/s a watt; half of the peak remains where this is flops_per_joule
    return getattr(c, f"gemm_{name}") * peak / (1 + promised / c.flops_per_joule)


def gemm_seconds(m: float, k: float, n: float, part: tuple[float, float, float], x: Any) -> float:
    """m rows through a k x n matrix: the longer of computing and streaming, one block's walk, quantising the inputs."""
    weight_bytes, act_bytes, code = part
    c, device = x.coefficients, x.device
    if k == 0 and n == 0:
        return 0.0
    rate = rate_of(code, x)
    filling = c.gemm_k_half * rate / rate_of(0, x)  # a fixed time, so more elements where elements are faster
    compute = 2 * (m + c.gemm_m_half) * n * (k + filling) / rate
    moved = weight_bytes * k * n + m * (act_bytes * k + 2 * n)
    walk = c.gemm_walk / (1 / k + 1 / c.gemm_split)
    quantised = c.quantise_passes * m * k * (2 + act_bytes) / device.bandwidth if act_bytes < 2 else 0.0
    return larger(compute, moved / (device.bandwidth * c.memory), c.rounding) + walk + quantised


def grouped_seconds(copies: float, touched: float, routed: Any, x: Any) -> float:
    """The routed experts of a layer: `copies` rows of tokens spread evenly over the experts touched."""
    c, device, p = x.coefficients, x.device, x.plan.precision
    width = routed.width / x.plan.moe_tp
    precision = RATES[int(p.expert_rate)]
    # the unit multiplies whole tiles: int8's are those of fp8
    suffix = {"bf16": "", "fp8": "_fp8", "fp4": "_fp4", "int8": "_fp8"}[precision]
    narrow, each = getattr(c, f"expert_half{suffix}"), getattr(c, f"expert_each{suffix}")
    rows = copies / touched
    padded = rows
    if c.expert_m_half > 0:  # a partial tile wastes m_half rows, but no more than m_most times the expert's own
        padded += 1 / (1 / c.expert_m_half + 1 / (c.expert_m_most * rows))
    elements = routed.matrices * routed.d_in  # a unit of width
    compute = touched * padded * 2 * elements * (width + narrow) / (rate_of(p.expert_rate, x) * c.grouped_gemm)
    read = touched * elements * width * p.expert_bytes / (device.bandwidth * c.expert_memory)
    walk = c.expert_walk * (routed.d_in + width)
    longest = larger(larger(compute, read, c.expert_corner), walk, c.expert_corner)
    # in 16 bits: a copy's input and output in d_in, and what lies between its matrices
    permuted = copies * 2 * (2 * routed.d_in + routed.matrices * width)
    return longest + each * routed.experts / x.plan.moe_ep + c.permute_passes * permuted / device.bandwidth


def gemm_slice(gemm: Any, plan: Any, kv_heads: float) -> tuple[float, float]:
    k = gemm.k / plan.tp if gemm.split_k else gemm.k
    n = gemm.n / plan.tp if gemm.split_n else gemm.n
    return k, n + gemm.n_kv / (plan.tp if plan.tp < kv_heads else kv_heads)


def kv_heads_of(mixer: Any) -> float:
    return mixer.core.kv_heads if mixer.core is not None else 1.0


def dense_slices(ffn: Any, x: Any) -> list[tuple[float, float]]:
    if ffn.width == 0:
        return []
    width = ffn.width / x.plan.tp
    return [(x.architecture.hidden, (ffn.matrices - 1) * width), (width, x.architecture.hidden)]


def expert_slices(routed: Any, x: Any) -> list[tuple[float, float]]:
    width = routed.width / x.plan.moe_tp
    return [(routed.d_in, (routed.matrices - 1) * width), (width, routed.d_in)]


def latent_slices(routed: Any, x: Any) -> list[tuple[float, float]]:
    hidden = x.architecture.hidden
    return [(hidden, routed.latent), (routed.latent, hidden)] if routed.latent > 0 else []


def part(x: Any, name: str) -> tuple[float, float, float]:
    p = x.plan.precision
    return getattr(p, f"{name}_bytes"), getattr(p, f"{name}_act"), getattr(p, f"{name}_rate")


def has_core(mixer: Any) -> bool:
    return mixer.core is not None and mixer.core.kv_elements > 0


def has_experts(ffn: Any) -> bool:
    return ffn.routed is not None and ffn.routed.top_k > 0


def tokens_travel(x: Any) -> bool:
    return x.plan.attention_dp * x.plan.cp > 1


# ---------------------------------------------------------------------------------------- attention


def attention_seconds(mixer: Any, segments: list[Any], rank_tokens: float, x: Any) -> float:
    """Cores, indexers, recurrences of one layer."""
    plan, device, c, core = x.plan, x.device, x.coefficients, mixer.core
    stream = device.bandwidth * c.core_memory
    total = 0.0
    for seg in segments:
        if core is not None:
            heads = core.heads / plan.tp
            keys = keys_seen(core, seg.start, seg.span)
            key_bytes = plan.precision.kv_bytes * core.kv_elements / min(plan.tp, core.kv_heads)
            read = keys_read(core, seg.start, seg.span, seg.tokens) * key_bytes
            if seg.prefill:
                dims = core.score_dim + core.value_dim
                flops = 2 * heads * dims * (seg.tokens / plan.cp) * keys
                cached = ((seg.start) + (seg.start + seg.span - seg.tokens)) / 2  # before the first, the last piece
                compute = flops / (device.peak_bf16 * c.core_prefill)
                compute += 2 * core.rematerialise / plan.tp * cached / plan.cp / rate_of(0, x)
                moved = read + 2 * heads * dims * seg.tokens / plan.cp
            else:
                dims = core.score_dim_decode + core.value_dim_decode
                flops = 2 * heads * dims * seg.tokens * keys / plan.cp
                compute = flops / (device.peak_bf16 * c.core_decode)
                moved = read / plan.cp + 2 * heads * dims * seg.tokens
            total += larger(seg.requests * compute, seg.requests * moved / stream, c.rounding)
            if mixer.indexer is not None and mixer.indexer.heads > 0:
                peak = device.peak_fp8 if device.peak_fp8 > 0 else device.peak_bf16
                pairs = seg.tokens * (seg.start + seg.span / 2) * core.ratio / plan.cp
                held = ((seg.start + seg.tokens) + (seg.start + seg.span)) / 2 * core.ratio / plan.cp
                scores = 2 * mixer.indexer.heads * mixer.indexer.dim * pairs / (peak * c.core_prefill)
                total += seg.requests * (scores + mixer.indexer.dim * held / stream)
        if mixer.state is not None:
            total += seg.requests * 2 * mixer.state.state_bytes / plan.tp / stream
    if mixer.state is not None:
        total += rank_tokens * mixer.state.flops_per_token / plan.tp / (device.peak_bf16 * c.core_decode)
    return total


def sequence_seconds(core: Any, segments: list[Any], attention: float, x: Any) -> float:
    """What context parallelism sends, a layer."""
    plan, c, n = x.plan, x.coefficients, x.plan.cp
    if plan.cp_method is None or n == 1:
        return 0.0
    levels = network.shape(x.topology, n, plan.tp)
    heads = core.heads / plan.tp
    kv = 2 * core.kv_elements / min(plan.tp, core.kv_heads)
    total = 0.0
    for seg in segments:
        if not seg.prefill:
            sent = 2 * heads * (core.score_dim_decode + core.value_dim_decode) * seg.tokens * seg.requests
            total += network.all_to_all(levels, sent, c)
            continue
        queries = 2 * heads * core.score_dim * seg.tokens * seg.requests
        outputs = 2 * heads * core.value_dim * seg.tokens * seg.requests
        new_kv = kv * seg.tokens * seg.requests
        all_kv = kv * ((seg.start + seg.tokens) + (seg.start + seg.span)) / 2 * seg.requests
        hop = network.point_to_point(levels, all_kv / n, c)
        mean = (queries + outputs) / 2
        ways = {
            "ulysses": network.all_to_all(levels, (queries + outputs + new_kv) / n, c),
            "ring": (n - 1) * max(0.0, hop - attention / n),
            "pass_kv": network.all_gather(levels, all_kv, c),
            "pass_q": network.all_gather(levels, mean, c) + network.all_to_all(levels, mean, c),
        }
        method = CP_METHODS[int(plan.cp_method)]
        total += min(ways.values()) if method == "auto" else ways[method]
    return total


# ---------------------------------------------------------------------------------------- one step


def slots(routed: Any, plan: Any) -> float:
    """Experts held by the group, redundant ones too."""
    return routed.experts + (plan.eplb_replicas or 0)


def busiest_rank(without: float, experts: float, ep: float, replicas: float) -> float:
    """The fullest rank over the mean: loads (1-a) x^-a, cut at a level by the replicas, packed fullest first."""
    hottest = 1 + (without - 1) * math.sqrt(experts / ep)
    low, high = 0.0, 1 - 1 / math.log(max(experts, 3))
    for _ in range(200):
        a = (low + high) / 2
        low, high = (a, high) if (1 - a) * experts**a < hottest else (low, a)
    cut = max(replicas / experts / (a / (1 - a) + 1 - a), 1 / experts)
    level = (1 - a) / cut**a if cut < 1 else 1 / (replicas / experts + a)
    beside = (experts + replicas) / ep - 1
    return min(without, max(1.0, (level + beside * min(1 - a, level / 2)) * ep / experts))


def expert_seconds(routed: Any, group: float, sent: float, x: Any) -> tuple[float, float, float, float]:
    """Experts, latent GEMMs apart; dispatch; combine: of one layer. The busiest rank decides."""
    plan, c = x.plan, x.coefficients
    uneven = 1 + (c.imbalance - 1) * (1 - 1 / plan.moe_ep)
    if plan.eplb_replicas:
        uneven = busiest_rank(uneven, routed.experts, plan.moe_ep, plan.eplb_replicas)
    routed = SimpleNamespace(**{**vars(routed), "experts": slots(routed, plan)})
    copies = group * routed.top_k / plan.moe_ep
    touched = routed.experts / plan.moe_ep * (1 - (1 - routed.top_k / routed.experts) ** group)
    work = grouped_seconds(copies * uneven, touched, routed, x)
    if not tokens_travel(x):
        return work, work / routed.matrices, 0.0, 0.0
    levels = network.shape(x.topology, plan.moe_ep, plan.moe_tp)
    slices = network.shape(x.topology, plan.moe_tp, 1)
    p = plan.precision
    received = copies * routed.d_in * (p.dispatch_bytes + p.combine_bytes)
    spread = network.all_gather(slices, received, c) / 2
    mode = 0 if plan.dispatch is None else int(plan.dispatch)
    trips = []
    for element, back in ((p.dispatch_bytes, False), (p.combine_bytes, True)):
        trip = network.exchange(levels, sent * uneven, routed, mode, routed.d_in * element, back, c)
        trips.append(trip + spread)
    return work, work / routed.matrices, trips[0], trips[1]


def launches(matrices: list[tuple[float, float]], act_bytes: float, c: Any) -> float:
    """Kernels of these matrices; each also quantises its inputs where they are in fewer than 16 bits."""
    each = 1 + c.quantise_kernels if act_bytes < 2 else 1
    return sum(each for k, n in matrices if k * n > 0)


def arrange(rule: str, t: dict[str, float], c: Any) -> float:
    """Start to end of a layer's parts under an overlap rule."""
    compute = t["attention"] + t["shared"] + t["routed"]
    talk = t["reduce"] + t["dispatch"] + t["combine"]
    if rule == "none":
        return compute + talk
    if rule == "partial":
        return compute + (1 - c.partial_overlap) * talk
    if rule in ("full", "two_batch"):
        return max(talk, compute + c.sm_share * talk)
    if rule == "shared_expert":
        tail = t["routed"] - t["down"] + max(t["down"], t["combine"])
        return t["attention"] + t["reduce"] + max(t["shared"], t["dispatch"]) + tail
    return compute + max(0.0, talk - t["attention"] - t["shared"])


def segment(requests: float, tokens: float, start: float, span: float, prefill: bool) -> Any:
    return SimpleNamespace(requests=requests, tokens=tokens, start=start, span=span, prefill=prefill)


def stage_share(x: Any) -> float:
    """Share of the layers on the stage that has most of them."""
    layers = max(sum(m.count for m in x.architecture.mixers), sum(f.count for f in x.architecture.ffns))
    return math.ceil(layers / x.plan.pp) / layers


def step(segments: list[Any], rule_index: float, x: Any, others: float | None = None) -> dict[str, float]:
    """One engine step of one stage, with its breakdown. `others`: tokens on each other attention-DP rank."""
    arch, plan, c, device = x.architecture, x.plan, x.coefficients, x.device
    rule = OVERLAPS[int(rule_index)]
    parts = 2 if rule == "two_batch" else 1
    requests = sum(seg.requests for seg in segments)
    segments = [segment(s.requests / parts, s.tokens, s.start, s.span, s.prefill) for s in segments]
    prefill = sum(s.requests * s.tokens for s in segments if s.prefill)
    decode = sum(s.requests * s.tokens for s in segments if not s.prefill)
    rank = prefill / plan.cp + decode
    everywhere = (prefill + decode) if others is None else others / parts
    group = prefill + decode + (plan.attention_dp - 1) * everywhere
    sent = (prefill / plan.cp + decode / plan.cp) / plan.tp
    rows = decode + sum(s.requests * min(1.0, s.tokens / s.span) for s in segments if s.prefill)
    launch = c.kernel_prefill if any(s.prefill for s in segments) else c.kernel_decode
    sharded = plan.sequence_parallel is not None and plan.sequence_parallel > 0
    vectors = c.elementwise_passes / (plan.tp if sharded else 1) * arch.hidden * 2
    tp_ranks = network.shape(x.topology, plan.tp, 1)
    buffer = rank * arch.hidden * 2
    if sharded:
        reduce = 2 * network.all_gather(tp_ranks, buffer, c)
    else:
        reduce = network.all_reduce(tp_ranks, buffer, x.topology.multicast > 0, c)

    sums = dict.fromkeys(("projections", "attention", "elementwise", "sequence", "dense", "experts", "exchange"), 0.0)
    layers_mixing, layers = 0.0, sum(f.count for f in arch.ffns) * stage_share(x)
    for m in arch.mixers:
        count = m.count * stage_share(x)
        gemms = [gemm_slice(g, plan, kv_heads_of(m)) for g in m.gemms]
        kernels = launches(gemms, plan.precision.mixer_act, c) + c.elementwise_kernels
        kernels += 1 if has_core(m) else 0
        kernels += 2 if m.indexer is not None and m.indexer.heads > 0 else 0
        kernels += 2 if m.state is not None and m.state.state_bytes > 0 else 0
        attention = attention_seconds(m, segments, rank, x)
        sums["projections"] += count * sum(gemm_seconds(rank, k, n, part(x, "mixer"), x) for k, n in gemms)
        sums["attention"] += count * attention
        sums["elementwise"] += count * (rank * vectors / (device.bandwidth * c.memory) + kernels * launch)
        sums["sequence"] += count * sequence_seconds(m.core, segments, attention, x) if has_core(m) else 0.0
        layers_mixing += count
    mixing = sums["projections"] + sums["attention"] + sums["elementwise"]
    reduces, total = layers_mixing * reduce, 0.0
    for f in arch.ffns:
        count = f.count * stage_share(x)
        shapes = dense_slices(f, x)
        kernels = launches(shapes, plan.precision.ffn_act, c)
        experts, down, dispatch, combine = 0.0, 0.0, 0.0, 0.0
        if has_experts(f):
            latent = latent_slices(f.routed, x)
            kernels += 5 + launches(latent, plan.precision.ffn_act, c)
            experts, down, dispatch, combine = expert_seconds(f.routed, group, sent, x)
            experts += sum(gemm_seconds(rank, k, n, part(x, "ffn"), x) for k, n in latent)
        dense = sum(gemm_seconds(rank, k, n, part(x, "ffn"), x) for k, n in shapes) + kernels * launch
        closing = 0.0 if has_experts(f) and tokens_travel(x) else count * reduce
        share = count / layers if layers > 0 else 0.0
        times = {
            "attention": share * (mixing + sums["sequence"]),  # what a ring hides behind it is hidden already
            "shared": count * dense,
            "routed": count * experts,
            "down": count * down,
            "reduce": share * layers_mixing * reduce + closing,
            "dispatch": count * dispatch,
            "combine": count * combine,
        }
        total += arrange(rule, times, c)
        reduces += closing
        sums["dense"] += count * dense
        sums["experts"] += count * experts
        sums["exchange"] += count * (dispatch + combine)
    if layers == 0:  # nothing but mixers
        total = mixing + sums["sequence"] + layers_mixing * reduce
    sums["reduce"] = reduces
    talk = reduces + sums["exchange"] + sums["sequence"]
    fill = (reduces + sums["exchange"]) / layers if parts == 2 and layers > 0 else 0.0
    hidden = mixing + sums["dense"] + sums["experts"] + talk - total
    head = gemm_seconds(rows, arch.hidden, arch.vocab / plan.tp, (2, 2, 0), x)
    result = {key: parts * value for key, value in sums.items()}
    result |= {"head": parts * head, "hidden": parts * hidden - fill, "tokens": parts * rank}
    result["overhead"] = c.step_overhead + requests * c.request_overhead
    deep = max(layers, layers_mixing)
    result["layer"] = parts * total / deep if deep > 0 else 0.0
    result["body"] = parts * total + fill
    result["total"] = parts * (total + head) + fill + result["overhead"]
    return result
