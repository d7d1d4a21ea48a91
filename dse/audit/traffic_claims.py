"""Claims about communication and balance: bytes, shares of the time, overheads of TP, capacity factor, imbalance."""

from __future__ import annotations

import math

from dse.audit.judge import finding, unknown
from dse.audit.layouts import is_moe
from dse.audit.price import Desk, span
from dse.audit.quantity import between, digits, said
from dse.audit.time_claims import missing
from dse.audit.types import Claim, Finding, Quantity, Span, Verdict

LINKS = (450e9, 50e9)  # GPUs of one node, of several: for plans that state no links


def _links(desk: Desk) -> tuple[float, ...]:
    """The stated link that the plan crosses, or two usual ones."""
    return (desk.slowest_link(),) if desk.plan.network.link is not None else LINKS


def _at_links(desk: Desk, size: float) -> tuple[str, dict[str, Span]]:
    seconds = {link: size / link for link in _links(desk)}
    text = ", ".join(f"{said(s, 'seconds')} at {digits(link / 1e9)} GB/s" for link, s in seconds.items())
    return text, {f"seconds_{link / 1e9:g}": (s, s) for link, s in seconds.items()}


def expert_communication(claim: Claim, desk: Desk) -> Finding:
    """Copies of a token leave for the experts' GPUs and their results come back."""
    assert claim.quantity is not None
    if not is_moe(desk.plan):
        return unknown(claim, f"{desk.plan.variants[0].entry.name} has no experts")
    at = claim.length or desk.plan.workload.prompt[1]
    work = desk.prefill(desk.plan.variants[0], at)
    ep = desk.layout.moe_ep
    remote = (ep - 1.0) / ep
    text, seconds = _at_links(desk, work.exchange)
    batch = f"{desk.plan.workload.batch:g} × {at:g} tokens"
    why = (
        f"{ep - 1:g}/{ep:g} of the copies are for experts of other GPUs: {said(work.exchange, 'bytes')} a GPU sent for "
        f"{batch}, dispatch and combine: {text}"
    )
    if ep == 1:
        why = "all experts are on every GPU that computes them: nothing travels between GPUs for routing"
    size = (work.exchange, work.exchange)
    none = claim.quantity.high == 0.0
    verdict: Verdict | None = ("holds" if work.exchange == 0.0 else "wrong") if none else None
    return finding(claim, size, why, verdict=verdict, numbers={"remote_share": (remote, remote), **seconds})


def communication_bytes(claim: Claim, desk: Desk) -> Finding:
    at = claim.length or desk.plan.workload.prompt[1]
    works = [desk.prefill(v, at) for v in desk.plan.variants]
    computed = span([w.exchange + w.reduce for w in works])
    text, seconds = _at_links(desk, computed[1])
    why = (
        f"one prefill of {desk.plan.workload.batch:g} × {at:g} tokens sends {said(works[0].exchange, 'bytes')} a GPU "
        f"to experts and {said(works[0].reduce, 'bytes')} in all-reduces: {text}"
    )
    return finding(claim, computed, why, numbers=seconds)


def communication_share(claim: Claim, desk: Desk) -> Finding:
    """Of the prefill, nothing hidden: K/(C + K)."""
    at = claim.length or desk.plan.workload.prompt[1]
    shares: dict[float, Span] = {}
    for link in _links(desk):
        found = []
        for v in desk.plan.variants:
            w = desk.prefill(v, at)
            k = desk.link_seconds(w, link)
            found += [k / (k + desk.seconds(w, full)) for full in (False, True)]
        shares[link] = span(found)
    listed = "; ".join(f"{between(s, 'share')} at {digits(link / 1e9)} GB/s" for link, s in shares.items())
    numbers = {f"share_{link / 1e9:g}": s for link, s in shares.items()}
    if desk.plan.network.link is None:
        why = "the bandwidth of the links is missing (network: link, between_nodes); with nothing overlapped"
        return unknown(claim, f"{why}: {listed}", listed, numbers)
    if gap := missing(desk):
        return unknown(claim, f"{gap} missing; at 100% of the peaks and nothing overlapped: {listed}", listed, numbers)
    computed = span([x for s in shares.values() for x in s])
    return finding(claim, computed, f"of a prefill at {at:g} tokens, nothing overlapped: {listed}", numbers=numbers)


# ------------------------------------------------------------------------------------------- tensor parallel


def _stated(desk: Desk, kind: str) -> Claim | None:
    return next((c for c in desk.plan.claims if c.kind == kind and c.quantity is not None), None)


def _overhead(desk: Desk, operation: Quantity) -> tuple[float, list[str], dict[str, Span]]:
    """The claimed time an operation over all layers, beside the plan's own prefill and decode times."""
    layers = float(desk.plan.variants[0].entry.layers)
    total = operation.high * layers
    texts, numbers = [], {"total": (total, total)}
    for kind, name in (("prefill_time", "prefill"), ("decode_latency", "decode step")):
        own = _stated(desk, kind)
        if own is not None and own.quantity is not None and own.quantity.low > 0:
            share = (total / own.quantity.high, total / own.quantity.low)
            numbers[f"share_of_{kind}"] = share
            texts.append(f"{between(share, 'share')} of its {name} ({between(own.quantity.span, 'seconds')})")
    return total, texts, numbers


