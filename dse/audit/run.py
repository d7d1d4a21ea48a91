"""`audit`: every claim of a written plan, recomputed from the hardware that the plan itself states."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from dse.audit import memory_claims, plan_claims, time_claims, traffic_claims
from dse.audit.nearest import nearest
from dse.audit.price import Desk
from dse.audit.types import Audit, Claim, Finding, WrittenPlan

CHECKS: MappingProxyType[str, Callable[[Claim, Desk], Finding]] = MappingProxyType(
    {**memory_claims.CHECKS, **time_claims.CHECKS, **traffic_claims.CHECKS, **plan_claims.CHECKS}
)


def audit(plan: WrittenPlan) -> Audit:
    """Claims in their order, then what every plan claims by being one: it maps, fits, starts and meets its targets."""
    desk = Desk(plan)
    findings = [_checked(claim, desk) for claim in plan.claims]
    findings.append(plan_claims.mapping(desk))
    findings.append(memory_claims.fits(desk))
    started = plan_claims.launch(desk)
    findings += [started] if started is not None else []
    findings += plan_claims.contradictions(desk)
    findings += time_claims.targets(desk)
    return Audit(
        name=plan.name,
        description=plan.description,
        findings=tuple(findings),
        layouts=desk.layouts,
        assumptions=_assumptions(desk),
        nearest=nearest(desk),
    )


def _checked(claim: Claim, desk: Desk) -> Finding:
    if claim.kind == "":
        return Finding("claim", "unknown", claim.text, "", claim.problem)
    return CHECKS[claim.kind](claim, desk)


def _assumptions(desk: Desk) -> tuple[str, ...]:
    """What the plan leaves open and how it was taken."""
    plan = desk.plan
    found = [f"hardware: {plan.hardware}; MFU {_share(plan.mfu)}, bandwidth utilisation {_share(plan.utilisation)}"]
    if len(plan.variants) > 1:
        names = " and ".join(v.label for v in plan.variants)
        found.append(
            f"the model's dimensions leave open whether its feed-forward layers are gated: both {names} are worked out"
        )
    if any(v.entry.vocab <= 1 for v in plan.variants):
        found.append("no vocabulary is stated: no embeddings and no head are counted")
    if len(desk.layouts) > 1:
        found.append(f"the degrees can be read in {len(desk.layouts)} ways; numbers are those of: {desk.layout.name}")
    if plan.network.link is None:
        found.append("no links are stated: times leave communication out, shares are given at 450 and 50 GB/s")
    found.append("times are the bare roofline: no latency, launch or scheduling; the whole batch in one step")
    return tuple(found)


def _share(x: float | None) -> str:
    return "not stated" if x is None else f"{100 * x:g}%"


__all__ = ["audit"]
