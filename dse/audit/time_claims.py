"""Claims about time: prefill, TTFT, decode, throughput, and the targets."""

from __future__ import annotations

from dse.audit.judge import agrees, finding, unknown
from dse.audit.layouts import written_shards
from dse.audit.price import Desk, span
from dse.audit.quantity import between, digits, said
from dse.audit.types import Claim, Finding, Layout, Quantity, Span, Verdict


def missing(desk: Desk) -> str:
    """What a time cannot be worked out without."""
    names = [n for n, x in (("mfu", desk.plan.mfu), ("bandwidth_utilisation", desk.plan.utilisation)) if x is None]
    return " and ".join(names)


def _timed(claim: Claim, desk: Desk, computed: Span, floor: float, why: str, numbers: dict[str, Span]) -> Finding:
    """Faster than the peaks allow is impossible; without MFU or bandwidth utilisation there is only that floor."""
    assert claim.quantity is not None
    if claim.quantity.high < 0.95 * floor:
        text = f"at least {said(floor, 'seconds')}"
        why = f"{desk.layout.gpus:g} GPUs need {said(floor, 'seconds')} at 100% of their peaks; {why}"
        return finding(claim, computed, why, verdict="impossible", numbers=numbers, text=text)
    if missing(desk):
        text = f"at least {said(floor, 'seconds')}"
        why = f"{missing(desk)} missing: only the floor at 100% of the peaks is known; {why}"
        return unknown(claim, why, text, numbers)
    return finding(claim, computed, why, numbers=numbers)


def _flops(desk: Desk, length: float) -> Span:
    """FLOPs of the whole batch: causal of the lightest reading to full attention of the heaviest."""
    works = [desk.prefill(v, length) for v in desk.plan.variants]
    n = desk.layout.gpus
    return min(w.flops for w in works) * n, max(w.flops + w.attention for w in works) * n


def _prefill(claim: Claim, desk: Desk, length: float) -> Finding:
    assert claim.quantity is not None
    computed = desk.prefill_seconds(length)
    flops = _flops(desk, length)
    n = desk.layout.gpus
    one = (computed[0] * n, computed[1] * n)
    batch = desk.plan.workload.batch
    why = (
        f"{batch:g} × {length:g} tokens are {between(flops, 'FLOP')} (causal to full attention): "
        f"{between(computed, 'seconds')} on {n:g} GPUs"
    )
    numbers = {"flops": flops, "one_gpu": one}
    if n > 1 and not agrees(claim.quantity, computed) and agrees(claim.quantity, (one[0] * 0.85, one[1] * 1.15)):
        why += f"; {between(one, 'seconds')} is the time of one GPU"
    elif n > 1:
        why += f"; one GPU would take {between(one, 'seconds')}"
    floor = min(desk.floor(desk.prefill(v, length)) for v in desk.plan.variants)
    return _timed(claim, desk, computed, floor, why, numbers)


def prefill_time(claim: Claim, desk: Desk) -> Finding:
    low, high = desk.plan.workload.prompt
    if claim.length is None and low != high:
        ends = [desk.prefill_seconds(x) for x in (low, high)]
        computed = f"{between(ends[0], 'seconds')} at {low:g} tokens, {between(ends[1], 'seconds')} at {high:g}"
        numbers = {"shortest": ends[0], "longest": ends[1]}
        return unknown(claim, "it does not say at which prompt length", computed, numbers)
    return _prefill(claim, desk, claim.length or high)


def ttft(claim: Claim, desk: Desk) -> Finding:
    """A batch that arrives at once: the time of all its prompts."""
    return _prefill(claim, desk, claim.length or desk.plan.workload.prompt[1])


def decode_latency(claim: Claim, desk: Desk) -> Finding:
    w = desk.plan.workload
    lengths = (claim.length,) if claim.length else tuple(x for x in desk.lengths if x <= w.longest)
    if not claim.length and w.output:
        lengths = (w.prompt[0], w.longest)
    at = {x: desk.decode_seconds(x) for x in lengths}
    computed = span([s for found in at.values() for s in found])
    ways = digits(desk.layout.attention_dp * desk.layout.tp * desk.layout.replicas)
    listed = ", ".join(f"{between(s, 'seconds')} at {x:g} tokens" for x, s in at.items())
    rates = {x: _rates(desk, s) for x, s in at.items()}
    why = f"weights and cache read once a step, attention sharded {ways} ways: {listed}"
    why += f"; that is {', '.join(between(r, 'tokens/s') for r in rates.values())} a GPU"
    numbers = {f"decode_seconds_{x:g}": s for x, s in at.items()} | {f"decode_rate_{x:g}": r for x, r in rates.items()}
    shards = written_shards(desk.plan)
    if shards is not None and shards < desk.layout.attention_dp * desk.layout.tp:
        d = desk.plan.degrees
        x = desk.layout
        alone = Layout("", float(d.tp or 1), float(d.pp or 1), 1.0, 1.0, x.moe_tp, x.moe_ep, float(d.dp or 1))
        slow = span([desk.seconds(desk.decode(v, max(lengths), alone)) for v in desk.plan.variants])
        numbers["as_written"] = slow
        why += f"; with the degrees as written (DP={d.dp}, TP={d.tp}) {between(slow, 'seconds')} at {max(lengths):g}"
    floor = min(desk.floor(desk.decode(v, x)) for v in desk.plan.variants for x in lengths)
    return _timed(claim, desk, computed, floor, why, numbers)


