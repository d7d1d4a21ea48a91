"""When a claim holds: its number against the computed range, with the tolerance of how it is written."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dse.audit.kinds import KINDS, label
from dse.audit.quantity import between, digits
from dse.audit.types import Claim, Finding, Quantity, Span, Verdict

TOLERANCE, LOOSE = 0.05, 0.20  # of a number as such, and of "~"


def agrees(q: Quantity, computed: Span) -> bool:
    """The claimed number or range lies in the computed one or holds it, to rounding; GB may have meant GiB."""
    if q.sign == "<":
        return computed[1] <= q.high * (1.0 + TOLERANCE)
    if q.sign == ">":
        return computed[0] >= q.low * (1.0 - TOLERANCE)
    slack = LOOSE if q.sign == "~" else TOLERANCE
    low, high = computed[0] * (1.0 - slack), computed[1] * (1.0 + slack)
    for scale in {1.0, q.loose}:
        a, b = q.low * scale, q.high * scale
        inside = low <= a and b <= high
        around = a * (1.0 - slack) <= computed[0] and computed[1] <= b * (1.0 + slack)
        if inside or (around and b <= 3.0 * max(a, 1e-30)):
            return True
    return False


def written(claim: Claim) -> str:
    """What the plan says, as it says it."""
    return claim.text


def name_of(claim: Claim) -> str:
    at = f" at {claim.length:g} tokens" if claim.length is not None else ""
    return label(claim.kind) + at


def finding(
    claim: Claim,
    computed: Span,
    why: str,
    verdict: Verdict | None = None,
    numbers: Mapping[str, Span] | None = None,
    text: str | None = None,
) -> Finding:
    """A finding from a computed range; the verdict follows from it where none is given."""
    assert claim.quantity is not None  # kinds with a number only
    if verdict is None:
        verdict = "holds" if agrees(claim.quantity, computed) else "wrong"
    dimension = KINDS[claim.kind].dimension
    return Finding(
        name=name_of(claim),
        verdict=verdict,
        claimed=written(claim),
        computed=text or between(computed, dimension),
        why=why,
        numbers=MappingProxyType({claim.kind: computed, **(numbers or {})}),
    )


def unknown(claim: Claim, why: str, computed: str = "", numbers: Mapping[str, Span] | None = None) -> Finding:
    return Finding(name_of(claim), "unknown", written(claim), computed, why, MappingProxyType(dict(numbers or {})))


def times(a: float, b: float) -> str:
    """How far a claim is from what is computed: `4.2 times too high`."""
    if a <= 0 or b <= 0:
        return "not the same"
    ratio = a / b
    if 0.8 < ratio < 1.25:
        return f"{digits(100 * abs(ratio - 1.0), 2)}% {'too high' if ratio > 1 else 'too low'}"
    return f"{digits(ratio if ratio > 1 else 1 / ratio, 2)} times too {'high' if ratio > 1 else 'low'}"


__all__ = ["agrees", "finding", "name_of", "times", "unknown", "written"]
