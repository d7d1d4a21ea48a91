"""Claims about size: parameters, weights, KV cache, activations, buffers, totals, headroom."""

from __future__ import annotations

import math

from dse.audit.judge import LOOSE, agrees, finding, name_of, times, unknown
from dse.audit.layouts import written_shards
from dse.audit.price import Desk, Use, span
from dse.audit.quantity import between, digits, said
from dse.audit.types import Claim, Finding, Layout, Span, Variant, Verdict


def _value(claim: Claim) -> float:
    assert claim.quantity is not None
    return claim.quantity.high


def _labels(desk: Desk, values: list[str]) -> str:
    """`67.4 MB (two-matrix experts) or 84.1 MB (SwiGLU)`."""
    names = [v.label for v in desk.plan.variants]
    return " or ".join(f"{x} ({n})" if n else x for x, n in zip(values, names, strict=True))


# -------------------------------------------------------------------------------------------- parameters


def parameters(claim: Claim, desk: Desk) -> Finding:
    variants = desk.plan.variants
    computed = desk.parameters()
    counts = _labels(desk, [str(v.parameters) for v in variants])
    active = span([float(v.active) for v in variants])
    why = f"the dimensions give {counts} parameters, {between(active, 'parameters')} active a token"
    numbers = {"active_parameters": active}
    widths = [w for v in variants if (w := _width_for(v, _value(claim))) is not None]
    if not agrees(claim.quantity, computed) and len(widths) == len(variants):  # type: ignore[arg-type]
        which = _labels(desk, [str(round(w)) for w in widths])
        experts = variants[0].entry.ffns[-1].routed is not None
        part = "an expert width" if experts else "a feed-forward width"
        why += f"; {said(_value(claim), 'parameters')} need {part} of {which}"
        numbers["width_needed"] = span(widths)
    return finding(claim, computed, why, numbers=numbers, text=f"{counts} parameters")


def _width_for(v: Variant, total: float) -> float | None:
    """The width of experts (or of the dense layers) at which the model would have `total` parameters."""
    entry = v.entry
    routed = [f for f in entry.ffns if f.routed is not None]
    if routed:
        sized = [(f.count * f.routed.experts * f.routed.expert_params, f.routed.width) for f in routed if f.routed]
    else:
        sized = [(f.count * f.matrices * entry.hidden * f.width, f.width) for f in entry.ffns]
    part = float(sum(size for size, _ in sized))
    rest = v.parameters - part
    return sized[0][1] * (total - rest) / part if part > 0 and total > rest else None


def active_parameters(claim: Claim, desk: Desk) -> Finding:
    counts = _labels(desk, [str(v.active) for v in desk.plan.variants])
    computed = span([float(v.active) for v in desk.plan.variants])
    return finding(claim, computed, f"the dimensions give {counts} active parameters a token", text=counts)


# ----------------------------------------------------------------------------------------------- weights


def _weights(desk: Desk, x: Layout) -> list[float]:
    return [desk.use(v, desk.plan.workload.longest, x).weights for v in desk.plan.variants]


def weights_gpu(claim: Claim, desk: Desk) -> Finding:
    each = _weights(desk, desk.layout)
    computed = span(each)
    bytes_each = float(desk.plan.precision.expert_bytes)
    why = f"{_labels(desk, [said(x, 'bytes') for x in each])} a GPU under {desk.layout.name}"
    for other in desk.layouts[1:]:
        why += f"; {between(span(_weights(desk, other)), 'bytes')} under {other.name}"
    numbers: dict[str, Span] = {}
    if not agrees(claim.quantity, computed):  # type: ignore[arg-type]
        ranks = desk.layout.stage * desk.layout.pp
        implied = _value(claim) * ranks / bytes_each
        why += f"; {said(_value(claim), 'bytes')} a GPU would be {said(implied, 'parameters')}"
        numbers["implied_parameters"] = (implied, implied)
        stated = next((c for c in desk.plan.claims if c.kind == "parameters" and c.quantity), None)
        if stated is not None and not agrees(stated.quantity, desk.parameters()):  # type: ignore[arg-type]
            if_so = _value(stated) * bytes_each / ranks
            why += f", and the claimed {said(_value(stated), 'parameters')} would be {said(if_so, 'bytes')} a GPU"
            numbers["weights_gpu_as_claimed"] = (if_so, if_so)
    return finding(claim, computed, why, numbers=numbers)


