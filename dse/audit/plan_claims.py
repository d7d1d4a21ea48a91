"""Claims about the plan itself: degrees and GPUs, the launch command, stated twice, arithmetic that does not follow."""

from __future__ import annotations

import math
import re

from dse.audit.judge import TOLERANCE, agrees, finding, name_of, unknown
from dse.audit.layouts import is_moe
from dse.audit.price import Desk
from dse.audit.quantity import between, digits, said
from dse.audit.text import degrees_of
from dse.audit.types import Claim, Degrees, Finding, Span, Verdict

USUAL_NODE = 8
ROUNDING = 0.03  # of numbers rounded to two digits


def equation(claim: Claim, desk: Desk) -> Finding:
    """Do both sides of "16 layers × 12.1 GB = 12.1 GB" come to the same?"""
    (left, dimension), (right, _) = claim.sides[0], claim.sides[-1]
    unit = "" if dimension == "number" else dimension
    holds = all(abs(value - right) <= ROUNDING * max(abs(value), abs(right)) for value, _ in claim.sides)
    sides = " against ".join(said(value, unit) for value, _ in claim.sides)
    why = f"the sides come to {sides}"
    if not holds:
        why += f": {digits(max(left, right) / max(min(left, right), 1e-30))} times apart"
    numbers = {"left": (left, left), "right": (right, right)}
    return Finding("arithmetic", "holds" if holds else "wrong", claim.text, said(left, unit), why, numbers)


def stated(claim: Claim, desk: Desk) -> Finding:
    """MFU or bandwidth utilisation, which the plan was given: the two must be one."""
    given = desk.plan.mfu if claim.kind == "mfu" else desk.plan.utilisation
    assert claim.quantity is not None
    if given is None:
        return unknown(claim, "nothing in the plan's hardware to hold it against; it can only be measured")
    if agrees(claim.quantity, (given, given)):
        return finding(claim, (given, given), "as the hardware states it", verdict="holds")
    why = f"contradicts the {said(given, 'share')} that the plan was given"
    return finding(claim, (given, given), why, verdict="wrong")


def gpus(claim: Claim, desk: Desk) -> Finding:
    count = desk.layout.gpus
    return finding(claim, (count, count), f"{desk.layout.name}: {count:g} GPUs")


def degrees(claim: Claim, desk: Desk) -> Finding:
    """Degrees repeated in a claim against those of the plan."""
    try:
        said_here, _ = degrees_of(claim.text)
    except ValueError as error:
        return Finding("degrees", "wrong", claim.text, desk.plan.degrees.written(), str(error))
    own = desk.plan.degrees
    differ = [
        f"{name.upper()}={value} against {name.upper()}={own_value or 1}"
        for name, value in vars(said_here).items()
        if name != "tp_internal" and value is not None and value != ((own_value := getattr(own, name)) or 1)
    ]
    why = "; ".join(differ) if differ else "the degrees of the plan"
    return Finding("degrees", "wrong" if differ else "holds", claim.text, own.written(), why)


def mapping(desk: Desk) -> Finding:
    """Do the degrees, the model and the number of GPUs go together?"""
    plan, x = desk.plan, desk.layout
    d = plan.degrees
    claimed = d.written() + (f" on {plan.gpus} GPUs" if plan.gpus else "")
    problems = _indivisible(desk)
    verdict: Verdict = "impossible" if problems else "holds"
    product = math.prod(v or 1 for v in (d.tp, d.pp, d.dp, d.cp, d.attention_dp))
    if is_moe(plan) and d.ep is not None and d.attention_dp is None:
        product = max(product, d.ep * (d.moe_tp or 1) * (d.pp or 1))
    if plan.gpus and product > plan.gpus:
        problems.insert(0, f"needs {product} GPUs, {plan.gpus} are planned")
        verdict = "impossible"
    elif plan.gpus and plan.gpus % product:
        problems.append(f"the degrees divide {product} GPUs, which is no part of {plan.gpus}")
        verdict = "wrong" if verdict == "holds" else verdict
    if d.tp_internal and (d.tp or 1) > 1:
        problems.append(f"TP={d.tp} inside one GPU adds neither FLOPs nor bandwidth")
        verdict = "wrong" if verdict == "holds" else verdict
    ambiguous = is_moe(plan) and d.attention_dp is None and len(desk.layouts) > 1
    if ambiguous:
        readings = [y for y in desk.layouts if y.tp == (d.tp or 1)] if d.tp_internal else desk.layouts
        problems.append("readings that mean something: " + ", or ".join(y.name for y in readings))
    numbers: dict[str, Span] = {f"gpus_{i}": (y.gpus, y.gpus) for i, y in enumerate(desk.layouts)}
    why = "; ".join(problems) if problems else f"{x.name}: {x.gpus:g} GPUs"
    return Finding("GPU mapping", verdict, claimed, "; ".join(y.name for y in desk.layouts), why, numbers)