def tp_overhead_time(claim: Claim, desk: Desk) -> Finding:
    assert claim.quantity is not None
    total, texts, numbers = _overhead(desk, claim.quantity)
    layers = desk.plan.variants[0].entry.layers
    product = f"{said(claim.quantity.high, 'seconds')} × {layers} layers = {said(total, 'seconds')}"
    if not texts:
        return unknown(claim, f"{product}; no prefill or decode time is claimed to hold it against", product, numbers)
    over = [k for k, s in numbers.items() if k.startswith("share_of") and s[1] > 1.0]
    verdict: Verdict = "wrong" if over else "holds"
    why = f"{product}, which is {' and '.join(texts)}"
    if over:
        why += ": more than the whole step that contains it"
    return finding(claim, (total, total), why, verdict=verdict, numbers=numbers)


def tp_overhead(claim: Claim, desk: Desk) -> Finding:
    assert claim.quantity is not None
    operation = _stated(desk, "tp_overhead_time")
    if operation is not None and operation.quantity is not None:
        total, texts, numbers = _overhead(desk, operation.quantity)
        shares = numbers.get("share_of_prefill_time") or numbers.get("share_of_decode_latency")
        if shares is not None:
            each = said(operation.quantity.high, "seconds")
            why = f"its own {each} an operation is {said(total, 'seconds')} a pass: {' and '.join(texts)}"
            return finding(claim, shares, why, numbers=numbers)
    at = claim.length or desk.plan.workload.prompt[1]
    w = desk.prefill(desk.plan.variants[0], at)
    if desk.plan.network.link is None:
        return unknown(
            claim, "the bandwidth of the links is missing (network: link)", f"{said(w.reduce, 'bytes')} a GPU"
        )
    k = w.stages * w.reduce / float(desk.plan.network.link)
    share = k / (k + desk.seconds(w))
    if gap := missing(desk):
        return unknown(claim, f"{gap} missing: the share of a prefill's time is not known", f"{said(k, 'seconds')}")
    return finding(claim, (share, share), f"all-reduces of {said(w.reduce, 'bytes')} a GPU take {said(k, 'seconds')}")


# --------------------------------------------------------------------------------------------------- balance


def _uniform(desk: Desk, copies: float) -> float:
    """Busiest expert over the mean under uniform routing: 1 + sqrt(2 ln E / mean) (Gaussian tail of a multinomial)."""
    routed = next(f.routed for f in desk.plan.variants[0].entry.ffns if f.routed is not None)
    mean = copies * routed.top_k / routed.experts
    spread = (1.0 - 1.0 / routed.experts) / max(mean, 1e-9)
    return 1.0 + math.sqrt(2.0 * math.log(max(routed.experts, 2)) * spread)


def capacity_factor(claim: Claim, desk: Desk) -> Finding:
    return _balance(claim, desk)


def imbalance(claim: Claim, desk: Desk) -> Finding:
    return _balance(claim, desk)


def _balance(claim: Claim, desk: Desk) -> Finding:
    """What routing does nobody can compute from shapes; what chance alone does, one can."""
    if not is_moe(desk.plan):
        return unknown(claim, f"{desk.plan.variants[0].entry.name} has no experts")
    w = desk.plan.workload
    decode, prefill = _uniform(desk, w.batch), _uniform(desk, w.batch * w.prompt[1])
    numbers = {"uniform_decode": (decode, decode), "uniform_prefill": (prefill, prefill)}
    computed = (
        f"uniform routing alone: busiest expert {digits(decode)} times the mean in decode, {digits(prefill)} in prefill"
    )
    why = "how often each expert is chosen is missing (a histogram of the router's choices)"
    factor, variance = _stated(desk, "capacity_factor"), _stated(desk, "imbalance")
    if factor is not None and variance is not None and factor.quantity and variance.quantity:
        room = factor.quantity.high - 1.0
        numbers["room"] = (room, room)
        if variance.quantity.high > room * 1.001:
            why += (
                f"; a capacity of {digits(factor.quantity.high)}x leaves room for {said(room, 'share')}, less than the "
                f"{said(variance.quantity.high, 'share')} it expects: tokens would be dropped"
            )
    return unknown(claim, why, computed, numbers)


CHECKS = {
    "expert_communication": expert_communication,
    "communication_bytes": communication_bytes,
    "communication_share": communication_share,
    "tp_overhead_time": tp_overhead_time,
    "tp_overhead": tp_overhead,
    "capacity_factor": capacity_factor,
    "imbalance": imbalance,
}

__all__ = ["CHECKS"]