def weights_total(claim: Claim, desk: Desk) -> Finding:
    each = [desk.weights_total(v) for v in desk.plan.variants]
    return finding(claim, span(each), f"one copy of the weights: {_labels(desk, [said(x, 'bytes') for x in each])}")


def weights(claim: Claim, desk: Desk) -> Finding:
    """Without a scope: a GPU's, unless only the whole agrees."""
    total = span([desk.weights_total(v) for v in desk.plan.variants])
    a_gpu = agrees(claim.quantity, span(_weights(desk, desk.layout)))  # type: ignore[arg-type]
    if agrees(claim.quantity, total) and not a_gpu:  # type: ignore[arg-type]
        return weights_total(claim, desk)
    return weights_gpu(claim, desk)


def weights_expert(claim: Claim, desk: Desk) -> Finding:
    sizes = []
    for v in desk.plan.variants:
        found = [f.routed for f in v.entry.ffns if f.routed is not None]
        if not found:
            return unknown(claim, f"{v.entry.name} has no experts")
        sizes.append(found[0].expert_params * float(desk.plan.precision.expert_bytes))
    return finding(claim, span(sizes), f"one expert of one layer: {_labels(desk, [said(x, 'bytes') for x in sizes])}")


# ---------------------------------------------------------------------------------------------- KV cache


def _length(claim: Claim, desk: Desk) -> float:
    return claim.length if claim.length is not None else desk.plan.workload.longest


def kv_token(claim: Claim, desk: Desk) -> Finding:
    at = _length(claim, desk)
    computed = span([desk.kv_sequence(v, at) / at for v in desk.plan.variants])
    return finding(claim, computed, f"{said(computed[1], 'bytes')} a token ({digits(computed[1] / 1024)} KiB)")


def kv_sequence(claim: Claim, desk: Desk) -> Finding:
    at = _length(claim, desk)
    computed = span([desk.kv_sequence(v, at) for v in desk.plan.variants])
    token = computed[1] / at
    binary = f"{digits(computed[1] / 2**20)} MiB"
    why = f"{digits(token / 1024)} KiB a token × {at:g} tokens = {binary} = {said(computed[1], 'bytes')}"
    return finding(claim, computed, why, numbers={"kv_token": (token, token)})


def kv_total(claim: Claim, desk: Desk) -> Finding:
    at = _length(claim, desk)
    batch = desk.plan.workload.batch
    computed = span([batch * desk.kv_sequence(v, at) for v in desk.plan.variants])
    why = f"{batch:g} sequences of {at:g} tokens: {said(computed[1], 'bytes')} = {digits(computed[1] / 2**30)} GiB"
    return finding(claim, computed, why)


def kv_gpu(claim: Claim, desk: Desk) -> Finding:
    at = _length(claim, desk)
    x = desk.layout
    computed = span([desk.use(v, at).kv for v in desk.plan.variants])
    ways = desk.plan.workload.batch * desk.kv_sequence(desk.plan.variants[0], at) / computed[0]
    batch = f"{desk.plan.workload.batch:g} sequences of {at:g} tokens"
    why = f"{batch} are {between(computed, 'bytes')} a GPU where attention is sharded {digits(ways)} ways ({x.name})"
    numbers = {"kv_gpu": computed}
    shards = written_shards(desk.plan)
    if shards is None or shards >= ways:
        return finding(claim, computed, why)
    d = desk.plan.degrees
    alone = Layout("", float(d.tp or 1), float(d.pp or 1), float(d.attention_dp or 1), float(d.cp or 1), 1.0, 1.0)
    as_written = span([desk.use(v, at, alone).kv / float(d.dp or 1) for v in desk.plan.variants])
    numbers["kv_gpu_as_written"] = as_written
    why += (
        f"; with the degrees as written (DP={d.dp}, TP={d.tp}) it is {between(as_written, 'bytes')} on {shards:g} GPUs "
        "and nothing on the others"
    )
    both = f"{between(as_written, 'bytes')} on {shards:g} GPUs; {between(computed, 'bytes')} if sharded {ways:g} ways"
    return finding(claim, computed, why, verdict="wrong", numbers=numbers, text=both)