def _indivisible(desk: Desk) -> list[str]:
    """Degrees that do not divide what they divide."""
    entry, d, x = desk.plan.variants[0].entry, desk.plan.degrees, desk.layout
    found = []
    heads = {m.core.heads for m in entry.mixers if m.core is not None}
    for h in sorted(heads):
        if d.tp and not d.tp_internal and h % d.tp:
            found.append(f"TP={d.tp} does not divide {h} heads")
    experts = {f.routed.experts for f in entry.ffns if f.routed is not None}
    for e in sorted(experts):
        if d.ep and e % d.ep:
            found.append(f"EP={d.ep} does not divide {e} experts")
    if x.pp > entry.layers:
        found.append(f"PP={x.pp:g} is more than {entry.layers} layers")
    if is_moe(desk.plan) and abs(x.moe_ep * x.moe_tp - x.stage) > 1e-6:
        found.append(f"EP × expert-TP = {x.moe_ep * x.moe_tp:g} is not the {x.stage:g} GPUs of a stage")
    if not is_moe(desk.plan) and d.ep and d.ep > 1:
        found.append(f"EP={d.ep}: {entry.name} has no experts")
    return found


# ----------------------------------------------------------------------------------------------- launch


_OPTIONS = {
    "tp": r"(?:--tensor[-_]parallel[-_]size|--tp(?:[-_]size)?|-tp)",
    "pp": r"(?:--pipeline[-_]parallel[-_]size|--pp(?:[-_]size)?|-pp)",
    "dp": r"(?:--data[-_]parallel[-_]size|--dp(?:[-_]size)?|-dp)",
    "ep": r"(?:--expert[-_]parallel[-_]size|--ep(?:[-_]size)?|-ep)",
    "processes": r"--nproc[-_]per[-_]node",
    "nodes": r"--nnodes",
}


def launch(desk: Desk) -> Finding | None:
    """Does the command start what the plan says, on nodes that exist?"""
    text, plan = desk.plan.launch, desk.plan
    if not text:
        return None
    found = {k: int(m[1]) for k, p in _OPTIONS.items() if (m := re.search(rf"(?<!\S){p}[= ](\d+)", text))}
    if not found:
        return Finding("launch command", "unknown", text, "", "no number of processes or degree is understood in it")
    problems = []
    nodes, node = found.get("nodes", 1), plan.network.node
    total = plan.gpus or desk.layout.gpus
    if "processes" in found:
        each = found["processes"]
        if nodes * each != total:
            problems.append(f"{nodes} × {each} = {nodes * each} processes for {total:g} GPUs")
        size = node or USUAL_NODE
        if each > size:
            whose = f"the plan's have {size}" if node else f"none are stated, and the usual have {size}"
            split = f"--nproc_per_node={size} --nnodes={math.ceil(total / size)}"
            problems.append(f"--nproc_per_node={each} needs nodes of {each} GPUs; {whose} (there: {split})")
    for name in ("tp", "pp", "dp", "ep"):
        own = getattr(plan.degrees, name)
        if name in found and own is not None and found[name] != own:
            problems.append(f"{name.upper()}={found[name]} in the command, {own} in the plan")
    world = math.prod(found.get(k, 1) for k in ("tp", "pp", "dp"))
    if "processes" not in found and plan.gpus and not (plan.gpus / world).is_integer():
        problems.append(f"the command starts {world} ranks for {plan.gpus} GPUs")
    started = ", ".join(f"{k} {v}" for k, v in found.items())
    numbers = {k: (float(v), float(v)) for k, v in found.items()}
    why = "; ".join(problems) if problems else f"starts {total:g} GPUs as planned"
    return Finding("launch command", "wrong" if problems else "holds", text, started, why, numbers)


def contradictions(desk: Desk) -> list[Finding]:
    """The same thing claimed twice, with numbers that exclude each other."""
    found = []
    first: dict[tuple[str, float | None], Claim] = {}
    for claim in desk.plan.claims:
        if claim.quantity is None or claim.kind in ("", "equation"):
            continue
        kind = {"weights": "weights_gpu"}.get(claim.kind, claim.kind)
        other = first.setdefault((kind, claim.length), claim)
        a, b = claim.quantity, other.quantity
        if other is claim or b is None:
            continue
        apart = a.low > b.high * (1 + TOLERANCE) or b.low > a.high * (1 + TOLERANCE)
        if apart and not {a.sign, b.sign} & {"<", ">"}:
            why = f"{between(b.span, b.dimension)} in one place, {between(a.span, a.dimension)} in another"
            found.append(Finding(f"contradiction: {name_of(claim)}", "wrong", f"{other.text} / {claim.text}", "", why))
    return found


CHECKS = {
    "equation": equation,
    "mfu": stated,
    "bandwidth_utilisation": stated,
    "gpus": gpus,
    "degrees": degrees,
}

__all__ = ["CHECKS", "Degrees", "contradictions", "launch", "mapping"]