def _rates(desk: Desk, seconds: Span) -> Span:
    """Output tokens/s a GPU of a step time."""
    each = desk.plan.workload.batch / desk.layout.gpus
    return each / seconds[1], each / seconds[0]


def throughput_gpu(claim: Claim, desk: Desk) -> Finding:
    return _throughput(claim, desk, 1.0)


def throughput(claim: Claim, desk: Desk) -> Finding:
    """Of the whole deployment, unless it says "a GPU"."""
    return _throughput(claim, desk, desk.layout.gpus)


def _throughput(claim: Claim, desk: Desk, gpus: float) -> Finding:
    """Decode or prefill? By the words; else whichever the plan's own times imply, and what it comes to a GPU."""
    assert claim.quantity is not None
    rates = {"decode": _decode_rates(desk), "prefill": _prefill_rates(desk)}
    scaled: dict[str, Span] = {phase: (low * gpus, high * gpus) for phase, (low, high) in rates.items()}
    numbers = {f"{phase}_gpu": r for phase, r in rates.items()}
    both = ", ".join(f"{phase} {between(r, 'tokens/s')} a GPU" for phase, r in rates.items())
    whose = "a GPU" if claim.kind == "throughput_gpu" else "system-wide"
    phase = _phase(claim.text)
    if phase:
        fastest = scaled[phase][1] / min(desk.mfu, desk.utilisation)
        if claim.quantity.low > 1.05 * fastest:
            why = f"the peaks allow {said(fastest, 'tokens/s')} {whose} in {phase}; {both}"
            return finding(claim, scaled[phase], why, verdict="impossible", numbers=numbers)
        if missing(desk):
            why = f"{missing(desk)} missing; at 100% of the peaks: {both}"
            return unknown(claim, why, f"at most {said(fastest, 'tokens/s')}", numbers)
        return finding(claim, scaled[phase], f"{phase}, {whose}: {both}", numbers=numbers)
    held = next((p for p, r in scaled.items() if agrees(claim.quantity, r)), None)
    if held is not None and not missing(desk):
        return finding(claim, scaled[held], f"{held}, {whose}: {both}", numbers=numbers)
    implied, why = _implied(desk, numbers)
    if implied is not None:
        text = f"{between(implied, 'tokens/s')} by its own times; {both}"
        why = f"it is prefill, {whose}: {why}; computed: {both}"
        return finding(claim, implied, why, verdict="wrong", numbers=numbers, text=text)
    return unknown(claim, "it does not say whether of prefill or decode", both, numbers)


def _phase(text: str) -> str:
    words = text.lower()
    if "prefill" in words or "input" in words or "prompt" in words:
        return "prefill"
    return "decode" if "decode" in words or "output" in words or "generat" in words else ""


def _implied(desk: Desk, numbers: dict[str, Span]) -> tuple[Span | None, str]:
    """The prefill rate that the plan's own prefill time and TTFT come to."""
    w, n = desk.plan.workload, desk.layout.gpus
    parts: list[str] = []
    system: Span | None = None
    for c in desk.plan.claims:
        if c.kind not in ("prefill_time", "ttft") or c.quantity is None or c.quantity.low <= 0:
            continue
        length = c.length or w.prompt[1]
        rates = (w.batch * length / c.quantity.high, w.batch * length / c.quantity.low)
        own = (rates[0] / n, rates[1] / n)
        numbers[f"implied_{c.kind}"], numbers[f"implied_{c.kind}_gpu"] = rates, own
        if c.kind == "prefill_time" or system is None:
            system = rates
        name = "prefill time" if c.kind == "prefill_time" else "TTFT"
        parts.append(
            f"its own {name} at {length:g} tokens makes {between(rates, 'tokens/s')} in all, "
            f"{between(own, 'tokens/s')} a GPU"
        )
    target = desk.plan.targets.throughput
    if parts and target is not None and target.per_gpu:
        low = min(v[0] for k, v in numbers.items() if k.startswith("implied_") and k.endswith("_gpu"))
        if low < target.low:
            parts[-1] += f", which misses the target of {said(target.low, 'tokens/s')} a GPU"
    return system, "; ".join(parts)