def kv(claim: Claim, desk: Desk) -> Finding:
    """Without a scope: the one that agrees, else nobody knows which is meant."""
    for check in (kv_sequence, kv_gpu, kv_total, kv_token):
        found = check(claim, desk)
        if found.verdict == "holds":
            return found
    at = _length(claim, desk)
    v = desk.plan.variants[0]
    one, whole = desk.kv_sequence(v, at), desk.plan.workload.batch * desk.kv_sequence(v, at)
    computed = (
        f"{said(one, 'bytes')} a sequence, {said(desk.use(v, at).kv, 'bytes')} a GPU, {said(whole, 'bytes')} in all"
    )
    return unknown(claim, "it does not say of what: a token, a sequence, a GPU or in all; none agrees", computed)


# -------------------------------------------------------------------------------- working space and totals


def activations_gpu(claim: Claim, desk: Desk) -> Finding:
    computed = span([desk.use(v, _length(claim, desk)).activations for v in desk.plan.variants])
    why = (
        f"the widest operator with all prompts of a GPU in one step ({desk.layout.name}); smaller with chunked prefill"
    )
    return _allowance(claim, computed, why)


def buffers_gpu(claim: Claim, desk: Desk) -> Finding:
    computed = span([desk.use(v, _length(claim, desk)).buffers for v in desk.plan.variants])
    return _allowance(claim, computed, "dispatch and combine buffers of one step's tokens, sent and received")


def _allowance(claim: Claim, need: Span, why: str) -> Finding:
    """Space set aside is enough, or too little; what is left over is no error below a tenfold of the need."""
    assert claim.quantity is not None
    enough = claim.quantity.high >= need[1] * 0.95
    if enough and claim.quantity.high > 10.0 * max(need[1], 1.0) and need[1] > 0:
        return finding(claim, need, f"{why}; the claim is {times(claim.quantity.high, need[1])}", verdict="wrong")
    return finding(
        claim,
        need,
        f"{why}; the claim sets {'enough' if enough else 'too little'} aside",
        verdict="holds" if enough else "wrong",
    )


def _uses(desk: Desk, at: float) -> list[Use]:
    return [desk.use(v, at) for v in desk.plan.variants]


def memory_gpu(claim: Claim, desk: Desk) -> Finding:
    at = _length(claim, desk)
    uses = _uses(desk, at)
    computed = span([u.total for u in uses])
    capacity = float(desk.plan.device.capacity)
    parts = ", ".join(
        f"{name} {between(span([getattr(u, key) for u in uses]), 'bytes')}"
        for name, key in (("weights", "weights"), ("KV", "kv"), ("activations", "activations"), ("buffers", "buffers"))
        if max(getattr(u, key) for u in uses) > 0
    )
    why = f"computed: {parts}"
    numbers: dict[str, Span] = {}
    terms = _terms(claim, desk)
    if terms:
        total = sum(_value(c) for c in terms)
        loose = claim.quantity is not None and claim.quantity.sign == "~"
        adds = abs(total - _value(claim)) <= (LOOSE if loose else 0.02) * _value(claim)
        listed = " + ".join(said(_value(c), "bytes") for c in terms)
        follows = f"its own terms {listed} = {said(total, 'bytes')} {'add up' if adds else 'do not add up'}"
        wrong = [c for c in terms if CHECKS[c.kind](c, desk).verdict != "holds"]
        if wrong:
            follows += f", but are wrong ({', '.join(name_of(c) for c in wrong)})"
        why = f"{follows}; {why}"
        numbers["sum_of_terms"] = (total, total)
    fits = "it fits" if computed[1] <= capacity else "it does not fit"
    why += f"; {fits} in {said(capacity, 'bytes')}"
    return finding(claim, computed, why, numbers=numbers)


