"""The cells of a case's row as numbers: ranges, parallel degrees that belong together, drafted tokens."""

from __future__ import annotations

import numpy as np

from dse.catalog.model_schema import ModelEntry
from dse.errors import InputError
from dse.space.facts import facts

# Counts with their defaults; "" stands for a missing cell.
COUNTS = {"tp": 1, "pp": 1, "attention_dp": 1, "cp": 1, "concurrency": 1, "chunk": 8192}
_SPECULATION = {"": 0, "no": 0, "none": 0, "false": 0, "unknown": 0, "mtp_likely": None, "yes": None, "mtp": None}


def degrees(row: dict[str, str], entry: ModelEntry, counts: dict[str, float]) -> dict[str, float]:
    """Parallel degrees that belong together; moe_* are ignored for dense models and derived where left out."""
    shape = facts([entry])
    tp, pp, stage = counts["tp"], counts["pp"], counts["tp"] * counts["attention_dp"] * counts["cp"]
    if not shape.tp(np.array([int(tp)]))[0, 0]:
        allowed = [str(n) for n in 2 ** np.arange(8) if shape.tp(np.array([n]))[0, 0]]
        what = f"the heads and widths of {entry.name} (allowed: {', '.join(allowed)})"
        raise InputError(f"tp: {tp:g} does not divide {what}")
    if pp > entry.layers:
        raise InputError(f"pp: {pp:g} is more than the {entry.layers} layers of {entry.name}")
    moe_ep = moe_tp = 1.0
    replicas = 0.0
    if shape.moe[0]:
        ep, mtp = row.get("moe_ep", ""), row.get("moe_tp", "")
        moe_ep = number(row, "moe_ep", 1.0, low=1.0, whole=True)
        moe_tp = number(row, "moe_tp", 1.0, low=1.0, whole=True)
        if not mtp:
            moe_tp = stage / moe_ep
        elif not ep:
            moe_ep = stage / moe_tp
        if moe_ep * moe_tp != stage:
            raise InputError(
                f"moe_ep * moe_tp = {moe_ep * moe_tp:g} is not tp * attention_dp * cp = {stage:g}; they share the GPUs"
            )
        replicas = _replicas(row, int(shape.experts_of[0]), moe_ep)
    else:
        moe_tp = stage
    return {
        "tp": tp,
        "pp": pp,
        "attention_dp": counts["attention_dp"],
        "cp": counts["cp"],
        "moe_tp": moe_tp,
        "moe_ep": moe_ep,
        "eplb_replicas": replicas,
    }


def _replicas(row: dict[str, str], experts: int, ep: float) -> float:
    """Redundant experts a layer; none in a group of one."""
    value = number(row, "eplb_replicas", 0.0, low=0.0, high=1e5, whole=True)
    if value and (experts + value) % ep:
        raise InputError(
            f"eplb_replicas: {value:g} with {experts} experts do not fill {ep:g} ranks evenly"
            f" (allowed: {-experts % ep:g} and every {ep:g} more)"
        )
    return value if ep > 1 else 0.0


def number(
    row: dict[str, str],
    name: str,
    default: float | None,
    low: float = 0.0,
    high: float = 1e12,
    whole: bool = False,
) -> float:
    text = row.get(name, "")
    if not text:
        if default is None:
            raise InputError(f"{name}: is empty (required)")
        return float(default)
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{name}: {text!r} is not a number") from None
    if not low <= value <= high or (whole and value != round(value)):
        kind = "whole numbers " if whole else ""
        raise InputError(f"{name}: {text} is out of range (allowed: {kind}{low:g} to {high:g})")
    return value


def draft(text: str, entry: ModelEntry) -> float:
    """Drafted tokens a step: a number, or a word that says whether the run speculated (MTP depth of the model)."""
    word = text.lower()
    if word in _SPECULATION:
        known = _SPECULATION[word]
        return float(max(1, entry.mtp_depth) if known is None else known)
    return number({"speculation": text}, "speculation", 0.0, low=0.0, high=64.0)


__all__ = ["COUNTS", "degrees", "draft", "number"]