def _decode_rates(desk: Desk) -> Span:
    w = desk.plan.workload
    return span([r for x in {w.prompt[0], w.longest} for r in _rates(desk, desk.decode_seconds(x))])


def _prefill_rates(desk: Desk) -> Span:
    w = desk.plan.workload
    found = []
    for x in set(w.prompt):
        seconds = desk.prefill_seconds(x)
        found += [w.batch * x / desk.layout.gpus / s for s in seconds]
    return span(found)


# ----------------------------------------------------------------------------------------------- targets


def targets(desk: Desk) -> list[Finding]:
    """Does the plan, as computed, meet what it is for?"""
    t, w = desk.plan.targets, desk.plan.workload
    found = []
    if t.ttft is not None:
        what = f"{w.batch:g} × {w.prompt[1]:g} tokens"
        found.append(_limit(desk, "TTFT", t.ttft, desk.prefill_seconds(w.prompt[1]), what))
    if t.tpot is not None:
        what = f"at {w.longest:g} tokens of context"
        found.append(_limit(desk, "TPOT", t.tpot, desk.decode_seconds(w.longest), what))
    if t.throughput is not None:
        wanted = t.throughput.low / (1.0 if t.throughput.per_gpu else desk.layout.gpus)
        found += [_rate_target(desk, phase, wanted) for phase in ((t.phase,) if t.phase else ("prefill", "decode"))]
    return found


def _limit(desk: Desk, name: str, q: Quantity, computed: Span, where: str) -> Finding:
    gap = missing(desk)
    verdict: Verdict = "holds" if computed[1] <= q.high else "wrong"
    if gap and computed[0] <= q.high:
        verdict = "unknown"
    text = between(computed, "seconds")
    why = f"{where}: {text} under {desk.layout.name}" + (f" at 100% of the peaks; {gap} missing" if gap else "")
    claimed = f"{name} < {said(q.high, 'seconds')}"
    return Finding(f"target: {name}", verdict, claimed, text, why, {name.lower(): computed})


def _rate_target(desk: Desk, phase: str, wanted: float) -> Finding:
    """In decode the cache bounds the rate at any batch: bandwidth / bytes a cached token / context."""
    rates = _prefill_rates(desk) if phase == "prefill" else _decode_rates(desk)
    numbers: dict[str, Span] = {f"{phase}_gpu": rates}
    verdict: Verdict = "holds" if rates[0] >= wanted else "wrong"
    why = f"over the {'prompts' if phase == 'prefill' else 'contexts'} of the workload under {desk.layout.name}"
    longest = desk.plan.workload.longest
    limit = context_limit(desk, wanted) if phase == "decode" else None
    if limit is not None:
        numbers["context_limit"] = (limit, limit)
    if limit is not None and limit < longest:
        verdict = "impossible"
        stream = float(desk.plan.device.bandwidth) * desk.utilisation
        token = desk.kv_sequence(desk.plan.variants[0], longest) / longest
        why = (
            f"bandwidth: beyond {round(limit)} tokens of context no batch reaches it: {said(stream, 'bytes')}/s ÷ "
            f"{digits(token / 1024)} KiB a token ÷ {said(wanted, 'tokens/s')} = {digits(limit)} tokens; {why}"
        )
    claimed = f"{said(wanted, 'tokens/s')} a GPU in {phase}"
    name = f"target: throughput ({phase})"
    return Finding(name, verdict, claimed, f"{between(rates, 'tokens/s')} a GPU", why, numbers)


def context_limit(desk: Desk, wanted: float) -> float | None:
    """The context beyond which reading the cache alone keeps decode under `wanted` tokens/s a GPU, at any batch.

    bandwidth / (bytes a cached token) / rate; for caches that grow evenly with the context.
    """
    v, longest = desk.plan.variants[0], desk.plan.workload.longest
    whole, half = desk.kv_sequence(v, longest), desk.kv_sequence(v, longest / 2.0)
    if whole <= 0 or abs(whole - 2.0 * half) > 0.01 * whole:
        return None  # windows, states: no single price a token
    return float(desk.plan.device.bandwidth) * desk.utilisation / (whole / longest) / wanted


CHECKS = {
    "prefill_time": prefill_time,
    "ttft": ttft,
    "decode_latency": decode_latency,
    "throughput": throughput,
    "throughput_gpu": throughput_gpu,
}

__all__ = ["CHECKS", "context_limit", "missing", "targets"]