def _terms(claim: Claim, desk: Desk) -> list[Claim]:
    """The claimed terms of a total: those of the same length, else those of none; at least two of them."""
    found = []
    for kinds in (("weights_gpu", "weights"), ("kv_gpu",), ("activations_gpu",), ("buffers_gpu",)):
        options = [c for c in desk.plan.claims if c.kind in kinds and c.quantity is not None]
        same = [c for c in options if c.length == claim.length] or [c for c in options if c.length is None]
        found += same[:1]
    return found if len(found) >= 2 else []


def memory_share(claim: Claim, desk: Desk) -> Finding:
    at = _length(claim, desk)
    capacity = float(desk.plan.device.capacity)
    total = span([u.total for u in _uses(desk, at)])
    computed = (total[0] / capacity, total[1] / capacity)
    return finding(claim, computed, f"{between(total, 'bytes')} of {said(capacity, 'bytes')} a GPU at {at:g} tokens")


def headroom(claim: Claim, desk: Desk) -> Finding:
    capacity = float(desk.plan.device.capacity)
    total = span([u.total for u in _uses(desk, _length(claim, desk))])
    computed = (1.0 - total[1] / capacity, 1.0 - total[0] / capacity)
    why = f"{between(total, 'bytes')} of {said(capacity, 'bytes')} are used"
    share = next((c for c in desk.plan.claims if c.kind == "memory_share" and c.quantity), None)
    if share is not None and abs(1.0 - _value(share) - _value(claim)) < 0.01:
        why = f"it repeats the memory claim (100% − {said(_value(share), 'share')}): {why}"
    if max(computed) > 0 and not agrees(claim.quantity, computed):  # type: ignore[arg-type]
        why += "; right in direction (it fits), wrong in its terms"
    return finding(claim, computed, why)


def fits(desk: Desk) -> Finding:
    """Does it fit at all, and if not, how many GPUs would it take?"""
    plan = desk.plan
    at, capacity = plan.workload.longest, float(plan.device.capacity)
    total = span([u.total for u in _uses(desk, at)])
    static = span([u.weights for u in _uses(desk, at)])
    v = plan.variants[0]
    whole = desk.weights_total(v) + plan.workload.batch * desk.kv_sequence(v, at)
    least = math.ceil(whole / capacity)
    numbers: dict[str, Span] = {"memory_gpu": total, "gpus_needed": (float(least), float(least))}
    claimed = f"{desk.layout.gpus:g} GPUs of {said(capacity, 'bytes')} hold it"
    use = f"{between(total, 'bytes')} a GPU"
    if total[1] <= capacity:
        why = f"{use} of {said(capacity, 'bytes')} under {desk.layout.name}"
        return Finding("memory", "holds", claimed, use, why, numbers)
    what = f"weights {said(desk.weights_total(v), 'bytes')} + KV {said(whole - desk.weights_total(v), 'bytes')}"
    why = f"memory: {what} need at least {least} GPUs of {said(capacity, 'bytes')}"
    if static[0] > capacity:
        why += f"; the weights alone are {between(static, 'bytes')} a GPU under {desk.layout.name}"
    stated = plan.gpus or desk.layout.gpus
    verdict: Verdict = "impossible" if least > stated else "wrong"
    if verdict == "wrong":
        why = (
            f"{use} is more than {said(capacity, 'bytes')} under {desk.layout.name}; {least} GPUs could hold it evenly"
        )
    else:
        node = plan.network.node
        whole_nodes = f" ({math.ceil(least / node) * node} in whole nodes of {node})" if node else ""
        why = f"needs {least} GPUs{whole_nodes}; {why}"
    return Finding("memory", verdict, claimed, use, why, numbers)


CHECKS = {
    "parameters": parameters,
    "active_parameters": active_parameters,
    "weights": weights,
    "weights_gpu": weights_gpu,
    "weights_total": weights_total,
    "weights_expert": weights_expert,
    "kv": kv,
    "kv_token": kv_token,
    "kv_sequence": kv_sequence,
    "kv_gpu": kv_gpu,
    "kv_total": kv_total,
    "activations_gpu": activations_gpu,
    "buffers_gpu": buffers_gpu,
    "memory_gpu": memory_gpu,
    "memory_share": memory_share,
    "headroom": headroom,
}

__all__ = ["CHECKS", "fits"]
